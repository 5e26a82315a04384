//! One client's connection: moves bytes between a socket and a [`Session`], and events between it and the
//! broker.
//!
//! It works in turns. A turn does a bounded amount of everything that can be done without waiting, so neither
//! a flood from the client nor one from the core starves the other direction. Only when a turn got nowhere
//! does the task wait, in one `select!` whose arms are all cancel safe and take nothing.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    net::SocketAddr,
    ops::ControlFlow,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::TcpStream,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Config,
    egress::SLICES_MAX,
    session::{Login, Session},
};
use crate::{Handle, Outbox, Stopped, core::event::Output};

/// What the read buffer of a client begins with. Between messages it holds nothing.
const READ_MIN: usize = 2 << 10;
/// What it grows to, by doubling, while reads fill it; a larger message makes it larger as its bytes arrive.
const READ_BUSY: usize = 64 << 10;
/// Time for the last words of a connection.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// After the last words, what the client had sent already is read for so long and dropped: closing on unread
/// bytes would reset the connection, and the client would not learn the reason.
const LINGER: Duration = Duration::from_secs(1);

/// A client, from its first byte to its last.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    config: Arc<Config>,
    broker: Handle,
    outbox: Outbox,
    session: Session,
    input: Input,
    inbox: VecDeque<Output>,
    /// Since when the client has taken nothing of what waits for it.
    stalled: Option<Instant>,
    closing: Option<Instant>,
}

/// How a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the client closed it")]
    Client,
    #[error("the client was told why")]
    Told,
    #[error("the client did not read")]
    Stalled,
    #[error("the process stops")]
    Stopping,
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
}

impl From<Stopped> for End {
    fn from(_: Stopped) -> Self {
        Self::Stopping
    }
}

impl Connection {
    /// A connection that was just accepted.
    pub(super) fn new(stream: TcpStream, peer: SocketAddr, config: Arc<Config>, broker: Handle) -> Self {
        let (id, outbox) = broker.open_session();
        let session = Session::new(Arc::clone(&config), id, peer, Instant::now());
        let (input, inbox) = (Input::default(), VecDeque::new());
        Self { stream, config, broker, outbox, session, input, inbox, stalled: None, closing: None }
    }

