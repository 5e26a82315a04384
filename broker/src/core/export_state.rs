//! A space of State on its way to a receiver: what changed since its position, then the barrier.

use std::sync::Arc;

use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{
    Core,
    event::SessionId,
    link::{FEATURE_RELAY, InFlight, Link, Side, StateExport},
    space::{Pair, Space, Version},
};
use crate::store::SourceKind;

impl Core {
    /// The spaces that this broker sends to a peer: above, its own and those of nodes behind it.
    pub(super) fn exported_spaces(&self, link: &Link) -> Vec<usize> {
        if self.config.is_hub() || link.side == Side::Below {
            return Vec::new();
        }
        let relays = link.can(FEATURE_RELAY);
        let exported = |space: &Space| {
            let behind = relays
                && super::NODE_SPACES.contains(&&*space.name)
                && self.forwards.contains_key(&space.origin)
                && !self.comes_from(link, &space.origin);
            (space.owned || behind) && self.config.exports.has_space(&space.name)
        };
        self.spaces.iter().filter(|space| exported(space)).map(|space| space.index).collect()
    }

    pub(super) fn state_offers(&self, link: &Link) -> Vec<proto::StateOffer> {
        self.exported_spaces(link)
            .into_iter()
            .map(|index| {
                let space = &self.spaces[index];
                proto::StateOffer {
                    origin: space.origin.to_string(),
                    space: space.name.to_string(),
                    incarnation: space.at.0,
                    revision: space.durable.1,
                    run: space.lineage.run(),
                }
            })
            .chain(self.part_offer(link))
            .collect()
    }

    pub(super) fn begin_state_export(&mut self, session: SessionId, index: usize) {
        let space = &self.spaces[index];
        let link = &self.links[&session];
        let held = |at: &&proto::StatePosition| *at.origin == *space.origin && *at.space == *space.name;
        let held = link.peer_positions.iter().find(held);
        let position = held.map_or((0, 0), |at| (at.incarnation, at.revision));
        let run = held.map_or(0, |at| at.run);
        let unknown = held.is_none();
        let owned = space.owned;
        let same = position.0 == space.at.0 && position.1 > 0;
        // No honest receiver is ahead of the owner: this store was rolled back, or is a copy.
        let ahead = position > space.at;
        // It may hold what was deleted so long ago that no tombstone is left to tell it.
        let behind = same && position < space.horizon.pair;
        // It may know revisions with other values. A receiver of the first version does not know the run.
        let elsewhere = same && run != 0 && !space.lineage.covers(position.1, run);
        if owned && (ahead || behind || elsewhere) {
            self.mint_above(position.0);
        }
        let space = &self.spaces[index];
        // What has just been minted stands above every position.
        let restarted = owned && position.0 != space.at.0;
        let export = StateExport {
            number: 0,
            position: if restarted { (space.at.0, 0) } else { position },
            cursor: space.resume_after(position),
            in_flight: InFlight::default(),
            unknown,
            // Owed at every start: the one of an earlier session may never have arrived.
            barrier: space.is_complete(&self.own).then_some(space.at),
            mark: position,
            mark_is_new: false,
        };
        let link = self.links.get_mut(&session).expect("an established link");
        link.spaces.insert(index, export);
        self.pump_links.insert(session);
    }

    /// A barrier came and is durable: whoever gets this space from here gets it in its place.
    pub(super) fn on_barrier_durable(&mut self, index: usize, pair: Pair) {
        self.spaces[index].passed(pair);
        self.pump_watches_of(index);
        let space = &self.spaces[index];
        if !space.is_complete(&self.own) {
            return;
        }
        for session in &self.above {
            let link = self.links.get_mut(session).expect("a link of this core");
            if let Some(export) = link.spaces.get_mut(&index) {
                export.barrier = Some(space.durable);
                self.pump_links.insert(*session);
            }
        }
    }

    pub(super) fn pump_state(&mut self, session: SessionId, index: usize, budget: &mut usize) {
        let space = &self.spaces[index];
        let Some(link) = self.links.get_mut(&session) else { return };
        let mut waits = None;
        while *budget > 0 {
            let credit = link.has_credit(space.class);
            let Some(export) = link.spaces.get_mut(&index) else { return };
            if !credit || export.in_flight.bytes as u64 >= link.window.state_bytes {
                return;
            }
            // Of a space that was never written to, who knows nothing of it has nothing to be told.
            let void = export.unknown && space.seen == 0;
            if void || space.change_after(export.cursor).is_none() && export.barrier.is_none() {
                return;
            }
            if link.side == Side::Above
                && let Err(held) = self.budgets.permit(self.now, space.class, &space.name)
            {
                waits = Some(held.until);
                break;
            }
            *budget -= 1;
            let (pair, mut record) = match space.change_after(export.cursor) {
                // A new incarnation is not durable yet.
                Some((_, version)) if space.owned && version.pair.0 != space.at.0 => return,
                Some((_, version)) => {
                    export.cursor = version.local;
                    // What a barrier removed has no revision: the barrier says it there too.
                    if version.pair.1 == 0 {
                        continue;
                    }
                    (version.pair, space.record_of(version))
                }
                None => match export.barrier.take_if(|at| *at <= space.durable || at.1 == 0) {
                    Some(_) if space.owned => (export.position, barrier(space.class, export.position)),
                    Some(_) => (space.durable, barrier(space.class, space.durable)),
                    None => return,
                },
            };
            export.position = pair;
            export.in_flight.sent(pair, record.wire_len());
            link.in_flight_bytes += record.wire_len();
            let number = export.number;
            let number = if number == 0 {
                link.declare(&space.origin, SourceKind::State, &space.name, space.class)
            } else {
                number
            };
            link.spaces.get_mut(&index).expect("looked at it").number = number;
            record.header.source = number;
            if link.side == Side::Above {
                self.budgets.spent(self.now, space.class, &space.name, record.wire_len());
            }
            link.push(space.class, record);
        }
        if let Some(until) = waits {
            self.ask_budgets_at(until);
        }
    }

    /// A State change is durable: watchers see it, links send it.
    pub(super) fn on_state_durable(&mut self, index: usize, key: &Arc<str>, version: Version) {
        let mono = self.now.mono;
        let (tombstone, revision) = (version.tombstone, version.local);
        self.spaces[index].persisted(key, version, mono);
        if tombstone {
            self.on_tombstone(index);
        }
        self.pump_watches_of(index);
        if self.spaces[index].owned && self.spaces[index].scoped {
            self.on_part_durable(index, key, revision);
        }
        self.pump_links_above();
        if self.config.is_hub()
            && self.spaces[index].owned
            && let Some(name) = key.strip_prefix("identity/").filter(|_| &*self.spaces[index].name == "sys")
        {
            self.on_identity_changed(name);
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
