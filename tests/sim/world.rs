//! The hosts, the links between them, and what happens next.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use broker::core::{
    Config,
    event::{Command, Event, Front, OriginFilter, Peer, Response, Role, SessionId, Target},
};
use codec::{Class, Record};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::{
    host::{Host, Out, Say},
    oracle::Oracle,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const HUB: usize = 3;

/// A connection between a node and the hub: in order within a class, free between classes.
struct Wire {
    node: usize,
    at_node: SessionId,
    at_hub: SessionId,
    /// To the hub, and to the node.
    up: BTreeMap<Class, VecDeque<Vec<Record>>>,
    down: BTreeMap<Class, VecDeque<Vec<Record>>>,
}

pub(crate) struct World {
    rng: StdRng,
    now: Duration,
    hosts: Vec<Host>,
    wires: Vec<Wire>,
    oracle: Oracle,
    numbers: BTreeMap<String, u64>,
    trace: std::hash::DefaultHasher,
    /// Print every event: OCTOBUS_SIM_TRACE.
    verbose: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let now = Duration::from_secs(1);
        let mut hosts = Vec::new();
        for (number, name) in (0_u8..).zip(NODES) {
            hosts.push(Host::new(Config::node(name, [number + 1; 16], rng.random()), now));
        }
        hosts.push(Host::new(Config::hub("hub", "tier", [9; 16], rng.random()), now));
        let mut world = Self {
            rng,
            now,
            hosts,
            wires: Vec::new(),
            oracle: Oracle::default(),
            numbers: BTreeMap::new(),
            trace: std::hash::DefaultHasher::new(),
            verbose: std::env::var_os("OCTOBUS_SIM_TRACE").is_some(),
        };
        let enrol = NODES.map(|node| broker::core::event::StateOp {
            space: "sys".into(),
            key: format!("identity/{node}"),
            change: broker::core::event::StateChange::Put(bytes::Bytes::from_static(b"{}")),
            expect: broker::core::event::Expect::Absent,
        });
        world.hosts[HUB].command(now, Command::StateWrite(enrol.to_vec()));
        // What follows is promised to subscribers whose subscription is durable.
        world.come_up();
        for host in &mut world.hosts {
            host.sync(now, usize::MAX);
        }
        for name in NODES {
            world.hosts[HUB].watch(now, name, "retained");
        }
        world
    }

    /// The subscribers that a fresh hub or node has.
    fn come_up(&mut self) {
        let now = self.now;
        for index in 0..NODES.len() {
            self.subscriber_of(index);
        }
        let hub = &mut self.hosts[HUB];
        let session = hub.connect(now, "nats", Front::Nats, false);
        hub.subscribe(now, session, OriginFilter::AnyNode, "#", 0);
    }

    fn subscriber_of(&mut self, index: usize) {
        let now = self.now;
        let host = &mut self.hosts[index];
        let session = host.connect(now, "sub", Front::Mqtt, true);
        host.subscribe(now, session, OriginFilter::Own, "#", 2);
    }

    pub(crate) fn trace(&self) -> u64 {
        self.trace.finish()
    }

    fn note(&mut self, what: &impl std::fmt::Debug) {
        let line = format!("{:?} {what:?}", self.now);
        if self.verbose {
            eprintln!("{line}");
        }
        line.hash(&mut self.trace);
    }

    /// One thing happens; then the invariants are checked.
    pub(crate) fn step(&mut self) {
        self.now += Duration::from_micros(self.rng.random_range(10..200_000));
        let index = self.rng.random_range(0..self.hosts.len());
        let choice = self.rng.random_range(0..100);
        self.note(&(index, choice));
        let now = self.now;
        match choice {
            0..30 => self.publish(index),
            30..36 => self.publish_down(),
            36..56 => self.carry_some(),
            56..76 => {
                let groups = self.rng.random_range(1..8);
                self.hosts[index].sync(now, groups);
            }
            76..86 => self.dial(),
            86..89 => self.cut(),
            89..92 => self.crash(index),
            92..95 if index != HUB => {
                self.hosts[index].disconnect(now, "sub");
            }
            95..98 if index != HUB => self.subscriber_of(index),
            _ => self.duplicate(),
        }
        for host in &mut self.hosts {
            host.tick(now);
        }
        self.collect();
    }

    /// Everything comes back and is left in peace until nothing moves; then the promises are checked.
    pub(crate) fn settle(&mut self) {
        for _ in 0..400 {
            self.now += Duration::from_millis(500);
            let now = self.now;
            self.come_up();
            for node in 0..NODES.len() {
                self.connect_node(node);
            }
            while self.wires.iter().any(|wire| !wire.up.is_empty() || !wire.down.is_empty()) {
                self.carry_some();
                self.collect();
            }
            for host in &mut self.hosts {
                host.sync(now, usize::MAX);
                host.tick(now);
            }
            self.collect();
        }
        assert!(self.hosts.iter().all(|host| host.unsynced() == 0), "never quiet");
        if self.verbose {
            self.hosts.iter().for_each(|host| eprintln!("{host:#?}"));
        }
        for (node, name) in NODES.iter().enumerate() {
            let at_node = self.read_logs(node, name);
            let at_hub = self.read_logs(HUB, name);
            assert_eq!(at_node, at_hub, "the Logs of {name} differ");
            self.oracle.settled(name, &at_hub);
            let here = self.state_of(node, name);
            let there = self.state_of(HUB, name);
            assert_eq!(here, there, "the retained values of {name} differ");
        }
    }

    fn next_tag(&mut self, place: &str) -> String {
        let number = self.numbers.entry(place.to_owned()).or_default();
        *number += 1;
        format!("{place}#{number}")
    }

    fn publish(&mut self, index: usize) {
        if index == HUB {
            return;
        }
        let topic = *["a", "b/c", "alarm/x"].choose(&mut self.rng).expect("not empty");
        let tag = self.next_tag(&format!("{}:{topic}", NODES[index]));
        let (qos, retain) = (self.rng.random_range(1..=2), self.rng.random_bool(0.2));
        let durable = self.rng.random_bool(0.5);
        let now = self.now;
        let host = &mut self.hosts[index];
        let session = host.connect(now, if durable { "pub-d" } else { "pub-t" }, Front::Mqtt, durable);
        host.publish(now, session, &Say { to: &Target::Own, topic, tag: &tag, qos, retain });
    }

    fn publish_down(&mut self) {
        let node = *NODES.choose(&mut self.rng).expect("not empty");
        let tag = self.next_tag(&format!("{node}:down"));
        let now = self.now;
        let hub = &mut self.hosts[HUB];
        let session = hub.connect(now, "ops", Front::Nats, false);
        let to = Target::Node(node.into());
        hub.publish(now, session, &Say { to: &to, topic: "valves/3", tag: &tag, qos: 1, retain: false });
    }

    fn dial(&mut self) {
        let node = self.rng.random_range(0..NODES.len());
        // Now and then a node dials although it is linked: its older session is fenced.
        if !self.wires.iter().any(|wire| wire.node == node) || self.rng.random_bool(0.2) {
            self.connect_anew(node);
        }
    }

    fn connect_node(&mut self, node: usize) {
        if !self.wires.iter().any(|wire| wire.node == node) {
            self.connect_anew(node);
        }
    }

    fn connect_anew(&mut self, node: usize) {
        let now = self.now;
        let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
        let peer = Peer { name: NODES[node].into(), role: Role::Node, generation: 1 };
        let at_hub = self.hosts[HUB].open_link(now, peer, false);
        let at_node = self.hosts[node].open_link(now, hub, true);
        self.wires.push(Wire { node, at_node, at_hub, up: BTreeMap::new(), down: BTreeMap::new() });
        self.collect();
    }

    fn cut(&mut self) {
        if !self.wires.is_empty() {
            let index = self.rng.random_range(0..self.wires.len());
            self.cut_wire(index);
        }
    }

    fn cut_wire(&mut self, index: usize) {
        let wire = self.wires.remove(index);
        let now = self.now;
        self.hosts[wire.node].apply(now, Event::LinkClosed { session: wire.at_node });
        self.hosts[HUB].apply(now, Event::LinkClosed { session: wire.at_hub });
    }

    fn crash(&mut self, index: usize) {
        let now = self.now;
        // The others learn of it.
        let (dead, alive): (Vec<Wire>, Vec<Wire>) =
            std::mem::take(&mut self.wires).into_iter().partition(|wire| index == HUB || wire.node == index);
        self.wires = alive;
        self.hosts[index].crash(now);
        for wire in dead {
            if index == HUB {
                self.hosts[wire.node].apply(now, Event::LinkClosed { session: wire.at_node });
            } else {
                self.hosts[HUB].apply(now, Event::LinkClosed { session: wire.at_hub });
            }
        }
        if index == HUB {
            self.come_up();
            for name in NODES {
                self.hosts[HUB].watch(now, name, "retained");
            }
        }
    }

    /// Delivers the head of some class of some wire.
    fn carry_some(&mut self) {
        for _ in 0..self.rng.random_range(1..12) {
            if self.wires.is_empty() {
                return;
            }
            let index = self.rng.random_range(0..self.wires.len());
            let upward = self.rng.random_bool(0.5);
            let wire = &mut self.wires[index];
            let lanes = if upward { &mut wire.up } else { &mut wire.down };
            let classes: Vec<Class> = lanes.keys().copied().collect();
            let Some(class) = classes.choose(&mut self.rng).copied() else { continue };
            let lane = lanes.get_mut(&class).expect("just listed");
            let records = lane.pop_front().expect("no empty lanes are kept");
            if lane.is_empty() {
                lanes.remove(&class);
            }
            let (host, session) = if upward { (HUB, wire.at_hub) } else { (wire.node, wire.at_node) };
            let now = self.now;
            self.hosts[host].apply(now, Event::LinkReceived { session, records });
            self.collect();
        }
    }

    /// The head of a lane arrives, and arrives again.
    fn duplicate(&mut self) {
        for wire in &mut self.wires {
            let events = wire.up.iter_mut().filter(|(class, _)| !matches!(class, Class::Control));
            for (_, lane) in events {
                // A declare may come once only; anything else must be harmless.
                if let Some(head) = lane.front().cloned()
                    && head.iter().all(|record| record.header.kind != codec::Kind::DECLARE)
                {
                    lane.push_front(head);
                    return;
                }
            }
        }
    }

    /// Takes what hosts have for the world.
    fn collect(&mut self) {
        for index in 0..self.hosts.len() {
            while let Some(out) = self.hosts[index].out.pop_front() {
                self.note(&(index, &out));
                self.take(index, out);
            }
        }
    }

    fn take(&mut self, index: usize, out: Out) {
        match out {
            Out::Send(session, class, records) => {
                let wire = self.wires.iter_mut().find(|wire| wire.side(index) == Some(session));
                if let Some(wire) = wire {
                    let lanes = if index == HUB { &mut wire.down } else { &mut wire.up };
                    lanes.entry(class).or_default().push_back(records);
                }
            }
            Out::CloseLink(session) => {
                let found = self.wires.iter().position(|wire| wire.side(index) == Some(session));
                if let Some(found) = found {
                    self.cut_wire(found);
                }
            }
            Out::Acknowledged(tag) => self.oracle.acknowledged(&tag),
            Out::Delivered { client, payload, origin, qos } => {
                assert!(
                    qos <= 2 && (index == HUB || *origin == *self.hosts[index].name || origin.is_empty())
                );
                let name = self.hosts[index].name.clone();
                self.oracle.delivered(&name, &client, &payload);
            }
            Out::NoResponders => {}
            Out::Watched(event) => {
                // Keys carry no node: the payload does.
                if let broker::core::event::StateEvent::Put { entry, .. } = &event {
                    let value = String::from_utf8_lossy(&entry.value()).into_owned();
                    let node = value.split(':').next().expect("tags are node:topic#number").to_owned();
                    self.oracle.watched(&node, &event);
                }
            }
        }
    }

    /// Every tag in the Logs of a node's own, as this host holds them.
    fn read_logs(&mut self, host: usize, origin: &str) -> Vec<String> {
        let now = self.now;
        let origin: Arc<str> = origin.into();
        let command = Command::LogList { origin: Some(Arc::clone(&origin)) };
        let Response::Logs(logs) = self.hosts[host].ask(now, command) else { panic!("a list of Logs") };
        let mut tags = Vec::new();
        for log in logs {
            let (stream, epoch, from) = (Arc::clone(&log.stream), Some(log.epoch), log.first);
            let command = Command::LogRead {
                origin: Arc::clone(&origin),
                stream,
                epoch,
                from,
                bytes_max: usize::MAX >> 8,
            };
            let Response::Records { records, .. } = self.hosts[host].ask(now, command) else {
                panic!("records")
            };
            tags.extend(self.oracle.log(&log, &records));
        }
        tags
    }

    fn state_of(&mut self, host: usize, origin: &str) -> Vec<(String, u64, u64)> {
        let command = Command::StateList {
            origin: origin.into(),
            space: "retained".into(),
            prefix: String::new(),
            after: None,
            limit: 1000,
            at: None,
        };
        let now = self.now;
        let Response::Entries { entries, .. } = self.hosts[host].ask(now, command) else { panic!("entries") };
        entries.into_iter().map(|entry| (entry.key, entry.incarnation, entry.revision)).collect()
    }
}

impl Wire {
    fn side(&self, index: usize) -> Option<SessionId> {
        if index == HUB { Some(self.at_hub) } else { (index == self.node).then_some(self.at_node) }
    }
}
