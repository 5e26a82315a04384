//! Bytes of segment and group headers. The layout stands in the [module above](super).

use bytes::{Buf, BufMut};

use crate::core::event::{Group, Lsn};

/// Format number of this version's journal and checkpoint.
pub(crate) const FORMAT: u32 = 1;

const MAGIC: [u8; 8] = *b"octojrnl";

/// The first bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    pub(crate) store_id: [u8; 16],
    pub(crate) number: u64,
    pub(crate) first_lsn: Lsn,
    pub(crate) salt: u64,
}

/// Why bytes are not the header of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    Format(u32),
    Damaged,
}

impl SegmentHeader {
    pub(crate) const LEN: usize = 64;

    pub(crate) fn encode(&self) -> [u8; Self::LEN] {
        let mut raw = [0u8; Self::LEN];
        let mut out = &mut raw[..];
        out.put_slice(&MAGIC);
        out.put_u32_le(FORMAT);
        out.put_u32_le(0);
        out.put_slice(&self.store_id);
        out.put_u64_le(self.number);
        out.put_u64_le(self.first_lsn);
        out.put_u64_le(self.salt);
        out.put_u32_le(0);
        let crc = crc32c::crc32c(&raw[..Self::LEN - 4]);
        raw[Self::LEN - 4..].copy_from_slice(&crc.to_le_bytes());
        raw
    }

    /// The format number is looked at before the crc: another version may have another layout.
    pub(crate) fn decode(raw: &[u8; Self::LEN]) -> Result<Self, HeaderError> {
        let mut input = &raw[..];
        let mut magic = [0; 8];
        input.copy_to_slice(&mut magic);
        let format = input.get_u32_le();
        if magic != MAGIC {
            return Err(HeaderError::Damaged);
        }
        if format != FORMAT {
            return Err(HeaderError::Format(format));
        }
        input.advance(4);
        let mut store_id = [0; 16];
        input.copy_to_slice(&mut store_id);
        let header = Self {
            store_id,
            number: input.get_u64_le(),
            first_lsn: input.get_u64_le(),
            salt: input.get_u64_le(),
        };
        if header.encode() == *raw { Ok(header) } else { Err(HeaderError::Damaged) }
    }
}

/// In front of a group's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupHeader {
    pub(crate) lsn: Lsn,
    /// Bytes of the records, without padding.
    pub(crate) len: u32,
    pub(crate) count: u32,
    pub(crate) crc: u32,
    /// Groups in front of this one in the same write.
    pub(crate) ahead: u32,
}

impl GroupHeader {
    pub(crate) const LEN: usize = 24;

    pub(crate) fn encode(&self) -> [u8; Self::LEN] {
        let mut raw = [0u8; Self::LEN];
        let mut out = &mut raw[..];
        out.put_u64_le(self.lsn);
        out.put_u32_le(self.len);
        out.put_u32_le(self.count);
        out.put_u32_le(self.crc);
        out.put_u32_le(self.ahead);
        raw
    }

    pub(crate) fn decode(mut raw: &[u8]) -> Self {
        Self {
            lsn: raw.get_u64_le(),
            len: raw.get_u32_le(),
            count: raw.get_u32_le(),
            crc: raw.get_u32_le(),
            ahead: raw.get_u32_le(),
        }
    }

    /// crc of salt and header, to be continued over the records.
    pub(crate) fn crc_seed(&self, salt: u64) -> u32 {
        let mut raw = [0u8; 28];
        let mut out = &mut raw[..];
        out.put_u64_le(salt);
        out.put_u64_le(self.lsn);
        out.put_u32_le(self.len);
        out.put_u32_le(self.count);
        out.put_u32_le(self.ahead);
        crc32c::crc32c(&raw)
    }

    /// Header, records and padding.
    pub(crate) fn total_len(&self) -> u64 {
        let len = u64::from(self.len);
        Self::LEN as u64 + len + padding(len) as u64
    }

    /// Lsn of the first group of the write that this group was part of: all below it had been synced.
    /// `None`: not a header that this journal writes.
    pub(crate) fn write_start(&self) -> Option<Lsn> {
        self.lsn.checked_sub(u64::from(self.ahead)).filter(|start| *start > 0)
    }
}

pub(crate) fn padding(len: u64) -> usize {
    (len.wrapping_neg() & 7) as usize
}

pub(crate) fn records_len(group: &Group) -> u64 {
    group.records.iter().map(|record| record.wire_len() as u64).sum()
}

/// Bytes of a group on disk.
pub(crate) fn group_len(group: &Group) -> u64 {
    let len = records_len(group);
    GroupHeader::LEN as u64 + len + padding(len) as u64
}

/// Segments that were rewritten count in a number space of their own: the one with this bit.
pub(crate) const REWRITTEN: u64 = 1 << 63;

/// The rewritten segment that holds the declared sources, for when the checkpoint is lost: what they were declared in
/// is long freed by then.
pub(crate) const SOURCES: u64 = REWRITTEN;

/// File name of a segment.
pub(crate) fn segment_name(number: u64) -> String {
    match number & REWRITTEN {
        0 => format!("{number:016x}.seg"),
        _ => format!("{REWRITTEN_PREFIX}{:016x}.seg", number & !REWRITTEN),
    }
}

/// Number of the segment with this file name.
pub(crate) fn segment_number(name: &str) -> Option<u64> {
    let (space, name) = match name.strip_prefix(REWRITTEN_PREFIX) {
        Some(name) => (REWRITTEN, name),
        None => (0, name),
    };
    let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 16)?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    (number & REWRITTEN == 0).then_some(number | space)
}

const REWRITTEN_PREFIX: &str = "old-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_two_number_spaces_apart() {
        for number in [1, 0xff, 1 | REWRITTEN] {
            assert_eq!(segment_number(&segment_name(number)), Some(number));
        }
        assert_eq!(segment_name(3 | REWRITTEN), "old-0000000000000003.seg");
        for other in ["8000000000000001.seg", "old-8000000000000001.seg", "1.seg", "old.tmp", "next.tmp"] {
            assert_eq!(segment_number(other), None, "{other}");
        }
    }
}
