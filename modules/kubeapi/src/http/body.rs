//! Bodies of answers: whole, or a line for each event of a watch.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use serde_json::json;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::{api::watch::WatchEvent, http::negotiate::Shaper};

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum Answer {
    /// All of it.
    Whole(Option<Bytes>),
    /// A line for each event, as they come.
    Watch(Box<Events>),
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
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
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
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Watch(_) => SizeHint::default(),
        }
    }
}
