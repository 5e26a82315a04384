//! A copy of a store that runs.
//!
//! Nothing stops for it. The checkpoint is copied as one read transaction sees it; then follow the segments of
//! the journal that are there: those that are never written again by a second name, where the file system
//! allows it, and the one that is being written up to its last whole group. In between no segment is removed,
//! so everything that the copied checkpoint points to is there, and the groups above it are in the last ones.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{Arc, Weak},
};

use super::{Shared, io_error};
use crate::store::{
    OpenError, files,
    journal::{
        format::{REWRITTEN, segment_name, segment_number},
        scan,
    },
};

/// Makes copies of a running store. Cloning shares it; it does not keep the store open.
#[derive(Debug, Clone)]
pub struct Copier(pub(super) Weak<Shared>);

/// What a copy of a store consists of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Segments of the journal.
    pub segments: u64,
    /// How many of those are second names, which took no room.
    pub linked: u64,
    /// Bytes of checkpoint and segments.
    pub bytes: u64,
}

impl Copier {
    /// Copies the store into a folder that exists. Blocks for as long as that takes. `None`: the store is closed.
    ///
    /// # Errors
    /// A file cannot be read or written. What was written stays.
    pub fn copy(&self, to: &Path) -> Result<Option<Copied>, OpenError> {
        let Some(shared) = self.0.upgrade() else { return Ok(None) };
        copy(&shared, to).map(Some)
    }
}

fn copy(shared: &Arc<Shared>, to: &Path) -> Result<Copied, OpenError> {
    let (journal, checkpoint) = (to.join("journal"), to.join("checkpoint"));
    super::make_dir(&journal)?;
    super::make_dir(&checkpoint)?;
    let _kept = shared.segments.keep();
    let data = checkpoint.join("data.mdb");
    shared
        .checkpoint
        .copy(&data)
        .map_err(|error| OpenError::Checkpoint { path: data.clone(), what: error.to_string() })?;
    let mut copied = copy_journal(&shared.segments.dir, &journal)?;
    let synced = File::open(&data).and_then(|file| {
        copied.bytes += file.metadata()?.len();
        files::make_private(&data)?;
        files::sync(&file, &data)
    });
    synced.map_err(|source| io_error("sync", &data, source))?;
    super::sync_dir(&checkpoint)?;
    Ok(copied)
}

/// Copies the segments of a journal, which may be written at its end meanwhile.
pub(in crate::store) fn copy_journal(from: &Path, to: &Path) -> Result<Copied, OpenError> {
    let names = std::fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let names = names.map_err(|source| io_error("list", from, source))?;
    let mut numbers: Vec<u64> =
        names.iter().filter_map(|entry| segment_number(entry.file_name().to_str()?)).collect();
    numbers.sort_unstable();
    let written = numbers.iter().copied().rfind(|number| number & REWRITTEN == 0);
    let mut copied = Copied::default();
    for number in numbers {
        let (old, new) = (from.join(segment_name(number)), to.join(segment_name(number)));
        let doing = |source| io_error("copy", &old, source);
        copied.segments += 1;
        if Some(number) != written && std::fs::hard_link(&old, &new).is_ok() {
            copied.linked += 1;
        } else {
            files::copy(&old, &new).map_err(doing)?;
        }
        if Some(number) == written {
            let end = scan::end_of(to, number)?;
            files::cut(&new, end).map_err(doing)?;
        }
        copied.bytes += std::fs::metadata(&new).map_err(doing)?.len();
    }
    super::sync_dir(to)?;
    Ok(copied)
}
