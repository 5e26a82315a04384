//! A Log on its way to a receiver: where to resume, what to send, when the histories differ.

use codec::{Flags, FrameView, Kind, Record, proto};

use super::{
    Core, DropReason, Reading,
    event::{Origin, SessionId},
    link::{FEATURE_RELAY, Link, LogExport, Side},
    log::{self, Log, LogId},
};
use crate::store::SourceKind;

/// Bytes of one read for an export.
const READ_BYTES: usize = 256 << 10;

impl Core {
    /// The Logs that this broker sends to a peer, oldest first.
    pub(super) fn exported_logs(&self, link: &Link) -> Vec<LogId> {
        match link.side {
            Side::Above => self.logs_for_above(link),
            // What is for nodes that are reached by this link.
            Side::Below => {
                let tier = Origin::from("");
                let down = |node: &Origin| {
                    self.histories.get(&(Origin::clone(&tier), format!("down/{node}").into()))
                };
                let passed = !self.config.is_hub() || self.config.exports.has_stream("down/");
                link.present.keys().filter(|_| passed).filter_map(down).flatten().copied().collect()
            }
        }
    }

    fn logs_for_above(&self, link: &Link) -> Vec<LogId> {
        if self.config.is_hub() {
            return Vec::new();
        }
        let relays = link.can(FEATURE_RELAY);
        let sent = |origin: &Origin| {
            let behind = relays && self.forwards.contains_key(origin) && !self.comes_from(link, origin);
            *origin == self.own || behind
        };
        let logs = self
            .histories
            .iter()
            .filter(|((origin, stream), _)| sent(origin) && self.config.exports.has_stream(stream));
        logs.flat_map(|(_, ids)| ids)
            .copied()
            .filter(|id| !self.owns(*id) || !self.logs[id].retired)
            .collect()
    }

    /// Whether this broker assigns the positions of a Log; else it passes on what it holds.
    pub(super) fn owns(&self, id: LogId) -> bool {
        self.logs[&id].origin == self.own
    }

    /// Whether what is published here into this Log is for a receiver.
    pub(super) fn is_exported(&self, log: &Log) -> bool {
        let down = log.down_to().is_some() && log.origin.is_empty();
        let own = if self.config.is_hub() { down } else { log.origin == self.own };
        own && !log.retired && self.config.exports.has_stream(&log.stream)
    }

    pub(super) fn log_offers(&self, link: &Link) -> Vec<proto::LogOffer> {
        self.exported_logs(link)
            .iter()
            .map(|id| &self.logs[id])
            .map(|log| proto::LogOffer {
                origin: log.origin.to_string(),
                stream: log.stream.to_string(),
                epoch: log.epoch(),
                first: log.first,
                next: log.durable_next,
            })
            .collect()
    }

    pub(super) fn begin_log_export(&mut self, session: SessionId, id: LogId) {
        if self.config.shared {
            return self.begin_down_export(session, id);
        }
        let owned = self.owns(id);
        let link = self.links.get_mut(&session).expect("an established link");
        let stored = self.marks.get(&(id, link.receiver_name())).copied();
        let mut export = LogExport { mark: stored, ..LogExport::default() };
        let log = &self.logs[&id];
        let mut disowned = false;
        let marks = link
            .peer_marks
            .iter()
            .filter(|mark| *mark.origin == *log.origin && *mark.stream == *log.stream && mark.epoch != 0);
        if owned {
            // The history of the receiver that goes furthest along this one.
            let known = |epoch: u64| log.epochs.iter().position(|(_, held)| *held == epoch);
            let all: Vec<&proto::LogMark> = marks.collect();
            let known =
                all.iter().filter_map(|mark| Some((known(mark.epoch)?, *mark))).max_by_key(|found| found.0);
            match known {
                None if all.is_empty() => Self::from_beginning(log, &mut export, true),
                // It knows other histories only: older than this Log, or newer than a copy of it that came
                // back, and then it may once have held others under the epochs that are known here.
                None => disowned = true,
                Some((range, mark)) => Self::resume(log, &mut export, range, mark.clone()),
            }
        } else {
            // One history of another broker's Log: its positions are what they are, even if the receiver
            // has got further by another path.
            let mut first = self.histories.get(&log.name()).is_none_or(|ids| ids.first() == Some(&id));
            let mark = marks.inspect(|_| first = false).find(|mark| mark.epoch == log.epoch());
            match mark {
                None => Self::from_beginning(log, &mut export, first),
                Some(mark) => (export.next, export.epoch) = (mark.mark.saturating_add(1), mark.epoch),
            }
        }
        let checking = export.checking.as_ref().map(|mark| mark.mark);
        let rolled_back = export.next == 0;
        link.logs.insert(id, export);
        if let Some(from) = checking {
            self.read(id, from, 1, Reading::Mark(session, id));
        } else if rolled_back {
            let from = if disowned { self.logs[&id].first } else { self.after_mark(session, id) };
            self.change_epoch(session, id, from);
        }
        self.pump_links.insert(session);
    }

