//! The hosts, the links between them, and what a script does to them.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    time::Duration,
};

use broker::core::{
    Config, Policy, StreamConfig,
    event::{
        Command, Event, Expect, Front, OriginFilter, Peer, Response, Role, SessionId, StateChange, StateOp,
        Target,
    },
};
use codec::{Class, Filter};
use octobus_tests::script::{
    Age, COPY, HUB, Health, How, NAMES, NODES, SPACES, Script, Step, TOPICS, Way, What, Who,
};

use crate::{
    client::Message,
    disk::Copy,
    fleet::Fleet,
    host::{Host, Out},
    oracle::Oracle,
    shadow::{News, rule},
    wire::{DOWN, UP, Wire},
};

/// Heartbeats that nobody answers end a link: at the node, and at the hub.
const DEAF_AT_NODE: Duration = Duration::from_secs(6);
const DEAF_AT_HUB: Duration = Duration::from_secs(15);
/// Rounds of settling until the world must be quiet, and rounds without any change that say it is.
const SETTLE_ROUNDS: usize = 300;
const QUIET_ROUNDS: usize = 3;
const SETTLE_ROUND: Duration = Duration::from_secs(1);
/// Spaces that watchers at the hub follow.
const WATCHED: [&str; 3] = ["retained", "status", "twin"];

pub(crate) struct World {
    now: Duration,
    hosts: Vec<Option<Host>>,
    wires: Vec<Wire>,
    copies: BTreeMap<Who, Copy>,
    ages: BTreeMap<Who, Age>,
    oracle: Oracle,
    numbers: BTreeMap<String, u64>,
    trace: std::hash::DefaultHasher,
    /// Print every event: OCTOBUS_SIM_TRACE.
    verbose: bool,
    /// Hash everything that hosts say, not only what happens.
    thorough: bool,
    /// A fault that a test puts in, and whether it has set in.
    deaf_after_full: bool,
    deaf: bool,
    /// What has happened since the world was last looked at.
    events: u64,
}

impl World {
    pub(crate) fn new(seed: u64, thorough: bool) -> Self {
        let now = Duration::from_secs(1);
        let host = |who: Who| {
            let instance = [u8::try_from(who + 1).expect("few hosts"); 16];
            let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(who as u64);
            let config = match who {
                HUB => Config::hub("hub", "tier", instance, seed),
                _ => Config::node(NAMES[who], instance, seed),
            };
            Some(Host::new(config, now))
        };
        let mut hosts: Vec<Option<Host>> = (0..=HUB).map(host).collect();
        hosts.push(None);
        let mut world = Self {
            now,
            hosts,
            wires: Vec::new(),
            copies: BTreeMap::new(),
            ages: BTreeMap::new(),
            oracle: Oracle::default(),
            numbers: BTreeMap::new(),
            trace: std::hash::DefaultHasher::new(),
            verbose: std::env::var_os("OCTOBUS_SIM_TRACE").is_some(),
            thorough,
            deaf_after_full: false,
            deaf: false,
            events: 0,
        };
        for who in 0..=HUB {
            world.come_up(who);
        }
        world
    }

    /// Runs a script, then lets the world come to rest and looks whether every promise was kept.
    pub(crate) fn run(script: &Script, thorough: bool) -> u64 {
        Self::new(script.seed, thorough).follow(script)
    }

    /// As [`Self::run`], in a world that a test has given a fault.
    pub(crate) fn run_with(script: &Script, fault: impl FnOnce(&mut Self)) -> u64 {
        let mut world = Self::new(script.seed, false);
        fault(&mut world);
        world.follow(script)
    }

    /// From the first full disk on, deliveries do not reach the subscribers.
    pub(crate) fn lose_deliveries_after_a_full_disk(&mut self) {
        self.deaf_after_full = true;
    }

    fn follow(self, script: &Script) -> u64 {
        let mut world = self;
        for step in &script.steps {
            world.step(step);
        }
        world.settle();
        world.trace.finish()
    }

    fn host(&mut self, who: Who) -> &mut Host {
        self.hosts[who].as_mut().expect("it is there")
    }

