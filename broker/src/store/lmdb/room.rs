//! Whether there is room for new data, and what is held back for when there is none.
//!
//! Three things can come to an end: the disk under the journal, the disk under the checkpoint, and the
//! checkpoint's map. Each is watched where it is used, and before its very end: the journal holds back its next
//! segment, the checkpoint a file that is given up when a commit finds no space, the map its last twentieth.
//! While any of them is short the store says [`StoreEvent::Low`], and whoever adds data is refused; what frees
//! space is still written, on what was held back. It is tried again once a second whether there is room, so
//! that nobody has to do anything but free space.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use super::{Events, StoreEvent, lock_of};
use crate::store::files;

/// What can come to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Journal,
    Checkpoint,
    Map,
}

/// What is short, and why.
#[derive(Debug, Default)]
pub(super) struct Room(Mutex<BTreeMap<Part, String>>);

impl Room {
    /// This part is short of room for this reason, or has enough.
    pub(super) fn set(&self, events: &Events, part: Part, short: Option<String>) {
        let mut parts = lock_of(&self.0);
        let was_low = !parts.is_empty();
        match short {
            Some(reason) => drop(parts.insert(part, reason)),
            None => drop(parts.remove(&part)),
        }
        match parts.values().next() {
            Some(reason) if !was_low => events.push(StoreEvent::Low { reason: reason.clone() }),
            None if was_low => events.push(StoreEvent::Ample),
            _ => {}
        }
    }

    /// Whether any part is short.
    pub(super) fn is_low(&self) -> bool {
        !lock_of(&self.0).is_empty()
    }
}

/// A file whose only purpose are its blocks.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Reserve {
    pub(super) fn new(path: &Path, bytes: u64) -> Self {
        Self { path: path.to_owned(), bytes, held: false }
    }

    /// Takes the blocks, if they are not held.
    pub(super) fn hold(&mut self) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        files::hold(&self.path, self.bytes)?;
        self.held = true;
        Ok(())
    }

    /// Gives the blocks back to the file system; false if there were none.
    pub(super) fn give_up(&mut self) -> bool {
        if !std::mem::take(&mut self.held) {
            return false;
        }
        files::remove(&self.path).is_ok()
    }
}

/// Between two looks whether there is room again.
pub(super) const PROBE: Duration = Duration::from_secs(1);
