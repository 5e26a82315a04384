//! Thinning: a full stream keeps the first and the last record of each window of time; a gap says what was
//! between.
//!
//! ```text
//!  seq   first          thinned_to[1]      thinned_to[0]           next
//!          |  level 1: 4 windows |  level 0: 1 window  |   as it came    |
//! ```
//!
//! Widths grow fourfold from level to level. Whichever region holds the most bytes gives way: its oldest page
//! is read from the store, and what is inside the windows of the next level becomes gaps. So all regions hold
//! about as many bytes, what is young keeps its detail, and what is old thins out; when the last region is the
//! largest, its oldest records are dropped. A page is at most [`PAGE_BYTES`], and the next is read when the
//! gaps of this one are durable. Progress stands in the Log's table, in the same group as the gaps. Windows are
//! told by the records' own time: it decides only what is kept, nothing is removed for its age.

use codec::{FrameView, Kind, Record, proto};

use super::{
    Core, Reading,
    ledger::Effect,
    log::{self, Log, LogId},
    policy::Full,
};
use crate::store::Extent;

/// Widths: from the configured window to 1024 of them.
pub(super) const LEVELS: usize = 6;
/// One step reads this much.
const PAGE_BYTES: usize = 64 << 10;
/// Where nothing can be thinned, it is tried again after this many bytes.
const PATIENCE_BYTES: u64 = 64 << 10;

/// An entry of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    extent: Extent,
    last: u64,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A record, and the window that it belongs to.
    Record { window: u64, epoch: u64 },
    /// A gap of an earlier thinning: a wider one may cover it.
    Thinned,
    /// Another gap. It stays, and no window reaches over it.
    Wall,
}

/// What to do with a page: how many of its pieces are dealt with, and which of them (first and last index) become
/// one gap each.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    done: usize,
    holes: Vec<(usize, usize)>,
}

/// Finds the complete windows of a page. `more`: the region goes on behind the page, so that a window which fills
/// the page is thinned by parts rather than never.
fn plan(pieces: &[Piece], more: bool) -> Plan {
    let mut plan = Plan::default();
    let mut at = 0;
    while at < pieces.len() {
        let What::Record { window, epoch } = pieces[at].what else {
            at += 1;
            plan.done = at;
            continue;
        };
        let mut last = at;
        let mut behind = at + 1;
        while let Some(piece) = pieces.get(behind) {
            match piece.what {
                What::Thinned => {}
                What::Record { window: other, epoch: of } if (other, of) == (window, epoch) => last = behind,
                _ => break,
            }
            behind += 1;
        }
        let complete = behind < pieces.len() || (more && plan.done == 0);
        if !complete {
            return plan;
        }
        let inside = pieces.get(at + 1..last).unwrap_or_default();
        let records = inside.iter().filter(|piece| piece.extent.records > 0).count();
        if records > 0 || inside.len() > 1 {
            plan.holes.push((at + 1, last - 1));
        }
        plan.done = last + 1;
        at = last + 1;
    }
    plan
}

/// What a stream that has too much does next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Thin from here to a level, below `until`.
    Thin { level: usize, from: u64, until: u64 },
    /// The widest region is the largest: its oldest go.
    DropOldest,
    /// Nothing can be thinned now.
    Wait,
}

impl Log {
    fn window_us(&self, level: usize) -> Option<u64> {
        match self.policy.full {
            Full::Thin { window } => {
                let base = u64::try_from(window.as_micros()).unwrap_or(u64::MAX).max(1);
                Some(base.saturating_mul(1 << (2 * level)))
            }
            _ => None,
        }
    }

    /// Chooses the region with the most bytes of those that are not `blocked`.
    fn next_to_thin(&self, blocked: u8) -> Next {
        let mut bounds = [0; LEVELS + 1];
        bounds[0] = self.durable_next;
        for (level, to) in self.thinned_to.iter().enumerate() {
            bounds[level + 1] = (*to).max(self.first).min(bounds[level]);
        }
        let mut bytes = [0; LEVELS + 1];
        let mut region = LEVELS;
        for stretch in self.kept.iter() {
            while region > 0 && stretch.start >= bounds[region] {
                region -= 1;
            }
            bytes[region] += stretch.bytes;
        }
        let open = (0..=LEVELS).filter(|region| blocked & 1 << region == 0 && bytes[*region] > 0);
        match open.max_by_key(|region| (bytes[*region], LEVELS - region)) {
            Some(LEVELS) => Next::DropOldest,
            Some(region) => Next::Thin { level: region, from: bounds[region + 1], until: bounds[region] },
            None => Next::Wait,
        }
    }

    fn piece(&self, record: &Record, width_us: u64) -> Piece {
        let (_, last) = log::range_of(record);
        let extent = log::extent(record);
        let what = match record.header.kind {
            Kind::LOG => match FrameView::parse(&record.body) {
                Ok(view) => What::Record {
                    window: view.time_us() / width_us,
                    epoch: self.epoch_at(record.header.seq),
                },
                Err(_) => What::Wall,
            },
            _ => match codec::decode::<proto::Gap>(record.body.clone()) {
                Ok(gap) if gap.reason() == proto::GapReason::Thinned => What::Thinned,
                _ => What::Wall,
            },
        };
        Piece { extent, last, what }
    }
}

