//! Rules of a link between a node and its hub, as `formats` has them: where a receiver goes on, how much may be
//! on its way, what a node lets itself send, and how builds of different ages understand each other.

use std::time::Duration;

use broker::core::{
    Budget, Config, Rate, Stats,
    event::{Command, Event, Expect, Front, Peer, Response, Role, SessionId, StateChange, StateOp, Target},
};
use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use crate::host::{Host, Out, Say};

const SECOND: Duration = Duration::from_secs(1);

/// A node and a hub, and what passes between them.
struct Pair {
    now: Duration,
    node: Host,
    hub: Host,
    link: Option<(SessionId, SessionId)>,
    /// Records that the node sent.
    sent: Vec<Record>,
    /// What passes is changed on its way down.
    tamper: fn(&mut Record),
}

fn config() -> Config {
    Config::node("n1", [1; 16], 11)
}

impl Pair {
    fn new(config: Config) -> Self {
        let now = SECOND;
        let hub = Host::new(Config::hub("hub", "tier", [9; 16], 12), now);
        let mut pair =
            Self { now, node: Host::new(config, now), hub, link: None, sent: Vec::new(), tamper: |_| {} };
        pair.enrol();
        pair
    }

    fn enrol(&mut self) {
        let change = StateChange::Put(bytes::Bytes::from_static(b"{}"));
        let op = StateOp { space: "sys".into(), key: "identity/n1".into(), change, expect: Expect::Any };
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

    fn quiet(&mut self) {
        for _ in 0..30 {
            self.hub.sync(self.now, usize::MAX);
            self.turn();
        }
    }

    /// One turn in which the hub's disk does nothing.
    fn turn(&mut self) {
        self.node.tick(self.now);
        self.hub.tick(self.now);
        self.node.sync(self.now, usize::MAX);
        while let Some(out) = self.node.out.pop_front() {
            if let (Out::Send(from, _, records), Some((at_node, session))) = (out, self.link)
                && from == at_node
            {
                self.sent.extend(records.iter().cloned());
                self.hub.apply(self.now, Event::LinkReceived { session, records });
            }
        }
        while let Some(out) = self.hub.out.pop_front() {
            if let (Out::Send(from, _, mut records), Some((session, at_hub))) = (out, self.link)
                && from == at_hub
            {
                records.iter_mut().for_each(self.tamper);
                self.node.apply(self.now, Event::LinkReceived { session, records });
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.quiet();
    }

    fn publish(&mut self, topic: &str, tag: &str, qos: u8) {
        let session = self.node.connect(self.now, "pub", Front::Mqtt, true);
        self.node.publish(self.now, session, &Say { to: &Target::Own, topic, tag, qos, retain: false });
    }

    fn publish_many(&mut self, count: u32, bytes: usize) {
        let filler = "x".repeat(bytes);
        for number in 1..=count {
            self.publish("a/b", &format!("n1:{filler}#{number}"), 1);
        }
    }

    fn records_at_hub(&mut self) -> Vec<Record> {
        let list = Command::LogList { origin: Some("n1".into()) };
        let Response::Logs(logs) = self.hub.ask(self.now, list) else { panic!("a list") };
        let mut found = Vec::new();
        for log in logs {
            let read = Command::LogRead {
                origin: log.origin,
                stream: log.stream,
                epoch: Some(log.epoch),
                from: log.first.min(1),
                bytes_max: 1 << 30,
            };
            let Response::Records { records, .. } = self.hub.ask(self.now, read) else { panic!("records") };
            found.extend(records);
        }
        found
    }

    fn at_hub(&mut self) -> Vec<String> {
        self.records_at_hub().iter().filter(|record| record.header.kind == Kind::LOG).map(text).collect()
    }

    fn incarnation_of_fleet(&mut self) -> u64 {
        let get =
            Command::StateGet { origin: "".into(), space: "fleet".into(), key: "obj/core/a/-/b".to_owned() };
        match self.hub.ask(self.now, get) {
            Response::Entry(Some(entry)) => entry.incarnation,
            other => panic!("an entry, not {other:?}"),
        }
    }

    fn stats(&mut self) -> Stats {
        match self.node.ask(self.now, Command::Stats) {
            Response::Stats(stats) => *stats,
            other => panic!("stats, not {other:?}"),
        }
    }

    fn node_says(&mut self, kind: &str) -> bool {
        match self.node.ask(self.now, Command::Conditions) {
            Response::Conditions(conditions) => conditions.iter().any(|held| held.kind == kind),
            other => panic!("conditions, not {other:?}"),
        }
    }

    /// Seqs of the Log records that the node sent since the last call.
    fn sent_seqs(&mut self) -> Vec<u64> {
        let sent = std::mem::take(&mut self.sent);
        sent.iter().filter(|record| record.header.kind == Kind::LOG).map(|record| record.header.seq).collect()
    }
}

fn text(record: &Record) -> String {
    let view = codec::FrameView::parse(&record.body).expect("a frame");
    String::from_utf8_lossy(view.payload()).into_owned()
}

fn tags(numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|number| format!("n1:x#{number}")).collect()
}

fn control(message: proto::control::Message) -> Record {
    record(Kind::CONTROL, codec::encode(&proto::Control { message: Some(message) }))
}

fn record(kind: Kind, body: bytes::Bytes) -> Record {
    let flags = Flags::default();
    Record { header: RecordHeader { kind, class: 0, flags, source: 0, epoch: 0, seq: 0, aux: 0 }, body }
}

fn budget(change: impl FnOnce(&mut Budget)) -> Config {
    let mut budget = Budget {
        name: "metered".into(),
        streams: Vec::new(),
        classes: Vec::new(),
        rate: None,
        windows: Vec::new(),
        per_day: None,
        per_month: None,
    };
    change(&mut budget);
    Config { budgets: vec![budget], ..config() }
}

#[test]
fn a_receiver_goes_on_from_its_mark_and_gets_nothing_twice() {
    let mut pair = Pair::new(config());
    pair.link_up();
    for tag in tags(1..=3) {
        pair.publish("a/b", &tag, 1);
    }
    pair.quiet();
    assert_eq!(pair.sent_seqs(), [1, 2, 3]);
    pair.link_down();
    pair.publish("a/b", "n1:x#4", 1);
    pair.link_up();
    assert_eq!(pair.sent_seqs(), [4]);
    assert_eq!(pair.at_hub(), tags(1..=4));
}

#[test]
fn a_hub_that_lost_its_tail_gets_again_what_it_had_acknowledged() {
    let mut pair = Pair::new(config());
    pair.link_up();
    pair.publish("a/b", "n1:x#1", 1);
    pair.quiet();
    let backup = pair.hub.snapshot(pair.now);
    for tag in tags(2..=5) {
        pair.publish("a/b", &tag, 1);
    }
    pair.quiet();
    // The marks of what was acknowledged stand on the node's disk.
    pair.pass(2 * SECOND);
    pair.link_down();
    pair.hub = backup;
    pair.sent_seqs();
    pair.link_up();
    assert_eq!(pair.sent_seqs(), [2, 3, 4, 5]);
    assert_eq!(pair.at_hub(), tags(1..=5));
    assert!(
        pair.records_at_hub().iter().all(|record| record.header.kind == Kind::LOG),
        "a gap, and nothing is lost"
    );
}

#[test]
fn a_hub_that_asks_for_what_the_node_has_not_any_more_gets_a_gap_that_says_so() {
    let mut small = config();
    small.default_stream.policy.bytes_max = 200_000;
    let mut pair = Pair::new(small);
    pair.link_up();
    pair.publish("a/b", "n1:x#0", 1);
    pair.quiet();
    let backup = pair.hub.snapshot(pair.now);
    for _ in 0..40 {
        pair.publish_many(10, 1_000);
        pair.quiet();
    }
    pair.link_down();
    pair.hub = backup;
    pair.link_up();
    let records = pair.records_at_hub();
    let gaps: Vec<proto::Gap> = records
        .iter()
        .filter(|record| record.header.kind == Kind::GAP)
        .map(|record| codec::decode(record.body.clone()).expect("a gap"))
        .collect();
    let [gap] = &gaps[..] else { panic!("one gap, not {gaps:?}") };
    assert_eq!((gap.from, gap.reason()), (2, proto::GapReason::DropOldest));
    assert_eq!(gap.count, gap.to - gap.from + 1);
    let last = records.last().expect("records").header.seq;
    assert_eq!((last, records.len() as u64), (401, 2 + last - gap.to), "nothing else is missing");
}

#[test]
fn a_node_put_back_behind_its_mark_goes_on_under_a_new_epoch_from_the_mark_it_remembers() {
    let mut pair = Pair::new(config());
    pair.link_up();
    for tag in tags(1..=3) {
        pair.publish("a/b", &tag, 1);
    }
    pair.quiet();
    pair.pass(2 * SECOND);
    let copy = pair.node.snapshot(pair.now);
    for tag in tags(4..=6) {
        pair.publish("a/b", &tag, 1);
    }
    pair.quiet();
    pair.link_down();
    pair.node = copy;
    pair.sent_seqs();
    pair.publish("a/b", "n1:other#4", 1);
    pair.quiet();
    pair.link_up();
    // Its own persisted mark is 3: the same seq 4 is something else, and is told apart by its epoch.
    assert_eq!(pair.sent_seqs(), [4]);
    let fours: Vec<(u64, String)> = pair
        .records_at_hub()
        .iter()
        .filter(|record| record.header.kind == Kind::LOG && record.header.seq == 4)
        .map(|record| (record.header.epoch, text(record)))
        .collect();
    let [(first, before), (second, after)] = &fours[..] else { panic!("two, not {fours:?}") };
    assert_ne!(first, second);
    assert_eq!((&**before, &**after), ("n1:x#4", "n1:other#4"));
}

#[test]
fn the_same_seq_with_another_crc_is_another_history() {
    let mut pair = Pair::new(config());
    pair.link_up();
    pair.publish("a/b", "n1:x#1", 1);
    pair.quiet();
    pair.pass(2 * SECOND);
    let copy = pair.node.snapshot(pair.now);
    pair.publish("a/b", "n1:x#2", 1);
    pair.quiet();
    pair.link_down();
    pair.node = copy;
    // As many records as the hub has seen, and one of them is not what it has seen.
    pair.publish("a/b", "n1:other#2", 1);
    pair.publish("a/b", "n1:x#3", 1);
    pair.quiet();
    pair.link_up();
    let at_hub = pair.at_hub();
    assert_eq!(at_hub, ["n1:x#1", "n1:x#2", "n1:other#2", "n1:x#3"]);
}

#[test]
fn no_more_is_on_its_way_than_the_receiver_granted() {
    let mut pair = Pair::new(config());
    pair.tamper = |record| {
        let Ok(mut control) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        if let Some(proto::control::Message::Welcome(welcome)) = &mut control.message {
            welcome.window =
                Some(proto::Window { log_bytes: 10_000, state_bytes: 10_000, link_bytes: 10_000 });
            record.body = codec::encode(&control);
        }
    };
    pair.link_up();
    pair.publish_many(100, 1_000);
    for _ in 0..20 {
        pair.turn(); // the hub's disk is busy: nothing is acknowledged
    }
    assert_eq!(pair.sent_seqs().len(), 10, "ten of a thousand bytes are more than ten thousand bytes");
    pair.quiet();
    assert_eq!(pair.at_hub().len(), 100);
}

#[test]
fn an_older_hub_that_grants_nothing_gets_the_windows_it_was_made_for() {
    let mut pair = Pair::new(config());
    pair.tamper = |record| {
        let Ok(mut control) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        if let Some(proto::control::Message::Welcome(welcome)) = &mut control.message {
            (welcome.window, welcome.features) = (None, Vec::new());
            record.body = codec::encode(&control);
        }
    };
    pair.link_up();
    pair.publish_many(2_000, 1_000);
    for _ in 0..20 {
        pair.turn();
    }
    let sent = pair.sent_seqs().len();
    assert!((900..1_100).contains(&sent), "{sent} of about a thousand that fit 1 MiB");
    pair.quiet();
    assert_eq!(pair.at_hub().len(), 2_000);
}

#[test]
fn a_hub_whose_store_refuses_stops_its_nodes_and_goes_on_by_itself() {
    let mut pair = Pair::new(config());
    pair.link_up();
    pair.publish("a/b", "n1:x#0", 1);
    pair.quiet();
    pair.hub.apply(pair.now, Event::StoreRefused { lsn: 99, reason: "No space left on device".into() });
    pair.turn();
    pair.sent_seqs();
    pair.publish_many(50, 100);
    for _ in 0..20 {
        pair.turn();
    }
    assert_eq!(pair.sent_seqs(), Vec::<u64>::new(), "sent to a hub that can keep nothing");
    // Room again: what was waiting is written, and that says so to everybody.
    pair.hub.apply(pair.now, Event::Persisted(0));
    pair.quiet();
    assert_eq!(pair.at_hub().len(), 51);
}

#[test]
fn a_receiver_that_got_further_by_another_path_does_not_stop_the_window() {
    let mut pair = Pair::new(config());
    pair.tamper = |record| {
        let Ok(mut held) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        if let Some(proto::control::Message::Ack(ack)) = &mut held.message {
            ack.sources.iter_mut().for_each(|at| at.seq += 1_000_000);
            record.body = codec::encode(&held);
        }
    };
    pair.link_up();
    pair.publish_many(80, 64 << 10);
    pair.pass(SECOND);
    assert_eq!(pair.at_hub().len(), 80);
}

#[test]
fn a_peer_cannot_use_up_the_incarnations() {
    let mut pair = Pair::new(config());
    pair.tamper = |record| {
        let Ok(mut held) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        if let Some(proto::control::Message::Welcome(welcome)) = &mut held.message {
            let at = proto::StatePosition {
                origin: "n1".into(),
                space: "retained".into(),
                incarnation: u64::MAX,
                revision: u64::MAX,
                ..proto::StatePosition::default()
            };
            welcome.positions = vec![at];
            record.body = codec::encode(&held);
        }
    };
    pair.link_up();
    pair.publish("a/b", "n1:x#1", 1);
    pair.quiet();
    assert_eq!(pair.at_hub(), Vec::<String>::new(), "the link ends at such a position");
    pair.link_down();
    pair.tamper = |_| {};
    pair.link_up();
    assert_eq!(pair.at_hub(), tags(1..=1));
}

#[test]
fn a_node_that_makes_positions_up_cannot_reset_the_tier_again_and_again() {
    let mut pair = Pair::new(config());
    let change = StateChange::Put(bytes::Bytes::from_static(b"1"));
    let op = StateOp { space: "fleet".into(), key: "obj/core/a/-/b".into(), change, expect: Expect::Any };
    pair.hub.command(pair.now, Command::StateWrite(vec![op]));
    pair.quiet();
    let mut seen = vec![pair.incarnation_of_fleet()];
    for _ in 0..3 {
        let made_up = seen.last().expect("there is one") + (9 << 20);
        let position = proto::StatePosition {
            space: "fleet".into(),
            incarnation: made_up,
            revision: 7,
            reached_incarnation: made_up,
            reached_revision: 7,
            ..proto::StatePosition::default()
        };
        let hello = proto::Hello {
            protocol_min: 1,
            protocol_max: 1,
            instance: bytes::Bytes::from_static(&[1; 16]),
            positions: vec![position],
            ..proto::Hello::default()
        };
        let peer = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
        let session = pair.hub.open_link(pair.now, peer, false);
        let records = vec![control(proto::control::Message::Hello(hello))];
        pair.hub.apply(pair.now, Event::LinkReceived { session, records });
        pair.quiet();
        pair.hub.apply(pair.now, Event::LinkClosed { session });
        pair.quiet();
        seen.push(pair.incarnation_of_fleet());
    }
    assert!(seen[1] > seen[0], "once: this hub may have lost its store");
    assert_eq!(seen[1..], [seen[1]; 3], "and no more");
}

#[test]
fn bulk_in_flight_does_not_hold_back_an_alarm() {
    let mut config = config();
    config.streams = vec![broker::core::StreamConfig {
        name: "alarms".into(),
        filters: vec![codec::Filter::parse("alarm/#").expect("a filter")],
        class: Class::Alarm,
        ..config.default_stream.clone()
    }];
    let mut pair = Pair::new(config);
    pair.tamper = |record| {
        let Ok(mut control) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        if let Some(proto::control::Message::Welcome(welcome)) = &mut control.message {
            welcome.window =
                Some(proto::Window { log_bytes: 10_000, state_bytes: 10_000, link_bytes: 10_000 });
            record.body = codec::encode(&control);
        }
    };
    pair.link_up();
    pair.publish_many(100, 1_000);
    for _ in 0..5 {
        pair.turn();
    }
    pair.sent.clear();
    pair.publish("alarm/fire", "n1:fire#1", 1);
    for _ in 0..3 {
        pair.turn();
    }
    let classes: Vec<u8> = pair
        .sent
        .iter()
        .filter(|record| record.header.kind == Kind::LOG)
        .map(|record| record.header.class)
        .collect();
    assert_eq!(classes, [Class::Alarm as u8]);
}

#[test]
fn a_rate_spreads_what_a_node_has_to_send() {
    let mut pair = Pair::new(budget(|budget| budget.rate = Some(Rate { bytes: 5_000, burst: 5_000 })));
    pair.publish_many(60, 900);
    pair.link_up();
    let mut seconds = 0;
    while pair.at_hub().len() < 60 {
        seconds += 1;
        assert!(seconds < 60, "{} of 60 after a minute", pair.at_hub().len());
        for _ in 0..10 {
            pair.now += SECOND / 10;
            pair.turn();
            pair.hub.sync(pair.now, usize::MAX);
        }
    }
    // 60 records of about a thousand bytes at five thousand a second, after a burst of five thousand.
    assert!((9..=15).contains(&seconds), "{seconds} s");
}

#[test]
fn what_a_cap_holds_back_is_shown_and_goes_the_next_day_also_after_a_restart() {
    let mut pair = Pair::new(budget(|budget| budget.per_day = Some(10_000)));
    pair.link_up();
    pair.publish_many(30, 1_000);
    pair.quiet();
    pair.pass(2 * SECOND);
    let first = pair.at_hub().len();
    assert!((8..=10).contains(&first), "{first} records of ten thousand bytes");
    assert!(pair.node_says("BudgetHolds"));
    // A restart gives nothing back.
    pair.link_down();
    pair.node.crash(pair.now);
    pair.link_up();
    pair.pass(SECOND);
    assert_eq!(pair.at_hub().len(), first, "a cap was given twice");
    let stats = pair.stats();
    let [budget] = &stats.budgets[..] else { panic!("one") };
    assert!(budget.day >= 10_000 && budget.month == budget.day, "{budget:?}");
    assert!(
        stats.spent_today.iter().any(|((to, class), _)| to.is_empty() && *class == Class::Event),
        "{stats:?}"
    );
    for _ in 0..3 {
        // Two minutes past the next midnight at the latest.
        pair.pass(Duration::from_hours(24));
        pair.pass(Duration::from_mins(2));
    }
    assert_eq!(pair.at_hub().len(), 30);
    assert!(!pair.node_says("BudgetHolds"));
}

#[test]
fn a_live_message_that_no_budget_permits_is_dropped_and_counted() {
    let mut pair = Pair::new(budget(|budget| {
        budget.per_day = Some(1_000);
        budget.classes = vec![Class::Telemetry];
    }));
    pair.link_up();
    let filler = "x".repeat(400);
    for _ in 0..10 {
        pair.publish("a/b", &filler, 0);
        pair.turn();
    }
    let drops = pair.stats().drops.get(&broker::core::DropReason::Budget).copied();
    assert!(drops.is_some_and(|count| (6..=8).contains(&count)), "{drops:?}");
}

/// Fields and messages that this build does not know, as a newer one would write them.
fn from_the_future(message: &proto::Control) -> bytes::Bytes {
    // Field 1000, length-delimited, four bytes.
    let mut body = codec::encode(message).to_vec();
    body.extend_from_slice(&[0xc2, 0x3e, 4, 1, 2, 3, 4]);
    body.into()
}

#[test]
fn a_peer_of_a_newer_protocol_is_understood_as_far_as_both_go() {
    let mut pair = Pair::new(config());
    let node = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
    let session = pair.hub.open_link(pair.now, node, false);
    let hello = proto::Hello {
        protocol_min: 1,
        protocol_max: 7,
        features: vec!["telepathy".into(), "credit".into()],
        instance: vec![1; 16].into(),
        ..proto::Hello::default()
    };
    let hello = proto::Control { message: Some(proto::control::Message::Hello(hello)) };
    let declare = proto::Declare { origin: "n1".into(), kind: 2, name: "s".into(), class: 3 };
    let strange = proto::Declare { origin: "n1".into(), kind: 9, name: "dreams".into(), class: 3 };
    let frame = codec::frame::FrameParts { topic: "a", payload: b"n1:x#1", ..Default::default() }.encode();
    let numbered = |kind: Kind, source: u32, seq: u64, body: bytes::Bytes| {
        let mut record = record(kind, body);
        (record.header.source, record.header.epoch, record.header.seq, record.header.class) =
            (source, 5, seq, 3);
        record
    };
    let records = vec![
        record(Kind::CONTROL, from_the_future(&hello)),
        // A control message of a kind that is not known: field 900 of Control.
        record(Kind::CONTROL, bytes::Bytes::from_static(&[0xa2, 0x38, 2, 8, 1])),
        numbered(Kind::DECLARE, 1, 0, codec::encode(&declare)),
        numbered(Kind::DECLARE, 2, 0, codec::encode(&strange)),
        numbered(Kind::LOG, 1, 1, frame.clone()),
        numbered(Kind(12), 1, 1, frame.clone()),
        numbered(Kind(12), 2, 1, frame),
    ];
    for record in records {
        pair.hub.apply(pair.now, Event::LinkReceived { session, records: vec![record] });
    }
    pair.hub.sync(pair.now, usize::MAX);
    let mut welcomed = None;
    while let Some(out) = pair.hub.out.pop_front() {
        match out {
            Out::Send(_, _, records) => {
                for record in records.iter().filter(|record| record.header.kind == Kind::CONTROL) {
                    let control: proto::Control = codec::decode(record.body.clone()).expect("a message");
                    if let Some(proto::control::Message::Welcome(welcome)) = control.message {
                        welcomed = Some(welcome);
                    }
                }
            }
            out => panic!("{out:?}"),
        }
    }
    let welcome = welcomed.expect("a welcome");
    assert_eq!(welcome.protocol, 1);
    assert!(!welcome.features.contains(&"telepathy".to_owned()));
    assert_eq!(pair.at_hub(), tags([1]));
}

#[test]
fn a_peer_that_speaks_no_common_protocol_is_told_so() {
    for (min, max) in [(2, 9), (0, 0)] {
        let mut pair = Pair::new(config());
        let node = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
        let session = pair.hub.open_link(pair.now, node, false);
        let hello = proto::Hello {
            protocol_min: min,
            protocol_max: max,
            instance: vec![1; 16].into(),
            ..proto::Hello::default()
        };
        let records = vec![control(proto::control::Message::Hello(hello))];
        pair.hub.apply(pair.now, Event::LinkReceived { session, records });
        let refused = pair.hub.out.iter().any(|out| match out {
            Out::Send(_, _, records) => records.iter().any(|record| {
                let control: proto::Control = codec::decode(record.body.clone()).expect("a message");
                matches!(control.message, Some(proto::control::Message::Refusal(refusal))
                    if refusal.reason() == proto::RefusalReason::ProtocolVersion)
            }),
            _ => false,
        });
        assert!(refused, "protocol {min} to {max}");
    }
}
