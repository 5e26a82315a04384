//! Bodies of answers, and refusals in kubelet's words.

use std::io;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    Response, StatusCode,
    body::Frame,
    header::{CONTENT_TYPE, HeaderValue},
};

/// What a client is sent.
pub(super) type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// Why it is not sent what it asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) why: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self { status, why: why.into() }
    }

    pub(super) fn bad_request(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why)
    }

    pub(super) fn failed(why: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, why)
    }
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        let mut answer = text(refusal.why + "\n");
        *answer.status_mut() = refusal.status;
        answer
    }
}

fn whole(bytes: Bytes, content: &'static str) -> Answer {
    let body = Full::new(bytes).map_err(|never| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content));
    answer
}

pub(super) fn text(bytes: impl Into<Bytes>) -> Answer {
    whole(bytes.into(), "text/plain; charset=utf-8")
}

pub(super) fn json(value: &serde_json::Value) -> Answer {
    whole(value.to_string().into(), "application/json")
}

/// An answer with nothing in it yet: its status and headers follow.
pub(super) fn empty() -> Answer {
    Response::new(Full::default().map_err(|never| match never {}).boxed_unsync())
}

/// An answer that is made as it is read.
pub(super) fn stream(pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Answer {
    use futures_util::StreamExt as _;
    let body = StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync();
    let mut answer = Response::new(body);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}
