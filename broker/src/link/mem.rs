//! A link in memory, for tests and simulated fleets: two ends, and a [`Network`] between them that can be
//! delayed, silenced and cut.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use codec::Class;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, watch},
    time::{Instant, Sleep, sleep_until},
};

use super::{
    Broken, ByteStream, CloseCode, Closed, LaneSender, Path, Transport,
    stream::{ReadSide, StreamCode, WriteSide},
};

/// Bytes a lane holds that were not read.
pub const LANE_WINDOW: usize = 64 << 10;
/// Lanes that wait to be accepted.
const LANES_WAITING: usize = 16;

/// Two ends of a connection: the dialler's, the acceptor's, and what lies between.
#[must_use]
pub fn pair() -> (MemTransport, MemTransport, Network) {
    let wire = Arc::new(Wire {
        silent: AtomicBool::new(false),
        delay_us: AtomicU64::new(0),
        pipes: Mutex::default(),
        closed: watch::Sender::new(None),
    });
    let (to_acceptor, at_acceptor) = Side::new();
    let (to_dialler, at_dialler) = Side::new();
    let received = [Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0))];
    let end = |own: usize, peer, accepting| MemTransport {
        wire: Arc::clone(&wire),
        side: own,
        received: received.clone(),
        peer: Arc::new(peer),
        accepting: Arc::new(accepting),
    };
    let (dialler, acceptor) = (end(0, to_acceptor, at_dialler), end(1, to_dialler, at_acceptor));
    (dialler, acceptor, Network(wire))
}

/// The way between two ends.
#[derive(Debug, Clone)]
pub struct Network(Arc<Wire>);

impl Network {
    /// From now on everything takes this long.
    pub fn delay(&self, delay: Duration) {
        self.0.delay_us.store(u64::try_from(delay.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Nothing arrives any more, and nobody is told.
    pub fn silence(&self) {
        self.0.silent.store(true, Relaxed);
    }

    /// What was held back arrives.
    pub fn heal(&self) {
        self.0.silent.store(false, Relaxed);
        self.0.wake();
    }

    /// Both ends see the connection lost; bytes on their way are lost too.
    pub fn cut(&self) {
        self.0.end(End::Cut);
    }

    /// Lanes that were opened and not yet ended, both directions of control counted.
    #[must_use]
    pub fn open_lanes(&self) -> usize {
        self.0.live().iter().filter(|pipe| !pipe.state().ended()).count()
    }
}

#[derive(Debug)]
struct Wire {
    silent: AtomicBool,
    delay_us: AtomicU64,
    pipes: Mutex<Vec<Weak<Pipe>>>,
    closed: watch::Sender<Option<End>>,
}

#[derive(Debug, Clone)]
enum End {
    Cut,
    By { side: usize, code: CloseCode, reason: String },
}

impl Wire {
    fn pipe(self: &Arc<Self>) -> Arc<Pipe> {
        let pipe = Arc::new(Pipe { wire: Arc::clone(self), state: Mutex::default() });
        let mut pipes = self.pipes.lock().expect("no panic under this lock");
        pipes.retain(|pipe| pipe.strong_count() > 0);
        pipes.push(Arc::downgrade(&pipe));
        pipe
    }

    fn live(&self) -> Vec<Arc<Pipe>> {
        self.pipes.lock().expect("no panic under this lock").iter().filter_map(Weak::upgrade).collect()
    }

    fn wake(&self) {
        for pipe in self.live() {
            pipe.state().wake();
        }
    }

    fn end(&self, end: End) {
        let first = self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            closed.get_or_insert(end);
            first
        });
        if first {
            self.wake();
        }
    }

    fn is_closed(&self) -> bool {
        self.closed.borrow().is_some()
    }

    fn is_cut(&self) -> bool {
        matches!(*self.closed.borrow(), Some(End::Cut))
    }

    fn arrival(&self) -> Instant {
        Instant::now() + Duration::from_micros(self.delay_us.load(Relaxed))
    }
}

/// One direction of a lane.
#[derive(Debug)]
struct Pipe {
    wire: Arc<Wire>,
    state: Mutex<PipeState>,
}

#[derive(Debug, Default)]
struct PipeState {
    chunks: VecDeque<(Instant, Bytes)>,
    bytes: usize,
    fin: Option<Instant>,
    fin_read: bool,
    /// With the code for a Stream.
    reset: Option<StreamCode>,
    reader_gone: Option<StreamCode>,
    wakers: Vec<Waker>,
}

impl PipeState {
    fn wake(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
    }

