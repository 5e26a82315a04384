//! What concerns one receiver of a space that each sees only in part: `fleet`.
//!
//! | key | concerns |
//! |---|---|
//! | `want/<n>` | node n: the keys that it must have, and beside these rows all that it may have |
//! | `accept/<n>` | node n: an operator accepts what `want` or `barrier` take away at once |
//! | `intent-result/<n>/<id>` | node n: what became of its intent |
//! | `barrier` | every node: the owner has listed its source completely |
//! | any other | the nodes whose `want` lists it |
//!
//! The owner remembers at which revision a key was listed, so that a node which was away gets what is new in
//! its want although the object itself is old. This is kept in memory: after a restart of the owner, all
//! that a changed want lists is sent once more.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use codec::{Flags, Kind, Record, RecordHeader, frame::FrameParts, proto};

use super::{BARRIER, Pair, Space, Version};
use crate::{
    core::{event::Origin, few::Few},
    limits,
};

pub(in crate::core) const WANT: &str = "want/";
pub(in crate::core) const ACCEPT: &str = "accept/";
pub(in crate::core) const INTENT_RESULT: &str = "intent-result/";

/// Keys that left a want of late and may be told as deleted.
const DELISTED_MAX: usize = 256;

/// True of the one space whose receivers each get a part of it.
pub(super) fn is_scoped(origin: &str, name: &str) -> bool {
    origin.is_empty() && name == "fleet"
}

/// The keys that a value of `want/<n>` lists.
pub(in crate::core) fn listed(value: &[u8]) -> Result<BTreeSet<String>, String> {
    let want: proto::Want =
        codec::decode(Bytes::copy_from_slice(value)).map_err(|error| format!("not a want: {error}"))?;
    if want.keys.len() > limits::WANT_KEYS_MAX {
        return Err(format!("a want of more than {} keys", limits::WANT_KEYS_MAX));
    }
    if let Some(key) = want.keys.iter().find(|key| is_reserved(key)) {
        return Err(format!("{key:?} cannot be wanted: it concerns whom its name says"));
    }
    for key in &want.keys {
        codec::topic::validate_topic(key).map_err(|error| format!("{key:?} is no key: {error}"))?;
    }
    Ok(want.keys.into_iter().collect())
}

fn is_reserved(key: &str) -> bool {
    key == BARRIER || [WANT, ACCEPT, INTENT_RESULT].iter().any(|prefix| key.starts_with(prefix))
}

/// The wants of all nodes, at their owner.
#[derive(Debug, Default)]
pub(in crate::core) struct Scopes {
    nodes: BTreeMap<Origin, Scope>,
    listed_by: BTreeMap<Arc<str>, Few<Origin, ()>>,
}

#[derive(Debug, Default)]
struct Scope {
    /// With the revision at which each was listed, or one after it.
    keys: Few<Arc<str>, u64>,
    /// With the revision at which each left. Bounded.
    delisted: Few<Arc<str>, u64>,
}

impl Scopes {
    /// The node's want is this now.
    pub(super) fn set(&mut self, node: &str, keys: &BTreeSet<String>, revision: u64) {
        let node: Origin = node.into();
        let scope = self.nodes.entry(Arc::clone(&node)).or_default();
        let gone: Vec<Arc<str>> = scope.keys.keys().filter(|key| !keys.contains(&***key)).cloned().collect();
        for key in gone {
            scope.keys.remove::<str>(&key);
            if let Some(nodes) = self.listed_by.get_mut(&key) {
                nodes.remove::<str>(&node);
                if nodes.is_empty() {
                    self.listed_by.remove(&key);
                }
            }
            scope.delisted.insert(key, revision);
        }
        while scope.delisted.len() > DELISTED_MAX {
            let oldest = scope.delisted.iter().min_by_key(|(_, revision)| **revision);
            let oldest = oldest.map(|(key, _)| Arc::clone(key)).expect("beyond a bound is not empty");
            scope.delisted.remove::<str>(&oldest);
        }
        for key in keys {
            if scope.keys.contains_key(&**key) {
                continue;
            }
            let held = self.listed_by.get_key_value(&**key).map(|(held, _)| Arc::clone(held));
            let key: Arc<str> = held.unwrap_or_else(|| key.as_str().into());
            scope.delisted.remove::<str>(&key);
            scope.keys.insert(Arc::clone(&key), revision);
            self.listed_by.entry(key).or_default().insert(Arc::clone(&node), ());
        }
    }
}

/// In which order what is due is sent: what is deleted stands before the want that no longer lists it, so
/// that it counts as deleted; the want before what it lists; the barrier after everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::core) enum Turn {
    Accept,
    Deleted,
    Want,
    Entry,
    Barrier,
}

