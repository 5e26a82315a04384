//! Single rules of the core, each with a node and a hub and nothing left to chance.

use std::{sync::Arc, time::Duration};

use broker::core::{
    Config,
    event::{
        Command, Condition, Event, Expect, Front, OriginFilter, Peer, Response, Role, SessionId, StateChange,
        StateOp, Target,
    },
};
use codec::{Class, Flags, Kind, Record, RecordHeader, frame::FrameParts, proto};

use crate::host::{Host, Out, Say};

const SECOND: Duration = Duration::from_secs(1);

/// A node and a hub that are linked when told to.
struct Pair {
    now: Duration,
    node: Host,
    hub: Host,
    link: Option<(SessionId, SessionId)>,
    /// What the hosts wanted of the world, links apart.
    seen: Vec<(&'static str, Out)>,
    /// The link drops right before each barrier.
    drop_barriers: bool,
}

impl Pair {
    fn new() -> Self {
        let now = SECOND;
        let node = Host::new(Config::node("n1", [1; 16], 11), now);
        let hub = Host::new(Config::hub("hub", "tier", [9; 16], 12), now);
        let mut pair = Self { now, node, hub, link: None, seen: Vec::new(), drop_barriers: false };
        pair.enrol("n1");
        pair
    }

    fn enrol(&mut self, node: &str) {
        let op = StateOp {
            space: "sys".into(),
            key: format!("identity/{node}"),
            change: StateChange::Put(bytes::Bytes::from_static(b"{}")),
            expect: Expect::Absent,
        };
        self.hub.command(self.now, Command::StateWrite(vec![op]));
        self.quiet();
    }

    fn link_up(&mut self) {
        let node = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
        let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
        let at_hub = self.hub.open_link(self.now, node, false);
        let at_node = self.node.open_link(self.now, hub, true);
        self.link = Some((at_node, at_hub));
        self.quiet();
    }

    fn link_down(&mut self) {
        if let Some((at_node, at_hub)) = self.link.take() {
            self.node.apply(self.now, Event::LinkClosed { session: at_node });
            self.hub.apply(self.now, Event::LinkClosed { session: at_hub });
        }
        self.quiet();
    }

    /// Everything durable, everything delivered, until nothing moves.
    fn quiet(&mut self) {
        for _ in 0..50 {
            self.node.tick(self.now);
            self.hub.tick(self.now);
            self.node.sync(self.now, usize::MAX);
            self.hub.sync(self.now, usize::MAX);
            self.carry();
        }
    }

    fn carry(&mut self) {
        while let Some(out) = self.node.out.pop_front() {
            match (out, self.link) {
                (Out::Send(from, _, mut records), Some((at_node, session))) if from == at_node => {
                    if self.drop_barriers {
                        records.retain(|record| record.header.kind != Kind::BARRIER);
                    }
                    self.hub.apply(self.now, Event::LinkReceived { session, records });
                }
                (out, _) => self.seen.push(("node", out)),
            }
        }
        while let Some(out) = self.hub.out.pop_front() {
            match (out, self.link) {
                (Out::Send(from, _, records), Some((session, at_hub))) if from == at_hub => {
                    self.node.apply(self.now, Event::LinkReceived { session, records });
                }
                (out, _) => self.seen.push(("hub", out)),
            }
        }
    }

    fn publish(&mut self, tag: &str, qos: u8, retain: bool) {
        let session = self.node.connect(self.now, "pub", Front::Mqtt, true);
        self.node.publish(self.now, session, &Say { to: &Target::Own, topic: "a/b", tag, qos, retain });
    }

    fn send_down(&mut self, session: SessionId, node: &str) {
        let to = Target::Node(node.into());
        let open = Say { to: &to, topic: "valves/3", tag: "open", qos: 1, retain: false };
        self.hub.publish(self.now, session, &open);
    }

    /// What stands in the node's Logs at the hub, every history of them, oldest first.
    fn at_hub(&mut self) -> Vec<String> {
        let list = Command::LogList { origin: Some("n1".into()) };
        let Response::Logs(logs) = self.hub.ask(self.now, list) else { panic!("a list") };
        let mut found = Vec::new();
        for log in logs {
            let read = Command::LogRead {
                origin: log.origin,
                stream: log.stream,
                epoch: Some(log.epoch),
                from: log.first,
                bytes_max: 1 << 30,
            };
            let Response::Records { records, .. } = self.hub.ask(self.now, read) else { panic!("records") };
            found.extend(records.iter().filter_map(payload));
        }
        found
    }

