//! What stands in front of every payload of a run, so that each message can be told from every other.

use broker::clock;
use bytes::{BufMut as _, Bytes, BytesMut};
use codec::{FrameParts, FrameView};

/// Topic of what nodes publish.
pub const UP: &str = "loadtest/up";
/// Topic of what nodes are sent.
pub const DOWN: &str = "loadtest/down";
/// Topic at which nodes answer what they are sent.
pub const ACK: &str = "loadtest/ack";

/// A message's place in its run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Which run.
    pub run: u64,
    /// Which node it is from or for.
    pub node: u32,
    /// Counts the messages of that node, from 0.
    pub number: u32,
    /// Wall time of its sending, microseconds.
    pub time_us: u64,
}

/// Bytes of a mark, and so of the smallest payload.
pub const LEN: usize = 24;

impl Mark {
    /// Of now.
    #[must_use]
    pub fn now(run: u64, node: u32, number: u32) -> Self {
        Self { run, node, number, time_us: clock::wall_us() }
    }

    /// A payload of this size that begins with the mark. The rest does not compress.
    #[must_use]
    pub fn payload(&self, size: usize) -> Bytes {
        let mut out = BytesMut::with_capacity(size.max(LEN));
        out.put_u64_le(self.run);
        out.put_u32_le(self.node);
        out.put_u32_le(self.number);
        out.put_u64_le(self.time_us);
        // xorshift64*: what sensors send compresses better.
        let mut state = self.time_us ^ (u64::from(self.node) << 32) ^ u64::from(self.number) | 1;
        while out.len() < size {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let word = state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes();
            out.put_slice(&word[..(size - out.len()).min(8)]);
        }
        out.freeze()
    }

    /// The mark of a payload, if it is of this run.
    #[must_use]
    pub fn of(payload: &[u8], run: u64) -> Option<Self> {
        let bytes: &[u8; LEN] = payload.first_chunk()?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let mark = Self { run: word(0), node: half(8), number: half(12), time_us: word(16) };
        (mark.run == run).then_some(mark)
    }

    /// The mark of a frame's payload, if it is of this run.
    #[must_use]
    pub fn of_frame(frame: &[u8], run: u64) -> Option<Self> {
        Self::of(FrameView::parse(frame).ok()?.payload(), run)
    }

    /// A frame with this mark.
    #[must_use]
    pub fn frame(&self, topic: &str, size: usize) -> Bytes {
        let payload = self.payload(size);
        let parts = FrameParts {
            topic,
            time_us: self.time_us,
            time_trusted: true,
            payload: &payload,
            ..FrameParts::default()
        };
        parts.encode()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_back_in_its_own_run_only() {
        let mark = Mark::now(7, 3, 11);
        for size in [0, LEN, 33, 4096] {
            let payload = mark.payload(size);
            assert_eq!(payload.len(), size.max(LEN));
            assert_eq!(Mark::of(&payload, 7), Some(mark));
            assert_eq!(Mark::of(&payload, 8), None);
            assert_eq!(Mark::of_frame(&mark.frame(UP, size), 7), Some(mark));
        }
        assert_eq!(Mark::of(&[0; LEN - 1], 0), None);
    }
}
