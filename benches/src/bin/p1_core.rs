//! The Core of a hub with very many nodes: what each link, each change and each message costs it, and how much
//! memory a linked node takes in it. No socket, no store: groups are durable at once, in flushes of 64 nodes.
//!
//! | figure | what runs |
//! |---|---|
//! | `tier` | identity, one pod and a want of two references per node are written at the hub |
//! | `link` | first link of each node: Hello, Welcome, its `status` (1 KiB of node status, 300 B of a pod), acks |
//! | `change` | one change of a node's status: imported, durable, acknowledged |
//! | `shared` | one object that all nodes want changes: made due, sent, acknowledged; per node |
//! | `own` | the pod of each node changes |
//! | `down` | one message to each node through its Log `down/<n>` |
//! | `stats`, `sessions` | one scrape, one listing |
//! | `turn` | the longest single turn (apply of one event) since all were linked, and the writing of positions |
//! | `cut`, `again` | half of the nodes lose their links at once and link again; per node |
//! | `restore` | a process starts over what a store in memory has of all this; per node |
//!
//! Times are CPU time of the core alone, memory is what it holds on the heap, counted by the allocator, without
//! the bytes of the values themselves. There is no peer: what must be seen is that a figure does not grow with
//! the number of nodes, and the change between two versions. `P1_NODES` chooses the numbers of nodes.

use std::{
    collections::BTreeMap,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{Config, Core},
    event::{
        Action, Command, Event, Expect, LinkOpen, Now, Output, Peer, Publish, Response, Role, SessionId,
        StateChange, StateOp, Target,
    },
    store::{Recovered, Store, StoreEvent, mem::MemStore},
};
use bytes::Bytes;
use codec::{Class, Flags, FrameParts, Kind, Record, RecordHeader, proto};
use octobus_benches::{
    alloc::{self, Counting},
    measure::{self, process_cpu as cpu_time},
    report::{self, say},
    routing,
};
use proto::control::Message;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Nodes whose events lie between two flushes of the disk.
const FLUSH: usize = 64;
const CLIENT: SessionId = SessionId(1);
/// Sessions of links are numbered from here.
const FIRST_LINK: u64 = 1_000;
const NODE_STATUS: usize = 1024;
const POD_STATUS: usize = 300;
const SHARED: &str = "obj/core/configmaps/default/shared";
/// A change that is made here is one of so many bytes.
const OBJECT: usize = 256;

fn main() -> anyhow::Result<()> {
    let sizes = std::env::var("P1_NODES").unwrap_or_else(|_| "1000,10000,100000".to_owned());
    let sizes: Vec<usize> = sizes.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let mut cases = Vec::new();
    for nodes in sizes {
        cases.push(live(nodes));
        let restore = restore(nodes);
        say(format_args!("{nodes} nodes: restored in {restore:.0} ns each"));
        cases.push(json!({ "case": "restore", "nodes": nodes, "cpu_ns_per_op": restore }));
    }
    report::print("P1 core", &cases)
}

/// What a node is to the hub, seen from outside.
#[derive(Debug, Clone, Copy, Default)]
struct Node {
    session: u64,
    links: u64,
    revision: u64,
    /// Number of the hub's source that brings parts of `fleet`, and records of it that came.
    part: (u32, u64),
    acknowledged: u64,
    /// Number, epoch and seq of the last message down.
    down: (u32, u64, u64),
    owes_down: bool,
}

struct Hub {
    core: Core,
    now: Now,
    actions: Vec<Action>,
    store: Option<MemStore>,
    last_lsn: u64,
    durable: u64,
    nodes: Vec<Node>,
    by_session: BTreeMap<u64, usize>,
    sent: Vec<(SessionId, usize)>,
    closed: u64,
    records_out: u64,
    response: Option<Response>,
    /// CPU time within the core since the last look, and the longest turn.
    spent: Duration,
    longest: Duration,
}

