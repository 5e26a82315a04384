//! Dropped-write replay of the whole store: whatever a crash loses of what was not synced, the store opens,
//! nothing that anybody was told is missing, nothing is there twice, and no gap goes unreported.
//!
//! A node with two devices and two subscribers runs over a store of small segments and frequent checkpoints:
//! publishes at QoS 1 and 2, retained messages, State, cursors, packet ids, refused writes, restarts. Everything
//! that reaches the disk is recorded, and at which point who had been told what. Then the disk is cut at
//! random points; each time the node starts over what is left, the clients come back with what they know,
//! finish what they had begun, and compare.
//!
//! A run is random by its seed, but for the order of the store's threads: a failure names the folder that holds
//! the crashed store as it was found.

mod clients;
mod run;

use std::path::Path;

use rand::{Rng, SeedableRng, rngs::SmallRng};

use self::{
    clients::{Note, World},
    run::Run,
};
use super::files::tape::{CrashDisk, Op, Tape};

#[test]
fn at_a_thousand_cut_points_nothing_told_is_missing_and_nothing_is_there_twice() {
    cut_everywhere(seed(), 10, 100);
}

#[test]
#[ignore = "nightly: twenty thousand cut points take minutes"]
fn nightly_at_twenty_thousand_cut_points_nothing_told_is_missing_and_nothing_is_there_twice() {
    cut_everywhere(seed(), 100, 200);
}

/// `TEST_SEED` repeats a run, as far as the order of threads lets it.
fn seed() -> u64 {
    let seed =
        std::env::var("TEST_SEED").map_or_else(|_| getrandom::u64().unwrap(), |text| text.parse().unwrap());
    println!("TEST_SEED={seed}");
    seed
}

/// Records `runs` runs and cuts each at `cuts` points.
fn cut_everywhere(seed: u64, runs: u64, cuts: usize) {
    let mut seen = Seen::default();
    for run in 0..runs {
        let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(run));
        let folder = folder();
        let (tape, disk) = Tape::on(folder.path());
        let mut live = Run::open(folder.path(), World::default(), Some(&tape), &mut rng);
        live.go(STEPS, &mut rng);
        let notes = live.end();
        let ops = tape.ops();
        drop(tape);
        ops.iter().for_each(|op| seen.count(op));
        cut(disk, &ops, &World::default(), &notes, cuts, 1, &mut rng);
    }
    println!("{seen:?}");
    let Seen { opened, rewritten, freed, checkpoints } = seen;
    assert!(
        [opened, rewritten, freed, checkpoints].iter().all(|count| *count > 0),
        "runs must have all of them"
    );
}

/// What the recorded runs did to the disk.
#[derive(Debug, Default)]
struct Seen {
    opened: usize,
    rewritten: usize,
    freed: usize,
    checkpoints: usize,
}

impl Seen {
    fn count(&mut self, op: &Op) {
        match op {
            Op::Rename(from, _) if from.ends_with("old.tmp") => self.rewritten += 1,
            Op::Rename(_, to) if to.extension().is_some_and(|end| end == "seg") => self.opened += 1,
            Op::Remove(path) if path.extension().is_some_and(|end| end == "seg") => self.freed += 1,
            Op::Write(path, 0 | 4096, _) if path.ends_with("data.mdb") => self.checkpoints += 1,
            _ => {}
        }
    }
}

/// Cuts a recording at `cuts` points. From some of the crashed stores the clients go on, and are cut once more.
fn cut(
    mut disk: CrashDisk,
    ops: &[Op],
    begun: &World,
    notes: &[Note],
    cuts: usize,
    again: u32,
    rng: &mut SmallRng,
) {
    let mut points: Vec<usize> = (0..cuts).map(|_| rng.random_range(0..=ops.len())).collect();
    points.sort_unstable();
    let (mut done, mut told, mut world) = (0, 0, begun.clone());
    for point in points {
        for op in &ops[done..point] {
            disk.apply(op);
            if let Op::Said(count) = op {
                notes[told..*count].iter().for_each(|note| world.take(note));
                told = *count;
            }
        }
        done = point;
        // What is lost: everything, nothing, or some of it.
        let kept = [0.0, 1.0, 0.5, 0.9, 0.1][rng.random_range(0..5)];
        let crashed = folder();
        let evidence = Evidence { disk: &disk, kept, rng: rng.clone(), point };
        disk.crash_into(crashed.path(), kept, rng);
        if again > 0 && rng.random_bool(0.1) {
            go_on(crashed.path(), &world, cuts / 20, again - 1, rng);
        } else {
            Run::open(crashed.path(), world.clone(), None, rng).finish_and_compare();
        }
        drop(evidence);
    }
}

/// In memory where there is such a place: what a sync is worth is the tape's to say, not the disk's.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A crashed store is used again, recorded again and cut again.
fn go_on(crashed: &Path, world: &World, cuts: usize, again: u32, rng: &mut SmallRng) {
    let (tape, disk) = Tape::on(crashed);
    let mut live = Run::open(crashed, world.clone(), Some(&tape), rng);
    live.go(STEPS / 4, rng);
    let notes = live.end();
    let ops = tape.ops();
    drop(tape);
    cut(disk, &ops, world, &notes, cuts, again, rng);
}

/// Writes the crashed store once more if the test fails.
struct Evidence<'a> {
    disk: &'a CrashDisk,
    kept: f64,
    rng: SmallRng,
    point: usize,
}

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let copy = tempfile::Builder::new().prefix("octobus-crashed-").tempdir().unwrap().keep();
            self.disk.crash_into(&copy, self.kept, &mut self.rng);
            println!(
                "cut at op {}, {} kept; the crashed store is in {}",
                self.point,
                self.kept,
                copy.display()
            );
        }
    }
}

const STEPS: usize = 250;
