//! Who wants a topic: one trie of filters per topic space, with a bounded cache of whole answers.
//!
//! Nothing else in the core knows wildcards. An answer is computed once per topic and shared until any
//! subscription changes: a steady publisher costs one hash lookup.

use std::{collections::HashMap, sync::Arc};

use codec::topic::{Filter, Level};

use super::{
    client::ClientIx,
    event::{Origin, OriginFilter, SubId},
};

/// Cached answers before the cache is emptied.
const CACHE_MAX: usize = 8192;

/// One subscription as routing sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) client: ClientIx,
    pub(super) sub: SubId,
    pub(super) qos: u8,
    pub(super) group: Option<Arc<str>>,
    pub(super) no_local: bool,
    pub(super) retain_as_published: bool,
    pub(super) wildcard_matches_dollar: bool,
    pub(super) identifier: u32,
    /// MQTT sessions get one delivery for all of their matching subscriptions.
    pub(super) merge: bool,
}

/// One delivery that a message causes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) client: ClientIx,
    pub(super) sub: SubId,
    /// Highest of the merged subscriptions.
    pub(super) qos: u8,
    pub(super) no_local: bool,
    pub(super) retain_as_published: bool,
    pub(super) identifiers: Option<Box<[u32]>>,
}

/// Everybody who gets a message of one topic.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Matched {
    pub(super) targets: Vec<Target>,
    /// One member of each gets it.
    pub(super) groups: Vec<Vec<Target>>,
}

/// All subscriptions of a broker.
#[derive(Debug, Default)]
pub(super) struct Trie {
    spaces: HashMap<Origin, Space, foldhash::fast::RandomState>,
    any_node: Space,
}

#[derive(Debug, Default)]
struct Space {
    root: Node,
    cache: HashMap<Box<str>, Arc<Matched>, foldhash::fast::RandomState>,
}

#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Self, foldhash::fast::RandomState>,
    plus: Option<Box<Self>>,
    here: Vec<Entry>,
    hash: Vec<Entry>,
}

impl Trie {
    /// Adds a subscription; `own` is the origin that [`OriginFilter::Own`] means.
    pub(super) fn insert(&mut self, own: &Origin, origin: &OriginFilter, filter: &Filter, entry: Entry) {
        self.forget_answers();
        let (node, hash) = self.root_mut(own, origin).walk_mut(filter);
        let entries = if hash { &mut node.hash } else { &mut node.here };
        entries.retain(|held| (held.client, held.sub) != (entry.client, entry.sub));
        entries.push(entry);
    }

    /// Removes a subscription; what was not there is ignored.
    pub(super) fn remove(
        &mut self,
        own: &Origin,
        origin: &OriginFilter,
        filter: &Filter,
        client: ClientIx,
        sub: SubId,
    ) {
        self.forget_answers();
        let levels: Vec<Level<'_>> = filter.levels().collect();
        self.root_mut(own, origin).remove(&levels, client, sub);
        self.spaces.retain(|_, space| !space.root.is_vacant());
    }

    /// Who gets a message on this topic of this origin: those who asked for this origin, and those who
    /// asked for every node's.
    pub(super) fn matches(
        &mut self,
        own: &Origin,
        origin: &Origin,
        topic: &str,
    ) -> [Option<Arc<Matched>>; 2] {
        let here = self.spaces.get_mut(origin).and_then(|space| space.answer(topic));
        let foreign = !origin.is_empty() && origin != own;
        let anywhere = if foreign { self.any_node.answer(topic) } else { None };
        [here, anywhere]
    }

    fn forget_answers(&mut self) {
        self.any_node.cache.clear();
        for space in self.spaces.values_mut() {
            space.cache.clear();
        }
    }

    fn root_mut(&mut self, own: &Origin, origin: &OriginFilter) -> &mut Node {
        let name = match origin {
            OriginFilter::AnyNode => return &mut self.any_node.root,
            OriginFilter::Own => own,
            OriginFilter::Node(name) => name,
        };
        &mut self.spaces.entry(Arc::clone(name)).or_default().root
    }
}