impl Hub {
    fn new(nodes: usize, store: Option<MemStore>) -> Self {
        let mut hub = Self {
            core: Core::restore(config(), Recovered::default(), start(), &mut Vec::new()),
            now: start(),
            actions: Vec::new(),
            store,
            last_lsn: 0,
            durable: 0,
            nodes: vec![Node::default(); nodes],
            by_session: BTreeMap::new(),
            sent: Vec::new(),
            closed: 0,
            records_out: 0,
            response: None,
            spent: Duration::ZERO,
            longest: Duration::ZERO,
        };
        let mut actions = Vec::new();
        hub.core = Core::restore(config(), Recovered::default(), start(), &mut actions);
        hub.actions = actions;
        hub.perform();
        hub.flush();
        hub
    }

    /// Applies all of these, then what their outputs cause; the core's time is counted.
    fn apply(&mut self, events: Vec<Event>) {
        let before = cpu_time();
        for event in events {
            let turn = measure::now();
            self.core.apply(self.now, event, &mut self.actions);
            self.longest = self.longest.max(turn.elapsed());
        }
        self.spent += cpu_time() - before;
        self.perform();
        let sent: Vec<Event> =
            self.sent.drain(..).map(|(session, bytes)| Event::Sent { session, bytes }).collect();
        if !sent.is_empty() {
            self.apply(sent);
        }
        let due = self.core.deadline().is_some_and(|at| at <= self.now.mono);
        if due {
            self.apply(vec![Event::TimerFired]);
        }
    }

    fn perform(&mut self) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Persist(group) => {
                    self.last_lsn = group.lsn;
                    if let Some(store) = &mut self.store {
                        store.submit(group);
                    }
                }
                Action::Output { session, output } => {
                    self.sent.push((session, output.cost()));
                    match output {
                        Output::Send { records, .. } => self.note(session, &records),
                        Output::Close(_) => self.closed += 1,
                        _ => {}
                    }
                }
                Action::Read(_) | Action::Tier(_) => {}
                Action::Respond { response, .. } => self.response = Some(response),
            }
        }
    }

    /// What a node would make of these records.
    fn note(&mut self, session: SessionId, records: &[Record]) {
        let Some(node) = self.by_session.get(&session.0) else { return };
        let node = &mut self.nodes[*node];
        for record in records {
            self.records_out += 1;
            match record.header.kind {
                Kind::PUT | Kind::TOMBSTONE | Kind::SYNCED => {
                    node.part = (record.header.source, node.part.1 + 1);
                }
                Kind::LOG | Kind::GAP => {
                    node.down = (record.header.source, record.header.epoch, record.header.seq);
                    node.owes_down = true;
                }
                _ => {}
            }
        }
    }

    fn flush(&mut self) {
        if let Some(store) = &mut self.store {
            store.flush();
            while let Poll::Ready(event) = store.poll_event(&mut Context::from_waker(Waker::noop())) {
                assert!(matches!(event, StoreEvent::Persisted(_)), "a store in memory refuses nothing");
            }
        }
        if self.durable < self.last_lsn {
            self.durable = self.last_lsn;
            self.apply(vec![Event::Persisted(self.last_lsn)]);
        }
    }

    /// For each node of the range, in flushes: the events, until nothing is on its way.
    fn each(
        &mut self,
        nodes: std::ops::Range<usize>,
        mut events: impl FnMut(&mut Self, usize) -> Vec<Event>,
    ) {
        for first in nodes.clone().step_by(FLUSH) {
            let some = first..(first + FLUSH).min(nodes.end);
            let all = some.flat_map(|node| events(self, node)).collect();
            self.apply(all);
            self.flush();
        }
    }

    /// Acknowledges what came down since the last time.
    fn acknowledge(&mut self, nodes: std::ops::Range<usize>) {
        self.each(nodes, |hub, node| {
            let node = &mut hub.nodes[node];
            let mut sources = Vec::new();
            if node.part.1 > node.acknowledged {
                node.acknowledged = node.part.1;
                sources.push(ack(node.part.0, 0, node.part.1));
            }
            if std::mem::take(&mut node.owes_down) {
                sources.push(ack(node.down.0, node.down.1, node.down.2));
            }
            let session = SessionId(node.session);
            let ack = proto::Ack { sources, window: None };
            if ack.sources.is_empty() {
                return Vec::new();
            }
            vec![Event::LinkReceived { session, records: vec![control(Message::Ack(ack))] }]
        });
    }

    fn link(&mut self, nodes: std::ops::Range<usize>) {
        for first in nodes.clone().step_by(FLUSH) {
            let some = first..(first + FLUSH).min(nodes.end);
            self.each(some.clone(), |hub, nth| {
                let node = &mut hub.nodes[nth];
                if node.session != 0 {
                    hub.by_session.remove(&node.session);
                }
                node.links += 1;
                node.session = FIRST_LINK + nth as u64 + node.links * 10_000_000;
                (node.part, node.acknowledged) = ((0, 0), 0);
                hub.by_session.insert(node.session, nth);
                let session = SessionId(node.session);
                let peer = Peer { name: name(nth).as_str().into(), role: Role::Node, generation: 1 };
                let hello = hello(nth, *node);
                vec![
                    Event::LinkOpened(LinkOpen { session, peer, dialler: false }),
                    Event::LinkReceived { session, records: vec![hello] },
                ]
            });
            self.each(some.clone(), |hub, nth| {
                let node = &mut hub.nodes[nth];
                let session = SessionId(node.session);
                let records = if node.revision == 0 { first_status(nth, node) } else { barriers(nth, node) };
                vec![Event::LinkReceived { session, records }]
            });
            self.acknowledge(some);
        }
    }

    fn write(
        &mut self,
        nodes: std::ops::Range<usize>,
        ops: impl Fn(usize) -> Vec<(&'static str, String, Vec<u8>)>,
    ) {
        self.each(nodes, |_, node| {
            let op = |(space, key, value): (&str, String, Vec<u8>)| StateOp {
                space: space.into(),
                key,
                change: StateChange::Put(value.into()),
                expect: Expect::Any,
            };
            let ops = ops(node).into_iter().map(op).collect();
            vec![Event::Commanded { command: Command::StateWrite(ops), id: 1 }]
        });
    }

    /// Nanoseconds of the core for each of `count` since the last look.
    fn per(&mut self, count: usize) -> f64 {
        std::mem::take(&mut self.spent).as_nanos() as f64 / count as f64
    }
}

