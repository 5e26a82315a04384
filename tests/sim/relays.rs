//! Relays: nodes that others link to, between them and the hub. Each rule with nothing left to chance.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use broker::core::{
    Config,
    event::{
        Command, Condition, Event, Expect, Front, OriginFilter, Peer, Publish, Response, Role, SessionId,
        StateOp, Target,
    },
};
use codec::{Class, Flags, Kind, Record, RecordHeader, frame::FrameParts, proto};

use crate::host::{Host, Out, Say};

const SECOND: Duration = Duration::from_secs(1);

/// Hosts by name, and the links between them. Whatever is sent arrives when the test lets it.
struct Fleet {
    now: Duration,
    hosts: BTreeMap<&'static str, Host>,
    wires: Vec<Wire>,
    seen: Vec<(&'static str, Out)>,
}

struct Wire {
    below: (&'static str, SessionId),
    above: (&'static str, SessionId),
}

impl Wire {
    fn other(&self, host: &str, session: SessionId) -> Option<(&'static str, SessionId)> {
        let is = |end: (&str, SessionId)| end.0 == host && end.1 == session;
        if is(self.below) { Some(self.above) } else { is(self.above).then_some(self.below) }
    }
}

fn node(name: &str, seed: u8) -> Config {
    Config::node(name, [seed; 16], u64::from(seed))
}

fn relay(name: &str, seed: u8) -> Config {
    Config { relay: true, ..node(name, seed) }
}

impl Fleet {
    /// A hub, relay gw-1 that may forward for pump-1 and pump-2, and these.
    fn new() -> Self {
        let mut fleet = Self { now: SECOND, hosts: BTreeMap::new(), wires: Vec::new(), seen: Vec::new() };
        fleet.add("hub", Config::hub("hub", "tier", [9; 16], 12));
        fleet.add("gw-1", relay("gw-1", 1));
        fleet.add("gw-2", relay("gw-2", 2));
        fleet.add("pump-1", node("pump-1", 3));
        fleet.add("pump-2", node("pump-2", 4));
        for name in ["gw-2", "pump-1", "pump-2"] {
            fleet.enrol(name, &[]);
        }
        fleet.enrol("gw-1", &["pump-1", "pump-2"]);
        fleet
    }

    fn add(&mut self, name: &'static str, config: Config) {
        self.hosts.insert(name, Host::new(config, self.now));
    }

    fn host(&mut self, name: &str) -> &mut Host {
        self.hosts.get_mut(name).expect("a host of the fleet")
    }

    fn enrol(&mut self, name: &str, forwards: &[&str]) {
        let value = format!(r#"{{"generation":1,"key":"k","forwards":{forwards:?}}}"#);
        let op = StateOp {
            space: "sys".into(),
            key: format!("identity/{name}"),
            change: broker::core::event::StateChange::Put(value.into()),
            expect: Expect::Any,
        };
        let now = self.now;
        self.host("hub").command(now, Command::StateWrite(vec![op]));
        self.quiet();
    }

    /// `below` dials `above`. Nothing is carried yet.
    fn dial(&mut self, below: &'static str, above: &'static str) {
        let now = self.now;
        let from = Peer { name: below.into(), role: Role::Node, generation: 1 };
        let role = if above == "hub" { Role::Hub } else { Role::Node };
        let to = Peer { name: above.into(), role, generation: u32::from(role == Role::Node) };
        let at_above = self.host(above).open_link(now, from, false);
        let at_below = self.host(below).open_link(now, to, true);
        self.wires.push(Wire { below: (below, at_below), above: (above, at_above) });
    }

    fn link(&mut self, below: &'static str, above: &'static str) {
        self.dial(below, above);
        self.quiet();
    }

    fn linked(links: &[(&'static str, &'static str)]) -> Self {
        let mut fleet = Self::new();
        for (below, above) in links {
            fleet.link(below, above);
        }
        fleet
    }

    fn session(&self, below: &str, above: &str) -> (SessionId, SessionId) {
        let wire = self.wires.iter().find(|wire| wire.below.0 == below && wire.above.0 == above);
        let wire = wire.expect("a link that is up");
        (wire.below.1, wire.above.1)
    }

    fn is_linked(&self, below: &str, above: &str) -> bool {
        self.wires.iter().any(|wire| wire.below.0 == below && wire.above.0 == above)
    }

    /// The link between two ends; both learn of it.
    fn cut(&mut self, below: &str, above: &str) {
        self.cut_where(|wire| wire.below.0 == below && wire.above.0 == above);
    }

    fn cut_where(&mut self, which: impl Fn(&Wire) -> bool) {
        let now = self.now;
        let (dead, alive): (Vec<Wire>, Vec<Wire>) =
            std::mem::take(&mut self.wires).into_iter().partition(|wire| which(wire));
        self.wires = alive;
        for wire in dead {
            for (host, session) in [wire.below, wire.above] {
                self.host(host).apply(now, Event::LinkClosed { session });
            }
        }
    }

    /// Its process dies and starts again; what was not synced is gone.
    fn crash(&mut self, name: &str) {
        let now = self.now;
        let (dead, alive): (Vec<Wire>, Vec<Wire>) = std::mem::take(&mut self.wires)
            .into_iter()
            .partition(|wire| wire.below.0 == name || wire.above.0 == name);
        self.wires = alive;
        self.host(name).crash(now);
        for wire in dead {
            for (host, session) in [wire.below, wire.above] {
                if host != name {
                    self.host(host).apply(now, Event::LinkClosed { session });
                }
            }
        }
    }

    /// Everything durable, everything delivered, until nothing moves; at most so many rounds.
    fn rounds(&mut self, rounds: usize) {
        let now = self.now;
        for _ in 0..rounds {
            for host in self.hosts.values_mut() {
                host.tick(now);
                host.sync(now, usize::MAX);
            }
            self.carry();
        }
    }

    fn quiet(&mut self) {
        self.rounds(40);
    }

    /// Time passes, so that marks reach the disk.
    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.quiet();
    }

    fn carry(&mut self) {
        let now = self.now;
        let names: Vec<&'static str> = self.hosts.keys().copied().collect();
        for name in names {
            while let Some(out) = self.host(name).out.pop_front() {
                match out {
                    Out::Send(session, _, records) => {
                        let to = self.wires.iter().find_map(|wire| wire.other(name, session));
                        if let Some((host, session)) = to {
                            self.host(host).apply(now, Event::LinkReceived { session, records });
                        }
                    }
                    Out::CloseLink(session) => {
                        self.cut_where(|wire| wire.other(name, session).is_some());
                        self.seen.push((name, Out::CloseLink(session)));
                    }
                    out => self.seen.push((name, out)),
                }
            }
        }
    }

    fn publish(&mut self, at: &'static str, tag: &str, retain: bool) {
        let now = self.now;
        let host = self.host(at);
        let session = host.connect(now, "pub", Front::Mqtt, true);
        host.publish(now, session, &Say { to: &Target::Own, topic: "a/b", tag, qos: 1, retain });
    }

    fn send_down(&mut self, to: &str, tag: &str) {
        let now = self.now;
        let hub = self.host("hub");
        let session = hub.connect(now, "ops", Front::Nats, false);
        let to = Target::Node(to.into());
        hub.publish(now, session, &Say { to: &to, topic: "valves/3", tag, qos: 1, retain: false });
    }

    fn subscribe(&mut self, at: &'static str, filter: &str, qos: u8) {
        let now = self.now;
        let hub = at == "hub";
        let origin = if hub { OriginFilter::AnyNode } else { OriginFilter::Own };
        let host = self.host(at);
        let front = if hub { Front::Nats } else { Front::Mqtt };
        let session = host.connect(now, "sub", front, !hub);
        host.subscribe(now, session, origin, filter, qos);
    }

    /// A request from a client of the hub; its answer comes as a delivery.
    fn request(&mut self, to: &str) {
        let now = self.now;
        let hub = self.host("hub");
        let session = hub.connect(now, "asker", Front::Nats, false);
        hub.subscribe(now, session, OriginFilter::Own, "_INBOX/asker", 0);
        let frame = FrameParts { topic: "valves/3", payload: b"state?", ..FrameParts::default() }.encode();
        let message = Publish {
            target: Target::Node(to.into()),
            frame,
            qos: 0,
            packet_id: 0,
            dup: false,
            retain: false,
            reply: Some("_INBOX/asker".into()),
        };
        hub.apply(now, Event::Published { session, messages: vec![message] });
    }

    /// Payloads in a node's Logs as a host holds them, every history of them.
    fn log_at(&mut self, host: &str, origin: &str) -> Vec<String> {
        let found = self.records_at(host, origin);
        found.iter().filter(|record| record.header.kind == Kind::LOG).map(payload).collect()
    }

    fn records_at(&mut self, host: &str, origin: &str) -> Vec<Record> {
        let now = self.now;
        let host = self.host(host);
        let Response::Logs(logs) = host.ask(now, Command::LogList { origin: Some(origin.into()) }) else {
            panic!("a list")
        };
        let mut found = Vec::new();
        for log in logs {
            let read = Command::LogRead {
                origin: log.origin,
                stream: log.stream,
                epoch: Some(log.epoch),
                from: log.first,
                bytes_max: 1 << 30,
            };
            let Response::Records { records, .. } = host.ask(now, read) else { panic!("records") };
            found.extend(records);
        }
        found
    }

    fn retained_at(&mut self, host: &str, origin: &str) -> Vec<String> {
        let now = self.now;
        let list = Command::StateList {
            origin: origin.into(),
            space: "retained".into(),
            prefix: String::new(),
            after: None,
            limit: 100,
            at: None,
        };
        match self.host(host).ask(now, list) {
            Response::Entries { entries, .. } => {
                entries.iter().map(|entry| String::from_utf8_lossy(&entry.value()).into_owned()).collect()
            }
            other => panic!("entries, not {other:?}"),
        }
    }

    fn conditions(&mut self, host: &str) -> Vec<Condition> {
        let now = self.now;
        match self.host(host).ask(now, Command::Conditions) {
            Response::Conditions(conditions) => conditions,
            other => panic!("conditions, not {other:?}"),
        }
    }

    fn has_condition(&mut self, host: &str, kind: &str) -> bool {
        self.conditions(host).iter().any(|held| held.kind == kind)
    }

    fn stats(&mut self, host: &str) -> broker::core::Stats {
        let now = self.now;
        match self.host(host).ask(now, Command::Stats) {
            Response::Stats(stats) => *stats,
            other => panic!("stats, not {other:?}"),
        }
    }

    fn delivered(&self, at: &str) -> Vec<&str> {
        self.seen
            .iter()
            .filter_map(|(host, out)| match out {
                Out::Delivered { payload, .. } if *host == at => Some(payload.as_str()),
                _ => None,
            })
            .collect()
    }

    fn no_responders(&self, at: &str) -> usize {
        self.seen.iter().filter(|(host, out)| *host == at && matches!(out, Out::NoResponders)).count()
    }

    fn is_online(&mut self, node: &str) -> bool {
        let now = self.now;
        match self.host("hub").ask(now, Command::Sessions) {
            Response::Sessions(sessions) => sessions.iter().any(|session| {
                matches!(session.kind, "link" | "relayed") && *session.name == *node && session.established
            }),
            other => panic!("sessions, not {other:?}"),
        }
    }
}

fn payload(record: &Record) -> String {
    let view = codec::FrameView::parse(&record.body).expect("a frame");
    String::from_utf8_lossy(view.payload()).into_owned()
}

fn tags(node: &str, numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("{node}:x#{number}")).collect()
}

fn record(kind: Kind, seq: u64, body: bytes::Bytes) -> Record {
    let header = RecordHeader {
        kind,
        class: Class::Event as u8,
        flags: Flags::default(),
        source: 77,
        epoch: 5,
        seq,
        aux: 0,
    };
    Record { header, body }
}

fn declare(origin: &str, kind: u32, name: &str) -> Record {
    let body = codec::encode(&proto::Declare { origin: origin.into(), kind, name: name.into(), class: 3 });
    record(Kind::DECLARE, 0, body)
}

#[test]
fn what_a_node_behind_a_relay_publishes_stands_at_the_hub_with_its_origin_and_position() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.subscribe("hub", "#", 0);
    for number in 1..=3 {
        fleet.publish("pump-1", &format!("pump-1:x#{number}"), false);
    }
    fleet.quiet();
    assert_eq!(fleet.delivered("hub"), tags("pump-1", 1..=3));
    let position = |record: &Record| (record.header.epoch, record.header.seq, record.body.clone());
    let at_node: Vec<_> = fleet.records_at("pump-1", "pump-1").iter().map(position).collect();
    let at_hub: Vec<_> = fleet.records_at("hub", "pump-1").iter().map(position).collect();
    assert_eq!(at_node, at_hub);
    assert!(fleet.log_at("hub", "gw-1").is_empty(), "the relay's own Logs are no part of it");
}

#[test]
fn a_relay_keeps_for_the_hub_what_it_acknowledged_to_a_node() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.cut("gw-1", "hub");
    for number in 1..=3 {
        fleet.publish("pump-1", &format!("pump-1:x#{number}"), true);
    }
    fleet.quiet();
    // The node is gone for good, and the relay's process dies too.
    fleet.cut("pump-1", "gw-1");
    fleet.crash("gw-1");
    fleet.link("gw-1", "hub");
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=3));
    assert_eq!(fleet.retained_at("hub", "pump-1"), ["pump-1:x#3"]);
    assert!(!fleet.is_online("pump-1"));
}

