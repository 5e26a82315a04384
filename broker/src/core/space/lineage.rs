//! Which process wrote which revisions of a space.
//!
//! A store that was rolled back, and then wrote on, has revisions again that a receiver knows with other
//! values; once it has written enough, the receiver is not even ahead of it. A rollback always lies between
//! two processes, so every process has a random *run*, and a space remembers which run began at which
//! revision. A receiver keeps the run that it heard last beside its position; where its position lies beyond
//! the end of that run, or the run is unknown, the owner begins a new incarnation and tells everything again.

use bytes::Bytes;
use codec::{Kind, proto};

use super::Space;
use crate::core::{ledger::Ledger, restore::Metas};

/// Runs that are remembered. A receiver from before them is told everything again.
const RUNS_MAX: usize = 64;

/// Of an owned space: (revision that it began after, run), ascending. Of a replica: the one run that its
/// position belongs to.
#[derive(Debug, Default)]
pub(in crate::core) struct Lineage(Vec<(u64, u64)>);

impl Lineage {
    /// Of a replica: its position was brought by this run.
    pub(super) fn of(run: u64) -> Self {
        Self(if run == 0 { Vec::new() } else { vec![(0, run)] })
    }

    /// The run that is current: the owner's own, or the one that a replica heard last. 0 = none.
    pub(in crate::core) fn run(&self) -> u64 {
        self.0.last().map_or(0, |(_, run)| *run)
    }

    /// Whether a receiver that stands at this revision, of this incarnation, has got it from this history.
    pub(in crate::core) fn covers(&self, revision: u64, run: u64) -> bool {
        let Some(at) = self.0.iter().position(|(_, held)| *held == run) else { return false };
        self.0.get(at + 1).is_none_or(|(next, _)| revision <= *next)
    }
}

impl Space {
    /// A process of this run writes from here on.
    pub(in crate::core) fn begin_run(&mut self, ledger: &mut Ledger, run: u64) {
        self.lineage.0.push((self.at.1, run));
        let surplus = self.lineage.0.len().saturating_sub(RUNS_MAX);
        self.lineage.0.drain(..surplus);
        self.write_lineage(ledger);
    }

    /// A new incarnation: positions in an older one are not compared.
    pub(super) fn forget_runs(&mut self, ledger: &mut Ledger) {
        if let Some((_, run)) = self.lineage.0.pop() {
            self.lineage.0 = vec![(0, run)];
            self.write_lineage(ledger);
        }
    }

    /// A replica goes on with what this run of its owner sends: the owner has accepted its position.
    pub(in crate::core) fn follow_run(&mut self, ledger: &mut Ledger, run: u64) {
        if run != 0 && self.lineage.run() != run {
            self.lineage.0 = vec![(0, run)];
            self.write_lineage(ledger);
        }
    }

    fn write_lineage(&self, ledger: &mut Ledger) {
        let range = |&(from, epoch): &(u64, u64)| proto::EpochRange { from, epoch };
        let table = proto::LogTable {
            epochs: self.lineage.0.iter().map(range).collect(),
            ..proto::LogTable::default()
        };
        ledger.write_local(Kind::META, fact_key(self.source), Some(codec::encode(&table)));
    }

    /// Takes over the stored table.
    pub(in crate::core) fn recover_lineage(&mut self, facts: &Metas<'_>) {
        let fact = facts.get(&*fact_key(self.source));
        if let Some(table) = fact.and_then(|value| codec::decode::<proto::LogTable>((*value).clone()).ok()) {
            self.lineage.0 = table.epochs.iter().map(|range| (range.from, range.epoch)).collect();
        }
    }
}

/// The key of the fact in the store.
fn fact_key(source: u32) -> Bytes {
    let mut key = b"runs/".to_vec();
    key.extend_from_slice(&source.to_be_bytes());
    key.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_beyond_the_end_of_its_run_is_of_another_history() {
        let lineage = Lineage(vec![(0, 11), (5, 12), (9, 13)]);
        for (revision, run) in [(5, 11), (1, 11), (9, 12), (2, 12), (100, 13)] {
            assert!(lineage.covers(revision, run), "{revision} of {run}");
        }
        for (revision, run) in [(6, 11), (10, 12), (1, 99)] {
            assert!(!lineage.covers(revision, run), "{revision} of {run}");
        }
    }
}
