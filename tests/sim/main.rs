//! A fleet in one thread: three nodes and a hub, made of the real cores and of stores that lose what was
//! not synced, under a seed that decides everything else.
//!
//! Each step checks the design's invariants (see `oracle.rs`). A failing seed is printed; replay it with
//! `OCTOBUS_SIM_SEED=<seed> cargo test -p octobus-tests --test sim replay -- --nocapture`.

mod host;
mod oracle;
mod relays;
mod rules;
mod world;

use world::World;

/// Seeds in `make test`; more with OCTOBUS_SIM_SEEDS.
const SEEDS: u64 = 200;
const STEPS: usize = 600;

fn run(seed: u64) -> u64 {
    let outcome = std::panic::catch_unwind(|| {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        world.settle();
        world.trace()
    });
    match outcome {
        Ok(trace) => trace,
        Err(panic) => {
            eprintln!("seed {seed} failed: replay with OCTOBUS_SIM_SEED={seed}");
            std::panic::resume_unwind(panic)
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_repeated_or_goes_backwards() {
    let seeds = std::env::var("OCTOBUS_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    for seed in 1..=seeds {
        run(seed);
    }
}

#[test]
fn a_seed_replays_with_the_same_trace() {
    for seed in [1, 7, 4242] {
        assert_eq!(run(seed), run(seed), "seed {seed} is not deterministic");
    }
}

#[test]
fn replay() {
    if let Some(seed) = std::env::var("OCTOBUS_SIM_SEED").ok().and_then(|text| text.parse().ok()) {
        run(seed);
    }
}
