//! The thread that checkpoints, frees segments behind the checkpoint, and rewrites those that are mostly dead.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    Gathering, Shared,
    checkpoint::{Live, LiveChanges},
    compaction::{self, Copied, Settled},
    lock_of,
    overlay::Layer,
    room::{PROBE, Part, Reserve},
};
use crate::{
    core::event::Lsn,
    store::journal::{format::SOURCES, rewrite::Rewrite, scan::Segment},
};

/// What the keeper knows of the checkpoint.
pub(super) struct Keeper {
    store_id: [u8; 16],
    live: BTreeMap<u64, Live>,
    applied: Lsn,
    settled: Settled,
    /// Checkpoints until rewriting is tried again after it failed.
    hold_off: u32,
    /// The sources that are kept next to the segments are all there are.
    sources_kept: bool,
    /// A commit failed and `live` may not be what the checkpoint says.
    uncertain: bool,
    /// Blocks for a commit that finds none.
    reserve: Reserve,
}

impl Keeper {
    pub(super) fn new(store_id: [u8; 16], live: BTreeMap<u64, Live>, applied: Lsn, reserve: Reserve) -> Self {
        Self {
            store_id,
            live,
            applied,
            settled: Settled::default(),
            hold_off: 0,
            uncertain: false,
            sources_kept: false,
            reserve,
        }
    }

    /// Checkpoints what gathers until told to stop, and then what is left.
    pub(super) fn run(mut self, shared: &Shared) {
        self.free(shared);
        loop {
            self.look_for_room(shared);
            let mut gathering = wait_until_due(shared);
            #[cfg(test)]
            if gathering.abandoned {
                // Nobody makes room any more.
                gathering.failing = Some("the store was killed".to_owned());
                shared.gathered.notify_all();
                return;
            }
            let layer = gathering.overlay.freeze();
            let stop = gathering.stop;
            drop(gathering);
            let Some(layer) = layer else {
                if stop {
                    return;
                }
                continue;
            };
            if self.checkpoint(shared, &layer) {
                let closed = shared.segments.closed(self.applied);
                self.settled.observe(&closed, &self.live);
                if !stop {
                    self.rewrite(shared, &closed);
                }
            } else if stop {
                // The journal has everything.
                return;
            }
        }
    }

    /// Commits a layer and frees what it killed; whether it could.
    fn checkpoint(&mut self, shared: &Shared, layer: &Arc<Layer>) -> bool {
        let mut result = shared.written.commit(|| shared.checkpoint.commit(layer));
        if let Err(error) = &result
            && error.is_io()
            && self.reserve.give_up()
        {
            tracing::warn!(%error, "a checkpoint found no space, what was held back for it is given up");
            self.uncertain = true;
            result = shared.written.commit(|| shared.checkpoint.commit(layer));
        }
        let mut gathering = lock_of(&shared.gathering);
        let done = result.is_ok();
        match result {
            Ok(live) => {
                gathering.overlay.frozen = None;
                gathering.failing = None;
                drop(gathering);
                self.applied = layer.last_lsn;
                self.sources_kept &= layer.sources.is_empty();
                self.count(live);
                self.recount(shared);
                self.free(shared);
            }
            Err(error) => {
                tracing::error!(%error, lsn = layer.last_lsn, "no checkpoint");
                self.uncertain = true;
                gathering.failing = Some(error.to_string());
                drop(gathering);
            }
        }
        shared.gathered.notify_all();
        done
    }

    /// Takes back what was given up, if it is there, and says whether there is room.
    fn look_for_room(&mut self, shared: &Shared) {
        let held = self.reserve.hold();
        let short = held.err().map(|error| format!("no room for the checkpoint: {error}"));
        shared.room.set(&shared.events, Part::Checkpoint, short);
        shared.room.set(&shared.events, Part::Map, shared.checkpoint.nearly_full());
    }

    fn count(&mut self, changes: LiveChanges) {
        for (segment, (entries, bytes)) in changes.0 {
            let live = self.live.entry(segment).or_default();
            live.entries = live.entries.saturating_add_signed(entries);
            live.bytes = live.bytes.saturating_add_signed(bytes);
        }
    }

    /// Counts what is alive if a commit failed since, because it may have happened all the same.
    fn recount(&mut self, shared: &Shared) {
        if self.uncertain {
            match shared.checkpoint.live() {
                Ok(live) => (self.live, self.uncertain) = (live, false),
                Err(error) => tracing::warn!(%error, "no segment is freed until the checkpoint can be read"),
            }
        }
    }

    /// Writes the declared sources next to the segments, if there are new ones, before what they were declared in is
    /// freed; whether it could.
    fn keep_sources(&mut self, shared: &Shared) -> bool {
        if self.sources_kept {
            return true;
        }
        let kept = shared.checkpoint.sources().map_err(std::io::Error::other).and_then(|sources| {
            let mut rewrite = Rewrite::begin(&shared.segments.dir, self.store_id, SOURCES)?;
            rewrite.push(1, &sources)?;
            rewrite.finish()
        });
        match kept {
            Ok(_) => self.sources_kept = true,
            Err(error) => tracing::warn!(%error, "no segment is freed until the sources can be written"),
        }
        self.sources_kept
    }

    /// Deletes closed segments that no index entry points into.
    fn free(&mut self, shared: &Shared) {
        if self.uncertain {
            return;
        }
        let is_dead =
            |segment: &Segment| self.live.get(&segment.header.number).is_none_or(|live| live.entries == 0);
        let mut dead = shared.segments.closed(self.applied);
        dead.retain(is_dead);
        if dead.is_empty() || !self.keep_sources(shared) {
            return;
        }
        for segment in dead {
            self.live.remove(&segment.header.number);
            shared.segments.free(segment.header.number);
        }
    }

