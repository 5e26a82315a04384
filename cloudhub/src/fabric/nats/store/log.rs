//! Writing one Log of one node: batches, one at a time, each only where the one before is the last.
//!
//! ```text
//!  idle ──append──> appending ──ok──> idle
//!                       │ conflict, or nobody knows
//!                       v
//!                    reading ──it is there, in part or whole──> trimmed, idle
//!                       │ ──another history──> asking whose the node is ──> idle, or fenced
//!                       │ ──a hole──> fenced: the node is asked again from where the stream stands
//! ```
//!
//! (epoch, seq) stands for one record for ever, so a replica that writes late writes what is true; the
//! expected sequence keeps it from writing twice or out of order. Fencing is for the one case in which two
//! histories of a node are on their way at once.

use std::collections::VecDeque;

use broker::event::Lsn;
use bytes::Bytes;
use codec::{Kind, Record, batch, proto};

use super::message::{self, End, Headers};

/// Bytes of a message beside its payload: subject, our headers, NATS's own.
const HEAD_BYTES: usize = 4_608;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct LogWriter {
    lsns: VecDeque<Lsn>,
    records: VecDeque<Record>,
    /// Of these records at the front a message is on its way, or its fate is unknown.
    sent: usize,
    /// An operation of this Log is under way.
    busy: bool,
    /// Where the Log ends in JetStream, as far as is known.
    pub(super) end: Option<End>,
    /// Only one record at a time: the server refused several.
    alone: bool,
    /// The end is to be read before anything else.
    look_next: bool,
    /// When something of it was last written, wall time in seconds.
    written_s: u64,
    /// What stands there, while it is asked whose the node is.
    pub(super) asked: Option<End>,
}

/// What a writer wants done.
#[derive(Debug)]
pub(super) enum Next {
    Nothing,
    Append(Append),
    /// Read the end.
    Look,
    /// These records are there already: another replica wrote further than this one knew.
    There(Vec<Lsn>),
    /// A record that no message can hold; a gap stands in its place.
    Poison(Record),
}

/// A message to write.
#[derive(Debug)]
pub(super) struct Append {
    /// Sequence of the subject's last message; 0: there is none.
    pub(super) expected: u64,
    pub(super) headers: Headers,
    pub(super) payload: Bytes,
}

/// What a look at the end of the Log says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It can go on. These records turned out to be there.
    GoOn(Vec<Lsn>),
    /// Another history stands there: whether the node is still ours decides.
    AskWhose,
    /// What is there and what is to be written do not fit: the node has to say again what it has.
    Fence(&'static str),
}

impl LogWriter {
    pub(super) fn at(end: Option<End>, now_s: u64) -> Self {
        Self { end, written_s: now_s, ..Self::default() }
    }

    pub(super) fn push(&mut self, lsn: Lsn, record: Record) {
        self.lsns.push_back(lsn);
        self.records.push_back(message::stored(record));
    }

    /// The next message, if none is on its way.
    pub(super) fn next(&mut self, encoder: &mut batch::Encoder, payload_max: usize) -> Next {
        if !self.busy && std::mem::take(&mut self.look_next) {
            self.busy = true;
            return Next::Look;
        }
        if self.busy || self.records.is_empty() {
            return Next::Nothing;
        }
        if let Some(end) = self.end {
            let there = self.covered_by(end);
            if there > 0 {
                return Next::There(self.settle(there));
            }
            self.clip(0, end);
        }
        let room = payload_max.saturating_sub(HEAD_BYTES);
        let epoch = self.records[0].header.epoch;
        let (mut raw, mut count) = (0, 0);
        for record in &self.records {
            let len = record.wire_len();
            let fits = batch::fits(raw, len) && raw + len + batch::Prefix::LEN <= room;
            let enough = self.alone || count == usize::from(u16::MAX) || record.header.epoch != epoch;
            if count > 0 && (!fits || enough) {
                break;
            }
            raw += len;
            count += 1;
        }
        self.records.make_contiguous();
        let (records, _) = self.records.as_slices();
        let payload = message::payload_of(encoder, &records[..count]);
        let Some(payload) = payload.filter(|payload| payload.len() <= room) else {
            return self.poison();
        };
        let headers = message::headers_of(&records[..count]);
        self.sent = count;
        self.busy = true;
        Next::Append(Append { expected: self.end.map_or(0, |end| end.sequence), headers, payload })
    }

    /// The first record can never be written: a gap takes its place.
    fn poison(&mut self) -> Next {
        let record = self.records[0].clone();
        let seq = record.header.seq;
        let gap = proto::Gap {
            from: seq,
            to: seq,
            count: 1,
            reason: proto::GapReason::Refused as i32,
            new_epoch: 0,
        };
        let mut header = record.header;
        header.kind = Kind::GAP;
        self.records[0] = Record { header, body: codec::encode(&gap) };
        Next::Poison(record)
    }

    /// The message was written, with this sequence: the lsns of its records.
    pub(super) fn appended(&mut self, sequence: u64, now_s: u64) -> Vec<Lsn> {
        self.written_s = now_s;
        self.busy = false;
        self.alone = false;
        let Some(last) = self.sent.checked_sub(1).and_then(|at| self.records.get(at)) else {
            return Vec::new();
        };
        self.end = Some(end_at(sequence, &self.records[0], last));
        let sent = std::mem::take(&mut self.sent);
        self.settle(sent)
    }

