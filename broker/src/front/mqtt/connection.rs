//! One connection: one task, from the first byte to the last.
//!
//! ```text
//! connect (10 s) -> admit -> SessionOpened -> [ parse | deliver | wait ]* -> SessionClosed -> flush, linger
//! ```
//!
//! The task waits in one place (`wait`), whose arms only say what happened; the rest is done between waits.
//! Handing events to the broker may wait for room, which is the backpressure towards the client; the broker
//! never waits for a client, so this cannot lock up.

use std::{
    collections::VecDeque, convert::Infallible, future::poll_fn, io, net::SocketAddr, pin::Pin, sync::Arc,
    task::Poll, time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::{Instant, Sleep},
};
use tokio_util::sync::CancellationToken;

use super::{
    Config,
    connect::{CONNECT_BYTES_MAX, Connect, ConnectError, Will},
    counters::Counters,
    encode,
    error::{Cause, PacketError, reason},
    gate::{self, Gate},
    input::Input,
    publish::{Arena, Entered},
    session::{Closing, Limits, Session},
    wire::Version,
    writer::Writer,
};
use crate::{
    clock,
    core::event::{self, Event, Front, Output, Publish, SessionId, SessionOpen, Target},
    front::auth::Principal,
    handle::{Handle, Outbox},
    limits,
};

/// Unwritten bytes from which on deliveries wait in the outbox.
const DELIVER_BELOW: usize = 64 << 10;
/// A client that takes nothing for this long is gone or not worth waiting for.
const WRITE_STALL_MAX: Duration = Duration::from_secs(60);
/// How long the last bytes of a connection may take.
const FLUSH_MAX: Duration = Duration::from_secs(5);
/// How long the peer may take to hang up after that.
const LINGER_MAX: Duration = Duration::from_secs(1);
/// Bytes read and thrown away meanwhile.
const LINGER_BYTES_MAX: usize = 256 << 10;

/// Serves one client to its end. The stream may be anything: TCP, TLS, WebSocket.
///
/// Ends within seconds when `stop` fires. Dropping the future drops the connection without telling the
/// broker; let it end instead.
pub async fn serve_connection<S>(
    stream: S,
    peer: SocketAddr,
    config: Arc<Config>,
    broker: Handle,
    stop: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let counters = Arc::clone(&config.counters);
    Counters::add(&counters.accepted, 1);
    let _open = OpenGauge::new(&counters);
    let mut wire = Wire { stream, input: Input::default(), writer: Writer::default() };
    let accepted = tokio::select! {
        biased;
        () = stop.cancelled() => Err(Closing::new(Cause::Shutdown, None, "the broker stops")),
        accepted = tokio::time::timeout(config.connect_timeout, accept(&mut wire, &config)) => {
            accepted.unwrap_or_else(|_elapsed| {
                Err(Closing::new(Cause::ConnectTimeout, None, "no CONNECT in time"))
            })
        }
    };
    let (client_id, closing) = match accepted {
        Ok(accepted) => {
            let client_id = Arc::clone(&accepted.client_id);
            // Boxed: while strangers are kept waiting, they cost less than clients.
            (Some(client_id), Box::pin(run(&mut wire, accepted, &config, broker, stop)).await)
        }
        Err(closing) => (None, closing),
    };
    log(peer, client_id.as_deref(), &closing);
    counters.count_closed(closing.cause);
    wire.finish(closing.cause, &counters).await;
}

/// Counts a connection as open while it lives.
struct OpenGauge<'a>(&'a Counters);

impl<'a> OpenGauge<'a> {
    fn new(counters: &'a Counters) -> Self {
        Counters::add(&counters.connections, 1);
        Self(counters)
    }
}

impl Drop for OpenGauge<'_> {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

fn log(peer: SocketAddr, client_id: Option<&str>, closing: &Closing) {
    let reason = closing.cause.as_str();
    let detail = closing.detail.as_str();
    match closing.cause {
        Cause::Disconnected | Cause::PeerClosed | Cause::TakenOver | Cause::Shutdown => {
            tracing::debug!(%peer, client_id, reason, detail, "mqtt client left");
        }
        _ => tracing::info!(%peer, client_id, reason, detail, "mqtt client closed"),
    }
}

/// A client that was let in.
struct Accepted {
    version: Version,
    client_id: Arc<str>,
    assigned: bool,
    principal: Principal,
    clean_start: bool,
    expiry_s: u32,
    /// What the client asked for.
    asked_expiry_s: u32,
    receive_max: u16,
    client_packet_max: usize,
    keep_alive: Option<Duration>,
    will: Option<event::Will>,
}

