//! How much may be on its way before what is urgent has to wait behind it. Synchronous; `now` is an
//! argument.
//!
//! Loss-based congestion control fills whatever buffer stands before a slow line: at 256 kbit/s that is
//! seconds, and an alarm waits them all, whatever its priority here. So the bytes in flight are also bounded
//! by delay. Over each round trip the *least* round-trip time is taken: if even that is [`TARGET`] above the
//! least of the recent past, a queue stands, and the bound becomes what the line carries in the empty round
//! trip and half a target. Jitter moves single samples, not the least of a round trip.
//!
//! The least of the recent past would rise with a queue that always stands, so every [`WINDOW`] the queue
//! is let run dry for one round trip.

use std::time::Duration;

use tokio::time::Instant;

/// A queue that stands longer than this is too long.
const TARGET: Duration = Duration::from_millis(80);
/// The empty round trip is the least of this long, and of as long before.
const WINDOW: Duration = Duration::from_secs(10);
/// Shortest round over which a rate means something.
const ROUND_MIN: Duration = Duration::from_millis(20);
/// Never less: a few packets, so that there is something to measure.
const BYTES_MIN: u64 = 4800;
/// Where it begins, and where it ends.
const BYTES_START: u64 = 64 << 10;
const BYTES_MAX: u64 = 64 << 20;

/// A bound of the bytes in flight.
#[derive(Debug, Clone)]
pub(super) struct DelayBound {
    bytes: u64,
    /// No queue was seen yet: grow fast.
    starting: bool,
    /// The round trip of an empty line: in this window, and in the one before.
    empty: [Duration; 2],
    window_ends: Instant,
    round: Round,
    /// This round lets the queue run dry.
    draining: bool,
    /// Bytes a second, of the last full round.
    rate: u64,
}

#[derive(Debug, Clone)]
struct Round {
    began: Instant,
    least: Duration,
    acked: u64,
    limited: bool,
}

impl Round {
    fn new(now: Instant) -> Self {
        Self { began: now, least: Duration::MAX, acked: 0, limited: false }
    }
}

impl DelayBound {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            bytes: BYTES_START,
            starting: true,
            empty: [Duration::MAX; 2],
            window_ends: now + WINDOW,
            round: Round::new(now),
            draining: false,
            rate: 0,
        }
    }

    /// The bound.
    pub(super) fn bytes(&self) -> u64 {
        if self.draining { (self.bytes / 3).max(BYTES_MIN) } else { self.bytes }
    }

    /// Bytes a second that the path took lately; 0 before it is known.
    pub(super) fn rate(&self) -> u64 {
        self.rate
    }

    /// `acked` bytes have arrived, of which the last was answered after `rtt`. `limited`: more would have
    /// been sent but for a bound.
    pub(super) fn on_ack(&mut self, now: Instant, rtt: Duration, acked: u64, limited: bool) {
        self.empty[0] = self.empty[0].min(rtt);
        self.round.least = self.round.least.min(rtt);
        self.round.acked += acked;
        self.round.limited |= limited;
        let lasted = now.saturating_duration_since(self.round.began);
        if lasted >= self.round.least.max(ROUND_MIN) {
            let round = std::mem::replace(&mut self.round, Round::new(now));
            self.on_round(now, &round, lasted);
        }
    }

    fn on_round(&mut self, now: Instant, round: &Round, lasted: Duration) {
        if self.draining {
            // Its rate says nothing of the line.
            self.draining = false;
            return;
        }
        let empty = self.empty[0].min(self.empty[1]);
        let queue = round.least.saturating_sub(empty);
        // After a pause the first round is long and says little.
        if round.limited && lasted < 4 * round.least.max(ROUND_MIN) {
            self.rate = per_second(round.acked, lasted);
        }
        if queue > TARGET {
            self.starting = false;
            let carried = in_time(self.rate, empty + TARGET / 2);
            self.bytes = carried.clamp(BYTES_MIN, self.bytes.max(BYTES_MIN));
        } else if round.limited && queue < TARGET / 2 {
            let step = if self.starting { self.bytes } else { (self.bytes / 8).max(1200) };
            self.bytes = (self.bytes + step).min(BYTES_MAX);
        }
        if now >= self.window_ends {
            self.window_ends = now + WINDOW;
            self.empty = [Duration::MAX, self.empty[0]];
            self.draining = queue > TARGET / 8;
        }
    }
}

