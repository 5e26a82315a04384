//! The journal: the one write-ahead log of a store, and the only thing on the acknowledgement path.
//!
//! It is a folder of preallocated segments. A segment is a 64-byte `SegmentHeader`
//! and groups back to back; a group is a 24-byte header, its records without padding between them, and
//! zeros up to a multiple of 8. A group never crosses segments; one that is larger than a segment gets a
//! segment of its own size. The lsn counts groups from 1.
//!
//! ```text
//! segment  8 magic "octojrnl" | u32 format | u32 zero | 16 store id | u64 number | u64 first_lsn | u64 salt | u32 zero | u32 crc32c
//! group    u64 lsn | u32 len | u32 count | u32 crc32c(salt, lsn, len, count, ahead, records) | u32 ahead | records | padding
//! ```
//!
//! `len` is the bytes of the records. Two fields carry what recovery must know and cannot guess:
//!
//! - `ahead` is the number of groups in front of this one *in the same write*. Groups of one write reach
//!   the disk in any order, so a whole group behind a damaged one proves nothing by itself: it proves that
//!   everything up to `lsn - ahead - 1` had been synced when it was written.
//! - `first_lsn` of a segment says that every group below it is durable in earlier segments, and that
//!   whatever else those hold from this lsn on was refused or torn and never happened.
//!
//! # The spare
//!
//! The file `spare` holds back the blocks of the next segment, which is made of it: so a full disk is met while
//! there is still a whole segment to write to. That rest is for groups that free space or move positions;
//! whoever adds data is refused by then.
//!
//! # Segments that were rewritten
//!
//! What is still wanted of old segments, Log records and gaps, is copied to a segment `old-<number>.seg`, in
//! groups with their old lsn; see `rewrite.rs`. Such a segment is written once, and synced before it gets its
//! name. The writer and recovery never look at one: it holds nothing that the checkpoint does not know. Number 0
//! holds the declared sources instead, for a checkpoint that must be made anew.
//!
//! # What a damaged group means
//!
//! The group with the next lsn is missing or its crc is wrong. If something proves that it had been synced
//! (a later segment that starts above it, or a whole group whose write began above it), the journal is
//! damaged: what is missing is told, and what follows is still read. Otherwise it is the torn tail of a write
//! that nobody was told of, and the journal ends in front of it. A damaged segment is never written again.
//!
//! # After a torn tail or a failed write
//!
//! Neither the space behind the end nor, after a failed fdatasync, the page cache can be trusted. The
//! writer then never touches that segment again: the next group, which repeats the lsn, opens a new one
//! with a fresh salt and that lsn as `first_lsn`. It takes the place of a segment that failed before it held
//! a durable group, so that a disk that keeps failing is not filled with empty segments. Until it does, only the erased header of the first
//! refused group keeps the refused ones from being read back; if the disk refuses to erase too, they may
//! come back after a restart, like any write whose acknowledgement was lost.

pub(crate) mod disk;
pub(crate) mod format;
pub(crate) mod rewrite;
pub(crate) mod scan;
mod uring;

use std::{
    io::{self, IoSlice},
    path::{Path, PathBuf},
};

use codec::{Record, RecordHeader};

use self::{
    disk::{Disk, SegmentFile},
    format::{GroupHeader, SegmentHeader},
    scan::Segment,
};
use crate::core::event::{Group, Lsn};

/// How the journal writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum JournalIo {
    /// pwritev, then fdatasync. The default: with 64 producers the linked submission costs 1.7 times the CPU,
    /// because the kernel hands it to a worker thread (PERF.md, P12).
    #[default]
    Plain,
    /// One linked submission of the write and the fdatasync.
    Uring,
    /// io_uring where the kernel allows it, else plain.
    Auto,
}

/// Where a durable group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u64,
    /// Of the group's header.
    pub(crate) offset: u64,
    /// Header, records and padding.
    pub(crate) len: u64,
}

/// The first group that was not written, and why.
#[derive(Debug)]
pub(crate) struct AppendError {
    pub(crate) lsn: Lsn,
    pub(crate) source: io::Error,
}

