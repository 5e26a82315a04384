//! Reading protobuf's wire format, to the letter of what prost accepts.
//!
//! A [`Reader`] never reads past its slice, so a nested message is read by a reader of its own bytes. prost
//! instead reads on into the enclosing message and compares lengths afterwards; both refuse the same inputs.

/// The protobuf encoding is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field reaches beyond the end.
    #[error("protobuf field is cut short")]
    Truncated,
    /// A varint is cut short or does not fit 64 bits.
    #[error("protobuf varint is malformed")]
    Varint,
    /// Field number 0, a wire type that does not exist, or a key beyond 32 bits.
    #[error("protobuf field key is malformed")]
    Key,
    /// A known field has another wire type than the schema says.
    #[error("protobuf field has the wrong wire type")]
    WireType,
    /// A group ends that was not opened, or another one than the innermost.
    #[error("protobuf group is not closed as it was opened")]
    Group,
    /// Groups are nested deeper than any reader follows.
    #[error("protobuf groups are nested too deeply")]
    Depth,
}

/// How a field's value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum WireType {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    StartGroup = 3,
    EndGroup = 4,
    Fixed32 = 5,
}

/// A position in an encoded message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
}

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn new(raw: &'a [u8]) -> Self {
        Self { rest: raw, len: raw.len() }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Bytes read so far.
    #[inline]
    pub(crate) fn position(&self) -> usize {
        self.len - self.rest.len()
    }

    /// The next field's key: its number and wire type as [`key`] puts them together. Callers compare it with
    /// the keys they know; whether any other is possible at all is found by [`Self::skip`].
    #[inline]
    pub(crate) fn key(&mut self) -> Result<u32, WireError> {
        u32::try_from(self.varint()?).map_err(|_| WireError::Key)
    }

    #[inline]
    pub(crate) fn fixed64(&mut self) -> Result<u64, WireError> {
        let (value, rest) = self.rest.split_first_chunk().ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(u64::from_le_bytes(*value))
    }

    /// Skips the value of a field whose key the caller does not know. Field numbers up to `known` have one right
    /// wire type, so here they have a wrong one. `depth` more groups may open, itself included.
    #[cold]
    pub(crate) fn skip(&mut self, key: u32, known: u32, depth: u32) -> Result<(), WireError> {
        let (number, wire) = split_key(key)?;
        if number <= known { Err(WireError::WireType) } else { self.skip_value(number, wire, depth) }
    }

    fn skip_value(&mut self, number: u32, wire: WireType, depth: u32) -> Result<(), WireError> {
        if depth == 0 {
            return Err(WireError::Depth);
        }
        match wire {
            WireType::Varint => self.varint().map(drop),
            WireType::Fixed64 => self.take(8).map(drop),
            WireType::Fixed32 => self.take(4).map(drop),
            WireType::Bytes => self.bytes().map(drop),
            WireType::StartGroup => self.skip_group(number, depth - 1),
            WireType::EndGroup => Err(WireError::Group),
        }
    }

    fn skip_group(&mut self, opened: u32, depth: u32) -> Result<(), WireError> {
        loop {
            let (number, wire) = split_key(self.key()?)?;
            if wire == WireType::EndGroup {
                return if number == opened { Ok(()) } else { Err(WireError::Group) };
            }
            self.skip_value(number, wire, depth)?;
        }
    }

    #[inline]
    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let len = self.varint()?;
        self.take(usize::try_from(len).map_err(|_| WireError::Truncated)?)
    }

    #[inline]
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u64, WireError> {
        match *self.rest {
            [low, ref rest @ ..] if low < 0x80 => {
                self.rest = rest;
                Ok(u64::from(low))
            }
            [low, high, ref rest @ ..] if high < 0x80 => {
                self.rest = rest;
                Ok(u64::from(low & 0x7f) | u64::from(high) << 7)
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0;
        for (at, &byte) in self.rest.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                self.rest = &self.rest[at + 1..];
                // The tenth byte holds the 64th bit alone.
                return if at == 9 && byte > 1 { Err(WireError::Varint) } else { Ok(value) };
            }
        }
        Err(WireError::Varint)
    }
}

/// A field's key.
pub(crate) const fn key(number: u32, wire: WireType) -> u32 {
    number << 3 | wire as u32
}

fn split_key(key: u32) -> Result<(u32, WireType), WireError> {
    let wire = match key & 7 {
        0 => WireType::Varint,
        1 => WireType::Fixed64,
        2 => WireType::Bytes,
        3 => WireType::StartGroup,
        4 => WireType::EndGroup,
        5 => WireType::Fixed32,
        _ => return Err(WireError::Key),
    };
    if key >> 3 == 0 { Err(WireError::Key) } else { Ok((key >> 3, wire)) }
}

/// Bytes that a varint takes.
pub(crate) fn varint_len(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_varint_of_more_than_64_bits_is_refused() {
        let mut raw = [0xff; 10];
        raw[9] = 1;
        assert_eq!(Reader::new(&raw).varint(), Ok(u64::MAX));
        raw[9] = 2;
        assert_eq!(Reader::new(&raw).varint(), Err(WireError::Varint));
        assert_eq!(Reader::new(&[0x80]).varint(), Err(WireError::Varint));
        assert_eq!(Reader::new(&[]).varint(), Err(WireError::Varint));
    }

    #[test]
    fn varint_len_grows_every_seven_bits() {
        for (value, len) in [(0, 1), (127, 1), (128, 2), (1 << 14, 3), (u64::MAX >> 1, 9), (u64::MAX, 10)] {
            assert_eq!(varint_len(value), len, "{value}");
        }
    }

    #[test]
    fn groups_are_followed_to_the_depth_given_and_no_further() {
        let nested = |depth: usize| [vec![0x43; depth], vec![0x44; depth]].concat();
        let skip = |raw: &[u8], depth| {
            let mut reader = Reader::new(raw);
            let key = reader.key()?;
            reader.skip(key, 7, depth)
        };
        assert_eq!(skip(&nested(5), 5), Ok(()));
        assert_eq!(skip(&nested(6), 5), Err(WireError::Depth));
        assert_eq!(skip(&[0x43, 0x4c], 5), Err(WireError::Group));
        assert_eq!(skip(&[0x44], 5), Err(WireError::Group));
    }

    #[test]
    fn keys_that_no_field_can_have_are_refused() {
        for raw in [&[0x46][..], &[0x47], &[0x00], &[0x07]] {
            let mut reader = Reader::new(raw);
            assert_eq!(reader.key().and_then(|key| reader.skip(key, 7, 5)), Err(WireError::Key));
        }
        assert_eq!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x1f]).key(), Err(WireError::Key));
        let mut reader = Reader::new(&[0x08]);
        assert_eq!(reader.key().and_then(|key| reader.skip(key, 7, 5)), Err(WireError::WireType));
    }
}
