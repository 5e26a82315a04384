//! Replicas over one JetStream that is a model, with nodes that move between them: whatever is lost, late or cut, a
//! node's records are in the tier once and in order, and its State there ends as the node has it.
//!
//! What runs is the core of each replica and of each node, and [`Lanes`]; what is modelled is a stream of messages
//! with compare-and-set on a subject's last sequence, the claims, and what may happen to a request: no answer
//! before or after it took effect, an effect that comes later, a server that lost its tail.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{Config, Core},
    event::{
        Action, Event, Front, Group, LinkOpen, Now, Output, Peer, Publish, Role, SessionId, SessionOpen,
        Target,
        tier::{Mirrored, News, come_again},
    },
    store::{Store, StoreEvent, mem::MemStore},
};
use codec::{Class, FrameView, Kind, Record, frame::FrameParts};

use super::{
    lanes::{Asked, Lanes, Op, Outcome, Standing, Token, What},
    message::{self, Message},
};

const CLIENT: SessionId = SessionId(1);

/// A generator that is the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound.max(1) as u64)).expect("small")
    }

    fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }
}

/// What the replicas share.
#[derive(Default)]
struct Domain {
    sequence: u64,
    logs: BTreeMap<(String, String), Vec<Message>>,
    keys: BTreeMap<String, Message>,
    claims: BTreeMap<String, (u64, usize)>,
    /// Who is to hear that a claim is not its any more.
    fences: Vec<(usize, String)>,
    /// Every frame that a node gave a seq: (node, epoch, seq) to crc.
    given: BTreeMap<(String, u64, u64), u32>,
    appends: u64,
}

impl Domain {
    fn perform(&mut self, replica: usize, token: &Token, what: &What) -> Outcome {
        let node = token.node.to_string();
        match what {
            What::Adopt(adopt) => {
                let session = self.claims.get(&node).map_or(1, |(session, _)| session + 1);
                if let Some((_, older)) = self.claims.insert(node.clone(), (session, replica))
                    && older != replica
                {
                    self.fences.push((older, node.clone()));
                }
                let (read, freed): (Vec<_>, Vec<_>) = adopt.logs.iter().partition(|log| log.next > log.first);
                let summary = self.last_key(&format!("{node}/"));
                let ends = read.iter().chain(&freed).map(|log| {
                    let end = self.last(&node, &log.stream).and_then(message::end_of);
                    (Arc::clone(&log.stream), log.first, end)
                });
                let standing =
                    Standing { held: session, summary, logs: ends.collect(), ..Standing::default() };
                Outcome::Adopted(Ok(Box::new(standing)))
            }
            What::Release { summary, .. } => {
                if let Some(put) = summary {
                    self.put(put);
                }
                Outcome::Nothing
            }
            What::StillOurs { held } => {
                Outcome::Ours(self.claims.get(&node).is_some_and(|claim| claim == &(*held, replica)))
            }
            What::Append { stream, append } => {
                let last = self.last(&node, stream).map_or(0, |message| message.sequence);
                if last != append.expected {
                    return Outcome::Conflict;
                }
                self.sequence += 1;
                self.appends += 1;
                let records = message::batch_of(&append.payload).expect("a batch");
                for record in records.iter().filter(|record| record.header.kind == Kind::LOG) {
                    self.check_record(&node, stream, record);
                }
                let stored = Message {
                    sequence: self.sequence,
                    headers: append
                        .headers
                        .iter()
                        .map(|(name, value)| ((*name).to_owned(), value.clone()))
                        .collect(),
                    payload: append.payload.clone(),
                };
                self.logs.entry((node, stream.to_string())).or_default().push(stored);
                Outcome::Written(self.sequence)
            }
            What::Last { stream } => Outcome::Found(self.last(&node, stream).cloned(), None),
            What::Put(put) => self.put(put),
            What::Get { key } => Outcome::Found(self.keys.get(key).cloned(), None),
            What::Sweep { below, from } => {
                let below = format!("{below}/");
                let of_space = self
                    .keys
                    .iter()
                    .filter(|(key, message)| key.starts_with(&below) && message.sequence >= *from);
                match of_space.min_by_key(|(_, message)| message.sequence) {
                    Some((key, message)) => Outcome::Found(Some(message.clone()), Some(key.clone())),
                    None => Outcome::Found(None, None),
                }
            }
            What::Letter { .. } => Outcome::Nothing,
        }
    }