/// The writing end. Everything it says is written has been synced.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    store_id: [u8; 16],
    segment_bytes: u64,
    disk: Disk,
    current: Option<Current>,
    next_number: u64,
    next_lsn: Lsn,
    headers: Vec<u8>,
}

/// The segment being written.
#[derive(Debug)]
struct Current {
    file: SegmentFile,
    salt: u64,
    offset: u64,
    capacity: u64,
}

/// Where the writer goes on after a scan.
#[derive(Debug)]
pub(crate) struct End {
    /// Lsn of the last valid group.
    pub(crate) last_lsn: Lsn,
    /// Number for the next segment.
    pub(crate) next_number: u64,
    /// The last segment, if nothing but zeros follows its last group: number, salt, end, size.
    pub(crate) reusable: Option<(u64, u64, u64, u64)>,
}

impl Journal {
    /// A writer that continues at `end`. Creates no file before the first append.
    pub(crate) fn new(
        dir: &Path,
        store_id: [u8; 16],
        segment_bytes: u64,
        disk: Disk,
        end: &End,
    ) -> io::Result<Self> {
        let current = match end.reusable {
            Some((number, salt, offset, capacity)) => {
                Some(Current { file: SegmentFile::open(dir, number)?, salt, offset, capacity })
            }
            None => None,
        };
        Ok(Self {
            dir: dir.to_owned(),
            store_id,
            segment_bytes,
            disk,
            current,
            next_number: end.next_number,
            next_lsn: end.last_lsn + 1,
            headers: Vec::new(),
        })
    }

    /// Lsn of the group that must come next.
    pub(crate) fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Holds back the room of the next segment. While this fails, the current segment is the last one.
    pub(crate) fn keep_spare(&mut self) -> io::Result<()> {
        self.disk.keep_spare(&self.dir, self.segment_bytes)
    }

    /// Makes groups durable, in order, and pushes where each stands. As many as fit into a segment go in
    /// one write. On an error the groups before [`AppendError::lsn`] are durable and placed, the others
    /// are not there. `opened` gets each segment that was started.
    ///
    /// The groups must have consecutive lsns that start at [`Journal::next_lsn`].
    pub(crate) fn append(
        &mut self,
        mut groups: &[Group],
        places: &mut Vec<Place>,
        opened: &mut Vec<Segment>,
    ) -> Result<(), AppendError> {
        while let Some(first) = groups.first() {
            assert_eq!(first.lsn, self.next_lsn, "groups are journalled in order");
            let result = self.room_for(first, opened).and_then(|()| self.append_chunk(groups, places));
            match result {
                Ok(written) => groups = &groups[written..],
                Err(source) => return Err(AppendError { lsn: self.next_lsn, source }),
            }
        }
        Ok(())
    }

    /// Makes sure that there is a segment that holds `group`.
    fn room_for(&mut self, group: &Group, opened: &mut Vec<Segment>) -> io::Result<()> {
        let need = format::group_len(group);
        if self.current.as_ref().is_some_and(|current| current.capacity - current.offset >= need) {
            return Ok(());
        }
        let header = SegmentHeader {
            store_id: self.store_id,
            number: self.next_number,
            first_lsn: self.next_lsn,
            salt: getrandom::u64().map_err(io::Error::other)?,
        };
        let capacity = self.segment_bytes.max(SegmentHeader::LEN as u64 + need);
        let file = self.disk.create(&self.dir, &header, capacity)?;
        let offset = SegmentHeader::LEN as u64;
        self.current = Some(Current { file, salt: header.salt, offset, capacity });
        self.next_number += 1;
        opened.push(Segment { header, bytes: capacity });
        Ok(())
    }

