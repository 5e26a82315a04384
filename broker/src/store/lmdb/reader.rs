//! The thread that reads Logs.
//!
//! A reader goes on behind whatever it is told is lost, so only damage is told as a gap. Anything else that
//! fails, from a lack of descriptors to a lack of memory, says nothing about the records: the read is tried
//! again until it succeeds or the store ends, and never answered with less than there is.

use std::{collections::VecDeque, io, ops::ControlFlow, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader};

use super::{
    Shared, checkpoint,
    index::{Key, Run, Runs},
    lock_of,
    overlay::{END, RUNS_PER_READ},
    topics::{Probes, RuledOut},
};
use crate::{
    core::event::ReadRequest,
    store::{
        StoreEvent,
        facts::{self, Span},
        journal::{Place, scan},
    },
};

/// Serves reads in order, until there will be no more.
pub(super) fn run(shared: &Shared) {
    let reader = Reader { shared };
    let mut waiting = VecDeque::new();
    while shared.reads.take(&mut waiting) {
        for request in waiting.drain(..) {
            if let Some((records, next)) = reader.serve(&request) {
                shared.events.push(StoreEvent::Read { read: request.read, records, next });
            }
        }
    }
}

struct Reader<'a> {
    shared: &'a Shared,
}

/// The answer so far.
struct Answer<'a> {
    request: &'a ReadRequest,
    records: Vec<Record>,
    bytes: usize,
    /// It has a record or a gap that covers something.
    enough: bool,
    /// Everything in front of this seq is in it, or left out.
    next: u64,
    /// What was looked at, in bytes of journal; a run that was left out counts for [`SKIP_COST`].
    looked: u64,
}

/// Why a read was not served, though nothing is known to be lost.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the index: {0}")]
    Index(#[from] checkpoint::Error),
    #[error("a segment: {0}")]
    Segment(#[from] io::Error),
}

impl Reader<'_> {
    /// Tries until it succeeds; `None` if the store ends before.
    fn serve(&self, request: &ReadRequest) -> Option<(Vec<Record>, u64)> {
        let mut told = false;
        loop {
            match self.try_serve(request) {
                Ok(answer) => return Some((answer.records, answer.next)),
                Err(error) if !told => {
                    tracing::error!(%error, source = request.source, "cannot read a Log now, trying again");
                    told = true;
                }
                Err(_) => {}
            }
            if !self.shared.reads.pause(RETRY_AFTER) {
                return None;
            }
        }
    }

    fn try_serve<'r>(&self, request: &'r ReadRequest) -> Result<Answer<'r>, ReadError> {
        let next = request.from;
        let mut answer = Answer { request, records: Vec::new(), bytes: 0, enough: false, next, looked: 0 };
        let probes = request.wanted.as_deref().and_then(Probes::new);
        // Everything in front of this place is served. Entries change while this goes on: they are cut,
        // and joined when segments are rewritten.
        let mut at: Key = (request.from, facts::EMPTY);
        let mut freed: Option<(Key, Place)> = None;
        'view: loop {
            let View { runs, until, ruled_out } = view(self.shared, request.source, at.0, probes.as_ref())?;
            for (key, run) in runs {
                let end = (run.last, key.1);
                if end < at {
                    continue;
                }
                // Not on what covers nothing: it is told with what follows it.
                if answer.is_long() && at.1 == facts::EMPTY {
                    return Ok(answer);
                }
                let behind = (end.0.saturating_add(u64::from(end.1)), 1 - end.1);
                if ruled_out.has(key.0, &run) {
                    answer.looked += SKIP_COST;
                    (answer.next, at) = (behind.0, behind);
                    continue;
                }
                answer.looked += run.place.len;
                match self.read_run(request, at.0, key, &run) {
                    // The segment was freed after the view was taken: another look tells where the records
                    // are now, if they are still in the Log.
                    Err(error)
                        if error.kind() == io::ErrorKind::NotFound
                            && !self.shared.segments.has(run.place.segment)
                            && freed.replace((key, run.place)) != Some((key, run.place)) =>
                    {
                        continue 'view;
                    }
                    Err(error) if !scan::is_damage(&error) => return Err(error.into()),
                    Err(error) => {
                        tracing::error!(%error, source = request.source, from = key.0, to = run.last,
                            "records of a Log cannot be read, a gap is told instead");
                        let what = format!("records of a Log cannot be read, from seq {}: {error}", key.0);
                        let (events, place) = (&self.shared.events, run.place);
                        self.shared.quarantine.tell(events, place.segment, place.offset, what);
                        if answer.add(unreadable(request.source, at.0, key, &run)).is_break() {
                            return Ok(answer);
                        }
                    }
                    Ok(records) => {
                        if records.into_iter().try_for_each(|record| answer.add(record)).is_break() {
                            return Ok(answer);
                        }
                    }
                }
                (answer.next, at) = (behind.0, behind);
            }
            if until == END {
                break;
            }
            at = at.max(until);
        }
        Ok(answer)
    }

    /// The records that an index entry claims, from this seq on, without those that are not wanted.
    fn read_run(&self, request: &ReadRequest, from: u64, key: Key, run: &Run) -> io::Result<Vec<Record>> {
        let (salt, file) = self.shared.segments.file(run.place.segment)?;
        if run.place.len == 0 {
            // It stands for records whose place is not known.
            return Err(io::ErrorKind::InvalidData.into());
        }
        let len = usize::try_from(run.place.len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut picked: Vec<Record> = Vec::new();
        let mut pick = |record: Record| {
            if record.header.source == request.source
                && let Some(span) = Span::of(&record)
            {
                if run.gap && (span.start, span.order) == key && record.header.kind == Kind::GAP {
                    picked = vec![record];
                } else if !run.gap
                    && record.header.kind == Kind::LOG
                    && (key.0.max(from)..=run.last).contains(&span.start)
                {
                    // The groups may still hold an earlier record of this seq.
                    while picked.last().is_some_and(|last| last.header.seq >= span.start) {
                        picked.pop();
                    }
                    picked.push(record);
                }
            }
        };
        scan::read_groups(&file, salt, run.place.offset, len, &mut |_, _, records| {
            scan::split(records).for_each(&mut pick);
        })?;
        // Only now: one that is not wanted may have taken the place of one that is.
        picked.retain(|record| request.wants(record));
        if picked.iter().map(Record::wire_len).sum::<usize>() < len / 4 {
            for record in &mut picked {
                record.body = Bytes::copy_from_slice(&record.body);
            }
        }
        Ok(picked)
    }
}

