//! What flows over an established link: Logs and State out with windows, in with marks.

use std::sync::Arc;

use bytes::Bytes;
use codec::{Class, Flags, FrameView, Kind, Record, RecordHeader, proto};

use super::{
    Core, DropReason, Reading,
    event::{Origin, Output, Peer, Role, SessionId},
    ledger::Effect,
    link::{Import, Link, LinkSource, LogExport, Phase, StateExport},
    log::{self, Log, LogId},
    publish::Message,
    space::{Pair, Version},
};
use crate::{limits, store::SourceKind};

/// Records put on one link in one `apply`.
const PUMP_RECORDS: usize = 1024;
/// Bytes of one read for an export.
const READ_BYTES: usize = 256 << 10;

impl Core {
    /// The Logs that this broker sends to a peer.
    fn exported_logs(&self, peer: &Peer) -> impl Iterator<Item = &Log> {
        let down = (self.config.is_hub() && peer.role == Role::Node).then(|| format!("down/{}", peer.name));
        let up = !self.config.is_hub() && peer.role == Role::Hub;
        self.logs.values().filter(move |log| {
            let is_down = down.as_deref().is_some_and(|down| log.origin.is_empty() && *log.stream == *down);
            let theirs = is_down || (up && log.origin == self.own);
            !log.retired && theirs && self.config.exports.has_stream(&log.stream)
        })
    }