    /// What a host has from its start: enrolments at a hub, a subscriber, watchers. What is promised to
    /// subscribers is promised once their subscription is durable.
    fn come_up(&mut self, who: Who) {
        let now = self.now;
        if who == HUB {
            let enrol = NAMES[..NODES].iter().map(|node| StateOp {
                space: "sys".into(),
                key: format!("identity/{node}"),
                change: StateChange::Put(bytes::Bytes::from_static(b"{}")),
                expect: Expect::Absent,
            });
            for op in enrol.collect::<Vec<_>>() {
                self.host(HUB).command(now, Command::StateWrite(vec![op]));
            }
            let hub = self.host(HUB);
            let session = hub.connect(now, "nats", Front::Nats, false);
            hub.subscribe(now, session, OriginFilter::AnyNode, "#", 0);
            self.collect();
            for node in 0..NODES {
                self.watch(node);
            }
        } else {
            self.subscriber_of(who);
        }
        self.host(who).sync(now, usize::MAX);
        self.collect();
    }

    fn subscriber_of(&mut self, who: Who) {
        let now = self.now;
        let host = self.host(who);
        host.clients.entry("sub".to_owned()).or_default().lazy = true;
        let session = host.connect(now, "sub", Front::Mqtt, true);
        host.subscribe(now, session, OriginFilter::Own, "#", 2);
    }

    fn watch(&mut self, node: Who) {
        let now = self.now;
        for space in WATCHED {
            let watcher = format!("watch-{}/{space}", NAMES[node]);
            self.host(HUB).disconnect(now, &watcher);
            self.oracle.watching(&watcher);
            self.host(HUB).watch(now, NAMES[node], space);
        }
    }

    fn note(&mut self, what: &impl std::fmt::Debug) {
        if !self.verbose && !self.thorough {
            return;
        }
        let line = format!("{:?} {what:?}", self.now);
        if self.verbose {
            eprintln!("{line}");
        }
        line.hash(&mut self.trace);
    }

    /// One thing happens; the invariants are checked as it does.
    fn step(&mut self, step: &Step) {
        self.now += Duration::from_micros(step.after_us.into());
        self.note(&step.what.to_string());
        self.act(step.what);
        let now = self.now;
        self.hosts.iter_mut().flatten().for_each(|host| host.tick(now));
        self.collect();
        self.find_deaf();
    }

