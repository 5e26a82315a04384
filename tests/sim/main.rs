//! A fleet in one thread: three nodes and a hub, made of the real cores and of stores that lose what was
//! not synced, under scripts that decide everything else.
//!
//! | file | subject |
//! |---|---|
//! | `plan` | from a seed to a script |
//! | `world`, `wire`, `host`, `disk`, `client`, `fleet` | what a script happens to |
//! | `shadow` | what a disk durably holds, and the rules of each record |
//! | `oracle` | the rules across hosts, and what each fault may take |
//! | `shrink` | from a failing run to a short one |
//! | `seeds` | runs that failed once, each in a file named for its rule |
//! | `rules`, `link_rules`, `relays` | single rules, with nothing left to chance |
//!
//! A failing seed is shrunk and printed. Replay it with
//! `OCTOBUS_SIM_SEED=<seed> cargo test -p octobus-tests --test sim replay -- --nocapture`, or a script with
//! `OCTOBUS_SIM_SCRIPT=<file>`; `OCTOBUS_SIM_TRACE=1` prints all that happens.

mod client;
mod disk;
mod fleet;
mod host;
mod link_rules;
mod oracle;
mod plan;
mod relays;
mod rules;
mod seeds;
mod shadow;
mod shrink;
mod wire;
mod world;

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use octobus_tests::script::Script;
use world::World;

const STEPS: usize = 600;
/// Seeds in `make test` and in `make nightly`; OCTOBUS_SIM_SEEDS overrides both. They are counted from 1, or
/// from OCTOBUS_SIM_FIRST.
const SEEDS: u64 = 500;
const NIGHTLY_SEEDS: u64 = 20_000;
const THREADS: usize = 2;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// Runs so many seeds; of the rules that were broken, each is told once and as short as it can be said.
fn run_seeds(count: u64) {
    let first = number("OCTOBUS_SIM_FIRST").unwrap_or(1);
    let next = AtomicU64::new(first);
    let failed: Mutex<BTreeMap<String, (u64, u64)>> = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    if let Some(failure) = shrink::fails(&plan::script(seed, STEPS)) {
                        let mut failed = failed.lock().expect("no panic under it");
                        failed.entry(failure.rule).or_insert((seed, 0)).1 += 1;
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic under it");
    let told: Vec<String> = failed
        .iter()
        .map(|(rule, (seed, times))| {
            format!("{times} of {count} seeds broke [{rule}]; {}", tell(&plan::script(*seed, STEPS), rule))
        })
        .collect();
    assert!(told.is_empty(), "{}", told.join("\n"));
}

/// How a run breaks a rule, as short as it can be said.
fn tell(script: &Script, rule: &str) -> String {
    let short = shrink::shrink(script, rule, shrink::fails);
    let again = shrink::fails(&short).expect("it failed while it was shrunk");
    format!(
        "seed {}, shrunk to {} steps: {}\nSave them as tests/sim/seeds/{rule}.txt:\n\n{short}",
        script.seed,
        short.steps.len(),
        again.what,
    )
}

#[test]
fn nothing_acknowledged_is_lost_repeated_or_goes_backwards() {
    run_seeds(number("OCTOBUS_SIM_SEEDS").unwrap_or(SEEDS));
}

#[test]
#[ignore = "nightly: half an hour"]
fn nightly_twenty_thousand_seeds() {
    run_seeds(number("OCTOBUS_SIM_SEEDS").unwrap_or(NIGHTLY_SEEDS));
}

#[test]
fn a_seed_replays_with_the_same_trace() {
    for seed in [1, 7, 4242] {
        let script = plan::script(seed, STEPS);
        assert_eq!(World::run(&script, true), World::run(&script, true), "seed {seed} is not deterministic");
    }
}

#[test]
fn replay() {
    if let Some(seed) = number("OCTOBUS_SIM_SEED") {
        let script = plan::script(seed, STEPS);
        if let Some(failure) = shrink::fails(&script) {
            panic!("[{}] {}; {}", failure.rule, failure.what, tell(&script, &failure.rule));
        }
    }
    if let Some(file) = std::env::var_os("OCTOBUS_SIM_SCRIPT") {
        let text = std::fs::read_to_string(&file).expect("the script is readable");
        World::run(&text.parse().expect("a script"), false);
    }
}
