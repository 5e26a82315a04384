//! A space of State on its way to a receiver: what changed since its position, then the barrier.

use std::sync::Arc;

use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{
    Core,
    event::{Peer, Role, SessionId},
    link::StateExport,
    space::{Pair, Version},
};
use crate::{limits, store::SourceKind};

impl Core {
    pub(super) fn exported_spaces(&self, peer: &Peer) -> impl Iterator<Item = usize> {
        let up = !self.config.is_hub() && peer.role == Role::Hub;
        let exported = |index: &usize| {
            let space = &self.spaces[*index];
            space.owned && self.config.exports.has_space(&space.name)
        };
        (0..self.spaces.len()).filter(move |index| up && exported(index))
    }

    pub(super) fn state_offers(&self, peer: &Peer) -> Vec<proto::StateOffer> {
        self.exported_spaces(peer)
            .map(|index| {
                let space = &self.spaces[index];
                proto::StateOffer {
                    origin: space.origin.to_string(),
                    space: space.name.to_string(),
                    incarnation: space.at.0,
                    revision: space.durable.1,
                }
            })
            .collect()
    }

    pub(super) fn begin_state_export(&mut self, session: SessionId, index: usize, position: Pair) {
        let space = &self.spaces[index];
        // No honest receiver is ahead of the owner: this store was rolled back, or is a copy.
        let ahead = position > space.at;
        // It may hold what was deleted so long ago that no tombstone is left to tell it.
        let behind = position.0 == space.at.0 && position.1 > 0 && position < space.horizon.pair;
        if ahead || behind {
            self.mint_above(position.0);
        }
        let space = &self.spaces[index];
        let same = position.0 == space.at.0;
        let export = StateExport {
            number: 0,
            position: if same { position } else { (space.at.0, 0) },
            in_flight: std::collections::VecDeque::new(),
            in_flight_bytes: 0,
            // Owed at every start: the one of an earlier session may never have arrived.
            barrier: Some(space.at),
            mark: position,
            mark_is_new: false,
        };
        let link = self.links.get_mut(&session).expect("an established link");
        link.spaces.insert(index, export);
        self.pump_links.insert(session);
    }

    pub(super) fn pump_state(&mut self, session: SessionId, index: usize, budget: &mut usize) {
        let space = &self.spaces[index];
        let Some(link) = self.links.get_mut(&session) else { return };
        while *budget > 0 {
            let Some(export) = link.spaces.get_mut(&index) else { return };
            if export.in_flight_bytes >= limits::LINK_STATE_WINDOW_BYTES {
                return;
            }
            *budget -= 1;
            let change = space.change_after(space.local_of(export.position));
            let (pair, mut record) = match change {
                Some((_, version)) => (version.pair, space.record_of(version)),
                None => match export.barrier.take_if(|at| *at <= space.durable || at.1 == 0) {
                    Some(_) => (export.position, barrier(space.class, export.position)),
                    None => return,
                },
            };
            export.position = pair;
            export.in_flight.push_back((pair, record.wire_len()));
            export.in_flight_bytes += record.wire_len();
            let number = export.number;
            let number = if number == 0 {
                link.declare(&space.origin, SourceKind::State, &space.name, space.class)
            } else {
                number
            };
            link.spaces.get_mut(&index).expect("looked at it").number = number;
            record.header.source = number;
            link.push(space.class, record);
        }
    }

    /// A State change is durable: watchers see it, links send it.
    pub(super) fn on_state_durable(&mut self, index: usize, key: &Arc<str>, version: Version) {
        let mono = self.now.mono;
        let tombstone = version.tombstone;
        self.spaces[index].persisted(key, version, mono);
        if tombstone {
            self.on_tombstone(index);
        }
        self.pump_watches_of(index);
        if self.spaces[index].owned && !self.config.is_hub() {
            self.pump_links.extend(self.links.keys());
        }
    }
}

fn barrier(class: Class, at: Pair) -> Record {
    let header = RecordHeader {
        kind: Kind::BARRIER,
        class: class as u8,
        flags: Flags::default(),
        source: 0,
        epoch: at.0,
        seq: at.1,
        aux: 0,
    };
    Record { header, body: codec::encode(&proto::Barrier {}) }
}
