//! A space of which each receiver gets only its part, on its way to nodes: `fleet`, from the hub.
//!
//! What is due for a link is a set of keys, each sent at its newest durable version, so a slow link costs
//! what changed and no more. Records carry no order that an acknowledgement could count by: they are
//! numbered within the session, and the number is what comes back. `synced` after the last one says up to
//! which pair the node holds all of its part; that is where it resumes.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use codec::{Flags, Kind, Record, RecordHeader, proto};

use super::{
    Core,
    event::{Origin, Role, SessionId},
    link::{InFlight, Link},
    space::{
        BARRIER, Pair,
        scope::{ACCEPT, INTENT_RESULT, Turn, WANT},
    },
};
use crate::store::SourceKind;

/// How often one node's position may make this broker begin a new incarnation.
const MINT_EVERY: Duration = Duration::from_hours(1);

/// A part of a space on its way to the peer.
#[derive(Debug)]
pub(super) struct PartExport {
    space: usize,
    /// Declared as this; 0 = not yet.
    pub(super) number: u32,
    due: BTreeSet<(Turn, Arc<str>)>,
    /// Records sent in this session.
    sent: u64,
    pub(super) in_flight: InFlight<u64>,
    /// What the peer was told, or said, that it holds.
    synced: Pair,
    /// It was told, or owes nothing to be told.
    is_synced: bool,
}

impl Core {
    /// What a node is told of the space that it gets a part of.
    pub(super) fn part_offer(&self, link: &Link) -> Option<proto::StateOffer> {
        let index = self.scoped.filter(|_| link.peer.role == Role::Node)?;
        let space = &self.spaces[index];
        Some(proto::StateOffer {
            origin: space.origin.to_string(),
            space: space.name.to_string(),
            incarnation: space.at.0,
            revision: space.durable.1,
            run: space.lineage.run(), // a tier's is unknown: any replica may have written it
        })
    }

    pub(super) fn begin_part_export(&mut self, session: SessionId) {
        let Some(index) = self.scoped else { return };
        let link = &self.links[&session];
        let peer = &link.peer;
        if link.part.is_some()
            || peer.role != Role::Node
            || !self.config.exports.has_space(&self.spaces[index].name)
        {
            return;
        }
        let node = Arc::clone(&peer.name);
        let space = &self.spaces[index];
        if space.elsewhere && !space.is_whole() {
            return; // the mirror of a new bucket is being read
        }
        let held = |at: &&proto::StatePosition| *at.origin == *space.origin && *at.space == *space.name;
        let held = link.peer_positions.iter().find(held);
        let position = held.map_or((0, 0), |at| (at.incarnation, at.revision));
        // Beyond its position it may hold parts of what came later.
        let reached = held.map_or((0, 0), |at| (at.reached_incarnation, at.reached_revision)).max(position);
        let run = held.map_or(0, |at| at.run);
        // No honest receiver is ahead of the owner, nor has what another process wrote: this store was wiped,
        // rolled back, or is a copy.
        let same = reached.0 == space.at.0 && reached.1 > 0 && run != 0;
        let foreign = reached > space.at || (same && !space.lineage.covers(reached.1, run));
        if foreign && !self.config.shared {
            if !self.may_mint_for(&node) {
                return;
            }
            self.mint_above(reached.0);
        }
        let space = &self.spaces[index];
        let due = space.lacking(&node, position);
        let export = PartExport {
            space: index,
            number: 0,
            due,
            sent: 0,
            in_flight: InFlight::default(),
            synced: position,
            is_synced: position == space.durable,
        };
        self.links.get_mut(&session).expect("an established link").part = Some(export);
    }

