//! What must hold across hosts, whatever happened; and what each fault may legitimately take.
//!
//! A promise holds as long as any disk holds what it is about. When a disk is lost, goes back in time or is
//! switched off, the oracle looks at the disks that are left: what none of them has is excused, and nothing
//! else is.

use std::collections::{BTreeMap, BTreeSet};

use broker::core::event::StateEvent;
use octobus_tests::script::{HUB, NAMES};

use crate::{
    fleet::Fleet,
    host::{At, Host},
    shadow::{Entry, LogShadow, News, Pair, rule},
};

/// Everything that was promised and seen so far.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// What nodes acknowledged, in order.
    acknowledged: Vec<Promise>,
    /// Down tags that the hub acknowledged, and their node.
    down: BTreeMap<String, usize>,
    /// Down tags that the subscriber of their node got.
    received: BTreeSet<String>,
    /// What the subscriber of a host still has to get.
    owed: BTreeMap<usize, BTreeSet<String>>,
    delivered: BTreeMap<usize, BTreeSet<String>>,
    /// Deliveries of QoS 2, by (host, life, client, stream, epoch, seq).
    effects: BTreeSet<(usize, u64, String, String, u64, u64)>,
    /// Greatest seq delivered to (host, life, session, stream, epoch, qos).
    order: BTreeMap<(usize, u64, u64, String, u64, u8), u64>,
    excused: BTreeSet<String>,
    /// Sent twice by their publishers.
    repeated: BTreeSet<String>,
    refused: BTreeSet<String>,
    /// What is wanted of nodes.
    pub(crate) fleet: Fleet,
    /// Dropped by a quota.
    dropped: BTreeSet<String>,
    /// Origins whose Logs may hold a message in more than one history.
    torn: BTreeSet<String>,
    /// Tombstones that owners wrote.
    tombstones: BTreeSet<(String, String, String, Pair)>,
    /// Barriers that arrived, by (host, life, origin, space, incarnation).
    barriers: BTreeSet<(usize, u64, String, String, u64)>,
    /// What watchers at a life of the hub saw: the newest pair of each key.
    pairs: BTreeMap<(u64, String, String), Pair>,
    /// What each watcher holds.
    mirrors: BTreeMap<String, BTreeMap<String, Pair>>,
}

/// An acknowledged publish.
#[derive(Debug)]
struct Promise {
    tag: String,
    host: usize,
    life: u64,
    origin: String,
}

impl Oracle {
    /// A publish is acknowledged: it is on the disk of who did it.
    pub(crate) fn acknowledged(&mut self, host: usize, at: &Host, tag: String) {
        rule!(at.disk.shadow.had(&tag), "no_acknowledgement_before_durability", "{tag} at {}", NAMES[host]);
        rule!(!self.refused.contains(&tag), "a_refused_publish_is_not_acknowledged", "{tag}");
        if host == HUB {
            let (node, _) = tag.split_once(':').expect("tags are place:topic#number");
            let node = NAMES.iter().position(|name| *name == node).expect("a node");
            self.down.insert(tag, node);
            return;
        }
        if !self.delivered.entry(host).or_default().contains(&tag) && !self.dropped.contains(&tag) {
            self.owed.entry(host).or_default().insert(tag.clone());
        }
        self.acknowledged.push(Promise { tag, host, life: at.life, origin: at.name.clone() });
    }

    pub(crate) fn refused(&mut self, tag: String) {
        if !self.repeated.contains(&tag) {
            self.refused.insert(tag);
        }
    }

    pub(crate) fn was_refused(&self, tag: &str) -> bool {
        self.refused.contains(tag)
    }

    pub(crate) fn repeated(&mut self, tag: String) {
        self.repeated.insert(tag);
    }

    /// A subscriber got something.
    pub(crate) fn delivered(
        &mut self,
        host: usize,
        at: &Host,
        client: &str,
        payload: &str,
        qos: u8,
        place: Option<&At>,
    ) {
        if host == HUB {
            rule!(!payload.contains(":down#"), "what_came_down_never_goes_up", "the hub was given {payload}");
            return;
        }
        let from = payload.split(':').next().unwrap_or_default();
        let own = NAMES.iter().position(|name| *name == from).is_some_and(|from| {
            NAMES[from] == at.name || NAMES[from] == NAMES[host] || NAMES[from] == "copy"
        });
        rule!(own, "a_node_gets_nothing_of_another", "{} was given {payload}", NAMES[host]);
        if payload.contains(":down#") {
            self.received.insert(payload.to_owned());
        } else {
            self.delivered.entry(host).or_default().insert(payload.to_owned());
            if let Some(owed) = self.owed.get_mut(&host) {
                owed.remove(payload);
            }
        }
        let Some(place) = place else { return };
        if qos == 2 {
            let effect = (host, at.life, client.to_owned(), place.stream.clone(), place.epoch, place.seq);
            rule!(self.effects.insert(effect.clone()), "qos_2_has_its_effect_once", "{payload}: {effect:?}");
        }
        if qos > 0 && !place.dup {
            let lane = (host, at.life, place.session, place.stream.clone(), place.epoch, qos);
            let last = self.order.insert(lane, place.seq).unwrap_or(0);
            rule!(
                last < place.seq,
                "deliveries_of_a_connection_are_in_order_and_once",
                "{payload} at {}: seq {} after {last}",
                NAMES[host],
                place.seq
            );
        }
    }