impl Answer<'_> {
    fn add(&mut self, record: Record) -> ControlFlow<()> {
        let len = record.wire_len();
        let span = Span::of(&record).expect("only Log records and gaps are read");
        if self.enough && self.bytes + len > self.request.bytes_max {
            self.next = self.next.max(span.start);
            return ControlFlow::Break(());
        }
        self.bytes += len;
        self.enough |= span.is_full();
        self.records.push(record);
        ControlFlow::Continue(())
    }

    /// So much was looked at that others come first, though there may be little to return.
    fn is_long(&self) -> bool {
        self.request.wanted.is_some() && self.looked > LOOK_MAX && self.next > self.request.from
    }
}

/// A part of a Log's index.
struct View {
    runs: Runs,
    /// From here on there may be more.
    until: Key,
    ruled_out: RuledOut,
}

/// The index entries of a Log around and after this seq.
fn view(shared: &Shared, source: u32, from: u64, probes: Option<&Probes>) -> checkpoint::Result<View> {
    // First the overlay, then the checkpoint: what is committed in between is seen twice, not missed.
    let pages = lock_of(&shared.gathering).overlay.changes(source, from);
    // Most of them may be passed over.
    let limit = if probes.is_some() { 8 * RUNS_PER_READ } else { RUNS_PER_READ };
    let (applied, mut runs, mut until) = shared.checkpoint.runs(source, from, limit)?;
    let ruled_out = match probes {
        Some(probes) => shared.checkpoint.ruled_out(source, &runs, probes)?,
        None => RuledOut::default(),
    };
    let newer = || pages.iter().filter(|page| page.last_lsn > applied);
    until = newer().map(|page| page.until).fold(until, Key::min);
    for page in newer() {
        page.changes.apply(&mut runs, until);
    }
    runs.retain(|key, _| *key < until);
    Ok(View { runs, until, ruled_out })
}

/// Stands in for records whose groups are damaged: a reader is told, and goes on behind them.
fn unreadable(source: u32, from: u64, (start, order): Key, run: &Run) -> Record {
    let from = if order == facts::FULL { start.max(from) } else { start };
    let header = RecordHeader {
        kind: Kind::GAP,
        class: Class::Telemetry as u8,
        flags: Flags::default(),
        source,
        epoch: 0,
        seq: run.last,
        aux: 0,
    };
    Record { header, body: facts::corruption_gap(from, run.last.max(from)) }
}

/// Bytes of journal that one read for narrow filters looks at. Tests write little.
const LOOK_MAX: u64 = if cfg!(test) { 2 << 10 } else { 1 << 20 };
/// What passing over a run costs, in bytes that are read in the same time, about.
const SKIP_COST: u64 = 128;
/// Between two tries of a read.
const RETRY_AFTER: Duration = Duration::from_millis(100);
