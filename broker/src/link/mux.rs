//! Many lanes over one ordered, reliable connection of messages: what QUIC has by itself and a WebSocket
//! has not.
//!
//! [`state`] decides; this file gives its lanes hands that tasks can hold. The connection's own task takes
//! what is to be sent from [`Mux::next_message`] and hands what came to [`Mux::receive`].

mod fragment;
mod state;
#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use codec::Class;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    Broken, ByteStream, CloseCode, Closed, LaneSender,
    stream::{ReadSide, StreamCode, WriteSide},
};
pub(super) use fragment::{BODY_MAX, HEADER};
use state::{Ended, LaneId, State};

/// The lanes of one connection. Cloning shares them.
#[derive(Clone)]
pub(super) struct Mux {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// The connection's task has to look again.
    changed: Notify,
    closed: watch::Sender<bool>,
}

/// What the connection's task is to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    Fragment(Bytes),
    Ping([u8; 8]),
}

impl Mux {
    pub(super) fn new(dialler: bool) -> Self {
        let shared = Shared {
            state: Mutex::new(State::new(dialler, Instant::now())),
            changed: Notify::new(),
            closed: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Takes a message of the peer.
    ///
    /// # Errors
    /// The peer is at fault.
    pub(super) fn receive(&self, message: Bytes) -> Result<(), &'static str> {
        self.with(|state| state.receive(message))
    }

    /// The answer to a ping.
    pub(super) fn on_pong(&self, payload: &[u8]) {
        self.with(|state| state.on_pong(Instant::now(), payload));
    }

    /// The next message that may be sent now.
    pub(super) fn next_message(&self) -> Option<Message> {
        let mut state = self.lock();
        if let Some(ping) = state.ping_due(Instant::now()) {
            return Some(Message::Ping(ping));
        }
        state.next_fragment().map(Message::Fragment)
    }

    /// Bytes that may wait in the socket's buffers.
    pub(super) fn unsent_max(&self) -> usize {
        self.lock().fragment_max()
    }

    /// Returns when there may be something to send, or the connection is closed. Cancel safe.
    pub(super) async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// The connection has ended, or is to end.
    pub(super) fn close(&self, why: Closed) {
        self.with(|state| state.close(why));
        self.shared.closed.send_replace(true);
    }

    pub(super) fn is_closed(&self) -> Option<Closed> {
        self.lock().closed().cloned()
    }

    /// Why the connection ended, once it has. Cancel safe.
    pub(super) async fn closed(&self) -> Closed {
        let mut closed = self.shared.closed.subscribe();
        // The sender lives as long as `self`.
        drop(closed.wait_for(|closed| *closed).await);
        self.is_closed().unwrap_or(Closed::ByUs)
    }

    pub(super) fn rtt(&self) -> Duration {
        self.lock().rtt()
    }

    pub(super) async fn control(&self) -> Result<(Sender, Receiver), Broken> {
        let (out, incoming) = self.poll(State::poll_control).await?;
        Ok((self.sender(out), self.receiver(incoming)))
    }

    pub(super) async fn open(&self, class: Class) -> Result<Sender, Broken> {
        let id = self.poll(|state, cx| state.poll_open(cx, class)).await?;
        Ok(self.sender(id))
    }

    pub(super) async fn accept(&self) -> Result<Receiver, Broken> {
        let id = self.poll(State::poll_accept).await?;
        Ok(self.receiver(id))
    }

    pub(super) async fn open_stream(&self, class: Class) -> Result<ByteStream, Broken> {
        let (reading, writing) = self.poll(|state, cx| state.poll_open_stream(cx, class)).await?;
        Ok(ByteStream::new(self.receiver(reading), StreamWriter(self.sender(writing))))
    }

    pub(super) async fn accept_stream(&self) -> Result<ByteStream, Broken> {
        let (reading, writing) = self.poll(State::poll_accept_stream).await?;
        Ok(ByteStream::new(self.receiver(reading), StreamWriter(self.sender(writing))))
    }

    async fn poll<T>(
        &self,
        mut ask: impl FnMut(&mut State, &Context<'_>) -> Poll<Result<T, Ended>>,
    ) -> Result<T, Broken> {
        std::future::poll_fn(|cx| self.with(|state| ask(state, cx))).await.map_err(|_ended| Broken)
    }

    fn sender(&self, id: LaneId) -> Sender {
        Sender { mux: self.clone(), id, finished: false }
    }

    fn receiver(&self, id: LaneId) -> Receiver {
        Receiver { mux: self.clone(), id, ended: false }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let done = act(&mut state);
        let kick = state.take_kick();
        drop(state);
        if kick {
            self.shared.changed.notify_one();
        }
        done
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().expect("no panic under this lock")
    }
}

impl fmt::Debug for Mux {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mux").field("closed", &self.is_closed()).finish_non_exhaustive()
    }
}

/// The sending direction of a lane. Dropped unfinished, it is reset.
#[derive(Debug)]
pub struct Sender {
    mux: Mux,
    id: LaneId,
    finished: bool,
}

impl LaneSender for Sender {
    async fn write(&mut self, buffers: Vec<Bytes>) -> Result<(), Broken> {
        let id = self.id;
        self.mux.poll(|state, cx| state.poll_room(cx, id)).await?;
        self.mux.with(|state| {
            let end = buffers.len().saturating_sub(1);
            for (at, bytes) in buffers.into_iter().enumerate() {
                state.push(id, bytes, at == end);
            }
        });
        Ok(())
    }

