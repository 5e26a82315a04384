//! What leaves over an established link: where each export starts, whose turn it is, what was acknowledged.

use std::{collections::BTreeSet, ops::Bound, sync::Arc};

use bytes::Bytes;
use codec::{Class, Flags, Kind, proto};

use super::{
    Core, DropReason,
    event::{Origin, SessionId},
    link::{FEATURE_CREDIT, FEATURE_RELAY, Link, Phase},
    log::{Log, LogId},
};
use crate::limits;

/// Links that one turn puts records on.
const PUMP_LINKS: usize = 1024;
/// Links whose marks one turn writes.
const MARKS_LINKS: usize = 4096;
/// Records put on one link in one `apply`.
const PUMP_RECORDS: usize = 1024;

impl Core {
    /// What links export may have changed: a Log, a space, a node or a permission came or went. Links above
    /// are concerned by all of it, of those below only the one that leads to this node.
    pub(super) fn exports_changed(&mut self, node: Option<&str>) {
        let below = node.and_then(|node| self.claims.get(node)?.session);
        for session in self.above.iter().copied().chain(below) {
            if let Some(link) = self.links.get_mut(&session) {
                link.exports_changed = true;
            }
        }
    }

    /// The links that a Log may be exported to.
    pub(super) fn receivers_of(&self, log: &Log) -> impl Iterator<Item = &Link> {
        let node = log.down_to().map(|node| self.link_of(node));
        let above = self.above.iter().copied().filter(move |_| node.is_none());
        above.chain(node.flatten()).filter_map(|session| Some(&**self.links.get(&session)?))
    }

    /// What receivers are known to hold of a Log or space, by its source.
    pub(super) fn marks_of(&self, source: LogId) -> impl Iterator<Item = &proto::Mark> {
        let from = (source, Arc::from(""));
        self.marks.range(from..).take_while(move |((of, _), _)| *of == source).map(|(_, mark)| mark)
    }

    /// Starts every export that has not begun, where its receiver stands.
    pub(super) fn add_missing_exports(&mut self, session: SessionId) {
        let link = self.links.get_mut(&session).expect("an established link");
        if !std::mem::take(&mut link.exports_changed) {
            return;
        }
        let link = &self.links[&session];
        let logs: Vec<LogId> =
            self.exported_logs(link).into_iter().filter(|id| !link.logs.contains_key(id)).collect();
        let spaces: Vec<usize> =
            self.exported_spaces(link).into_iter().filter(|index| !link.spaces.contains_key(index)).collect();
        for id in logs {
            self.begin_log_export(session, id);
        }
        for index in spaces {
            self.begin_state_export(session, index);
        }
        self.begin_part_export(session);
    }

    pub(super) fn pump_exports(&mut self) {
        for session in self.links_to_pump() {
            let Some(link) = self.links.get(&session) else { continue };
            if link.phase == Phase::Established {
                self.add_missing_exports(session);
                self.pump_link(session);
            }
            self.flush_link(session);
        }
        self.show_budgets();
    }

    /// The links whose turn it is: a change that concerns all nodes must not hold up everything else while it is
    /// handed out. What is left has the next turn, which is due at once.
    fn links_to_pump(&mut self) -> BTreeSet<SessionId> {
        if self.pump_links.len() <= PUMP_LINKS {
            return std::mem::take(&mut self.pump_links);
        }
        let later = self.pump_links.range((Bound::Excluded(self.pumped_last), Bound::Unbounded));
        let turn: BTreeSet<SessionId> =
            later.chain(self.pump_links.iter()).copied().take(PUMP_LINKS).collect();
        let from_here = turn.range((Bound::Excluded(self.pumped_last), Bound::Unbounded)).next_back();
        self.pumped_last = from_here.or_else(|| turn.last()).copied().unwrap_or(SessionId(0));
        for session in &turn {
            self.pump_links.remove(session);
        }
        turn
    }

    /// The links that export this Log go on.
    pub(super) fn pump_exports_of(&mut self, id: LogId) {
        let log = &self.logs[&id];
        if let Some(node) = log.down_to() {
            if let Some(session) = self.link_of(node) {
                self.pump_links.insert(session);
            }
        } else {
            self.pump_links_above();
        }
    }

    pub(super) fn pump_links_above(&mut self) {
        if self.config.is_hub() {
            return;
        }
        self.pump_links.extend(&self.above);
    }

    fn pump_link(&mut self, session: SessionId) {
        let mut budget = PUMP_RECORDS;
        let link = &self.links[&session];
        // What is urgent first; the histories of one stream share a class and stay in order.
        let mut logs: Vec<(Class, LogId)> = link.logs.keys().map(|id| (self.logs[id].class, *id)).collect();
        logs.sort_unstable();
        let (alarms, others) = logs.split_at(logs.partition_point(|(class, _)| *class <= Class::State));
        let spaces: Vec<usize> = link.spaces.keys().copied().collect();
        for (_, id) in alarms {
            self.pump_log(session, *id, &mut budget);
        }
        for index in spaces {
            self.pump_state(session, index, &mut budget);
        }
        self.pump_part(session, &mut budget);
        for (_, id) in others {
            self.pump_log(session, *id, &mut budget);
        }
        if budget == 0 {
            self.pump_links.insert(session);
        }
    }

    /// Whether an origin is reached, or was brought, by the peer of this link: it is not sent back there.
    pub(super) fn comes_from(&self, link: &Link, origin: &Origin) -> bool {
        let by_claim = self.claims.get(origin).and_then(|claim| claim.session);
        let holder = by_claim.and_then(|session| self.links.get(&session));
        *origin == link.peer.name || holder.is_some_and(|holder| holder.peer.name == link.peer.name)
    }

