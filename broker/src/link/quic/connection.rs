//! One connection: the protocol's state, who waits for it, and the handles by which links use it.
//!
//! A connection has no task, no timer, no queue and no buffer of its own: its port's worker
//! ([`port`](super::port)) has one of each for all. An operation locks the connection alone, and tells the worker
//! when there is something to send.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use quinn_proto::{
    ConnectionError, ConnectionHandle, Dir, ReadError, StreamEvent, StreamId, TransportError,
    TransportErrorCode, VarInt, WriteError,
};
use rustls_pki_types::CertificateDer;
use tokio::io::ReadBuf;

use super::port::{Shared, now};

/// A connection in its port's table and in its handles.
pub(super) struct Cell {
    port: Arc<Shared>,
    /// Handles; the last one closes the connection.
    users: AtomicUsize,
    state: Mutex<State>,
}

/// Under the connection's lock.
pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    key: ConnectionHandle,
    /// The worker will look at it.
    pub(super) queued: bool,
    connected: bool,
    /// The worker has forgotten it.
    detached: bool,
    ended: Option<Box<ConnectionError>>,
    waiting: Vec<(Interest, Waker)>,
}

/// What somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interest {
    Connected,
    Closed,
    Opened(Dir),
    Room(Dir),
    Readable(StreamId),
    Writable(StreamId),
    Stopped(StreamId),
}

/// Above this many waiters all are woken and ask anew: some have given up and not said so.
const WAITING_MAX: usize = 96;

impl Cell {
    /// Of a connection that has just begun, with its first handle.
    pub(super) fn new(
        port: Arc<Shared>,
        key: ConnectionHandle,
        proto: quinn_proto::Connection,
    ) -> (Arc<Self>, Connection) {
        let state = State {
            proto,
            key,
            queued: false,
            connected: false,
            detached: false,
            ended: None,
            waiting: Vec::new(),
        };
        let cell = Arc::new(Self { port, users: AtomicUsize::new(1), state: Mutex::new(state) });
        let connection = Connection(Arc::clone(&cell));
        (cell, connection)
    }

    /// Also after a panic: then the worker has gone, and all that is asked is how things ended.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks for an operation of a user.
    fn with<R>(&self, operation: impl FnOnce(&mut State) -> R) -> R {
        operation(&mut self.lock())
    }

    /// There is something to send.
    fn queue(&self, state: &mut State) {
        if !state.queued && !state.detached {
            state.queued = true;
            self.port.queue(state.key);
        }
    }

    fn close(&self, code: VarInt, reason: Bytes) {
        let mut woken = Vec::new();
        self.with(|state| {
            if state.ended.is_none() {
                state.close(code, reason, &mut woken);
                self.queue(state);
            }
        });
        woken.into_iter().for_each(Waker::wake);
    }
}

impl State {
    /// Tells those who wait for what has happened; `woken` are called without the lock.
    pub(super) fn forward(&mut self, woken: &mut Vec<Waker>) {
        while let Some(event) = self.proto.poll() {
            use quinn_proto::Event;
            match event {
                Event::Connected => {
                    self.connected = true;
                    self.wake(Interest::Connected, woken);
                }
                Event::ConnectionLost { reason } => self.end(reason, woken),
                Event::Stream(StreamEvent::Opened { dir }) => self.wake(Interest::Opened(dir), woken),
                Event::Stream(StreamEvent::Available { dir }) => self.wake(Interest::Room(dir), woken),
                Event::Stream(StreamEvent::Readable { id }) => self.wake(Interest::Readable(id), woken),
                Event::Stream(StreamEvent::Writable { id }) => self.wake(Interest::Writable(id), woken),
                Event::Stream(StreamEvent::Finished { id }) => self.wake(Interest::Stopped(id), woken),
                Event::Stream(StreamEvent::Stopped { id, .. }) => {
                    self.wake(Interest::Stopped(id), woken);
                    self.wake(Interest::Writable(id), woken);
                }
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {}
            }
        }
    }

    pub(super) fn close(&mut self, code: VarInt, reason: Bytes, woken: &mut Vec<Waker>) {
        self.proto.close(now(), code, reason);
        self.end(ConnectionError::LocallyClosed, woken);
    }