    /// Writes and syncs as many groups as fit; returns how many.
    fn append_chunk(&mut self, groups: &[Group], places: &mut Vec<Place>) -> io::Result<usize> {
        let current = self.current.as_mut().expect("room_for has opened a segment");
        let count = chunk_len(groups, current.capacity - current.offset);
        let chunk = &groups[..count];
        encode_headers(chunk, current.salt, &mut self.headers);
        let slices = gather(chunk, &self.headers);
        let written = self.disk.append(&current.file, current.offset, &slices);
        drop(slices);
        if self.headers.capacity() > HEADERS_KEEP {
            self.headers = Vec::new();
        }
        if let Err(error) = written {
            // See the module's documentation: this segment is never touched again.
            let failed = self.current.take().expect("it was there above");
            self.disk.erase(&failed.file, failed.offset);
            if failed.offset == SegmentHeader::LEN as u64 {
                // It holds nothing: the next segment is renamed over it.
                self.next_number = failed.file.number;
            }
            return Err(error);
        }
        for group in chunk {
            let len = format::group_len(group);
            places.push(Place { segment: current.file.number, offset: current.offset, len });
            current.offset += len;
        }
        self.next_lsn += count as u64;
        Ok(count)
    }
}

/// How many groups go into one write: bounded by the segment's room, and so that the headers and the
/// iovecs of one write stay small.
fn chunk_len(groups: &[Group], room: u64) -> usize {
    let (mut bytes, mut records) = (0, 0);
    for (at, group) in groups.iter().enumerate() {
        bytes += format::group_len(group);
        records += group.records.len();
        if bytes > room || (at > 0 && (records > CHUNK_RECORDS_MAX || bytes > CHUNK_BYTES_MAX)) {
            return at;
        }
    }
    groups.len()
}

/// Everything of the chunk but the bodies: group headers, record headers, padding, in order.
fn encode_headers(chunk: &[Group], salt: u64, headers: &mut Vec<u8>) {
    headers.clear();
    for (ahead, group) in chunk.iter().enumerate() {
        let at = headers.len();
        headers.extend_from_slice(&[0; GroupHeader::LEN]);
        let mut header = GroupHeader {
            lsn: group.lsn,
            len: u32::try_from(format::records_len(group)).expect("a group is far below 4 GiB"),
            count: u32::try_from(group.records.len()).expect("fewer records than bytes"),
            ahead: u32::try_from(ahead).expect("bounded by CHUNK_RECORDS_MAX"),
            crc: 0,
        };
        let mut crc = header.crc_seed(salt);
        for record in &group.records {
            let raw = record.header.encode(body_len(record));
            crc = crc32c::crc32c_append(crc32c::crc32c_append(crc, &raw), &record.body);
            headers.extend_from_slice(&raw);
        }
        header.crc = crc;
        headers[at..at + GroupHeader::LEN].copy_from_slice(&header.encode());
        let padding = format::padding(u64::from(header.len));
        headers.extend_from_slice(&[0; 8][..padding]);
    }
}

/// The chunk as it stands on disk: pieces of `headers` and the bodies, which are not copied.
fn gather<'a>(chunk: &'a [Group], headers: &'a [u8]) -> Vec<IoSlice<'a>> {
    let records: usize = chunk.iter().map(|group| group.records.len()).sum();
    let mut slices = Vec::with_capacity(2 * records + 1);
    let (mut start, mut at) = (0, 0);
    for group in chunk {
        at += GroupHeader::LEN;
        for record in &group.records {
            at += RecordHeader::LEN;
            if !record.body.is_empty() {
                slices.push(IoSlice::new(&headers[start..at]));
                slices.push(IoSlice::new(&record.body));
                start = at;
            }
        }
        at += format::padding(format::records_len(group));
    }
    if start < at {
        slices.push(IoSlice::new(&headers[start..at]));
    }
    slices
}

fn body_len(record: &Record) -> u32 {
    u32::try_from(record.body.len()).expect("bodies are bounded by FRAME_MAX")
}

/// Records of one write, unless it is one larger group: 40 bytes of headers and two iovecs each.
const CHUNK_RECORDS_MAX: usize = 8192;
/// Bytes of one write, unless it is one larger group.
const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// The buffer of headers is given back above this size.
const HEADERS_KEEP: usize = 64 << 10;

#[cfg(test)]
pub(crate) mod tests;