impl Core {
    /// Begins the next step, if the stream has too much and there is something to thin.
    pub(super) fn begin_thinning(&mut self, id: LogId) {
        loop {
            let log = self.logs.get_mut(&id).expect("a Log's id is valid");
            if log.window_us(0).is_none() || !log.is_due() || log.appended < log.upkeep.thin_after {
                return;
            }
            match log.next_to_thin(log.upkeep.blocked) {
                Next::Thin { level, from, until } => {
                    log.upkeep.busy = true;
                    log.upkeep.until = until;
                    return self.read(id, from, PAGE_BYTES, Reading::Thin(id, level));
                }
                Next::DropOldest => {
                    let Some(second) = log.kept.second().filter(|second| *second <= log.durable_next) else {
                        return;
                    };
                    self.remove_below(id, second, proto::GapReason::DropOldest);
                }
                Next::Wait => {
                    log.upkeep.blocked = 0;
                    log.upkeep.thin_after = log.appended + PATIENCE_BYTES;
                    return;
                }
            }
        }
    }

    /// A page of a region was read: what is inside its windows becomes gaps.
    pub(super) fn on_thin_read(&mut self, id: LogId, level: usize, records: &[Record]) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        let until = log.upkeep.until;
        let Some(width_us) = log.window_us(level) else { return };
        let inside = |record: &&Record| {
            let (from, _) = log::range_of(record);
            from >= log.first.max(log.thinned_to[level]) && from < until
        };
        let pieces: Vec<Piece> =
            records.iter().filter(inside).map(|record| log.piece(record, width_us)).collect();
        let more = pieces.last().is_some_and(|piece| piece.last + 1 < until);
        let plan = plan(&pieces, more);
        if plan.done == 0 {
            log.upkeep.busy = false;
            log.upkeep.blocked |= 1 << level;
            return self.begin_upkeep(id);
        }
        let done = &pieces[..plan.done];
        let mut now: Vec<Extent> = Vec::new();
        let (mut at, mut removed) = (0, 0);
        for (first, last) in plan.holes {
            let (from, to) = (done[first].extent.start, done[last].last);
            let gap = log::gap(log, from, to, proto::GapReason::Thinned);
            let extents = || done[first..=last].iter().map(|piece| piece.extent);
            if extents().map(|extent| extent.bytes).sum::<u64>() <= gap.wire_len() as u64 {
                continue; // it would free nothing
            }
            removed += extents().map(|extent| extent.records).sum::<u64>();
            now.extend(done[at..first].iter().map(|piece| piece.extent));
            now.push(log::extent(&gap));
            at = last + 1;
            log.cut_tail(&gap);
            self.ledger.write(gap);
        }
        now.extend(done[at..].iter().map(|piece| piece.extent));
        let old: Vec<Extent> = done.iter().map(|piece| piece.extent).collect();
        let end = done.last().expect("something is done").last + 1;
        log.kept.replace(&old, &now, end);
        log.thinned_to[level] = end;
        log.upkeep.blocked = 0;
        log.write_table(&mut self.ledger);
        self.stats.gap("thinned", removed);
        self.ledger.after(Effect::Thinned { log: id });
    }

    /// The gaps of a step are durable: the next one reads what is left.
    pub(super) fn on_thinned(&mut self, id: LogId) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        log.upkeep.busy = false;
        self.begin_upkeep(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(seq: u64, window: u64) -> Piece {
        let extent = Extent { start: seq, bytes: 100, records: 1 };
        Piece { extent, last: seq, what: What::Record { window, epoch: 1 } }
    }

    fn gap(from: u64, last: u64, what: What) -> Piece {
        Piece { extent: Extent { start: from, bytes: 60, records: 0 }, last, what }
    }

    #[test]
    fn first_and_last_of_each_complete_window_are_kept() {
        let pieces: Vec<Piece> = (0..10).map(|seq| record(seq, seq / 4)).collect();
        assert_eq!(plan(&pieces, false), Plan { done: 8, holes: vec![(1, 2), (5, 6)] });
    }

    #[test]
    fn a_wider_window_covers_the_gaps_of_narrower_ones() {
        let mut pieces = vec![record(0, 0), gap(1, 8, What::Thinned), record(9, 0)];
        pieces.extend([record(10, 0), gap(11, 18, What::Thinned), record(19, 0), record(20, 1)]);
        assert_eq!(plan(&pieces, false), Plan { done: 6, holes: vec![(1, 4)] });
        assert_eq!(plan(&pieces[..3], true).holes, [], "one gap alone is left as it is");
    }

    #[test]
    fn no_window_reaches_over_another_gap_or_epoch() {
        let wall = gap(3, 7, What::Wall);
        let mut later = record(11, 0);
        later.what = What::Record { window: 0, epoch: 2 };
        let pieces = [
            record(0, 0),
            record(1, 0),
            record(2, 0),
            wall,
            record(8, 0),
            record(9, 0),
            record(10, 0),
            later,
        ];
        assert_eq!(plan(&pieces, false), Plan { done: 7, holes: vec![(1, 1), (5, 5)] });
    }

    #[test]
    fn a_window_that_fills_the_page_is_thinned_by_parts_and_an_open_one_waits() {
        let pieces: Vec<Piece> = (0..10).map(|seq| record(seq, 7)).collect();
        assert_eq!(plan(&pieces, true), Plan { done: 10, holes: vec![(1, 8)] });
        assert_eq!(plan(&pieces, false), Plan::default());
    }
}
