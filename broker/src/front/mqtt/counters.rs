//! What the MQTT front counts. Cheap enough to be counted always; metrics reads it when asked.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::error::Cause;

/// Counters of one MQTT front, shared by all its connections.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that are open now.
    pub connections: AtomicU64,
    /// Connections that were ever accepted.
    pub accepted: AtomicU64,
    /// Times that accepting failed (no file descriptor, no memory).
    pub accept_errors: AtomicU64,
    /// Packets received.
    pub packets_in: AtomicU64,
    /// Packets sent.
    pub packets_out: AtomicU64,
    /// Bytes received.
    pub bytes_in: AtomicU64,
    /// Bytes sent.
    pub bytes_out: AtomicU64,
    /// Publishes dropped because the client may not publish there.
    pub publishes_denied: AtomicU64,
    /// Filters refused because the client may not subscribe to them.
    pub subscriptions_denied: AtomicU64,
    /// Deliveries dropped because the client may no longer have messages of that topic.
    pub deliveries_denied: AtomicU64,
    /// Deliveries skipped because the client takes no packets of that size.
    pub deliveries_too_large: AtomicU64,
    closed: [AtomicU64; Cause::ALL.len()],
}

impl Counters {
    /// Connections that ended for this cause.
    #[must_use]
    pub fn closed(&self, cause: Cause) -> u64 {
        self.closed[cause as usize].load(Relaxed)
    }

    pub(super) fn count_closed(&self, cause: Cause) {
        self.closed[cause as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn add(counter: &AtomicU64, more: usize) {
        counter.fetch_add(more as u64, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_own_counter() {
        for (at, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, at, "ALL is in the order of the numbers");
        }
    }
}