    /// Once is enough for whatever happened to this store: what is minted stands above every position. A node
    /// that goes on showing others makes them up, and everybody would pay for it.
    fn may_mint_for(&mut self, node: &Origin) -> bool {
        let now = self.now.mono;
        if self.minted_for.get(node).is_some_and(|at| now < *at + MINT_EVERY) {
            let message = format!(
                "node {node} again shows a position in the tier's State that this tier never gave it, and gets none                  until it relinks an hour later: check that nobody else uses its certificate, or enrol it anew"
            );
            self.set_condition("ForeignPosition", node.to_string(), message);
            return false;
        }
        self.minted_for.insert(Arc::clone(node), now);
        true
    }

    /// A durable change of a space whose receivers get parts: the links that it concerns have it due.
    pub(super) fn on_part_durable(&mut self, index: usize, key: &Arc<str>, revision: u64) {
        let space = &self.spaces[index];
        if &**key == BARRIER {
            let linked: Vec<SessionId> = self.links.keys().copied().collect();
            for session in linked {
                self.make_due(session, [(Turn::Barrier, Arc::clone(key))].into());
            }
            return;
        }
        if let Some(node) = key.strip_prefix(WANT) {
            if let Some(session) = self.own_link_of(node) {
                let due = space.moved_by_want(node, revision);
                self.make_due(session, due);
            }
            return;
        }
        let named = key.strip_prefix(ACCEPT).or_else(|| key.strip_prefix(INTENT_RESULT)?.split('/').next());
        let concerned: Vec<SessionId> = match named {
            Some(node) => self.own_link_of(node).into_iter().collect(),
            None => space.listing(key).filter_map(|node| self.own_link_of(node)).collect(),
        };
        for session in concerned {
            self.make_due(session, [(Turn::of(key), Arc::clone(key))].into());
        }
    }

    /// The link of a node that is linked here itself: through a relay no parts are passed on.
    fn own_link_of(&self, node: &str) -> Option<SessionId> {
        self.link_of(node).filter(|session| *self.links[session].peer.name == *node)
    }

    fn make_due(&mut self, session: SessionId, due: BTreeSet<(Turn, Arc<str>)>) {
        let Some(part) = self.links.get_mut(&session).and_then(|link| link.part.as_mut()) else { return };
        part.due.extend(due);
        self.pump_links.insert(session);
    }

    pub(super) fn pump_part(&mut self, session: SessionId, budget: &mut usize) {
        let Some(link) = self.links.get_mut(&session) else { return };
        let Some(mut part) = link.part.take() else { return };
        let space = &self.spaces[part.space];
        if space.durable.0 != space.at.0 {
            // A new incarnation is not durable yet.
            link.part = Some(part);
            return;
        }
        let node = Arc::clone(&link.peer.name);
        while *budget > 0
            && link.has_credit(space.class)
            && (part.in_flight.bytes as u64) < link.window.state_bytes
        {
            let mut record = match part.due.pop_first() {
                Some((turn, key)) => {
                    part.is_synced = false;
                    let Some(record) = space.part(&node, turn, &key) else { continue };
                    if turn == Turn::Deleted {
                        part.due.remove(&(Turn::Entry, key));
                    }
                    record
                }
                None if part.is_synced || part.synced == space.durable => break,
                None => {
                    part.is_synced = true;
                    part.synced = space.durable;
                    synced(space.class as u8, space.durable)
                }
            };
            *budget -= 1;
            if part.number == 0 {
                part.number = link.declare(&space.origin, SourceKind::State, &space.name, space.class);
            }
            part.sent += 1;
            part.in_flight.sent(part.sent, record.wire_len());
            link.in_flight_bytes += record.wire_len();
            record.header.source = part.number;
            link.push(space.class, record);
        }
        link.part = Some(part);
    }
}

fn synced(class: u8, at: Pair) -> Record {
    let header = RecordHeader {
        kind: Kind::SYNCED,
        class,
        flags: Flags::default(),
        source: 0,
        epoch: at.0,
        seq: at.1,
        aux: 0,
    };
    Record { header, body: bytes::Bytes::new() }
}