    /// The worker forgets it.
    pub(super) fn detach(&mut self, woken: &mut Vec<Waker>) {
        self.detached = true;
        if self.ended.is_none() {
            self.end(ConnectionError::LocallyClosed, woken);
        }
    }

    /// The worker is gone, and with it the socket.
    pub(super) fn abandon(&mut self, woken: &mut Vec<Waker>) {
        self.detached = true;
        if self.ended.is_none() {
            let gone = TransportError {
                code: TransportErrorCode::INTERNAL_ERROR,
                frame: None,
                reason: "the port is gone".into(),
            };
            self.end(gone.into(), woken);
        }
    }

    fn end(&mut self, reason: ConnectionError, woken: &mut Vec<Waker>) {
        self.ended.get_or_insert_with(|| Box::new(reason));
        woken.extend(std::mem::take(&mut self.waiting).into_iter().map(|(_, waker)| waker));
    }

    fn wake(&mut self, interest: Interest, woken: &mut Vec<Waker>) {
        let matching = self.waiting.extract_if(.., |(waiting, _)| *waiting == interest);
        woken.extend(matching.map(|(_, waker)| waker));
    }

    fn wait(&mut self, interest: Interest, cx: &Context<'_>) {
        let same = |(other, waker): &(Interest, Waker)| *other == interest && waker.will_wake(cx.waker());
        if self.waiting.iter().any(same) {
            return;
        }
        if self.waiting.len() >= WAITING_MAX {
            self.waiting.drain(..).for_each(|(_, waker)| waker.wake());
        }
        self.waiting.reserve_exact(1);
        self.waiting.push((interest, cx.waker().clone()));
    }

    fn forget(&mut self, interest: Interest) {
        self.waiting.retain(|(waiting, _)| *waiting != interest);
    }

    fn lost(&self) -> Option<ConnectionError> {
        self.ended.as_deref().cloned()
    }
}

/// A handle of a connection. When the last is dropped, streams' included, the connection is closed.
pub(super) struct Connection(Arc<Cell>);

impl Clone for Connection {
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.close(VarInt::from_u32(0), Bytes::new());
        }
    }
}

impl Connection {
    /// Completes with the handshake.
    pub(super) fn poll_connected(&self, cx: &Context<'_>) -> Poll<Result<(), ConnectionError>> {
        self.0.with(|state| match state.lost() {
            Some(error) => Poll::Ready(Err(error)),
            None if state.connected => Poll::Ready(Ok(())),
            None => {
                state.wait(Interest::Connected, cx);
                Poll::Pending
            }
        })
    }

    /// The certificates that the peer has shown.
    pub(super) fn peer_chain(&self) -> Option<Vec<CertificateDer<'static>>> {
        let identity = self.0.with(|state| state.proto.crypto_session().peer_identity())?;
        identity.downcast().ok().map(|chain| *chain)
    }

    pub(super) fn remote(&self) -> std::net::SocketAddr {
        self.0.with(|state| state.proto.remote_address())
    }

    pub(super) fn stats(&self) -> quinn_proto::ConnectionStats {
        self.0.with(|state| state.proto.stats())
    }

    pub(super) fn close(&self, code: VarInt, reason: &[u8]) {
        self.0.close(code, Bytes::copy_from_slice(reason));
    }

    pub(super) fn poll_closed(&self, cx: &Context<'_>) -> Poll<ConnectionError> {
        self.0.with(|state| match state.lost() {
            Some(error) => Poll::Ready(error),
            None => {
                state.wait(Interest::Closed, cx);
                Poll::Pending
            }
        })
    }

    pub(super) fn poll_open(&self, dir: Dir, cx: &Context<'_>) -> Poll<Result<StreamId, ConnectionError>> {
        self.0.with(|state| {
            if let Some(error) = state.lost() {
                return Poll::Ready(Err(error));
            }
            match state.proto.streams().open(dir) {
                Some(id) => Poll::Ready(Ok(id)),
                None => {
                    state.wait(Interest::Room(dir), cx);
                    Poll::Pending
                }
            }
        })
    }

    /// What the peer opened before the connection ended is still accepted.
    pub(super) fn poll_accept(&self, dir: Dir, cx: &Context<'_>) -> Poll<Result<StreamId, ConnectionError>> {
        self.0.with(|state| {
            if let Some(id) = state.proto.streams().accept(dir) {
                // The peer may open another in its place.
                self.0.queue(state);
                return Poll::Ready(Ok(id));
            }
            if let Some(error) = state.lost() {
                return Poll::Ready(Err(error));
            }
            state.wait(Interest::Opened(dir), cx);
            Poll::Pending
        })
    }

    pub(super) fn permit_streams(&self, count: u32) {
        self.0.with(|state| {
            state.proto.set_max_concurrent_streams(Dir::Bi, VarInt::from_u32(count));
            self.0.queue(state);
        });
    }

    pub(super) fn sender(&self, id: StreamId) -> SendStream {
        SendStream { connection: self.clone(), id }
    }

    pub(super) fn receiver(&self, id: StreamId) -> RecvStream {
        RecvStream { connection: self.clone(), id, ended: None }
    }
}

