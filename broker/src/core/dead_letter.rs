//! Records that this broker can never take: they go to the stream `dead-letter`, with headers that say where they
//! came from and why, and block nothing.
//!
//! In their own Log a gap with reason `refused` stands in their place, so that the mark moves over them and a
//! reader sees where to look.

use std::sync::Arc;

use bytes::Bytes;
use codec::{Class, Flags, FrameView, Kind, Record, frame::FrameParts, proto};

use super::{
    Core, DropReason,
    event::Origin,
    log::{self, LogId},
    policy::Policy,
};
use crate::limits;

/// Name of the stream; no other may have it.
pub const STREAM: &str = "dead-letter";
/// What is kept of one record: enough to see what it is.
const KEPT_BYTES: usize = 64 << 10;

/// What is kept of dead letters: the newest.
pub(super) fn policy() -> Policy {
    Policy::of_class(Class::Bulk, limits::DEAD_LETTER_BYTES)
}

/// Why no broker of this kind can ever take a record.
pub(super) fn unacceptable(record: &Record) -> Option<&'static str> {
    if record.header.kind != Kind::LOG {
        return None;
    }
    if record.body.len() > limits::FRAME_MAX {
        return Some("larger than any frame");
    }
    match FrameView::parse(&record.body) {
        Err(_) => Some("not a frame"),
        Ok(view) if codec::topic::validate_topic(view.topic()).is_err() => Some("not a topic"),
        Ok(_) => None,
    }
}

impl Core {
    /// Puts a record that came over a link aside; what takes its place in its Log.
    pub(super) fn put_aside(&mut self, id: LogId, record: &Record, why: &'static str) -> Record {
        let log = &self.logs[&id];
        let (origin, stream) = (Arc::clone(&log.origin), Arc::clone(&log.stream));
        let seq = record.header.seq;
        let mut gap = log::gap(log, seq, seq, proto::GapReason::Refused);
        gap.header.epoch = record.header.epoch;
        self.stats.drop(DropReason::DeadLetter);
        self.stats.gap("refused", 1);
        if self.stats.drops[&DropReason::DeadLetter] == 1 {
            tracing::warn!(%origin, %stream, seq, why, "a record cannot be taken: see stream {STREAM}");
        }
        self.dead_letter(&origin, &stream, record, why);
        gap
    }

    fn dead_letter(&mut self, origin: &Origin, stream: &Arc<str>, record: &Record, why: &str) {
        let seq = record.header.seq.to_string();
        let epoch = format!("{:016x}", record.header.epoch);
        let kept = record.body.slice(..record.body.len().min(KEPT_BYTES));
        let frame = FrameParts {
            topic: STREAM,
            time_us: self.now.wall_us,
            time_trusted: self.now.trusted,
            headers: &[
                ("Octobus-Origin", origin.as_bytes()),
                ("Octobus-Stream", stream.as_bytes()),
                ("Octobus-Epoch", epoch.as_bytes()),
                ("Octobus-Seq", seq.as_bytes()),
                ("Octobus-Reason", why.as_bytes()),
            ],
            payload: &kept,
            ..FrameParts::default()
        };
        let frame: Bytes = frame.encode();
        let own = Arc::clone(&self.own);
        let log = self.log_of(&own, &STREAM.into(), Class::Bulk, None);
        let trusted = if self.now.trusted { Flags::TIME_TRUSTED } else { Flags::default() };
        self.append(log, Flags::QOS1.union(trusted), 0, frame);
    }
}
