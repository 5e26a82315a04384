//! A delivery as `MSG` or `HMSG`.

use codec::{FrameView, frame::header, name};

use super::{
    egress::{Egress, push_decimal},
    header::BlockWriter,
};
use crate::core::event::Delivery;

/// Name of the stream that a message stands in.
pub(super) const STREAM: &str = "Octobus-Stream";
/// Its epoch there, 16 hex digits.
pub(super) const EPOCH: &str = "Octobus-Epoch";
/// Its sequence number there.
pub(super) const SEQ: &str = "Octobus-Seq";
/// W3C trace context.
pub(super) const TRACEPARENT: &str = "traceparent";

/// Text of one message before it is known how long it is. Kept between messages, emptied when idle.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    subject: String,
    reply: String,
    headers: Vec<u8>,
}

impl Scratch {
    /// Gives back memory; for a connection that is about to wait.
    pub(super) fn shrink(&mut self) {
        const IDLE_CAPACITY: usize = 256;
        if self.subject.capacity() + self.reply.capacity() + self.headers.capacity() > IDLE_CAPACITY {
            *self = Self::default();
        }
    }
}

/// The subscription that a message goes to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Recipient<'a> {
    /// The client's name for it.
    pub sid: &'a [u8],
    /// It sees topics of nodes, so the subject names the node.
    pub up: bool,
    /// The client understands `HMSG`.
    pub headers: bool,
}

/// Writes one message. Returns the size of headers and payload.
pub(super) fn write(
    to: Recipient<'_>,
    delivery: &Delivery,
    frame: &FrameView<'_>,
    scratch: &mut Scratch,
    out: &mut Egress,
) -> usize {
    let Scratch { subject, reply, headers } = scratch;
    subject.clear();
    if to.up {
        name::node_subject(name::UP_PREFIX, &delivery.origin, frame.topic(), subject);
    } else {
        name::topic_to_subject(frame.topic(), subject);
    }
    reply.clear();
    if let Some(topic) = &delivery.reply {
        name::topic_to_subject(topic, reply);
    }
    let payload = frame.payload();
    let has_headers = to.headers && write_headers(delivery, frame, headers);
    let headers: &[u8] = if has_headers { headers } else { &[] };

    out.text(if has_headers { b"HMSG " } else { b"MSG " });
    out.text(subject.as_bytes());
    out.text(b" ");
    out.text(to.sid);
    out.text(b" ");
    if !reply.is_empty() {
        out.text(reply.as_bytes());
        out.text(b" ");
    }
    if has_headers {
        out.decimal(headers.len());
        out.text(b" ");
    }
    out.decimal(headers.len() + payload.len());
    out.text(b"\r\n");
    out.text(headers);
    out.payload(&delivery.frame, payload);
    out.text(b"\r\n");
    headers.len() + payload.len()
}

/// Writes what a requester gets when nobody answers. `inbox` is the topic that the answer would have had.
pub(super) fn write_no_responders(
    sid: &[u8],
    inbox: &str,
    frame: Option<&FrameView<'_>>,
    scratch: &mut Scratch,
    out: &mut Egress,
) {
    let mut block = BlockWriter::new(&mut scratch.headers);
    block.status(503);
    // The usual reason goes without saying, as on nats-server.
    let reason = frame.and_then(|frame| frame.header(header::SERVICE_ERROR));
    if let Some(reason) = reason.filter(|&reason| reason != b"no responders") {
        let code = frame.and_then(|frame| frame.header(header::SERVICE_ERROR_CODE)).unwrap_or(b"503");
        block.header(header::SERVICE_ERROR_CODE, code);
        block.header(header::SERVICE_ERROR, reason);
    }
    block.finish();
    let Scratch { subject, headers, .. } = scratch;
    subject.clear();
    name::topic_to_subject(inbox, subject);
    out.text(b"HMSG ");
    out.text(subject.as_bytes());
    out.text(b" ");
    out.text(sid);
    out.text(b" ");
    out.decimal(headers.len());
    out.text(b" ");
    out.decimal(headers.len());
    out.text(b"\r\n");
    out.text(headers);
    out.text(b"\r\n");
}

/// Headers of the message in `out`; false if it has none.
///
/// Ours come first, and a frame cannot bring its own under their names.
fn write_headers(delivery: &Delivery, frame: &FrameView<'_>, out: &mut Vec<u8>) -> bool {
    let mut block = BlockWriter::new(out);
    if let Some(position) = &delivery.position {
        block.header(STREAM, position.stream.as_bytes());
        block.header(EPOCH, format!("{:016x}", position.epoch).as_bytes());
        let mut seq = Vec::with_capacity(20);
        push_decimal(&mut seq, position.seq);
        block.header(SEQ, &seq);
    }
    let trace = frame.trace();
    if let Some(trace) = trace {
        block.header(TRACEPARENT, trace.to_traceparent().as_bytes());
    }
    let is_ours = |name: &str| {
        let traced = trace.is_some() && name.eq_ignore_ascii_case(TRACEPARENT);
        traced || [STREAM, EPOCH, SEQ].iter().any(|ours| name.eq_ignore_ascii_case(ours))
    };
    for (name, value) in frame.headers().filter(|(name, _)| !is_ours(name)) {
        block.header(name, value);
    }
    block.finish()
}