#[test]
fn a_relay_that_dies_in_the_middle_loses_and_repeats_nothing() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.subscribe("hub", "#", 0);
    for number in 1..=60 {
        fleet.publish("pump-1", &format!("pump-1:x#{number}"), false);
        fleet.rounds(1 + number as usize % 2);
        if number % 7 == 0 {
            fleet.crash("gw-1");
            fleet.dial("pump-1", "gw-1");
            fleet.dial("gw-1", "hub");
        }
    }
    fleet.quiet();
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=60));
    assert_eq!(fleet.delivered("hub"), tags("pump-1", 1..=60));
}

#[test]
fn a_down_message_reaches_a_node_behind_a_relay_once_and_nobody_else() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1"), ("pump-2", "gw-1")]);
    for at in ["gw-1", "pump-1", "pump-2"] {
        fleet.subscribe(at, "#", 1);
    }
    fleet.send_down("pump-1", "open");
    fleet.quiet();
    fleet.crash("gw-1");
    fleet.link("gw-1", "hub");
    fleet.link("pump-1", "gw-1");
    fleet.link("pump-2", "gw-1");
    assert_eq!(fleet.delivered("pump-1"), ["open"]);
    assert!(fleet.delivered("pump-2").is_empty() && fleet.delivered("gw-1").is_empty());
    assert!(fleet.log_at("hub", "pump-1").is_empty(), "what came down went up again");
}