fn live(nodes: usize) -> Value {
    alloc::track();
    let mut hub = Hub::new(nodes, None);
    hub.apply(vec![routing::opened(CLIENT)]);
    let all = 0..nodes;
    let mut figures = serde_json::Map::new();
    // The harness's own maps are made before anything is counted.
    let base = alloc::live();
    hub.write(0..1, |_| vec![("fleet", SHARED.to_owned(), vec![b'x'; OBJECT])]);
    hub.write(all.clone(), |nth| {
        vec![
            ("sys", format!("identity/{}", name(nth)), vec![b'i'; 160]),
            ("fleet", pod(nth), vec![b'p'; OBJECT]),
        ]
    });
    let want = |nth: usize| proto::Want { keys: vec![SHARED.to_owned(), pod(nth)] };
    hub.write(all.clone(), |nth| {
        vec![("fleet", format!("want/{}", name(nth)), codec::encode(&want(nth)).to_vec())]
    });
    hub.apply(vec![Event::Commanded { command: Command::StateBarrier { space: "fleet".into() }, id: 1 }]);
    hub.flush();
    let mut figure = |name: &str, value: f64| {
        say(format_args!("{nodes} nodes: {name} {value:.0}"));
        figures.insert(name.to_owned(), json!(measure::round(value)));
    };
    figure("tier_ns", hub.per(nodes));
    let tier = alloc::live();
    let values = nodes * (160 + OBJECT + codec::encode(&want(7)).len()) + OBJECT;
    figure("tier_bytes", (tier - base) as f64 / nodes as f64 - values as f64 / nodes as f64);

    // Half first: what the other half costs beside it is the cost at this size.
    hub.link(0..nodes / 2);
    hub.per(1);
    let (half, entries) = (alloc::live(), hub.by_session.len());
    hub.link(nodes / 2..nodes);
    figure("link_ns", hub.per(nodes - nodes / 2));
    let linked = alloc::live();
    let own = (hub.by_session.len() - entries) as f64 * MAP_ENTRY;
    let statuses = (nodes - nodes / 2) as f64 * (NODE_STATUS + POD_STATUS) as f64;
    figure("link_bytes", ((linked - half) as f64 - own - statuses) / (nodes - nodes / 2) as f64);
    assert!(hub.nodes.iter().all(|node| node.part.1 >= 4), "want, shared, pod, synced");
    assert_eq!(hub.closed, 0, "nobody was refused");

    hub.now.mono += Duration::from_secs(2);
    hub.longest = Duration::ZERO;
    hub.apply(vec![Event::TimerFired]);
    hub.flush();
    figure("turn_positions_us", hub.longest.as_nanos() as f64 / 1e3);
    hub.per(1);

    hub.longest = Duration::ZERO;
    hub.each(all.clone(), |hub, nth| {
        let node = &mut hub.nodes[nth];
        node.revision += 1;
        let record = put(1, "node", node.revision, NODE_STATUS);
        vec![Event::LinkReceived { session: SessionId(node.session), records: vec![record] }]
    });
    figure("change_ns", hub.per(nodes));
    figure("turn_change_us", hub.longest.as_nanos() as f64 / 1e3);

    hub.longest = Duration::ZERO;
    hub.write(0..1, |_| vec![("fleet", SHARED.to_owned(), vec![b'y'; OBJECT])]);
    figure("shared_ns", hub.per(nodes));
    figure("turn_shared_us", hub.longest.as_nanos() as f64 / 1e3);
    hub.acknowledge(all.clone());
    figure("shared_ack_ns", hub.per(nodes));

    hub.write(all.clone(), |nth| vec![("fleet", pod(nth), vec![b'q'; OBJECT])]);
    figure("own_ns", hub.per(nodes));
    hub.acknowledge(all.clone());
    figure("own_ack_ns", hub.per(nodes));

    let before = alloc::live();
    let frame = routing::frame("valves/3", &[b'v'; 64]);
    hub.each(all.clone(), |_, nth| {
        let target = Target::Node(name(nth).as_str().into());
        let publish = Publish { target, packet_id: 0, ..routing::publish(&frame, 1) };
        vec![Event::Published { session: CLIENT, messages: vec![publish] }]
    });
    figure("down_first_ns", hub.per(nodes));
    hub.acknowledge(all);
    figure("down_ack_ns", hub.per(nodes));
    figure("down_log_bytes", (alloc::live() - before) as f64 / nodes as f64);

    hub.now.mono += Duration::from_secs(2);
    hub.longest = Duration::ZERO;
    hub.apply(vec![Event::TimerFired]);
    hub.flush();
    figure("turn_marks_us", hub.longest.as_nanos() as f64 / 1e3);
    hub.per(1);

    hub.apply(vec![Event::Commanded { command: Command::Stats, id: 1 }]);
    figure("stats_us", hub.per(1) / 1e3);
    hub.response = None;
    hub.apply(vec![Event::Commanded { command: sessions(), id: 1 }]);
    figure("sessions_us", hub.per(1) / 1e3);
    hub.response = None;

    hub.longest = Duration::ZERO;
    hub.each(0..nodes / 2, |hub, nth| vec![Event::LinkClosed { session: SessionId(hub.nodes[nth].session) }]);
    figure("cut_ns", hub.per(nodes / 2));
    hub.link(0..nodes / 2);
    figure("again_ns", hub.per(nodes / 2));
    figure("turn_rest_us", hub.longest.as_nanos() as f64 / 1e3);
    json!({ "case": "live", "nodes": nodes, "ours": Value::Object(figures) })
}

