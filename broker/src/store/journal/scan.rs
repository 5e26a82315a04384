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
    /// What is damaged, in the order in which it was seen.
    pub(crate) damage: Vec<Damaged>,
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

/// A place in the journal that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damaged {
    pub(crate) place: Place,
    pub(crate) what: String,
    /// Groups above `applied` were lost.
    pub(crate) is_new: bool,
    /// Not even the header can be read: the segment is not among those that were found.
    pub(crate) is_whole: bool,
}

/// Reads the journal in `dir` and shows `visit` every group above `applied`, in order, and every place in
/// between where groups are missing that had been synced.
///
/// Segments that end at or below `applied` are not read. Changes nothing but unfinished segments, which it
/// removes.
///
/// What it found is on disk when it returns: a process that was killed between write and fdatasync leaves
/// whole groups that are only in the page cache, and nobody may be told of those.
pub(crate) fn scan(dir: &Path, applied: Lsn, visit: &mut dyn FnMut(Seen<'_>)) -> Result<Scan, OpenError> {
    let (mut segments, mut damage) = list(dir)?;
    for damaged in &damage {
        visit(Seen::Damaged(damaged));
    }
    let written = segments.partition_point(|segment| segment.header.number & format::REWRITTEN == 0);
    let rewritten = segments.split_off(written);
    let mut lose = |place, what, is_new, visit: &mut dyn FnMut(Seen<'_>)| {
        damage.push(Damaged { place, what, is_new, is_whole: false });
        visit(Seen::Damaged(damage.last().expect("just pushed")));
    };
    let mut next = applied + 1;
    let mut reusable = None;
    for (at, Segment { header, bytes }) in segments.iter().enumerate() {
        let follower = segments.get(at + 1).map(|follower| follower.header);
        if follower.is_some_and(|follower| follower.first_lsn <= applied + 1) {
            continue;
        }
        // What follows the first segment that is read starts where that one was found to end.
        if header.first_lsn > next {
            let what = format!("groups {next} to {} are missing in front of it", header.first_lsn - 1);
            let place = Place { segment: header.number, offset: 0, len: 0 };
            lose(place, what, true, visit);
        }
        let mut walk = Walk::open(dir, *header)?;
        let below = follower.map_or(Lsn::MAX, |follower| follower.first_lsn);
        let mut torn = false;
        while walk.next_lsn < below && !torn {
            if let Some(found) = walk.next_group()? {
                if found.lsn > applied {
                    visit(Seen::Group(found));
                }
                continue;
            }
            let (missing, offset) = (walk.next_lsn, walk.offset);
            let found = walk.find_later(follower.map(|follower| follower.first_lsn))?;
            torn = !found && follower.is_none();
            if !torn {
                // Something behind it proves that it had been synced.
                let until = if found { walk.next_lsn } else { below };
                let len = if found { walk.offset } else { *bytes } - offset;
                let what = format!("groups {missing} to {} cannot be read", until - 1);
                let place = Place { segment: header.number, offset, len };
                lose(place, what, until > applied + 1, visit);
                walk.next_lsn = until;
            }
        }
        next = walk.next_lsn;
        if follower.is_none() {
            reusable = walk.is_clean()?.then_some((header.number, header.salt, walk.offset, walk.size));
        }
    }
    if next <= applied {
        let what = format!("the journal ends at group {}, the checkpoint at {applied}", next - 1);
        let place =
            Place { segment: segments.last().map_or(0, |last| last.header.number), offset: 0, len: 0 };
        lose(place, what, true, visit);
        (next, reusable) = (applied + 1, None);
    } else if segments.is_empty() && applied > 0 {
        lose(Place { segment: 0, offset: 0, len: 0 }, "there is no segment".to_owned(), true, visit);
    }
    if let Some(last) = segments.last() {
        sync(dir, last.header.number)?;
    }
    let numbers = segments.iter().map(|segment| segment.header.number);
    let lost = damage.iter().map(|damaged| damaged.place.segment);
    let number = numbers.chain(lost).filter(|number| number & format::REWRITTEN == 0).max();
    let next_number = number.unwrap_or(0) + 1;
    Ok(Scan { segments, rewritten, damage, end: End { last_lsn: next - 1, next_number, reusable } })
}

/// What the segments in `dir` say of their store: its id, and whether a checkpoint must have been there, because
/// something was freed or rewritten.
pub(crate) fn of_store(dir: &Path) -> Result<Option<([u8; 16], bool)>, OpenError> {
    let (segments, _) = list(dir)?;
    let Some(first) = segments.first() else { return Ok(None) };
    let checkpointed =
        |header: &SegmentHeader| header.number & format::REWRITTEN != 0 || header.first_lsn > 1;
    let any_old = segments.last().is_some_and(|last| last.header.number & format::REWRITTEN != 0);
    Ok(Some((first.header.store_id, any_old || checkpointed(&first.header))))
}

/// The segments in `dir` that were rewritten.
pub(crate) fn rewritten(dir: &Path) -> Result<Vec<Segment>, OpenError> {
    let (mut segments, _) = list(dir)?;
    segments.retain(|segment| segment.header.number & format::REWRITTEN != 0);
    Ok(segments)
}

/// Where the groups of a rewritten segment stand, with their lsns, and what of it is damaged.
pub(crate) fn old_groups(
    dir: &Path,
    segment: &Segment,
    groups: &mut Vec<(Lsn, Place)>,
) -> Result<Vec<Damaged>, OpenError> {
    let mut walk = Walk::open(dir, segment.header)?;
    let mut damage: Vec<Damaged> = Vec::new();
    let mut lost_from = None;
    while walk.offset + GroupHeader::LEN as u64 <= walk.size {
        let number = segment.header.number;
        if let Some((group, _)) = walk.group_at(walk.offset, 1..=Lsn::MAX)? {
            if let Some(offset) = lost_from.take() {
                let place = Place { segment: number, offset, len: walk.offset - offset };
                let what = "groups cannot be read".to_owned();
                damage.push(Damaged { place, what, is_new: true, is_whole: false });
            }
            groups.push((group.lsn, Place { segment: number, offset: walk.offset, len: group.total_len() }));
            walk.offset += group.total_len();
        } else {
            lost_from.get_or_insert(walk.offset);
            walk.offset += 8;
        }
    }
    Ok(damage)
}

/// Syncs the last segment and its name. Those in front of it were synced before it was made.
fn sync(dir: &Path, number: u64) -> Result<(), OpenError> {
    let path = dir.join(format::segment_name(number));
    let synced =
        File::open(&path).and_then(|file| files::sync(&file, &path)).and_then(|()| files::sync_dir(dir));
    synced.map_err(|source| OpenError::Io { doing: "sync", path, source })
}

/// What a scan comes by.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    Group(Found),
    Damaged(&'a Damaged),
}

/// Where the last of the groups that follow each other from a segment's start ends.
pub(crate) fn end_of(dir: &Path, number: u64) -> Result<u64, OpenError> {
    let Some(segment) = read_header(dir, number)? else { return Ok(SegmentHeader::LEN as u64) };
    let mut walk = Walk::open(dir, segment.header)?;
    while walk.next_group()?.is_some() {}
    Ok(walk.offset)
}

/// The segments in `dir`, in the order they were written; then those that were rewritten.
fn list(dir: &Path) -> Result<(Vec<Segment>, Vec<Damaged>), OpenError> {
    let io = |doing| move |source| OpenError::Io { doing, path: dir.to_owned(), source };
    let mut segments: Vec<Segment> = Vec::new();
    let (mut numbers, mut damage) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(io("list"))? {
        let entry = entry.map_err(io("list"))?;
        let name = entry.file_name();
        if [disk::TEMPORARY, rewrite::TEMPORARY, rewrite::TEMPORARY_SOURCES].iter().any(|made| name == *made)
        {
            files::remove(&entry.path()).map_err(io("clean"))?;
        }
        numbers.extend(name.to_str().and_then(format::segment_number));
    }
    numbers.sort_unstable();
    for number in numbers {
        let Some(segment) = read_header(dir, number)? else {
            damage.push(Damaged {
                place: Place { segment: number, offset: 0, len: 0 },
                what: "the header of the segment cannot be read".to_owned(),
                is_new: false,
                is_whole: true,
            });
            continue;
        };
        let (header, rewritten) = (segment.header, number & format::REWRITTEN != 0);
        if let Some(Segment { header: last, .. }) = segments.last()
            && (last.store_id != header.store_id || !rewritten && last.first_lsn > header.first_lsn)
        {
            return Err(corrupt(number, 0, "the segment is of another store".to_owned()));
        }
        segments.push(segment);
    }
    // Behind the last segment that can be read, nobody knows what was lost.
    let last =
        segments.iter().rev().map(|segment| segment.header.number).find(|n| n & format::REWRITTEN == 0);
    for damaged in &mut damage {
        let number = damaged.place.segment;
        damaged.is_new = number & format::REWRITTEN == 0 && last.is_none_or(|last| number > last);
    }
    Ok((segments, damage))
}

/// `None` if it is damaged.
fn read_header(dir: &Path, number: u64) -> Result<Option<Segment>, OpenError> {
    let path = dir.join(format::segment_name(number));
    let mut raw = [0; SegmentHeader::LEN];
    let read = File::open(&path).and_then(|file| {
        let bytes = file.metadata()?.len();
        match file.read_exact_at(&mut raw, 0) {
            Err(error) if !is_damage(&error) => Err(error),
            _ => Ok(bytes),
        }
    });
    let bytes = read.map_err(|source| OpenError::Io { doing: "read", path: path.clone(), source })?;
    match SegmentHeader::decode(&raw) {
        Ok(header) if header.number == number => Ok(Some(Segment { header, bytes })),
        Err(HeaderError::Format(found)) => Err(OpenError::Format { path, found, known: FORMAT }),
        Ok(_) | Err(HeaderError::Damaged) => Ok(None),
    }
}

/// Whether an error of reading says that the bytes are lost; reading again would not bring them back.
pub(crate) fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), InvalidData | UnexpectedEof | NotFound | FileTooLarge)
        || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
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

    /// Goes to the first whole group behind a damaged one that proves that the damaged one had been synced; false
    /// if there is none. In a segment with a follower, which starts at `below`, every group below that is proof.
    fn find_later(&mut self, below: Option<Lsn>) -> Result<bool, OpenError> {
        let next = self.next_lsn;
        // No more groups than fit; keeps payloads from being taken for headers.
        let most = next + self.size / GroupHeader::LEN as u64;
        let later = next + 1..=below.map_or(most, |below| most.min(below - 1));
        let mut offset = self.next_data(self.offset);
        while offset < self.size {
            let page = (self.size - offset).min(PAGE);
            if self.is_zero(offset, page)? {
                offset = self.next_data(offset + page);
                continue;
            }
            for offset in (offset..offset + page).step_by(8) {
                if let Some((group, _)) = self.group_at(offset, later.clone())?
                    && (below.is_some() || group.write_start().is_some_and(|start| start > next))
                {
                    (self.offset, self.next_lsn) = (offset, group.lsn);
                    return Ok(true);
                }
            }
            offset += page;
        }
        Ok(false)
    }

    /// Whether nothing but zeros stands behind the last valid group.
    fn is_clean(&mut self) -> Result<bool, OpenError> {
        let mut offset = self.next_data(self.offset);
        while offset < self.size {
            let page = (self.size - offset).min(PAGE);
            if !self.is_zero(offset, page)? {
                return Ok(false);
            }
            offset = self.next_data(offset + page);
        }
        Ok(true)
    }

    fn is_zero(&mut self, offset: u64, len: u64) -> Result<bool, OpenError> {
        Ok(self.get(offset, len as usize)?.is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0)))
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