    fn act(&mut self, what: What) {
        let now = self.now;
        let who = match what {
            What::Sync { host, .. }
            | What::Crash { host }
            | What::Disk { host, .. }
            | What::Clock { host, .. }
            | What::Trust { host, .. }
            | What::Wipe { host }
            | What::Snapshot { host }
            | What::Rollback { host }
            | What::Restore { host }
            | What::Quota { host, .. }
            | What::Publish { node: host, .. }
            | What::Down { node: host, .. }
            | What::Write { node: host, .. }
            | What::Read { node: host, .. }
            | What::Away { node: host }
            | What::Back { node: host }
            | What::Watch { node: host }
            | What::Carry { node: host, .. }
            | What::Repeat { node: host, .. }
            | What::Dial { node: host }
            | What::Cut { node: host }
            | What::Deafen { node: host, .. }
            | What::Version { node: host, .. }
            | What::Clone { node: host, .. }
            | What::Alarms { node: host, .. } => host.0,
            What::Want { node: host, .. } | What::Accept { node: host } => host.0,
            What::Unclone {} => COPY,
            What::Object { .. } | What::Barrier {} => HUB,
        };
        if self.hosts[who].is_none() {
            return;
        }
        match what {
            What::Publish { topic, qos, retain, durable, pad, .. } => {
                let client = if durable.yes() { "pub-d" } else { "pub-t" };
                self.publish(who, TOPICS[topic.0], qos, retain.yes(), client, pad as usize);
            }
            What::Down { retain, .. } => self.publish_down(who, retain.yes()),
            What::Write { space, key, how, .. } => self.write(who, SPACES[space.0], key, how),
            What::Read { count, .. } => self.host(who).read(now, "sub", count as usize),
            What::Away { .. } => self.host(who).disconnect(now, "sub"),
            What::Back { .. } => self.subscriber_of(who),
            What::Watch { .. } if who < NODES => self.watch(who),
            What::Sync { groups, .. } => self.host(who).sync(now, groups as usize),
            What::Carry { way, lane, count, .. } => self.carry(who, way, lane.into(), count as usize),
            What::Repeat { way, .. } => {
                let wires = self.wires.iter_mut().filter(|wire| wire.node == who);
                wires.for_each(|wire| ways(way).for_each(|way| wire.repeat(way)));
            }
            What::Dial { .. } => self.dial(who),
            What::Cut { .. } => self.cut(who),
            What::Deafen { way, .. } => {
                for wire in self.wires.iter_mut().filter(|wire| wire.node == who) {
                    ways(way).for_each(|way| wire.deaf[way] = true);
                    wire.deaf_since.get_or_insert(now);
                }
            }
            What::Version { as_of, .. } => drop(self.ages.insert(who, as_of)),
            What::Crash { .. } => self.restart(who, Host::crash),
            What::Disk { state, .. } => {
                self.deaf |= self.deaf_after_full && state == Health::Full;
                self.host(who).disk.set(state);
                self.host(who).poll_store(now);
            }
            What::Clock { seconds, .. } => self.host(who).off_s = seconds,
            What::Trust { yes, .. } => self.host(who).trusted = yes.yes(),
            What::Wipe { .. } => self.replace(who, None, false),
            What::Snapshot { .. } => {
                let copy = self.host(who).disk.copy();
                self.copies.insert(who, copy);
            }
            What::Rollback { .. } | What::Restore { .. } => {
                if let Some(copy) = self.copies.remove(&who) {
                    self.replace(who, Some(&copy), matches!(what, What::Restore { .. }));
                    self.copies.insert(who, copy);
                }
            }
            What::Clone { fresh, .. } => self.copy_of(who, fresh.yes()),
            What::Unclone {} => self.switch_off_copy(),
            What::Alarms { declared, .. } => self.restart(who, |host, now| {
                host.config.streams = if declared.yes() { vec![alarms()] } else { Vec::new() };
                host.crash(now);
            }),
            What::Quota { bytes, .. } => self.restart(who, |host, now| {
                host.config.default_stream.policy.bytes_max = bytes;
                host.crash(now);
            }),
            What::Object { number, how } => {
                let command = self.oracle.fleet.object(number, how);
                self.host(HUB).command(now, command);
            }
            What::Want { mask, .. } if who < NODES => {
                let command = self.oracle.fleet.want(who, mask);
                self.host(HUB).command(now, command);
            }
            What::Barrier {} => self.host(HUB).command(now, Fleet::barrier()),
            What::Accept { .. } if who < NODES => self.host(HUB).command(now, Fleet::accept(who)),
            What::Watch { .. } | What::Want { .. } | What::Accept { .. } => {}
        }
    }

    fn next_tag(&mut self, place: &str) -> String {
        let number = self.numbers.entry(place.to_owned()).or_default();
        *number += 1;
        format!("{place}#{number}")
    }

    fn publish(&mut self, who: Who, topic: &str, qos: u8, retain: bool, client: &str, pad: usize) {
        if who == HUB {
            return;
        }
        let tag = self.next_tag(&format!("{}:{topic}", NAMES[who]));
        let mut payload = tag.clone().into_bytes();
        if pad > 0 {
            payload.push(b'|');
            payload.resize(payload.len() + pad, b'.');
        }
        let now = self.now;
        let host = self.host(who);
        let session = host.connect(now, client, Front::Mqtt, client == "pub-d");
        let refusing = host.takes_no_data();
        let topic = topic.to_owned();
        let message =
            Message { to: Target::Own, topic, tag: tag.clone(), payload, qos, retain, headers: false };
        host.say(now, session, &message);
        self.collect();
        if refusing && qos > 0 {
            rule!(
                self.oracle.was_refused(&tag) || !self.host(who).takes_no_data(),
                "a_publish_to_a_full_disk_gets_a_typed_refusal",
                "{tag}"
            );
        }
    }

    fn publish_down(&mut self, node: Who, retain: bool) {
        if node >= NODES {
            return;
        }
        let tag = self.next_tag(&format!("{}:down", NAMES[node]));
        let now = self.now;
        let hub = self.host(HUB);
        let session = hub.connect(now, "ops", Front::Nats, false);
        let message = Message {
            to: Target::Node(NAMES[node].into()),
            topic: "valves/3".to_owned(),
            payload: tag.clone().into_bytes(),
            tag,
            qos: 1,
            retain: false,
            headers: retain,
        };
        hub.say(now, session, &message);
    }

