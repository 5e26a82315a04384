//! Bodies of answers: whole, a line for each event of a watch, or what a node sends.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::{api::watch::WatchEvent, http::negotiate::Shaper, nodes::forward::NodeBody};

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum Answer {
    /// All of it.
    Whole(Option<Bytes>),
    /// A line for each event, as they come.
    Watch(Box<Events>),
    /// What a node says, as it comes. When the node's side breaks, so does the client's connection.
    Node(Box<NodeBody>),
}

/// Events of a watch on their way to a client.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) events: mpsc::Receiver<WatchEvent>,
    pub(crate) shaper: Shaper,
    /// The watch's place among all watches.
    pub(crate) _place: OwnedSemaphorePermit,
}

impl Answer {
    pub(crate) fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::Whole(Some(bytes.into()))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Watch(watch) => watch.events.poll_recv(cx).map(|event| {
                let event = event?;
                let object = match event.ty {
                    "ERROR" => event.object,
                    "BOOKMARK" => watch.shaper.bookmark(event.object),
                    _ => watch.shaper.event(event.object),
                };
                let mut line = json!({"type": event.ty, "object": object}).to_string();
                line.push('\n');
                Some(Ok(Frame::data(line.into())))
            }),
            Self::Node(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Watch(_) => false,
            Self::Node(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Watch(_) => SizeHint::default(),
            Self::Node(body) => body.size_hint(),
        }
    }
}
