//! A node's part of space `fleet`: wants, barriers, removals, resumes, wiped and restored hubs.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Kind, proto};
use proptest::prelude::*;

use super::{
    event::{Command, Expect, Response, StateEvent, StateOp},
    test_host::{self, Host, Pair},
};

const PODS: &str = "obj/core/pods/default/";

fn put(key: &str, value: &str) -> StateOp {
    test_host::op("fleet", key, Some(Bytes::copy_from_slice(value.as_bytes())), Expect::Any)
}

fn delete(key: &str) -> StateOp {
    test_host::op("fleet", key, None, Expect::Any)
}

fn want(node: &str, keys: &[&str]) -> StateOp {
    let want = proto::Want { keys: keys.iter().map(|key| (*key).to_owned()).collect() };
    test_host::op("fleet", &format!("want/{node}"), Some(codec::encode(&want)), Expect::Any)
}

fn pods(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| format!("{PODS}{name}")).collect()
}

impl Pair {
    fn at_hub(&mut self, ops: Vec<StateOp>) {
        let answer = self.hub.write(ops);
        assert!(matches!(answer, Response::Written(_)), "{answer:?}");
        self.quiet();
    }

    fn barrier(&mut self) {
        let answer = self.hub.run(Command::StateBarrier { space: "fleet".into() });
        assert!(matches!(answer, Response::Written(_)), "{answer:?}");
        self.quiet();
    }

    /// Pods that the node holds.
    fn held(&mut self) -> Vec<String> {
        self.node.keys("", "fleet", "obj/")
    }

    fn is_held_back(&mut self) -> bool {
        self.node.conditions().iter().any(|condition| condition.kind == "RemovalHeld")
    }

    /// A linked node that runs these pods, after a barrier.
    fn running(names: &[&str]) -> Self {
        let mut pair = Self::new();
        let keys = pods(names);
        let mut ops: Vec<StateOp> = keys.iter().map(|key| put(key, "spec")).collect();
        ops.push(want("n1", &keys.iter().map(String::as_str).collect::<Vec<_>>()));
        pair.at_hub(ops);
        pair.link_up();
        pair.barrier();
        assert_eq!(pair.held(), keys);
        pair
    }

    fn relink(&mut self) {
        self.link_up();
        self.quiet();
    }
}

/// True if a watch that starts now is told `Synced` at once.
fn is_synced(host: &mut Host) -> bool {
    let session = host.open(7);
    assert!(matches!(host.watch_of(session, "fleet", &[""], None, false), Response::Done));
    host.read(session);
    let synced = host.seen.remove(&session).unwrap_or_default();
    host.apply(super::event::Event::SessionClosed { session, clean: true });
    synced.iter().any(|event| matches!(event, StateEvent::Synced { .. }))
}

#[test]
fn what_is_held_back_stays_so_when_others_arrive_beside_it() {
    let mut pair = Pair::running(&["a", "b", "c", "d"]);
    let kept = pods(&["d"]);
    pair.at_hub(vec![want("n1", &[&kept[0]])]);
    pair.quiet();
    assert!(pair.is_held_back());
    // Ten more: the three that are to go are no longer most of what is there.
    let more = pods(&["e", "f", "g", "h", "i", "j", "k", "l", "m", "n"]);
    let mut ops: Vec<StateOp> = more.iter().map(|key| put(key, "spec")).collect();
    let listed: Vec<&str> = kept.iter().chain(&more).map(String::as_str).collect();
    ops.push(want("n1", &listed));
    pair.at_hub(ops);
    pair.quiet();
    pair.at_hub(vec![put("obj/core/pods/default/e", "changed"), want("n1", &listed)]);
    pair.quiet();
    assert!(pair.is_held_back());
    assert_eq!(pair.held().len(), 14);
    pair.node.restart();
    assert_eq!(pair.held().len(), 14, "a restart is no acceptance");
    pair.relink();
    pair.at_hub(vec![put("accept/n1", "")]);
    pair.quiet();
    assert!(!pair.is_held_back());
    assert_eq!(pair.held().len(), 11);
}