    fn ended(&self) -> bool {
        self.fin_read || self.reset.is_some() || self.reader_gone.is_some()
    }

    fn park(&mut self, cx: &Context<'_>) {
        if !self.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.wakers.push(cx.waker().clone());
        }
    }
}

impl Pipe {
    fn reset(&self, code: StreamCode) {
        let mut state = self.state();
        state.reset.get_or_insert(code);
        state.wake();
    }

    fn state(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().expect("no panic under this lock")
    }
}

/// What one end sends the other beside bytes: lanes and pipes it opened.
#[derive(Debug)]
struct Opened {
    control: mpsc::Sender<(MemSender, MemReceiver)>,
    lanes: mpsc::Sender<MemReceiver>,
    streams: mpsc::Sender<ByteStream>,
}

#[derive(Debug)]
struct Side {
    control: tokio::sync::Mutex<mpsc::Receiver<(MemSender, MemReceiver)>>,
    lanes: tokio::sync::Mutex<mpsc::Receiver<MemReceiver>>,
    streams: tokio::sync::Mutex<mpsc::Receiver<ByteStream>>,
}

impl Side {
    fn new() -> (Opened, Self) {
        let (control, control_in) = mpsc::channel(1);
        let (lanes, lanes_in) = mpsc::channel(LANES_WAITING);
        let (streams, streams_in) = mpsc::channel(LANES_WAITING);
        let side = Self { control: control_in.into(), lanes: lanes_in.into(), streams: streams_in.into() };
        (Opened { control, lanes, streams }, side)
    }
}

/// One end of a connection in memory.
#[derive(Debug, Clone)]
pub struct MemTransport {
    wire: Arc<Wire>,
    side: usize,
    received: [Arc<AtomicU64>; 2],
    peer: Arc<Opened>,
    accepting: Arc<Side>,
}

impl MemTransport {
    fn sender(&self, pipe: &Arc<Pipe>, announce: Option<Announce>) -> MemSender {
        let received = self.received.clone();
        MemSender { pipe: Arc::clone(pipe), received, announce, finished: false }
    }

    async fn unless_closed<T>(&self, wanted: impl Future<Output = Option<T>>) -> Result<T, Broken> {
        let mut closed = self.wire.closed.subscribe();
        tokio::select! {
            biased; // what was opened before the end is still accepted
            wanted = wanted => wanted.ok_or(Broken),
            _ = closed.wait_for(Option::is_some) => Err(Broken),
        }
    }
}

impl Transport for MemTransport {
    type Sender = MemSender;
    type Receiver = MemReceiver;
    const NAME: &'static str = "Memory";

    async fn control(&self, dialler: bool) -> Result<(MemSender, MemReceiver), Broken> {
        if !dialler {
            return self.unless_closed(async { self.accepting.control.lock().await.recv().await }).await;
        }
        let (out, back) = (self.wire.pipe(), self.wire.pipe());
        let theirs = (self.sender(&back, None), MemReceiver::new(Arc::clone(&out)));
        let announce = Announce::Control(self.peer.control.clone(), Box::new(theirs));
        Ok((self.sender(&out, Some(announce)), MemReceiver::new(back)))
    }