    async fn finish(mut self) -> Result<(), Broken> {
        let id = self.id;
        self.finished = true;
        self.mux.with(|state| state.fin(id));
        self.mux.poll(|state, cx| state.poll_ended(cx, id)).await
    }
}

/// The sending direction of a Stream.
struct StreamWriter(Sender);

impl AsyncWrite for StreamWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Sender { mux, id, finished } = &self.0;
        if *finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let id = *id;
        mux.with(|state| {
            ready!(state.poll_room(cx, id)).map_err(failed)?;
            let part = &buf[..buf.len().min(BODY_MAX)];
            state.push(id, Bytes::copy_from_slice(part), true);
            Poll::Ready(Ok(part.len()))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let id = self.0.id;
        self.0.finished = true;
        self.0.mux.with(|state| state.fin(id));
        Poll::Ready(Ok(()))
    }
}

impl WriteSide for StreamWriter {
    fn reset(&mut self, code: StreamCode) {
        let id = self.0.id;
        self.0.finished = true;
        self.0.mux.with(|state| state.reset(id, code.0));
    }

    fn set_class(&mut self, class: Class) {
        let id = self.0.id;
        self.0.mux.with(|state| state.set_class(id, class));
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.finished {
            let id = self.id;
            self.mux.with(|state| state.reset(id, CloseCode::DONE.0));
        }
    }
}

/// The receiving direction of a lane. Dropped before its end, the peer is asked to stop.
#[derive(Debug)]
pub struct Receiver {
    mux: Mux,
    id: LaneId,
    ended: bool,
}

impl AsyncRead for Receiver {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let (id, before) = (self.id, buf.filled().len());
        let read = ready!(self.mux.with(|state| state.poll_read(cx, id, buf)));
        self.ended = read.is_ok() && buf.filled().len() == before;
        Poll::Ready(read.map_err(failed))
    }
}

impl ReadSide for Receiver {
    fn stop(&mut self, code: StreamCode) {
        let id = self.id;
        self.ended = true;
        self.mux.with(|state| state.stop(id, code.0));
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let id = self.id;
        self.mux.with(|state| state.stop(id, CloseCode::DONE.0));
    }
}

fn failed(ended: Ended) -> io::Error {
    match ended {
        Ended::Reset(code) => StreamCode(code).into(),
        Ended::Broken => io::ErrorKind::ConnectionReset.into(),
    }
}

/// Drives both ends of a connection with what a fuzzer made up: messages of a peer, and what the own side
/// does meanwhile. No panic, and no more memory than windows.
pub fn fuzz(input: &[u8]) {
    let mux = Mux::new(input.first().is_some_and(|byte| byte % 2 == 1));
    let mut rest = input.get(1..).unwrap_or_default();
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let (mut receivers, mut streams) = (Vec::new(), Vec::new());
    while let Some((&len, after)) = rest.split_first() {
        let (message, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        if mux.receive(Bytes::copy_from_slice(message)).is_err() {
            break;
        }
        if let Poll::Ready(Ok(id)) = mux.with(|state| state.poll_accept(&cx)) {
            receivers.push(mux.receiver(id));
        }
        if let Poll::Ready(Ok((reading, writing))) = mux.with(|state| state.poll_accept_stream(&cx)) {
            streams.push((mux.receiver(reading), StreamWriter(mux.sender(writing))));
        }
        let mut buffer = [0; 64];
        for receiver in receivers.iter_mut().chain(streams.iter_mut().map(|(receiver, _)| receiver)) {
            let read = Pin::new(receiver).poll_read(&mut cx, &mut ReadBuf::new(&mut buffer));
            drop(read);
        }
        if len % 7 == 0 {
            drop(streams.pop());
        }
        while mux.next_message().is_some() {}
    }
}
