//! How much of a Log is kept, and what gives way when that is used up.

use std::time::Duration;

use codec::Class;

/// Policy of one stream.
///
/// Whatever it removes is told as a gap with its reason, in place. Nothing is removed for age unless both the
/// clock and the record's time are trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Bytes of records and gaps.
    pub bytes_max: u64,
    /// Records.
    pub count_max: Option<u64>,
    /// Older records go.
    pub age_max: Option<Duration>,
    /// What happens when bytes or records are used up.
    pub full: Full,
    /// Time to live of messages that bring none: expired ones are neither delivered nor sent on, and go like
    /// those that are too old.
    pub ttl: Option<Duration>,
    /// Records go this long after every receiver and every durable cursor has acknowledged them; `None`
    /// keeps them until the quota wants the room.
    pub retain_acked: Option<Duration>,
}

/// What gives way when a stream's quota is used up. Always first: what everybody has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The oldest records.
    DropOldest,
    /// What is published: its client is told. What comes over a link has no client to tell, so there it is
    /// the oldest that go.
    Reject,
    /// What lies between the first and the last record of each window of time, from the oldest on; where
    /// that is not enough, of wider windows.
    Thin { window: Duration },
}

/// How long acknowledged records are kept at least: a tier that lost its tail asks for them again.
pub const ACKED_MIN: Duration = Duration::from_mins(5);

impl Policy {
    /// The default policy of a class, with this quota: alarms are never removed for want of room before they
    /// have arrived.
    #[must_use]
    pub fn of_class(class: Class, bytes_max: u64) -> Self {
        let full = if class == Class::Alarm { Full::Reject } else { Full::DropOldest };
        Self { bytes_max, count_max: None, age_max: None, full, ttl: None, retain_acked: None }
    }

    /// As it holds for one Log: alarms are never thinned, and only what is published here can be refused.
    pub(super) fn for_log(mut self, class: Class, published_here: bool) -> Self {
        if matches!(self.full, Full::Thin { .. }) && class == Class::Alarm {
            self.full = Full::Reject;
        }
        if self.full == Full::Reject && !published_here {
            self.full = Full::DropOldest;
        }
        self
    }

    /// From here on a stream makes room. Thinning reads before it writes, so it begins a little early: what is
    /// between is for what comes in meanwhile.
    pub(super) fn bytes_due(&self) -> u64 {
        match self.full {
            Full::Thin { .. } => {
                self.bytes_max - (self.bytes_max / 16).max(THIN_AHEAD).min(self.bytes_max / 2)
            }
            _ => self.bytes_max,
        }
    }

    /// As [`Self::bytes_due`], of records.
    pub(super) fn count_due(&self) -> u64 {
        match (self.full, self.count_max) {
            (Full::Thin { .. }, Some(max)) => max - max / 16,
            (_, max) => max.unwrap_or(u64::MAX),
        }
    }

    /// Age beyond which nothing of it is of use.
    pub(super) fn age_limit(&self) -> Option<Duration> {
        self.age_max.into_iter().chain(self.ttl).min()
    }
}

/// Room for what is published while a thinning read is under way.
const THIN_AHEAD: u64 = 256 << 10;
