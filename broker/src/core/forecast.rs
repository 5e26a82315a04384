//! When a stream will be full, at the rate it fills now.
//!
//! Full is when policy must refuse, thin or drop what has not yet arrived: what receivers have acknowledged
//! does not count, because it gives way first. While a link takes records off, the rate is what comes less
//! what goes; without one it is what comes.

use std::time::Duration;

/// Averages follow what happened within about this time.
const MEMORY: Duration = Duration::from_mins(10);
/// A rate is taken over at least this long.
const SAMPLE: Duration = Duration::from_secs(1);
/// Beyond this a forecast says nothing.
const HORIZON_S: u64 = 10 * 365 * 86_400;

/// What comes into a Log and what its receivers take off, in bytes.
#[derive(Debug, Default)]
pub(super) struct Forecast {
    pub(super) appended: Rate,
    pub(super) acknowledged: Rate,
}

/// A mean of bytes per second in which older samples fade. Counting is cheap and needs no timer.
#[derive(Debug, Default, Clone)]
pub(super) struct Rate {
    since: Option<Duration>,
    pending: u64,
    mean: f64,
    /// How much of the mean is observed rather than its zero at the beginning.
    weight: f64,
}

impl Rate {
    pub(super) fn add(&mut self, now: Duration, bytes: u64) {
        let since = *self.since.get_or_insert(now);
        if now - since >= SAMPLE {
            self.fold(now);
        }
        self.pending += bytes;
    }

    /// What was counted up to now becomes one sample.
    #[allow(clippy::cast_precision_loss)] // bytes of seconds
    fn fold(&mut self, now: Duration) {
        let Some(since) = self.since else { return };
        let time = (now - since).as_secs_f64();
        let fading = (-time / MEMORY.as_secs_f64()).exp();
        self.mean = self.mean * fading + self.pending as f64 / time * (1.0 - fading);
        self.weight = self.weight * fading + (1.0 - fading);
        self.pending = 0;
        self.since = Some(now);
    }

    /// Bytes per second.
    fn per_second(&self, now: Duration) -> f64 {
        let mut rate = self.clone();
        if rate.since.is_some_and(|since| now - since >= SAMPLE) {
            rate.fold(now);
        }
        if rate.weight > 0.0 { rate.mean / rate.weight } else { 0.0 }
    }
}

impl Forecast {
    /// Seconds until `room` bytes are used up; `None` if that is not to be expected.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // bounded
    pub(super) fn seconds_to_fill(&self, now: Duration, room: u64, draining: bool) -> Option<u64> {
        if room == 0 {
            return Some(0);
        }
        let taken = if draining { self.acknowledged.per_second(now) } else { 0.0 };
        let rate = self.appended.per_second(now) - taken;
        let seconds = room as f64 / rate;
        (rate > 0.0 && seconds < HORIZON_S as f64).then_some(seconds as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_is_known_at_once_and_forgotten_when_it_ends() {
        let mut forecast = Forecast::default();
        for second in 0..30 {
            forecast.appended.add(Duration::from_secs(second), 1_000);
        }
        let now = Duration::from_secs(30);
        let soon = forecast.seconds_to_fill(now, 60_000, false).unwrap();
        assert!((54..=66).contains(&soon), "{soon}");
        let later = forecast.seconds_to_fill(Duration::from_secs(36_000), 60_000, false);
        assert!(later.is_none_or(|seconds| seconds > 1_000_000), "{later:?}");
    }

    #[test]
    fn what_a_link_takes_off_does_not_fill() {
        let mut forecast = Forecast::default();
        for second in 0..100 {
            forecast.appended.add(Duration::from_secs(second), 1_000);
            forecast.acknowledged.add(Duration::from_secs(second), 1_000);
        }
        let now = Duration::from_secs(100);
        assert_eq!(forecast.seconds_to_fill(now, 60_000, true), None);
        assert!(forecast.seconds_to_fill(now, 60_000, false).is_some(), "once the link is gone");
        assert_eq!(forecast.seconds_to_fill(now, 0, true), Some(0));
    }
}