fn per_second(bytes: u64, lasted: Duration) -> u64 {
    let micros = lasted.as_micros().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000 / micros).unwrap_or(u64::MAX)
}

fn in_time(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A bottleneck: a line, its delay there and back, and a sender that always has more.
    struct Line {
        bytes_per_s: u64,
        round_trip: Duration,
        now: Instant,
        free_at: Instant,
        /// When each packet is acknowledged, and when it was sent.
        flying: VecDeque<(Instant, Instant)>,
        bound: DelayBound,
        /// Longest wait before the line, since it was last asked.
        worst: Duration,
        delivered: u64,
    }

    const PACKET: u64 = 1200;

    impl Line {
        fn new(bytes_per_s: u64, round_trip: Duration) -> Self {
            let now = Instant::now();
            let bound = DelayBound::new(now);
            let (flying, worst) = (VecDeque::new(), Duration::ZERO);
            Self { bytes_per_s, round_trip, now, free_at: now, flying, bound, worst, delivered: 0 }
        }

        fn run(&mut self, time: Duration) {
            let until = self.now + time;
            while self.now < until {
                while PACKET * (self.flying.len() as u64 + 1) <= self.bound.bytes() {
                    let began = self.free_at.max(self.now);
                    self.worst = self.worst.max(began - self.now);
                    self.free_at = began + Duration::from_micros(PACKET * 1_000_000 / self.bytes_per_s);
                    self.flying.push_back((self.free_at + self.round_trip, self.now));
                }
                let (acked, sent) = self.flying.pop_front().expect("at least one packet is allowed");
                self.now = acked;
                self.delivered += PACKET;
                self.bound.on_ack(self.now, acked - sent, PACKET, true);
            }
        }
    }

    #[test]
    fn a_slow_line_is_kept_busy_with_a_short_queue() {
        for (rate, round_trip_ms) in [(32_000, 100), (32_000, 20), (125_000, 40), (1_250_000, 200)] {
            let mut line = Line::new(rate, Duration::from_millis(round_trip_ms));
            line.run(Duration::from_secs(5));
            (line.worst, line.delivered) = (Duration::ZERO, 0);
            line.run(Duration::from_secs(300));
            assert!(line.worst < 4 * TARGET, "{rate} B/s: {:?} of queue", line.worst);
            assert!(line.delivered > rate * 300 * 85 / 100, "{rate} B/s: {} bytes", line.delivered);
        }
    }

    #[test]
    fn a_fast_line_is_filled() {
        let mut line = Line::new(100 << 20, Duration::from_millis(20));
        line.run(Duration::from_secs(3));
        line.delivered = 0;
        line.run(Duration::from_secs(2));
        assert!(line.delivered > (2 * (100 << 20)) * 8 / 10, "{}", line.delivered);
    }

    #[test]
    fn jitter_is_no_queue() {
        let start = Instant::now();
        let mut bound = DelayBound::new(start);
        for n in 0..10_000 {
            // Every tenth packet is 300 ms late, as on a radio.
            let rtt = Duration::from_millis(if n % 10 == 0 { 340 } else { 40 });
            bound.on_ack(start + n * Duration::from_millis(5), rtt, PACKET, true);
        }
        assert!(bound.bytes() > BYTES_START);
    }

    #[test]
    fn a_line_that_becomes_longer_is_believed_after_a_while() {
        let mut line = Line::new(1_250_000, Duration::from_millis(20));
        line.run(Duration::from_secs(20));
        line.round_trip = Duration::from_millis(600); // over a satellite now
        line.run(Duration::from_secs(40));
        line.delivered = 0;
        line.run(Duration::from_secs(20));
        assert!(line.delivered > 1_250_000 * 20 * 7 / 10, "{}", line.delivered);
    }
}
