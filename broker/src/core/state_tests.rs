//! State against a model: lists, watches, writes, tombstones, restarts.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    WindowBounds,
    event::{Command, Event, Expect, Response, SessionId, StateChange, StateEvent, StateOp},
    test_host::{self, Host as Hub},
};

fn op(key: &str, value: Option<&str>, expect: Expect) -> StateOp {
    test_host::op("k8s", key, value.map(|value| Bytes::copy_from_slice(value.as_bytes())), expect)
}

fn put(key: &str, value: &str) -> StateOp {
    op(key, Some(value), Expect::Any)
}

fn wide() -> Option<WindowBounds> {
    Some(WindowBounds { changes: 1000, bytes: 1 << 20 })
}

/// Keys and the values that they get; none: deleted.
type Named = Vec<(String, Option<String>)>;
type Snapshot = BTreeMap<String, String>;

/// What the space held at each revision.
#[derive(Default)]
struct Model {
    /// By revision; the first is of the beginning.
    history: BTreeMap<u64, Snapshot>,
}

impl Model {
    fn at(&self, revision: u64) -> Vec<(String, String)> {
        let held =
            self.history.range(..=revision).next_back().map(|(_, held)| held.clone()).unwrap_or_default();
        held.into_iter().collect()
    }

    fn record(&mut self, revision: u64, key: &str, value: Option<&str>) {
        if revision == 0 {
            return;
        }
        let mut next: Snapshot = self.at(u64::MAX).into_iter().collect();
        match value {
            Some(value) => drop(next.insert(key.into(), value.into())),
            None => drop(next.remove(key)),
        }
        self.history.insert(revision, next);
    }