impl Space {
    fn answer(&mut self, topic: &str) -> Option<Arc<Matched>> {
        if self.root.is_vacant() {
            return None;
        }
        if let Some(answer) = self.cache.get(topic) {
            return Some(Arc::clone(answer));
        }
        let mut found = Vec::new();
        self.root.collect(topic, is_reserved(topic), true, &mut found);
        let answer = Arc::new(answer(&found));
        if self.cache.len() >= CACHE_MAX {
            self.cache.clear();
        }
        self.cache.insert(topic.into(), Arc::clone(&answer));
        Some(answer)
    }
}

/// Topics that a wildcard in the first level must not match: `$...` unless the subscriber may, and the
/// inboxes of requests always.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reserved {
    No,
    Dollar,
    Inbox,
}

impl Reserved {
    fn lets(self, entry: &Entry) -> bool {
        match self {
            Self::No => true,
            Self::Dollar => entry.wildcard_matches_dollar,
            Self::Inbox => false,
        }
    }
}

fn is_reserved(topic: &str) -> Reserved {
    if topic.starts_with('$') {
        Reserved::Dollar
    } else if topic == "_INBOX" || topic.starts_with("_INBOX/") {
        Reserved::Inbox
    } else {
        Reserved::No
    }
}

impl Node {
    fn is_vacant(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.here.is_empty() && self.hash.is_empty()
    }

    /// The node that a filter ends at, and whether it ends there in `#`.
    fn walk_mut(&mut self, filter: &Filter) -> (&mut Self, bool) {
        let mut node = self;
        for level in filter.levels() {
            node = match level {
                Level::Name(name) => node.children.entry(name.into()).or_default(),
                Level::Plus => node.plus.get_or_insert_default(),
                Level::Hash => return (node, true),
            };
        }
        (node, false)
    }

    fn remove(&mut self, levels: &[Level<'_>], client: ClientIx, sub: SubId) {
        let keep = |entry: &Entry| (entry.client, entry.sub) != (client, sub);
        match levels.split_first() {
            None => self.here.retain(keep),
            Some((Level::Hash, _)) => self.hash.retain(keep),
            Some((Level::Plus, rest)) => {
                if let Some(node) = &mut self.plus {
                    node.remove(rest, client, sub);
                    if node.is_vacant() {
                        self.plus = None;
                    }
                }
            }
            Some((Level::Name(name), rest)) => {
                if let Some(node) = self.children.get_mut(*name) {
                    node.remove(rest, client, sub);
                    if node.is_vacant() {
                        self.children.remove(*name);
                    }
                }
            }
        }
    }

    /// Depth is bounded by the levels of a topic, which are bounded at ingress.
    fn collect<'a>(&'a self, topic: &str, reserved: Reserved, first: bool, found: &mut Vec<&'a Entry>) {
        let may = |entry: &&'a Entry| !first || reserved.lets(entry);
        found.extend(self.hash.iter().filter(may));
        let (level, rest) = match topic.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (topic, None),
        };
        if let Some(node) = self.children.get(level) {
            node.descend(rest, found);
        }
        if let Some(node) = &self.plus {
            let mut below = Vec::new();
            node.descend(rest, &mut below);
            found.extend(below.into_iter().filter(may));
        }
    }

    fn descend<'a>(&'a self, rest: Option<&str>, found: &mut Vec<&'a Entry>) {
        match rest {
            Some(rest) => self.collect(rest, Reserved::No, false, found),
            // The last level: filters that end here, and `#` below, which matches its parent too.
            None => found.extend(self.here.iter().chain(&self.hash)),
        }
    }
}

/// Merges what one session may get only once, and sorts members into their groups.
fn answer(found: &[&Entry]) -> Matched {
    let mut matched = Matched::default();
    let mut groups: Vec<(&Arc<str>, Vec<Target>)> = Vec::new();
    for entry in found {
        let target = Target {
            client: entry.client,
            sub: entry.sub,
            qos: entry.qos,
            no_local: entry.no_local,
            retain_as_published: entry.retain_as_published,
            identifiers: (entry.identifier != 0).then(|| Box::from([entry.identifier])),
        };
        if let Some(name) = &entry.group {
            match groups.iter_mut().find(|(held, _)| *held == name) {
                Some((_, members)) => members.push(target),
                None => groups.push((name, vec![target])),
            }
        } else if entry.merge
            && let Some(held) = matched.targets.iter_mut().find(|held| held.client == entry.client)
        {
            held.merge(target);
        } else {
            matched.targets.push(target);
        }
    }
    matched.groups = groups.into_iter().map(|(_, members)| members).collect();
    matched
}