    fn write(&mut self, who: Who, space: &str, key: u8, how: How) {
        if who == HUB {
            return;
        }
        let now = self.now;
        let tag = self.next_tag(&format!("{}:state", NAMES[who]));
        let host = self.host(who);
        let key = format!("k{key}");
        let get =
            Command::StateGet { origin: host.name.as_str().into(), space: space.into(), key: key.clone() };
        let Response::Entry(held) = host.ask(now, get) else { panic!("an entry") };
        let (change, expect) = match how {
            How::Set => (StateChange::Put(tag.into()), Expect::Any),
            How::Delete => (StateChange::Delete, Expect::Any),
            How::Compare => {
                let seen = held.map_or(Expect::Absent, |entry| Expect::Revision(entry.revision));
                (StateChange::Put(tag.into()), seen)
            }
        };
        host.command(now, Command::StateWrite(vec![StateOp { space: space.into(), key, change, expect }]));
    }

    fn carry(&mut self, node: Who, way: Way, lane: usize, count: usize) {
        for turn in 0..count {
            for way in ways(way) {
                let lanes: Vec<(usize, Class)> = (self.wires.iter().enumerate())
                    .filter(|(_, wire)| wire.node == node)
                    .flat_map(|(index, wire)| wire.waiting(way).map(move |class| (index, class)))
                    .collect();
                if lanes.is_empty() {
                    continue;
                }
                let (index, class) = lanes[(lane + turn) % lanes.len()];
                self.deliver(index, way, class);
                self.collect();
            }
        }
    }

    fn deliver(&mut self, index: usize, way: usize, class: Class) {
        let wire = &mut self.wires[index];
        let who = if way == UP { HUB } else { wire.node };
        let Some((session, records)) = wire.take(way, class) else { return };
        let seen = wire.note_arrived(way, &records);
        let host = self.hosts[who].as_mut().expect("an end of a wire");
        for barrier in seen.barriers {
            self.oracle.barrier(who, host, barrier);
        }
        self.events += 1;
        host.apply(self.now, Event::LinkReceived { session, records });
    }

    fn dial(&mut self, node: Who) {
        if node == HUB {
            return;
        }
        let now = self.now;
        let name = self.host(node).name.clone();
        let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
        let peer = Peer { name: name.as_str().into(), role: Role::Node, generation: 1 };
        let at_hub = self.host(HUB).open_link(now, peer, false);
        let at_node = self.host(node).open_link(now, hub, true);
        let age = self.ages.get(&node).copied().unwrap_or(Age::Same);
        self.wires.push(Wire::new(node, at_node, at_hub, age));
        self.events += 1;
        self.collect();
    }

    fn cut(&mut self, node: Who) {
        while let Some(index) = self.wires.iter().position(|wire| wire.node == node) {
            self.close_end(index, UP);
            let left = self.wires.iter().position(|wire| wire.node == node && wire.ends[UP].is_none());
            if let Some(index) = left {
                self.close_end(index, DOWN);
            }
        }
    }

    /// One end of a link notices that it is over.
    fn close_end(&mut self, index: usize, way: usize) {
        let wire = &mut self.wires[index];
        let who = if way == UP { HUB } else { wire.node };
        let session = wire.ends[way].take();
        if wire.ends == [None, None] {
            self.wires.remove(index);
        }
        if let Some(session) = session {
            let now = self.now;
            if let Some(host) = self.hosts[who].as_mut() {
                host.apply(now, Event::LinkClosed { session });
            }
            self.events += 1;
        }
    }

    /// Links whose heartbeats went unanswered for long enough.
    fn find_deaf(&mut self) {
        for (way, patience) in [(DOWN, DEAF_AT_NODE), (UP, DEAF_AT_HUB)] {
            let now = self.now;
            let over = |wire: &Wire| {
                wire.ends[way].is_some() && wire.deaf_since.is_some_and(|since| now >= since + patience)
            };
            while let Some(index) = self.wires.iter().position(over) {
                self.close_end(index, way);
            }
        }
        self.collect();
    }

