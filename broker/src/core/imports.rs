//! What arrives over a link: authorized, taken once, acknowledged when durable.

use std::sync::Arc;

use codec::{Class, Flags, FrameView, Kind, Record, proto};

use super::{
    Core, DropReason,
    event::{Origin, Peer, Role, SessionId},
    ledger::Effect,
    link::{Import, LinkSource},
    log::{Log, LogId},
    publish::Message,
};

impl Core {
    /// What this broker durably holds of the peer's Logs.
    pub(super) fn marks_for(&self, peer: &Peer) -> Vec<proto::LogMark> {
        let hub = self.config.is_hub();
        let theirs = |log: &&Log| {
            let from_node = hub && log.origin == peer.name;
            let from_hub = !hub && peer.role == Role::Hub && log.origin.is_empty();
            !log.retired && (from_node || from_hub)
        };
        let mark = |log: &Log| proto::LogMark {
            origin: log.origin.to_string(),
            stream: log.stream.to_string(),
            epoch: log.epoch(),
            mark: log.durable_next - 1,
            crc: log.crc_at(log.durable_next - 1).unwrap_or(0),
        };
        self.logs.values().filter(theirs).map(mark).collect()
    }

    pub(super) fn positions_for(&self, peer: &Peer) -> Vec<proto::StatePosition> {
        let hub = self.config.is_hub();
        self.spaces
            .iter()
            .filter(|space| if hub { space.origin == peer.name } else { space.origin.is_empty() })
            .map(|space| proto::StatePosition {
                origin: space.origin.to_string(),
                space: space.name.to_string(),
                incarnation: space.position().0,
                revision: space.position().1,
            })
            .collect()
    }

    /// A record of a declared source.
    pub(super) fn on_import(&mut self, session: SessionId, record: Record) -> Result<(), String> {
        self.stats.link_records_in += 1;
        let number = record.header.source;
        let Some(import) = self.links[&session].imports.get(&number).cloned() else {
            return Err(format!("a record of source {number}, which was not declared"));
        };
        match (import, record.header.kind) {
            (Import::Log { origin, stream, class }, Kind::LOG | Kind::GAP) => {
                self.import_log(&origin, &stream, class, record)?;
                self.ledger.after(Effect::LinkAck { session, source: number });
            }
            (Import::State { space }, Kind::PUT | Kind::TOMBSTONE) => {
                if !self.spaces[space].import(&mut self.ledger, &record) {
                    self.stats.link_duplicates_in += 1;
                }
                self.ledger.after(Effect::LinkAck { session, source: number });
            }
            (Import::State { space }, Kind::BARRIER) => {
                let pair = (record.header.epoch, record.header.seq);
                let now = self.now;
                self.spaces[space].barrier(&mut self.ledger, now, pair);
                self.ledger.after(Effect::BarrierDurable { space, pair });
                self.ledger.after(Effect::LinkAck { session, source: number });
            }
            (Import::Live { origin }, Kind::LIVE) => self.import_live(session, &origin, &record),
            (Import::Unknown, _) => {}
            (_, Kind::LIVE | Kind::LOG | Kind::PUT | Kind::TOMBSTONE | Kind::GAP | Kind::BARRIER) => {
                return Err(format!("a record of kind {} for source {number}", record.header.kind.0));
            }
            _ => {} // a kind of a newer peer
        }
        Ok(())
    }