    fn retained_at_hub(&mut self) -> Vec<String> {
        self.held_at_hub("retained")
    }

    /// The values of a space of the node, as the hub lists it.
    fn held_at_hub(&mut self, space: &str) -> Vec<String> {
        let list = Command::StateList {
            origin: "n1".into(),
            space: space.into(),
            prefix: String::new(),
            after: None,
            limit: 100,
            at: None,
        };
        match self.hub.ask(self.now, list) {
            Response::Entries { entries, .. } => {
                entries.iter().map(|entry| String::from_utf8_lossy(&entry.value()).into_owned()).collect()
            }
            other => panic!("entries, not {other:?}"),
        }
    }

    /// The node writes or deletes a key of its space `status`.
    fn say_status(&mut self, change: StateChange) {
        let (space, key) = ("status".into(), "k".into());
        let op = StateOp { space, key, change, expect: Expect::Any };
        self.node.command(self.now, Command::StateWrite(vec![op]));
        self.quiet();
    }

    fn conditions(&mut self) -> Vec<Condition> {
        match self.hub.ask(self.now, Command::Conditions) {
            Response::Conditions(conditions) => conditions,
            other => panic!("conditions, not {other:?}"),
        }
    }

    fn delivered(&self, host: &str) -> Vec<&str> {
        self.seen
            .iter()
            .filter_map(|(name, out)| match out {
                Out::Delivered { payload, .. } if *name == host => Some(payload.as_str()),
                _ => None,
            })
            .collect()
    }

    fn acknowledged(&self) -> usize {
        self.seen.iter().filter(|(_, out)| matches!(out, Out::Acknowledged(_))).count()
    }

    fn closed(&self, host: &str) -> usize {
        self.seen.iter().filter(|(name, out)| *name == host && matches!(out, Out::CloseLink(_))).count()
    }
}

fn payload(record: &Record) -> Option<String> {
    let view = codec::FrameView::parse(&record.body).ok()?;
    (record.header.kind == Kind::LOG).then(|| String::from_utf8_lossy(view.payload()).into_owned())
}

fn declare(origin: &str, kind: u32, name: &str) -> Record {
    let body = codec::encode(&proto::Declare { origin: origin.into(), kind, name: name.into(), class: 3 });
    record(Kind::DECLARE, 77, body)
}

fn record(kind: Kind, source: u32, body: bytes::Bytes) -> Record {
    let header = RecordHeader {
        kind,
        class: Class::Event as u8,
        flags: Flags::default(),
        source,
        epoch: 5,
        seq: 1,
        aux: 0,
    };
    Record { header, body }
}

#[test]
fn no_acknowledgement_before_durability() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, false);
    pair.carry();
    assert_eq!(pair.acknowledged(), 0, "acknowledged while the group waits for the disk");
    pair.quiet();
    assert_eq!(pair.acknowledged(), 1);
}

#[test]
fn a_node_speaks_of_no_origin_but_its_own() {
    for (origin, kind, name) in [
        ("n2", 1, ""),
        ("n2", 2, "default"),
        ("n2", 3, "retained"),
        ("", 2, "down/n1"),
        ("", 3, "fleet"),
        ("n1", 3, "sys"),
        ("n1", 3, "k8s"),
    ] {
        let mut pair = Pair::new();
        pair.link_up();
        let (_, session) = pair.link.expect("linked");
        pair.hub.apply(pair.now, Event::LinkReceived { session, records: vec![declare(origin, kind, name)] });
        pair.quiet();
        assert_eq!(pair.closed("hub"), 1, "origin {origin:?} kind {kind} name {name:?} was let in");
        assert!(pair.conditions().iter().any(|held| held.kind == "NotAuthorized" && held.subject == "n1"));
    }
}

