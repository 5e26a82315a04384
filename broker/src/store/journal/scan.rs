//! Reading a journal: recovery at start, and groups by their place.

use std::{
    fs::File,
    io,
    ops::RangeInclusive,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use codec::{Record, RecordHeader};
use rustix::fs::SeekFrom;

use super::{
    End, Place, disk,
    format::{self, FORMAT, GroupHeader, HeaderError, SegmentHeader},
    rewrite,
};
use crate::{
    core::event::Lsn,
    store::{OpenError, files},
};

/// What a scan found.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Segments of the writer, by number.
    pub(crate) segments: Vec<Segment>,
    /// Segments that were rewritten, by number. Not read: nothing in them is above `applied`.
    pub(crate) rewritten: Vec<Segment>,
    /// Where the writer goes on.
    pub(crate) end: End,
}

/// A segment's header, and the bytes of disk that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) header: SegmentHeader,
    pub(crate) bytes: u64,
}

/// A valid group, seen by a scan.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) lsn: Lsn,
    pub(crate) place: Place,
    pub(crate) records: Bytes,
}

/// Reads the journal in `dir` and shows `visit` every group above `applied`, in order.
///
/// Segments that end at or below `applied` are not read. Changes nothing but unfinished segments, which it
/// removes.
///
/// What it found is on disk when it returns: a process that was killed between write and fdatasync leaves
/// whole groups that are only in the page cache, and nobody may be told of those.
pub(crate) fn scan(dir: &Path, applied: Lsn, visit: &mut dyn FnMut(Found)) -> Result<Scan, OpenError> {
    let mut segments = list(dir)?;
    let written = segments.partition_point(|segment| segment.header.number & format::REWRITTEN == 0);
    let rewritten = segments.split_off(written);
    let mut next = applied + 1;
    let mut reusable = None;
    for (at, Segment { header, .. }) in segments.iter().enumerate() {
        let follower = segments.get(at + 1).map(|follower| follower.header);
        if follower.is_some_and(|follower| follower.first_lsn <= applied + 1) {
            continue;
        }
        // What follows the first segment that is read starts where that one was found to end.
        if header.first_lsn > next {
            return Err(corrupt(
                header.number,
                0,
                format!("groups before lsn {} are missing", header.first_lsn),
            ));
        }
        let mut walk = Walk::open(dir, *header)?;
        let below = follower.map_or(Lsn::MAX, |follower| follower.first_lsn);
        while walk.next_lsn < below
            && let Some(found) = walk.next_group()?
        {
            if found.lsn > applied {
                visit(found);
            }
        }
        next = walk.next_lsn;
        if next < below && follower.is_some() {
            let what = format!("group {next} is damaged and a later segment starts at {below}");
            return Err(corrupt(header.number, walk.offset, what));
        }
        if follower.is_none() {
            reusable = walk.check_tail()?.then_some((header.number, header.salt, walk.offset, walk.size));
        }
    }
    if next <= applied {
        let number = segments.last().map_or(0, |last| last.header.number);
        return Err(corrupt(
            number,
            0,
            format!("the journal ends at lsn {}, the checkpoint at {applied}", next - 1),
        ));
    }
    if segments.is_empty() && applied > 0 {
        return Err(corrupt(0, 0, format!("there is no segment, but a checkpoint at lsn {applied}")));
    }
    if let Some(last) = segments.last() {
        sync(dir, last.header.number)?;
    }
    let next_number = segments.last().map_or(1, |last| last.header.number + 1);
    Ok(Scan { segments, rewritten, end: End { last_lsn: next - 1, next_number, reusable } })
}

/// Syncs the last segment and its name. Those in front of it were synced before it was made.
fn sync(dir: &Path, number: u64) -> Result<(), OpenError> {
    let path = dir.join(format::segment_name(number));
    let synced =
        File::open(&path).and_then(|file| files::sync(&file, &path)).and_then(|()| files::sync_dir(dir));
    synced.map_err(|source| OpenError::Io { doing: "sync", path, source })
}

