//! What becomes of files that are damaged: they are kept, in a folder of their own, for whoever looks into it.
//!
//! A damaged segment still serves what can be read of it, so it gets a second name there and keeps its first.
//! What cannot be used at all is moved.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{Events, lock_of};
use crate::store::{Damage, StoreEvent, files, journal::format::segment_name};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Quarantine {
    journal: PathBuf,
    dir: PathBuf,
    /// Segments that are known to be damaged: told once, and never rewritten.
    segments: Mutex<BTreeSet<u64>>,
}

impl Quarantine {
    /// Of the store in this folder.
    pub(super) fn new(path: &Path) -> Self {
        Self { journal: path.join("journal"), dir: path.join("quarantine"), segments: Mutex::default() }
    }

    pub(super) fn has(&self, segment: u64) -> bool {
        lock_of(&self.segments).contains(&segment)
    }

    /// Keeps a damaged segment under a second name. False if that was known before.
    pub(super) fn keep(&self, segment: u64) -> bool {
        let is_new = lock_of(&self.segments).insert(segment);
        if is_new {
            let name = segment_name(segment);
            let kept =
                self.make().and_then(|()| std::fs::hard_link(self.journal.join(&name), self.dir.join(name)));
            match kept {
                Err(error)
                    if error.kind() != io::ErrorKind::AlreadyExists
                        && error.kind() != io::ErrorKind::NotFound =>
                {
                    tracing::warn!(segment, %error, "a damaged segment cannot be kept in quarantine");
                }
                _ => {}
            }
        }
        is_new
    }

    /// As [`Quarantine::keep`], and tells it.
    pub(super) fn tell(&self, events: &Events, segment: u64, offset: u64, what: String) {
        if self.keep(segment) {
            events.push(StoreEvent::Damaged(Damage { file: file(segment), offset, what }));
        }
    }

    /// Moves what cannot be used at all, under a name that is free. Durable when it returns.
    pub(super) fn take(&self, path: &Path) -> io::Result<()> {
        self.make()?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("unnamed");
        let mut to = self.dir.join(name);
        let mut number = 1;
        while to.try_exists()? {
            to = self.dir.join(format!("{name}.{number}"));
            number += 1;
        }
        files::rename(path, &to)?;
        let from = path.parent().unwrap_or(&self.dir);
        [from, &self.dir].into_iter().try_for_each(files::sync_dir)
    }

    fn make(&self) -> io::Result<()> {
        match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&self.dir)
        {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }
}

/// A segment's name within the store's folder.
pub(super) fn file(segment: u64) -> String {
    format!("journal/{}", segment_name(segment))
}