#[test]
fn a_record_needs_a_declared_source_of_its_kind() {
    let frame = FrameParts { topic: "a", payload: b"x", ..FrameParts::default() }.encode();
    for records in [
        vec![record(Kind::LOG, 99, frame.clone())],
        vec![declare("n1", 3, "twin"), record(Kind::LOG, 77, frame.clone())],
        vec![declare("n1", 2, "s"), record(Kind::PUT, 77, frame.clone())],
        vec![declare("n1", 2, "s"), record(Kind::CURSOR, 77, frame)],
        vec![declare("n1", 1, ""), declare("n1", 1, "")],
    ] {
        let mut pair = Pair::new();
        pair.link_up();
        let (_, session) = pair.link.expect("linked");
        pair.hub.apply(pair.now, Event::LinkReceived { session, records });
        pair.quiet();
        assert_eq!(pair.closed("hub"), 1);
    }
}

#[test]
fn what_came_down_never_goes_up_again() {
    let mut pair = Pair::new();
    pair.link_up();
    let hub = pair.hub.connect(pair.now, "nats", Front::Nats, false);
    pair.hub.subscribe(pair.now, hub, OriginFilter::AnyNode, "#", 0);
    let node = pair.node.connect(pair.now, "sub", Front::Mqtt, false);
    pair.node.subscribe(pair.now, node, OriginFilter::Own, "#", 1);
    pair.send_down(hub, "n1");
    pair.quiet();
    assert_eq!(pair.delivered("node"), ["open"]);
    assert_eq!(pair.delivered("hub"), Vec::<&str>::new());
    assert_eq!(pair.at_hub(), Vec::<String>::new());
}

#[test]
fn a_message_to_a_node_that_is_away_arrives_once_when_it_links() {
    let mut pair = Pair::new();
    let node = pair.node.connect(pair.now, "sub", Front::Mqtt, true);
    pair.node.subscribe(pair.now, node, OriginFilter::Own, "valves/#", 1);
    let hub = pair.hub.connect(pair.now, "nats", Front::Nats, false);
    pair.send_down(hub, "n1");
    pair.quiet();
    pair.link_up();
    pair.link_down();
    pair.link_up();
    assert_eq!(pair.delivered("node"), ["open"]);
}

#[test]
fn a_message_to_a_node_that_nobody_enrolled_is_refused() {
    let mut pair = Pair::new();
    let hub = pair.hub.connect(pair.now, "nats", Front::Nats, false);
    pair.send_down(hub, "ghost");
    pair.quiet();
    assert_eq!(pair.acknowledged(), 0);
    let Response::Logs(logs) = pair.hub.ask(pair.now, Command::LogList { origin: Some("".into()) }) else {
        panic!("a list")
    };
    assert!(logs.is_empty(), "a Log was made for a node that does not exist");
}

#[test]
fn the_newest_session_of_an_instance_fences_the_older() {
    let mut pair = Pair::new();
    pair.link_up();
    pair.publish("n1:x#1", 1, false);
    pair.quiet();
    let older = pair.link.take().expect("linked");
    pair.link_up();
    assert_eq!(pair.closed("hub"), 1, "the older session was not closed");
    // What the older session still delivers changes nothing.
    let frame = FrameParts { topic: "a", payload: b"late", ..FrameParts::default() }.encode();
    pair.hub.apply(
        pair.now,
        Event::LinkReceived { session: older.1, records: vec![record(Kind::LOG, 1, frame)] },
    );
    pair.publish("n1:x#2", 1, false);
    pair.quiet();
    assert_eq!(pair.at_hub(), ["n1:x#1", "n1:x#2"]);
}

#[test]
fn a_second_instance_is_refused_and_named_until_the_first_has_been_away_a_minute() {
    let mut pair = Pair::new();
    pair.link_up();
    let twin = Host::new(Config::node("n1", [2; 16], 99), pair.now);
    let first = std::mem::replace(&mut pair.node, twin);
    let first_link = pair.link.take();
    pair.link_up();
    assert_eq!(pair.closed("hub"), 1);
    assert!(pair.conditions().iter().any(|held| held.kind == "DuplicateIdentity" && held.subject == "n1"));
    let second = std::mem::replace(&mut pair.node, first);
    pair.link = first_link;
    pair.publish("n1:x#1", 1, false);
    pair.quiet();
    assert_eq!(pair.at_hub(), ["n1:x#1"], "the holder was disturbed");
    pair.link_down();
    pair.node = second;
    pair.now += 61 * SECOND;
    pair.link_up();
    assert_eq!(pair.closed("hub"), 1, "still refused after a minute");
}

