//! What links count. One set for a process; every field only grows, gauges excepted.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use codec::Class;

/// Counters of all links of a process.
#[derive(Debug, Default)]
pub struct Counters {
    /// Sent, by class.
    pub sent: [Traffic; Class::ALL.len()],
    /// Received, by class.
    pub received: [Traffic; Class::ALL.len()],
    /// Last round trip that a heartbeat measured, microseconds.
    pub rtt_us: AtomicU64,
    /// Peer's wall clock minus ours at the last heartbeat, microseconds.
    pub clock_offset_us: AtomicI64,
    /// Links that are up now.
    pub up: AtomicU64,
    /// Handshakes that failed, were refused or took too long.
    pub handshakes_failed: AtomicU64,
    /// Who wants every round trip, not the last alone.
    observer: OnceLock<Observer>,
    ended: Mutex<BTreeMap<&'static str, u64>>,
    lines: Lines,
}

struct Observer(Box<dyn Fn(Duration) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// One direction of one class.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Batches.
    pub batches: AtomicU64,
    /// Records.
    pub records: AtomicU64,
    /// Bytes of records.
    pub raw_bytes: AtomicU64,
    /// Bytes of batches as they travel, prefixes included.
    pub wire_bytes: AtomicU64,
}

/// What is said of single links: some in a second, for when all of them come or go at once.
#[derive(Debug, Default)]
struct Lines {
    /// The second, and how many were said in it.
    said: AtomicU64,
}

/// Lines about links in one second.
const LINES_MAX: u64 = 20;
const COUNT_BITS: u32 = 16;

impl Lines {
    fn may_say(&self, second: u64) -> bool {
        let said = self.said.load(Relaxed);
        let count = if said >> COUNT_BITS == second { said & ((1 << COUNT_BITS) - 1) } else { 0 };
        if count >= LINES_MAX {
            return false;
        }
        // Two at the same time may count as one.
        self.said.store((second << COUNT_BITS) + count + 1, Relaxed);
        true
    }
}

impl Traffic {
    pub(super) fn count(&self, records: usize, raw_len: usize, wire_len: usize) {
        self.batches.fetch_add(1, Relaxed);
        self.records.fetch_add(records as u64, Relaxed);
        self.raw_bytes.fetch_add(raw_len as u64, Relaxed);
        self.wire_bytes.fetch_add(wire_len as u64, Relaxed);
    }
}

impl Counters {
    /// How many links ended, by [`LinkEnd::as_str`](super::LinkEnd::as_str).
    #[must_use]
    pub fn ended(&self) -> BTreeMap<&'static str, u64> {
        self.ended.lock().expect("no panic under this lock").clone()
    }

    /// Has every round trip that a heartbeat measures told to `observer`, which must not block. Once for a
    /// set of counters: a later observer is not told.
    pub fn observe_round_trips(&self, observer: impl Fn(Duration) + Send + Sync + 'static) {
        drop(self.observer.set(Observer(Box::new(observer))));
    }

    /// Whether a line about one link may be written: what is not is counted all the same.
    pub(super) fn may_say(&self) -> bool {
        self.lines.may_say(crate::clock::wall_us() / 1_000_000)
    }

    pub(super) fn count_end(&self, why: &'static str) {
        *self.ended.lock().expect("no panic under this lock").entry(why).or_default() += 1;
    }

    pub(super) fn measured(&self, rtt: Duration, clock_offset_us: i64) {
        self.rtt_us.store(u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX), Relaxed);
        self.clock_offset_us.store(clock_offset_us, Relaxed);
        if let Some(Observer(observer)) = self.observer.get() {
            observer(rtt);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_of_links_is_told_in_a_few_lines_a_second() {
        let lines = Lines::default();
        let said = |second| (0..100_000).filter(|_| lines.may_say(second)).count() as u64;
        assert_eq!([said(7), said(7), said(8)], [LINES_MAX, 0, LINES_MAX]);
    }
}
