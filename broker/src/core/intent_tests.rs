//! Intents between a node and its hub.

use std::time::Duration;

use bytes::Bytes;
use codec::proto::{self, IntentOutcome};

use super::{
    event::{Command, Expect, Intent, Response, Seen, StateOp},
    test_host::{self, Host, Pair},
};

const KEY: &str = "obj/core/configmaps/default/a";

fn put(space: &str, key: &str, value: &str) -> StateOp {
    test_host::op(space, key, Some(Bytes::copy_from_slice(value.as_bytes())), Expect::Any)
}

fn want(keys: &[&str]) -> StateOp {
    let want = proto::Want { keys: keys.iter().map(|key| (*key).to_owned()).collect() };
    test_host::op("fleet", "want/n1", Some(codec::encode(&want)), Expect::Any)
}

fn intent(id: &str, space: &str, key: &str, value: Option<&str>, seen: Seen) -> Intent {
    let value = value.map(|value| Bytes::copy_from_slice(value.as_bytes()));
    Intent { id: id.into(), space: space.into(), key: key.into(), value, seen }
}

/// What a host sees of a key.
fn seen(host: &mut Host, origin: &str, space: &str, key: &str) -> Seen {
    let get = Command::StateGet { origin: origin.into(), space: space.into(), key: key.into() };
    match host.run(get) {
        Response::Entry(Some(entry)) => Seen::At { incarnation: entry.incarnation, revision: entry.revision },
        _ => Seen::Absent,
    }
}

fn value(host: &mut Host, origin: &str, space: &str, key: &str) -> Option<String> {
    let get = Command::StateGet { origin: origin.into(), space: space.into(), key: key.into() };
    match host.run(get) {
        Response::Entry(entry) => entry.map(|entry| String::from_utf8_lossy(&entry.value()).into_owned()),
        other => panic!("an entry, not {other:?}"),
    }
}

fn outcome(host: &mut Host, origin: &str, space: &str, key: &str) -> Option<IntentOutcome> {
    let get = Command::StateGet { origin: origin.into(), space: space.into(), key: key.into() };
    let Response::Entry(entry) = host.run(get) else { panic!("an entry") };
    entry.map(|entry| codec::decode::<proto::IntentResult>(entry.value()).expect("an answer").outcome())
}

impl Pair {
    /// A linked node with one object that it must have.
    fn asking() -> Self {
        let mut pair = Self::new();
        pair.hub.write(vec![
            test_host::op("sys", "identity/n1", Some(Bytes::from_static(b"{}")), Expect::Any),
            put("fleet", KEY, "1"),
            put("fleet", "obj/core/configmaps/default/other", "1"),
            want(&[KEY]),
        ]);
        pair.link_up();
        pair.quiet();
        pair
    }

    fn ask(&mut self, intent: Intent) {
        let answer = self.node.run(Command::Intend { owner: "".into(), intent });
        assert!(matches!(answer, Response::Done), "{answer:?}");
    }

    fn answer(&mut self, id: &str) -> Option<IntentOutcome> {
        outcome(&mut self.node, "", "fleet", &format!("intent-result/n1/{id}"))
    }
}

#[test]
fn a_node_asks_for_a_change_of_what_it_has_and_reads_the_answer() {
    let mut pair = Pair::asking();
    let saw = seen(&mut pair.node, "", "fleet", KEY);
    pair.ask(intent("i1", "fleet", KEY, Some("2"), saw));
    pair.quiet();
    assert_eq!(value(&mut pair.hub, "", "fleet", KEY).as_deref(), Some("2"));
    assert_eq!(value(&mut pair.node, "", "fleet", KEY).as_deref(), Some("2"));
    assert_eq!(pair.answer("i1"), Some(IntentOutcome::Applied));
    // What it saw is not there any more.
    pair.ask(intent("i2", "fleet", KEY, Some("3"), saw));
    pair.quiet();
    assert_eq!(pair.answer("i2"), Some(IntentOutcome::Conflict));
    assert_eq!(value(&mut pair.hub, "", "fleet", KEY).as_deref(), Some("2"));
    pair.ask(intent("i3", "fleet", KEY, None, Seen::Any));
    pair.quiet();
    assert_eq!(pair.answer("i3"), Some(IntentOutcome::Applied));
    assert_eq!(value(&mut pair.node, "", "fleet", KEY), None);
}

