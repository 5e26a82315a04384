//! Interleaved rounds, medians, spreads, clocks.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Rounds of every comparison.
pub const ROUNDS: usize = 5;

/// One round of one side.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Operations done.
    pub ops: u64,
    /// Time on the wall.
    pub wall: Duration,
    /// CPU time of the measured side, user and system.
    pub cpu: Duration,
}

impl Sample {
    /// CPU nanoseconds of one operation.
    #[must_use]
    pub fn cpu_ns(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.ops.max(1) as f64
    }

    /// Wall nanoseconds of one operation.
    #[must_use]
    pub fn wall_ns(&self) -> f64 {
        self.wall.as_nanos() as f64 / self.ops.max(1) as f64
    }
}

/// Median and spread of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Figure {
    /// The median.
    pub median: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
}

impl Figure {
    /// Of these rounds.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn of(rounds: impl IntoIterator<Item = f64>) -> Self {
        let mut rounds: Vec<f64> = rounds.into_iter().collect();
        rounds.sort_by(f64::total_cmp);
        let (min, max) = (rounds[0], rounds[rounds.len() - 1]);
        Self { median: rounds[rounds.len() / 2], min, max }
    }

    /// As JSON, to three digits behind the point.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({ "median": round(self.median), "min": round(self.min), "max": round(self.max) })
    }
}

/// A figure without noise digits.
#[must_use]
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// A side of a comparison: its name, and one round of it.
pub struct Side<'a> {
    /// `ours`, or the peer.
    pub name: &'static str,
    /// Runs one round.
    pub round: Box<dyn FnMut() -> Sample + 'a>,
}

impl std::fmt::Debug for Side<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<'a> Side<'a> {
    /// A side of this name.
    pub fn new(name: &'static str, round: impl FnMut() -> Sample + 'a) -> Self {
        Self { name, round: Box::new(round) }
    }
}

/// One warm-up of each side, then [`ROUNDS`] rounds in turn. The samples of each side, in the order of the sides.
pub fn interleave(sides: &mut [Side<'_>]) -> Vec<Vec<Sample>> {
    for side in sides.iter_mut() {
        (side.round)();
    }
    let mut samples = vec![Vec::with_capacity(ROUNDS); sides.len()];
    for _ in 0..ROUNDS {
        for (side, samples) in sides.iter_mut().zip(&mut samples) {
            samples.push((side.round)());
        }
    }
    samples
}

/// Ratio of medians, each round's own ratio as its spread: how many times less `ours` needs than `peer`.
#[must_use]
pub fn ratio(ours: &[Sample], peer: &[Sample], of: impl Fn(&Sample) -> f64) -> Figure {
    let rounds = Figure::of(ours.iter().zip(peer).map(|(ours, peer)| of(peer) / of(ours)));
    let median = Figure::of(peer.iter().map(&of)).median / Figure::of(ours.iter().map(&of)).median;
    Figure { median, ..rounds }
}

/// Runs `step` (which says how many operations it did) for about this long, on this process's clocks.
pub fn run_for(wanted: Duration, mut step: impl FnMut() -> u64) -> Sample {
    let (started, cpu) = (now(), process_cpu());
    let mut ops = 0;
    loop {
        ops += step();
        let wall = started.elapsed();
        if wall >= wanted {
            return Sample { ops, wall, cpu: process_cpu() - cpu };
        }
    }
}

/// The monotonic clock: here time is what is measured, and nobody pauses it.
#[must_use]
#[allow(clippy::disallowed_methods)] // the ban is for code whose tests pause tokio's time
pub fn now() -> Instant {
    Instant::now()
}

/// CPU time of this process so far, all threads.
#[must_use]
pub fn process_cpu() -> Duration {
    let at = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(at.tv_sec.unsigned_abs(), at.tv_nsec.unsigned_abs() as u32)
}
