//! What one message of a multiplexed connection says: `u8 lane | u8 flags | body`.
//!
//! | flags | body | |
//! |---|---|---|
//! | none, `LAST`, `FIN`, `LAST + FIN` | at most [`BODY_MAX`] bytes | bytes of the lane; `LAST` ends a batch, `FIN` the lane |
//! | `RESET` | `u32` code | the sender gives the lane up; what was not read is void |
//! | `STOP` | `u32` code | the receiver reads no more: the sender resets |
//! | `CREDIT` | `u32` bytes | the receiver takes this much more |
//! | `ENDED` | nothing | the receiver has the end of the lane; its number is free again |
//!
//! The first two go with the lane, the others against it. Anything else is a protocol error: what may be
//! said is agreed by the version in the path of the upgrade, so there is nothing to skip.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// Most bytes of a lane in one fragment.
pub(in crate::link) const BODY_MAX: usize = 16 << 10;
/// Lane and flags.
pub(in crate::link) const HEADER: usize = 2;

const LAST: u8 = 1;
const FIN: u8 = 2;
const RESET: u8 = 4;
const STOP: u8 = 8;
const CREDIT: u8 = 16;
const ENDED: u8 = 32;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fragment {
    pub(super) lane: u8,
    pub(super) says: Says,
}

/// What it says of its lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Says {
    Data { body: Bytes, last: bool, fin: bool },
    Reset(u32),
    Stop(u32),
    Credit(u32),
    Ended,
}

impl Fragment {
    /// Reads a message; allocates nothing.
    pub(super) fn parse(mut message: Bytes) -> Result<Self, &'static str> {
        if message.len() < HEADER {
            return Err("a fragment without its header");
        }
        let (lane, flags) = (message.get_u8(), message.get_u8());
        if message.len() > BODY_MAX {
            return Err("a fragment that is too long");
        }
        let number = || match <[u8; 4]>::try_from(&message[..]) {
            Ok(bytes) => Ok(u32::from_le_bytes(bytes)),
            Err(_len) => Err("a fragment with a body that is not its number"),
        };
        let says = match flags {
            0 | LAST | FIN | 3 => {
                let (last, fin) = (flags & LAST != 0, flags & FIN != 0);
                if message.is_empty() && !fin {
                    return Err("a fragment of nothing");
                }
                Says::Data { body: message, last, fin }
            }
            RESET => Says::Reset(number()?),
            STOP => Says::Stop(number()?),
            CREDIT => Says::Credit(number()?),
            ENDED if message.is_empty() => Says::Ended,
            ENDED => return Err("a fragment with a body that it should not have"),
            _ => return Err("a fragment with unknown flags"),
        };
        Ok(Self { lane, says })
    }

    /// The message.
    pub(super) fn encode(&self) -> Bytes {
        let mut message = BytesMut::with_capacity(HEADER + self.body_len());
        message.put_u8(self.lane);
        match &self.says {
            Says::Data { body, last, fin } => {
                message.put_u8(if *last { LAST } else { 0 } | if *fin { FIN } else { 0 });
                message.put_slice(body);
            }
            Says::Reset(code) => put_number(&mut message, RESET, *code),
            Says::Stop(code) => put_number(&mut message, STOP, *code),
            Says::Credit(bytes) => put_number(&mut message, CREDIT, *bytes),
            Says::Ended => message.put_u8(ENDED),
        }
        message.freeze()
    }

    fn body_len(&self) -> usize {
        match &self.says {
            Says::Data { body, .. } => body.len(),
            Says::Ended => 0,
            Says::Reset(_) | Says::Stop(_) | Says::Credit(_) => 4,
        }
    }
}

fn put_number(message: &mut BytesMut, flag: u8, number: u32) {
    message.put_u8(flag);
    message.put_u32_le(number);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fragment_reads_back_as_it_was_written() {
        let body = Bytes::from_static(b"some");
        let all = [
            Says::Data { body: body.clone(), last: false, fin: false },
            Says::Data { body: body.clone(), last: true, fin: false },
            Says::Data { body, last: true, fin: true },
            Says::Data { body: Bytes::new(), last: false, fin: true },
            Says::Reset(7),
            Says::Stop(u32::MAX),
            Says::Credit(0),
            Says::Ended,
        ];
        for says in all {
            let fragment = Fragment { lane: 9, says };
            assert_eq!(Fragment::parse(fragment.encode()), Ok(fragment));
        }
    }

    #[test]
    fn whatever_has_no_meaning_is_refused() {
        let long = [&[1, 0][..], &[0; BODY_MAX + 1]].concat();
        let wrong: [&[u8]; 9] = [
            b"",
            b"\x01",
            b"\x01\x00",
            b"\x01\x01",
            b"\x01\x40x",
            b"\x01\x05abcd",
            b"\x01\x04abc",
            b"\x01\x20x",
            &long,
        ];
        for wrong in wrong {
            Fragment::parse(Bytes::copy_from_slice(wrong)).unwrap_err();
        }
    }
}