/// Waits for CONNECT and decides about it. A refusal is already written to `wire`'s writer.
async fn accept<S>(wire: &mut Wire<S>, config: &Config) -> Result<Accepted, Closing>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let packet_max = config.packet_max.min(CONNECT_BYTES_MAX);
    let (body, len) = loop {
        match gate::check(wire.input.bytes(), None, packet_max)? {
            Gate::Packet(packet) => break (packet.body.to_vec(), packet.len),
            Gate::Incomplete(need) => wire.input.consume(0, need),
        }
        if wire.read(&config.counters).await? == 0 {
            return Err(Closing::new(Cause::PeerClosed, None, "closed before CONNECT"));
        }
    };
    Counters::add(&config.counters.packets_in, 1);
    wire.input.consume(len, 2);
    let connect = match Connect::parse(&body) {
        Ok(connect) => connect,
        Err(ConnectError { version, error }) => {
            // Whoever speaks another level has understood the old answer to that since 3.1.
            let version = if let PacketError::BadVersion(_) = error { Some(Version::V4) } else { version };
            return Err(wire.refuse(version, error.into()));
        }
    };
    let version = connect.version;
    admit(connect, config).await.map_err(|closing| wire.refuse(Some(version), closing))
}

async fn admit(connect: Connect<'_>, config: &Config) -> Result<Accepted, Closing> {
    let principal = config.auth.admit(connect.username, connect.password).await.ok_or_else(|| {
        let detail = "unknown user or wrong password";
        Closing::new(Cause::BadCredentials, Some(reason::BAD_CREDENTIALS), detail)
    })?;
    let will = connect.will.map(|will| admit_will(&will, &principal, config)).transpose()?;
    let assigned = connect.client_id.is_empty();
    let client_id = if assigned { random_client_id()? } else { connect.client_id.into() };
    Ok(Accepted {
        version: connect.version,
        client_id,
        assigned,
        principal,
        clean_start: connect.clean_start,
        expiry_s: connect.expiry_s.min(config.session_expiry_max),
        asked_expiry_s: connect.expiry_s,
        receive_max: connect.receive_max.min(config.inflight_max),
        client_packet_max: connect.packet_max,
        keep_alive: match connect.keep_alive_s {
            0 => None,
            seconds => Some(Duration::from_millis(u64::from(seconds) * 1500)),
        },
        will,
    })
}

fn admit_will(will: &Will<'_>, principal: &Principal, config: &Config) -> Result<event::Will, Closing> {
    if !principal.permissions.may_publish(will.message.topic) {
        let detail = "may not publish its will";
        return Err(Closing::new(Cause::NotAuthorized, Some(reason::NOT_AUTHORIZED), detail));
    }
    let message = Publish {
        target: Target::Own,
        frame: Arena::default().encode(&will.message, entered(config), 0),
        qos: will.qos,
        packet_id: 0,
        dup: false,
        retain: will.retain,
        reply: None,
    };
    Ok(event::Will { message, delay: Duration::from_secs(will.delay_s.into()) })
}

fn random_client_id() -> Result<Arc<str>, Closing> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| Closing::new(Cause::Io, None, error.to_string()))?;
    Ok(format!("auto-{:032x}", u128::from_ne_bytes(random)).into())
}

fn entered(config: &Config) -> Entered {
    let trusted = config.time_trusted.load(std::sync::atomic::Ordering::Relaxed);
    Entered { time_us: clock::wall_us(), trusted }
}

/// The connection after its CONNECT, until it is to be closed.
async fn run<S>(
    wire: &mut Wire<S>,
    accepted: Accepted,
    config: &Config,
    broker: Handle,
    stop: CancellationToken,
) -> Closing
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (id, outbox) = broker.open_session();
    let (open, session) = open(id, &accepted, config);
    let version = accepted.version;
    let mut connection = Connection {
        wire,
        session,
        outbox,
        outputs: VecDeque::new(),
        broker,
        config,
        deadlines: Deadlines::new(&accepted, config),
        unreported: 0,
    };
    let will_bytes = open.will.as_ref().map_or(0, |will| will.message.frame.len());
    drop(accepted);
    let closing = match connection.tell(Event::SessionOpened(open), will_bytes).await {
        Ok(()) => connection.serve(&stop).await,
        Err(closing) => closing,
    };
    connection.close(version, closing, id).await
}

