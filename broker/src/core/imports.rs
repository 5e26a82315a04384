//! What arrives over a link: authorized, taken once, acknowledged when durable.

use std::sync::Arc;

use codec::{Class, Flags, FrameView, Kind, Record, proto};

use super::{
    Core, DropReason, dead_letter,
    event::{Origin, SessionId},
    intent,
    ledger::Effect,
    link::{Import, Link, LinkSource, Side},
    log::{self, LogId},
    publish::Message,
};

/// Histories of one stream that a peer is told about.
const HISTORIES_TOLD: usize = 8;
/// Histories of one stream that are taken from another broker.
const HISTORIES_MAX: usize = 128;
/// Streams of one node.
pub(super) const STREAMS_MAX: usize = 256;

/// Why a record of a Log is not taken.
enum Unfit {
    /// The peer is at fault: the link ends.
    Protocol(String),
    /// Its origin is: the source is disregarded.
    Source(String),
}

impl Core {
    /// Whose Logs and spaces a peer may bring: ranges, because a hub has those of all its nodes.
    fn brought_by(&self, link: &Link) -> Vec<Origin> {
        match link.side {
            Side::Below => {
                let behind = link.behind.iter().flat_map(|behind| behind.known.keys());
                let behind = behind.filter(|name| **name != link.peer.name);
                std::iter::once(&link.peer.name).chain(behind).cloned().collect()
            }
            Side::Above if self.config.is_hub() => Vec::new(),
            Side::Above => vec!["".into()],
        }
    }

    /// Of the tier's, what a peer above brings: everything but what is for nodes elsewhere.
    fn is_for_here(&self, link: &Link, name: &str) -> bool {
        let mine = |node: &str| *node == *self.own || self.forwards.contains_key(node);
        link.side == Side::Below || name.strip_prefix("down/").is_none_or(mine)
    }

    /// What this broker durably holds of the peer's Logs: of each stream the current history first, because
    /// some builds look at that alone.
    pub(super) fn marks_for(&self, link: &Link) -> Vec<proto::LogMark> {
        let mark = |id: &LogId| {
            let log = &self.logs[id];
            proto::LogMark {
                origin: log.origin.to_string(),
                stream: log.stream.to_string(),
                epoch: log.epoch(),
                mark: log.durable_next - 1,
                crc: log.crc_at(log.durable_next - 1).unwrap_or(0),
            }
        };
        let origins = self.brought_by(link);
        let theirs = origins.iter().flat_map(|origin| self.histories_of(origin));
        let theirs = theirs.filter(|(stream, _)| self.is_for_here(link, stream));
        theirs.flat_map(|(_, ids)| ids.iter().rev().take(HISTORIES_TOLD).map(mark)).collect()
    }

    /// The Logs of an origin: names of the streams, and their histories.
    pub(super) fn histories_of(&self, origin: &Origin) -> impl Iterator<Item = (&Arc<str>, &Vec<LogId>)> {
        let from = (Arc::clone(origin), Arc::from(""));
        let all = self.histories.range(from..).take_while(move |((of, _), _)| of == origin);
        all.map(|((_, stream), ids)| (stream, ids))
    }

    /// The spaces of an origin.
    pub(super) fn spaces_of(&self, origin: &Origin) -> impl Iterator<Item = usize> {
        let from = (Arc::clone(origin), Arc::from(""));
        let all = self.space_names.range(from..).take_while(move |((of, _), _)| of == origin);
        all.map(|(_, index)| *index)
    }