    fn import_log(
        &mut self,
        origin: &Origin,
        stream: &Arc<str>,
        class: Class,
        record: Record,
    ) -> Result<(), String> {
        if record.header.seq >= u64::MAX - 1 {
            return Err("a seq beyond any Log".to_owned());
        }
        let (from, to, new_epoch) = match record.header.kind {
            Kind::GAP => {
                let gap: proto::Gap =
                    codec::decode(record.body.clone()).map_err(|error| error.to_string())?;
                if gap.from > record.header.seq + 1 {
                    return Err("a gap that ends before it begins".to_owned());
                }
                let change = (gap.reason() == proto::GapReason::EpochChange).then_some(gap.new_epoch);
                (gap.from, record.header.seq, change)
            }
            _ => (record.header.seq, record.header.seq, None),
        };
        let current = self.log_names.get(&(Arc::clone(origin), Arc::clone(stream))).copied();
        let id = match (current, new_epoch) {
            (Some(id), Some(epoch)) if self.logs[&id].epoch() == epoch => id,
            (_, Some(epoch)) => {
                // Seqs may begin again below the old mark: what follows gets a source of its own.
                if current.is_some() {
                    self.stats.gap("epoch_change", 0);
                    let message =
                        format!("stream {stream} of {origin:?} began a new epoch at seq {}", to + 1);
                    self.set_condition("EpochChanged", format!("{origin}/{stream}"), message);
                }
                let id = self.new_log(origin, stream, class, to + 1, Some(epoch));
                self.import_next(id, record);
                return Ok(());
            }
            (Some(id), None) => id,
            (None, None) => self.log_of(origin, stream, class, Some(record.header.epoch)),
        };
        let log = &self.logs[&id];
        if to < log.next {
            self.stats.link_duplicates_in += 1;
            return Ok(());
        }
        if record.header.epoch != log.epoch() {
            return Err(format!("stream {stream}: seq {to} under an epoch that was not announced"));
        }
        if from > log.next || (new_epoch.is_none() && record.header.kind == Kind::LOG && from != log.next) {
            return Err(format!("stream {stream}: seq {from} after {}", log.next - 1));
        }
        self.import_next(id, record);
        Ok(())
    }

    fn import_next(&mut self, id: LogId, record: Record) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let frame = (record.header.kind == Kind::LOG && !self.config.is_hub()).then(|| record.body.clone());
        if record.header.kind == Kind::GAP {
            self.stats.gap("received", 1);
        }
        log.import(&mut self.ledger, record);
        if let Some(first) = log.over_quota() {
            let dropped = first - log.first;
            log.trim(&mut self.ledger, first);
            self.stats.gap("trimmed", dropped);
        }
        if let Some(frame) = frame {
            // The retained value that a down message asks for enters with the mark, in one group.
            self.retain_if_asked(&frame);
        }
    }

    fn import_live(&mut self, session: SessionId, origin: &Origin, record: &Record) {
        let flags = record.header.flags;
        let Ok(view) = FrameView::parse(&record.body) else { return };
        if codec::topic::validate_topic(view.topic()).is_err() {
            return self.stats.drop(DropReason::NotAuthorized);
        }
        let correlation = record.header.seq;
        if flags.contains(Flags::REPLY) {
            return self.on_reply(session, correlation, &record.body);
        }
        let asks = flags.contains(Flags::REQUEST) && !self.config.is_hub();
        if !self.config.imports.has_live(view.topic()) {
            self.stats.drop(DropReason::NotImported);
            if asks {
                self.answer_nobody(session, correlation);
            }
            return;
        }
        let reply = if asks { self.open_hop(session, correlation) } else { None };
        if asks && reply.is_none() {
            return self.answer_nobody(session, correlation);
        }
        let reached = self.route(&Message {
            origin,
            topic: view.topic(),
            frame: &record.body,
            retain: false,
            publisher: 0,
            position: None,
            reply: reply.as_ref(),
            logged: None,
        });
        if reached == 0 && reply.is_some() {
            self.answer_nobody(session, correlation);
        }
    }

    pub(super) fn on_import_durable(&mut self, session: SessionId, source: LinkSource) {
        if let Some(link) = self.links.get_mut(&session) {
            link.owed.insert(source);
        }
        self.acks_owed.insert(session);
    }

    /// Tells peers what has become durable: one message for all sources of a link.
    pub(super) fn flush_acks(&mut self) {
        for session in std::mem::take(&mut self.acks_owed) {
            let Some(link) = self.links.get_mut(&session) else { continue };
            let owed = std::mem::take(&mut link.owed);
            let link = &self.links[&session];
            let sources =
                owed.iter().filter_map(|number| self.position_of(*number, &link.imports[number])).collect();
            self.send_control(session, proto::control::Message::Ack(proto::Ack { sources }));
        }
    }

    fn position_of(&self, source: LinkSource, import: &Import) -> Option<proto::SourceAck> {
        match import {
            Import::Log { origin, stream, .. } => {
                let id = self.log_names.get(&(Arc::clone(origin), Arc::clone(stream)))?;
                let log = &self.logs[id];
                let seq = log.durable_next - 1;
                let crc = log.crc_at(seq).unwrap_or(0);
                Some(proto::SourceAck { source, epoch: log.epoch(), seq, crc })
            }
            Import::State { space } => {
                let (epoch, seq) = self.spaces[*space].durable;
                Some(proto::SourceAck { source, epoch, seq, crc: 0 })
            }
            Import::Live { .. } | Import::Unknown => None,
        }
    }
}
