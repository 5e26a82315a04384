//! Seeds: every random choice of a test can be repeated.

use rand::{SeedableRng, rngs::SmallRng};

/// A seed from `TEST_SEED`, else a fresh one. Printed either way; nextest shows it on failure.
#[must_use]
pub fn seed() -> u64 {
    let seed = match std::env::var("TEST_SEED") {
        Ok(text) => text.parse().expect("TEST_SEED is a number"),
        Err(_unset) => rand::random(),
    };
    eprintln!("seed: repeat with TEST_SEED={seed}");
    seed
}

/// A generator of its own for each part of a test, so that threads do not disturb each other's choices.
#[must_use]
pub fn rng(seed: u64, part: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed ^ part.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