    pub(super) fn positions_for(&self, link: &Link) -> Vec<proto::StatePosition> {
        let origins = self.brought_by(link);
        origins
            .iter()
            .flat_map(|origin| self.spaces_of(origin))
            .map(|index| &self.spaces[index])
            .filter(|space| !space.owned)
            .map(|space| proto::StatePosition {
                origin: space.origin.to_string(),
                space: space.name.to_string(),
                incarnation: space.position().0,
                revision: space.position().1,
                run: space.lineage.run(),
                reached_incarnation: space.at.0,
                reached_revision: space.at.1,
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
            (Import::Log { origin, stream, class, .. }, Kind::LOG | Kind::GAP) => {
                let id = match self.import_log(&origin, &stream, class, record) {
                    Ok(id) => id,
                    Err(Unfit::Protocol(why)) => return Err(why),
                    Err(Unfit::Source(why)) => {
                        self.disregard(session, number, why);
                        return Ok(());
                    }
                };
                let link = self.links.get_mut(&session).expect("the link that sent it");
                if let Some(Import::Log { log, .. }) = link.imports.get_mut(&number) {
                    *log = Some(id);
                }
                self.ledger.after(Effect::LinkAck { session, source: number });
            }
            (Import::State { .. }, Kind::PUT | Kind::TOMBSTONE | Kind::BARRIER | Kind::SYNCED)
                if !self.is_mintable(record.header.epoch) =>
            {
                let why = format!("an incarnation of the far future: {}", record.header.epoch);
                self.disregard(session, number, why);
            }
            (Import::State { space, run }, Kind::PUT | Kind::TOMBSTONE | Kind::SYNCED)
                if self.spaces[space].scoped =>
            {
                self.follow_run(space, run);
                self.import_part(session, number, space, &record);
            }
            (Import::State { space, run }, Kind::PUT | Kind::TOMBSTONE) => {
                self.follow_run(space, run);
                if !self.spaces[space].import(&mut self.ledger, &record) {
                    self.stats.link_duplicates_in += 1;
                }
                self.ledger.after(Effect::LinkAck { session, source: number });
            }
            (Import::State { space, run }, Kind::BARRIER) if !self.spaces[space].scoped => {
                let pair = (record.header.epoch, record.header.seq);
                let now = self.now;
                self.follow_run(space, run);
                if self.config.shared {
                    self.spaces[space].barrier_elsewhere(&mut self.ledger, &record);
                }
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

    /// One source has nothing more to say here: it stays unacknowledged with its sender. The link goes on, for
    /// a relay must not be cut off for what a node behind it does.
    fn disregard(&mut self, session: SessionId, number: LinkSource, why: String) {
        let Some(link) = self.links.get_mut(&session) else { return };
        let subject = link.peer.name.to_string();
        link.imports.insert(number, Import::Unknown);
        self.stats.drop(DropReason::NotAuthorized);
        self.set_condition("SourceRefused", subject, why);
    }

    /// That the owner sends says that it has looked at the position that it was told.
    fn follow_run(&mut self, space: usize, run: u64) {
        self.spaces[space].follow_run(&mut self.ledger, run);
    }

    fn import_log(
        &mut self,
        origin: &Origin,
        stream: &Arc<str>,
        class: Class,
        record: Record,
    ) -> Result<LogId, Unfit> {
        if record.header.seq >= u64::MAX - 1 {
            return Err(Unfit::Protocol("a seq beyond any Log".to_owned()));
        }
        let (from, to, new_epoch) = match record.header.kind {
            Kind::GAP => {
                let gap: proto::Gap =
                    codec::decode(record.body.clone()).map_err(|error| Unfit::Protocol(error.to_string()))?;
                if gap.to != record.header.seq || gap.from > record.header.seq + 1 {
                    return Err(Unfit::Protocol("a gap whose bounds cannot be".to_owned()));
                }
                let change = (gap.reason() == proto::GapReason::EpochChange).then_some(gap.new_epoch);
                (gap.from, record.header.seq, change)
            }
            _ => (record.header.seq, record.header.seq, None),
        };
        let name = (Arc::clone(origin), Arc::clone(stream));
        let epoch = new_epoch.unwrap_or(record.header.epoch);
        let histories = self.histories.get(&name).map_or(&[][..], Vec::as_slice);
        let known = histories.iter().rev().find(|id| self.logs[id].epoch() == epoch).copied();
        if known.is_none() {
            self.bound_histories(&name).map_err(Unfit::Source)?;
        }
        let histories = self.histories.get(&name).map_or(&[][..], Vec::as_slice);
        let id = match (known, new_epoch) {
            (Some(id), _) => id,
            (None, Some(epoch)) => {
                // Seqs may begin again below the old mark: what follows gets a source of its own.
                if !histories.is_empty() {
                    self.stats.gap("epoch_change", 0);
                    let message =
                        format!("stream {stream} of {origin:?} began a new epoch at seq {}", to + 1);
                    self.set_condition("EpochChanged", format!("{origin}/{stream}"), message);
                }
                let id = self.new_log(origin, stream, class, to + 1, Some(epoch));
                self.import_next(id, record);
                return Ok(id);
            }
            (None, None) if histories.is_empty() => self.log_of(origin, stream, class, Some(epoch)),
            (None, None) => {
                return Err(Unfit::Protocol(format!(
                    "stream {stream}: seq {to} under an epoch that was not announced"
                )));
            }
        };
        let log = &self.logs[&id];
        // An announcement stands for no record; it comes again by every path.
        if to < log.next {
            let held = log.crc_at(to).filter(|held| *held != 0 && record.header.kind == Kind::LOG);
            if record.header.epoch == log.epoch()
                && held.is_some_and(|held| held != crc32c::crc32c(&record.body))
            {
                // What is held is not on disk yet, or it would have been compared at hello. It will be then.
                return Err(Unfit::Protocol(format!(
                    "stream {stream}: seq {to} is held with other bytes: two histories"
                )));
            }
            self.stats.link_duplicates_in += 1;
            return Ok(id);
        }
        if from > log.next || (record.header.kind == Kind::LOG && from != log.next) {
            return Err(Unfit::Protocol(format!("stream {stream}: seq {from} after {}", log.next - 1)));
        }
        self.import_next(id, record);
        Ok(id)
    }

    /// Every history is kept for good, so one node must not begin them without end.
    fn bound_histories(&self, name: &(Origin, Arc<str>)) -> Result<(), String> {
        let (origin, stream) = name;
        if self.histories.get(name).is_some_and(|held| held.len() >= HISTORIES_MAX) {
            return Err(format!("stream {stream} began anew more than {HISTORIES_MAX} times: rename it"));
        }
        let streams = self.histories_of(origin);
        // The tier's are `down/<node>`, one for each node.
        if !origin.is_empty() && !self.histories.contains_key(name) && streams.count() >= STREAMS_MAX {
            return Err(format!("node {origin} has more than {STREAMS_MAX} streams: use fewer"));
        }
        Ok(())
    }

    fn import_next(&mut self, id: LogId, mut record: Record) {
        if let Some(why) = dead_letter::unacceptable(&record) {
            record = self.put_aside(id, &record, why);
        }
        // Another path may have brought a part of what this one has lost.
        record = log::gap_from(record, self.logs[&id].next);
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let mine = log.down_to() == Some(&*self.config.name);
        let frame = (record.header.kind == Kind::LOG && mine).then(|| record.body.clone());
        // In a tier they stand in the Log, for whoever writes its State.
        let owner = self.config.is_hub() && !self.config.shared;
        let bears_intents = mine || (owner && intent::is_log(&log.stream));
        let intent = (record.header.kind == Kind::LOG && bears_intents)
            .then(|| (Arc::clone(&log.origin), record.body.clone()));
        if record.header.kind == Kind::GAP && !log::is_hole(&record) {
            self.stats.gap("received", 1);
        }
        let before = log.appended;
        log.import(&mut self.ledger, record);
        log.forecast.appended.add(self.now.mono, log.appended - before);
        self.keep_policy(id);
        if let Some(frame) = frame {
            // The retained value that a down message asks for enters with the mark, in one group.
            self.retain_if_asked(&frame);
        }
        if let Some((origin, frame)) = intent {
            self.take_intent(&origin, &frame);
        }
    }

    /// Whether a Log is here on its way to somebody else.
    pub(super) fn passes_on(&self, id: LogId) -> bool {
        let log = &self.logs[&id];
        self.config.relay && log.origin != self.own && log.down_to() != Some(&*self.config.name)
    }

    /// Up to where a Log that is passed on has arrived.
    pub(super) fn passed_upto(&self, id: LogId) -> u64 {
        let live = self.receivers_of(&self.logs[&id]).filter_map(|link| link.logs.get(&id)?.mark.as_ref());
        live.chain(self.marks_of(id)).map(|mark| mark.mark).max().unwrap_or(0)
    }

    /// Whether the sender of a Log is to wait: this relay is full of it.
    fn holds(&self, id: LogId) -> bool {
        let log = &self.logs[&id];
        self.passes_on(id)
            && log.kept.bytes() > log.policy.bytes_max
            && log.bytes_after(self.passed_upto(id)) > log.policy.bytes_max
    }

    /// Logs that are passed on have got further: what waited for that goes on.
    pub(super) fn passed_on(&mut self, logs: &[LogId]) {
        for id in logs.iter().filter(|id| self.passes_on(**id)).copied().collect::<Vec<_>>() {
            self.keep_policy(id);
        }
        let mut owing = Vec::new();
        for (session, link) in &self.links {
            for number in link.holding.keys() {
                if let Some(Import::Log { log: Some(id), .. }) = link.imports.get(number)
                    && !self.holds(*id)
                {
                    owing.push((*session, *number));
                }
            }
        }
        for (session, number) in owing {
            self.on_import_durable(session, number);
        }
        self.flush_acks();
    }

    fn import_live(&mut self, session: SessionId, origin: &Origin, record: &Record) {
        let flags = record.header.flags;
        let Ok(view) = FrameView::parse(&record.body) else { return };
        if codec::topic::validate_topic(view.topic()).is_err() {
            return self.stats.drop(DropReason::NotAuthorized);
        }
        let correlation = record.header.seq;
        let link = &self.links[&session];
        let below = link.side == Side::Below;
        if below && !link.present.contains_key(origin) {
            return self.stats.drop(DropReason::Fenced);
        }
        if below && flags.contains(Flags::REPLY) {
            return self.on_reply(session, origin, correlation, &record.body);
        }
        let asks = flags.contains(Flags::REQUEST) && !below;
        if asks && *origin != self.own {
            return self.pass_request(session, origin, correlation, &record.body);
        }
        if !self.config.imports.has_live(view.topic()) {
            self.stats.drop(DropReason::NotImported);
            if asks {
                self.answer_nobody(session, correlation);
            }
            return;
        }
        if below && !self.config.is_hub() {
            return self.export_live(origin, view.topic(), &record.body);
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
            link.owed.insert(source, ());
            self.acks_owed.insert(session);
        }
    }

    /// Tells peers what has become durable: one message for all sources of a link.
    pub(super) fn flush_acks(&mut self) {
        for session in std::mem::take(&mut self.acks_owed) {
            let Some(link) = self.links.get_mut(&session) else { continue };
            let owed = std::mem::take(&mut link.owed);
            let link = &self.links[&session];
            let sources: Vec<proto::SourceAck> = owed
                .keys()
                .filter_map(|number| self.position_of(session, *number, link.imports.get(number)?))
                .collect();
            let link = self.links.get_mut(&session).expect("looked at it");
            for at in &sources {
                if at.hold {
                    link.holding.insert(at.source, ());
                } else {
                    link.holding.remove(&at.source);
                }
            }
            let ack = proto::Ack { sources, window: None };
            self.send_control(session, proto::control::Message::Ack(ack));
        }
    }

    fn position_of(
        &self,
        session: SessionId,
        source: LinkSource,
        import: &Import,
    ) -> Option<proto::SourceAck> {
        match import {
            Import::Log { log, .. } => {
                let id = (*log)?;
                let log = self.logs.get(&id)?;
                if log.durable_next <= log.epochs.first().map_or(1, |(from, _)| *from) {
                    // Nothing of this history is durable, and its beginning says nothing of the one before.
                    return None;
                }
                let seq = log.durable_next - 1;
                let crc = log.crc_at(seq).unwrap_or(0);
                Some(proto::SourceAck { source, epoch: log.epoch(), seq, crc, hold: self.holds(id) })
            }
            Import::State { space, .. } if self.spaces[*space].scoped => {
                let (_, durable) = self.links[&session].part_records.get(&source)?;
                Some(proto::SourceAck { source, epoch: 0, seq: *durable, crc: 0, hold: false })
            }
            Import::State { space, .. } => {
                let (epoch, seq) = self.spaces[*space].durable;
                Some(proto::SourceAck { source, epoch, seq, crc: 0, hold: false })
            }
            Import::Live { .. } | Import::Unknown => None,
        }
    }
}