#[test]
fn a_down_message_waits_for_a_node_that_is_away_and_comes_by_whatever_path() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.subscribe("pump-1", "#", 1);
    fleet.send_down("pump-1", "one");
    fleet.quiet();
    fleet.cut("pump-1", "gw-1");
    fleet.send_down("pump-1", "two");
    fleet.quiet();
    fleet.link("pump-1", "hub");
    assert_eq!(fleet.delivered("pump-1"), ["one", "two"]);
    fleet.cut("pump-1", "hub");
    fleet.send_down("pump-1", "three");
    fleet.link("pump-1", "gw-1");
    assert_eq!(fleet.delivered("pump-1"), ["one", "two", "three"]);
}

#[test]
fn a_request_goes_through_relays_and_its_answer_comes_back() {
    let mut fleet = Fleet::new();
    fleet.enrol("gw-1", &["gw-2"]);
    fleet.enrol("gw-2", &["pump-1"]);
    for (below, above) in [("gw-1", "hub"), ("gw-2", "gw-1"), ("pump-1", "gw-2")] {
        fleet.link(below, above);
    }
    let now = fleet.now;
    let pump = fleet.host("pump-1");
    let session = pump.connect(now, "responder", Front::Nats, false);
    pump.subscribe(now, session, OriginFilter::Own, "valves/#", 0);
    pump.answer_requests(session, "shut");
    fleet.request("pump-1");
    fleet.quiet();
    assert_eq!(fleet.delivered("hub"), ["shut"]);
}