/// The segments in `dir`, in the order they were written; then those that were rewritten.
fn list(dir: &Path) -> Result<Vec<Segment>, OpenError> {
    let io = |doing| move |source| OpenError::Io { doing, path: dir.to_owned(), source };
    let mut segments: Vec<Segment> = Vec::new();
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io("list"))? {
        let entry = entry.map_err(io("list"))?;
        let name = entry.file_name();
        if name == disk::TEMPORARY || name == rewrite::TEMPORARY {
            files::remove(&entry.path()).map_err(io("clean"))?;
        }
        numbers.extend(name.to_str().and_then(format::segment_number));
    }
    numbers.sort_unstable();
    for number in numbers {
        let segment = read_header(dir, number)?;
        let (header, rewritten) = (segment.header, number & format::REWRITTEN != 0);
        if let Some(Segment { header: last, .. }) = segments.last()
            && (last.store_id != header.store_id || !rewritten && last.first_lsn > header.first_lsn)
        {
            return Err(corrupt(number, 0, "the segment is of another store".to_owned()));
        }
        segments.push(segment);
    }
    Ok(segments)
}

fn read_header(dir: &Path, number: u64) -> Result<Segment, OpenError> {
    let path = dir.join(format::segment_name(number));
    let mut raw = [0; SegmentHeader::LEN];
    let read = File::open(&path).and_then(|file| {
        file.read_exact_at(&mut raw, 0)?;
        Ok(file.metadata()?.len())
    });
    let bytes = match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
        Err(source) => return Err(OpenError::Io { doing: "read", path, source }),
        Ok(bytes) => bytes,
    };
    match SegmentHeader::decode(&raw) {
        Ok(header) if header.number == number => Ok(Segment { header, bytes }),
        Err(HeaderError::Format(found)) => Err(OpenError::Format { path, found, known: FORMAT }),
        Ok(_) | Err(HeaderError::Damaged) => {
            Err(corrupt(number, 0, "the header of the segment is damaged".to_owned()))
        }
    }
}

fn corrupt(segment: u64, offset: u64, what: String) -> OpenError {
    OpenError::Corrupt { segment, offset, what }
}

/// Groups of one segment, one after the other.
struct Walk {
    path: PathBuf,
    file: File,
    header: SegmentHeader,
    size: u64,
    window: Window,
    offset: u64,
    next_lsn: Lsn,
}

impl Walk {
    fn open(dir: &Path, header: SegmentHeader) -> Result<Self, OpenError> {
        let path = dir.join(format::segment_name(header.number));
        let io = |source| OpenError::Io { doing: "open", path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let offset = SegmentHeader::LEN as u64;
        Ok(Self { path, file, header, size, window: Window::default(), offset, next_lsn: header.first_lsn })
    }

    /// The group with the next lsn, if it is there and whole.
    fn next_group(&mut self) -> Result<Option<Found>, OpenError> {
        let next = self.next_lsn..=self.next_lsn;
        let Some((group, records)) = self.group_at(self.offset, next)? else { return Ok(None) };
        let place = Place { segment: self.header.number, offset: self.offset, len: group.total_len() };
        self.offset += place.len;
        self.next_lsn += 1;
        Ok(Some(Found { lsn: group.lsn, place, records }))
    }

    /// A whole group at this offset with one of these lsns.
    fn group_at(
        &mut self,
        offset: u64,
        lsns: RangeInclusive<Lsn>,
    ) -> Result<Option<(GroupHeader, Bytes)>, OpenError> {
        let Some(raw) = self.get(offset, GroupHeader::LEN)? else { return Ok(None) };
        let group = GroupHeader::decode(raw);
        if !lsns.contains(&group.lsn) || group.write_start().is_none() {
            return Ok(None);
        }
        let crc = group.crc_seed(self.header.salt);
        let start = offset + GroupHeader::LEN as u64;
        let Some(records) = self.get(start, group.len as usize)? else { return Ok(None) };
        if crc32c::crc32c_append(crc, records) != group.crc {
            return Ok(None);
        }
        Ok(Some((group, Bytes::copy_from_slice(records))))
    }

    /// Judges what stands behind the last valid group: an error if it proves that the next group had been
    /// synced; true if it is nothing but zeros.
    fn check_tail(&mut self) -> Result<bool, OpenError> {
        let (end, next) = (self.offset, self.next_lsn);
        // No more groups than fit; keeps payloads from being taken for headers.
        let later = next + 1..=next + self.size / GroupHeader::LEN as u64;
        let mut clean = true;
        let mut offset = self.next_data(end);
        while offset < self.size {
            let page = (self.size - offset).min(PAGE);
            if self.get(offset, page as usize)?.is_some_and(|page| page.iter().all(|byte| *byte == 0)) {
                offset = self.next_data(offset + page);
                continue;
            }
            clean = false;
            for offset in (offset..offset + page).step_by(8) {
                if let Some((group, _)) = self.group_at(offset, later.clone())?
                    && group.write_start().is_some_and(|start| start > next)
                {
                    let what = format!(
                        "group {next} is damaged, but group {} at byte {offset} was written after it was synced",
                        group.lsn
                    );
                    return Err(corrupt(self.header.number, end, what));
                }
            }
            offset += page;
        }
        Ok(clean)
    }

    /// Skips space that was reserved and never written, which need not be read to be known as zeros.
    fn next_data(&self, offset: u64) -> u64 {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => offset.max(data & !7),
            Err(rustix::io::Errno::NXIO) => self.size,
            Err(_) => offset,
        }
    }