#[test]
fn a_node_gets_its_want_and_what_that_lists_and_nothing_else() {
    let mut pair = Pair::new();
    pair.link_up();
    pair.at_hub(vec![
        put("obj/core/pods/default/a", "a"),
        put("obj/core/pods/default/b", "b"),
        put("obj/core/secrets/default/other", "secret"),
        want("n1", &["obj/core/pods/default/a"]),
        want("n2", &["obj/core/secrets/default/other", "obj/core/pods/default/b"]),
    ]);
    assert_eq!(pair.node.keys("", "fleet", ""), ["obj/core/pods/default/a", "want/n1"]);
    // A change of what is listed arrives, of what is not does not.
    pair.at_hub(vec![put("obj/core/pods/default/a", "a2"), put("obj/core/pods/default/b", "b2")]);
    assert_eq!(
        pair.node.list_of("", "fleet", "obj/", None, 9).unwrap().0,
        [("obj/core/pods/default/a".to_owned(), "a2".to_owned())]
    );
    let keys = pair.sent_down.iter().filter(|record| record.header.kind == Kind::PUT);
    let keys: Vec<String> = keys
        .map(|record| codec::FrameView::parse(&record.body).unwrap().topic().to_owned())
        .filter(|key| key.contains("secret") || key.ends_with("/b") || key == "want/n2")
        .collect();
    assert_eq!(keys, Vec::<String>::new(), "left the hub for a node that it does not concern");
}

#[test]
fn what_a_newer_want_ceases_to_list_goes_and_may_come_back_as_it_was() {
    let mut pair = Pair::running(&["a", "b", "c"]);
    let [a, b, c] = &pods(&["a", "b", "c"])[..] else { unreachable!() };
    pair.at_hub(vec![want("n1", &[a, b])]);
    assert_eq!(pair.held(), [a.clone(), b.clone()]);
    pair.at_hub(vec![want("n1", &[a, b, c])]);
    assert_eq!(pair.held(), [a.clone(), b.clone(), c.clone()], "an unchanged object is listed again");
    // The same while the node is away.
    pair.link_down();
    pair.at_hub(vec![want("n1", &[a, c])]);
    pair.relink();
    assert_eq!(pair.held(), [a.clone(), c.clone()]);
    pair.link_down();
    pair.at_hub(vec![want("n1", &[a, b, c])]);
    pair.node.restart();
    pair.relink();
    assert_eq!(pair.held(), [a.clone(), b.clone(), c.clone()]);
}

#[test]
fn synced_waits_for_the_barrier_and_for_everything_that_the_want_lists() {
    let mut pair = Pair::new();
    pair.link_up();
    pair.at_hub(vec![put("obj/core/pods/default/a", "a"), want("n1", &["obj/core/pods/default/a"])]);
    assert!(!is_synced(&mut pair.node), "before the barrier");
    pair.barrier();
    assert!(is_synced(&mut pair.node));
    pair.at_hub(vec![want("n1", &["obj/core/pods/default/a", "obj/core/configmaps/default/late"])]);
    assert!(!is_synced(&mut pair.node), "something listed has not arrived");
    pair.at_hub(vec![put("obj/core/configmaps/default/late", "x")]);
    assert!(is_synced(&mut pair.node));
    // A node that restarts with no hub in reach knows what it has.
    pair.link_down();
    pair.node.restart();
    assert!(is_synced(&mut pair.node));
}

