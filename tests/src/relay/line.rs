//! A slow line with a buffer before it, as every uplink is one.

use std::time::{Duration, Instant};

/// What one direction carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Bytes a second.
    pub bytes_per_s: u32,
    /// Bytes that may wait before it; more is dropped, or held back where nothing may be dropped.
    pub queue: usize,
}

/// What a header of IP and UDP or TCP adds to a packet.
const HEADERS: usize = 40;

impl Line {
    /// 256 kbit/s, with a second's worth of buffer: a common uplink of a station.
    pub const SLOW: Self = Self { bytes_per_s: 32_000, queue: 32_000 };

    /// When the last byte of a packet has left, on a line that is busy until `free_at`. `None`: the buffer is
    /// full, it is dropped.
    #[must_use]
    pub fn carry(&self, now: Instant, free_at: Instant, bytes: usize) -> Option<Instant> {
        let waiting = free_at.saturating_duration_since(now);
        (waiting <= self.time(self.queue)).then(|| free_at.max(now) + self.time(bytes + HEADERS))
    }

    /// How long these bytes take.
    #[must_use]
    pub fn time(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / f64::from(self.bytes_per_s))
    }
}