    fn get(&mut self, offset: u64, len: usize) -> Result<Option<&[u8]>, OpenError> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.size) {
            return Ok(None);
        }
        let got = self.window.get(&self.file, self.size, offset, len);
        got.map(Some).map_err(|source| OpenError::Io { doing: "read", path: self.path.clone(), source })
    }
}

/// A piece of a file in memory: one read for many small groups.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn get(&mut self, file: &File, size: u64, offset: u64, len: usize) -> io::Result<&[u8]> {
        let end = offset + len as u64;
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let left = usize::try_from(size - offset).unwrap_or(usize::MAX);
            self.bytes.resize(len.max(WINDOW).min(left), 0);
            file.read_exact_at(&mut self.bytes, offset)?;
            self.start = offset;
        }
        let at = (offset - self.start) as usize;
        Ok(&self.bytes[at..at + len])
    }
}

const WINDOW: usize = 64 << 10;
const PAGE: u64 = 4096;

/// Reads the whole groups in `len` bytes at `offset` of a segment, checks each, and hands `visit` where it
/// starts, its lsn and its records. They share one buffer.
pub(crate) fn read_groups(
    file: &File,
    salt: u64,
    offset: u64,
    len: usize,
    visit: &mut dyn FnMut(u64, Lsn, Bytes),
) -> io::Result<()> {
    let mut buffer = BytesMut::zeroed(len);
    file.read_exact_at(&mut buffer, offset)?;
    let mut left = buffer.freeze();
    while !left.is_empty() {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "the group is damaged");
        if left.len() < GroupHeader::LEN {
            return Err(damaged());
        }
        let group = GroupHeader::decode(&left);
        let end = GroupHeader::LEN + group.len as usize;
        if group.total_len() > left.len() as u64 {
            return Err(damaged());
        }
        let records = left.slice(GroupHeader::LEN..end);
        if crc32c::crc32c_append(group.crc_seed(salt), &records) != group.crc {
            return Err(damaged());
        }
        visit(offset + (len - left.len()) as u64, group.lsn, records);
        left = left.slice(group.total_len() as usize..);
    }
    Ok(())
}

/// The records of a group whose crc is right; they share its buffer.
pub(crate) fn split(mut records: Bytes) -> impl Iterator<Item = Record> {
    std::iter::from_fn(move || {
        let (raw, _) = records.split_first_chunk::<{ RecordHeader::LEN }>()?;
        let (header, body_len) = RecordHeader::decode(raw);
        let end = RecordHeader::LEN.checked_add(body_len as usize)?;
        if end > records.len() {
            return None;
        }
        let body = records.slice(RecordHeader::LEN..end);
        records = records.slice(end..);
        Some(Record { header, body })
    })
}
