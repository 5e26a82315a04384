//! Writing a segment of survivors: what is still wanted of old segments, in groups with their old lsn.
//!
//! A rewritten segment has the same header and groups as any other. It is as large as what it holds, gets its
//! name when all of it is on disk, and is never written again. Its groups are in the order in which they were
//! copied; some lsns are missing, and those of several old segments need not ascend.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use codec::Record;

use super::{
    Place, body_len,
    format::{self, GroupHeader, SegmentHeader},
    scan::Segment,
};
use crate::{core::event::Lsn, store::files};

/// Name of a rewritten segment that is being made.
pub(super) const TEMPORARY: &str = "old.tmp";
/// As [`TEMPORARY`], of the one that holds the declared sources.
pub(super) const TEMPORARY_SOURCES: &str = "sources.tmp";

/// A rewritten segment in the making. Dropped before [`Rewrite::finish`] it leaves a file that the next one,
/// or the next start, removes.
#[derive(Debug)]
pub(crate) struct Rewrite {
    dir: PathBuf,
    temporary: PathBuf,
    file: File,
    header: SegmentHeader,
    /// Bytes that are in the file.
    flushed: u64,
    /// Groups behind those.
    buffer: Vec<u8>,
}

impl Rewrite {
    /// Begins the rewritten segment of this number.
    pub(crate) fn begin(dir: &Path, store_id: [u8; 16], number: u64) -> io::Result<Self> {
        let salt = getrandom::u64().map_err(io::Error::other)?;
        let header = SegmentHeader { store_id, number, first_lsn: Lsn::MAX, salt };
        let temporary = dir.join(if number == format::SOURCES { TEMPORARY_SOURCES } else { TEMPORARY });
        let file = files::create(&temporary)?;
        let flushed = SegmentHeader::LEN as u64;
        Ok(Self { dir: dir.to_owned(), temporary, file, header, flushed, buffer: Vec::new() })
    }

    /// Adds a group with the records that are left of it; where it stands.
    pub(crate) fn push(&mut self, lsn: Lsn, records: &[Record]) -> io::Result<Place> {
        let offset = self.flushed + self.buffer.len() as u64;
        let at = self.buffer.len();
        self.header.first_lsn = self.header.first_lsn.min(lsn);
        self.buffer.extend_from_slice(&[0; GroupHeader::LEN]);
        for record in records {
            self.buffer.extend_from_slice(&record.header.encode(body_len(record)));
            self.buffer.extend_from_slice(&record.body);
        }
        let start = at + GroupHeader::LEN;
        let mut header = GroupHeader {
            lsn,
            len: u32::try_from(self.buffer.len() - start).expect("no longer than the group it is of"),
            count: u32::try_from(records.len()).expect("fewer records than bytes"),
            ahead: 0,
            crc: 0,
        };
        header.crc = crc32c::crc32c_append(header.crc_seed(self.header.salt), &self.buffer[start..]);
        self.buffer[at..start].copy_from_slice(&header.encode());
        let padding = format::padding(u64::from(header.len));
        self.buffer.extend_from_slice(&[0; 8][..padding]);
        if self.buffer.len() >= FLUSH_BYTES {
            self.flush()?;
        }
        Ok(Place { segment: self.header.number, offset, len: header.total_len() })
    }

    fn flush(&mut self) -> io::Result<()> {
        files::write_at(&self.file, &self.temporary, &self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Puts all of it on disk, then gives it its name.
    pub(crate) fn finish(mut self) -> io::Result<Segment> {
        self.flush()?;
        let (temporary, name) = (self.temporary, self.dir.join(format::segment_name(self.header.number)));
        files::write_at(&self.file, &temporary, &self.header.encode(), 0)?;
        files::sync(&self.file, &temporary)?;
        files::rename(&temporary, &name)?;
        files::sync_dir(&self.dir)?;
        Ok(Segment { header: self.header, bytes: self.flushed })
    }

    /// Removes what was written.
    pub(crate) fn abandon(self) {
        if let Err(error) = files::remove(&self.temporary) {
            tracing::warn!(%error, "cannot remove an unfinished segment; the next start will");
        }
    }
}

/// Bytes that gather before they are written.
const FLUSH_BYTES: usize = 256 << 10;
