//! What a core counts.

use std::{collections::BTreeMap, sync::Arc};

use codec::Class;

use super::budget::BudgetState;

/// Counters since the process started, and gauges at the time of asking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Messages that clients published, by QoS.
    pub published: [u64; 3],
    /// Bytes of their frames.
    pub published_bytes: u64,
    /// Deliveries to clients.
    pub delivered: u64,
    /// Messages and records that policy dropped.
    pub drops: BTreeMap<DropReason, u64>,
    /// Seqs that gaps removed, by name of the reason.
    pub gaps: BTreeMap<&'static str, u64>,
    /// Groups handed to the store.
    pub groups: u64,
    /// Records received over links, and those of them that were already held.
    pub link_records_in: u64,
    /// See `link_records_in`.
    pub link_duplicates_in: u64,
    /// Records sent over links.
    pub link_records_out: u64,
    /// Links refused or closed, by cause.
    pub link_refusals: BTreeMap<&'static str, u64>,
    /// Clients closed because they did not read.
    pub slow_consumers: u64,
    /// Links that a drain ended: those that went when they were told, and those that time ran out for.
    pub drained_clean: u64,
    /// See `drained_clean`.
    pub drained_forced: u64,
    /// From handing a group to the store until it is durable; filled in by the driver.
    pub flush: Latencies,
    /// Gauge: connected clients.
    pub clients: u64,
    /// Gauge: sessions kept for clients that are away.
    pub clients_away: u64,
    /// Gauge: established links.
    pub links: u64,
    /// Gauge: subscriptions.
    pub subscriptions: u64,
    /// Gauge: bytes in outboxes.
    pub queue_bytes: u64,
    /// Gauge: Logs, and the bytes that they keep.
    pub logs: u64,
    /// See `logs`.
    pub log_bytes: u64,
    /// Gauge: records of exported Logs that no hub has acknowledged.
    pub log_unacknowledged: u64,
    /// Gauge: where budgets stand.
    pub budgets: Vec<BudgetState>,
    /// Gauge: bytes of records sent above today (UTC), by receiver (empty: the tier) and class.
    pub spent_today: BTreeMap<(Arc<str>, Class), u64>,
    /// Gauge: the oldest of these, as its frame's time in microseconds; 0 = none or not in memory.
    pub oldest_unacknowledged_us: u64,
    /// Gauge: seconds until a stream of this broker's own is full, of those that fill.
    pub seconds_to_full: BTreeMap<Arc<str>, u64>,
}

/// A histogram of times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Latencies {
    /// Observations within each of [`Self::BOUNDS_US`] and above the one before.
    pub within: [u64; Self::BOUNDS_US.len()],
    /// Observations above the last bound.
    pub beyond: u64,
    /// Sum of all, microseconds.
    pub sum_us: u64,
}

impl Latencies {
    /// Upper bounds, microseconds: from a fast disk's flush to a failing one's.
    pub const BOUNDS_US: [u64; 12] =
        [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 1_000_000, 10_000_000];

    /// Counts one.
    pub fn observe(&mut self, time: std::time::Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.sum_us = self.sum_us.saturating_add(us);
        match Self::BOUNDS_US.iter().position(|bound| us <= *bound) {
            Some(bucket) => self.within[bucket] += 1,
            None => self.beyond += 1,
        }
    }
}

/// Why something was dropped. Never silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropReason {
    /// A client's queue was full (Live).
    ClientQueue,
    /// A link's queue was full (Live).
    LinkQueue,
    /// No link (Live).
    NoLink,
    /// The message had expired.
    Expired,
    /// The quota of a Log.
    Quota,
    /// A down message to a node that is not enrolled.
    NoSuchNode,
    /// The store refused writes.
    StoreUnavailable,
    /// An answer that nobody waits for.
    UnknownReply,
    /// A peer sent what it may not.
    NotAuthorized,
    /// Live that this side's configuration does not take.
    NotImported,
    /// Live by a path that its node does not use any more.
    Fenced,
    /// A record that this broker can never take; it stands in the dead-letter stream.
    DeadLetter,
    /// Live that a budget did not permit.
    Budget,
}

impl DropReason {
    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ClientQueue => "client_queue",
            Self::LinkQueue => "link_queue",
            Self::NoLink => "no_link",
            Self::Expired => "expired",
            Self::Quota => "quota",
            Self::NoSuchNode => "no_such_node",
            Self::StoreUnavailable => "store_unavailable",
            Self::UnknownReply => "unknown_reply",
            Self::NotAuthorized => "not_authorized",
            Self::NotImported => "not_imported",
            Self::Fenced => "fenced",
            Self::DeadLetter => "dead_letter",
            Self::Budget => "budget",
        }
    }
}

impl Stats {
    pub(super) fn drop(&mut self, reason: DropReason) {
        *self.drops.entry(reason).or_default() += 1;
    }

    pub(super) fn gap(&mut self, reason: &'static str, count: u64) {
        *self.gaps.entry(reason).or_default() += count;
    }

    pub(super) fn refuse(&mut self, cause: &'static str) {
        *self.link_refusals.entry(cause).or_default() += 1;
    }
}