    /// A watcher at the hub begins anew.
    pub(crate) fn watching(&mut self, watcher: &str) {
        self.mirrors.insert(watcher.to_owned(), BTreeMap::new());
    }

    /// A watcher saw an entry: its pair never decreases.
    pub(crate) fn watched(&mut self, life: u64, watcher: &str, event: &StateEvent) {
        let mirror = self.mirrors.entry(watcher.to_owned()).or_default();
        match event {
            StateEvent::Put { entry, .. } => {
                let pair = (entry.incarnation, entry.revision);
                let place = (life, watcher.to_owned(), entry.key.clone());
                let held = *self.pairs.get(&place).unwrap_or(&pair);
                rule!(
                    held <= pair,
                    "a_watcher_never_sees_a_key_go_back",
                    "{watcher} {}: {held:?}, {pair:?}",
                    entry.key
                );
                self.pairs.insert(place, pair);
                mirror.insert(entry.key.clone(), pair);
            }
            StateEvent::Deleted { key, .. } => drop(mirror.remove(key)),
            StateEvent::TooOld { .. } => drop(self.mirrors.remove(watcher)),
            StateEvent::Synced { .. } => {}
        }
    }

    pub(crate) fn barrier(
        &mut self,
        host: usize,
        at: &Host,
        (origin, space, incarnation): (String, String, u64),
    ) {
        self.barriers.insert((host, at.life, origin, space, incarnation));
    }

    /// A disk has learned something.
    pub(crate) fn learn(&mut self, host: usize, at: &Host, news: News) {
        match news {
            News::Logged { tag, imported } => {
                rule!(!self.refused.contains(&tag), "nothing_of_a_refused_publish_is_kept", "{tag}");
                rule!(
                    !imported || host == HUB || tag.contains(":down#"),
                    "a_link_never_returns_what_it_imported",
                    "{tag} at {}",
                    NAMES[host]
                );
            }
            News::Dropped { tags } => {
                for tag in tags {
                    for owed in self.owed.values_mut() {
                        owed.remove(&tag);
                    }
                    self.dropped.insert(tag);
                }
            }
            News::State { origin, space, key, pair, tombstone: true, imported } => {
                if !imported {
                    self.tombstones.insert((origin, space, key, pair));
                    return;
                }
                let barrier = (host, at.life, origin.clone(), space.clone(), pair.0);
                let what = format!("{key} of {space} of {origin:?} went at {pair:?}");
                rule!(
                    self.barriers.contains(&barrier) || self.tombstones.contains(&(origin, space, key, pair)),
                    "nothing_is_removed_before_a_barrier",
                    "{what}"
                );
            }
            News::State { space, key, imported: true, .. } if space == "fleet" => {
                self.fleet.given(node_of(host, at), &key)
            }
            News::State { .. } | News::EpochChanged { .. } => {}
        }
    }

    /// The disk of a host is about to be lost, or to go back in time: what only it has is not promised to
    /// come back. `left` are the disks that will be there then; call it before the change with what was.
    pub(crate) fn before_disaster(&mut self, host: usize, at: &Host) {
        if host == HUB {
            return;
        }
        self.torn.insert(at.name.clone());
        self.owed.remove(&host);
        // What its subscriber had not got yet went with its session.
        for (tag, node) in &self.down {
            if NAMES[*node] == at.name && !self.received.contains(tag) && at.disk.shadow.had(tag) {
                self.excused.insert(tag.clone());
            }
        }
    }

    /// The disks after a disaster.
    pub(crate) fn after_disaster(&mut self, hosts: &[Option<Host>]) {
        let held = |origin: &str, tag: &str| {
            let mut disks =
                hosts.iter().enumerate().filter_map(|(index, host)| Some((index, host.as_ref()?)));
            disks.any(|(index, host)| (index == HUB || host.name == origin) && host.disk.shadow.has(tag))
        };
        for promise in &self.acknowledged {
            if !held(&promise.origin, &promise.tag) {
                self.excused.insert(promise.tag.clone());
            }
        }
        for (tag, node) in &self.down {
            if !self.received.contains(tag) && !held(NAMES[*node], tag) {
                self.excused.insert(tag.clone());
            }
        }
    }

