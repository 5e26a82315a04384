//! What a Log keeps, by stretches of its seqs: bytes and records of about 64 KiB each.
//!
//! Retention frees whole stretches and so needs no look at the records. Three invariants make that safe: a
//! stretch begins where an entry (a record or a gap) begins; it never begins right behind a gap, so that raising
//! a Log's first seq to it leaves no gap behind below; and the sums are those of the entries, whatever was
//! cut out of the middle.

use std::collections::VecDeque;

/// A stretch is closed at this size.
const STRETCH_BYTES: u64 = 64 << 10;

/// An entry of a Log, or a run of records, as retention sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Seq of the record, `from` of a gap, first seq of a run.
    pub start: u64,
    /// Bytes on disk, header included.
    pub bytes: u64,
    /// Records; 0 for a gap.
    pub records: u64,
}

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stretches {
    list: VecDeque<Extent>,
    bytes: u64,
    records: u64,
    /// The last entry is a gap.
    after_gap: bool,
}

impl Stretches {
    /// Bytes of all entries.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Records, gaps not counted.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.records
    }

    /// True if there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The stretches, ascending.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Extent> + Clone {
        self.list.iter()
    }

    /// Adds an entry behind all others.
    pub fn push(&mut self, entry: Extent) {
        self.bytes += entry.bytes;
        self.records += entry.records;
        add(&mut self.list, entry, self.after_gap);
        self.after_gap = entry.records == 0;
    }

    /// Where the second stretch begins: up to there the first one can be freed.
    #[must_use]
    pub fn second(&self) -> Option<u64> {
        self.list.get(1).map(|stretch| stretch.start)
    }

    /// The oldest stretch.
    #[must_use]
    pub fn oldest(&self) -> Option<&Extent> {
        self.list.front()
    }

    /// Forgets the stretches that end below `first`; how many records they held.
    pub fn free_below(&mut self, first: u64) -> u64 {
        let before = self.records;
        while self.second().is_some_and(|second| second <= first) {
            let freed = self.list.pop_front().expect("there are two");
            self.bytes -= freed.bytes;
            self.records -= freed.records;
        }
        before - self.records
    }

    /// The oldest entries are gone; what is left begins at `first`.
    pub fn drop_front(&mut self, gone: &[Extent], first: u64) {
        for entry in gone {
            while self.second().is_some_and(|second| second <= entry.start) {
                let emptied = self.list.pop_front().expect("there are two");
                self.bytes -= emptied.bytes;
                self.records -= emptied.records;
            }
            let Some(oldest) = self.list.front_mut() else { return };
            // An index that was cut knows bytes as estimates: what is freed is at most what was counted.
            let (bytes, records) = (entry.bytes.min(oldest.bytes), entry.records.min(oldest.records));
            oldest.bytes -= bytes;
            oldest.records -= records;
            self.bytes -= bytes;
            self.records -= records;
        }
        self.free_below(first);
        if let Some(oldest) = self.list.front_mut() {
            oldest.start = oldest.start.max(first);
        }
    }

    /// Consecutive entries, the last of which is a record, are replaced by others of the same seqs; `end` is the
    /// seq behind them.
    pub fn replace(&mut self, old: &[Extent], new: &[Extent], end: u64) {
        let (Some(begin), Some(last)) = (old.first(), old.last()) else { return };
        let at = |seq: u64| self.list.partition_point(|stretch| stretch.start <= seq).saturating_sub(1);
        let (from, to) = (at(begin.start), at(last.start));
        let following = self.list.get(from + 1).map_or(u64::MAX, |stretch| stretch.start);
        let rest = self.list.split_off(to + 1);
        let touched = self.list.split_off(from);
        let (Some(front), Some(back)) = (touched.front().copied(), touched.back().copied()) else {
            self.list.extend(rest);
            return;
        };
        let held = total(&touched.iter().copied().collect::<Vec<_>>());
        let (gone, come) = (total(old), total(new));
        let mut rebuilt = VecDeque::new();
        if from == to {
            // What stands before and behind the entries cannot be told apart, and need not be.
            let (bytes, records) = (held.0.saturating_sub(gone.0), held.1.saturating_sub(gone.1));
            rebuilt.push_back(Extent {
                start: front.start,
                bytes: bytes + come.0,
                records: records + come.1,
            });
        } else {
            let first = old.partition_point(|entry| entry.start < following);
            let before = total(&old[..first]);
            let behind_from = old.partition_point(|entry| entry.start < back.start);
            let behind = total(&old[behind_from..]);
            let (bytes, records) =
                (front.bytes.saturating_sub(before.0), front.records.saturating_sub(before.1));
            if records > 0 || bytes > 0 {
                rebuilt.push_back(Extent { start: front.start, bytes, records });
            }
            let mut after_gap = false;
            for entry in new {
                add(&mut rebuilt, *entry, after_gap);
                after_gap = entry.records == 0;
            }
            let (bytes, records) =
                (back.bytes.saturating_sub(behind.0), back.records.saturating_sub(behind.1));
            if records > 0 || bytes > 0 {
                add(&mut rebuilt, Extent { start: end, bytes, records }, after_gap);
            }
        }
        let now = total(&rebuilt.iter().copied().collect::<Vec<_>>());
        self.bytes = (self.bytes + now.0).saturating_sub(held.0);
        self.records = (self.records + now.1).saturating_sub(held.1);
        for stretch in rebuilt {
            // Thinned stretches are small: neighbours grow together, or there would be one for ever for each
            // 64 KiB that ever came.
            add(&mut self.list, stretch, false);
        }
        self.list.extend(rest);
    }

    /// Bytes from `seq` on; of the stretch that holds it, all.
    #[must_use]
    pub fn bytes_from(&self, seq: u64) -> u64 {
        let newer = self.list.iter().rev().take_while(|stretch| stretch.start > seq);
        let mut bytes: u64 = newer.map(|stretch| stretch.bytes).sum();
        let at = self.list.partition_point(|stretch| stretch.start <= seq);
        if let Some(stretch) = at.checked_sub(1).and_then(|at| self.list.get(at)) {
            bytes += stretch.bytes;
        }
        bytes
    }
}

fn add(list: &mut VecDeque<Extent>, entry: Extent, after_gap: bool) {
    match list.back_mut() {
        Some(last) if after_gap || last.bytes + entry.bytes <= STRETCH_BYTES => {
            last.bytes += entry.bytes;
            last.records += entry.records;
        }
        _ => list.push_back(entry),
    }
}

fn total(entries: &[Extent]) -> (u64, u64) {
    entries.iter().fold((0, 0), |sum, entry| (sum.0 + entry.bytes, sum.1 + entry.records))
}