/// CPU nanoseconds for each node of a process that starts over all this.
fn restore(nodes: usize) -> f64 {
    let mut hub = Hub::new(nodes, Some(MemStore::new()));
    hub.write(0..nodes, |nth| {
        vec![
            ("sys", format!("identity/{}", name(nth)), vec![b'i'; 160]),
            ("fleet", pod(nth), vec![b'p'; OBJECT]),
        ]
    });
    hub.link(0..nodes);
    let frame = routing::frame("valves/3", &[b'v'; 64]);
    hub.apply(vec![routing::opened(CLIENT)]);
    hub.each(0..nodes, |_, nth| {
        let target = Target::Node(name(nth).as_str().into());
        let publish = Publish { target, packet_id: 0, ..routing::publish(&frame, 1) };
        vec![Event::Published { session: CLIENT, messages: vec![publish] }]
    });
    hub.acknowledge(0..nodes);
    hub.now.mono += Duration::from_secs(2);
    hub.apply(vec![Event::TimerFired]);
    hub.flush();
    let recovered = hub.store.as_ref().expect("it has one").recover();
    drop(hub);
    let before = cpu_time();
    let core = Core::restore(config(), recovered, start(), &mut Vec::new());
    let spent = cpu_time() - before;
    drop(core);
    spent.as_nanos() as f64 / nodes as f64
}

