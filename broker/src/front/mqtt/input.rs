//! The read buffer: small while the client is idle, large while it sends much, never larger than what has
//! arrived justifies.

use std::{
    future::Future,
    io,
    pin::pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Room that an idle connection keeps for its next packet.
const IDLE_BYTES: usize = 1 << 10;
/// Room for a read after one that filled its buffer.
const BUSY_BYTES: usize = 32 << 10;

/// Received bytes that are not yet packets.
#[derive(Debug, Default)]
pub(super) struct Input {
    buffer: Vec<u8>,
    /// Bytes at the beginning that were used.
    used: usize,
    /// Bytes that the packet at the beginning needs in all, as far as known.
    need: usize,
    busy: bool,
}

impl Input {
    /// What was received and not used.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Marks bytes as used; what follows needs `need` bytes to be a packet.
    pub(super) fn consume(&mut self, bytes: usize, need: usize) {
        self.used += bytes;
        debug_assert!(self.used <= self.buffer.len());
        self.need = need;
    }

    /// Reads what is there, once. 0: the peer sends no more. Cancel safe.
    pub(super) fn poll_read<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.make_room();
        let room = self.buffer.capacity() - self.buffer.len();
        let result = pin!(stream.read_buf(&mut self.buffer)).poll(context);
        match &result {
            Poll::Ready(Ok(read)) => self.busy = *read >= room,
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.settle(),
        }
        result
    }

    /// Makes room for a read. A claimed length is believed only in proportion to the bytes that came.
    fn make_room(&mut self) {
        if self.used > 0 {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        let have = self.buffer.len();
        let wanted = if self.busy { BUSY_BYTES } else { IDLE_BYTES };
        let missing = self.need.saturating_sub(have).min(have.max(BUSY_BYTES));
        let missing = if have == 0 { wanted } else { missing.max(wanted) };
        if self.buffer.capacity() - have < missing.min(wanted) || self.buffer.capacity() == have {
            self.buffer.reserve_exact(missing);
        }
    }

    /// Nothing more is there: gives back room that an idle client does not need.
    fn settle(&mut self) {
        self.busy = false;
        let keep = (2 * self.buffer.len()).max(IDLE_BYTES);
        if self.buffer.capacity() > keep {
            self.buffer.shrink_to(keep);
        }
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn read(input: &mut Input, stream: &mut &[u8]) -> usize {
        let mut context = Context::from_waker(Waker::noop());
        match input.poll_read(stream, &mut context) {
            Poll::Ready(Ok(read)) => read,
            other => panic!("{other:?}"),
        }
    }

    /// A stream that has nothing.
    struct Silent;

    impl AsyncRead for Silent {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _context: &mut Context<'_>,
            _buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    fn wait(input: &mut Input) {
        let mut context = Context::from_waker(Waker::noop());
        assert!(input.poll_read(&mut Silent, &mut context).is_pending());
    }

    #[test]
    fn a_claimed_length_allocates_nothing_before_bytes_come() {
        let mut input = Input::default();
        read(&mut input, &mut [0x30, 0xff, 0xff, 0x3f].as_slice());
        input.consume(0, 1 << 20);
        wait(&mut input);
        assert!(input.capacity() <= IDLE_BYTES, "{}", input.capacity());
        let mut grown = 4;
        while grown < 1 << 20 {
            grown += read(&mut input, &mut vec![7; 4096].as_slice());
            input.consume(0, 1 << 20);
            assert!(input.capacity() <= 2 * grown.max(BUSY_BYTES) + BUSY_BYTES, "{grown}");
        }
    }

    #[test]
    fn the_buffer_shrinks_when_the_client_pauses() {
        let mut input = Input::default();
        let much = vec![1; 200_000];
        let mut stream = much.as_slice();
        while !stream.is_empty() {
            read(&mut input, &mut stream);
            input.consume(input.bytes().len(), 2);
        }
        wait(&mut input);
        assert!(input.capacity() <= IDLE_BYTES, "{}", input.capacity());
    }

    #[test]
    fn bytes_are_neither_lost_nor_doubled_whatever_is_consumed() {
        let sent: Vec<u8> = (0..100_000_u32).map(|at| (at % 251) as u8).collect();
        let (mut input, mut stream, mut got) = (Input::default(), sent.as_slice(), Vec::new());
        for step in 1.. {
            if !stream.is_empty() {
                read(&mut input, &mut stream);
            }
            let take = input.bytes().len().min(step * 37);
            got.extend_from_slice(&input.bytes()[..take]);
            input.consume(take, 2);
            if stream.is_empty() && input.bytes().is_empty() {
                break;
            }
            if step % 5 == 0 {
                wait(&mut input);
            }
        }
        assert_eq!(got, sent);
    }
}