#[test]
fn a_request_is_told_node_offline_at_once_wherever_the_path_is_broken() {
    // Nobody behind the relay; then a path that breaks while the request waits, at either hop.
    let mut fleet = Fleet::linked(&[("gw-1", "hub")]);
    fleet.request("pump-1");
    fleet.rounds(1);
    assert_eq!(fleet.no_responders("hub"), 1);
    for (below, above) in [("pump-1", "gw-1"), ("gw-1", "hub")] {
        let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
        let now = fleet.now;
        let pump = fleet.host("pump-1");
        let session = pump.connect(now, "silent", Front::Nats, false);
        pump.subscribe(now, session, OriginFilter::Own, "valves/#", 0);
        fleet.request("pump-1");
        fleet.quiet();
        assert_eq!(fleet.no_responders("hub"), 0, "the answer is still to come");
        fleet.cut(below, above);
        fleet.rounds(3);
        assert_eq!(fleet.no_responders("hub"), 1, "{below} was cut off from {above}");
    }
}

#[test]
fn state_and_its_barrier_pass_through_a_relay() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.publish("pump-1", "pump-1:x#1", true);
    fleet.quiet();
    assert_eq!(fleet.retained_at("hub", "pump-1"), ["pump-1:x#1"]);
    // The node's disk is lost; until it has said so through the relay, nothing is removed.
    fleet.cut("pump-1", "gw-1");
    fleet.quiet();
    fleet.add("pump-1", node("pump-1", 33));
    fleet.pass(61 * SECOND);
    assert_eq!(fleet.retained_at("hub", "pump-1"), ["pump-1:x#1"]);
    fleet.link("pump-1", "gw-1");
    assert_eq!(fleet.retained_at("gw-1", "pump-1"), Vec::<String>::new());
    assert_eq!(fleet.retained_at("hub", "pump-1"), Vec::<String>::new());
}