    fn last(&self) -> u64 {
        self.history.keys().next_back().copied().unwrap_or(0)
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<(u8, Option<u16>)>),
    Persist,
    Watch(u8),
    Read(u8),
    List { back: u8, limit: u8 },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = prop::collection::btree_map(0u8..12, prop::option::weighted(0.7, 0u16..999), 1..4);
    let step = prop_oneof![
        8 => write.prop_map(|ops| Step::Write(ops.into_iter().collect())),
        4 => Just(Step::Persist),
        2 => (0u8..8).prop_map(Step::Watch),
        3 => (0u8..8).prop_map(Step::Read),
        3 => (0u8..24, 1u8..7).prop_map(|(back, limit)| Step::List { back, limit }),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// The list as of any revision that the window reaches is what was there then, whatever its page size;
    /// a list and a watch from the next revision together miss nothing and repeat nothing, while the disk
    /// is slow, readers are slow and the process restarts.
    #[test]
    fn a_list_and_a_watch_from_its_revision_are_the_whole_truth(steps in steps(), changes in 4usize..40) {
        let mut hub = Hub::hub(Some(WindowBounds { changes, bytes: 1 << 20 }));
        let mut model = Model::default();
        let mut pending: Vec<(u64, Named)> = Vec::new();
        let mut watching: BTreeMap<u8, (SessionId, u64)> = BTreeMap::new();
        let mut sessions = 0;
        for step in steps {
            match step {
                Step::Write(ops) => {
                    let named: Named = ops
                        .iter()
                        .map(|(key, value)| (format!("k/{key}"), value.map(|value| value.to_string())))
                        .collect();
                    let ops = named.iter().map(|(key, value)| op(key, value.as_deref(), Expect::Any)).collect();
                    let answer = hub.ask(Command::StateWrite(ops));
                    let id = hub.commands;
                    if let Some(Response::Written(revisions)) = answer {
                        // Nothing was changed: deletions of what is not there.
                        prop_assert!(revisions.iter().all(|revision| *revision == 0));
                    } else {
                        pending.push((id, named));
                    }
                }
                Step::Persist => hub.persist(),
                Step::Watch(name) => {
                    let at = hub.list("", None, 5).expect("now is always known").1;
                    prop_assert_eq!(at, model.last(), "what is not durable was shown");
                    sessions += 1;
                    let session = hub.open(sessions);
                    let answer = hub.watch_of(session, "k8s", &["k/1", "k/", "k/2"], Some(at + 1), true);
                    prop_assert!(matches!(answer, Response::Done), "{answer:?}");
                    watching.insert(name, (session, at));
                }
                Step::Read(name) => {
                    if let Some((session, _)) = watching.get(&name) {
                        hub.read(*session);
                    }
                }
                Step::List { back, limit } => {
                    let at = model.last().saturating_sub(back.into());
                    match hub.list("k/", Some(at), limit.into()) {
                        Ok((held, _)) => prop_assert_eq!(held, model.at(at)),
                        Err(oldest) => prop_assert!(oldest > at, "known from {} but not {}", oldest, at),
                    }
                }
                Step::Restart => {
                    hub.restart();
                    pending.clear();
                    watching.clear();
                }
            }
            // What became durable, in order.
            pending.retain(|(id, ops)| match hub.responses.remove(id) {
                Some(Response::Written(revisions)) => {
                    for ((key, value), revision) in ops.iter().zip(revisions) {
                        model.record(revision, key, value.as_deref());
                    }
                    false
                }
                _ => true,
            });
        }
        hub.persist();
        for (id, ops) in pending {
            let Some(Response::Written(revisions)) = hub.responses.remove(&id) else { panic!("durable by now") };
            for ((key, value), revision) in ops.iter().zip(revisions) {
                model.record(revision, key, value.as_deref());
            }
        }
        for (session, from) in watching.into_values() {
            hub.read(session);
            let mut held: Snapshot = model.at(from).into_iter().collect();
            let mut at = from;
            for event in hub.seen.remove(&session).unwrap_or_default() {
                let text = |entry: &super::event::StateEntry| String::from_utf8_lossy(&entry.value()).into_owned();
                let (key, local, previous, value) = match &event {
                    StateEvent::Put { entry, previous } => (&entry.key, entry.local, previous, Some(text(entry))),
                    StateEvent::Deleted { key, local, previous, .. } => (key, *local, previous, None),
                    StateEvent::TooOld { .. } => break,
                    StateEvent::Synced { .. } => panic!("a watch from a revision has no list"),
                };
                prop_assert_eq!(local, at + 1, "missed or repeated");
                at = local;
                prop_assert_eq!(previous.as_ref().map(|entry| text(entry)), held.get(key).cloned());
                match value {
                    Some(value) => drop(held.insert(key.clone(), value)),
                    None => drop(held.remove(key)),
                }
                prop_assert_eq!(held.clone().into_iter().collect::<Vec<_>>(), model.at(at));
            }
            prop_assert_eq!(at, model.last());
        }
    }

    /// Without a window a slow watcher sees each key at its newest version, and ends up with the truth.
    #[test]
    fn a_slow_watch_without_a_window_converges(steps in steps()) {
        let mut hub = Hub::hub(None);
        let session = hub.open(1);
        hub.write(vec![put("k/0", "first")]);
        prop_assert!(matches!(hub.watch_of(session, "k8s", &[""], None, false), Response::Done));
        for step in steps {
            match step {
                Step::Write(ops) => {
                    let ops = ops.iter().map(|(key, value)| {
                        // Large values fill the outbox, so that the watch falls behind.
                        let value = value.map(|value| format!("{value}").repeat(1 + usize::from(value % 3) * 60_000));
                        op(&format!("k/{key}"), value.as_deref(), Expect::Any)
                    });
                    let ops = ops.collect();
                    hub.ask(Command::StateWrite(ops));
                }
                Step::Persist => hub.persist(),
                Step::Read(_) => hub.read(session),
                _ => {}
            }
        }
        hub.persist();
        hub.read(session);
        let mut held = Snapshot::new();
        let mut synced = 0;
        for event in &hub.seen[&session] {
            match event {
                StateEvent::Put { entry, .. } => {
                    held.insert(entry.key.clone(), String::from_utf8_lossy(&entry.value()).into_owned());
                }
                StateEvent::Deleted { key, .. } => drop(held.remove(key)),
                StateEvent::Synced { .. } => synced += 1,
                StateEvent::TooOld { .. } => panic!("nothing was forgotten"),
            }
        }
        prop_assert_eq!(synced, 1);
        prop_assert_eq!(held.into_iter().collect::<Vec<_>>(), hub.list("", None, 100).expect("now").0);
    }
}

#[test]
fn a_watch_from_before_the_restart_is_too_old_and_never_silently_incomplete() {
    let mut hub = Hub::hub(wide());
    for number in 0..5 {
        hub.write(vec![put("k/a", &number.to_string())]);
    }
    let session = hub.open(1);
    assert!(matches!(hub.watch_of(session, "k8s", &[""], Some(3), false), Response::Done));
    hub.restart();
    let session = hub.open(1);
    assert!(matches!(hub.watch_of(session, "k8s", &[""], Some(3), false), Response::TooOld { oldest: 6 }));
    assert_eq!(hub.list("", Some(4), 10), Err(5));
    assert!(matches!(hub.watch_of(session, "k8s", &[""], Some(6), false), Response::Done));
    assert!(
        matches!(hub.watch_of(session, "k8s", &[""], Some(8), false), Response::TooOld { .. }),
        "of the future"
    );
}

#[test]
fn a_watch_that_falls_behind_the_window_ends_with_a_reason_and_costs_no_memory() {
    let mut hub = Hub::hub(Some(WindowBounds { changes: 8, bytes: 64 << 20 }));
    let session = hub.open(1);
    assert!(matches!(hub.watch_of(session, "k8s", &[""], None, false), Response::Done));
    let large = "x".repeat(400_000);
    for number in 0..40 {
        hub.write(vec![put(&format!("k/{number}"), &large)]);
    }
    let queued = hub.owed[&session];
    assert!(
        queued < 2 * crate::limits::CLIENT_QUEUE_BYTES,
        "{queued} bytes wait for a reader that does not read"
    );
    hub.read(session);
    let last = hub.seen[&session].last();
    assert!(matches!(last, Some(StateEvent::TooOld { oldest: 33 })), "{last:?}");
}

#[test]
fn a_change_out_of_a_selector_shows_both_values() {
    let mut hub = Hub::hub(wide());
    let session = hub.open(1);
    hub.write(vec![put("k/a", "in")]);
    assert!(matches!(hub.watch_of(session, "k8s", &["k/"], Some(2), true), Response::Done));
    hub.write(vec![put("k/a", "out")]);
    hub.write(vec![op("k/a", None, Expect::Any)]);
    let [StateEvent::Put { entry, previous: Some(was) }, StateEvent::Deleted { previous: Some(last), .. }] =
        &hub.seen[&session][..]
    else {
        panic!("{:?}", hub.seen)
    };
    assert_eq!((&*entry.value(), &*was.value(), &*last.value()), (&b"out"[..], &b"in"[..], &b"out"[..]));
}

#[test]
fn a_write_of_several_keys_happens_whole_or_not_at_all() {
    let mut hub = Hub::hub(wide());
    let Response::Written(first) = hub.write(vec![put("k/a", "1"), put("k/b", "1")]) else { panic!() };
    assert_eq!(first, [1, 2], "each op has its revision");
    let mut check = op("k/b", None, Expect::Revision(2));
    check.change = StateChange::Check;
    let other_space = StateOp { space: "sys".into(), ..put("k/c", "2") };
    // The condition on a key that is not written fails: nothing happens, in no space.
    hub.write(vec![put("k/b", "2")]);
    let answer = hub.write(vec![put("k/a", "2"), other_space.clone(), check.clone()]);
    assert!(matches!(answer, Response::Conflict { index: 2, found: 3 }), "{answer:?}");
    assert_eq!(hub.list("", None, 9).unwrap().0, [("k/a".into(), "1".into()), ("k/b".into(), "2".into())]);
    check.expect = Expect::Revision(3);
    let Response::Written(revisions) = hub.write(vec![put("k/a", "2"), other_space, check]) else { panic!() };
    assert_eq!(revisions, [4, 1, 0]);
    // Deleting what is not there changes nothing.
    assert!(
        matches!(hub.write(vec![op("k/none", None, Expect::Any)]), Response::Written(none) if none == [0])
    );
}

#[test]
fn a_write_is_bounded_and_names_each_key_once() {
    let mut hub = Hub::hub(wide());
    let twice = vec![put("k/a", "1"), put("k/a", "2")];
    let many = (0..=crate::limits::STATE_OPS_MAX).map(|number| put(&format!("k/{number}"), "")).collect();
    let large = vec![put("k/a", &"x".repeat(crate::limits::STATE_VALUE_MAX + 1))];
    let heavy = (0..3).map(|number| put(&format!("k/{number}"), &"x".repeat(1_500_000))).collect();
    for ops in [twice, many, large, heavy, vec![put("k/#", "")]] {
        assert!(matches!(hub.write(ops), Response::Refused(_)));
    }
}

#[test]
fn memory_and_disk_stay_flat_while_keys_come_and_go() {
    let mut hub = Hub::hub(wide());
    let mut peak = 0;
    for round in 0..60 {
        for number in 0..500 {
            let key = format!("k/{round}/{number}");
            hub.ask(Command::StateWrite(vec![put(&key, "value")]));
            hub.ask(Command::StateWrite(vec![op(&key, None, Expect::Any)]));
        }
        hub.persist();
        hub.mono += Duration::from_mins(2);
        hub.apply(Event::TimerFired);
        hub.persist();
        if round >= 10 {
            peak = peak.max(hub.store.recover().state.len());
        }
    }
    // Ten minutes of tombstones, and those of the look before.
    assert!(peak <= 7 * 500, "{peak} records of State are kept");
    hub.mono += Duration::from_mins(20);
    for _bounded_part in 0..8 {
        hub.mono += Duration::from_millis(20);
        hub.apply(Event::TimerFired);
        hub.persist();
    }
    let space = hub.core.existing_space(&"".into(), &Arc::from("k8s")).unwrap();
    assert_eq!(hub.core.spaces[space].size(), (0, 0, 0));
    let before = hub.core.spaces[space].at;
    hub.restart();
    let space = hub.core.existing_space(&"".into(), &Arc::from("k8s")).unwrap();
    assert_eq!(hub.core.spaces[space].at, before, "a revision would be given twice");
    assert!(matches!(hub.write(vec![put("k/a", "")]), Response::Written(r) if r == [before.1 + 1]));
}

#[test]
fn tombstones_are_bounded_even_before_their_time() {
    let mut hub = Hub::hub(None);
    for number in 0..2 * crate::limits::TOMBSTONES_MAX {
        let key = format!("k/{number}");
        hub.ask(Command::StateWrite(vec![put(&key, "value")]));
        hub.ask(Command::StateWrite(vec![op(&key, None, Expect::Any)]));
        if number % 512 == 0 {
            hub.persist();
        }
    }
    hub.persist();
    let kept = hub.store.recover().state.len();
    assert!(kept <= crate::limits::TOMBSTONES_MAX * 5 / 4, "{kept} records of State are kept");
}