#[test]
fn a_wiped_hub_gets_everything_again_and_in_order() {
    let mut pair = Pair::new();
    pair.link_up();
    for number in 1..=5 {
        pair.publish(&format!("n1:x#{number}"), 1, true);
    }
    pair.quiet();
    pair.link_down();
    pair.hub = Host::new(Config::hub("hub", "tier", [8; 16], 77), pair.now);
    pair.enrol("n1");
    pair.link_up();
    assert_eq!(pair.at_hub(), (1..=5).map(|number| format!("n1:x#{number}")).collect::<Vec<_>>());
}

#[test]
fn a_node_rolled_back_begins_a_new_epoch_and_its_new_data_is_no_duplicate() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, false);
    pair.link_up();
    // The marks reach the disk.
    pair.now += 2 * SECOND;
    pair.quiet();
    let snapshot = pair.node.snapshot(pair.now);
    pair.publish("n1:x#2", 1, false);
    pair.publish("n1:x#3", 1, false);
    pair.quiet();
    assert_eq!(pair.at_hub(), ["n1:x#1", "n1:x#2", "n1:x#3"]);
    pair.link_down();
    pair.node = snapshot;
    pair.publish("n1:x#other", 1, false);
    pair.quiet();
    pair.link_up();
    pair.now += 2 * SECOND;
    pair.quiet();
    // Nothing of the older history is lost, and what both have may stand in both.
    let at_hub = pair.at_hub();
    for tag in ["n1:x#1", "n1:x#2", "n1:x#3", "n1:x#other"] {
        assert!(at_hub.contains(&tag.to_owned()), "{tag} is not among {at_hub:?}");
    }
    assert!(pair.conditions().iter().any(|held| held.kind == "EpochChanged"), "the hub does not report it");
}

#[test]
fn a_qos_2_publish_sent_again_before_its_release_is_appended_once() {
    let mut pair = Pair::new();
    pair.link_up();
    let session = pair.node.connect(pair.now, "pub", Front::Mqtt, true);
    for _ in 0..2 {
        let frame = FrameParts { topic: "a", payload: b"n1:x#1", ..FrameParts::default() }.encode();
        let message = broker::core::event::Publish {
            target: Target::Own,
            frame,
            qos: 2,
            packet_id: 9,
            dup: false,
            retain: false,
            reply: None,
        };
        pair.node.apply(pair.now, Event::Published { session, messages: vec![message] });
    }
    pair.quiet();
    assert_eq!(pair.at_hub(), ["n1:x#1"]);
}

#[test]
fn a_down_message_can_set_a_retained_value_that_the_node_owns() {
    let mut pair = Pair::new();
    pair.link_up();
    let hub = pair.hub.connect(pair.now, "nats", Front::Nats, false);
    let headers = [(codec::frame::header::RETAIN, b"1".as_slice())];
    let frame =
        FrameParts { topic: "valves/3", payload: b"open", headers: &headers, ..FrameParts::default() };
    let message = broker::core::event::Publish {
        target: Target::Node("n1".into()),
        frame: frame.encode(),
        qos: 1,
        packet_id: 0,
        dup: false,
        retain: false,
        reply: None,
    };
    pair.hub.apply(pair.now, Event::Published { session: hub, messages: vec![message] });
    pair.quiet();
    let get = |origin: &str| Command::StateGet {
        origin: Arc::from(origin),
        space: "retained".into(),
        key: "valves/3".into(),
    };
    for host in [&mut pair.node, &mut pair.hub] {
        let Response::Entry(Some(entry)) = host.ask(pair.now, get("n1")) else {
            panic!("not at {}", host.name)
        };
        assert_eq!(&*entry.value(), b"open");
    }
}