impl Target {
    fn merge(&mut self, other: Self) {
        self.qos = self.qos.max(other.qos);
        self.no_local &= other.no_local;
        self.retain_as_published |= other.retain_as_published;
        self.identifiers = match (self.identifiers.take(), other.identifiers) {
            (Some(held), Some(more)) => Some(held.iter().chain(&more).copied().collect()),
            (held, more) => held.or(more),
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(client: u32, group: Option<&str>) -> Entry {
        Entry {
            client: ClientIx(client),
            sub: client,
            qos: 0,
            group: group.map(Arc::from),
            no_local: false,
            retain_as_published: false,
            wildcard_matches_dollar: false,
            identifier: 0,
            merge: false,
        }
    }

    fn level() -> impl Strategy<Value = &'static str> {
        prop_oneof![Just("a"), Just("b"), Just(""), Just("$x"), Just("_INBOX")]
    }

    fn topic() -> impl Strategy<Value = String> {
        prop::collection::vec(level(), 1..4)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("empty", |t| !t.is_empty())
    }

    fn filter() -> impl Strategy<Value = Filter> {
        let level = prop_oneof![3 => level(), 1 => Just("+")];
        (prop::collection::vec(level, 0..4), any::<bool>())
            .prop_map(|(mut levels, hash)| {
                if hash || levels.is_empty() {
                    levels.push("#");
                }
                levels.join("/")
            })
            .prop_filter_map("no filter", |text: String| Filter::parse(&text).ok())
    }

    proptest! {
        #[test]
        fn routing_finds_exactly_the_filters_that_match(
            filters in prop::collection::vec(filter(), 0..12),
            gone in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
            topic in topic(),
        ) {
            let own: Origin = "n1".into();
            let mut trie = Trie::default();
            let mut held: Vec<(u32, &Filter)> = Vec::new();
            for (number, filter) in (0..).zip(&filters) {
                trie.insert(&own, &OriginFilter::Own, filter, entry(number, None));
                held.push((number, filter));
            }
            for index in gone {
                if !held.is_empty() {
                    let (number, filter) = held.remove(index.index(held.len()));
                    trie.remove(&own, &OriginFilter::Own, filter, ClientIx(number), number);
                }
            }
            let mut expected: Vec<u32> =
                held.iter().filter(|(_, filter)| filter.matches(&topic, false)).map(|(number, _)| *number).collect();
            let [matched, anywhere] = trie.matches(&own, &own, &topic);
            let mut found: Vec<u32> =
                matched.iter().flat_map(|matched| &matched.targets).map(|target| target.sub).collect();
            expected.sort_unstable();
            found.sort_unstable();
            prop_assert_eq!(found, expected);
            prop_assert!(anywhere.is_none());
        }
    }

    #[test]
    fn members_of_a_group_stand_together_and_others_apart() {
        let own: Origin = "".into();
        let mut trie = Trie::default();
        let filter = Filter::parse("jobs/+").unwrap();
        for (number, group) in [(1, Some("g")), (2, Some("g")), (3, Some("h")), (4, None)] {
            trie.insert(&own, &OriginFilter::Own, &filter, entry(number, group));
        }
        let [matched, _] = trie.matches(&own, &own, "jobs/1");
        let matched = matched.unwrap();
        assert_eq!(matched.targets.len(), 1);
        assert_eq!(matched.groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
    }

    #[test]
    fn an_answer_is_forgotten_when_a_subscription_changes() {
        let own: Origin = "".into();
        let mut trie = Trie::default();
        let filter = Filter::parse("a/#").unwrap();
        trie.insert(&own, &OriginFilter::Own, &filter, entry(1, None));
        assert_eq!(trie.matches(&own, &own, "a")[0].as_ref().unwrap().targets.len(), 1);
        trie.insert(&own, &OriginFilter::Own, &filter, entry(2, None));
        assert_eq!(trie.matches(&own, &own, "a")[0].as_ref().unwrap().targets.len(), 2);
        let node: Origin = "n7".into();
        trie.insert(&own, &OriginFilter::AnyNode, &filter, entry(3, None));
        assert_eq!(trie.matches(&own, &node, "a/b")[1].as_ref().unwrap().targets.len(), 1);
        assert!(trie.matches(&own, &own, "a/b")[1].is_none(), "the tier's own topics are no node's");
    }
}