    fn check_record(&self, node: &str, stream: &str, record: &Record) {
        let (epoch, seq) = (record.header.epoch, record.header.seq);
        let given = self.given.get(&(node.to_owned(), epoch, seq));
        assert_eq!(
            given,
            Some(&crc32c::crc32c(&record.body)),
            "{node} {epoch:x} {seq}: not what the node gave"
        );
        let there = self.logs.get(&(node.to_owned(), stream.to_owned()));
        for held in there.into_iter().flatten() {
            for held in message::batch_of(&held.payload).expect("a batch") {
                let same =
                    (held.header.epoch, held.header.seq) == (epoch, seq) && held.header.kind == Kind::LOG;
                assert!(!same, "{node}/{stream}: seq {seq} is in the tier twice");
            }
        }
    }

    fn put(&mut self, put: &super::state::Put) -> Outcome {
        let held = self.keys.get(&put.key);
        if put.expected.is_some_and(|expected| expected != held.map_or(0, |held| held.sequence)) {
            return Outcome::Conflict;
        }
        let pair =
            |payload| message::record_of(payload).map(|record| (record.header.epoch, record.header.seq));
        if let Some((held, new)) = held.and_then(|held| Some((pair(&held.payload)?, pair(&put.payload)?))) {
            assert!(new > held, "{}: {new:?} after {held:?}", put.key);
        }
        self.sequence += 1;
        let stored = Message {
            sequence: self.sequence,
            headers: put.headers.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
            payload: put.payload.clone(),
        };
        self.keys.insert(put.key.clone(), stored);
        Outcome::Written(self.sequence)
    }

    fn last(&self, node: &str, stream: &str) -> Option<&Message> {
        self.logs.get(&(node.to_owned(), stream.to_owned()))?.last()
    }

    fn last_key(&self, below: &str) -> Option<Message> {
        let of_node = self.keys.iter().filter(|(key, _)| key.starts_with(below));
        of_node.max_by_key(|(_, message)| message.sequence).map(|(_, message)| message.clone())
    }
}

/// A replica.
struct Hub {
    core: Core,
    lanes: Lanes,
    flying: Vec<Op>,
    returned: Vec<(Token, Asked, Outcome)>,
}

/// A node and its disk.
struct Node {
    name: String,
    core: Core,
    disk: MemStore,
    waiting: Vec<Group>,
    life: u64,
    counter: u64,
}

/// A link: whether each end knows it to be open, and what is on the way.
struct Wire {
    node: usize,
    hub: usize,
    at_node: SessionId,
    at_hub: SessionId,
    node_open: bool,
    hub_open: bool,
    up: BTreeMap<Class, VecDeque<Vec<Record>>>,
    down: BTreeMap<Class, VecDeque<Vec<Record>>>,
}

struct World {
    dice: Dice,
    now: Duration,
    domain: Domain,
    hubs: Vec<Hub>,
    nodes: Vec<Node>,
    wires: Vec<Wire>,
    /// Requests of which nobody waits for the answer, and which take effect all the same.
    late: Vec<(usize, Token, What)>,
    sessions: u64,
    lives: u64,
    calm: bool,
}

impl World {
    fn new(seed: u64, hubs: usize, nodes: usize) -> Self {
        let mut world = Self {
            dice: Dice(seed),
            now: Duration::ZERO,
            domain: Domain::default(),
            hubs: Vec::new(),
            nodes: Vec::new(),
            wires: Vec::new(),
            late: Vec::new(),
            sessions: 10,
            lives: 0,
            calm: false,
        };
        for hub in 0..hubs {
            let started = world.new_hub(hub);
            world.hubs.push(started);
        }
        for node in 0..nodes {
            let name = format!("n{node}");
            let config = Config::node(&name, [u8::try_from(node).expect("few"); 16], world.dice.next());
            let disk = MemStore::new();
            let mut actions = Vec::new();
            let core = Core::restore(config, disk.recover(), world.time(), &mut actions);
            world.nodes.push(Node { name, core, disk, waiting: Vec::new(), life: 0, counter: 0 });
            world.perform_node(node, actions);
            world.open_client(node);
        }
        world
    }

