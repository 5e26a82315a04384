//! State under load, resuming a link, and reads through the overlay: what the goals ask beside P12.
//!
//! | case | what runs |
//! |---|---|
//! | `state` | a core over the store of a node: 10 000 changes a second of 1 000 keys, 128 B each |
//! | `resume` | two cores, their links made by hand, stores in memory: a node with so many keys comes back after so many changes |
//! | `overlay` | reads of a Log, 32 KiB each, while its index is in memory only, and from the checkpoint |
//!
//! There is no peer: the figures are for comparing a change with what was before, and rows of one table with
//! each other.

use std::{
    collections::VecDeque,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{Config, Core},
    event::{
        Action, Command, Event, Expect, Group, LinkOpen, Now, Output, Peer, ReadRequest, Role, SessionId,
        StateChange, StateOp,
    },
    store::{
        Recovered, Store, StoreEvent,
        lmdb::{self, Options},
        mem::MemStore,
    },
};
use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader};
use octobus_benches::{
    measure::{self, Figure, ROUNDS},
    report::{self, say},
    routing::{self, TOPIC},
    server,
};
use serde_json::{Value, json};

/// Changes of one burst: a hundred bursts a second.
const BURST: usize = 100;
const TICK: Duration = Duration::from_millis(10);
const KEYS: usize = 1000;
const VALUE: usize = 128;
/// Link sessions, one at each end.
const LINK: SessionId = SessionId(1);

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let round = std::env::var("P12_ROUND_MS").map_or(Ok(5000), |text| text.parse())?;
    let mut cases = Vec::new();
    if is_wanted("state") {
        cases.push(state(Duration::from_millis(round))?);
    }
    if is_wanted("resume") {
        for keys in [1_000, 10_000, 100_000] {
            for changes in [0, 10, 1_000] {
                cases.push(resume(keys, changes));
            }
        }
    }
    if is_wanted("overlay") {
        cases.push(overlay()?);
    }
    report::print("P12 state", &cases)
}

/// A core and its store, without a driver.
struct Bare<S> {
    core: Core,
    store: S,
    now: Now,
    outputs: VecDeque<Output>,
    submitted: u64,
    durable: u64,
}

impl<S: Store> Bare<S> {
    fn new(config: Config, store: S, recovered: Recovered) -> Self {
        let now = Now { mono: Duration::ZERO, wall_us: 1_800_000_000_000_000, trusted: true };
        let mut actions = Vec::new();
        let core = Core::restore(config, recovered, now, &mut actions);
        let mut bare = Self { core, store, now, outputs: VecDeque::new(), submitted: 0, durable: 0 };
        bare.perform(actions);
        bare
    }

    fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(self.now, event, &mut actions);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Persist(group) => {
                    self.submitted = group.lsn;
                    self.store.submit(group);
                }
                Action::Read(request) => self.store.read(request),
                Action::Output { session, output } => {
                    let bytes = output.cost();
                    self.outputs.push_back(output);
                    self.apply(Event::Sent { session, bytes });
                }
                Action::Respond { .. } | Action::Tier(_) => {}
            }
        }
    }

    /// Takes what the store says without waiting, and what is due.
    fn turn(&mut self) {
        while let Poll::Ready(event) = self.store.poll_event(&mut Context::from_waker(Waker::noop())) {
            match event {
                StoreEvent::Persisted(lsn) => {
                    self.durable = lsn;
                    self.apply(Event::Persisted(lsn));
                }
                StoreEvent::Read { read, records, next } => {
                    self.apply(Event::ReadDone { read, records, next })
                }
                other => say(format_args!("the store says {other:?}")),
            }
        }
        if self.core.deadline().is_some_and(|due| due <= self.now.mono) {
            self.apply(Event::TimerFired);
        }
    }

    /// Changes `count` keys from `first` on.
    fn change(&mut self, first: usize, count: usize, of: usize, round: usize) {
        let ops = (first..first + count).map(|n| StateOp {
            space: "twin".into(),
            key: format!("plant/device-{}", n % of),
            change: StateChange::Put(Bytes::from(vec![round as u8; VALUE])),
            expect: Expect::Any,
        });
        for op in ops {
            self.apply(Event::Commanded { command: Command::StateWrite(vec![op]), id: 1 });
        }
    }
}

