//! The one place that reads clocks.

use std::time::Duration;

/// Wall times before this are a clock that was never set.
pub const TRUSTED_FROM_US: u64 = 1_735_689_600_000_000; // 2025-01-01

/// Wall clock, microseconds since 1970.
#[must_use]
#[allow(clippy::disallowed_methods)] // this is the function that the ban points to
pub fn wall_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// An interval that does not burst after a stall.
#[must_use]
#[allow(clippy::disallowed_methods)] // this is the function that the ban points to
pub fn every(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}