    /// Serves the client until one side has enough.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let end = self.serve(&stop).await;
        tracing::debug!(session = self.outbox.session().0, %end, "client disconnected");
        match end {
            End::Told => self.part().await,
            End::Stalled => {
                self.config.counters.slow_consumers.fetch_add(1, Ordering::Relaxed);
            }
            End::Client | End::Stopping | End::Io(_) => {}
        }
        if let Some(closed) = self.session.closed()
            && self.broker.send(closed, 0).await.is_err()
        {
            tracing::trace!("the broker stopped before it heard of a closed client");
        }
    }

    async fn serve(&mut self, stop: &CancellationToken) -> End {
        let mut stopped = pin!(stop.cancelled());
        let mut timer = pin!(tokio::time::sleep_until(self.session.deadline()));
        loop {
            match self.turn().await {
                ControlFlow::Break(end) => return end,
                ControlFlow::Continue(true) => {
                    tokio::task::coop::consume_budget().await;
                    if stop.is_cancelled() {
                        return End::Stopping;
                    }
                    continue;
                }
                ControlFlow::Continue(false) => {}
            }
            self.shrink();
            let deadline = self.deadline();
            if timer.deadline() != deadline {
                timer.as_mut().reset(deadline);
            }
            let readiness = match (self.session.wants_input(), self.session.egress().is_empty()) {
                (true, true) => Interest::READABLE,
                (true, false) => Interest::READABLE | Interest::WRITABLE,
                (false, _) => Interest::WRITABLE,
            };
            tokio::select! {
                biased;
                () = &mut stopped => return End::Stopping,
                () = self.outbox.recv(&mut self.inbox), if self.inbox.is_empty() => {}
                ready = self.stream.ready(readiness) => if let Err(error) = ready {
                    return End::Io(error);
                },
                () = &mut timer => if let ControlFlow::Break(end) = self.on_deadline() {
                    return end;
                },
            }
        }
    }

    /// Does what can be done now; true if that was anything.
    async fn turn(&mut self) -> ControlFlow<End, bool> {
        let mut read = None;
        if self.session.wants_input() && self.input.bytes().len() < self.session.needed() {
            read = match self.input.fill(&self.stream, self.session.needed()) {
                Ok(read) => read,
                Err(error) => return ControlFlow::Break(End::Io(error)),
            };
        }
        let used = self.session.receive(self.input.bytes());
        self.input.consume(used);
        if let Some(login) = self.session.take_login() {
            self.admit(login).await;
        }
        let events = self.session.take_events();
        let mut progress = read.is_some() || used > 0 || !events.is_empty();
        for (event, bytes) in events {
            if let Err(stopped) = self.broker.send(event, bytes).await {
                return ControlFlow::Break(stopped.into());
            }
        }
        self.outbox.try_recv(&mut self.inbox);
        let waiting = self.inbox.len();
        self.session.send(&mut self.inbox);
        progress |= self.inbox.len() < waiting;
        match self.write() {
            Ok(written) => progress |= written > 0,
            Err(error) => return ControlFlow::Break(End::Io(error)),
        }
        if self.session.is_closing() && self.session.egress().is_empty() {
            return ControlFlow::Break(End::Told);
        }
        if read == Some(0) {
            return ControlFlow::Break(End::Client);
        }
        ControlFlow::Continue(progress)
    }

    async fn admit(&mut self, login: Login) {
        let password = login.password.as_deref().map(str::as_bytes);
        let check = self.config.auth.admit(login.user.as_deref(), password);
        // A check that takes too long is as good as a wrong password.
        let principal = tokio::time::timeout_at(self.session.deadline(), check).await.unwrap_or(None);
        self.session.admit(principal);
    }

    /// Writes until everything is written or the socket takes no more.
    fn write(&mut self) -> io::Result<usize> {
        let mut total = 0;
        while !self.session.egress().is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let filled = self.session.egress().slices(&mut slices);
            match self.stream.try_write_vectored(&slices[..filled]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    self.session.written(written);
                    total += written;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if total > 0 || self.session.egress().is_empty() {
            self.stalled = None;
        }
        Ok(total)
    }

    /// The next moment at which something is to be done whatever the client does.
    fn deadline(&mut self) -> Instant {
        let now = Instant::now();
        if self.session.is_closing() {
            return *self.closing.get_or_insert(now) + FLUSH_TIMEOUT;
        }
        if self.session.egress().is_empty() {
            return self.session.deadline();
        }
        let stalled = *self.stalled.get_or_insert(now);
        self.session.deadline().min(stalled + self.config.write_timeout)
    }

    fn on_deadline(&mut self) -> ControlFlow<End> {
        let now = Instant::now();
        if self.closing.is_some_and(|since| now >= since + FLUSH_TIMEOUT) {
            return ControlFlow::Break(End::Told);
        }
        if self.stalled.is_some_and(|since| now >= since + self.config.write_timeout) {
            return ControlFlow::Break(End::Stalled);
        }
        self.session.tick(now);
        ControlFlow::Continue(())
    }

    fn shrink(&mut self) {
        self.input.shrink();
        self.session.shrink();
        if self.inbox.is_empty() {
            self.inbox = VecDeque::new();
        }
    }

    /// Closes so that the client can read to the end.
    async fn part(&mut self) {
        let stream = &mut self.stream;
        let parting = async {
            stream.shutdown().await?;
            let mut rest = [0; 512];
            while stream.read(&mut rest).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(LINGER, parting).await {
            tracing::trace!(%error, "client gone before it could be told everything");
        }
    }
}

/// Bytes received and not yet understood.
#[derive(Debug)]
struct Input {
    buffer: BytesMut,
    /// What one read asks for.
    size: usize,
}

impl Default for Input {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), size: READ_MIN }
    }
}

impl Input {
    fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    fn consume(&mut self, bytes: usize) {
        self.buffer.advance(bytes);
    }

    /// Reads what is there. `None`: nothing. `Some(0)`: the client has closed.
    ///
    /// Memory follows what the client has sent, not what it announced: the buffer at most doubles.
    fn fill(&mut self, stream: &TcpStream, needed: usize) -> io::Result<Option<usize>> {
        let held = self.buffer.len();
        self.buffer.reserve(needed.saturating_sub(held).min(held).max(self.size));
        let room = self.buffer.capacity() - held;
        match stream.try_read_buf(&mut self.buffer) {
            Ok(read) => {
                if read == room {
                    self.size = (self.size * 2).min(READ_BUSY);
                }
                Ok(Some(read))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn shrink(&mut self) {
        if self.buffer.is_empty() {
            *self = Self::default();
        }
    }
}