#[test]
fn a_resume_costs_what_changed_of_the_part() {
    let mut pair = Pair::new();
    let keys: Vec<String> =
        (0..300).map(|number| format!("obj/core/configmaps/default/{number:03}")).collect();
    let mut ops: Vec<StateOp> = keys.iter().map(|key| put(key, "x")).collect();
    let listed: Vec<&str> = keys[..200].iter().map(String::as_str).collect();
    ops.push(want("n1", &listed));
    pair.at_hub(ops);
    pair.barrier();
    pair.relink();
    assert_eq!(pair.held().len(), 200);
    pair.relink();
    assert_eq!(pair.sent_down.len(), 0, "nothing moved");
    pair.link_down();
    pair.at_hub(keys[250..].iter().map(|key| put(key, "y")).collect());
    pair.relink();
    assert_eq!(pair.sent_down.len(), 1, "what moved is not this node's: its position alone");
    pair.link_down();
    let listed: Vec<&str> = keys[..201].iter().map(String::as_str).collect();
    pair.at_hub(vec![put(&keys[3], "y"), put(&keys[4], "y"), want("n1", &listed)]);
    pair.relink();
    // Two objects, the want, an old object that is newly listed, the position.
    assert_eq!(pair.sent_down.len(), 5);
    assert_eq!(pair.held().len(), 201);
    pair.link_down();
    pair.hub.restart();
    pair.at_hub(vec![put(&keys[5], "y")]);
    pair.relink();
    assert_eq!(pair.sent_down.len(), 2, "a restart of the hub costs nothing where the want did not move");
}

#[test]
fn a_link_that_drops_in_the_middle_loses_nothing_that_is_newly_listed() {
    for cut in 0..12 {
        let mut pair = Pair::running(&["a"]);
        let keys: Vec<String> =
            (0..40).map(|number| format!("obj/core/configmaps/default/{number}")).collect();
        // Large enough for several windows, older than the want that lists them.
        let value = "x".repeat(20_000);
        pair.link_down();
        for chunk in keys.chunks(20) {
            pair.at_hub(chunk.iter().map(|key| put(key, &value)).collect());
        }
        pair.relink();
        let mut listed: Vec<&str> = keys.iter().map(String::as_str).collect();
        listed.push("obj/core/pods/default/a");
        pair.hub.write(vec![want("n1", &listed)]);
        pair.carry(cut);
        pair.node.persist();
        pair.carry(cut / 2);
        pair.link_down();
        pair.node.restart();
        pair.relink();
        assert_eq!(pair.held().len(), 41, "cut after {cut} messages");
        assert!(is_synced(&mut pair.node));
    }
}

#[test]
fn a_wiped_hub_removes_nothing_before_its_barrier() {
    let mut pair = Pair::running(&["a", "b", "c"]);
    let all = pods(&["a", "b", "c"]);
    pair.wipe_hub();
    pair.relink();
    assert_eq!(pair.held(), all, "an empty hub says nothing");
    // It learns of things in some order; a first want knows of one pod only.
    pair.at_hub(vec![put(&all[0], "spec"), want("n1", &[&all[0]])]);
    assert_eq!(pair.held(), all, "before the barrier");
    assert!(!is_synced(&mut pair.node));
    pair.relink();
    pair.node.restart();
    pair.relink();
    assert_eq!(pair.held(), all);
    pair.at_hub(vec![put(&all[1], "spec"), want("n1", &[&all[0], &all[1]])]);
    pair.barrier();
    assert_eq!(pair.held(), all[..2]);
    assert!(!pair.is_held_back(), "a third of the workloads is no large removal");
    assert!(is_synced(&mut pair.node));
}

#[test]
fn a_hub_put_back_to_an_older_copy_removes_nothing_before_its_barrier() {
    for minted in [true, false] {
        let mut pair = Pair::running(&["a", "b"]);
        let names = pods(&["a", "b", "c", "d"]);
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        // In the copy b is deleted, and stands there as a tombstone.
        pair.at_hub(vec![delete(all[1]), want("n1", &all[..1])]);
        let copy = pair.hub.store.copy();
        pair.at_hub(vec![put(all[1], "new"), put(all[2], "new"), put(all[3], "new"), want("n1", &all)]);
        assert_eq!(pair.held(), names);
        pair.link_down();
        // With the instance's fingerprint changed, or found out by the node's position alone.
        pair.hub.config.mint = minted;
        pair.hub.start_on(copy);
        pair.hub.config.mint = false;
        pair.relink();
        pair.at_hub(vec![put(all[0], "yesterday")]);
        assert_eq!(pair.held(), names, "minted: {minted}");
        assert!(!is_synced(&mut pair.node));
        pair.at_hub(vec![put(all[1], "new"), put(all[2], "new"), want("n1", &all[..3])]);
        assert_eq!(pair.held(), names);
        pair.barrier();
        assert_eq!(pair.held(), names[..3]);
    }
}