impl Turn {
    pub(in crate::core) fn of(key: &str) -> Self {
        match key {
            BARRIER => Self::Barrier,
            _ if key.starts_with(WANT) => Self::Want,
            _ if key.starts_with(ACCEPT) => Self::Accept,
            _ => Self::Entry,
        }
    }
}

/// Of the owner.
impl Space {
    /// Keeps the index of wants as a durable change says.
    pub(super) fn follow_want(&mut self, key: &str, version: &Version) {
        let Some(node) = key.strip_prefix(WANT).filter(|_| self.owned && self.scoped) else { return };
        let keys = if version.tombstone { Ok(BTreeSet::new()) } else { listed(version.payload()) };
        // One that cannot be read was refused when it was written.
        if let Ok(keys) = keys {
            self.scopes.get_or_insert_default().set(node, &keys, version.local);
        }
    }

    fn scope(&self, node: &str) -> Option<&Scope> {
        self.scopes.as_ref()?.nodes.get(node)
    }

    /// The nodes whose want lists this key.
    pub(in crate::core) fn listing(&self, key: &str) -> impl Iterator<Item = &Origin> {
        self.scopes.iter().filter_map(|scopes| scopes.listed_by.get(key)).flat_map(Few::keys)
    }

    /// What a node that holds its part up to `position` lacks. Costs nothing if nothing changed, and a
    /// look-up per key of its want if anything did.
    pub(in crate::core) fn lacking(&self, node: &str, position: Pair) -> BTreeSet<(Turn, Arc<str>)> {
        let same = position.0 == self.at.0;
        if same && position.1 >= self.seen {
            return BTreeSet::new();
        }
        let since = if same { position.1 } else { 0 };
        let mut due = BTreeSet::new();
        let mut look = |key: &str, listed: u64| {
            let Some((key, entry)) = self.entries.get_key_value(key) else { return };
            let moved = entry.visible().is_some_and(|version| version.local.max(listed) > since);
            if moved {
                due.insert((Turn::of(key), Arc::clone(key)));
            }
        };
        look(BARRIER, 0);
        look(&format!("{ACCEPT}{node}"), 0);
        look(&format!("{WANT}{node}"), 0);
        let results = format!("{INTENT_RESULT}{node}/");
        for (key, _) in self.range(&results, None) {
            look(key, 0);
        }
        let Some(scope) = self.scope(node) else { return due };
        for (key, listed) in scope.keys.iter() {
            look(key, *listed);
        }
        // What was deleted so long ago that no tombstone is left is told by name.
        let behind = same && position.1 > 0 && position < self.horizon.pair;
        let unknown = |key: &&Arc<str>| behind && !self.entries.contains_key(&***key);
        due.extend(scope.keys.keys().filter(unknown).map(|key| (Turn::Entry, Arc::clone(key))));
        let left = scope.delisted.iter().filter(|(_, left)| **left > since);
        due.extend(left.map(|(key, _)| (Turn::Deleted, Arc::clone(key))));
        due
    }

    /// What a change of a node's want makes due, the want itself included.
    pub(in crate::core) fn moved_by_want(&self, node: &str, revision: u64) -> BTreeSet<(Turn, Arc<str>)> {
        let mut due = BTreeSet::from([(Turn::Want, format!("{WANT}{node}").into())]);
        let Some(scope) = self.scope(node) else { return due };
        let new = scope.keys.iter().filter(|(_, listed)| **listed == revision);
        due.extend(new.map(|(key, _)| (Turn::Entry, Arc::clone(key))));
        let left = scope.delisted.iter().filter(|(_, left)| **left == revision);
        due.extend(left.map(|(key, _)| (Turn::Deleted, Arc::clone(key))));
        due
    }

    /// What is to be sent to a node of a key that is due; `None` if it does not concern the node any more.
    pub(in crate::core) fn part(&self, node: &str, turn: Turn, key: &str) -> Option<Record> {
        let version = self.visible(key);
        let scope = self.scope(node);
        if turn == Turn::Deleted {
            return version.filter(|version| version.tombstone).map(|version| self.record_of(version));
        }
        let listed = scope.is_some_and(|scope| scope.keys.contains_key(key));
        match version {
            Some(version) if listed || is_reserved(key) => Some(self.record_of(version)),
            None if listed && self.horizon.pair.0 == self.at.0 => Some(self.long_gone(key)),
            _ => None,
        }
    }

