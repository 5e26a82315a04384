//! Where the records of Logs stand in the journal.
//!
//! The index does not hold one entry per record but one per [`Run`]: records of one source with ascending
//! seqs that stand in whole groups close to each other in one segment. A reader reads those groups, checks
//! their crcs and picks the records that the entry claims, so an entry costs 60 bytes of flash for up to
//! 64 KiB of journal. A gap is an entry of its own, because it is what later appends can be placed around.
//!
//! An entry is authoritative: what it does not claim is not in the Log, even if its groups hold it. So
//! cutting a run in two, or raising its start, needs no look at the journal.

use std::collections::BTreeMap;

use bytes::{Buf, BufMut};

use crate::store::{
    facts::{self, EMPTY, FULL},
    journal::Place,
};

/// Place of an entry in its Log; see [`facts::Span`].
pub(super) type Key = (u64, u8);

/// Entries of one Log, by place.
pub(super) type Runs = BTreeMap<Key, Run>;

/// See the module's documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// Where the first group starts; the last one ends at `place.offset + place.len`.
    pub(super) place: Place,
    /// Seq of the last record, `to` of a gap.
    pub(super) last: u64,
    /// Bytes of the records that the entry claims; after a cut an estimate.
    pub(super) bytes: u32,
    /// A gap record; its `from` is the key.
    pub(super) gap: bool,
}

impl Run {
    pub(super) const LEN: usize = 40;

    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut raw = [0; Self::LEN];
        let mut out = &mut raw[..];
        out.put_u64_le(self.place.segment);
        out.put_u64_le(self.place.offset);
        out.put_u64_le(self.place.len);
        out.put_u64_le(self.last);
        out.put_u32_le(self.bytes);
        out.put_u32_le(u32::from(self.gap));
        raw
    }

    pub(super) fn decode(mut raw: &[u8]) -> Option<Self> {
        if raw.len() != Self::LEN {
            return None;
        }
        let place = Place { segment: raw.get_u64_le(), offset: raw.get_u64_le(), len: raw.get_u64_le() };
        Some(Self { place, last: raw.get_u64_le(), bytes: raw.get_u32_le(), gap: raw.get_u32_le() == 1 })
    }

    /// Adds a record of a group behind this run, if they are close enough to be read together.
    pub(super) fn extend(&mut self, place: Place, seq: u64, bytes: u32) -> bool {
        let end = self.place.offset + self.place.len;
        let fits = self.place.segment == place.segment
            && place.offset + place.len >= end
            && (place.offset + place.len == end
                || (place.offset.saturating_sub(end) <= HOLE_MAX
                    && place.offset + place.len - self.place.offset <= RUN_MAX));
        let grown = self.bytes.checked_add(bytes);
        if let (true, false, true, Some(grown)) = (fits, self.gap, seq > self.last, grown) {
            self.place.len = place.offset + place.len - self.place.offset;
            self.last = seq;
            self.bytes = grown;
            return true;
        }
        false
    }

    /// Takes over the records of the entry right behind this one, if they stand close behind its own.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        let end = self.place.offset + self.place.len;
        let is_behind = next.place.segment == self.place.segment && next.place.offset >= end;
        if !is_behind || self.gap || next.gap || next.last <= self.last {
            return false;
        }
        let len = next.place.offset + next.place.len - self.place.offset;
        let grown = self.bytes.checked_add(next.bytes);
        if let (true, true, Some(grown)) = (next.place.offset - end <= HOLE_MAX, len <= RUN_MAX, grown) {
            *self = Self { place: Place { len, ..self.place }, last: next.last, bytes: grown, gap: false };
            return true;
        }
        false
    }

    /// Whether this group is one of those that the run is read from.
    pub(super) fn has_group(&self, group: Place) -> bool {
        let Place { segment, offset, len } = self.place;
        group.segment == segment && (offset..offset + len).contains(&group.offset)
    }

    /// The part of this run, which starts at `start`, within `from..=to`.
    fn part(&self, start: u64, from: u64, to: u64) -> (Key, Self) {
        let share = u128::from(to - from + 1) * u128::from(self.bytes) / u128::from(self.last - start + 1);
        ((from, FULL), Self { last: to, bytes: share as u32, ..*self })
    }
}

