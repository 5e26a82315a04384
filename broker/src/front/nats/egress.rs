//! What waits to be written to one client.
//!
//! Protocol lines and small payloads are gathered in one buffer; larger payloads stay where they are
//! and are written from there, many messages in one vectored write.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Payloads up to this size are copied between the protocol lines: cheaper than two more elements in
/// the vector of a write.
const INLINE_MAX: usize = 512;
/// Elements of one vectored write; Linux takes at most 1024.
pub(super) const SLICES_MAX: usize = 256;
/// Capacity that an idle connection may keep.
const IDLE_CAPACITY: usize = 1 << 10;

/// Bytes in the order in which the client gets them.
#[derive(Debug, Default)]
pub(super) struct Egress {
    /// Complete pieces.
    sealed: VecDeque<Bytes>,
    /// What follows them and may still grow.
    tail: BytesMut,
    sealed_bytes: usize,
}

impl Egress {
    /// Bytes not written yet.
    pub(super) fn pending(&self) -> usize {
        self.sealed_bytes + self.tail.len()
    }

    /// True if everything was written.
    pub(super) fn is_empty(&self) -> bool {
        self.pending() == 0
    }

    /// Adds protocol text.
    pub(super) fn text(&mut self, text: &[u8]) {
        self.tail.extend_from_slice(text);
    }

    /// Adds a decimal number.
    pub(super) fn decimal(&mut self, number: usize) {
        push_decimal(&mut self.tail, u64::try_from(number).unwrap_or(u64::MAX));
    }

    /// Adds a part of `frame`, which is shared and not copied if it is large.
    pub(super) fn payload(&mut self, frame: &Bytes, payload: &[u8]) {
        if payload.len() <= INLINE_MAX {
            self.tail.extend_from_slice(payload);
            return;
        }
        self.seal();
        self.sealed_bytes += payload.len();
        self.sealed.push_back(frame.slice_ref(payload));
    }

    /// Fills `slices` with what is to be written next; returns how many it filled.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = Some(&self.tail[..]).filter(|tail| !tail.is_empty());
        let pieces = self.sealed.iter().map(|piece| &piece[..]).chain(tail);
        let mut filled = 0;
        for (slot, piece) in slices.iter_mut().zip(pieces) {
            *slot = IoSlice::new(piece);
            filled += 1;
        }
        filled
    }

    /// Forgets the first `written` bytes.
    pub(super) fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.sealed.front_mut() {
            let part = first.len().min(written);
            self.sealed_bytes -= part;
            written -= part;
            if part < first.len() {
                first.advance(part);
                return;
            }
            self.sealed.pop_front();
        }
        self.tail.advance(written);
    }

    /// Gives back memory; for a connection that is about to wait.
    pub(super) fn shrink(&mut self) {
        if !self.is_empty() {
            return;
        }
        if self.tail.capacity() > IDLE_CAPACITY {
            self.tail = BytesMut::new();
        }
        if self.sealed.capacity() > SLICES_MAX {
            self.sealed = VecDeque::new();
        }
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.sealed_bytes += self.tail.len();
            self.sealed.push_back(self.tail.split().freeze());
        }
    }
}

/// Appends a number in decimal.
pub(super) fn push_decimal(out: &mut impl BufMut, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(egress: &mut Egress, step: usize) -> Vec<u8> {
        let mut out = Vec::new();
        while !egress.is_empty() {
            let mut slices = [IoSlice::new(&[]); 4];
            let filled = egress.slices(&mut slices);
            let all: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
            let part = all.len().min(step);
            out.extend_from_slice(&all[..part]);
            egress.advance(part);
        }
        out
    }

    #[test]
    fn bytes_leave_in_order_whatever_a_write_takes() {
        let large = Bytes::from(vec![b'x'; INLINE_MAX + 1]);
        let small = Bytes::from_static(b"small");
        for step in [1, 3, 511, 512, 513, 100_000] {
            let mut egress = Egress::default();
            let mut expected = Vec::new();
            for round in 0..20 {
                egress.text(b"MSG ");
                egress.decimal(round);
                egress.payload(&large, &large[1..]);
                egress.payload(&large, &large);
                egress.payload(&small, &small);
                expected.extend_from_slice(format!("MSG {round}").as_bytes());
                expected.extend_from_slice(&large[1..]);
                expected.extend_from_slice(&large);
                expected.extend_from_slice(&small);
            }
            assert_eq!(egress.pending(), expected.len());
            assert_eq!(drain(&mut egress, step), expected);
        }
    }

    #[test]
    fn a_large_payload_is_not_copied() {
        let frame = Bytes::from(vec![7; 4096]);
        let mut egress = Egress::default();
        egress.payload(&frame, &frame[10..]);
        let mut slices = [IoSlice::new(&[]); 1];
        egress.slices(&mut slices);
        assert_eq!(slices[0].as_ptr(), frame[10..].as_ptr());
    }

    #[test]
    fn an_idle_connection_keeps_little_memory() {
        let mut egress = Egress::default();
        egress.text(&[b'x'; 100_000]);
        egress.advance(100_000);
        egress.shrink();
        assert!(egress.tail.capacity() <= IDLE_CAPACITY);
    }

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 1, 9, 10, 1_048_576, u64::MAX] {
            let mut out = Vec::new();
            push_decimal(&mut out, number);
            assert_eq!(out, number.to_string().into_bytes());
        }
    }
}