#[test]
fn a_store_that_refuses_writes_refuses_publishes_and_recovers_by_itself() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, false);
    pair.quiet();
    let refused = Event::StoreRefused { lsn: 99, reason: "No space left on device".into() };
    pair.node.apply(pair.now, refused);
    pair.publish("n1:x#2", 1, false);
    pair.quiet();
    assert_eq!(pair.acknowledged(), 1, "a publish was taken while the disk was full");
    pair.node.apply(pair.now, Event::Persisted(0));
    pair.publish("n1:x#3", 1, false);
    pair.quiet();
    assert_eq!(pair.acknowledged(), 2);
}

#[test]
fn a_store_that_is_low_refuses_what_adds_and_takes_what_frees_until_there_is_room() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, true);
    pair.quiet();
    pair.node.apply(pair.now, Event::StoreLow { reason: "no room for another segment".into() });
    pair.publish("n1:x#2", 1, false);
    pair.quiet();
    assert_eq!(pair.acknowledged(), 1, "a publish was taken though there is no room");
    let write = |change| {
        let op = StateOp { space: "twin".into(), key: "a".into(), change, expect: Expect::Any };
        Command::StateWrite(vec![op])
    };
    let put = write(StateChange::Put(b"x"[..].into()));
    assert!(matches!(pair.node.ask(pair.now, put), Response::Refused(_)));
    let delete = write(StateChange::Delete);
    assert!(matches!(pair.node.ask(pair.now, delete), Response::Written(_)));
    let conditions = || Command::Conditions;
    let Response::Conditions(held) = pair.node.ask(pair.now, conditions()) else { panic!() };
    assert_eq!(held.iter().map(|held| held.kind).collect::<Vec<_>>(), ["StoreLow"]);
    pair.node.apply(pair.now, Event::StoreAmple);
    pair.publish("n1:x#3", 1, false);
    pair.quiet();
    assert_eq!(pair.acknowledged(), 2);
    let Response::Conditions(held) = pair.node.ask(pair.now, conditions()) else { panic!() };
    assert!(held.is_empty());
}

#[test]
fn what_configuration_does_not_import_stays_with_its_sender() {
    let mut pair = Pair::new();
    let mut config = Config::node("n1", [1; 16], 11);
    config.imports.streams = Some(Vec::new());
    pair.node = Host::new(config, pair.now);
    let node = pair.node.connect(pair.now, "sub", Front::Mqtt, false);
    pair.node.subscribe(pair.now, node, OriginFilter::Own, "#", 1);
    pair.link_up();
    let hub = pair.hub.connect(pair.now, "nats", Front::Nats, false);
    pair.send_down(hub, "n1");
    pair.publish("n1:x#1", 1, false);
    pair.quiet();
    assert_eq!(pair.delivered("node"), ["n1:x#1"], "the other direction is not disturbed");
    assert_eq!(pair.at_hub(), ["n1:x#1"]);
}

#[test]
fn a_session_that_lives_long_is_never_stalled_by_what_it_acknowledged() {
    let mut pair = Pair::new();
    let node = pair.node.connect(pair.now, "sub", Front::Mqtt, false);
    pair.node.subscribe(pair.now, node, OriginFilter::Own, "#", 1);
    let many = broker::limits::CURSOR_ACKED_MAX + 100;
    for number in 0..many {
        pair.publish(&format!("n1:x#{number}"), 1, false);
        pair.node.sync(pair.now, usize::MAX);
        pair.carry();
    }
    pair.quiet();
    assert_eq!(pair.delivered("node").len(), many);
}

#[test]
fn state_of_a_node_rolled_back_converges_to_what_the_node_holds_now() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, true);
    pair.link_up();
    let snapshot = pair.node.snapshot(pair.now);
    for number in 2..=5 {
        pair.publish(&format!("n1:x#{number}"), 1, true);
        pair.quiet();
    }
    pair.link_down();
    pair.node = snapshot;
    pair.publish("n1:x#other", 1, true);
    pair.quiet();
    pair.link_up();
    assert_eq!(pair.retained_at_hub(), ["n1:x#other"]);
}

