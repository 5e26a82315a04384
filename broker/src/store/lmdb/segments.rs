//! The segments that are on disk, and the files of those that were read last.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use super::lock_of;
use crate::{
    core::event::Lsn,
    store::{
        files,
        journal::{
            format::{REWRITTEN, SOURCES, segment_name},
            scan::Segment,
        },
    },
};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Segments {
    pub(super) dir: PathBuf,
    listed: Mutex<Listed>,
}

#[derive(Debug)]
struct Listed {
    /// By number: those of the writer, the last one being written; then those that were rewritten.
    segments: BTreeMap<u64, Segment>,
    open: VecDeque<(u64, Arc<File>)>,
    /// So many copies are being made: no file is removed.
    copies: usize,
    /// Segments whose files are removed after that.
    freed: Vec<u64>,
}

impl Segments {
    pub(super) fn new(dir: PathBuf, segments: impl IntoIterator<Item = Segment>) -> Self {
        let segments = segments.into_iter().map(|segment| (segment.header.number, segment)).collect();
        Self {
            dir,
            listed: Mutex::new(Listed { segments, open: VecDeque::new(), copies: 0, freed: Vec::new() }),
        }
    }

    /// From now on these can be read.
    pub(super) fn add(&self, segments: impl IntoIterator<Item = Segment>) {
        let segments = segments.into_iter().map(|segment| (segment.header.number, segment));
        lock_of(&self.listed).segments.extend(segments);
    }

    /// False once a segment is freed, which is after the last index entry that points to it was committed
    /// away: whoever looks at the index then finds no such entry.
    pub(super) fn has(&self, number: u64) -> bool {
        lock_of(&self.listed).segments.contains_key(&number)
    }

    /// The salt of a segment and its file; `NotFound` if it is freed.
    pub(super) fn file(&self, number: u64) -> io::Result<(u64, Arc<File>)> {
        let mut listed = lock_of(&self.listed);
        let salt = listed.segments.get(&number).ok_or(io::ErrorKind::NotFound)?.header.salt;
        if let Some(at) = listed.open.iter().position(|(open, _)| *open == number) {
            listed.open.swap(0, at);
        } else {
            let file = Arc::new(File::open(self.dir.join(segment_name(number)))?);
            listed.open.truncate(FILES_MAX - 1);
            listed.open.push_front((number, file));
        }
        Ok((salt, Arc::clone(&listed.open[0].1)))
    }

    /// Segments that are never written again and whose groups are all in the checkpoint, by number.
    pub(super) fn closed(&self, applied: Lsn) -> Vec<Segment> {
        let listed = lock_of(&self.listed);
        // The writer's last one stays in any case: it carries the number and the lsn that go on.
        let written = listed.segments.range(..REWRITTEN).map(|(_, segment)| *segment);
        let followers = written.clone().skip(1);
        let closed = written.zip(followers).filter(|(_, next)| next.header.first_lsn <= applied + 1);
        let rewritten = listed.segments.range(SOURCES + 1..).map(|(_, segment)| *segment);
        closed.map(|(segment, _)| segment).chain(rewritten).collect()
    }

    /// A number for the next rewritten segment, above all that are there: also those that are freed already
    /// and whose files a copy still needs.
    pub(super) fn next_rewritten(&self) -> u64 {
        let listed = lock_of(&self.listed);
        let last = listed.segments.keys().next_back().max(listed.freed.iter().max());
        last.copied().unwrap_or(REWRITTEN).max(REWRITTEN) + 1
    }

    /// Takes a segment off the list, closes it and removes its file.
    pub(super) fn free(&self, number: u64) {
        let mut listed = lock_of(&self.listed);
        listed.segments.remove(&number);
        listed.open.retain(|(open, _)| *open != number);
        if listed.copies > 0 {
            return listed.freed.push(number);
        }
        drop(listed);
        self.remove(number);
    }

    /// Until what is returned is dropped, the file of no segment is removed.
    pub(super) fn keep(&self) -> Kept<'_> {
        lock_of(&self.listed).copies += 1;
        Kept(self)
    }

    fn remove(&self, number: u64) {
        if let Err(error) = files::remove(&self.dir.join(segment_name(number))) {
            tracing::warn!(segment = number, %error, "cannot remove a segment; the next start will");
        }
    }
}

/// See [`Segments::keep`].
pub(super) struct Kept<'a>(&'a Segments);

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        let mut listed = lock_of(&self.0.listed);
        listed.copies -= 1;
        if listed.copies == 0 {
            let freed = std::mem::take(&mut listed.freed);
            drop(listed);
            freed.into_iter().for_each(|number| self.0.remove(number));
        }
    }
}

const FILES_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::journal::format::SegmentHeader;

    #[test]
    fn the_number_of_a_freed_segment_is_not_given_again_while_a_copy_needs_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let header = SegmentHeader { store_id: [1; 16], number: REWRITTEN + 1, first_lsn: 1, salt: 1 };
        let segments = Segments::new(dir.path().to_owned(), [Segment { header, bytes: 64 }]);
        let path = dir.path().join(segment_name(REWRITTEN + 1));
        std::fs::write(&path, b"old").unwrap();
        let kept = segments.keep();
        segments.free(REWRITTEN + 1);
        assert_eq!(segments.next_rewritten(), REWRITTEN + 2);
        assert!(path.exists());
        drop(kept);
        assert!(!path.exists());
    }
}
