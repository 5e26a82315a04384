//! The thread that checkpoints, and frees segments behind the checkpoint.

use std::{collections::BTreeMap, sync::PoisonError};

use super::{Gathering, Shared, checkpoint::LiveChanges, lock_of};
use crate::{core::event::Lsn, store::journal::format::segment_name};

/// What the keeper knows of the checkpoint.
pub(super) struct Keeper {
    /// Index entries that point into each segment.
    live: BTreeMap<u64, u64>,
    applied: Lsn,
}

impl Keeper {
    pub(super) fn new(live: BTreeMap<u64, u64>, applied: Lsn) -> Self {
        Self { live, applied }
    }

    /// Checkpoints what gathers until told to stop, and then what is left.
    pub(super) fn run(mut self, shared: &Shared) {
        self.free(shared);
        loop {
            let mut gathering = wait_until_due(shared);
            #[cfg(test)]
            if gathering.abandoned {
                return;
            }
            let layer = gathering.overlay.freeze();
            let stop = gathering.stop;
            drop(gathering);
            let Some(layer) = layer else { return };

            let result = shared.checkpoint.commit(&layer);
            let mut gathering = lock_of(&shared.gathering);
            match result {
                Ok(live) => {
                    gathering.overlay.frozen = None;
                    gathering.failing = None;
                    drop(gathering);
                    self.applied = layer.last_lsn;
                    self.count(live);
                    self.free(shared);
                }
                Err(error) => {
                    tracing::error!(%error, lsn = layer.last_lsn, "no checkpoint");
                    gathering.failing = Some(error.to_string());
                    drop(gathering);
                    if stop {
                        // The journal has everything.
                        return;
                    }
                }
            }
            shared.gathered.notify_all();
        }
    }

    fn count(&mut self, changes: LiveChanges) {
        for (segment, change) in changes {
            let live = self.live.entry(segment).or_default();
            *live = live.saturating_add_signed(change);
        }
    }

    /// Deletes segments that are behind the checkpoint and that no index entry points into. The last
    /// segment stays in any case: it carries the number and the lsn that the journal goes on from.
    fn free(&mut self, shared: &Shared) {
        let mut segments = lock_of(&shared.segments);
        let mut dead = Vec::new();
        let mut followers = segments.values().skip(1);
        for number in segments.keys() {
            let Some(follower) = followers.next() else { break };
            let is_live = self.live.get(number).is_some_and(|entries| *entries > 0);
            if follower.first_lsn <= self.applied + 1 && !is_live {
                dead.push(*number);
            }
        }
        segments.retain(|number, _| !dead.contains(number));
        drop(segments);
        for number in dead {
            self.live.remove(&number);
            if let Err(error) = std::fs::remove_file(shared.journal_dir.join(segment_name(number))) {
                tracing::warn!(segment = number, %error, "cannot remove a segment; the next start will");
            }
        }
    }
}

/// Waits for changes, and then until a checkpoint is due: by time, by bytes, or because the store stops.
fn wait_until_due(shared: &Shared) -> std::sync::MutexGuard<'_, Gathering> {
    let options = &shared.options;
    let idle = |gathering: &mut Gathering| {
        let overlay = &gathering.overlay;
        !gathering.stop && overlay.frozen.is_none() && overlay.active.last_lsn == 0
    };
    let early = |gathering: &mut Gathering| {
        let active = &gathering.overlay.active;
        let full = active.cost.max(active.journal_bytes as usize) >= options.checkpoint_bytes;
        // A checkpoint that failed is tried again in time, not at once.
        !gathering.stop && (!full || gathering.failing.is_some())
    };
    let gathering = lock_of(&shared.gathering);
    let gathering = shared.gathered.wait_while(gathering, idle).unwrap_or_else(PoisonError::into_inner);
    let waited = shared.gathered.wait_timeout_while(gathering, options.checkpoint_every, early);
    waited.unwrap_or_else(PoisonError::into_inner).0
}