    async fn open(&self, _class: Class) -> Result<MemSender, Broken> {
        if self.wire.is_closed() {
            return Err(Broken);
        }
        let pipe = self.wire.pipe();
        let announce = Announce::Lane(self.peer.lanes.clone(), MemReceiver::new(Arc::clone(&pipe)));
        Ok(self.sender(&pipe, Some(announce)))
    }

    async fn accept(&self) -> Result<MemReceiver, Broken> {
        self.unless_closed(async { self.accepting.lanes.lock().await.recv().await }).await
    }

    async fn open_stream(&self, _class: Class) -> Result<ByteStream, Broken> {
        if self.wire.is_closed() {
            return Err(Broken);
        }
        let (out, back) = (self.wire.pipe(), self.wire.pipe());
        let end = |read: &Arc<Pipe>, write: &Arc<Pipe>| {
            let writer = MemWriter { pipe: Arc::clone(write), finished: false };
            ByteStream::new(MemReceiver::new(Arc::clone(read)), writer)
        };
        self.peer.streams.try_send(end(&out, &back)).map_err(|_full| Broken)?;
        Ok(end(&back, &out))
    }

    async fn accept_stream(&self) -> Result<ByteStream, Broken> {
        self.unless_closed(async { self.accepting.streams.lock().await.recv().await }).await
    }

    fn close(&self, code: CloseCode, reason: &str) {
        self.wire.end(End::By { side: self.side, code, reason: reason.to_owned() });
    }

    async fn closed(&self) -> Closed {
        let mut closed = self.wire.closed.subscribe();
        let end = closed.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        match end {
            Some(End::By { side, .. }) if side == self.side => Closed::ByUs,
            Some(End::By { code, reason, .. }) => {
                // Who is cut off does not hear of it.
                if self.wire.silent.load(Relaxed) {
                    std::future::pending::<()>().await;
                }
                Closed::ByPeer { code, reason }
            }
            Some(End::Cut) | None => Closed::Lost("cut".into()),
        }
    }

    fn path(&self) -> Path {
        let delay = Duration::from_micros(self.wire.delay_us.load(Relaxed));
        Path { rtt: 2 * delay, received: self.received[self.side].load(Relaxed) }
    }
}

/// A lane becomes visible to the peer with its first bytes.
#[derive(Debug)]
enum Announce {
    Control(mpsc::Sender<(MemSender, MemReceiver)>, Box<(MemSender, MemReceiver)>),
    Lane(mpsc::Sender<MemReceiver>, MemReceiver),
}

/// The sending half of a lane in memory.
#[derive(Debug)]
pub struct MemSender {
    pipe: Arc<Pipe>,
    received: [Arc<AtomicU64>; 2],
    announce: Option<Announce>,
    finished: bool,
}

impl MemSender {
    /// Waits until the pipe is as wanted.
    async fn until(&self, wanted: impl Fn(&PipeState) -> bool) -> Result<(), Broken> {
        std::future::poll_fn(|cx| {
            let mut state = self.pipe.state();
            if state.reset.is_some() || self.pipe.wire.is_closed() {
                return Poll::Ready(Err(Broken));
            }
            if wanted(&state) {
                return Poll::Ready(Ok(()));
            }
            if state.reader_gone.is_some() {
                return Poll::Ready(Err(Broken));
            }
            state.park(cx);
            Poll::Pending
        })
        .await
    }
}