    /// The peer says what it durably holds.
    pub(super) fn on_ack(&mut self, session: SessionId, ack: &proto::Ack) {
        let Some(link) = self.links.get_mut(&session) else { return };
        if let Some(window) = ack.window.filter(|_| link.can(FEATURE_CREDIT)) {
            link.window = window;
        }
        let (mut freed, mut marked) = (0, false);
        let mut moved = Vec::new();
        for at in ack.sources.iter().filter(|at| at.source != 0) {
            if let Some(part) = link.part.as_mut().filter(|part| part.number == at.source) {
                freed += part.in_flight.acknowledged(&at.seq);
            } else if let Some((id, export)) =
                link.logs.iter_mut().find(|(_, export)| export.number == at.source)
            {
                export.held = at.hold;
                if at.epoch == 0 || export.next == 0 {
                    continue; // it holds back what it has nothing of
                }
                // It may have got further by another path: of what went by this one, it has all.
                let seq = at.seq.min(export.next - 1);
                let crc = if seq == at.seq { at.crc } else { 0 };
                let bytes = export.in_flight.acknowledged(&seq);
                freed += bytes;
                if let Some(log) = self.logs.get_mut(id) {
                    log.forecast.acknowledged.add(self.now.mono, bytes as u64);
                    if log.origin != self.own {
                        export.next = export.next.max(at.seq.saturating_add(1));
                    }
                }
                export.mark = Some(proto::Mark { epoch: at.epoch, mark: seq, crc });
                (export.mark_is_new, marked) = (true, true);
                moved.push(*id);
            } else if let Some(export) = link.spaces.values_mut().find(|export| export.number == at.source) {
                freed += export.in_flight.acknowledged(&(at.epoch, at.seq));
                export.mark = (at.epoch, at.seq);
                (export.mark_is_new, marked) = (true, true);
            }
        }
        link.in_flight_bytes -= freed;
        self.pump_links.insert(session);
        if marked {
            self.marks_moved.insert(session);
            self.cursors_moved();
        }
        if self.config.relay {
            self.passed_on(&moved);
        }
    }

    /// Remembers on disk what receivers hold.
    pub(super) fn write_marks(&mut self) {
        let others = self.marks_moved.iter().nth(MARKS_LINKS).copied();
        let others = others.map(|first| self.marks_moved.split_off(&first)).unwrap_or_default();
        for session in std::mem::replace(&mut self.marks_moved, others) {
            let Some(mut link) = self.links.remove(&session) else { continue };
            self.write_marks_of(&link);
            link.logs.values_mut().for_each(|export| export.mark_is_new = false);
            link.spaces.values_mut().for_each(|export| export.mark_is_new = false);
            self.links.insert(session, link);
        }
    }

    pub(super) fn write_marks_of(&mut self, link: &Link) {
        if self.config.shared {
            return; // a node says itself what it holds of the one Log that it gets
        }
        for (id, export) in link.logs.iter() {
            let Some(mark) = export.mark.as_ref().filter(|_| export.mark_is_new) else { continue };
            let value = codec::encode(mark);
            self.ledger.write_local(Kind::MARK, mark_key(link.receiver(), *id), Some(value));
            self.marks.insert((*id, link.receiver_name()), *mark);
            self.acknowledgements_moved.insert(*id);
        }
        for (index, export) in link.spaces.iter().filter(|(_, export)| export.mark_is_new) {
            // Of a space: up to where its receiver needs no tombstones.
            let source = self.spaces[*index].source;
            let mark = proto::Mark { epoch: export.mark.0, mark: export.mark.1, crc: 0 };
            let key = mark_key(link.receiver(), source);
            self.ledger.write_local(Kind::MARK, key, Some(codec::encode(&mark)));
            self.marks.insert((source, link.receiver_name()), mark);
        }
    }

    /// A QoS 0 message of this node, or of one behind it, goes above, if policy exports it.
    pub(super) fn export_live(&mut self, origin: &Origin, topic: &str, frame: &Bytes) {
        if self.config.is_hub() || topic.starts_with("_INBOX/") {
            return;
        }
        if !self.config.exports.has_live(topic) {
            return;
        }
        let own = *origin == self.own;
        let takes = |link: &Link| {
            let relays = own || link.can(FEATURE_RELAY);
            link.phase == Phase::Established && relays && (own || !self.comes_from(link, origin))
        };
        let sessions: Vec<SessionId> =
            self.above.iter().filter(|session| takes(&self.links[session])).copied().collect();
        if sessions.is_empty() {
            self.stats.drop(DropReason::NoLink);
        }
        if !sessions.is_empty() && !self.budgets.allow(self.now, Class::Telemetry, "") {
            return self.stats.drop(DropReason::Budget);
        }
        for session in sessions {
            let link = self.links.get_mut(&session).expect("listed");
            self.budgets.spent(self.now, Class::Telemetry, "", frame.len());
            if link.queued + frame.len() > limits::LINK_QUEUE_BYTES {
                self.stats.drop(DropReason::LinkQueue);
                continue;
            }
            link.push_live(origin, Class::Telemetry, Flags::default(), 0, frame.clone());
            self.pump_links.insert(session);
        }
    }
}

/// Key of the stored mark of a receiver: its name, a zero, the Log.
fn mark_key(receiver: &str, log: LogId) -> Bytes {
    let mut key = receiver.as_bytes().to_vec();
    key.push(0);
    key.extend_from_slice(&log.to_be_bytes());
    key.into()
}
