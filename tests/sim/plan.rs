//! From a seed to a script: a pure function, so that a seed is all one needs to know of a run.
//!
//! Each seed draws which faults there are in it at all: a run in which everything goes wrong at once hides
//! what a single fault does.

use octobus_tests::script::{
    Age, COPY, Flag, HUB, Health, Host, How, NODES, SPACES, Script, SpaceName, Step, TOPICS, Topic, Way, What,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

/// How often what happens, in a thousand, beside what always does.
const FAULTS: [(Fault, u32); 13] = [
    (Fault::Crash, 30),
    (Fault::Cut, 30),
    (Fault::Deafen, 15),
    (Fault::Repeat, 20),
    (Fault::Absence, 50),
    (Fault::Disk, 20),
    (Fault::Clock, 15),
    (Fault::Wipe, 2),
    (Fault::Rollback, 12),
    (Fault::Restore, 8),
    (Fault::Clone, 10),
    (Fault::Version, 20),
    (Fault::Config, 8),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Crash,
    Cut,
    Deafen,
    Repeat,
    Absence,
    Disk,
    Clock,
    Wipe,
    Rollback,
    Restore,
    Clone,
    Version,
    Config,
}

/// The run of a seed.
pub(crate) fn script(seed: u64, steps: usize) -> Script {
    let mut plan = Plan { rng: StdRng::seed_from_u64(seed), faults: Vec::new() };
    plan.faults = FAULTS.into_iter().filter(|_| plan.rng.random_bool(0.4)).collect();
    let steps = (0..steps).map(|_| plan.step()).collect();
    Script { seed, steps }
}

struct Plan {
    rng: StdRng,
    faults: Vec<(Fault, u32)>,
}

impl Plan {
    fn step(&mut self) -> Step {
        let after_us = self.rng.random_range(10..200_000);
        let mut at = self.rng.random_range(0..1000);
        for (fault, weight) in self.faults.clone() {
            if at < weight {
                return Step { after_us, what: self.fault(fault) };
            }
            at -= weight;
        }
        Step { after_us, what: self.work() }
    }

    fn node(&mut self) -> Host {
        Host(self.rng.random_range(0..NODES))
    }

    /// A node, or now and then the copy of one.
    fn dialler(&mut self) -> Host {
        if self.rng.random_bool(0.1) { Host(COPY) } else { self.node() }
    }

    fn any(&mut self) -> Host {
        Host(self.rng.random_range(0..=HUB))
    }

    fn way(&mut self) -> Way {
        *[Way::Up, Way::Down, Way::Both].choose(&mut self.rng).expect("not empty")
    }

    fn flag(&mut self, chance: f64) -> Flag {
        self.rng.random_bool(chance).into()
    }

    fn how(&mut self) -> How {
        *[How::Set, How::Set, How::Delete, How::Compare].choose(&mut self.rng).expect("not empty")
    }

    fn work(&mut self) -> What {
        match self.rng.random_range(0..100) {
            0..26 => What::Publish {
                node: self.dialler(),
                topic: Topic(self.rng.random_range(0..TOPICS.len())),
                qos: *[0, 1, 1, 2, 2].choose(&mut self.rng).expect("not empty"),
                retain: self.flag(0.2),
                durable: self.flag(0.5),
                pad: if self.rng.random_bool(0.05) { self.rng.random_range(1000..60_000) } else { 0 },
            },
            26..32 => What::Down { node: self.node(), retain: self.flag(0.2) },
            32..33 => What::Object { number: self.rng.random_range(0..8), how: self.how() },
            33..35 => match self.rng.random_range(0..8) {
                0 => What::Barrier {},
                1 => What::Accept { node: self.node() },
                _ => What::Want { node: self.node(), mask: self.rng.random() },
            },
            35..40 => What::Write {
                node: self.dialler(),
                space: SpaceName(self.rng.random_range(0..SPACES.len())),
                key: self.rng.random_range(0..4),
                how: self.how(),
            },
            40..46 => What::Read { node: self.dialler(), count: self.rng.random_range(1..20) },
            46..68 => What::Carry {
                node: self.dialler(),
                way: self.way(),
                lane: self.rng.random_range(0..6),
                count: self.rng.random_range(1..12),
            },
            68..88 => {
                let host = if self.rng.random_bool(0.1) { Host(COPY) } else { self.any() };
                What::Sync { host, groups: self.rng.random_range(1..8) }
            }
            88..90 => What::Watch { node: self.node() },
            _ => What::Dial { node: self.dialler() },
        }
    }

    fn fault(&mut self, fault: Fault) -> What {
        match fault {
            Fault::Crash => What::Crash { host: self.any() },
            Fault::Cut => What::Cut { node: self.dialler() },
            Fault::Deafen => What::Deafen { node: self.node(), way: self.way() },
            Fault::Repeat => What::Repeat { node: self.node(), way: self.way() },
            Fault::Absence => match self.rng.random_bool(0.5) {
                true => What::Away { node: self.node() },
                false => What::Back { node: self.node() },
            },
            Fault::Disk => What::Disk {
                host: self.any(),
                state: *[Health::Well, Health::Well, Health::Low, Health::Full, Health::Stuck]
                    .choose(&mut self.rng)
                    .expect("not empty"),
            },
            Fault::Clock => match self.rng.random_bool(0.7) {
                true => What::Clock { host: self.any(), seconds: self.rng.random_range(-10_000..10_000) },
                false => What::Trust { host: self.any(), yes: self.flag(0.5) },
            },
            Fault::Wipe => What::Wipe { host: self.any() },
            Fault::Rollback => self.old_disk(|host| What::Rollback { host }),
            Fault::Restore => self.old_disk(|host| What::Restore { host }),
            Fault::Clone => match self.rng.random_bool(0.7) {
                true => What::Clone { node: self.node(), fresh: self.flag(0.5) },
                false => What::Unclone {},
            },
            Fault::Version => {
                let as_of = *[Age::Same, Age::Newer, Age::Older].choose(&mut self.rng).expect("not empty");
                What::Version { node: self.node(), as_of }
            }
            Fault::Config => match self.rng.random_bool(0.5) {
                true => What::Alarms { node: self.node(), declared: self.flag(0.5) },
                false => What::Quota {
                    host: self.node(),
                    bytes: *[1_u64 << 17, 64 << 20].choose(&mut self.rng).expect("not empty"),
                },
            },
        }
    }

    fn old_disk(&mut self, comes_back: impl FnOnce(Host) -> What) -> What {
        let host = self.any();
        if self.rng.random_bool(0.6) { What::Snapshot { host } } else { comes_back(host) }
    }
}