#[test]
fn a_barrier_that_came_while_the_hub_was_away_still_reaches_it() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.publish("pump-1", "pump-1:x#1", true);
    fleet.quiet();
    fleet.cut("gw-1", "hub");
    fleet.cut("pump-1", "gw-1");
    fleet.quiet();
    fleet.add("pump-1", node("pump-1", 33));
    fleet.pass(61 * SECOND);
    fleet.link("pump-1", "gw-1");
    fleet.cut("pump-1", "gw-1");
    fleet.link("gw-1", "hub");
    assert_eq!(fleet.retained_at("hub", "pump-1"), Vec::<String>::new());
}

#[test]
fn a_node_that_moves_between_relays_and_the_hub_goes_on_where_the_hub_stands() {
    let mut fleet = Fleet::new();
    fleet.enrol("gw-2", &["pump-1"]);
    for (below, above) in [("gw-1", "hub"), ("gw-2", "hub")] {
        fleet.link(below, above);
    }
    fleet.subscribe("hub", "#", 0);
    let mut number = 0;
    for above in ["gw-1", "hub", "gw-2", "gw-1", "gw-2", "hub"] {
        // The older path is not closed by the node: it is half open until it is fenced.
        fleet.link("pump-1", above);
        for _ in 0..3 {
            number += 1;
            fleet.publish("pump-1", &format!("pump-1:x#{number}"), true);
            fleet.rounds(1);
        }
        fleet.quiet();
        assert_eq!(fleet.wires.iter().filter(|wire| wire.below.0 == "pump-1").count(), 1, "after {above}");
        assert!(fleet.is_linked("pump-1", above) && fleet.is_online("pump-1"));
    }
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=number));
    assert_eq!(fleet.delivered("hub"), tags("pump-1", 1..=number));
    assert_eq!(fleet.retained_at("hub", "pump-1"), [format!("pump-1:x#{number}")]);
}

#[test]
fn two_relays_that_bring_the_same_node_repeat_nothing_and_the_newer_path_holds_the_name() {
    let mut fleet = Fleet::new();
    fleet.enrol("gw-2", &["pump-1"]);
    fleet.link("gw-1", "hub");
    fleet.link("gw-2", "hub");
    fleet.cut("gw-1", "hub");
    fleet.cut("gw-2", "hub");
    // Both take the same records while neither sees the hub; the node is at the second one now.
    fleet.link("pump-1", "gw-1");
    fleet.publish("pump-1", "pump-1:x#1", false);
    fleet.quiet();
    fleet.pass(SECOND);
    fleet.link("pump-1", "gw-2");
    fleet.publish("pump-1", "pump-1:x#2", false);
    fleet.quiet();
    fleet.link("gw-2", "hub");
    fleet.link("gw-1", "hub");
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=2));
    assert!(fleet.is_linked("pump-1", "gw-2"), "the newer path was fenced by the older");
    assert!(!fleet.is_linked("pump-1", "gw-1"), "the older path still stands");
    fleet.publish("pump-1", "pump-1:x#3", false);
    fleet.quiet();
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=3));
}

#[test]
fn a_second_machine_of_one_name_behind_another_relay_is_refused_and_named() {
    let mut fleet = Fleet::new();
    fleet.enrol("gw-2", &["pump-1"]);
    fleet.link("gw-1", "hub");
    fleet.link("gw-2", "hub");
    fleet.link("pump-1", "gw-1");
    fleet.add("copy", node("pump-1", 44));
    let now = fleet.now;
    let at_above = fleet.host("gw-2").open_link(
        now,
        Peer { name: "pump-1".into(), role: Role::Node, generation: 1 },
        false,
    );
    let to = Peer { name: "gw-2".into(), role: Role::Node, generation: 1 };
    let at_below = fleet.host("copy").open_link(now, to, true);
    fleet.wires.push(Wire { below: ("copy", at_below), above: ("gw-2", at_above) });
    fleet.quiet();
    assert!(fleet.is_linked("pump-1", "gw-1"), "the holder was disturbed");
    assert!(!fleet.is_linked("copy", "gw-2"));
    assert!(fleet.has_condition("hub", "DuplicateIdentity"));
    assert!(fleet.has_condition("copy", "DuplicateIdentity"));
}

