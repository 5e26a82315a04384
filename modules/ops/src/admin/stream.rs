//! Streaming answers: lines are made as fast as the reader takes them, in bounded pieces.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use broker::Tasks;
use bytes::Bytes;
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;

/// A piece is sent when it holds this much, or when the writer flushes.
const PIECE_BYTES: usize = 32 << 10;
/// Pieces on their way; with the one being filled, this bounds what a mute reader makes us hold.
const PIECES: usize = 2;

/// The reader hung up.
#[derive(Debug)]
pub(super) struct Gone;

/// Where lines go.
#[derive(Debug)]
pub(super) struct Lines {
    piece: Vec<u8>,
    pieces: mpsc::Sender<Bytes>,
}

impl Lines {
    /// Adds one object as a line; waits while the reader is behind.
    pub(super) async fn line<T: Serialize>(&mut self, value: &T) -> Result<(), Gone> {
        serde_json::to_writer(&mut self.piece, value)
            .expect("rows have string keys and a Vec takes everything");
        self.piece.push(b'\n');
        if self.piece.len() >= PIECE_BYTES { self.flush().await } else { Ok(()) }
    }

    /// Sends what there is.
    pub(super) async fn flush(&mut self) -> Result<(), Gone> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = Bytes::from(std::mem::take(&mut self.piece));
        self.pieces.send(piece).await.map_err(|_closed| Gone)
    }

    /// Completes when the reader has hung up. Cancel safe.
    pub(super) async fn gone(&self) {
        self.pieces.closed().await;
    }
}

/// An answer whose lines `write` makes in a task of its own, which ends with the answer or the process.
/// `write` flushes before it returns.
pub(super) fn ndjson<F, Writing>(tasks: &Tasks, name: &'static str, write: F) -> Response
where
    F: FnOnce(Lines) -> Writing,
    Writing: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, pieces) = mpsc::channel(PIECES);
    let stop = tasks.stopped();
    let writing = write(Lines { piece: Vec::new(), pieces: sender });
    tasks.spawn(name, async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            ended = writing => {
                if let Err(Gone) = ended {
                    tracing::debug!(answer = name, "the reader hung up");
                }
            }
        }
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::new(Pieces(pieces))).into_response()
}

/// The reader's side, as a body.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}