impl LaneSender for MemSender {
    async fn write(&mut self, buffers: Vec<Bytes>) -> Result<(), Broken> {
        match self.announce.take() {
            None => {}
            Some(Announce::Control(to, ends)) => to.send(*ends).await.map_err(|_gone| Broken)?,
            Some(Announce::Lane(to, lane)) => to.send(lane).await.map_err(|_gone| Broken)?,
        }
        for mut buffer in buffers {
            while !buffer.is_empty() {
                self.until(|state| state.bytes < LANE_WINDOW && state.reader_gone.is_none()).await?;
                let mut state = self.pipe.state();
                let chunk = buffer.split_to(buffer.len().min(LANE_WINDOW - state.bytes));
                state.bytes += chunk.len();
                state.chunks.push_back((self.pipe.wire.arrival(), chunk));
                state.wake();
                if !self.pipe.wire.silent.load(Relaxed) {
                    // The datagram, and its acknowledgement.
                    for received in &self.received {
                        received.fetch_add(1, Relaxed);
                    }
                }
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), Broken> {
        self.finished = true;
        {
            let mut state = self.pipe.state();
            state.fin = Some(self.pipe.wire.arrival());
            state.wake();
        }
        self.until(|state| state.fin_read).await
    }
}

impl Drop for MemSender {
    fn drop(&mut self) {
        if !self.finished {
            self.pipe.reset(StreamCode::CANCELLED);
        }
    }
}

/// The sending direction of a Stream in memory.
#[derive(Debug)]
struct MemWriter {
    pipe: Arc<Pipe>,
    finished: bool,
}

impl AsyncWrite for MemWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.pipe.state();
        if let Some(code) = state.reader_gone {
            return Poll::Ready(Err(code.into()));
        }
        if self.finished || self.pipe.wire.is_closed() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let n = buf.len().min(LANE_WINDOW - state.bytes);
        if n == 0 {
            state.park(cx);
            return Poll::Pending;
        }
        state.bytes += n;
        state.chunks.push_back((self.pipe.wire.arrival(), Bytes::copy_from_slice(&buf[..n])));
        state.wake();
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished = true;
        let mut state = self.pipe.state();
        state.fin = Some(self.pipe.wire.arrival());
        state.wake();
        Poll::Ready(Ok(()))
    }
}

impl WriteSide for MemWriter {
    fn reset(&mut self, code: StreamCode) {
        self.finished = true;
        self.pipe.reset(code);
    }

    fn set_class(&mut self, _class: Class) {}
}

impl Drop for MemWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.pipe.reset(StreamCode::CANCELLED);
        }
    }
}

/// The receiving half of a lane in memory.
#[derive(Debug)]
pub struct MemReceiver {
    pipe: Arc<Pipe>,
    arrival: Option<Pin<Box<Sleep>>>,
}

impl MemReceiver {
    fn new(pipe: Arc<Pipe>) -> Self {
        Self { pipe, arrival: None }
    }
}

impl AsyncRead for MemReceiver {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let wire = &this.pipe.wire;
        let mut state = this.pipe.state();
        if wire.is_cut() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let next_at = state.chunks.front().map(|(at, _)| *at).or(state.fin);
        let Some(at) = next_at.filter(|_| !wire.silent.load(Relaxed)) else {
            if !wire.silent.load(Relaxed) {
                if let Some(code) = state.reset {
                    return Poll::Ready(Err(code.into()));
                }
                if wire.is_closed() {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
            }
            state.park(cx);
            return Poll::Pending;
        };
        if at > Instant::now() {
            let arrival = this.arrival.insert(Box::pin(sleep_until(at)));
            if arrival.as_mut().poll(cx).is_pending() {
                state.park(cx);
                return Poll::Pending;
            }
        }
        match state.chunks.front_mut() {
            None => state.fin_read = true,
            Some((_, chunk)) => {
                let taken = chunk.split_to(chunk.len().min(buf.remaining()));
                let spent = chunk.is_empty();
                if spent {
                    state.chunks.pop_front();
                }
                state.bytes -= taken.len();
                buf.put_slice(&taken);
            }
        }
        state.wake();
        Poll::Ready(Ok(()))
    }
}

impl ReadSide for MemReceiver {
    fn stop(&mut self, code: StreamCode) {
        let mut state = self.pipe.state();
        state.reader_gone.get_or_insert(code);
        state.wake();
    }
}

impl Drop for MemReceiver {
    fn drop(&mut self) {
        self.stop(StreamCode::CANCELLED);
    }
}