fn state(round: Duration) -> anyhow::Result<Value> {
    let folder = server::data_folder()?;
    let (store, recovered) = lmdb::open(folder.path(), Options::node())?;
    let written = store.written();
    let mut node = Bare::new(Config::node("bench", [1; 16], 1), store, recovered);
    let (mut cpu_us, mut by_cause, mut behind) = (Vec::new(), [const { Vec::new() }; 3], 0);
    for n in 0..=ROUNDS {
        let bytes =
            || [&written.journal, &written.checkpoint, &written.compaction].map(|by| by.load(Relaxed));
        let (started, cpu, before) = (measure::now(), measure::process_cpu(), bytes());
        let mut changes = 0;
        while started.elapsed() < round {
            node.now.mono += TICK;
            node.change(changes, BURST, KEYS, n);
            changes += BURST;
            node.turn();
            let due = TICK * u32::try_from(changes / BURST)?;
            std::thread::sleep(due.saturating_sub(started.elapsed()));
            behind += u64::from(started.elapsed() > due + 10 * TICK);
        }
        std::thread::sleep(Duration::from_millis(1200)); // the checkpoint that is due belongs to it
        while node.durable < node.submitted {
            node.turn();
            std::thread::yield_now();
        }
        if n > 0 {
            cpu_us.push((measure::process_cpu() - cpu).as_nanos() as f64 / 1000.0 / changes as f64);
            for (cause, (now, before)) in by_cause.iter_mut().zip(bytes().into_iter().zip(before)) {
                cause.push((now - before) as f64 / changes as f64);
            }
        }
    }
    let cpu = Figure::of(cpu_us);
    let [journal, checkpoint, compaction] = by_cause.map(Figure::of);
    say(format_args!(
        "state: {:.2} us CPU per change [{:.2}-{:.2}]; bytes per change: journal {:.0}, checkpoint {:.0}, \
         compaction {:.0}; {behind} bursts late",
        cpu.median, cpu.min, cpu.max, journal.median, checkpoint.median, compaction.median
    ));
    Ok(
        json!({ "case": "10 000 changes/s, 1 000 keys, 128 B", "cpu_us_per_change": cpu.json(), "late_bursts": behind,
        "bytes_per_change": { "journal": journal.json(), "checkpoint": checkpoint.json(), "compaction": compaction.json() } }),
    )
}

/// A node and its hub.
struct Linked {
    node: Bare<MemStore>,
    hub: Bare<MemStore>,
    records: usize,
    bytes: usize,
}

impl Linked {
    fn open(&mut self) {
        let peer = |name: &str, role, generation| Peer { name: name.into(), role, generation };
        let hub = LinkOpen { session: LINK, peer: peer("bench", Role::Node, 1), dialler: false };
        self.hub.apply(Event::LinkOpened(hub));
        let node = LinkOpen { session: LINK, peer: peer("hub", Role::Hub, 0), dialler: true };
        self.node.apply(Event::LinkOpened(node));
        self.run();
    }

    fn close(&mut self) {
        self.node.apply(Event::LinkClosed { session: LINK });
        self.hub.apply(Event::LinkClosed { session: LINK });
        self.run();
    }

    /// Until neither has anything to say.
    fn run(&mut self) {
        loop {
            self.node.turn();
            self.hub.turn();
            let up = std::mem::take(&mut self.node.outputs);
            let down = std::mem::take(&mut self.hub.outputs);
            let quiet = up.is_empty() && down.is_empty();
            self.carry(up, true);
            self.carry(down, false);
            if quiet && self.node.durable == self.node.submitted && self.hub.durable == self.hub.submitted {
                return;
            }
        }
    }

    fn carry(&mut self, outputs: VecDeque<Output>, up: bool) {
        for output in outputs {
            let Output::Send { records, .. } = output else { continue };
            self.records += records.len();
            self.bytes += records.iter().map(Record::wire_len).sum::<usize>();
            let to = if up { &mut self.hub } else { &mut self.node };
            to.apply(Event::LinkReceived { session: LINK, records });
        }
    }
}

