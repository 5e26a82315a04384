//! Bytes on their way to the socket: small ones gathered, large payloads shared with everybody else who gets
//! them, all of it written by as few vectored writes as the socket allows.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::AsyncWrite;

/// From this size on a payload is not copied into the gathered bytes.
const SHARE_BYTES_MIN: usize = 2 << 10;
/// Gathered bytes that an idle connection keeps room for.
const IDLE_BYTES: usize = 512;
/// Buffers of one write.
const SLICES: usize = 32;

/// An output queue. Its bound is its user's: see `DELIVER_BELOW` and `READ_BELOW` in the connection.
#[derive(Debug, Default)]
pub(super) struct Writer {
    gathered: Vec<u8>,
    /// How much of `gathered` is written.
    position: usize,
    /// Payloads and where in `gathered` they belong, ascending.
    shared: VecDeque<(usize, Bytes)>,
    shared_bytes: usize,
    unflushed: bool,
}

impl Writer {
    /// Bytes that are not written yet.
    pub(super) fn len(&self) -> usize {
        self.gathered.len() - self.position + self.shared_bytes
    }

    /// Of these, the gathered ones: heads, small payloads, answers.
    pub(super) fn gathered_len(&self) -> usize {
        self.gathered.len() - self.position
    }

    /// True if there is nothing to write and nothing to flush.
    pub(super) fn is_idle(&self) -> bool {
        self.len() == 0 && !self.unflushed
    }

    /// Where small things are appended.
    pub(super) fn gather(&mut self) -> &mut Vec<u8> {
        &mut self.gathered
    }

    /// Appends a payload: `part` of `whole`, without copying if that pays.
    pub(super) fn payload(&mut self, whole: &Bytes, part: &[u8]) {
        if part.len() < SHARE_BYTES_MIN {
            self.gathered.extend_from_slice(part);
        } else {
            self.shared_bytes += part.len();
            self.shared.push_back((self.gathered.len(), whole.slice_ref(part)));
        }
    }

    /// Writes what the socket takes in one call, or flushes if all is written. `Ready` with the number of
    /// written bytes; nothing is lost if the future around it is dropped.
    pub(super) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.len() == 0 {
            ready!(Pin::new(&mut *stream).poll_flush(context))?;
            self.unflushed = false;
            return Poll::Ready(Ok(0));
        }
        let mut slices = [IoSlice::new(&[]); SLICES];
        let count = self.fill(&mut slices);
        let written = ready!(Pin::new(&mut *stream).poll_write_vectored(context, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        self.unflushed = self.len() > 0 || !Pin::new(stream).poll_flush(context)?.is_ready();
        Poll::Ready(Ok(written))
    }

    fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut count = 0;
        let mut position = self.position;
        let mut push = |bytes: &'a [u8]| {
            if count < SLICES && !bytes.is_empty() {
                slices[count] = IoSlice::new(bytes);
                count += 1;
            }
            count < SLICES
        };
        for (at, payload) in &self.shared {
            let more = push(&self.gathered[position..*at]) && push(payload);
            if !more {
                return SLICES;
            }
            position = *at;
        }
        push(&self.gathered[position..]);
        count
    }

    fn advance(&mut self, mut written: usize) {
        while written > 0 {
            let next_shared = self.shared.front().map_or(self.gathered.len(), |(at, _payload)| *at);
            let step = written.min(next_shared - self.position);
            self.position += step;
            written -= step;
            let Some((at, payload)) = self.shared.front_mut() else { break };
            if self.position < *at {
                break;
            }
            let step = written.min(payload.len());
            bytes::Buf::advance(payload, step);
            self.shared_bytes -= step;
            written -= step;
            if payload.is_empty() {
                self.shared.pop_front();
            }
        }
        debug_assert_eq!(written, 0, "a stream cannot write more than it was given");
        if self.len() == 0 {
            self.position = 0;
            self.gathered.clear();
            if self.gathered.capacity() > IDLE_BYTES {
                self.gathered = Vec::new();
                self.shared = VecDeque::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes `step` bytes of each write.
    struct Trickle {
        step: usize,
        got: Vec<u8>,
    }

    impl AsyncWrite for Trickle {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _context: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let len = bytes.len().min(self.step);
            self.got.extend_from_slice(&bytes[..len]);
            Poll::Ready(Ok(len))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _context: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let len = all.len().min(self.step);
            self.got.extend_from_slice(&all[..len]);
            Poll::Ready(Ok(len))
        }

        fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    proptest! {
        #[test]
        fn bytes_leave_in_order_whatever_the_socket_takes(
            parts in prop::collection::vec((any::<bool>(), 0..6000_usize), 0..60),
            step in 1..20_000_usize,
        ) {
            let mut writer = Writer::default();
            let mut expected = Vec::new();
            for (number, (small, len)) in parts.into_iter().enumerate() {
                let bytes = Bytes::from(vec![number as u8; len]);
                expected.extend_from_slice(&bytes);
                if small { writer.gather().extend_from_slice(&bytes) } else { writer.payload(&bytes, &bytes) }
            }
            prop_assert_eq!(writer.len(), expected.len());
            let mut stream = Trickle { step, got: Vec::new() };
            let mut context = Context::from_waker(std::task::Waker::noop());
            while !writer.is_idle() {
                prop_assert!(writer.poll_write(&mut stream, &mut context).is_ready());
            }
            prop_assert_eq!(stream.got, expected);
            prop_assert!(writer.gathered.capacity() <= IDLE_BYTES, "an idle writer holds little");
        }
    }
}
