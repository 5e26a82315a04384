//! What leaves over an established link: where each export starts, whose turn it is, what was acknowledged.

use bytes::Bytes;
use codec::{Class, Flags, Kind, proto};

use super::{
    Core, DropReason,
    event::{Role, SessionId},
    link::{Link, Phase},
    log::LogId,
};
use crate::limits;

/// Records put on one link in one `apply`.
const PUMP_RECORDS: usize = 1024;

impl Core {
    /// Starts every export where its receiver stands.
    pub(super) fn begin_exports(
        &mut self,
        session: SessionId,
        marks: &[proto::LogMark],
        positions: &[proto::StatePosition],
    ) {
        let peer = self.links[&session].peer.clone();
        let logs: Vec<LogId> = self.exported_logs(&peer).map(|log| log.id).collect();
        for id in logs {
            let log = &self.logs[&id];
            let mark = marks.iter().find(|mark| *mark.origin == *log.origin && *mark.stream == *log.stream);
            self.begin_log_export(session, id, mark.cloned());
        }
        let spaces: Vec<usize> = self.exported_spaces(&peer).collect();
        for index in spaces {
            let space = &self.spaces[index];
            let found = positions.iter().find(|at| *at.origin == *space.origin && *at.space == *space.name);
            let position = found.map_or((0, 0), |at| (at.incarnation, at.revision));
            self.begin_state_export(session, index, position);
        }
    }

    /// A Log or space appeared while links are up: it is exported to whom it concerns.
    fn add_missing_exports(&mut self, session: SessionId) {
        let link = &self.links[&session];
        let peer = link.peer.clone();
        let logs: Vec<LogId> =
            self.exported_logs(&peer).map(|log| log.id).filter(|id| !link.logs.contains_key(id)).collect();
        let spaces: Vec<usize> =
            self.exported_spaces(&peer).filter(|index| !link.spaces.contains_key(index)).collect();
        for id in logs {
            self.begin_log_export(session, id, None);
        }
        for index in spaces {
            self.begin_state_export(session, index, (0, 0));
        }
    }

    pub(super) fn pump_exports(&mut self) {
        let due = std::mem::take(&mut self.pump_links);
        for session in due {
            let Some(link) = self.links.get(&session) else { continue };
            if link.phase == Phase::Established {
                self.add_missing_exports(session);
                self.pump_link(session);
            }
            self.flush_link(session);
        }
    }

    /// The links that export this Log go on.
    pub(super) fn pump_exports_of(&mut self, id: LogId) {
        let log = &self.logs[&id];
        if self.config.is_hub() {
            if let Some(node) = log.stream.strip_prefix("down/")
                && log.origin.is_empty()
                && let Some(session) = self.link_of(node)
            {
                self.pump_links.insert(session);
            }
        } else if log.origin == self.own {
            self.pump_links.extend(self.links.keys());
        }
    }

    fn pump_link(&mut self, session: SessionId) {
        let mut budget = PUMP_RECORDS;
        let link = &self.links[&session];
        let logs: Vec<LogId> = link.logs.keys().copied().collect();
        let spaces: Vec<usize> = link.spaces.keys().copied().collect();
        for index in spaces {
            self.pump_state(session, index, &mut budget);
        }
        for id in logs {
            self.pump_log(session, id, &mut budget);
        }
        if budget == 0 {
            self.pump_links.insert(session);
        }
    }

    /// The peer says what it durably holds.
    pub(super) fn on_ack(&mut self, session: SessionId, ack: &proto::Ack) {
        let Some(link) = self.links.get_mut(&session) else { return };
        for at in &ack.sources {
            if let Some(export) =
                link.logs.values_mut().find(|export| export.number == at.source && at.source != 0)
            {
                if at.seq >= export.next {
                    continue; // it acknowledges what was never sent
                }
                while export.in_flight.front().is_some_and(|(seq, _)| *seq <= at.seq) {
                    let (_, bytes) = export.in_flight.pop_front().expect("looked at the front");
                    export.in_flight_bytes -= bytes;
                }
                export.mark = Some(proto::Mark { epoch: at.epoch, mark: at.seq, crc: at.crc });
                export.mark_is_new = true;
            } else if let Some(export) = link.spaces.values_mut().find(|export| export.number == at.source) {
                while export.in_flight.front().is_some_and(|(pair, _)| *pair <= (at.epoch, at.seq)) {
                    let (_, bytes) = export.in_flight.pop_front().expect("looked at the front");
                    export.in_flight_bytes -= bytes;
                }
                export.mark = (at.epoch, at.seq);
                export.mark_is_new = true;
            }
        }
        self.pump_links.insert(session);
        self.cursors_moved();
    }

    /// Remembers on disk what receivers hold.
    pub(super) fn write_marks(&mut self) {
        let links = std::mem::take(&mut self.links);
        for link in links.values() {
            self.write_marks_of(link);
        }
        self.links = links;
        for link in self.links.values_mut() {
            for export in link.logs.values_mut() {
                export.mark_is_new = false;
            }
            for export in link.spaces.values_mut() {
                export.mark_is_new = false;
            }
        }
    }

    pub(super) fn write_marks_of(&mut self, link: &Link) {
        for (id, export) in &link.logs {
            let Some(mark) = export.mark.as_ref().filter(|_| export.mark_is_new) else { continue };
            let value = codec::encode(mark);
            self.ledger.write_local(Kind::MARK, mark_key(link.receiver(), *id), Some(value));
            self.marks.insert((link.receiver().to_owned(), *id), *mark);
        }
        for (index, export) in link.spaces.iter().filter(|(_, export)| export.mark_is_new) {
            // Of a space: up to where its receiver needs no tombstones.
            let source = self.spaces[*index].source;
            let mark = proto::Mark { epoch: export.mark.0, mark: export.mark.1, crc: 0 };
            let key = mark_key(link.receiver(), source);
            self.ledger.write_local(Kind::MARK, key, Some(codec::encode(&mark)));
            self.marks.insert((link.receiver().to_owned(), source), mark);
        }
    }

    /// A QoS 0 message of this node goes up, if policy exports it.
    pub(super) fn export_live(&mut self, topic: &str, frame: &Bytes) {
        if self.config.is_hub() || topic.starts_with("_INBOX/") {
            return;
        }
        if !self.config.exports.has_live(topic) {
            return;
        }
        let mut sent = false;
        for (session, link) in &mut self.links {
            if link.phase != Phase::Established || link.peer.role != Role::Hub {
                continue;
            }
            sent = true;
            if link.queued + frame.len() > limits::LINK_QUEUE_BYTES {
                self.stats.drop(DropReason::LinkQueue);
                continue;
            }
            link.push_live(&self.own, Class::Telemetry, Flags::default(), 0, frame.clone());
            self.pump_links.insert(*session);
        }
        if !sent {
            self.stats.drop(DropReason::NoLink);
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
