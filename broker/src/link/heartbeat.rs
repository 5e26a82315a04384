//! When to send a heartbeat, and what its absence means. Synchronous; `now` is an argument.
//!
//! A heartbeat is due when nothing was sent *or* nothing was received for a period, so traffic in both
//! directions needs none. The acceptor waits a quarter longer: its peer's heartbeat comes first, and an idle
//! link costs one exchange per period, not two.
//!
//! Two bounds, for two failures. A path is dead when not even a datagram came within three probe timeouts of
//! a heartbeat: the link is *suspect*, and the dialler tries another path at once. A peer is dead when
//! none of its batches came for two periods.

use std::time::Duration;

use tokio::time::Instant;

use super::Path;

/// The state of one link's heartbeat.
#[derive(Debug)]
pub(super) struct Pulse {
    period: Duration,
    patience: Duration,
    probe: Option<Probe>,
    nonce: u64,
}

/// A heartbeat that was not yet answered.
#[derive(Debug)]
struct Probe {
    nonce: u64,
    sent: Instant,
    path: Path,
}

/// What is known of the link's traffic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Activity {
    pub(super) sent: Instant,
    pub(super) received: Instant,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beat {
    /// Nothing before this time.
    Wait(Instant),
    /// Send a heartbeat with this nonce.
    Send(u64),
    /// The path is silent; nothing else before this time.
    Suspect(Instant),
    /// The peer is gone.
    Silent,
}

/// Shortest time after which an unanswered heartbeat means something.
const PROBE_FLOOR: Duration = Duration::from_secs(1);
/// QUIC's default `max_ack_delay`.
const ACK_DELAY: Duration = Duration::from_millis(25);

impl Pulse {
    pub(super) fn new(period: Duration, dialler: bool) -> Self {
        let patience = if dialler { period } else { period + period / 4 };
        Self { period, patience, probe: None, nonce: 0 }
    }

    /// Decides; `path` is asked only when it matters.
    pub(super) fn poll(&mut self, now: Instant, seen: Activity, path: impl FnOnce() -> Path) -> Beat {
        let dead_at = seen.received + 2 * self.period;
        if now >= dead_at {
            return Beat::Silent;
        }
        if self.probe.as_ref().is_some_and(|probe| seen.received > probe.sent) {
            self.probe = None;
        }
        if let Some(probe) = &self.probe {
            let suspect_at = probe.sent + probe_timeout(probe.path.rtt).min(self.period);
            return match now < suspect_at {
                true => Beat::Wait(suspect_at.min(dead_at)),
                false if path().received == probe.path.received => Beat::Suspect(dead_at),
                false => Beat::Wait(dead_at),
            };
        }
        let due = seen.sent.min(seen.received) + self.patience;
        if now < due {
            return Beat::Wait(due.min(dead_at));
        }
        self.nonce += 1;
        self.probe = Some(Probe { nonce: self.nonce, sent: now, path: path() });
        Beat::Send(self.nonce)
    }

    /// The peer answered: the round trip, if it is the answer to the last heartbeat.
    pub(super) fn on_ack(&mut self, now: Instant, nonce: u64) -> Option<Duration> {
        let probe = self.probe.take_if(|probe| probe.nonce == nonce)?;
        Some(now.saturating_duration_since(probe.sent))
    }
}

/// Three probe timeouts of RFC 9002 with the variance it starts from.
fn probe_timeout(rtt: Duration) -> Duration {
    (3 * (3 * rtt + ACK_DELAY)).max(PROBE_FLOOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(10);
    const SECOND: Duration = Duration::from_secs(1);

    fn path(received: u64) -> Path {
        Path { rtt: Duration::from_millis(20), received }
    }

    #[tokio::test(start_paused = true)]
    async fn traffic_in_both_directions_needs_no_heartbeat_and_one_alone_does() {
        let start = Instant::now();
        let mut pulse = Pulse::new(PERIOD, true);
        let both = Activity { sent: start + 9 * SECOND, received: start + 9 * SECOND };
        assert_eq!(pulse.poll(start + 10 * SECOND, both, || path(0)), Beat::Wait(start + 19 * SECOND));
        let one = Activity { sent: start + 10 * SECOND, received: start };
        assert_eq!(pulse.poll(start + 10 * SECOND, one, || path(0)), Beat::Send(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_path_is_suspect_after_three_probe_timeouts_and_dead_after_two_periods() {
        let start = Instant::now();
        let mut pulse = Pulse::new(PERIOD, true);
        let seen = Activity { sent: start, received: start };
        assert_eq!(pulse.poll(start + PERIOD, seen, || path(7)), Beat::Send(1));
        let seen = Activity { sent: start + PERIOD, ..seen };
        assert_eq!(pulse.poll(start + PERIOD, seen, || path(7)), Beat::Wait(start + 11 * SECOND));
        assert_eq!(pulse.poll(start + 11 * SECOND, seen, || path(7)), Beat::Suspect(start + 2 * PERIOD));
        assert_eq!(pulse.poll(start + 2 * PERIOD, seen, || path(7)), Beat::Silent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_path_that_still_acknowledges_is_not_suspect() {
        let start = Instant::now();
        let mut pulse = Pulse::new(PERIOD, true);
        let seen = Activity { sent: start, received: start };
        assert_eq!(pulse.poll(start + PERIOD, seen, || path(7)), Beat::Send(1));
        assert_eq!(pulse.poll(start + 12 * SECOND, seen, || path(8)), Beat::Wait(start + 2 * PERIOD));
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_answer_to_the_last_heartbeat_is_measured() {
        let start = Instant::now();
        let mut pulse = Pulse::new(PERIOD, true);
        let seen = Activity { sent: start, received: start };
        assert_eq!(pulse.poll(start + PERIOD, seen, || path(0)), Beat::Send(1));
        assert_eq!(pulse.on_ack(start + 11 * SECOND, 2), None);
        assert_eq!(pulse.on_ack(start + 11 * SECOND, 1), Some(SECOND));
        assert_eq!(pulse.on_ack(start + 12 * SECOND, 1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_acceptor_lets_the_dialler_go_first() {
        let start = Instant::now();
        let seen = Activity { sent: start, received: start };
        let beat = Pulse::new(PERIOD, false).poll(start + PERIOD, seen, || path(0));
        assert_eq!(beat, Beat::Wait(start + PERIOD + PERIOD / 4));
    }
}
