//! The change window: what happened lately, every change by itself.
//!
//! Invariant: every durable change with a local revision above `floor` is in it, in order. It is kept in
//! memory alone and begins anew with the process, at the revision that was recovered: whoever asks for what
//! was before is told *too old*, and lists again.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use super::Version;

/// How much of the past a window keeps. The stricter bound counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowBounds {
    /// Changes.
    pub changes: usize,
    /// Bytes of keys and values, the previous ones included.
    pub bytes: usize,
}

impl WindowBounds {
    /// Of a space that an API is served from.
    pub const DEFAULT: Self = Self { changes: 65_536, bytes: 32 << 20 };
}

/// One durable change of one key.
#[derive(Debug)]
pub(in crate::core) struct Change {
    pub(in crate::core) key: Arc<str>,
    /// What was held before; a tombstone or nothing: the key was absent.
    pub(in crate::core) previous: Option<Version>,
    pub(in crate::core) new: Version,
}

impl Change {
    /// What a watcher is charged for: more than is really kept, because values are shared with their
    /// neighbours in time.
    fn cost(&self) -> usize {
        const FIXED: usize = 200;
        FIXED + self.key.len() + self.new.bytes() + self.previous.as_ref().map_or(0, Version::bytes)
    }
}

#[derive(Debug)]
pub(in crate::core) struct Window {
    bounds: WindowBounds,
    changes: VecDeque<Change>,
    bytes: usize,
    floor: u64,
}

impl Window {
    /// A window that knows nothing up to this local revision.
    pub(in crate::core) fn new(bounds: WindowBounds, floor: u64) -> Self {
        Self { bounds, changes: VecDeque::new(), bytes: 0, floor }
    }

    /// The same bounds, knowing nothing up to this local revision.
    pub(in crate::core) fn begun_at(self, floor: u64) -> Self {
        Self::new(self.bounds, floor)
    }

    pub(super) fn push(&mut self, change: Change) {
        self.bytes += change.cost();
        self.changes.push_back(change);
        while self.changes.len() > self.bounds.changes || self.bytes > self.bounds.bytes {
            let oldest = self.changes.pop_front().expect("a window beyond its bounds is not empty");
            self.bytes -= oldest.cost();
            self.floor = oldest.new.local;
        }
    }

    /// Everything after this local revision is known.
    pub(in crate::core) fn floor(&self) -> u64 {
        self.floor
    }

    /// Changes after a local revision, oldest first. The caller has compared with [`Self::floor`].
    pub(in crate::core) fn after(&self, local: u64) -> impl Iterator<Item = &Change> {
        let from = self.changes.partition_point(|change| change.new.local <= local);
        self.changes.range(from..)
    }

    /// What the keys that changed after a local revision held at it.
    pub(in crate::core) fn undone_to(&self, local: u64) -> BTreeMap<&Arc<str>, Option<&Version>> {
        let mut held = BTreeMap::new();
        for change in self.after(local) {
            held.entry(&change.key).or_insert(change.previous.as_ref());
        }
        held
    }
}
