//! What must hold, whatever happened.

use std::collections::{BTreeMap, BTreeSet};

use broker::core::event::{LogInfo, StateEvent};
use codec::{FrameView, Kind, Record, proto};

/// Everything that was promised and seen so far.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// Tags in the order of their acknowledgement, by (node, topic).
    acknowledged: BTreeMap<(String, String), Vec<String>>,
    /// Down tags that the hub acknowledged, by node.
    down: BTreeMap<String, BTreeSet<String>>,
    /// What stands at (node, stream, epoch, seq): never anything else.
    places: BTreeMap<(String, String, u64, u64), String>,
    /// Newest pair that a watcher at the hub saw of (node's space, key).
    pairs: BTreeMap<(String, String), (u64, u64)>,
    /// Down tags that the subscriber on a node got.
    received: BTreeMap<String, BTreeSet<String>>,
}

impl Oracle {
    pub(crate) fn acknowledged(&mut self, tag: &str) {
        let (place, _) = tag.split_once('#').expect("tags are place#number");
        let (node, topic) = place.split_once(':').expect("places are node:topic");
        if topic == "down" {
            self.down.entry(node.to_owned()).or_default().insert(tag.to_owned());
        } else {
            self.acknowledged.entry((node.to_owned(), topic.to_owned())).or_default().push(tag.to_owned());
        }
    }

    /// A subscriber got something.
    pub(crate) fn delivered(&mut self, host: &str, client: &str, payload: &str) {
        if host == "hub" {
            assert!(!payload.contains(":down#"), "an echo: the hub was given its own down message {payload}");
        } else if client == "sub" {
            assert!(payload.starts_with(host), "{host} was given {payload}");
            if payload.contains(":down#") {
                self.received.entry(host.to_owned()).or_default().insert(payload.to_owned());
            }
        }
    }

    /// A watcher at the hub saw an entry of a node: its pair never decreases.
    pub(crate) fn watched(&mut self, node: &str, event: &StateEvent) {
        if let StateEvent::Put { entry, .. } = event {
            let pair = (entry.incarnation, entry.revision);
            let held = self.pairs.entry((node.to_owned(), entry.key.clone())).or_insert(pair);
            assert!(*held <= pair, "{node} {} went back from {held:?} to {pair:?}", entry.key);
            *held = pair;
        }
    }

    /// Records of a Log as they stand at the hub: consecutive, and each place holds one thing for ever.
    /// The tags in them, in order.
    pub(crate) fn log(&mut self, log: &LogInfo, records: &[Record]) -> Vec<String> {
        let mut tags = Vec::new();
        let mut next = None;
        for record in records {
            let seq = record.header.seq;
            let from = if record.header.kind == Kind::GAP {
                let gap: proto::Gap = codec::decode(record.body.clone()).expect("a gap");
                gap.from
            } else {
                seq
            };
            assert!(next.is_none_or(|next| next == from), "{}: seq {from} after {next:?}", log.stream);
            next = Some(seq + 1);
            if record.header.kind != Kind::LOG {
                continue;
            }
            let view = FrameView::parse(&record.body).expect("a frame");
            let tag = String::from_utf8_lossy(view.payload()).into_owned();
            let place = (log.origin.to_string(), log.stream.to_string(), record.header.epoch, seq);
            let held = self.places.entry(place.clone()).or_insert_with(|| tag.clone());
            assert_eq!(*held, tag, "{place:?} held something else before");
            tags.push(tag);
        }
        tags
    }

    /// At the end, when all is linked and quiet: what was acknowledged on a node stands in its Log at the
    /// hub exactly once, in order for each topic.
    pub(crate) fn settled(&self, node: &str, at_hub: &[String]) {
        let mut seen = BTreeSet::new();
        for tag in at_hub {
            assert!(seen.insert(tag), "{tag} is there twice");
        }
        for ((_, topic), tags) in self.acknowledged.iter().filter(|((name, _), _)| name == node) {
            let mut rest = at_hub.iter();
            for tag in tags {
                assert!(rest.any(|found| found == tag), "{tag} is lost or out of order ({topic} of {node})");
            }
        }
        let none = BTreeSet::new();
        let received = self.received.get(node).unwrap_or(&none);
        for tag in self.down.get(node).unwrap_or(&none) {
            assert!(received.contains(tag), "{tag} never reached {node}");
        }
    }
}