/// Bytes of an entry of this harness's own map, about.
const MAP_ENTRY: f64 = 30.0;

fn sessions() -> Command {
    Command::Sessions
}

fn config() -> Config {
    Config::hub("hub", "tier", [9; 16], 1)
}

fn start() -> Now {
    Now { mono: Duration::ZERO, wall_us: 1_800_000_000_000_000, trusted: true }
}

fn name(nth: usize) -> String {
    format!("site-{nth:06}")
}

fn pod(nth: usize) -> String {
    format!("obj/core/pods/default/pod-{nth:06}")
}

/// What a node's own spaces are at.
const INCARNATION: u64 = 1_790_000_000_000 << 20;
const SPACES: [&str; 3] = ["status", "twin", "retained"];

fn hello(nth: usize, node: Node) -> Record {
    let states = SPACES.map(|space| proto::StateOffer {
        origin: name(nth),
        space: space.to_owned(),
        incarnation: INCARNATION,
        revision: if space == "status" { node.revision } else { 0 },
        run: 77,
    });
    let mut instance = [1; 16];
    instance[..8].copy_from_slice(&(nth as u64).to_be_bytes());
    control(Message::Hello(proto::Hello {
        protocol_min: 1,
        protocol_max: 1,
        features: vec!["relay".to_owned(), "credit".to_owned()],
        instance: Bytes::copy_from_slice(&instance),
        logs: vec![proto::LogOffer {
            origin: name(nth),
            stream: "default".to_owned(),
            epoch: 4711,
            first: 1,
            next: 1,
        }],
        states: states.to_vec(),
        software: "octobus/0.1.0".to_owned(),
        claim: 1_800_000_000_000_000 + node.links,
        window: Some(proto::Window { log_bytes: 1 << 20, state_bytes: 1 << 18, link_bytes: 4 << 20 }),
        ..proto::Hello::default()
    }))
}

/// What a node says of its own spaces when it links for the first time.
fn first_status(nth: usize, node: &mut Node) -> Vec<Record> {
    node.revision = 2;
    let mut records = vec![declare(1, nth, "status"), put(1, "node", 1, NODE_STATUS)];
    records.push(put(1, "pod/default/pod-1", 2, POD_STATUS));
    records.push(barrier(1, 2));
    records
}

/// And when it comes back and nothing has changed. Of spaces that it never wrote to it says nothing.
fn barriers(nth: usize, node: &Node) -> Vec<Record> {
    vec![declare(1, nth, "status"), barrier(1, node.revision)]
}

fn header(kind: Kind, class: Class, source: u32, epoch: u64, seq: u64) -> RecordHeader {
    RecordHeader { kind, class: class as u8, flags: Flags::default(), source, epoch, seq, aux: 0 }
}

fn control(message: Message) -> Record {
    let body = codec::encode(&proto::Control { message: Some(message) });
    Record { header: header(Kind::CONTROL, Class::Control, 0, 0, 0), body }
}

fn declare(number: u32, nth: usize, space: &str) -> Record {
    let body = codec::encode(&proto::Declare {
        origin: name(nth),
        kind: 3,
        name: space.to_owned(),
        class: Class::State as u32,
    });
    Record { header: header(Kind::DECLARE, Class::State, number, 0, 0), body }
}

fn put(number: u32, key: &str, revision: u64, bytes: usize) -> Record {
    let payload = vec![b's'; bytes];
    let body =
        FrameParts { topic: key, time_us: 1, time_trusted: true, payload: &payload, ..FrameParts::default() }
            .encode();
    Record { header: header(Kind::PUT, Class::State, number, INCARNATION, revision), body }
}

fn barrier(number: u32, revision: u64) -> Record {
    let body = codec::encode(&proto::Barrier {});
    Record { header: header(Kind::BARRIER, Class::State, number, INCARNATION, revision), body }
}

fn ack(source: u32, epoch: u64, seq: u64) -> proto::SourceAck {
    proto::SourceAck { source, epoch, seq, crc: 0, hold: false }
}