#[test]
fn a_hub_put_back_is_found_out_even_after_it_has_overtaken_the_node() {
    let mut pair = Pair::running(&["a", "b"]);
    let names = pods(&["a", "b", "c"]);
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let copy = pair.hub.store.copy();
    pair.hub.restart();
    pair.at_hub(vec![put(all[2], "new"), want("n1", &all)]);
    pair.relink();
    assert_eq!(pair.held(), names);
    pair.link_down();
    pair.hub.start_on(copy);
    // Nothing but other revisions of the same numbers: the node's position says nothing any more.
    for number in 0..20 {
        pair.at_hub(vec![put("obj/core/configmaps/default/x", &number.to_string())]);
    }
    pair.at_hub(vec![want("n1", &all[..2])]);
    pair.relink();
    assert_eq!(pair.held(), names, "removed before the barrier of a hub that was put back");
    assert!(!is_synced(&mut pair.node));
    pair.barrier();
    assert_eq!(pair.held(), names[..2]);
}

#[test]
fn a_node_put_back_is_found_out_even_after_it_has_overtaken_the_hub() {
    let mut pair = Pair::new();
    let status = |key: &str, value: &'static str| {
        test_host::op("status", key, Some(Bytes::from_static(value.as_bytes())), Expect::Any)
    };
    pair.link_up();
    pair.node.write(vec![status("a", "1"), status("b", "1")]);
    pair.quiet();
    let copy = pair.node.store.copy();
    pair.link_down();
    pair.node.restart();
    pair.node.write(vec![status("gone", "1"), status("b", "2")]);
    pair.relink();
    assert_eq!(pair.hub.keys("n1", "status", ""), ["a", "b", "gone"]);
    pair.link_down();
    pair.node.start_on(copy);
    for _ in 0..20 {
        pair.node.write(vec![status("other", "1")]);
    }
    pair.relink();
    assert_eq!(pair.hub.keys("n1", "status", ""), ["a", "b", "other"]);
    assert_eq!(
        pair.hub.list_of("n1", "status", "b", None, 9).unwrap().0,
        [("b".to_owned(), "1".to_owned())],
        "what the older copy holds is the truth now"
    );
}

#[test]
fn the_removal_of_more_than_half_waits_for_an_operator_and_survives_a_restart() {
    let mut pair = Pair::running(&["a", "b", "c"]);
    let names = pods(&["a", "b", "c"]);
    pair.at_hub(vec![want("n1", &[&names[0]])]);
    assert_eq!(pair.held(), names);
    assert!(pair.is_held_back());
    // The hub can read it, too.
    assert_eq!(pair.hub.keys("n1", "status", "condition/"), ["condition/RemovalHeld"]);
    pair.link_down();
    pair.node.restart();
    assert!(pair.is_held_back(), "forgotten by a restart");
    assert_eq!(pair.held(), names);
    pair.relink();
    pair.at_hub(vec![put("accept/n1", "")]);
    assert_eq!(pair.held(), names[..1]);
    assert!(!pair.is_held_back());
    assert_eq!(pair.hub.keys("n1", "status", "condition/"), Vec::<String>::new());
    // What was accepted was that, and not what comes later.
    pair.at_hub(vec![want("n1", &[])]);
    assert!(pair.is_held_back());
    // A want that lists them again ends it.
    pair.at_hub(vec![want("n1", &[&names[0]])]);
    assert!(!pair.is_held_back());
    assert_eq!(pair.held(), names[..1]);
}

#[test]
fn what_was_deleted_is_no_large_removal_whatever_the_order() {
    for away in [false, true] {
        let mut pair = Pair::running(&["a"]);
        let names = pods(&["a"]);
        if away {
            pair.link_down();
        }
        pair.at_hub(vec![want("n1", &[]), delete(&names[0])]);
        if away {
            pair.relink();
        }
        assert_eq!(pair.held(), Vec::<String>::new(), "away: {away}");
        assert!(!pair.is_held_back());
    }
}