    /// A tombstone of a key whose own was forgotten: above every pair that the key ever had.
    fn long_gone(&self, key: &str) -> Record {
        let header = RecordHeader {
            kind: Kind::TOMBSTONE,
            class: self.class as u8,
            flags: Flags::default(),
            source: 0,
            epoch: self.horizon.pair.0,
            seq: self.horizon.pair.1,
            aux: 0,
        };
        Record { header, body: FrameParts { topic: key, ..FrameParts::default() }.encode() }
    }
}

/// What a replica is to let go, by its want and its owner's barrier.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::core) struct Removal {
    pub(in crate::core) keys: Vec<Arc<str>>,
    /// Workloads among them, and workloads held.
    pub(in crate::core) workloads: (usize, usize),
    /// The greatest pair that demands it.
    pub(in crate::core) by: Pair,
}

impl Removal {
    /// More than half of the node's workloads would go at once.
    pub(in crate::core) fn is_large(&self) -> bool {
        self.workloads.0 * 2 > self.workloads.1
    }
}

/// Of the replica at node `node`.
impl Space {
    /// The pair of the owner's barrier, if it stands in the incarnation that this replica has met last.
    pub(in crate::core) fn barrier_of_now(&self) -> Option<Pair> {
        let barrier = self.latest(BARRIER)?;
        (barrier.pair.0 == self.at.0).then_some(barrier.pair)
    }

    /// What goes: with a barrier of the current incarnation, everything that an older one left and everything
    /// that is not listed. Before it, only what this incarnation's want first listed and then did not.
    pub(in crate::core) fn removal(&self, node: &str) -> Removal {
        let want = self.latest(&format!("{WANT}{node}"));
        let want = want.filter(|want| want.pair.0 == self.at.0);
        let Ok(wanted) = want.map_or(Ok(BTreeSet::new()), |want| listed(want.payload())) else {
            return Removal::default(); // of a newer owner: nothing can be concluded
        };
        let barrier = self.barrier_of_now();
        let by = barrier.unwrap_or_default().max(want.map_or((0, 0), |want| want.pair));
        let mut removal = Removal { by, ..Removal::default() };
        for (key, entry) in self.entries.iter().filter(|(_, entry)| !entry.latest.tombstone) {
            let workload = usize::from(is_workload(key));
            removal.workloads.1 += workload;
            let stale = entry.latest.pair.0 < self.at.0;
            let unlisted = !is_reserved(key) && !wanted.contains(&**key);
            let goes = match barrier {
                Some(_) => stale || unlisted,
                None => unlisted && !stale && want.is_some(),
            };
            if goes {
                removal.workloads.0 += workload;
                removal.keys.push(Arc::clone(key));
            }
        }
        removal
    }

    /// True if an operator has accepted what is demanded up to this pair.
    pub(in crate::core) fn accepts(&self, node: &str, by: Pair) -> bool {
        self.latest(&format!("{ACCEPT}{node}")).is_some_and(|accept| accept.pair > by)
    }

    /// The owner has listed its source, and everything that concerns this broker is here.
    pub(in crate::core) fn is_complete(&self, own: &str) -> bool {
        if self.owned {
            return !self.elsewhere || self.is_whole();
        }
        if !self.scoped {
            return self.complete_in == self.at.0;
        }
        let barrier = self.visible(BARRIER).filter(|held| !held.tombstone && held.pair.0 == self.at.0);
        let Some(barrier) = barrier else { return false };
        let want = self.visible(&format!("{WANT}{own}")).filter(|want| !want.tombstone);
        let Ok(wanted) = want.map_or(Ok(BTreeSet::new()), |want| listed(want.payload())) else {
            return false;
        };
        let arrived = |key: &String| self.visible(key).is_some_and(|held| held.pair.0 == self.at.0);
        self.synced >= barrier.pair && wanted.iter().all(arrived)
    }

    #[cfg(test)]
    pub(in crate::core) fn wanted_by(&self, node: &str) -> BTreeSet<String> {
        let want = self.latest(&format!("{WANT}{node}"));
        want.and_then(|want| listed(want.payload()).ok()).unwrap_or_default()
    }

    /// Keys whose tombstones answer for them: listed, and known not to exist.
    pub(in crate::core) fn answered_for(&self, own: &str) -> BTreeSet<String> {
        let want = self.latest(&format!("{WANT}{own}")).filter(|_| self.scoped && !self.owned);
        want.and_then(|want| listed(want.payload()).ok()).unwrap_or_default()
    }
}

/// A node's workloads, by which a removal is judged: its pods.
fn is_workload(key: &str) -> bool {
    key.starts_with("obj/core/pods/")
}