#[test]
fn a_node_may_ask_for_nothing_but_what_its_want_lists() {
    let mut pair = Pair::asking();
    let keys = ["obj/core/configmaps/default/other", "want/n1", "want/n2", "barrier", "accept/n1", "obj/new"];
    for (number, key) in keys.into_iter().enumerate() {
        pair.ask(intent(&format!("i{number}"), "fleet", key, Some("x"), Seen::Any));
    }
    pair.ask(intent("sys", "sys", "identity/n2", Some("{}"), Seen::Absent));
    pair.quiet();
    for number in 0..keys.len() {
        assert_eq!(pair.answer(&format!("i{number}")), Some(IntentOutcome::NotAuthorizedIntent));
    }
    assert_eq!(pair.answer("sys"), Some(IntentOutcome::NotAuthorizedIntent));
    assert_eq!(value(&mut pair.hub, "", "sys", "identity/n2"), None);
    assert_eq!(value(&mut pair.hub, "", "fleet", "obj/core/configmaps/default/other").as_deref(), Some("1"));
}

#[test]
fn a_hub_asks_a_node_and_reads_the_answer_there() {
    let mut pair = Pair::asking();
    pair.node.write(vec![put("twin", "default/pump", "off")]);
    pair.quiet();
    pair.link_down();
    let saw = seen(&mut pair.hub, "n1", "twin", "default/pump");
    for (id, space, value) in [("h1", "twin", "on"), ("h2", "twin", "late"), ("h3", "status", "x")] {
        let intent = intent(id, space, "default/pump", Some(value), saw);
        let answer = pair.hub.run(Command::Intend { owner: "n1".into(), intent });
        assert!(matches!(answer, Response::Done), "{answer:?}");
    }
    pair.hub.restart();
    pair.link_up();
    pair.quiet();
    assert_eq!(value(&mut pair.node, "n1", "twin", "default/pump").as_deref(), Some("on"));
    assert_eq!(value(&mut pair.hub, "n1", "twin", "default/pump").as_deref(), Some("on"));
    let mut answer = |id: &str| outcome(&mut pair.hub, "n1", "status", &format!("intent-result/{id}"));
    assert_eq!(answer("h1"), Some(IntentOutcome::Applied));
    assert_eq!(answer("h2"), Some(IntentOutcome::Conflict));
    assert_eq!(answer("h3"), Some(IntentOutcome::NotAuthorizedIntent));
    let nobody = intent("h4", "twin", "a", None, Seen::Any);
    let refused = pair.hub.run(Command::Intend { owner: "ghost".into(), intent: nobody });
    assert!(matches!(refused, Response::Refused(_)));
}

#[test]
fn an_intent_has_its_effect_once_whoever_restarts_wherever_the_link_is_cut() {
    for cut in 0..14 {
        let mut pair = Pair::asking();
        pair.ask(intent("once", "fleet", KEY, Some("2"), Seen::Any));
        // On its way, applied but not durable, durable but not acknowledged, ...
        pair.carry(cut % 7);
        if cut >= 7 {
            pair.hub.persist();
            pair.carry(1);
        }
        pair.link_down();
        pair.hub.restart();
        pair.node.restart();
        pair.link_up();
        pair.quiet();
        pair.link_down();
        // Somebody else changes it; a repetition would take that back.
        pair.hub.write(vec![put("fleet", KEY, "3")]);
        pair.link_up();
        pair.quiet();
        assert_eq!(value(&mut pair.hub, "", "fleet", KEY).as_deref(), Some("3"), "cut {cut}");
        assert_eq!(pair.answer("once"), Some(IntentOutcome::Applied), "cut {cut}");
        // Its asker's disk is put back and sends it once more, under a new epoch.
        pair.ask(intent("once", "fleet", KEY, Some("2"), Seen::Any));
        pair.quiet();
        assert_eq!(value(&mut pair.hub, "", "fleet", KEY).as_deref(), Some("3"), "cut {cut}");
    }
}