    fn time(&self) -> Now {
        let wall_us = 1_790_000_000_000_000 + u64::try_from(self.now.as_micros()).expect("short");
        Now { mono: self.now, wall_us, trusted: true }
    }

    fn new_hub(&mut self, hub: usize) -> Hub {
        self.lives += 1;
        let config = Config::replica(&format!("hub-{hub}"), "t", [9; 16], self.dice.next());
        let mut actions = Vec::new();
        let mut core = Core::restore(config, broker::store::Recovered::default(), self.time(), &mut actions);
        let whole =
            Mirrored { space: "fleet".into(), incarnation: 1, records: Vec::new(), complete: Some(1) };
        core.apply(self.time(), Event::Tier(News::Mirrored(whole)), &mut actions);
        Hub { core, lanes: Lanes::new(1 << 20), flying: Vec::new(), returned: Vec::new() }
    }

    fn open_client(&mut self, node: usize) {
        let open = SessionOpen {
            session: CLIENT,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: 8,
            will: None,
        };
        self.apply_node(node, Event::SessionOpened(open));
    }

    // ---- hosts ----

    fn apply_node(&mut self, node: usize, event: Event) {
        let mut actions = Vec::new();
        let now = self.time();
        self.nodes[node].core.apply(now, event, &mut actions);
        self.perform_node(node, actions);
    }

    fn perform_node(&mut self, node: usize, actions: Vec<Action>) {
        let mut reads = false;
        for action in actions {
            match action {
                Action::Persist(group) => {
                    for record in group.records.iter().filter(|record| record.header.kind == Kind::LOG) {
                        let key = (self.nodes[node].name.clone(), record.header.epoch, record.header.seq);
                        if record.header.source != 0 {
                            self.domain.given.insert(key, crc32c::crc32c(&record.body));
                        }
                    }
                    self.nodes[node].waiting.push(group);
                }
                Action::Read(request) => {
                    self.nodes[node].disk.read(request);
                    reads = true;
                }
                Action::Output { session, output } => self.output(true, session, output),
                Action::Respond { .. } | Action::Tier(_) => {}
            }
        }
        if reads {
            self.poll_disk(node);
        }
    }

    fn poll_disk(&mut self, node: usize) {
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(event) = self.nodes[node].disk.poll_event(&mut cx) {
            match event {
                StoreEvent::Persisted(lsn) => self.apply_node(node, Event::Persisted(lsn)),
                StoreEvent::Read { read, records, next } => {
                    self.apply_node(node, Event::ReadDone { read, records, next })
                }
                other => panic!("a disk without faults: {other:?}"),
            }
        }
    }

    fn persist(&mut self, node: usize) {
        let groups = std::mem::take(&mut self.nodes[node].waiting);
        for group in groups {
            self.nodes[node].disk.submit(group);
        }
        self.nodes[node].disk.flush();
        self.poll_disk(node);
    }