#[test]
fn what_a_new_incarnation_does_not_name_goes_even_if_the_link_drops_before_the_barrier() {
    let mut pair = Pair::new();
    pair.publish("n1:x#1", 1, true);
    pair.link_up();
    assert_eq!(pair.retained_at_hub(), ["n1:x#1"]);
    // The node's disk is lost; what it retains now is another topic.
    pair.link_down();
    pair.node = Host::new(Config::node("n1", [3; 16], 55), pair.now);
    pair.now += 61 * SECOND;
    let session = pair.node.connect(pair.now, "pub", Front::Mqtt, true);
    let say = Say { to: &Target::Own, topic: "c", tag: "n1:c#1", qos: 1, retain: true };
    pair.node.publish(pair.now, session, &say);
    pair.quiet();
    pair.drop_barriers = true;
    pair.link_up();
    pair.link_down();
    pair.drop_barriers = false;
    pair.link_up();
    assert_eq!(pair.retained_at_hub(), ["n1:c#1"]);
}

#[test]
fn what_was_deleted_goes_even_if_another_space_begins_the_new_incarnation_while_it_is_exported() {
    let mut pair = Pair::new();
    pair.say_status(StateChange::Put(bytes::Bytes::from_static(b"up")));
    pair.link_up();
    assert_eq!(pair.held_at_hub("status"), ["up"]);
    // The node goes back to a copy from before its first retained message: of `status` nothing is
    // contradicted, of `retained` the hub has more than the copy.
    let snapshot = pair.node.snapshot(pair.now);
    pair.publish("n1:x#1", 1, true);
    pair.quiet();
    pair.link_down();
    pair.node = snapshot;
    // Nothing is left in `status`, whose export begins first, to name the new incarnation.
    pair.say_status(StateChange::Delete);
    pair.link_up();
    assert_eq!(pair.retained_at_hub(), Vec::<String>::new());
    assert_eq!(pair.held_at_hub("status"), Vec::<String>::new());
}

#[test]
fn a_replaced_enrolment_is_out_even_if_it_had_not_said_hello_yet() {
    let mut pair = Pair::new();
    let old = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
    let spare = pair.hub.open_link(pair.now, old, false);
    pair.hub.command(pair.now, Command::CloseNode { node: "n1".into(), generation: 2 });
    pair.quiet();
    let closed = |out: &(&str, Out)| matches!(out, ("hub", Out::CloseLink(session)) if *session == spare);
    assert!(pair.seen.iter().any(closed), "the spare link of the old enrolment stayed open");
    // And a link that was authorized just before says hello just after.
    let late = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
    let at_hub = pair.hub.open_link(pair.now, late, false);
    let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
    let at_node = pair.node.open_link(pair.now, hub, true);
    pair.link = Some((at_node, at_hub));
    pair.publish("n1:x#1", 1, false);
    pair.quiet();
    assert_eq!(pair.at_hub(), Vec::<String>::new());
}

#[test]
fn a_qos_2_publish_sent_again_while_the_disk_is_full_keeps_its_packet_id() {
    let mut pair = Pair::new();
    let session = pair.node.connect(pair.now, "pub", Front::Mqtt, true);
    let publish = || broker::core::event::Publish {
        target: Target::Own,
        frame: FrameParts { topic: "a", payload: b"n1:x#1", ..FrameParts::default() }.encode(),
        qos: 2,
        packet_id: 9,
        dup: false,
        retain: false,
        reply: None,
    };
    pair.node.apply(pair.now, Event::Published { session, messages: vec![publish()] });
    pair.node.apply(pair.now, Event::StoreRefused { lsn: 2, reason: "full".into() });
    pair.node.apply(pair.now, Event::Published { session, messages: vec![publish()] });
    assert_eq!(pair.node.refused, 0, "a publish that was taken was refused when it came again");
    pair.quiet();
    pair.link_up();
    assert_eq!(pair.at_hub(), ["n1:x#1"]);
}

#[test]
fn a_seq_that_nobody_can_follow_closes_the_link_and_harms_nothing() {
    for seq in [u64::MAX, u64::MAX - 1] {
        let mut pair = Pair::new();
        pair.link_up();
        let (_, session) = pair.link.expect("linked");
        let gap = proto::Gap { from: 1, to: seq, count: seq, reason: 1, new_epoch: 0 };
        let mut record = record(Kind::GAP, 77, codec::encode(&gap));
        record.header.seq = seq;
        let records = vec![declare("n1", 2, "s"), record];
        pair.hub.apply(pair.now, Event::LinkReceived { session, records });
        pair.quiet();
        assert_eq!(pair.closed("hub"), 1);
    }
}