#[test]
fn a_node_from_before_the_horizon_is_told_of_what_is_gone_by_name() {
    let mut pair = Pair::running(&["a", "b", "c"]);
    let names = pods(&["a", "b", "c"]);
    pair.link_down();
    // Deleted, still listed, and so long ago that no tombstone is left.
    pair.at_hub(vec![delete(&names[1])]);
    pair.hub.mono += Duration::from_mins(30);
    pair.node.mono += Duration::from_mins(30);
    pair.quiet();
    let space = pair.hub.core.existing_space(&"".into(), &Arc::from("fleet")).unwrap();
    assert!(!pair.hub.core.spaces[space].has_tombstones());
    pair.relink();
    assert_eq!(pair.held(), [names[0].clone(), names[2].clone()]);
    assert!(is_synced(&mut pair.node));
}

#[test]
fn a_hub_from_before_the_horizon_of_a_node_takes_everything_again_and_resurrects_nothing() {
    let mut pair = Pair::new();
    let status = |key: &str, value: Option<&str>| {
        test_host::op("status", key, value.map(|value| Bytes::copy_from_slice(value.as_bytes())), Expect::Any)
    };
    pair.link_up();
    pair.node.write(vec![status("a", Some("1")), status("b", Some("1")), status("c", Some("1"))]);
    pair.quiet();
    let copy = pair.hub.store.copy();
    pair.node.write(vec![status("b", None), status("c", Some("2"))]);
    pair.quiet();
    // The mark of the hub reaches the node's disk, and the tombstone is old enough to go.
    pair.node.mono += Duration::from_mins(5);
    pair.quiet();
    pair.node.mono += Duration::from_mins(30);
    pair.quiet();
    let space = pair.node.core.existing_space(&"n1".into(), &Arc::from("status")).unwrap();
    assert!(!pair.node.core.spaces[space].has_tombstones(), "acknowledged and old, and kept all the same");
    pair.link_down();
    pair.hub.start_on(copy);
    assert_eq!(pair.hub.keys("n1", "status", ""), ["a", "b", "c"]);
    pair.relink();
    assert_eq!(pair.hub.keys("n1", "status", ""), ["a", "c"]);
}

#[test]
fn a_tombstone_that_a_receiver_has_not_seen_is_kept() {
    let mut pair = Pair::new();
    let status = |key: &str, value: Option<&'static str>| {
        test_host::op("status", key, value.map(|value| Bytes::from_static(value.as_bytes())), Expect::Any)
    };
    pair.link_up();
    pair.node.write(vec![status("a", Some("1")), status("b", Some("1"))]);
    pair.quiet();
    pair.node.mono += Duration::from_mins(5);
    pair.quiet();
    pair.link_down();
    pair.node.write(vec![status("b", None)]);
    pair.node.mono += Duration::from_hours(100);
    pair.quiet();
    let space = pair.node.core.existing_space(&"n1".into(), &Arc::from("status")).unwrap();
    assert!(pair.node.core.spaces[space].has_tombstones());
    let incarnation = pair.node.core.spaces[space].at.0;
    pair.relink();
    assert_eq!(pair.hub.keys("n1", "status", ""), ["a"]);
    assert_eq!(pair.node.core.spaces[space].at.0, incarnation, "nothing had to be told again");
}

/// What may happen to a hub and a node.
#[derive(Debug, Clone)]
enum Step {
    Put(u8, u8),
    Delete(u8),
    Want(Vec<u8>),
    Accept,
    Barrier,
    Link,
    Cut,
    Carry(u8),
    PersistNode,
    PersistHub,
    RestartNode,
    RestartHub,
    WipeHub,
    Later,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0u8..8, 0u8..200).prop_map(|(key, value)| Step::Put(key, value)),
        3 => (0u8..8).prop_map(Step::Delete),
        4 => prop::collection::vec(0u8..8, 0..6).prop_map(Step::Want),
        2 => Just(Step::Accept),
        1 => Just(Step::Barrier),
        4 => Just(Step::Link),
        2 => Just(Step::Cut),
        8 => (1u8..6).prop_map(Step::Carry),
        4 => Just(Step::PersistNode),
        4 => Just(Step::PersistHub),
        1 => Just(Step::RestartNode),
        1 => Just(Step::RestartHub),
        1 => Just(Step::WipeHub),
        1 => Just(Step::Later),
    ];
    prop::collection::vec(step, 1..80)
}