    /// A host goes down and comes back; its peers learn of it.
    fn restart(&mut self, who: Who, how: impl FnOnce(&mut Host, Duration)) {
        let now = self.now;
        how(self.host(who), now);
        self.links_of_are_gone(who);
        if who == HUB {
            self.come_up(HUB);
        }
    }

    fn links_of_are_gone(&mut self, who: Who) {
        let (mine, other) = if who == HUB { (UP, DOWN) } else { (DOWN, UP) };
        for wire in self.wires.iter_mut().filter(|wire| who == HUB || wire.node == who) {
            wire.ends[mine] = None;
        }
        while let Some(index) =
            self.wires.iter().position(|wire| wire.ends[mine].is_none() && (who == HUB || wire.node == who))
        {
            if self.wires[index].ends[other].is_none() {
                self.wires.remove(index);
            } else {
                self.close_end(index, other);
            }
        }
        self.collect();
    }

    /// A host gets another disk.
    fn replace(&mut self, who: Who, copy: Option<&Copy>, mint: bool) {
        let now = self.now;
        let host = self.hosts[who].as_mut().expect("it is there");
        self.oracle.before_disaster(who, host);
        host.replace_disk(now, copy, mint);
        self.links_of_are_gone(who);
        self.oracle.after_disaster(&self.hosts);
        self.come_up(who);
    }

    fn copy_of(&mut self, node: Who, fresh: bool) {
        if node >= NODES || self.hosts[COPY].is_some() {
            return;
        }
        let now = self.now;
        let original = self.host(node);
        let copy = original.disk.copy();
        let mut config = original.config.clone();
        let name = original.name.clone();
        config.seed = config.seed.wrapping_add(7 << 32);
        let mut host = Host::new(config, now);
        // Its lives are none of the original's.
        host.life = 64;
        host.replace_disk(now, Some(&copy), fresh);
        for client in ["sub", "pub-d"] {
            host.clients.entry(client.to_owned()).or_default().fresh = true;
        }
        self.oracle.before_disaster(COPY, &host);
        debug_assert_eq!(host.name, name);
        self.hosts[COPY] = Some(host);
        self.come_up(COPY);
    }

    fn switch_off_copy(&mut self) {
        self.cut(COPY);
        if let Some(host) = self.hosts[COPY].take() {
            self.oracle.before_disaster(COPY, &host);
            self.oracle.after_disaster(&self.hosts);
        }
    }

    /// Takes what hosts have for the world.
    fn collect(&mut self) {
        for who in 0..self.hosts.len() {
            loop {
                self.learn(who);
                let Some(out) = self.hosts[who].as_mut().and_then(|host| host.out.pop_front()) else { break };
                self.note(&(who, &out));
                self.events += 1;
                self.take(who, out);
            }
        }
    }

    fn learn(&mut self, who: Who) {
        let Some(host) = self.hosts[who].as_mut() else { return };
        for news in std::mem::take(&mut host.disk.shadow.news) {
            if let News::EpochChanged { origin, stream } = &news {
                let histories = host.disk.shadow.logs.values();
                let several =
                    histories.filter(|log| log.origin == *origin && log.stream == *stream).count() > 1;
                let subject = format!("{origin}/{stream}");
                let Response::Conditions(held) = host.ask(self.now, Command::Conditions) else {
                    panic!("conditions")
                };
                let told = held.iter().any(|held| held.kind == "EpochChanged" && held.subject == subject);
                rule!(told || !several, "a_change_of_epoch_is_reported", "{subject} at {}", NAMES[who]);
            }
            self.events += 1;
            self.oracle.learn(who, host, news);
        }
    }

