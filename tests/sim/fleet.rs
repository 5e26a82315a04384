//! What the tier wants of its nodes: objects, a want for each node, the barrier, an operator who accepts.

use std::collections::{BTreeMap, BTreeSet};

use broker::core::event::{Command, Expect, Response, StateChange, StateOp};
use codec::proto;
use octobus_tests::script::{How, NAMES, NODES, Who};

use crate::{host::Host, shadow::rule};

/// Objects that there may be.
const OBJECTS: u8 = 8;

/// What the source of `fleet` says, whatever became of the hub's copy of it.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    objects: BTreeMap<u8, String>,
    wants: BTreeMap<Who, u8>,
    /// All that a node was ever wanted to have.
    ever: BTreeMap<Who, u8>,
    changes: u64,
}

fn key(object: u8) -> String {
    format!("obj/core/pods/default/p{object}")
}

fn of_mask(mask: u8) -> BTreeSet<String> {
    (0..OBJECTS).filter(|object| mask & (1 << object) != 0).map(key).collect()
}

fn op(key: String, change: StateChange) -> StateOp {
    StateOp { space: "fleet".into(), key, change, expect: Expect::Any }
}

fn want_of(node: Who, mask: u8) -> StateOp {
    let want = proto::Want { keys: of_mask(mask).into_iter().collect() };
    op(format!("want/{}", NAMES[node]), StateChange::Put(codec::encode(&want)))
}

impl Fleet {
    /// The source changes an object.
    pub(crate) fn object(&mut self, object: u8, how: How) -> Command {
        let object = object % OBJECTS;
        self.changes += 1;
        let change = if how == How::Delete {
            self.objects.remove(&object);
            StateChange::Delete
        } else {
            let value = format!("spec {}", self.changes);
            self.objects.insert(object, value.clone());
            StateChange::Put(value.into())
        };
        Command::StateWrite(vec![op(key(object), change)])
    }

    /// The source wants something else of a node.
    pub(crate) fn want(&mut self, node: Who, mask: u8) -> Command {
        self.wants.insert(node, mask);
        *self.ever.entry(node).or_default() |= mask;
        Command::StateWrite(vec![want_of(node, mask)])
    }

    pub(crate) fn accept(node: Who) -> Command {
        Command::StateWrite(vec![op(format!("accept/{}", NAMES[node]), StateChange::Put(b"yes"[..].into()))])
    }

    pub(crate) fn barrier() -> Command {
        Command::StateBarrier { space: "fleet".into() }
    }

    /// A node is given an object.
    pub(crate) fn given(&self, node: Who, key: &str) {
        let ever = of_mask(self.ever.get(&node).copied().unwrap_or_default());
        rule!(
            !key.starts_with("obj/") || ever.contains(key),
            "a_node_gets_only_what_is_wanted_of_it",
            "{key} at {}",
            NAMES[node]
        );
    }

    /// The source is listed once more: what the hub has differently is written, then the barrier.
    pub(crate) fn list(&self, hub: &mut Host, now: std::time::Duration) {
        let mut wanted: Vec<StateOp> = (0..OBJECTS)
            .map(|object| match self.objects.get(&object) {
                Some(value) => op(key(object), StateChange::Put(value.clone().into())),
                None => op(key(object), StateChange::Delete),
            })
            .collect();
        wanted
            .extend((0..NODES).map(|node| want_of(node, self.wants.get(&node).copied().unwrap_or_default())));
        for op in wanted {
            let get = Command::StateGet { origin: "".into(), space: "fleet".into(), key: op.key.clone() };
            let Response::Entry(held) = hub.ask(now, get) else { panic!("an entry") };
            let same = match (&op.change, &held) {
                (StateChange::Put(value), Some(held)) => held.value() == *value,
                (StateChange::Delete, None) => true,
                _ => false,
            };
            if !same {
                hub.command(now, Command::StateWrite(vec![op]));
            }
        }
        hub.command(now, Self::barrier());
    }

    /// In the end a node has exactly what is wanted of it, as the hub has it.
    pub(crate) fn check(&self, node: Who, at: &Host, hub: &Host) {
        let wanted = of_mask(self.wants.get(&node).copied().unwrap_or_default());
        let there = hub.disk.shadow.live("", "fleet");
        let objects = |live: BTreeMap<&str, (_, u32)>| -> BTreeMap<String, u32> {
            let objects = live.into_iter().filter(|(key, _)| key.starts_with("obj/"));
            objects.map(|(key, (_, crc))| (key.to_owned(), crc)).collect()
        };
        let here = objects(at.disk.shadow.live("", "fleet"));
        let mut expected = objects(there);
        expected.retain(|key, _| wanted.contains(key));
        rule!(
            here == expected,
            "a_node_has_what_is_wanted_of_it",
            "{} has {here:?}, not {expected:?}",
            at.name
        );
        let known: BTreeSet<String> = self.objects.keys().map(|object| key(*object)).collect();
        let held: BTreeSet<String> = objects(hub.disk.shadow.live("", "fleet")).into_keys().collect();
        rule!(held == known, "the_hub_has_what_its_source_lists", "{held:?}, not {known:?}");
    }
}