    /// The receiver has nothing of this history: from its beginning, what policy removed as a gap. Unless it
    /// is the first that the receiver gets of the stream, it is announced.
    fn from_beginning(log: &Log, export: &mut LogExport, first: bool) {
        export.next = log.begin();
        export.epoch = if first && export.next <= 1 { log.epoch_at(export.next) } else { 0 };
    }

    /// Decides where to go on for a receiver with this mark, which is of the epoch that stands at `range` in
    /// the table. `next` = 0: the histories differ.
    fn resume(log: &Log, export: &mut LogExport, range: usize, mark: proto::LogMark) {
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
            let from = self.after_mark(session, id);
            self.change_epoch(session, id, from);
        }
        self.pump_links.insert(session);
    }

    /// What follows the receiver's last mark that this store remembers. A receiver that is new here may have
    /// got what it holds by way of one that is not.
    fn after_mark(&self, session: SessionId, id: LogId) -> u64 {
        let log = &self.logs[&id];
        let known = self.marks_of(id).map(|mark| mark.mark).max();
        let mine = self.links[&session].logs.get(&id).and_then(|export| Some(export.mark.as_ref()?.mark));
        let from = mine.or(known).map_or(log.first, |mark| mark.saturating_add(1));
        from.clamp(log.first, log.durable_next)
    }

    /// The receiver's history and this Log's cannot both be true: this store was rolled back, or cloned.
    /// From here on everything goes on under a new epoch.
    fn change_epoch(&mut self, session: SessionId, id: LogId, from: u64) {
        let link = self.links.get_mut(&session).expect("an established link");
        let export = link.logs.get_mut(&id).expect("an export that was just begun");
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        log.epochs.retain(|(start, _)| *start < from);
        let epoch = rand::Rng::random(&mut self.rng);
        log.begin_epoch(&mut self.ledger, from, epoch);
        export.next = from;
        export.epoch = 0;
        tracing::warn!(stream = %log.stream, from, "the receiver knows another history of this stream: new epoch");
        self.stats.gap("epoch_change", 0);
    }

    pub(super) fn pump_log(&mut self, session: SessionId, id: LogId, budget: &mut usize) {
        if !self.is_due(session, id) {
            return;
        }
        while *budget > 0 {
            let Some(link) = self.links.get_mut(&session) else { return };
            let log = &self.logs[&id];
            let credit = link.has_credit(log.class);
            let Some(export) = link.logs.get_mut(&id) else { return };
            let blocked = export.reading || export.checking.is_some() || export.held;
            let full = !credit || export.in_flight.bytes as u64 >= link.window.log_bytes;
            if blocked || full || export.next >= log.durable_next {
                return;
            }
            if link.side == Side::Above
                && let Err(held) = self.budgets.permit(self.now, log.class, &log.stream)
            {
                return self.ask_budgets_at(held.until);
            }
            *budget -= 1;
            let epoch = log.epoch_at(export.next.max(log.first));
            if epoch != export.epoch {
                let gap = epoch_change(log, export.next, epoch);
                export.epoch = epoch;
                self.send_log_record(session, id, gap);
                continue;
            }
            if export.next < log.first {
                // All of it under the epoch that was announced, wherever earlier ones ended.
                for mut gap in log.front_gaps(export.next) {
                    gap.header.epoch = epoch;
                    self.send_log_record(session, id, gap);
                }
                continue;
            }
            let Some(record) = log.in_tail(export.next).cloned() else {
                export.reading = true;
                let from = export.next;
                let above = link.side == Side::Above;
                let bytes = if above { self.budgets.room(log.class, &log.stream) } else { READ_BYTES };
                return self.read(id, from, bytes.min(READ_BYTES), Reading::Export(session, id));
            };
            self.export_record(session, id, record);
        }
    }

    /// Whether a Log's turn has come: its node is reached by this link, and older histories went first.
    fn is_due(&self, session: SessionId, id: LogId) -> bool {
        let Some(link) = self.links.get(&session) else { return false };
        let log = &self.logs[&id];
        if let Some(node) = log.down_to()
            && !link.present.contains_key(node)
        {
            return false;
        }
        let histories = self.histories.get(&log.name()).map_or(&[][..], Vec::as_slice);
        histories.iter().take_while(|older| **older != id).all(|older| {
            let sent = link.logs.get(older).map(|export| export.next);
            sent.is_none_or(|next| next >= self.logs[older].durable_next)
        })
    }

    pub(super) fn on_export_read(&mut self, session: SessionId, id: LogId, records: &[Record]) {
        if self.config.shared {
            return self.on_down_read(session, id, records);
        }
        let Some(link) = self.links.get_mut(&session) else { return };
        let Some(export) = link.logs.get_mut(&id) else { return };
        export.reading = false;
        let log = &self.logs[&id];
        if records.is_empty() && export.next >= log.first {
            // The store cannot show what the Log says it has: told as what it is.
            let gap = log::gap(log, export.next, log.durable_next - 1, proto::GapReason::Corruption);
            tracing::error!(stream = %log.stream, from = export.next, "records of this stream cannot be read");
            self.send_log_record(session, id, gap);
        }
        for record in records {
            let Some(export) = self.links[&session].logs.get(&id) else { return };
            let log = &self.logs[&id];
            let seq = record.header.seq;
            if seq < export.next {
                continue; // among them the announcement that a history begins with
            }
            let (from, _) = log::range_of(record);
            let crossing = log.epoch_at(from.max(export.next)) != export.epoch;
            let link = &self.links[&session];
            if crossing || export.in_flight.bytes as u64 >= link.window.log_bytes {
                break;
            }
            if export.next < log.first {
                break; // policy removed it meanwhile, and says so from here on
            }
            if link.side == Side::Above
                && let Err(held) = self.budgets.permit(self.now, log.class, &log.stream)
            {
                self.ask_budgets_at(held.until);
                break;
            }
            let (export, log) = (self.links[&session].logs.get(&id).expect("its export"), &self.logs[&id]);
            if from > export.next {
                let hole = log::gap(log, export.next, from - 1, proto::GapReason::Corruption);
                self.export_record(session, id, hole);
            }
            self.export_record(session, id, record.clone());
            if self.links[&session].logs.get(&id).is_none_or(|export| export.next <= seq) {
                break; // what is left of a gap belongs to the next epoch
            }
        }
        self.pump_links.insert(session);
    }

    pub(super) fn export_record(&mut self, session: SessionId, id: LogId, record: Record) {
        let log = &self.logs[&id];
        let mut record = record;
        let down = log.origin.is_empty();
        if record.header.kind == Kind::LOG
            && let Ok(view) = FrameView::parse(&record.body)
            && self.has_expired(
                &view,
                if down { self.config.down_ttl } else { log.policy.ttl.unwrap_or_default() },
            )
        {
            let seq = record.header.seq;
            record = log::gap(log, seq, seq, proto::GapReason::Expired);
            self.stats.drop(DropReason::Expired);
        }
        let export = self.links[&session].logs.get(&id).expect("its export");
        if record.header.kind == Kind::GAP
            && let Some((following, _)) = log.epochs.iter().find(|(from, _)| *from > export.next)
        {
            // An epoch begins where it was announced, also within what is gone.
            record = log::gap_to(record, following - 1);
        }
        record.header.epoch = log.epoch_at(record.header.seq);
        record.header.flags = Flags(record.header.flags.0 & !Flags::IMPORTED.0);
        self.send_log_record(session, id, record);
    }

    /// Puts a record or gap of a Log on the link and accounts for it.
    pub(super) fn send_log_record(&mut self, session: SessionId, id: LogId, mut record: Record) {
        let log = &self.logs[&id];
        let link = self.links.get_mut(&session).expect("an established link");
        let mut number = link.logs.get(&id).expect("its export").number;
        if number == 0 {
            number = link.declare(&log.origin, SourceKind::Log, &log.stream, log.class);
        }
        let export = link.logs.get_mut(&id).expect("looked at it");
        // A gap that thinning made wider must not cover what the receiver holds already.
        record = log::gap_from(record, export.next);
        let bytes = record.wire_len();
        export.number = number;
        export.next = record.header.seq + 1;
        export.in_flight.sent(record.header.seq, bytes);
        link.in_flight_bytes += bytes;
        record.header.source = number;
        record.header.aux = 0;
        if link.side == Side::Above {
            self.budgets.spent(self.now, log.class, &log.stream, bytes);
        }
        link.push(log.class, record);
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
