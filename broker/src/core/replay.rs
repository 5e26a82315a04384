//! Reading a Log from anywhere: from a seq, or from a time.
//!
//! What policy removed at the front stands in the Log's table, not in the store: a reader is shown gaps made of it.
//! A time is found by halving the stretches and reading one record of each, then going through the last one;
//! where clocks went back, it is a place where the time was reached, not the only one.

use codec::{FrameView, Kind, Record};

use super::{
    Action, Core, Reading,
    event::{CommandId, Response},
    log::LogId,
};

/// One step of a search reads this much.
const SEEK_BYTES: usize = 16 << 10;

/// A search for a time.
#[derive(Debug)]
pub(super) struct Seek {
    time_us: u64,
    /// Where stretches begin.
    bounds: Vec<u64>,
    /// The first of them that does not begin before the time is within `low..=high`.
    low: usize,
    high: usize,
    /// What is being read.
    at: u64,
}

impl Seek {
    /// Where to read next once the page that begins at `at` is known; `Err`: the answer.
    fn step(&mut self, records: &[Record], end: u64) -> Result<u64, u64> {
        let times = records.iter().filter(|record| record.header.kind == Kind::LOG).map(|record| {
            let time_us = FrameView::parse(&record.body).map_or(0, |view| view.time_us());
            (record.header.seq, time_us)
        });
        let behind = records.last().map(|record| record.header.seq + 1);
        if self.low < self.high {
            let middle = self.low.midpoint(self.high);
            match (times.into_iter().next(), behind) {
                (Some((_, time_us)), _) if time_us < self.time_us => self.low = middle + 1,
                (None, Some(behind)) if behind > self.at => {
                    self.at = behind; // gaps alone: the next record tells
                    return Ok(self.at);
                }
                _ => self.high = middle,
            }
            return Ok(self.aim());
        }
        let mut older = None;
        for (seq, time_us) in times {
            if time_us >= self.time_us {
                return Err(older.map_or(self.at, |older| older + 1));
            }
            older = Some(seq);
        }
        match behind {
            Some(behind) if behind > self.at => {
                // What is known to be older is behind us; gaps behind it belong to the answer.
                self.at = older.map_or(behind, |older| older + 1).max(self.at + 1);
                Ok(self.at)
            }
            _ => Err(end),
        }
    }

    fn aim(&mut self) -> u64 {
        self.at = if self.low < self.high {
            self.bounds[self.low.midpoint(self.high)]
        } else {
            self.bounds.get(self.low.saturating_sub(1)).copied().unwrap_or(1)
        };
        self.at
    }
}

impl Core {
    pub(super) fn read_log(&mut self, log: LogId, from: u64, bytes_max: usize, id: CommandId) {
        let log = &self.logs[&log];
        let gaps = log.front_gaps(from.max(log.begin()));
        let from = from.max(log.first);
        if from >= log.durable_next {
            let response = Response::Records { records: gaps, next: log.durable_next };
            return self.out.push(Action::Respond { id, response });
        }
        let source = log.id;
        self.read(source, from, bytes_max, Reading::Command(id, source, gaps));
    }

    /// Records that a command asked for. Their epoch is what the Log's table says now: a Log that disowned
    /// a part of its history did not rewrite the records.
    pub(super) fn on_command_read(
        &mut self,
        id: CommandId,
        log: LogId,
        gaps: Vec<Record>,
        mut records: Vec<Record>,
    ) {
        if let Some(log) = self.logs.get(&log) {
            for record in &mut records {
                // The announcement of a history stands before its first record, and names it already.
                let from = log.epochs.first().map_or(0, |(from, _)| *from);
                record.header.epoch = log.epoch_at(record.header.seq.max(from));
            }
        }
        let records = [gaps, records].concat();
        let next = records.last().map_or(0, |record| record.header.seq + 1);
        self.out.push(Action::Respond { id, response: Response::Records { records, next } });
    }

    /// Finds where a Log reaches a time.
    pub(super) fn seek_log(&mut self, log: LogId, time_us: u64, id: CommandId) {
        let log = &self.logs[&log];
        let bounds: Vec<u64> = log.kept.iter().map(|stretch| stretch.start.max(log.first)).collect();
        let mut seek = Seek { time_us, low: 0, high: bounds.len(), bounds, at: 0 };
        let (source, from) = (log.id, seek.aim());
        self.read(source, from, SEEK_BYTES, Reading::Seek(id, source, Box::new(seek)));
    }

    pub(super) fn on_seek_read(&mut self, id: CommandId, log: LogId, mut seek: Seek, records: &[Record]) {
        let end = self.logs.get(&log).map_or(1, |log| log.durable_next);
        match seek.step(records, end) {
            Ok(from) => self.read(log, from, SEEK_BYTES, Reading::Seek(id, log, Box::new(seek))),
            Err(found) => self.out.push(Action::Respond { id, response: Response::Place(found) }),
        }
    }
}
