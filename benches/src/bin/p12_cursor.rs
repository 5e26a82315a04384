//! Catching up with a Log: sessions with a narrow filter that come back after a million messages of other topics.
//!
//! One core over the store of a node holds a Log of `P12_MESSAGES` messages of 256 B (a million), at QoS 1, of
//! 1 000 topics in no order, and now and then an alarm. Before the first of them durable sessions subscribed and
//! left; each comes back alone, acknowledges what it gets, and is measured until its cursor is at the head.
//!
//! | case | filter | what matches |
//! |---|---|---|
//! | `rare` | `alarms/pump-7/#` | an alarm each 50 000 messages |
//! | `topic` | `plant/line-3/machine-17/temperature` | one of the 1 000 topics |
//! | `line` | `plant/line-3/#` | a tenth of all: no stretch of the Log is without one |
//! | `wildcard` | `plant/+/machine-17/temperature` | ten topics, known by no prefix |
//! | `all` | `#` | everything |
//!
//! Bytes read are what the process asked of the file system, whatever was in the page cache. There is no peer: the
//! figures are for comparing a change with what was before, and rows with each other.

use std::{
    future::poll_fn,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{Config, Core},
    event::{
        Action, ClientAck, Event, Front, Now, OriginFilter, Output, Publish, RetainedOnSubscribe, SessionId,
        SessionOpen, Subscription,
    },
    store::{
        Store, StoreEvent,
        lmdb::{self, LmdbStore, Options},
    },
};
use codec::Filter;
use octobus_benches::{
    measure::{self, Figure, ROUNDS},
    procfs,
    report::{self, say},
    routing, server,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

const CASES: [(&str, &str); 5] = [
    ("rare", "alarms/pump-7/#"),
    ("topic", "plant/line-3/machine-17/temperature"),
    ("line", "plant/line-3/#"),
    ("wildcard", "plant/+/machine-17/temperature"),
    ("all", "#"),
];
const DEVICE: SessionId = SessionId(1);
const BURST: usize = 64;
const FRAME: usize = 256;
const ALARM_EACH: usize = 50_000;
/// Messages that are not yet durable, while the Log is filled.
const AHEAD: u64 = 64;

fn main() -> anyhow::Result<()> {
    let messages = std::env::var("P12_MESSAGES").map_or(Ok(1_000_000), |text| text.parse())?;
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    let folder = server::data_folder()?;
    let (store, recovered) = lmdb::open(folder.path(), Options::node())?;
    let written = store.written();
    let mut config = Config::node("bench", [1; 16], 1);
    config.default_stream.policy.bytes_max = 1 << 40;
    let mut actions = Vec::new();
    let now = Now { mono: Duration::ZERO, wall_us: 1_800_000_000_000_000, trusted: true };
    let core = Core::restore(config, recovered, now, &mut actions);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut node = Node {
        core,
        store,
        runtime,
        now,
        delivered: Vec::new(),
        submitted: 0,
        durable: 0,
        reads: 0,
        all_reads: 0,
    };
    node.perform(actions);
    let cases: Vec<_> = CASES.into_iter().filter(|(name, _)| is_wanted(name)).collect();
    for (case, filter) in &cases {
        for round in 0..=ROUNDS {
            node.open(DEVICE, &format!("{case}-{round}"));
            node.apply(subscribe(DEVICE, filter)?);
            node.apply(Event::SessionClosed { session: DEVICE, clean: true });
        }
    }
    node.settle();
    node.open(DEVICE, "device");
    let (started, cpu) = (measure::now(), measure::process_cpu());
    node.fill(messages);
    std::thread::sleep(Duration::from_millis(1200)); // the checkpoint that is due belongs to it
    let cpu = measure::process_cpu() - cpu;
    let payload = (messages * FRAME) as f64;
    let by_cause = [&written.journal, &written.checkpoint].map(|by| by.load(Relaxed) as f64 / payload);
    say(format_args!(
        "filled with {messages} in {:.1?}: {} ns CPU per message, journal {:.3}, checkpoint {:.4} bytes per byte",
        started.elapsed(),
        cpu.as_nanos() / messages as u128,
        by_cause[0],
        by_cause[1]
    ));
    let mut rows = vec![json!({ "case": "fill", "cpu_ns_per_op": cpu.as_nanos() as f64 / messages as f64,
        "journal": by_cause[0], "checkpoint": by_cause[1] })];
    for (case, filter) in cases {
        rows.push(catch_up(&mut node, case, filter)?);
    }
    report::print("P12 cursor", &rows)
}

fn catch_up(node: &mut Node, case: &str, filter: &str) -> anyhow::Result<Value> {
    let (mut cpu_ms, mut wall_ms, mut read_mib, mut reads, mut got) = (vec![], vec![], vec![], vec![], 0);
    for round in 0..=ROUNDS {
        let session = SessionId(100 + round as u64);
        let (started, cpu, bytes) =
            (measure::now(), measure::process_cpu(), procfs::read(std::process::id())?);
        (node.all_reads, got) = (0, 0);
        node.open(session, &format!("{case}-{round}"));
        got += node.drain(session);
        if round > 0 {
            cpu_ms.push((measure::process_cpu() - cpu).as_secs_f64() * 1e3);
            wall_ms.push(started.elapsed().as_secs_f64() * 1e3);
            read_mib.push((procfs::read(std::process::id())? - bytes) as f64 / f64::from(1 << 20));
            reads.push(node.all_reads as f64);
        }
        node.apply(Event::SessionClosed { session, clean: true });
        node.settle();
    }
    let [cpu, wall, read, reads] = [cpu_ms, wall_ms, read_mib, reads].map(Figure::of);
    say(format_args!(
        "{case:9} {filter:36} {got:8} messages: {:8.1} ms CPU [{:.1}-{:.1}] {:8.1} ms, {:7.1} MiB in {:.0} reads",
        cpu.median, cpu.min, cpu.max, wall.median, read.median, reads.median
    ));
    Ok(json!({ "case": case, "filter": filter, "messages": got, "cpu_ms": cpu.json(), "wall_ms": wall.json(),
        "read_mib": read.json(), "reads": reads.json() }))
}

/// A core over the store of a node, without a driver.
struct Node {
    core: Core,
    store: LmdbStore,
    runtime: Runtime,
    now: Now,
    /// Packet ids of deliveries that are not acknowledged.
    delivered: Vec<u16>,
    submitted: u64,
    durable: u64,
    /// Under way.
    reads: usize,
    all_reads: usize,
}

impl Node {
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
                Action::Read(request) => {
                    self.reads += 1;
                    self.all_reads += 1;
                    self.store.read(request);
                }
                Action::Output { session, output } => {
                    if let Output::Deliver(delivery) = &output {
                        self.delivered.push(delivery.packet_id);
                    }
                    self.apply(Event::Sent { session, bytes: output.cost() });
                }
                Action::Respond { .. } | Action::Tier(_) => {}
            }
        }
    }

    fn open(&mut self, session: SessionId, id: &str) {
        self.apply(Event::SessionOpened(SessionOpen {
            session,
            front: Front::Mqtt,
            client_id: id.into(),
            clean_start: false,
            expiry_s: u32::MAX,
            receive_max: 1000,
            will: None,
        }));
    }

    fn stored(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Persisted(lsn) => {
                self.durable = lsn;
                self.apply(Event::Persisted(lsn));
            }
            StoreEvent::Read { read, records, next } => {
                self.reads -= 1;
                self.apply(Event::ReadDone { read, records, next });
            }
            other => say(format_args!("the store says {other:?}")),
        }
    }

    /// Waits for one completion, and takes all that are there.
    fn wait(&mut self) {
        let (runtime, store) = (&self.runtime, &mut self.store);
        let event = runtime.block_on(poll_fn(|context| store.poll_event(context)));
        self.stored(event);
        while let Poll::Ready(event) = self.store.poll_event(&mut Context::from_waker(Waker::noop())) {
            self.stored(event);
        }
    }

    /// Until nothing is under way.
    fn settle(&mut self) {
        loop {
            if self.core.deadline().is_some_and(|due| due <= self.now.mono) {
                self.apply(Event::TimerFired);
            } else if self.durable < self.submitted || self.reads > 0 {
                self.wait();
            } else {
                return;
            }
        }
    }

    fn fill(&mut self, messages: usize) {
        let mut random = 1_u64;
        let topics: Vec<_> = (0..1000)
            .map(|n| format!("plant/line-{}/machine-{}/temperature", n / 100, n % 100))
            .map(|topic| routing::frame_of_size(&topic, FRAME))
            .collect();
        let alarm = routing::frame_of_size("alarms/pump-7/pressure", FRAME);
        for first in (0..messages).step_by(BURST) {
            let of = |n: usize| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if (n + 1).is_multiple_of(ALARM_EACH) {
                    &alarm
                } else {
                    &topics[(random >> 33) as usize % 1000]
                }
            };
            let messages: Vec<Publish> = (first..messages.min(first + BURST))
                .map(of)
                .map(|frame| routing::publish(frame, 1))
                .collect();
            self.apply(Event::Published { session: DEVICE, messages });
            while self.submitted - self.durable >= AHEAD {
                self.wait();
            }
        }
        self.settle();
    }

    /// Acknowledges what comes until nothing more does; how much that was.
    fn drain(&mut self, session: SessionId) -> usize {
        let mut got = 0;
        loop {
            let acks: Vec<ClientAck> = self.delivered.drain(..).map(ClientAck::Ack).collect();
            got += acks.len();
            if !acks.is_empty() {
                self.apply(Event::Acked { session, acks });
            } else if self.core.deadline().is_some_and(|due| due <= self.now.mono) {
                self.apply(Event::TimerFired);
            } else if self.reads > 0 {
                self.wait();
            } else {
                return got;
            }
        }
    }
}

fn subscribe(session: SessionId, filter: &str) -> anyhow::Result<Event> {
    let subscription = Subscription {
        id: 1,
        origin: OriginFilter::Own,
        filter: Filter::parse(filter)?,
        qos: 1,
        group: None,
        no_local: false,
        retain_as_published: false,
        retained: RetainedOnSubscribe::DoNotSend,
        wildcard_matches_dollar: false,
        identifier: 0,
    };
    Ok(Event::Subscribed { session, token: 1, subscriptions: vec![subscription] })
}