fn open(id: SessionId, accepted: &Accepted, config: &Config) -> (SessionOpen, Session) {
    // Sessions of one user are out of reach for others, whatever client identifier they choose.
    let owned = |user: &Arc<str>| format!("{user}/{}", accepted.client_id).into();
    let open = SessionOpen {
        session: id,
        front: Front::Mqtt,
        client_id: accepted.principal.name.as_ref().map_or_else(|| Arc::clone(&accepted.client_id), owned),
        clean_start: accepted.clean_start,
        expiry_s: accepted.expiry_s,
        receive_max: accepted.receive_max,
        will: accepted.will.clone(),
    };
    let limits = Limits {
        packet_max: config.packet_max,
        client_packet_max: accepted.client_packet_max,
        receive_max: config.receive_max,
        topic_alias_max: config.topic_alias_max,
        lasting: accepted.expiry_s > 0,
        expiry_max_s: config.session_expiry_max,
        lowered_expiry_s: (accepted.expiry_s < accepted.asked_expiry_s).then_some(accepted.expiry_s),
    };
    let session = Session::new(
        id,
        accepted.version,
        limits,
        Arc::clone(&accepted.principal.permissions),
        Arc::clone(&config.counters),
        accepted.assigned.then(|| Arc::clone(&accepted.client_id)),
    );
    (open, session)
}

struct Connection<'a, S> {
    wire: &'a mut Wire<S>,
    session: Session,
    outbox: Outbox,
    outputs: VecDeque<Output>,
    broker: Handle,
    config: &'a Config,
    deadlines: Deadlines,
    /// Cost of outputs that became packets and were not yet reported.
    unreported: usize,
}

/// What ended a wait.
#[derive(Debug)]
enum Woken {
    Stopping,
    Exchanged(io::Result<Exchanged>),
    Outputs,
    TimeUp,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<'_, S> {
    async fn serve(&mut self, stop: &CancellationToken) -> Closing {
        match self.serve_until_error(stop).await {
            Ok(never) => match never {},
            Err(closing) => closing,
        }
    }

    async fn serve_until_error(&mut self, stop: &CancellationToken) -> Result<Infallible, Closing> {
        let mut timer = std::pin::pin!(tokio::time::sleep_until(self.deadlines.next()));
        loop {
            self.deliver().await?;
            self.receive().await?;
            self.deadlines.on_writer(!self.wire.writer.is_idle());
            match self.wait(stop, timer.as_mut()).await {
                Woken::Stopping => return Err(shutdown()),
                Woken::Outputs => {}
                Woken::TimeUp => self.on_time_up()?,
                Woken::Exchanged(exchanged) => {
                    self.on_exchanged(&exchanged.map_err(|error| io_closing(&error))?)?;
                }
            }
        }
    }

    /// Waits until something happens. Cancel safe, and so are all its arms.
    async fn wait(&mut self, stop: &CancellationToken, mut timer: Pin<&mut Sleep>) -> Woken {
        let due = self.deadlines.next();
        if due < timer.deadline() || timer.is_elapsed() {
            timer.as_mut().reset(due);
        }
        let read = self.session.takes_packets(&self.wire.writer);
        tokio::select! {
            biased;
            () = stop.cancelled() => Woken::Stopping,
            exchanged = self.wire.exchange(read) => Woken::Exchanged(exchanged),
            () = self.outbox.recv(&mut self.outputs) => Woken::Outputs,
            () = timer => Woken::TimeUp,
        }
    }

    /// Turns outputs into packets, as long as the socket keeps up.
    async fn deliver(&mut self) -> Result<(), Closing> {
        self.outbox.try_recv(&mut self.outputs);
        if self.wire.writer.len() >= DELIVER_BELOW {
            // The core bounds what piles up here, and a close is the last that it sends.
            if let Some(Output::Close(reason)) = self.outputs.back() {
                return Err(Session::closing(reason));
            }
            return Ok(());
        }
        let now_us = if self.outputs.is_empty() { 0 } else { clock::wall_us() };
        while self.wire.writer.len() < DELIVER_BELOW
            && let Some(output) = self.outputs.pop_front()
        {
            self.unreported += output.cost();
            self.session.send(output, now_us, &mut self.wire.writer)?;
        }
        self.tell_events(0).await?;
        if self.unreported >= limits::SENT_REPORT_BYTES {
            let sent = Event::Sent { session: self.outbox.session(), bytes: self.unreported };
            self.unreported = 0;
            self.tell(sent, 0).await?;
        }
        Ok(())
    }