    /// At the end, when all is linked and quiet: what was acknowledged on a node stands at the hub, in order
    /// for each life of its Log and topic, and once unless a history was torn.
    pub(crate) fn settled(&self, node: usize, at: &Host, hub: &Host) {
        let logs: Vec<&LogShadow> =
            hub.disk.shadow.logs.values().filter(|log| log.origin == at.name).collect();
        self.nothing_twice(&at.name, &logs);
        let at_hub: BTreeMap<&str, Vec<usize>> = positions(&logs);
        let mut last: BTreeMap<(usize, u64, &str, u32), usize> = BTreeMap::new();
        for promise in self.acknowledged.iter().filter(|promise| promise.origin == at.name) {
            let tag = promise.tag.as_str();
            if self.excused.contains(tag) || self.dropped.contains(tag) {
                continue;
            }
            let Some(found) = at_hub.get(tag) else {
                rule!(false, "nothing_acknowledged_is_lost", "{tag} is not at the hub");
                continue;
            };
            // Across streams there is no order, and a node that lost its disk does not know the stream.
            let Some((stream, _)) = at.disk.shadow.place_of(tag).filter(|_| promise.host == node) else {
                continue;
            };
            let (topic, _) = tag.split_once('#').expect("tags are place#number");
            let before = last.entry((promise.host, promise.life, topic, stream)).or_default();
            let Some(next) = found.iter().find(|position| **position >= *before) else {
                rule!(false, "order_is_kept_for_each_topic", "{tag} is at {found:?}, before {before}");
                continue;
            };
            *before = *next;
        }
        for (tag, to) in &self.down {
            let mine = *to == node && !self.excused.contains(tag) && !self.dropped.contains(tag);
            rule!(
                !mine || self.received.contains(tag),
                "a_down_message_arrives",
                "{tag} never reached {}",
                at.name
            );
        }
        if let Some(tag) = self.owed.get(&node).and_then(BTreeSet::first) {
            rule!(false, "a_subscriber_gets_all_that_is_acknowledged", "{tag} at {}", at.name);
        }
        the_hub_follows(at, hub);
    }

    fn nothing_twice(&self, origin: &str, logs: &[&LogShadow]) {
        let mut seen = BTreeSet::new();
        for log in logs {
            let mut here = BTreeSet::new();
            for (seq, tag) in log.messages() {
                let once = here.insert(tag) && (seen.insert(tag) || self.torn.contains(origin));
                rule!(
                    once || self.repeated.contains(tag),
                    "nothing_is_there_twice",
                    "{tag} at seq {seq} of {} of {origin}",
                    log.stream
                );
            }
        }
    }

    /// What a watcher holds is what is there.
    pub(crate) fn mirror(&self, watcher: &str) -> BTreeMap<&str, Pair> {
        let mirror = self.mirrors.get(watcher);
        mirror.into_iter().flatten().map(|(key, pair)| (key.as_str(), *pair)).collect()
    }
}

/// The node that a host is, or is a copy of.
fn node_of(host: usize, at: &Host) -> usize {
    NAMES.iter().position(|name| *name == at.name).unwrap_or(host)
}

/// Where each tag stands in a sequence of Logs.
fn positions<'a>(logs: &[&'a LogShadow]) -> BTreeMap<&'a str, Vec<usize>> {
    let mut found: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, (_, tag)) in logs.iter().flat_map(|log| log.messages()).enumerate() {
        found.entry(tag).or_default().push(at);
    }
    found
}

/// Each Log of a node stands at the hub under the same epoch and up to the same seq, and record by record as
/// far as both keep it.
fn the_hub_follows(node: &Host, hub: &Host) {
    let mut streams: Vec<&str> = node.disk.shadow.logs.values().map(|log| log.stream.as_str()).collect();
    streams.sort_unstable();
    streams.dedup();
    for stream in streams {
        let Some((_, here)) =
            node.disk.shadow.log(&node.name, stream).filter(|(_, log)| log.origin == node.name)
        else {
            continue;
        };
        if here.next == 1 {
            continue;
        }
        // An epoch without a record is not told yet.
        let epoch = here.epoch_at(here.next - 1);
        let Some(there) = hub.disk.shadow.history(&node.name, stream, epoch) else {
            rule!(false, "the_hub_has_every_log", "{stream} of {} under {epoch:x}", node.name);
            continue;
        };
        let ends = (here.next, there.next);
        // Under an epoch that is over, the hub may have more: what a restored copy of the disk never had.
        rule!(
            ends.0 == ends.1 || (epoch != here.epoch() && ends.0 < ends.1),
            "the_hub_follows_to_the_end",
            "{stream} of {}: {ends:?}",
            node.name
        );
        for (seq, entry) in &here.entries {
            let kept = here.epoch_at(*seq) == there.epoch() && *seq >= there.first;
            let (Entry::Record { .. }, true) = (entry, kept) else { continue };
            rule!(
                there.entries.get(seq) == Some(entry),
                "gaps_stand_only_for_what_is_gone",
                "{stream} of {} at {seq}: {entry:?}, {:?}",
                node.name,
                there.entries.get(seq)
            );
        }
    }
}