    /// The server refuses the message for what it is. A record alone is put aside; several are tried by
    /// themselves.
    pub(super) fn refused(&mut self) -> Option<Record> {
        self.busy = false;
        if std::mem::take(&mut self.sent) > 1 {
            self.alone = true;
            return None;
        }
        match self.records.front().map(|record| record.header.kind) {
            Some(Kind::LOG) => match self.poison() {
                Next::Poison(record) => Some(record),
                _ => None,
            },
            _ => None,
        }
    }

    /// It did not happen: the same again, later.
    pub(super) fn not_now(&mut self) {
        self.busy = false;
        self.sent = 0;
    }

    /// What was asked about the node was answered: it is still ours.
    pub(super) fn still_ours(&mut self, end: End) -> Verdict {
        self.not_now();
        match self.records.front() {
            Some(record) if !announces(record) => {
                Verdict::Fence("another history of this stream is in the tier: it is looked at again")
            }
            _ => {
                self.end = Some(end);
                Verdict::GoOn(Vec::new())
            }
        }
    }

    /// The end of the Log was read, because a message did not fit, or nobody knows what became of it.
    pub(super) fn found(&mut self, found: Option<End>) -> Verdict {
        let sent = std::mem::take(&mut self.sent);
        let Some(first) = self.records.front() else {
            return self.found_at_rest(found);
        };
        let Some(end) = found else {
            return match self.end {
                // Nothing was ever there, and nothing has come.
                None => self.go_on(None, 0),
                Some(_) => {
                    Verdict::Fence("the tier has lost this stream's records: they are asked for again")
                }
            };
        };
        if end.epoch == first.header.epoch {
            let there = self.covered_by(end);
            let at_mark = self
                .records
                .iter()
                .take(there)
                .last()
                .filter(|record| record.header.kind == Kind::LOG && record.header.seq == end.mark);
            if at_mark.is_some_and(|record| end.crc != 0 && crc32c::crc32c(&record.body) != end.crc) {
                return Verdict::Fence("the tier holds other bytes at this seq: two histories");
            }
            let next = self.records.get(there);
            if next.is_some_and(|next| {
                next.header.epoch == end.epoch && message::first_seq(next) > end.mark.saturating_add(1)
            }) {
                return Verdict::Fence("the tier has lost the end of this stream: it is asked for again");
            }
            self.clip(there, end);
            return self.go_on(Some(end), there);
        }
        let same = self.end.is_some_and(|held| (held.epoch, held.mark) == (end.epoch, end.mark));
        if same {
            return self.go_on(Some(end), 0);
        }
        // A later epoch of ours may stand there: the message went through as a whole.
        let through = self
            .records
            .iter()
            .take(sent)
            .position(|record| record.header.epoch == end.epoch && record.header.seq == end.mark);
        match through {
            Some(at) => self.go_on(Some(end), at + 1),
            None => Verdict::AskWhose,
        }
    }

    /// Nothing is to be written: what was acknowledged must still be there.
    fn found_at_rest(&mut self, found: Option<End>) -> Verdict {
        let stands = match (self.end, found) {
            (Some(held), Some(end)) => {
                (held.epoch, held.mark) == (end.epoch, end.mark) || end.sequence > held.sequence
            }
            (held, _) => held.is_none(),
        };
        if stands {
            return self.go_on(found, 0);
        }
        Verdict::Fence("the tier has lost the end of this stream: it is asked for again")
    }

    /// The end is to be looked at, if it was written of late: at once, or when what is under way has ended, whose
    /// answer may be of before. True: at once.
    pub(super) fn look(&mut self, since_s: u64) -> bool {
        if self.busy {
            self.look_next = true;
            return false;
        }
        self.busy = self.end.is_some() && self.written_s >= since_s;
        self.busy
    }

    fn go_on(&mut self, end: Option<End>, there: usize) -> Verdict {
        self.busy = false;
        self.end = end;
        Verdict::GoOn(self.settle(there))
    }

    /// How many records at the front are there, if the Log ends so.
    fn covered_by(&self, end: End) -> usize {
        let is_there = |record: &&Record| record.header.epoch == end.epoch && record.header.seq <= end.mark;
        self.records.iter().take_while(is_there).count()
    }

    /// Of a gap that reaches over the mark, what is behind it is left.
    fn clip(&mut self, at: usize, End { mark, epoch, .. }: End) {
        if let Some(record) = self.records.get_mut(at)
            && record.header.epoch == epoch
            && record.header.kind == Kind::GAP
            && let Ok(mut gap) = codec::decode::<proto::Gap>(record.body.clone())
            && gap.from <= mark
            && mark < gap.to
        {
            gap.count = gap.count.min(gap.to - mark);
            gap.from = mark + 1;
            record.body = codec::encode(&gap);
        }
    }

    fn settle(&mut self, count: usize) -> Vec<Lsn> {
        self.records.drain(..count);
        self.lsns.drain(..count).collect()
    }
}

/// Whether a record begins a history.
fn announces(record: &Record) -> bool {
    let gap = (record.header.kind == Kind::GAP).then(|| codec::decode::<proto::Gap>(record.body.clone()));
    matches!(gap, Some(Ok(gap)) if gap.reason() == proto::GapReason::EpochChange)
}

fn end_at(sequence: u64, first: &Record, last: &Record) -> End {
    let crc = if last.header.kind == Kind::LOG { crc32c::crc32c(&last.body) } else { 0 };
    End {
        sequence,
        epoch: last.header.epoch,
        from: message::first_seq(first).min(last.header.seq).max(1),
        mark: last.header.seq,
        crc,
        class: codec::Class::from_u8(last.header.class).unwrap_or(codec::Class::Event),
    }
}
