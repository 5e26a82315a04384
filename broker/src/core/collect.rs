//! Forgetting tombstones that nobody needs any more.

use std::time::Duration;

use super::{Core, Timer, link::Link, space::Forgettable};
use crate::limits;

/// Tombstones are looked through this often, while there are any.
const EVERY: Duration = Duration::from_mins(1);
/// The next bounded part of many follows after this: others have a turn in between.
const SOON: Duration = Duration::from_millis(10);

impl Core {
    /// A tombstone became durable in this space.
    pub(super) fn on_tombstone(&mut self, space: usize) {
        self.littered.insert(space);
        if self.spaces[space].is_littered() {
            self.collect_from(space);
        }
        if !self.collecting {
            self.collecting = true;
            self.after(EVERY, Timer::Tombstones);
        }
    }

    pub(super) fn collect_tombstones(&mut self) {
        let mut more = false;
        for space in self.littered.iter().copied().collect::<Vec<_>>() {
            more |= self.collect_from(space) == limits::TOMBSTONES_FORGOTTEN;
        }
        self.littered.retain(|space| self.spaces[*space].has_tombstones());
        self.collecting = more || !self.littered.is_empty();
        if self.collecting {
            self.after(if more { SOON } else { EVERY }, Timer::Tombstones);
        }
    }

    fn collect_from(&mut self, index: usize) -> usize {
        if self.refusing {
            return 0;
        }
        let before = self.now.mono.checked_sub(self.config.tombstone_age);
        let up_to = self.acknowledged_by_all(index);
        let which = Forgettable {
            before: before.unwrap_or_default(),
            up_to: before.map_or(0, |_| up_to),
            not: self.spaces[index].answered_for(&self.own),
        };
        let forgotten = self.spaces[index].collect(&mut self.ledger, &which);
        let space = &self.spaces[index];
        let horizon = space.horizon.local;
        let lags = |link: &Link| link.spaces.get(&index).is_some_and(|export| export.cursor < horizon);
        if forgotten > 0 && space.owned && self.above.iter().any(|session| lags(&self.links[session])) {
            // A receiver will never be told of it by name: it is told everything again, and a barrier.
            self.mint_above(self.incarnation);
        }
        forgotten
    }

    /// The local revision that every receiver that was ever heard of durably holds. Who stands in another
    /// incarnation is told everything again and needs no tombstones; who receives a part of the space is
    /// told of what is gone by name.
    fn acknowledged_by_all(&self, index: usize) -> u64 {
        let space = &self.spaces[index];
        let passed_on = self.config.relay && !space.origin.is_empty();
        if space.scoped || !(space.owned || passed_on) {
            return u64::MAX;
        }
        let marks = self.marks_of(space.source);
        if !space.owned {
            // Nobody above may have heard of it yet.
            let least = marks.map(|mark| (mark.epoch, mark.mark)).min();
            return least.map_or(0, |least| space.resume_after(least));
        }
        let same = marks.filter(|mark| mark.epoch == space.at.0);
        same.map(|mark| mark.mark).min().unwrap_or(u64::MAX)
    }
}
