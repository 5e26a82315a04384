//! The thread that reads Logs.
//!
//! A reader goes on behind whatever it is told is lost, so only damage is told as a gap. Anything else that
//! fails, from a lack of descriptors to a lack of memory, says nothing about the records: the read is tried
//! again until it succeeds or the store ends, and never answered with less than there is.

use std::{collections::VecDeque, fs::File, io, ops::ControlFlow, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader};

use super::{
    Shared, checkpoint,
    index::{Key, Run, Runs},
    lock_of,
    overlay::{END, RUNS_PER_READ},
};
use crate::{
    core::event::ReadRequest,
    store::{
        StoreEvent,
        facts::{self, Span},
        journal::{format::segment_name, scan},
    },
};

/// Serves reads in order, until there will be no more.
pub(super) fn run(shared: &Shared) {
    let mut files = Files { shared, open: VecDeque::new() };
    let mut waiting = VecDeque::new();
    while shared.reads.take(&mut waiting) {
        for request in waiting.drain(..) {
            if let Some(records) = files.serve(&request) {
                shared.events.push(StoreEvent::Read { read: request.read, records });
            }
        }
    }
}

/// The segments that were read last.
struct Files<'a> {
    shared: &'a Shared,
    open: VecDeque<(u64, File)>,
}

/// The answer so far.
struct Answer<'a> {
    request: &'a ReadRequest,
    records: Vec<Record>,
    bytes: usize,
    /// It has a record or a gap that covers something.
    enough: bool,
}

/// Why a read was not served, though nothing is known to be lost.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("the index: {0}")]
    Index(#[from] checkpoint::Error),
    #[error("a segment: {0}")]
    Segment(#[from] io::Error),
}

impl Files<'_> {
    /// Tries until it succeeds; `None` if the store ends before.
    fn serve(&mut self, request: &ReadRequest) -> Option<Vec<Record>> {
        let mut told = false;
        loop {
            match self.try_serve(request) {
                Ok(records) => return Some(records),
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

    fn try_serve(&mut self, request: &ReadRequest) -> Result<Vec<Record>, ReadError> {
        let mut answer = Answer { request, records: Vec::new(), bytes: 0, enough: false };
        let mut done: Option<Key> = None;
        let mut from = request.from;
        loop {
            let (runs, until) = view(self.shared, request.source, from)?;
            for (key, run) in runs {
                if run.last < request.from || done.is_some_and(|done| key <= done) {
                    continue;
                }
                match self.read_run(request, key, &run) {
                    // The segment was freed after the view was taken: what it held is no longer in the Log.
                    Err(error)
                        if error.kind() == io::ErrorKind::NotFound && self.is_freed(run.place.segment) => {}
                    Err(error) if !is_damage(&error) => return Err(error.into()),
                    Err(error) => {
                        tracing::error!(%error, source = request.source, from = key.0, to = run.last,
                            "records of a Log cannot be read, a gap is told instead");
                        if answer.add(unreadable(request, key, &run)).is_break() {
                            return Ok(answer.records);
                        }
                    }
                    Ok(records) => {
                        if records.into_iter().try_for_each(|record| answer.add(record)).is_break() {
                            return Ok(answer.records);
                        }
                    }
                }
                done = Some(key);
            }
            if until == END {
                break;
            }
            from = until.0;
        }
        Ok(answer.records)
    }

    /// The keeper takes a segment off the list before it removes the file.
    fn is_freed(&self, segment: u64) -> bool {
        !lock_of(&self.shared.segments).contains_key(&segment)
    }

    /// The records that an index entry claims, from the wanted seq on.
    fn read_run(&mut self, request: &ReadRequest, key: Key, run: &Run) -> io::Result<Vec<Record>> {
        let segment = run.place.segment;
        let salt = lock_of(&self.shared.segments).get(&segment).map(|header| header.salt);
        let salt = salt.ok_or(io::ErrorKind::NotFound)?;
        let len = usize::try_from(run.place.len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut picked: Vec<Record> = Vec::new();
        scan::read_groups(self.file(segment)?, salt, run.place.offset, len, &mut |record| {
            if record.header.source == request.source
                && let Some(span) = Span::of(&record)
            {
                if run.gap && (span.start, span.order) == key && record.header.kind == Kind::GAP {
                    picked = vec![record];
                } else if !run.gap
                    && record.header.kind == Kind::LOG
                    && (key.0.max(request.from)..=run.last).contains(&span.start)
                {
                    // The groups may still hold an earlier record of this seq.
                    while picked.last().is_some_and(|last| last.header.seq >= span.start) {
                        picked.pop();
                    }
                    picked.push(record);
                }
            }
        })?;
        if picked.iter().map(Record::wire_len).sum::<usize>() < len / 4 {
            for record in &mut picked {
                record.body = Bytes::copy_from_slice(&record.body);
            }
        }
        Ok(picked)
    }

    fn file(&mut self, segment: u64) -> io::Result<&File> {
        if let Some(at) = self.open.iter().position(|(number, _)| *number == segment) {
            self.open.swap(0, at);
        } else {
            let file = File::open(self.shared.journal_dir.join(segment_name(segment)))?;
            self.open.truncate(FILES_MAX - 1);
            self.open.push_front((segment, file));
        }
        Ok(&self.open[0].1)
    }
}

impl Answer<'_> {
    fn add(&mut self, record: Record) -> ControlFlow<()> {
        let len = record.wire_len();
        if self.enough && self.bytes + len > self.request.bytes_max {
            return ControlFlow::Break(());
        }
        self.bytes += len;
        self.enough |= Span::of(&record).is_some_and(Span::is_full);
        self.records.push(record);
        ControlFlow::Continue(())
    }
}

/// The index entries of a Log around and after this seq, up to a place, from which on there may be more.
fn view(shared: &Shared, source: u32, from: u64) -> checkpoint::Result<(Runs, Key)> {
    // First the overlay, then the checkpoint: what is committed in between is seen twice, not missed.
    let pages = lock_of(&shared.gathering).overlay.changes(source, from);
    let (applied, mut runs, mut until) = shared.checkpoint.runs(source, from, RUNS_PER_READ)?;
    let newer = || pages.iter().filter(|page| page.last_lsn > applied);
    until = newer().map(|page| page.until).fold(until, Key::min);
    for page in newer() {
        page.changes.apply(&mut runs, until);
    }
    runs.retain(|key, _| *key < until);
    Ok((runs, until))
}

/// The records are lost; reading again would not bring them back.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), InvalidData | UnexpectedEof | NotFound | FileTooLarge)
        || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Stands in for records whose groups are damaged: a reader is told, and goes on behind them.
fn unreadable(request: &ReadRequest, (start, order): Key, run: &Run) -> Record {
    let from = if order == facts::FULL { start.max(request.from) } else { start };
    let header = RecordHeader {
        kind: Kind::GAP,
        class: Class::Telemetry as u8,
        flags: Flags::default(),
        source: request.source,
        epoch: 0,
        seq: run.last,
        aux: 0,
    };
    Record { header, body: facts::corruption_gap(from, run.last.max(from)) }
}

const FILES_MAX: usize = 4;
/// Between two tries of a read.
const RETRY_AFTER: Duration = Duration::from_millis(100);