fn key(number: u8) -> String {
    format!("obj/core/pods/default/{number}")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// However the link, the processes and the hub's disk come and go: no key's pair ever decreases at the
    /// node, no object is removed by a hub that has not written its barrier, and in the end the node holds
    /// exactly what its want lists.
    #[test]
    fn a_node_converges_and_never_goes_backwards(steps in steps()) {
        let mut pair = Pair::new();
        let mut pairs: BTreeMap<Arc<str>, ((u64, u64), bool)> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Put(number, value) => drop(pair.hub.ask(Command::StateWrite(vec![put(&key(number), &value.to_string())]))),
                Step::Delete(number) => drop(pair.hub.ask(Command::StateWrite(vec![delete(&key(number))]))),
                Step::Want(numbers) => {
                    let keys: Vec<String> = numbers.into_iter().map(key).collect();
                    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
                    pair.hub.ask(Command::StateWrite(vec![want("n1", &keys)]));
                }
                Step::Accept => drop(pair.hub.ask(Command::StateWrite(vec![put("accept/n1", "")]))),
                Step::Barrier => drop(pair.hub.ask(Command::StateBarrier { space: "fleet".into() })),
                Step::Link => pair.link_up(),
                Step::Cut => pair.link_down(),
                Step::Carry(messages) => pair.carry(messages.into()),
                Step::PersistNode => pair.node.persist(),
                Step::PersistHub => pair.hub.persist(),
                Step::RestartNode => {
                    pair.link_down();
                    pair.node.restart();
                    // What was not durable is taken again.
                    pairs.clear();
                }
                Step::RestartHub => {
                    pair.link_down();
                    pair.hub.restart();
                }
                Step::WipeHub => pair.wipe_hub(),
                Step::Later => {
                    pair.hub.mono += Duration::from_mins(15);
                    pair.node.mono += Duration::from_mins(15);
                    pair.hub.tick();
                    pair.node.tick();
                }
            }
            let Some(space) = pair.node.core.existing_space(&"".into(), &Arc::from("fleet")) else { continue };
            let space = &pair.node.core.spaces[space];
            for (key, held) in space.range("", None) {
                let now = (held.pair, !held.tombstone);
                let (before, was_live) = pairs.insert(Arc::clone(key), now).unwrap_or_default();
                prop_assert!(before <= held.pair, "{} went from {:?} to {:?}", key, before, held.pair);
                let removed = was_live && held.tombstone && key.starts_with("obj/");
                let unconfirmed = before.0 < space.at.0 && before == held.pair;
                prop_assert!(!removed || !unconfirmed || space.barrier_of_now().is_some(), "{} is gone", key);
            }
        }
        pair.quiet();
        pair.relink();
        // A barrier ends what is unconfirmed; whatever it takes away is accepted.
        pair.barrier();
        pair.at_hub(vec![put("accept/n1", "")]);
        pair.quiet();
        let at_hub = pair.hub.list_of("", "fleet", "obj/", None, 100).expect("now").0;
        let wanted = pair.hub.core.existing_space(&"".into(), &Arc::from("fleet"));
        let wanted = pair.hub.core.spaces[wanted.unwrap()].wanted_by("n1");
        let expected: Vec<(String, String)> =
            at_hub.into_iter().filter(|(key, _)| wanted.contains(key)).collect();
        let at_node = match pair.node.core.existing_space(&"".into(), &Arc::from("fleet")) {
            Some(_) => pair.node.list_of("", "fleet", "obj/", None, 100).expect("now").0,
            None => Vec::new(),
        };
        prop_assert_eq!(at_node, expected);
    }
}