/// Takes `from..=to` out of the runs; a change of epoch right before `from` stays. With `to` = `from` - 1
/// nothing goes, but no run reaches over `from` any more.
pub(super) fn cut(runs: &mut Runs, from: u64, to: u64) {
    let before = runs.range(..(from, EMPTY)).next_back().map(|(key, _)| *key);
    let mut touched = Vec::from_iter(before);
    if from <= to {
        touched.extend(runs.range((from, EMPTY)..=(to, FULL)).map(|(key, _)| *key));
    }
    for key @ (start, order) in touched {
        let run = runs[&key];
        if run.last < from || (order == EMPTY && start <= from) {
            continue;
        }
        if run.gap {
            // Gaps are never split: one that reaches out of the range keeps saying what it said.
            if start >= from && run.last <= to {
                runs.remove(&key);
            }
            continue;
        }
        runs.remove(&key);
        if start < from {
            runs.extend([run.part(start, start, from - 1)]);
        }
        if run.last > to {
            runs.extend([run.part(start, to + 1, run.last)]);
        }
    }
}

/// Drops what is below `first`.
pub(super) fn raise(runs: &mut Runs, first: u64) {
    let below: Vec<Key> = runs.range(..(first, EMPTY)).map(|(key, _)| *key).collect();
    for key in below {
        let run = runs[&key];
        if facts::is_dropped(run.gap, run.last, first) {
            runs.remove(&key);
        } else if !run.gap {
            runs.remove(&key);
            runs.extend([run.part(key.0, first, run.last)]);
        }
    }
}

/// Bytes of journal that one entry makes a reader read, unless it is one larger group.
const RUN_MAX: u64 = 64 << 10;
/// Bytes of other sources' groups that a reader reads for nothing between two of its own.
const HOLE_MAX: u64 = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn run(last: u64, bytes: u32) -> Run {
        Run { place: Place { segment: 1, offset: 64, len: 1000 }, last, bytes, gap: false }
    }

    fn spans(runs: &Runs) -> Vec<(u64, u64)> {
        runs.iter().map(|((start, _), run)| (*start, run.last)).collect()
    }

    #[test]
    fn a_cut_leaves_both_ends() {
        let mut runs = Runs::from([((1, FULL), run(100, 1000))]);
        cut(&mut runs, 40, 60);
        assert_eq!(spans(&runs), [(1, 39), (61, 100)]);
        assert_eq!(runs[&(1, FULL)].bytes, 390);
        cut(&mut runs, 1, 200);
        assert!(runs.is_empty());
    }

    #[test]
    fn an_empty_cut_splits() {
        let mut runs = Runs::from([((1, FULL), run(10, 10))]);
        cut(&mut runs, 5, 4);
        assert_eq!(spans(&runs), [(1, 4), (5, 10)]);
    }

    #[test]
    fn raising_the_first_keeps_the_gap_that_ends_below_it() {
        let mut runs =
            Runs::from([((1, FULL), run(9, 9)), ((10, FULL), run(19, 10)), ((20, FULL), run(40, 21))]);
        runs.get_mut(&(10, FULL)).unwrap().gap = true;
        raise(&mut runs, 20);
        assert_eq!(spans(&runs), [(10, 19), (20, 40)]);
        raise(&mut runs, 30);
        assert_eq!(spans(&runs), [(30, 40)]);
    }

    #[test]
    fn an_entry_is_read_back() {
        let run = Run { gap: true, ..run(7, 8) };
        assert_eq!(Run::decode(&run.encode()), Some(run));
    }

    #[test]
    fn runs_grow_over_near_groups_only() {
        let mut run = run(1, 10);
        assert!(run.extend(Place { segment: 1, offset: 1064, len: 100 }, 2, 10));
        assert!(!run.extend(Place { segment: 1, offset: 1164 + HOLE_MAX + 8, len: 100 }, 3, 10));
        assert!(!run.extend(Place { segment: 2, offset: 1164, len: 100 }, 3, 10));
        assert!(!run.extend(Place { segment: 1, offset: 1164, len: 100 }, 2, 10), "seqs ascend");
    }
}