#[test]
fn a_relay_admits_its_nodes_without_the_hub_once_it_was_told_who_they_are() {
    let mut fleet = Fleet::new();
    fleet.link("pump-1", "gw-1");
    assert!(!fleet.is_linked("pump-1", "gw-1"), "nobody has told the relay yet");
    fleet.link("gw-1", "hub");
    fleet.cut("gw-1", "hub");
    fleet.crash("gw-1");
    fleet.link("pump-1", "gw-1");
    fleet.publish("pump-1", "pump-1:x#1", false);
    fleet.quiet();
    assert_eq!(fleet.log_at("gw-1", "pump-1"), tags("pump-1", 1..=1));
}

#[test]
fn a_relay_is_told_of_whom_it_may_forward_for_while_it_is_linked() {
    let mut fleet = Fleet::linked(&[("gw-2", "hub")]);
    fleet.enrol("gw-2", &["pump-3"]);
    fleet.add("pump-3", node("pump-3", 5));
    fleet.link("pump-3", "gw-2");
    assert!(!fleet.is_linked("pump-3", "gw-2"), "nobody has enrolled it");
    fleet.enrol("pump-3", &[]);
    fleet.link("pump-3", "gw-2");
    fleet.publish("pump-3", "pump-3:x#1", false);
    fleet.quiet();
    assert_eq!(fleet.log_at("hub", "pump-3"), tags("pump-3", 1..=1));
    // And it may not any more.
    fleet.enrol("gw-2", &[]);
    assert!(!fleet.is_linked("gw-2", "hub"), "it has spoken for a node that is not its own any more");
    fleet.link("gw-2", "hub");
    assert!(!fleet.is_linked("pump-3", "gw-2"));
    assert!(fleet.is_linked("gw-2", "hub"));
}

#[test]
fn a_plain_node_lets_nobody_link() {
    let mut fleet = Fleet::new();
    fleet.link("pump-1", "pump-2");
    assert!(!fleet.is_linked("pump-1", "pump-2"));
}

#[test]
fn a_relay_that_forwards_an_origin_it_may_not_is_closed() {
    for (origin, kind, name) in [
        ("gw-2", 2, "default"),
        ("gw-2", 1, ""),
        ("gw-2", 3, "retained"),
        ("", 2, "down/pump-1"),
        ("", 3, "sys"),
    ] {
        let mut fleet = Fleet::linked(&[("gw-1", "hub")]);
        let (_, session) = fleet.session("gw-1", "hub");
        let now = fleet.now;
        fleet
            .host("hub")
            .apply(now, Event::LinkReceived { session, records: vec![declare(origin, kind, name)] });
        fleet.quiet();
        assert!(!fleet.is_linked("gw-1", "hub"), "{origin:?} {kind} {name:?} was let in");
        assert!(fleet.has_condition("hub", "NotAuthorized"));
    }
}

#[test]
fn a_relay_that_reports_a_node_it_may_not_is_closed() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("gw-2", "hub")]);
    let (_, session) = fleet.session("gw-1", "hub");
    let present = proto::Present {
        name: "gw-2".into(),
        linked: true,
        instance: vec![7; 16].into(),
        generation: 1,
        claim: u64::MAX,
        via: vec!["gw-1".into()],
    };
    let message = proto::control::Message::Presence(proto::Presence { nodes: vec![present] });
    let body = codec::encode(&proto::Control { message: Some(message) });
    let now = fleet.now;
    let records = vec![record(Kind::CONTROL, 0, body)];
    fleet.host("hub").apply(now, Event::LinkReceived { session, records });
    fleet.quiet();
    assert!(!fleet.is_linked("gw-1", "hub"));
    assert!(fleet.is_linked("gw-2", "hub"), "whom it named was thrown out");
}

#[test]
fn a_node_behind_a_relay_speaks_of_no_origin_but_its_own() {
    for (origin, kind, name) in
        [("pump-2", 2, "default"), ("gw-1", 2, "default"), ("pump-2", 1, ""), ("", 3, "fleet")]
    {
        let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1"), ("pump-2", "gw-1")]);
        let (_, session) = fleet.session("pump-1", "gw-1");
        let now = fleet.now;
        fleet
            .host("gw-1")
            .apply(now, Event::LinkReceived { session, records: vec![declare(origin, kind, name)] });
        fleet.quiet();
        assert!(!fleet.is_linked("pump-1", "gw-1"), "{origin:?} {kind} {name:?} was let in");
        assert!(fleet.is_linked("gw-1", "hub") && fleet.is_linked("pump-2", "gw-1"), "others were disturbed");
    }
}