fn resume(keys: usize, changes: usize) -> Value {
    let node = Bare::new(Config::node("bench", [1; 16], 1), MemStore::auto(), Recovered::default());
    let hub = Bare::new(Config::hub("hub", "tier", [2; 16], 2), MemStore::auto(), Recovered::default());
    let mut linked = Linked { node, hub, records: 0, bytes: 0 };
    linked.node.change(0, keys, keys, 0);
    linked.open();
    let (mut cpu_us, mut records, mut bytes) = (Vec::new(), 0, 0);
    for round in 0..=ROUNDS {
        linked.close();
        linked.node.change(round * changes, changes, keys, round + 1);
        linked.run();
        (linked.records, linked.bytes) = (0, 0);
        let cpu = measure::process_cpu();
        linked.open();
        if round > 0 {
            cpu_us.push((measure::process_cpu() - cpu).as_nanos() as f64 / 1000.0);
        }
        (records, bytes) = (linked.records, linked.bytes);
    }
    let cpu = Figure::of(cpu_us);
    say(format_args!(
        "resume: {keys:7} keys, {changes:5} changes: {:9.0} us CPU, both ends [{:.0}-{:.0}], {records} records, {bytes} B",
        cpu.median, cpu.min, cpu.max
    ));
    json!({ "case": format!("resume, {keys} keys, {changes} changes"), "cpu_us": cpu.json(),
        "records": records, "bytes": bytes })
}

const READ_BYTES: usize = 32 << 10;
const LOG_RECORDS: u64 = 20_000;

fn overlay() -> anyhow::Result<Value> {
    let folder = server::data_folder()?;
    // Far larger than what is written: no checkpoint before the end.
    let late =
        Options { checkpoint_every: Duration::from_hours(1), checkpoint_bytes: 1 << 30, ..Options::hub() };
    let frame = routing::frame_of_size(TOPIC, 256);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let (mut store, _) = lmdb::open(folder.path(), late.clone())?;
    for lsn in 1..=LOG_RECORDS {
        let header = RecordHeader {
            kind: Kind::LOG,
            class: Class::Event as u8,
            flags: Flags::QOS1,
            source: 1,
            epoch: 1,
            seq: lsn,
            aux: 0,
        };
        store.submit(Group {
            lsn,
            lane: Default::default(),
            records: vec![Record { header, body: frame.clone() }],
        });
        if lsn % 256 == 0 || lsn == LOG_RECORDS {
            runtime.block_on(async {
                while !matches!(next(&mut store).await, StoreEvent::Persisted(done) if done == lsn) {}
            });
        }
    }
    let mut rows = json!({ "case": "reads of a Log, 32 KiB" });
    for name in ["overlay", "checkpoint"] {
        if name == "checkpoint" {
            drop(store);
            store = lmdb::open(folder.path(), late.clone())?.0;
        }
        let mut cpu_us = Vec::new();
        for round in 0..=ROUNDS {
            let sample = measure::run_for(Duration::from_millis(300), || {
                let mut reads = 0;
                let mut from = 0;
                while from < LOG_RECORDS {
                    reads += 1;
                    store.read(ReadRequest { read: 1, source: 1, from, bytes_max: READ_BYTES, wanted: None });
                    let answer = runtime.block_on(next(&mut store));
                    let StoreEvent::Read { records, .. } = answer else { continue };
                    from = records.last().map_or(LOG_RECORDS, |last| last.header.seq + 1);
                }
                reads
            });
            if round > 0 {
                cpu_us.push(sample.cpu_ns() / 1000.0);
            }
        }
        let cpu = Figure::of(cpu_us);
        say(format_args!("reads from {name}: {:.1} us CPU each [{:.1}-{:.1}]", cpu.median, cpu.min, cpu.max));
        rows[name] = cpu.json();
    }
    Ok(rows)
}

async fn next(store: &mut lmdb::LmdbStore) -> StoreEvent {
    std::future::poll_fn(|context| store.poll_event(context)).await
}