    fn take(&mut self, who: Who, out: Out) {
        let host = self.hosts[who].as_ref().expect("it said something");
        match out {
            Out::Send(session, class, records) => {
                let (way, mine) = if who == HUB { (DOWN, UP) } else { (UP, DOWN) };
                let own =
                    |wire: &&mut Wire| wire.ends[mine] == Some(session) && (who == HUB || wire.node == who);
                if let Some(wire) = self.wires.iter_mut().find(own) {
                    wire.send(way, class, records, &host.disk.shadow);
                }
            }
            Out::CloseLink(session) => self.close_link(who, session),
            Out::Acknowledged(tag) => self.oracle.acknowledged(who, host, tag),
            Out::Refused(tag) => self.oracle.refused(tag),
            Out::Repeated(tag) => self.oracle.repeated(tag),
            Out::Delivered { .. } if self.deaf => {}
            Out::Delivered { client, payload, origin, qos, at } => {
                rule!(
                    qos <= 2 && (who == HUB || *origin == *host.name || origin.is_empty()),
                    "a_node_gets_nothing_of_another",
                    "{payload} of {origin:?} at {}",
                    NAMES[who]
                );
                self.oracle.delivered(who, host, &client, &payload, qos, at.as_ref());
            }
            Out::NoResponders => {}
            Out::Watched(watcher, event) => self.oracle.watched(host.life, &watcher, &event),
        }
    }

    fn close_link(&mut self, who: Who, session: SessionId) {
        let mine = if who == HUB { UP } else { DOWN };
        let own = |wire: &Wire| wire.ends[mine] == Some(session) && (who == HUB || wire.node == who);
        let Some(index) = self.wires.iter().position(own) else { return };
        // What was said before the end still arrives, unless the path is broken.
        let node = self.wires[index].node;
        let way = if who == HUB { DOWN } else { UP };
        let classes: Vec<Class> =
            self.wires[index].waiting(way).filter(|class| *class == Class::Control).collect();
        self.close_end(index, mine);
        let left = |wire: &Wire| wire.node == node && wire.ends[mine].is_none() && wire.ends[way].is_some();
        for class in classes {
            while let Some(index) = self.wires.iter().position(left)
                && self.wires[index].waiting(way).any(|waiting| waiting == class)
            {
                self.deliver(index, way, class);
            }
        }
        if let Some(index) = self.wires.iter().position(left)
            && self.wires[index].deaf == [false; 2]
        {
            self.close_end(index, way);
        }
    }

    /// Everything comes back and is left in peace until nothing moves; then the promises are checked.
    fn settle(&mut self) {
        self.switch_off_copy();
        self.ages.clear();
        self.come_to_rest();
        // A hub that lost something is told it again; then an operator accepts what nodes hold back.
        let now = self.now;
        let hub = self.hosts[HUB].as_mut().expect("the hub");
        self.oracle.fleet.list(hub, now);
        self.come_to_rest();
        let now = self.now;
        for node in 0..NODES {
            self.host(HUB).command(now, Fleet::accept(node));
        }
        self.come_to_rest();
        if self.verbose {
            self.hosts.iter().flatten().for_each(|host| eprintln!("{host:#?}"));
        }
        self.check();
    }

    fn come_to_rest(&mut self) {
        let mut quiet = 0;
        for round in 0.. {
            rule!(round < SETTLE_ROUNDS, "the_world_comes_to_rest", "still moving after {round} rounds");
            self.now += SETTLE_ROUND;
            let now = self.now;
            let before = self.events;
            for who in 0..NODES {
                self.host(who).disk.set(Health::Well);
                self.subscriber_of(who);
                if !self.wires.iter().any(|wire| wire.node == who && wire.ends[DOWN].is_some()) {
                    self.dial(who);
                }
            }
            self.host(HUB).disk.set(Health::Well);
            self.carry_all();
            for host in self.hosts.iter_mut().flatten() {
                host.sync(now, usize::MAX);
                host.tick(now);
                host.read(now, "sub", usize::MAX);
            }
            self.collect();
            self.find_deaf();
            quiet = if self.events == before && self.is_at_rest() { quiet + 1 } else { 0 };
            if quiet == QUIET_ROUNDS {
                return;
            }
        }
    }

    fn carry_all(&mut self) {
        while let Some((index, way, class)) = self.wires.iter().enumerate().find_map(|(index, wire)| {
            [UP, DOWN].into_iter().find_map(|way| Some((index, way, wire.waiting(way).next()?)))
        }) {
            self.deliver(index, way, class);
            self.collect();
        }
    }

    fn is_at_rest(&mut self) -> bool {
        let Response::Stats(stats) = ({
            let now = self.now;
            self.host(HUB).ask(now, Command::Stats)
        }) else {
            panic!("stats")
        };
        self.wires.iter().all(Wire::is_idle)
            && stats.links == NODES as u64
            && self.hosts.iter().flatten().all(|host| host.unsynced() == 0)
    }