#[test]
fn relays_that_dial_each_other_do_not_echo_and_do_not_grow() {
    let mut fleet = Fleet::new();
    // The worst that could be configured: each may forward for the other, and for the same node.
    fleet.enrol("gw-1", &["gw-2", "pump-1"]);
    fleet.enrol("gw-2", &["gw-1", "pump-1"]);
    fleet.link("gw-1", "hub");
    fleet.link("gw-2", "hub");
    fleet.link("pump-1", "gw-1");
    for _ in 0..3 {
        fleet.dial("gw-1", "gw-2");
        fleet.dial("gw-2", "gw-1");
        fleet.publish("pump-1", "x", true);
        fleet.publish("gw-1", "x", true);
        fleet.publish("gw-2", "x", true);
        fleet.pass(SECOND);
    }
    let said = |fleet: &mut Fleet, name| {
        fleet.has_condition(name, "RelayLoop") || fleet.has_condition(name, "LinkRefused")
    };
    assert!(said(&mut fleet, "gw-1") || said(&mut fleet, "gw-2"), "nobody says what is wrong");
    // A node dials one broker at a time; in the end each relay dials the hub again.
    fleet.link("gw-1", "hub");
    fleet.link("gw-2", "hub");
    fleet.pass(SECOND);
    let counts: Vec<u64> = fleet_counts(&mut fleet);
    fleet.pass(SECOND);
    fleet.pass(SECOND);
    assert_eq!(fleet_counts(&mut fleet), counts, "something still goes round");
    for origin in ["pump-1", "gw-1", "gw-2"] {
        assert_eq!(fleet.log_at("hub", origin).len(), 3, "{origin}");
    }
}

fn fleet_counts(fleet: &mut Fleet) -> Vec<u64> {
    ["hub", "gw-1", "gw-2", "pump-1"].map(|host| fleet.stats(host).link_records_out).to_vec()
}

#[test]
fn a_change_of_epoch_passes_through_a_relay_in_its_place() {
    change_of_epoch(|_fleet| {});
}

#[test]
fn a_relay_that_restarted_passes_a_second_history_on_from_its_disk() {
    change_of_epoch(|fleet| fleet.crash("gw-1"));
}

/// A node is rolled back while the relay in front of the hub is alone with its histories.
fn change_of_epoch(before_the_hub_is_back: impl FnOnce(&mut Fleet)) {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.publish("pump-1", "pump-1:x#1", false);
    fleet.quiet();
    // The mark reaches the node's disk.
    fleet.pass(2 * SECOND);
    let now = fleet.now;
    let snapshot = fleet.host("pump-1").snapshot(now);
    // While the hub is away the node goes on, and is then rolled back.
    fleet.cut("gw-1", "hub");
    fleet.publish("pump-1", "pump-1:x#2", false);
    fleet.publish("pump-1", "pump-1:x#3", false);
    fleet.quiet();
    fleet.cut("pump-1", "gw-1");
    fleet.hosts.insert("pump-1", snapshot);
    fleet.publish("pump-1", "pump-1:x#other", false);
    fleet.quiet();
    fleet.link("pump-1", "gw-1");
    before_the_hub_is_back(&mut fleet);
    fleet.link("gw-1", "hub");
    let at_hub = fleet.log_at("hub", "pump-1");
    for tag in ["pump-1:x#1", "pump-1:x#2", "pump-1:x#3", "pump-1:x#other"] {
        assert_eq!(at_hub.iter().filter(|held| *held == tag).count(), 1, "{tag} in {at_hub:?}");
    }
    let epochs: Vec<u64> =
        fleet.records_at("hub", "pump-1").iter().map(|record| record.header.epoch).collect();
    assert!(epochs.windows(2).filter(|pair| pair[0] != pair[1]).count() == 1, "one change: {epochs:x?}");
    assert!(fleet.has_condition("hub", "EpochChanged"));
}

#[test]
fn a_wiped_relay_gets_again_what_the_hub_already_has_and_sends_only_what_is_new() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.subscribe("hub", "#", 0);
    for number in 1..=3 {
        fleet.publish("pump-1", &format!("pump-1:x#{number}"), false);
    }
    fleet.quiet();
    fleet.cut("pump-1", "gw-1");
    fleet.cut("gw-1", "hub");
    fleet.add("gw-1", relay("gw-1", 7));
    fleet.pass(61 * SECOND);
    fleet.link("gw-1", "hub");
    fleet.link("pump-1", "gw-1");
    fleet.publish("pump-1", "pump-1:x#4", false);
    fleet.quiet();
    assert_eq!(fleet.log_at("hub", "pump-1"), tags("pump-1", 1..=4));
    assert_eq!(fleet.delivered("hub"), tags("pump-1", 1..=4));
}