    /// Takes the packets that are complete.
    async fn receive(&mut self) -> Result<(), Closing> {
        if self.wire.input.bytes().is_empty() || !self.session.takes_packets(&self.wire.writer) {
            return Ok(());
        }
        let received =
            self.session.receive(self.wire.input.bytes(), entered(self.config), &mut self.wire.writer);
        let consumed = received.as_ref().map_or(0, |received| received.consumed);
        if consumed > 0 {
            self.deadlines.on_packet();
        }
        // Packets before a bad one count.
        self.tell_events(consumed).await?;
        let received = received?;
        self.wire.input.consume(consumed, received.need.unwrap_or(0));
        Ok(())
    }

    fn on_exchanged(&mut self, exchanged: &Exchanged) -> Result<(), Closing> {
        let counters = &self.config.counters;
        if exchanged.written > 0 {
            Counters::add(&counters.bytes_out, exchanged.written);
            self.deadlines.on_written();
        }
        match exchanged.read {
            // Reading happens only after all complete packets were taken: what is left will never be one.
            Some(0) => Err(Closing::new(Cause::PeerClosed, None, "closed without DISCONNECT")),
            read => {
                Counters::add(&counters.bytes_in, read.unwrap_or(0));
                Ok(())
            }
        }
    }

    fn on_time_up(&mut self) -> Result<(), Closing> {
        if self.session.is_open() && !self.session.takes_packets(&self.wire.writer) {
            // The client may well have sent something: it is this side that does not look.
            self.deadlines.on_packet();
        }
        self.deadlines.check(self.session.is_open())
    }

    /// Hands over what packets became. `bytes` is about what they weigh together.
    async fn tell_events(&mut self, bytes: usize) -> Result<(), Closing> {
        for event in self.session.take_events() {
            let weight = match &event {
                Event::Published { messages, .. } => {
                    messages.iter().map(|message| message.frame.len() + PUBLISH_OVERHEAD).sum()
                }
                Event::Acked { acks, .. } => acks.len() * size_of::<event::ClientAck>(),
                _ => bytes,
            };
            self.tell(event, weight).await?;
        }
        Ok(())
    }

    async fn tell(&self, event: Event, bytes: usize) -> Result<(), Closing> {
        self.broker.send(event, bytes).await.map_err(|_stopped| shutdown())
    }

    /// Tells the broker that the connection has ended, and the client why.
    async fn close(self, version: Version, closing: Closing, session: SessionId) -> Closing {
        // The broker may have stopped: then nobody needs to know.
        if let Some(expiry_s) = closing.expiry_s {
            let _stopped = self.broker.send(Event::ExpiryChanged { session, expiry_s }, 0).await;
        }
        let closed = Event::SessionClosed { session, clean: closing.clean };
        let _stopped = self.broker.send(closed, 0).await;
        if self.session.is_open() {
            if let (Version::V5, Some(code)) = (version, closing.code) {
                encode::disconnect(self.wire.writer.gather(), code);
            }
            closing
        } else {
            let code = closing.code.filter(|code| *code != reason::SHUTTING_DOWN);
            let code = code.or(Some(reason::UNAVAILABLE));
            self.wire.refuse(Some(version), Closing { code, ..closing })
        }
    }
}

/// About what a publish takes besides its frame.
const PUBLISH_OVERHEAD: usize = size_of::<Publish>();

fn shutdown() -> Closing {
    Closing::new(Cause::Shutdown, Some(reason::SHUTTING_DOWN), "the broker stops")
}

fn io_closing(error: &io::Error) -> Closing {
    match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof => {
            Closing::new(Cause::PeerClosed, None, error.to_string())
        }
        _ => Closing::new(Cause::Io, None, error.to_string()),
    }
}

/// The stream and its buffers.
struct Wire<S> {
    stream: S,
    input: Input,
    writer: Writer,
}