    fn check(&mut self) {
        for node in 0..NODES {
            let (at, hub) =
                (self.hosts[node].as_ref().expect("a node"), self.hosts[HUB].as_ref().expect("the hub"));
            self.oracle.settled(node, at, hub);
            self.oracle.fleet.check(node, at, hub);
            for space in WATCHED {
                let here = at.disk.shadow.live(&at.name, space);
                let there = hub.disk.shadow.live(&at.name, space);
                rule!(here == there, "state_converges", "{space} of {}: {here:?}, {there:?}", at.name);
            }
        }
        for node in 0..NODES {
            for space in WATCHED {
                self.check_readers(node, space);
            }
            self.check_reads(node);
        }
    }

    /// What lists and watchers at the hub show is what stands on its disk.
    fn check_readers(&mut self, node: Who, space: &str) {
        let now = self.now;
        let list = Command::StateList {
            origin: NAMES[node].into(),
            space: space.into(),
            prefix: String::new(),
            after: None,
            limit: 1000,
            at: None,
        };
        let Response::Entries { entries, .. } = self.host(HUB).ask(now, list) else { panic!("entries") };
        let listed: BTreeMap<&str, (u64, u64)> =
            entries.iter().map(|entry| (entry.key.as_str(), (entry.incarnation, entry.revision))).collect();
        let stands = self.hosts[HUB].as_ref().expect("the hub").disk.shadow.live(NAMES[node], space);
        let stands: BTreeMap<&str, (u64, u64)> =
            stands.into_iter().map(|(key, (pair, _))| (key, pair)).collect();
        rule!(
            listed == stands,
            "a_list_is_what_is_there",
            "{space} of {}: {listed:?}, {stands:?}",
            NAMES[node]
        );
        let watcher = format!("watch-{}/{space}", NAMES[node]);
        let mirror = self.oracle.mirror(&watcher);
        // A watch of a space that is not there yet is refused; nothing is promised to it.
        let session =
            self.hosts[HUB].as_ref().expect("the hub").clients.get(&watcher).and_then(|held| held.session);
        if session.is_some() && !mirror.is_empty() {
            rule!(mirror == stands, "a_watcher_converges", "{watcher}: {mirror:?}, {stands:?}");
        }
    }

    /// What the hub reads of a node's Logs is what its disk was given.
    fn check_reads(&mut self, node: Who) {
        let now = self.now;
        let list = Command::LogList { origin: Some(NAMES[node].into()) };
        let Response::Logs(logs) = self.host(HUB).ask(now, list) else { panic!("a list of Logs") };
        for log in logs {
            let hub = self.hosts[HUB].as_ref().expect("the hub");
            let Some((_, current)) = hub.disk.shadow.log(NAMES[node], &log.stream) else { continue };
            if current.epoch() != log.epoch || current.next != log.next {
                continue;
            }
            let stands: Vec<String> = current.messages().map(|(_, tag)| tag.to_owned()).collect();
            let read = Command::LogRead {
                origin: log.origin.clone(),
                stream: log.stream.clone(),
                epoch: None,
                from: log.first,
                bytes_max: usize::MAX >> 8,
            };
            let Response::Records { records, .. } = self.host(HUB).ask(now, read) else { panic!("records") };
            let found: Vec<String> = records
                .iter()
                .filter(|record| record.header.kind == codec::Kind::LOG)
                .map(|record| {
                    let view = codec::FrameView::parse(&record.body).expect("a frame");
                    crate::shadow::tag_of(view.payload())
                })
                .collect();
            rule!(found == stands, "a_read_is_what_is_there", "{}: {found:?}, {stands:?}", log.stream);
        }
    }
}

fn ways(way: Way) -> impl Iterator<Item = usize> {
    let chosen: &[usize] = match way {
        Way::Up => &[UP],
        Way::Down => &[DOWN],
        Way::Both => &[UP, DOWN],
    };
    chosen.iter().copied()
}

fn alarms() -> StreamConfig {
    StreamConfig {
        name: "alarms".into(),
        filters: vec![Filter::parse("alarm/#").expect("a valid filter")],
        class: Class::Alarm,
        policy: Policy::of_class(Class::Alarm, 64 << 20),
    }
}