#[test]
fn what_comes_too_late_is_refused_and_answers_go_after_a_day() {
    let mut pair = Pair::asking();
    pair.link_down();
    pair.ask(intent("late", "fleet", KEY, Some("2"), Seen::Any));
    for host in [&mut pair.hub, &mut pair.node] {
        host.mono += Duration::from_hours(25);
        host.tick();
    }
    pair.link_up();
    pair.quiet();
    assert_eq!(pair.answer("late"), Some(IntentOutcome::ExpiredIntent));
    assert_eq!(value(&mut pair.hub, "", "fleet", KEY).as_deref(), Some("1"));
    for host in [&mut pair.hub, &mut pair.node] {
        host.mono += Duration::from_hours(25);
    }
    pair.quiet();
    assert_eq!(pair.answer("late"), None);
    assert_eq!(pair.hub.keys("", "fleet", "intent-result/"), Vec::<String>::new());
}

#[test]
fn intents_that_wait_and_answers_that_stand_are_bounded() {
    let mut pair = Pair::asking();
    pair.link_down();
    let mut refused = 0;
    for number in 0..crate::limits::INTENTS_MAX + 50 {
        let intent = intent(&format!("i{number}"), "fleet", KEY, Some("x"), Seen::Any);
        let answer = pair.node.run(Command::Intend { owner: "".into(), intent });
        refused += usize::from(matches!(answer, Response::Refused(_)));
    }
    assert_eq!(refused, 50);
    pair.link_up();
    pair.quiet();
    pair.quiet();
    let answers = pair.hub.keys("", "fleet", "intent-result/").len();
    assert!(answers <= crate::limits::INTENT_RESULTS_MAX, "{answers} answers stand");
    // Acknowledged: there is room again.
    pair.ask(intent("more", "fleet", KEY, Some("x"), Seen::Any));
}

#[test]
fn no_client_sees_an_intent_or_sends_one() {
    use super::event::{
        Event, Front, OriginFilter, Publish, RetainedOnSubscribe, SessionOpen, Subscription, Target,
    };
    let mut pair = Pair::asking();
    let session = pair.hub.open(5);
    pair.hub.apply(Event::Subscribed {
        session,
        token: 1,
        subscriptions: vec![Subscription {
            id: 1,
            origin: OriginFilter::AnyNode,
            filter: codec::Filter::parse("#").unwrap(),
            qos: 0,
            group: None,
            no_local: false,
            retain_as_published: false,
            retained: RetainedOnSubscribe::DoNotSend,
            wildcard_matches_dollar: true,
            identifier: 0,
        }],
    });
    pair.hub.read(session);
    pair.ask(intent("i1", "fleet", KEY, Some("2"), Seen::Any));
    pair.quiet();
    assert_eq!(pair.answer("i1"), Some(IntentOutcome::Applied));
    assert_eq!(pair.hub.owed.get(&session), None, "a client was given an intent");
    let open = SessionOpen {
        session: super::event::SessionId(6),
        front: Front::Nats,
        client_id: "".into(),
        clean_start: true,
        expiry_s: 0,
        receive_max: 8,
        will: None,
    };
    pair.hub.apply(Event::SessionOpened(open));
    let body = codec::encode(&proto::Intent {
        id: "forged".into(),
        space: "twin".into(),
        key: "a".into(),
        value: Some(Bytes::from_static(b"x")),
        any: true,
        ..proto::Intent::default()
    });
    let parts =
        codec::FrameParts { topic: super::intent::TOPIC, payload: &body, ..codec::FrameParts::default() };
    let message = Publish {
        target: Target::Node("n1".into()),
        frame: parts.encode(),
        qos: 1,
        packet_id: 1,
        dup: false,
        retain: false,
        reply: None,
    };
    pair.hub.apply(Event::Published { session: super::event::SessionId(6), messages: vec![message] });
    pair.quiet();
    assert_eq!(pair.node.keys("n1", "twin", ""), Vec::<String>::new());
}