/// What one exchange with the socket did.
#[derive(Debug, Default)]
struct Exchanged {
    written: usize,
    /// `Some(0)`: the peer sends no more.
    read: Option<usize>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Writes and reads at most once each, whatever is ready first. Cancel safe.
    async fn exchange(&mut self, may_read: bool) -> io::Result<Exchanged> {
        poll_fn(|context| {
            let mut exchanged = Exchanged::default();
            let mut progress = false;
            if !self.writer.is_idle()
                && let Poll::Ready(written) = self.writer.poll_write(&mut self.stream, context)
            {
                exchanged.written = written?;
                progress = true;
            }
            if may_read && let Poll::Ready(read) = self.input.poll_read(&mut self.stream, context) {
                exchanged.read = Some(read?);
                progress = true;
            }
            if progress { Poll::Ready(Ok(exchanged)) } else { Poll::Pending }
        })
        .await
    }

    async fn read(&mut self, counters: &Counters) -> Result<usize, Closing> {
        let exchanged = self.exchange(true).await.map_err(|error| io_closing(&error))?;
        let read = exchanged.read.unwrap_or(0);
        Counters::add(&counters.bytes_in, read);
        Ok(read)
    }

    /// Answers a CONNECT that leads to nothing, in the client's language if it is known.
    fn refuse(&mut self, version: Option<Version>, closing: Closing) -> Closing {
        if let (Some(version), Some(code)) = (version, closing.code) {
            encode::connack_refused(self.writer.gather(), version, code);
        }
        closing
    }

    /// Writes the last bytes and hangs up such that they arrive: closing a socket with unread input would
    /// reset the connection and destroy them.
    async fn finish(&mut self, cause: Cause, counters: &Counters) {
        if matches!(cause, Cause::Io | Cause::PeerClosed) {
            return;
        }
        let flushed = tokio::time::timeout(FLUSH_MAX, async {
            while !self.writer.is_idle() {
                let exchanged = self.exchange(false).await?;
                Counters::add(&counters.bytes_out, exchanged.written);
            }
            self.stream.shutdown().await
        });
        if matches!(flushed.await, Ok(Ok(()))) && cause != Cause::Disconnected {
            let _elapsed = tokio::time::timeout(LINGER_MAX, self.linger()).await;
        }
    }

    async fn linger(&mut self) {
        let mut scratch = [0; 512];
        let mut read = 0;
        while read < LINGER_BYTES_MAX {
            match self.stream.read(&mut scratch).await {
                Ok(more) if more > 0 => read += more,
                _ => return,
            }
        }
    }
}

/// When to give up on a client.
#[derive(Debug)]
struct Deadlines {
    keep_alive: Option<Duration>,
    last_packet: Instant,
    /// CONNACK is due by then.
    open_by: Instant,
    /// The writer has had something since then, and got rid of nothing.
    stalled_since: Option<Instant>,
}

impl Deadlines {
    fn new(accepted: &Accepted, config: &Config) -> Self {
        let now = Instant::now();
        Self {
            keep_alive: accepted.keep_alive,
            last_packet: now,
            open_by: now + config.connect_timeout,
            stalled_since: None,
        }
    }

    fn on_packet(&mut self) {
        self.last_packet = Instant::now();
    }

    fn on_writer(&mut self, waiting: bool) {
        if !waiting {
            self.stalled_since = None;
        } else if self.stalled_since.is_none() {
            self.stalled_since = Some(Instant::now());
        }
    }

    fn on_written(&mut self) {
        self.stalled_since = None;
    }

    fn keep_alive_end(&self) -> Option<Instant> {
        self.keep_alive.map(|keep_alive| self.last_packet + keep_alive)
    }

    fn stall_end(&self) -> Option<Instant> {
        self.stalled_since.map(|since| since + WRITE_STALL_MAX)
    }

    /// The earliest of what is to come.
    fn next(&self) -> Instant {
        let now = Instant::now();
        let idle = now + Duration::from_secs(86_400);
        let open = (self.open_by > now).then_some(self.open_by);
        [self.keep_alive_end(), self.stall_end(), open].into_iter().flatten().fold(idle, Instant::min)
    }

    /// Time has passed.
    fn check(&self, open: bool) -> Result<(), Closing> {
        let now = Instant::now();
        if !open && now >= self.open_by {
            let detail = "the broker did not open the session in time";
            return Err(Closing::new(Cause::ConnectTimeout, Some(reason::UNAVAILABLE), detail));
        }
        if self.keep_alive_end().is_some_and(|end| now >= end) {
            let detail = "nothing received for one and a half keep-alive intervals";
            return Err(Closing::new(Cause::KeepAlive, Some(reason::KEEP_ALIVE), detail));
        }
        if self.stall_end().is_some_and(|end| now >= end) {
            return Err(Closing::new(Cause::SlowConsumer, None, "takes no bytes"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