    fn apply_hub(&mut self, hub: usize, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let mut actions = Vec::new();
            let now = self.time();
            self.hubs[hub].core.apply(now, event, &mut actions);
            for action in actions {
                match action {
                    Action::Persist(group) => self.hubs[hub].lanes.submit(group),
                    Action::Tier(ask) => self.hubs[hub].lanes.ask(ask),
                    Action::Output { session, output } => self.output(false, session, output),
                    Action::Read(request) => {
                        let (read, next) = (request.read, request.from);
                        events.push_back(Event::ReadDone { read, records: Vec::new(), next });
                    }
                    Action::Respond { .. } => {}
                }
            }
            events.extend(self.take_lanes(hub));
        }
    }

    fn take_lanes(&mut self, hub: usize) -> Vec<Event> {
        let hub = &mut self.hubs[hub];
        while let Some(op) = hub.lanes.take_op() {
            hub.flying.push(op);
        }
        std::iter::from_fn(|| hub.lanes.take_news()).map(Event::Tier).collect()
    }

    fn output(&mut self, by_node: bool, session: SessionId, output: Output) {
        let bytes = output.cost();
        let at =
            self.wires.iter().position(|wire| (if by_node { wire.at_node } else { wire.at_hub }) == session);
        let Some(at) = at else { return };
        match output {
            Output::Send { class, records } => {
                let wire = &mut self.wires[at];
                let lanes = if by_node { &mut wire.up } else { &mut wire.down };
                lanes.entry(class).or_default().push_back(records);
            }
            Output::Close(_) => {
                let wire = &mut self.wires[at];
                if by_node {
                    wire.node_open = false;
                    let node = wire.node;
                    self.apply_node(node, Event::LinkClosed { session });
                } else {
                    // What was said before arrives, then the end does.
                    wire.hub_open = false;
                    let hub = wire.hub;
                    self.apply_hub(hub, Event::LinkClosed { session });
                }
                return;
            }
            _ => {}
        }
        let wire = &self.wires[at];
        let (node, hub) = (wire.node, wire.hub);
        if by_node {
            self.apply_node(node, Event::Sent { session, bytes });
        } else {
            self.apply_hub(hub, Event::Sent { session, bytes });
        }
    }

    // ---- what may happen ----

    fn link(&mut self, node: usize, hub: usize) {
        for at in 0..self.wires.len() {
            if self.wires[at].node == node && self.wires[at].node_open {
                self.close_node_end(at);
            }
        }
        self.sessions += 2;
        let (at_node, at_hub) = (SessionId(self.sessions), SessionId(self.sessions + 1));
        self.wires.push(Wire {
            node,
            hub,
            at_node,
            at_hub,
            node_open: true,
            hub_open: true,
            up: BTreeMap::new(),
            down: BTreeMap::new(),
        });
        let peer = Peer { name: self.nodes[node].name.as_str().into(), role: Role::Node, generation: 1 };
        self.apply_hub(hub, Event::LinkOpened(LinkOpen { session: at_hub, peer, dialler: false }));
        let peer = Peer { name: format!("hub-{hub}").as_str().into(), role: Role::Hub, generation: 0 };
        self.apply_node(node, Event::LinkOpened(LinkOpen { session: at_node, peer, dialler: true }));
    }

    fn close_node_end(&mut self, at: usize) {
        if std::mem::take(&mut self.wires[at].node_open) {
            let (node, session) = (self.wires[at].node, self.wires[at].at_node);
            self.apply_node(node, Event::LinkClosed { session });
        }
    }

    fn close_hub_end(&mut self, at: usize) {
        if std::mem::take(&mut self.wires[at].hub_open) {
            let (hub, session) = (self.wires[at].hub, self.wires[at].at_hub);
            self.apply_hub(hub, Event::LinkClosed { session });
        }
    }

    /// Carries one batch, if there is one.
    fn carry(&mut self, at: usize, up: bool) -> bool {
        let turn = self.dice.next();
        let wire = &mut self.wires[at];
        let open = if up { wire.hub_open } else { wire.node_open };
        let lanes = if up { &mut wire.up } else { &mut wire.down };
        lanes.retain(|_, queue| !queue.is_empty());
        let classes: Vec<Class> = lanes.keys().copied().collect();
        if classes.is_empty() {
            // The other end is gone, and everything that it said has come.
            if up && wire.hub_open && !wire.node_open {
                self.close_hub_end(at);
            } else if !up && wire.node_open && !wire.hub_open {
                self.close_node_end(at);
            }
            return false;
        }
        let class = classes[usize::try_from(turn % classes.len() as u64).expect("few")];
        let records = lanes.get_mut(&class).and_then(VecDeque::pop_front).expect("not empty");
        if open {
            let (node, hub, at_node, at_hub) = (wire.node, wire.hub, wire.at_node, wire.at_hub);
            if up {
                self.apply_hub(hub, Event::LinkReceived { session: at_hub, records });
            } else {
                self.apply_node(node, Event::LinkReceived { session: at_node, records });
            }
        }
        true
    }

    /// Something becomes of one request.
    fn fly(&mut self, hub: usize) -> bool {
        if self.hubs[hub].flying.is_empty() {
            return false;
        }
        let at = self.dice.below(self.hubs[hub].flying.len());
        let op = self.hubs[hub].flying.swap_remove(at);
        let asked = op.what.asked();
        let fate = if self.calm { 99 } else { self.dice.below(20) };
        let is_read = !matches!(op.what, What::Append { .. } | What::Put(_));
        let outcome = match fate {
            0 if matches!(op.what, What::Adopt(_)) => {
                Outcome::Adopted(Err(come_again("the servers do not answer", 100)))
            }
            0 if is_read => Outcome::Unavailable,
            // It never came there.
            0 => Outcome::Unknown,
            1 if !is_read => {
                self.domain.perform(hub, &op.token, &op.what);
                Outcome::Unknown
            }
            2 if !is_read => {
                self.late.push((hub, op.token.clone(), op.what));
                Outcome::Unknown
            }
            _ => self.domain.perform(hub, &op.token, &op.what),
        };
        self.hubs[hub].returned.push((op.token, asked, outcome));
        true
    }

    fn land(&mut self, hub: usize) -> bool {
        if self.hubs[hub].returned.is_empty() {
            return false;
        }
        let at = self.dice.below(self.hubs[hub].returned.len());
        let (token, asked, outcome) = self.hubs[hub].returned.swap_remove(at);
        self.hubs[hub].lanes.done(&token, asked, outcome);
        for event in self.take_lanes(hub) {
            self.apply_hub(hub, event);
        }
        true
    }

    fn kill_hub(&mut self, hub: usize) {
        for op in std::mem::take(&mut self.hubs[hub].flying) {
            if self.dice.one_in(3) && matches!(op.what, What::Append { .. } | What::Put(_)) {
                self.late.push((hub, op.token, op.what));
            }
        }
        self.hubs[hub] = self.new_hub(hub);
        for wire in self.wires.iter_mut().filter(|wire| wire.hub == hub) {
            wire.hub_open = false;
            wire.up.clear();
            wire.down.clear();
        }
    }

    fn kill_node(&mut self, node: usize) {
        let name = self.nodes[node].name.clone();
        let disk = std::mem::take(&mut self.nodes[node].disk);
        let (disk, recovered) = disk.crash();
        // What was not durable was never given: the seqs are given again.
        let lost = std::mem::take(&mut self.nodes[node].waiting);
        for record in lost.iter().flat_map(|group| &group.records) {
            if record.header.kind == Kind::LOG {
                self.domain.given.remove(&(name.clone(), record.header.epoch, record.header.seq));
            }
        }
        let config = Config::node(&name, [u8::try_from(node).expect("few"); 16], self.dice.next());
        let mut actions = Vec::new();
        let core = Core::restore(config, recovered, self.time(), &mut actions);
        let held = &mut self.nodes[node];
        (held.core, held.disk) = (core, disk);
        held.life += 1;
        for wire in self.wires.iter_mut().filter(|wire| wire.node == node) {
            wire.node_open = false;
            wire.down.clear();
        }
        self.perform_node(node, actions);
        self.open_client(node);
    }

    fn lose_tail(&mut self) {
        let streams: Vec<_> = self.domain.logs.keys().cloned().collect();
        if streams.is_empty() {
            return;
        }
        let name = &streams[self.dice.below(streams.len())];
        let lost = 1 + self.dice.below(3);
        let log = self.domain.logs.get_mut(name).expect("listed");
        log.truncate(log.len().saturating_sub(lost));
    }

    /// The servers came back.
    fn disturb(&mut self) {
        for hub in 0..self.hubs.len() {
            self.hubs[hub].lanes.disturbed();
            for event in self.take_lanes(hub) {
                self.apply_hub(hub, event);
            }
        }
    }

    fn publish(&mut self, node: usize) {
        let count = 1 + self.dice.below(8);
        let topic = if self.dice.one_in(4) { "a/alarm" } else { "a/b" };
        let mut messages = Vec::new();
        for _ in 0..count {
            self.nodes[node].counter += 1;
            let payload = self.nodes[node].counter.to_string();
            let frame = FrameParts { topic, payload: payload.as_bytes(), ..FrameParts::default() }.encode();
            messages.push(publish(frame, 1, false));
        }
        self.apply_node(node, Event::Published { session: CLIENT, messages });
    }

    fn retain(&mut self, node: usize) {
        self.nodes[node].counter += 1;
        let topic = ["r/1", "r/2", "r/3", "r/4"][self.dice.below(4)];
        let payload = if self.dice.one_in(3) { String::new() } else { self.nodes[node].counter.to_string() };
        let frame = FrameParts { topic, payload: payload.as_bytes(), ..FrameParts::default() }.encode();
        self.apply_node(node, Event::Published { session: CLIENT, messages: vec![publish(frame, 0, true)] });
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.dice.next() % 20);
        let (nodes, hubs) = (self.nodes.len(), self.hubs.len());
        let (node, hub) = (self.dice.below(nodes), self.dice.below(hubs));
        let wires = self.wires.len();
        let wire = self.dice.below(wires);
        match self.dice.below(200) {
            0..40 if wires > 0 => drop(self.carry(wire, true)),
            40..70 if wires > 0 => drop(self.carry(wire, false)),
            70..110 => drop(self.fly(hub)),
            110..150 => drop(self.land(hub)),
            150..160 => self.publish(node),
            160..166 => self.retain(node),
            166..182 => self.persist(node),
            182..186 => self.link(node, hub),
            186..188 if wires > 0 && !self.wires[wire].node_open => self.close_hub_end(wire),
            188 => self.kill_hub(hub),
            189 => self.kill_node(node),
            190 if self.dice.one_in(2) => self.lose_tail(),
            190 => self.disturb(),
            191..194 if !self.late.is_empty() => {
                let at = self.dice.below(self.late.len());
                let (hub, token, what) = self.late.swap_remove(at);
                self.domain.perform(hub, &token, &what);
            }
            194..197 => self.hear_fence(),
            _ => self.tick(),
        }
        self.wires.retain(|wire| wire.node_open || wire.hub_open);
    }

    fn hear_fence(&mut self) {
        if self.domain.fences.is_empty() {
            return;
        }
        let at = self.dice.below(self.domain.fences.len());
        let (hub, node) = self.domain.fences.swap_remove(at);
        if self.domain.claims.get(&node).is_some_and(|(_, holder)| *holder != hub) {
            self.hubs[hub].lanes.lost(&node.as_str().into());
            for event in self.take_lanes(hub) {
                self.apply_hub(hub, event);
            }
        }
    }

    fn tick(&mut self) {
        for node in 0..self.nodes.len() {
            if self.nodes[node].core.deadline().is_some_and(|at| at <= self.now) {
                self.apply_node(node, Event::TimerFired);
            }
        }
        for hub in 0..self.hubs.len() {
            if self.hubs[hub].core.deadline().is_some_and(|at| at <= self.now) {
                self.apply_hub(hub, Event::TimerFired);
            }
        }
    }

    /// No more faults: everything comes to rest.
    fn rest(&mut self) {
        self.calm = true;
        for (hub, token, what) in std::mem::take(&mut self.late) {
            self.domain.perform(hub, &token, &what);
        }
        self.disturb();
        for round in 0..4_000 {
            self.now += Duration::from_millis(20);
            let mut moved = false;
            for node in 0..self.nodes.len() {
                self.persist(node);
                let linked = self.wires.iter().any(|wire| wire.node == node && wire.node_open);
                if !linked {
                    let hub = self.dice.below(self.hubs.len());
                    self.link(node, hub);
                    moved = true;
                }
            }
            for at in 0..self.wires.len() {
                moved |= self.carry(at, true) | self.carry(at, false);
            }
            for hub in 0..self.hubs.len() {
                while self.fly(hub) | self.land(hub) {
                    moved = true;
                }
            }
            self.hear_fence();
            self.tick();
            self.wires.retain(|wire| wire.node_open || wire.hub_open);
            let whole = (0..self.nodes.len()).all(|node| self.missing(node).is_none());
            if !moved && whole && round > 50 {
                return;
            }
        }
        let missing: Vec<_> = (0..self.nodes.len()).filter_map(|node| self.missing(node)).collect();
        for ((node, stream), messages) in &self.domain.logs {
            let end = messages.last().and_then(message::end_of);
            eprintln!("{node}/{stream}: {} messages, {end:?}", messages.len());
        }
        for hub in &self.hubs {
            eprintln!("{:#?}", hub.lanes);
        }
        for wire in &self.wires {
            eprintln!("wire {} -> {}: {} {}", wire.node, wire.hub, wire.node_open, wire.hub_open);
        }
        panic!("it does not come to rest: {missing:?}");
    }

    /// What of a node is not in the tier.
    fn missing(&self, node: usize) -> Option<String> {
        let node = &self.nodes[node];
        let mut held = BTreeSet::new();
        for ((of, _), messages) in &self.domain.logs {
            if *of != node.name {
                continue;
            }
            for record in
                messages.iter().flat_map(|message| message::batch_of(&message.payload).expect("a batch"))
            {
                if record.header.kind == Kind::LOG {
                    held.insert((record.header.epoch, record.header.seq));
                }
            }
        }
        let of_node = self.domain.given.keys().filter(|(of, _, _)| *of == node.name);
        let lost: Vec<_> = of_node.filter(|(_, epoch, seq)| !held.contains(&(*epoch, *seq))).collect();
        if !lost.is_empty() {
            return Some(format!("{} of {}: {:?}", lost.len(), node.name, lost.first()));
        }
        let recovered = node.disk.recover();
        let retained = recovered.sources.iter().find(|source| &*source.name == "retained")?.number;
        for record in recovered.state.iter().filter(|record| record.header.source == retained) {
            let topic = FrameView::parse(&record.body).expect("a frame").topic().to_owned();
            let key = format!("{}/retained/{topic}", node.name);
            let there = self.domain.keys.get(&key).and_then(|message| message::record_of(&message.payload));
            let same = there.as_ref().is_some_and(|there| {
                (there.header.epoch, there.header.seq) == (record.header.epoch, record.header.seq)
                    && there.body == record.body
                    && there.header.kind == record.header.kind
            });
            let never = there.is_none() && record.header.kind == Kind::TOMBSTONE;
            if !same && !never {
                return Some(format!("{key}: {:?} instead of {:?}", there.map(|t| t.header), record.header));
            }
        }
        None
    }
}

fn publish(frame: bytes::Bytes, qos: u8, retain: bool) -> Publish {
    Publish { target: Target::Own, frame, qos, packet_id: 0, dup: false, retain, reply: None }
}

fn run(seed: u64, steps: usize) -> u64 {
    let mut world = World::new(seed, 3, 4);
    for _ in 0..steps {
        world.step();
    }
    world.rest();
    world.domain.appends
}

#[test]
fn whatever_fails_nothing_is_lost_nothing_is_there_twice_and_nothing_goes_back() {
    let seeds = std::env::var("OCTOBUS_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(24);
    let first = std::env::var("OCTOBUS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let mut appends = 0;
    for seed in first..first + seeds {
        let outcome = std::panic::catch_unwind(|| run(seed, 4_000));
        match outcome {
            Ok(count) => appends += count,
            Err(why) => {
                eprintln!("seed {seed}");
                std::panic::resume_unwind(why);
            }
        }
    }
    assert!(appends > seeds * 20, "a world in which {appends} messages are written shows little");
}