/// The sending side of a stream. Dropping it does nothing to the stream.
pub(super) struct SendStream {
    connection: Connection,
    id: StreamId,
}

impl SendStream {
    /// Hands over as much as there is room for; what was taken is gone from `buffers`.
    pub(super) fn poll_write(
        &mut self,
        buffers: &mut [Bytes],
        cx: &Context<'_>,
    ) -> Poll<Result<quinn_proto::Written, StreamError>> {
        self.poll_send(cx, |stream| stream.write_chunks(buffers))
    }

    fn poll_send<R>(
        &mut self,
        cx: &Context<'_>,
        write: impl FnOnce(&mut quinn_proto::SendStream<'_>) -> Result<R, WriteError>,
    ) -> Poll<Result<R, StreamError>> {
        let cell = &self.connection.0;
        cell.with(|state| {
            if state.ended.is_some() {
                return Poll::Ready(Err(StreamError::Lost));
            }
            match write(&mut state.proto.send_stream(self.id)) {
                Ok(written) => {
                    cell.queue(state);
                    Poll::Ready(Ok(written))
                }
                Err(WriteError::Blocked) => {
                    state.wait(Interest::Writable(self.id), cx);
                    Poll::Pending
                }
                Err(WriteError::Stopped(code)) => Poll::Ready(Err(StreamError::Ended(code))),
                Err(WriteError::ClosedStream) => Poll::Ready(Err(StreamError::Lost)),
            }
        })
    }

    /// As [`poll_write`](Self::poll_write), copying; how much was taken.
    pub(super) fn poll_write_slice(
        &mut self,
        bytes: &[u8],
        cx: &Context<'_>,
    ) -> Poll<Result<usize, StreamError>> {
        self.poll_send(cx, |stream| stream.write(bytes))
    }

    /// Nothing follows.
    pub(super) fn finish(&mut self) -> Result<(), StreamError> {
        let cell = &self.connection.0;
        cell.with(|state| match state.proto.send_stream(self.id).finish() {
            Ok(()) => {
                cell.queue(state);
                Ok(())
            }
            // Whoever wants to know asks `poll_stopped`.
            Err(quinn_proto::FinishError::Stopped(_)) => Ok(()),
            Err(quinn_proto::FinishError::ClosedStream) => Err(StreamError::Lost),
        })
    }

    /// Completes when the peer has all of a finished stream (`None`), or wants no more of it.
    pub(super) fn poll_stopped(&self, cx: &Context<'_>) -> Poll<Result<Option<VarInt>, StreamError>> {
        self.connection.0.with(|state| match state.proto.send_stream(self.id).stopped() {
            Err(_closed) => Poll::Ready(Ok(None)),
            Ok(Some(code)) => Poll::Ready(Ok(Some(code))),
            Ok(None) if state.ended.is_some() => Poll::Ready(Err(StreamError::Lost)),
            Ok(None) => {
                state.wait(Interest::Stopped(self.id), cx);
                Poll::Pending
            }
        })
    }

    /// Gives the stream up. Of a stream that is closed already there is nothing to give up.
    pub(super) fn reset(&mut self, code: VarInt) {
        let cell = &self.connection.0;
        cell.with(|state| {
            if state.proto.send_stream(self.id).reset(code).is_ok() {
                cell.queue(state);
            }
        });
    }

    /// Of a stream that is closed there is nothing to send.
    pub(super) fn set_priority(&self, priority: i32) {
        self.connection.0.with(|state| drop(state.proto.send_stream(self.id).set_priority(priority)));
    }

    pub(super) fn id(&self) -> StreamId {
        self.id
    }
}

/// The receiving side of a stream. Dropped before its end, the peer is told to stop.
pub(super) struct RecvStream {
    connection: Connection,
    id: StreamId,
    ended: Option<RecvEnd>,
}

/// How a stream ended; it is asked no more.
#[derive(Debug, Clone, Copy)]
enum RecvEnd {
    Finished,
    Reset(VarInt),
    Stopped,
}

/// Why a stream gives or takes nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamError {
    /// The peer has ended it.
    Ended(VarInt),
    /// The connection or stream is gone.
    Lost,
}