    pub(super) fn log_offers(&self, peer: &Peer) -> Vec<proto::LogOffer> {
        self.exported_logs(peer)
            .map(|log| proto::LogOffer {
                origin: log.origin.to_string(),
                stream: log.stream.to_string(),
                epoch: log.epoch(),
                first: log.first,
                next: log.durable_next,
            })
            .collect()
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

    fn exported_spaces(&self, peer: &Peer) -> impl Iterator<Item = usize> {
        let up = !self.config.is_hub() && peer.role == Role::Hub;
        let exported = |index: &usize| {
            let space = &self.spaces[*index];
            space.owned && self.config.exports.has_space(&space.name)
        };
        (0..self.spaces.len()).filter(move |index| up && exported(index))
    }

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
                incarnation: space.durable.0,
                revision: space.durable.1,
            })
            .collect()
    }

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

    fn begin_log_export(&mut self, session: SessionId, id: LogId, mark: Option<proto::LogMark>) {
        let link = self.links.get_mut(&session).expect("an established link");
        let stored = self.marks.get(&(link.receiver().to_owned(), id)).copied();
        let mut export = LogExport { mark: stored, ..LogExport::default() };
        let log = &self.logs[&id];
        let mark = mark.filter(|mark| mark.epoch != 0);
        match mark {
            None => {
                // The receiver has nothing: from the beginning, what policy removed as a gap.
                export.next = log.epochs.first().map_or(1, |(from, _)| *from).min(log.first);
                export.epoch = log.epoch_at(export.next);
                if export.next > 1 {
                    export.epoch = 0;
                }
            }
            Some(mark) => Self::resume(log, &mut export, mark),
        }
        let checking = export.checking.as_ref().map(|mark| mark.mark);
        let rolled_back = export.next == 0;
        link.logs.insert(id, export);
        if let Some(from) = checking {
            self.read(id, from, 1, Reading::Mark(session, id));
        } else if rolled_back {
            self.change_epoch(session, id);
        }
        self.pump_links.insert(session);
    }

    /// Decides where to go on for a receiver with this mark. `next` = 0: the histories differ.
    fn resume(log: &Log, export: &mut LogExport, mark: proto::LogMark) {
        let Some(range) = log.epochs.iter().position(|(_, epoch)| *epoch == mark.epoch) else {
            // An epoch that this Log never had: the receiver's is an older history.
            export.epoch = 0;
            export.next = log.first;
            return;
        };
        export.epoch = mark.epoch;
        if let Some((following, _)) = log.epochs.get(range + 1)
            && mark.mark >= *following
        {
            // The receiver holds what this Log disowned when it began the next epoch.
            export.next = *following;
            return;
        }
        if mark.mark >= log.durable_next {
            return; // this store was rolled back
        }
        let stored = export.mark.as_ref().filter(|held| held.epoch == mark.epoch && held.mark == mark.mark);
        let known = stored.map(|held| held.crc).or_else(|| log.crc_at(mark.mark));
        match known {
            Some(crc) if crc == mark.crc || crc == 0 || mark.crc == 0 => export.next = mark.mark + 1,
            Some(_) => {}
            None if mark.mark < log.first || mark.crc == 0 => export.next = mark.mark + 1,
            None => {
                export.next = mark.mark + 1;
                export.checking = Some(mark);
            }
        }
    }

    pub(super) fn on_mark_read(&mut self, session: SessionId, id: LogId, records: &[Record]) {
        let Some(link) = self.links.get_mut(&session) else { return };
        let Some(export) = link.logs.get_mut(&id) else { return };
        let Some(mark) = export.checking.take() else { return };
        let record =
            records.first().filter(|found| found.header.seq == mark.mark && found.header.kind == Kind::LOG);
        if record.is_some_and(|found| crc32c::crc32c(&found.body) != mark.crc) {
            self.change_epoch(session, id);
        }
        self.pump_links.insert(session);
    }

    /// The receiver's history and this Log's cannot both be true: this store was rolled back, or cloned.
    /// From the receiver's last mark that this store remembers, everything goes on under a new epoch.
    fn change_epoch(&mut self, session: SessionId, id: LogId) {
        let link = self.links.get_mut(&session).expect("an established link");
        let export = link.logs.get_mut(&id).expect("an export that was just begun");
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let from = export.mark.as_ref().map_or(log.first, |mark| mark.mark.saturating_add(1));
        let from = from.clamp(log.first, log.durable_next);
        log.epochs.retain(|(start, _)| *start < from);
        let epoch = rand::Rng::random(&mut self.rng);
        log.begin_epoch(&mut self.ledger, from, epoch);
        export.next = from;
        export.epoch = 0;
        tracing::warn!(stream = %log.stream, from, "the receiver knows another history of this stream: new epoch");
        self.stats.gap("epoch_change", 0);
    }

    fn begin_state_export(&mut self, session: SessionId, index: usize, position: Pair) {
        if position > self.spaces[index].at {
            // No honest receiver is ahead of the owner: this store was rolled back, or is a copy.
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
        };
        let link = self.links.get_mut(&session).expect("an established link");
        link.spaces.insert(index, export);
        self.pump_links.insert(session);
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

    fn pump_log(&mut self, session: SessionId, id: LogId, budget: &mut usize) {
        while *budget > 0 {
            let Some(link) = self.links.get_mut(&session) else { return };
            let Some(export) = link.logs.get_mut(&id) else { return };
            let log = &self.logs[&id];
            let blocked = export.reading || export.checking.is_some();
            if blocked
                || export.in_flight_bytes >= limits::LINK_LOG_WINDOW_BYTES
                || export.next >= log.durable_next
            {
                return;
            }
            *budget -= 1;
            let epoch = log.epoch_at(export.next.max(log.first));
            if epoch != export.epoch {
                let gap = epoch_change(log, export.next, epoch);
                export.epoch = epoch;
                Self::send_log_record(link, log, gap);
                continue;
            }
            if export.next < log.first {
                let gap = log::gap(log, export.next, log.first - 1, proto::GapReason::DropOldest);
                Self::send_log_record(link, log, gap);
                continue;
            }
            let Some(record) = log.in_tail(export.next).cloned() else {
                export.reading = true;
                let from = export.next;
                return self.read(id, from, READ_BYTES, Reading::Export(session, id));
            };
            self.export_record(session, id, record);
        }
    }

    pub(super) fn on_export_read(&mut self, session: SessionId, id: LogId, records: &[Record]) {
        let Some(link) = self.links.get_mut(&session) else { return };
        let Some(export) = link.logs.get_mut(&id) else { return };
        export.reading = false;
        let log = &self.logs[&id];
        if records.is_empty() && export.next >= log.first {
            // The store cannot show what the Log says it has: told as what it is.
            let gap = log::gap(log, export.next, log.durable_next - 1, proto::GapReason::Corruption);
            tracing::error!(stream = %log.stream, from = export.next, "records of this stream cannot be read");
            Self::send_log_record(link, log, gap);
        }
        for record in records {
            let Some(export) = self.links[&session].logs.get(&id) else { return };
            let log = &self.logs[&id];
            let seq = record.header.seq;
            let crossing = log.epoch_at(seq) != export.epoch;
            if crossing || export.in_flight_bytes >= limits::LINK_LOG_WINDOW_BYTES {
                break;
            }
            if seq < export.next {
                continue;
            }
            let (from, _) = log::range_of(record);
            if from > export.next {
                let hole = log::gap(log, export.next, from - 1, proto::GapReason::Corruption);
                self.export_record(session, id, hole);
            }
            self.export_record(session, id, record.clone());
        }
        self.pump_links.insert(session);
    }

    fn export_record(&mut self, session: SessionId, id: LogId, record: Record) {
        let log = &self.logs[&id];
        let mut record = record;
        let down = log.origin.is_empty();
        if record.header.kind == Kind::LOG
            && let Ok(view) = FrameView::parse(&record.body)
            && self.has_expired(&view, if down { self.config.down_ttl.as_secs() } else { 0 })
        {
            let seq = record.header.seq;
            record = log::gap(log, seq, seq, proto::GapReason::Expired);
            self.stats.drop(DropReason::Expired);
        }
        record.header.epoch = log.epoch_at(record.header.seq);
        record.header.flags = Flags(record.header.flags.0 & !Flags::IMPORTED.0);
        let link = self.links.get_mut(&session).expect("an established link");
        Self::send_log_record(link, log, record);
    }

    /// Puts a record or gap of a Log on the link and accounts for it.
    fn send_log_record(link: &mut Link, log: &Log, mut record: Record) {
        let mut number = link.logs[&log.id].number;
        if number == 0 {
            number = link.declare(&log.origin, SourceKind::Log, &log.stream, log.class);
        }
        let export = link.logs.get_mut(&log.id).expect("looked at it");
        export.number = number;
        export.next = record.header.seq + 1;
        export.in_flight.push_back((record.header.seq, record.wire_len()));
        export.in_flight_bytes += record.wire_len();
        record.header.source = number;
        record.header.aux = 0;
        link.push(log.class, record);
    }

    fn pump_state(&mut self, session: SessionId, index: usize, budget: &mut usize) {
        let space = &self.spaces[index];
        let Some(link) = self.links.get_mut(&session) else { return };
        while *budget > 0 {
            let Some(export) = link.spaces.get_mut(&index) else { return };
            if export.in_flight_bytes >= limits::LINK_STATE_WINDOW_BYTES {
                return;
            }
            *budget -= 1;
            let (pair, mut record) = match space.change_after(export.position) {
                Some(change) => change,
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
        }
    }

    pub(super) fn write_marks_of(&mut self, link: &Link) {
        for (id, export) in &link.logs {
            let Some(mark) = export.mark.as_ref().filter(|_| export.mark_is_new) else { continue };
            let value = codec::encode(mark);
            self.ledger.write_local(Kind::MARK, mark_key(link.receiver(), *id), Some(value));
            self.marks.insert((link.receiver().to_owned(), *id), *mark);
        }
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

    /// A State change is durable: watchers see it, links send it.
    pub(super) fn on_state_durable(&mut self, index: usize, key: &str, version: Version) {
        let space = &mut self.spaces[index];
        let event = space.persisted(key, version);
        let watching: Vec<SessionId> = space
            .watchers
            .iter()
            .filter(|(_, prefix)| key.starts_with(&**prefix))
            .map(|(session, _)| *session)
            .collect();
        for session in watching {
            self.output(session, Output::State(event.clone()));
        }
        if self.spaces[index].owned && !self.config.is_hub() {
            self.pump_links.extend(self.links.keys());
        }
    }
}

fn epoch_change(log: &Log, next: u64, new_epoch: u64) -> Record {
    let gap = proto::Gap {
        from: next,
        to: next - 1,
        count: 0,
        reason: proto::GapReason::EpochChange as i32,
        new_epoch,
    };
    let mut record = log::gap(log, next, next - 1, proto::GapReason::EpochChange);
    record.header.epoch = new_epoch;
    record.body = codec::encode(&gap);
    record
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

/// Key of the stored mark of a receiver: its name, a zero, the Log.
fn mark_key(receiver: &str, log: LogId) -> Bytes {
    let mut key = receiver.as_bytes().to_vec();
    key.push(0);
    key.extend_from_slice(&log.to_be_bytes());
    key.into()
}