#[test]
fn a_full_relay_makes_its_node_wait_and_drops_nothing() {
    let mut fleet = Fleet::new();
    let mut config = relay("gw-1", 1);
    config.default_stream.policy.bytes_max = 4_000;
    fleet.add("gw-1", config);
    fleet.link("gw-1", "hub");
    fleet.link("pump-1", "gw-1");
    fleet.cut("gw-1", "hub");
    let filler = "x".repeat(200);
    for number in 1..=100 {
        fleet.publish("pump-1", &format!("pump-1:{filler}#{number}"), false);
        fleet.rounds(2);
    }
    fleet.quiet();
    let held = fleet.log_at("gw-1", "pump-1").len();
    assert!((10..60).contains(&held), "the relay took {held} of 100");
    fleet.link("gw-1", "hub");
    fleet.pass(SECOND);
    assert_eq!(fleet.log_at("hub", "pump-1").len(), 100);
    let kinds = fleet.records_at("hub", "pump-1");
    assert!(kinds.iter().all(|record| record.header.kind == Kind::LOG), "something was dropped");
}

#[test]
fn live_messages_pass_upward_by_the_path_that_holds_the_name_alone() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    fleet.subscribe("hub", "#", 0);
    let now = fleet.now;
    let publish = |fleet: &mut Fleet, tag: &str| {
        let pump = fleet.host("pump-1");
        let session = pump.connect(now, "pub", Front::Mqtt, true);
        pump.publish(now, session, &Say { to: &Target::Own, topic: "a/b", tag, qos: 0, retain: false });
        fleet.quiet();
    };
    publish(&mut fleet, "by relay");
    fleet.link("pump-1", "hub");
    publish(&mut fleet, "direct");
    assert_eq!(fleet.delivered("hub"), ["by relay", "direct"]);
}

#[test]
fn an_older_hub_that_knows_no_relays_gets_the_relays_own_alone() {
    let mut fleet = Fleet::new();
    fleet.link("gw-1", "hub");
    fleet.cut("gw-1", "hub");
    fleet.link("pump-1", "gw-1");
    fleet.publish("pump-1", "pump-1:x#1", false);
    fleet.publish("gw-1", "gw-1:x#1", false);
    fleet.quiet();
    // The hub's Welcome as a build without the feature would write it.
    let now = fleet.now;
    let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
    let session = fleet.host("gw-1").open_link(now, hub, true);
    let welcome = proto::Welcome { protocol: 1, instance: vec![9; 16].into(), ..Default::default() };
    let message = proto::control::Message::Welcome(welcome);
    let body = codec::encode(&proto::Control { message: Some(message) });
    let records = vec![record(Kind::CONTROL, 0, body)];
    fleet.host("gw-1").apply(now, Event::LinkReceived { session, records });
    let mut origins: Vec<Arc<str>> = Vec::new();
    for _ in 0..5 {
        fleet.host("gw-1").sync(now, usize::MAX);
        while let Some(out) = fleet.host("gw-1").out.pop_front() {
            let Out::Send(to, _, records) = out else { continue };
            for record in records.iter().filter(|_| to == session) {
                if record.header.kind == Kind::DECLARE {
                    let declare: proto::Declare = codec::decode(record.body.clone()).expect("a declare");
                    origins.push(declare.origin.into());
                }
            }
        }
    }
    assert!(!origins.is_empty() && origins.iter().all(|origin| &**origin == "gw-1"), "{origins:?}");
}

#[test]
fn a_fence_of_an_older_path_leaves_a_newer_one_through_the_same_relay() {
    let mut fleet = Fleet::linked(&[("gw-1", "hub"), ("pump-1", "gw-1")]);
    let (session, _) = fleet.session("gw-1", "hub");
    let refusal = proto::Refusal { reason: proto::RefusalReason::Fenced as i32, ..Default::default() };
    let fence = |fleet: &mut Fleet, claim| {
        let fence = proto::Fence { name: "pump-1".into(), refusal: Some(refusal.clone()), claim };
        let message = proto::control::Message::Fence(fence);
        let body = codec::encode(&proto::Control { message: Some(message) });
        let now = fleet.now;
        let records = vec![record(Kind::CONTROL, 0, body)];
        fleet.host("gw-1").apply(now, Event::LinkReceived { session, records });
        fleet.quiet();
    };
    fence(&mut fleet, 1);
    assert!(fleet.is_linked("pump-1", "gw-1"));
    fence(&mut fleet, u64::MAX);
    assert!(!fleet.is_linked("pump-1", "gw-1"));
}