impl RecvStream {
    /// Reads what has arrived; nothing read and no error is the end.
    pub(super) fn poll_read(
        &mut self,
        buffer: &mut ReadBuf<'_>,
        cx: &Context<'_>,
    ) -> Poll<Result<(), StreamError>> {
        match self.ended {
            Some(RecvEnd::Finished) => return Poll::Ready(Ok(())),
            Some(RecvEnd::Reset(code)) => return Poll::Ready(Err(StreamError::Ended(code))),
            Some(RecvEnd::Stopped) => return Poll::Ready(Err(StreamError::Lost)),
            None => {}
        }
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let cell = &self.connection.0;
        let mut state = cell.lock();
        let before = buffer.filled().len();
        let mut stream = state.proto.recv_stream(self.id);
        let Ok(mut chunks) = stream.read(true) else { return Poll::Ready(Err(StreamError::Lost)) };
        let blocked = loop {
            if buffer.remaining() == 0 {
                break false;
            }
            match chunks.next(buffer.remaining()) {
                Ok(Some(chunk)) => buffer.put_slice(&chunk.bytes),
                Ok(None) => {
                    self.ended = Some(RecvEnd::Finished);
                    break false;
                }
                Err(ReadError::Blocked) => break true,
                Err(ReadError::Reset(code)) => {
                    self.ended = Some(RecvEnd::Reset(code));
                    break false;
                }
            }
        };
        if chunks.finalize().should_transmit() {
            cell.queue(&mut state);
        }
        match self.ended {
            _ if buffer.filled().len() > before => Poll::Ready(Ok(())),
            Some(RecvEnd::Reset(code)) => Poll::Ready(Err(StreamError::Ended(code))),
            _ if !blocked => Poll::Ready(Ok(())),
            _ if state.ended.is_some() => Poll::Ready(Err(StreamError::Lost)),
            _ => {
                state.wait(Interest::Readable(self.id), cx);
                Poll::Pending
            }
        }
    }

    pub(super) fn id(&self) -> StreamId {
        self.id
    }

    /// Reads no more; the peer's writes fail with the code.
    pub(super) fn stop(&mut self, code: VarInt) {
        if self.ended.is_some() {
            return;
        }
        self.ended = Some(RecvEnd::Stopped);
        let cell = &self.connection.0;
        let mut state = cell.lock();
        state.forget(Interest::Readable(self.id));
        if state.ended.is_none() && state.proto.recv_stream(self.id).stop(code).is_ok() {
            cell.queue(&mut state);
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop(VarInt::from_u32(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nearly all of it is quinn-proto's `Connection`: three packet spaces of 0.8 KB, of which two are over
    /// with the handshake, two paths, counters of every frame, a random generator.
    #[test]
    fn a_connection_is_little_more_than_the_protocol_s_state() {
        let proto = size_of::<quinn_proto::Connection>();
        assert!(size_of::<Cell>() < proto + 128, "{} for {proto}", size_of::<Cell>());
        assert!(
            size_of::<Connection>() <= 8 && size_of::<SendStream>() <= 16 && size_of::<RecvStream>() <= 32
        );
    }
}