    /// Rewrites what pays, one segment's worth of survivors at most.
    fn rewrite(&mut self, shared: &Shared, closed: &[Segment]) {
        self.hold_off = self.hold_off.saturating_sub(1);
        if self.hold_off > 0 || self.uncertain {
            return;
        }
        let options = &shared.options;
        // Where space is short, what would be free soon is wanted now.
        let low = shared.room.is_low();
        let (after, bytes) = (if low { 0 } else { options.rewrite_after }, options.segment_bytes);
        let closed: Vec<Segment> =
            closed.iter().filter(|segment| !shared.quarantine.has(segment.header.number)).copied().collect();
        let old = compaction::choose(&closed, &self.live, &self.settled, after, bytes);
        if old.is_empty() {
            return;
        }
        if let Err(error) = self.try_rewrite(shared, &old) {
            if let RewriteError::Copy(error) = &error
                && error.is_damage
            {
                let what = format!("it cannot be rewritten: {}", error.error);
                return shared.quarantine.tell(&shared.events, error.segment, 0, what);
            }
            tracing::warn!(%error, "old segments cannot be rewritten now");
            self.hold_off = if low { HOLD_OFF_LOW } else { HOLD_OFF };
        }
    }

    fn try_rewrite(&mut self, shared: &Shared, old: &[Segment]) -> Result<(), RewriteError> {
        let runs = shared.checkpoint.runs_in(&old.iter().map(|segment| segment.header.number).collect())?;
        let copied =
            compaction::copy(&shared.segments, self.store_id, old, runs, &mut || self.breathe(shared))?;
        let Some(Copied { new, moves }) = copied else { return Ok(()) };
        let bytes = new.map_or(0, |new| new.bytes);
        shared.written.compaction.fetch_add(bytes, Relaxed);
        // It can be read before an entry says so.
        shared.segments.add(new);
        #[cfg(test)]
        if super::tests::crashes_at(shared, super::tests::Crash::Named) {
            return Ok(());
        }
        match shared.written.commit(|| shared.checkpoint.move_runs(&moves)) {
            Ok(live) => {
                #[cfg(test)]
                if super::tests::crashes_at(shared, super::tests::Crash::Moved) {
                    return Ok(());
                }
                self.count(live);
                let before: u64 = old.iter().map(|segment| segment.bytes).sum();
                let after = new.map_or(0, |new| new.bytes);
                tracing::debug!(segments = old.len(), before, after, "old segments were rewritten");
                self.free(shared);
                Ok(())
            }
            Err(error) => {
                // Who points to which is seen when it is counted.
                self.uncertain = true;
                self.recount(shared);
                Err(error.into())
            }
        }
    }

    /// Lets others have the disk for a moment, and writes a checkpoint if one is due. Breaks when the store is
    /// told to stop.
    fn breathe(&mut self, shared: &Shared) -> ControlFlow<()> {
        let options = &shared.options;
        let gathering = lock_of(&shared.gathering);
        let calm = |gathering: &mut Gathering| !gathering.stop && !gathering.is_full(options);
        let waited = shared.gathered.wait_timeout_while(gathering, BREATH, calm);
        let mut gathering = waited.unwrap_or_else(PoisonError::into_inner).0;
        if gathering.stop {
            return ControlFlow::Break(());
        }
        if !gathering.is_full(options) || gathering.failing.is_some() {
            return ControlFlow::Continue(());
        }
        let layer = gathering.overlay.freeze();
        drop(gathering);
        if let Some(layer) = layer {
            self.checkpoint(shared, &layer);
        }
        ControlFlow::Continue(())
    }
}

/// Why segments were not rewritten. They are as they were.
#[derive(Debug, thiserror::Error)]
enum RewriteError {
    #[error("the index: {0}")]
    Index(#[from] super::checkpoint::Error),
    #[error(transparent)]
    Commit(#[from] super::checkpoint::CommitError),
    #[error(transparent)]
    Copy(#[from] compaction::CopyError),
}

/// Waits for changes, and then until a checkpoint is due: by time, by bytes, or because the store stops.
fn wait_until_due(shared: &Shared) -> MutexGuard<'_, Gathering> {
    let options = &shared.options;
    let idle = |gathering: &mut Gathering| !gathering.stop && gathering.is_idle();
    // A checkpoint that failed is tried again in time, not at once.
    let early = |gathering: &mut Gathering| {
        !gathering.stop && (!gathering.is_full(options) || gathering.failing.is_some())
    };
    let gathering = lock_of(&shared.gathering);
    let gathering = if shared.room.is_low() {
        let waited = shared.gathered.wait_timeout_while(gathering, PROBE, idle);
        waited.unwrap_or_else(PoisonError::into_inner).0
    } else {
        shared.gathered.wait_while(gathering, idle).unwrap_or_else(PoisonError::into_inner)
    };
    if gathering.is_idle() {
        return gathering;
    }
    let waited = shared.gathered.wait_timeout_while(gathering, options.checkpoint_every, early);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// Between two megabytes that are copied.
const BREATH: Duration = Duration::from_millis(10);
/// Checkpoints after a rewriting that failed.
const HOLD_OFF: u32 = 64;
/// As [`HOLD_OFF`], where space is short.
const HOLD_OFF_LOW: u32 = 8;
