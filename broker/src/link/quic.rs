//! QUIC: quinn's protocol state machine, driven by us ([`mod@port`]).
//!
//! Settings are for fleets. Every permitted stream and every table costs memory in each of 100 000
//! connections, so few streams are permitted; windows bound what a peer can make us hold; datagrams are off;
//! heartbeats are ours, so quinn sends none. Windows: all streams of a connection together are less than the
//! connection's window, and that less than the send window, so no class that is not read can stop another.

mod congestion;
mod connection;
pub(super) mod keys;
mod port;
mod shared;
mod socket;
mod steer;
mod timers;
mod tls_session;

use std::{
    fmt,
    future::poll_fn,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use codec::Class;
use quinn_proto::{
    ConnectionError, ConnectionId, ConnectionIdGenerator, Dir, EndpointConfig, IdleTimeout, StreamId,
    TransportConfig, VarInt,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::timeout,
};

use super::{
    Broken, ByteStream, CloseCode, Closed, LaneSender, Path, Transport,
    accept::{Attempt, Listener},
    identity::PeerCertificate,
    stream::{ReadSide, StreamCode, WriteSide},
    tls::{self, PeerError, TierSecret, TlsError},
};
use connection::{Connection, RecvStream, SendStream, StreamError};
use port::{Dialled, Port, Worker};
use steer::{Group, Place};
use tls_session::{ClientTls, ServerTls};

pub use shared::QuicSocket;

/// Windows and streams of one end.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes of one stream that the peer may send ahead of our reading.
    pub stream_window: u32,
    /// Bytes of all streams together.
    pub connection_window: u32,
    /// Bytes handed to the transport and not yet acknowledged.
    pub send_window: u64,
    /// Streams that the peer may have open at a time.
    pub streams: u32,
    /// A connection that is silent for this long is gone. Above the heartbeat's outer bound, so that the
    /// link notices first.
    pub idle_timeout: Duration,
}

impl Shape {
    /// An edge node: little memory, one connection.
    pub const NODE: Self = Self {
        stream_window: 112 << 10,
        connection_window: 4608 << 10,
        send_window: 3584 << 10,
        streams: 32,
        idle_timeout: IDLE_TIMEOUT,
    };
    /// A hub: what a node can make it hold, at worst, while the broker is behind.
    pub const HUB: Self = Self {
        stream_window: 224 << 10,
        connection_window: 3 << 20,
        send_window: 5 << 20,
        streams: 8,
        idle_timeout: IDLE_TIMEOUT,
    };

    /// For another heartbeat than the default.
    #[must_use]
    pub fn with_heartbeat(self, heartbeat: Duration) -> Self {
        Self {
            idle_timeout: heartbeat.saturating_mul(4).clamp(Duration::from_secs(5), IDLE_TIMEOUT_MAX),
            ..self
        }
    }

    const fn is_sound(&self, peer: &Self) -> bool {
        self.stream_window * (1 + self.streams + CLASS_LANES_MAX - 1) < self.connection_window
            && self.send_window > peer.connection_window as u64
    }
}

/// Control and a Stream, until the peer has opened one: an entry is kept for each that is permitted, in every
/// connection, and most connections never see a Stream.
const BIDI_FIRST: u32 = 2;
/// Five classes. With the two above they fit a table of eight; the successor of a lane that is being finished
/// waits for that, if all the others are open.
const UNI_MAX: u32 = 5;
/// Lanes that can hold a full window at a time: a successor opens when its predecessor is empty.
const CLASS_LANES_MAX: u32 = 5;
/// For heartbeats of 10 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(45);
const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Handshakes and first packets a listener keeps before it refuses.
const INCOMING_MAX: usize = 1024;
const INCOMING_BYTES_MAX: u64 = 4 << 20;
/// Messages received at once: from thousands of peers, and from one.
const LISTENER_MESSAGES: usize = 32;
const DIALLER_MESSAGES: usize = 1;
/// Kernel buffers of a listener, best effort: thousands of peers share one socket.
const LISTENER_SOCKET_BYTES: usize = 8 << 20;
/// What the certificate says counts, not this name; it keys the session cache.
const SERVER_NAME: &str = "octobus";

const _: () = assert!(Shape::NODE.is_sound(&Shape::HUB) && Shape::HUB.is_sound(&Shape::NODE));

/// A bound port that accepts links.
pub struct QuicListener {
    port: Port,
    streams: u32,
}

/// A bound address that does not listen yet: several ports can, each in the runtime of its own thread.
pub struct QuicAddress {
    sockets: Vec<UdpSocket>,
    config: EndpointConfig,
    server: quinn_proto::ServerConfig,
    streams: u32,
}

impl QuicAddress {
    /// Binds a UDP address with this many ports; port 0 picks a free one. `tls` is from [`tls::acceptor`].
    ///
    /// # Errors
    /// The address cannot be bound, or the TLS provider lacks QUIC's initial suite.
    pub fn bind(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        secret: &TierSecret,
        shape: Shape,
        ports: usize,
    ) -> Result<Self, BindError> {
        let crypto = ServerTls::new(tls).ok_or(TlsError::NoInitialSuite)?;
        let mut server = quinn_proto::ServerConfig::new(Arc::new(crypto), Arc::new(secret.token_key()));
        server
            .transport_config(Arc::new(transport_config(shape, Side::Acceptor)))
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(16 << 10)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let mut config = EndpointConfig::new(Arc::new(secret.reset_key()));
        config.supported_versions(vec![tls_session::QUIC_V1]);
        let bind =
            |address| bind_socket(address, ports > 1).map_err(|source| BindError::Socket { address, source });
        let mut sockets = vec![bind(address)?];
        let bound = sockets[0].local_addr().map_err(|source| BindError::Socket { address, source })?;
        for _ in 1..ports {
            sockets.push(bind(bound)?);
        }
        Ok(Self { sockets, config, server, streams: shape.streams })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.sockets[0].local_addr()
    }

    /// Its ports, each to be started where it shall run.
    #[must_use]
    pub fn into_ports(self) -> Vec<IdlePort> {
        self.into_ports_with(true)
    }

    /// Without the kernel's help every datagram is handed over by the port that its address leads to.
    pub(super) fn into_ports_with(self, kernel: bool) -> Vec<IdlePort> {
        let Self { sockets, config, server, streams } = self;
        if sockets.len() == 1 {
            let alone = |socket| IdlePort {
                socket,
                config: config.clone(),
                server: server.clone(),
                streams,
                place: None,
            };
            return sockets.into_iter().map(alone).collect();
        }
        let group = Group::new(sockets.len());
        if kernel && let Err(error) = group.steer(&sockets[0]) {
            tracing::info!(%error, "the kernel does not steer connections; datagrams are handed over here");
        }
        let in_group = |(socket, place): (UdpSocket, Place)| {
            let mut config = config.clone();
            let ids = place.clone();
            config.cid_generator(move || Box::new(ids.ids()));
            IdlePort { socket, config, server: server.clone(), streams, place: Some(place) }
        };
        sockets.into_iter().zip(group.places()).map(in_group).collect()
    }
}

impl fmt::Debug for QuicAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicAddress").field(&self.local_addr()).finish()
    }
}

/// A port that does not listen yet.
pub struct IdlePort {
    socket: UdpSocket,
    config: EndpointConfig,
    server: quinn_proto::ServerConfig,
    streams: u32,
    place: Option<Place>,
}

impl IdlePort {
    /// Listens, in the current runtime.
    ///
    /// # Errors
    /// The runtime does not take the socket.
    pub fn listen(self) -> io::Result<QuicListener> {
        let Self { socket, config, server, streams, place } = self;
        let (port, worker) = Port::in_group(socket, config, Some(server), LISTENER_MESSAGES, place)?;
        start(worker);
        Ok(QuicListener { port, streams })
    }
}

impl fmt::Debug for IdlePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IdlePort").field(&self.socket.local_addr()).finish()
    }
}

impl QuicListener {
    /// Binds a UDP port and listens in the current runtime; port 0 picks a free one. `tls` is from
    /// [`tls::acceptor`].
    ///
    /// # Errors
    /// The address cannot be bound, or the TLS provider lacks QUIC's initial suite.
    pub fn bind(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        secret: &TierSecret,
        shape: Shape,
    ) -> Result<Self, BindError> {
        let mut ports = QuicAddress::bind(address, tls, secret, shape, 1)?.into_ports();
        let port = ports.pop().expect("one was asked for");
        port.listen().map_err(|source| BindError::Socket { address, source })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.port.local_addr()
    }
}

impl fmt::Debug for QuicListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicListener").field(&self.local_addr()).finish()
    }
}

impl Listener for QuicListener {
    type Attempt = QuicAttempt;

    async fn accept(&self) -> Option<QuicAttempt> {
        Some(QuicAttempt { dialled: self.port.incoming().await?, streams: self.streams })
    }

    async fn close(&self, deadline: Duration) {
        self.port.close(VarInt::from_u32(CloseCode::DONE.0), b"shutdown");
        // Whoever has not heard by then will by its idle timeout or a stateless reset.
        drop(timeout(deadline, self.port.idle()).await);
    }
}

/// Why a port cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The operating system refused.
    #[error("cannot listen on UDP {address}: {source}")]
    Socket { address: SocketAddr, source: io::Error },
    /// The TLS configuration cannot carry QUIC.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// First packets of a peer; nothing was spent on it yet. Dropped, it is refused.
pub struct QuicAttempt {
    dialled: Dialled,
    streams: u32,
}

impl Attempt for QuicAttempt {
    type Transport = QuicTransport;
    type Error = HandshakeError;

    fn remote(&self) -> SocketAddr {
        self.dialled.remote()
    }

    fn prove(self) -> Option<Self> {
        if self.dialled.is_proved() {
            return Some(self);
        }
        self.dialled.retry();
        None
    }

    fn refuse(self) {
        drop(self.dialled);
    }

    async fn handshake(self) -> Result<(QuicTransport, PeerCertificate), HandshakeError> {
        QuicTransport::connected(self.dialled.accept()?, self.streams).await
    }
}

impl fmt::Debug for QuicAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicAttempt").field(&self.remote()).finish()
    }
}

/// Dials hubs, each time from a fresh local port: a path that a middlebox has broken is left behind.
#[derive(Debug, Clone)]
pub struct QuicDialler {
    config: quinn_proto::ClientConfig,
    streams: u32,
}

impl QuicDialler {
    /// `tls` is from [`tls::dialler`]; sessions resume as long as it lives.
    ///
    /// # Errors
    /// The TLS provider lacks QUIC's initial suite.
    pub fn new(tls: Arc<rustls::ClientConfig>, shape: Shape) -> Result<Self, TlsError> {
        let crypto = ClientTls::new(tls).ok_or(TlsError::NoInitialSuite)?;
        let mut config = quinn_proto::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport_config(shape, Side::Dialler)));
        Ok(Self { config, streams: shape.streams })
    }

    /// Connects to one address. Dropping the future gives the attempt up.
    ///
    /// # Errors
    /// No socket, no answer, or not a hub of the pinned tier.
    pub async fn dial(&self, to: SocketAddr) -> Result<(QuicTransport, PeerCertificate), HandshakeError> {
        let port = fresh_port(to)?;
        let connecting = port.connect(self.config.clone(), to, SERVER_NAME);
        let connection = connecting.map_err(|error| HandshakeError::Address(error.to_string()))?;
        drop(port);
        QuicTransport::connected(connection, self.streams).await
    }
}

/// For one connection.
fn fresh_port(to: SocketAddr) -> io::Result<Port> {
    let any: SocketAddr = match to {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let mut config = EndpointConfig::default();
    // Packets need no id to find it.
    config.cid_generator(|| Box::new(NoId));
    let (port, worker) = Port::new(UdpSocket::bind(any)?, config, None, DIALLER_MESSAGES)?;
    start(worker);
    Ok(port)
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// No local socket.
    #[error("no UDP socket: {0}")]
    Socket(#[from] io::Error),
    /// The address cannot be dialled.
    #[error("cannot dial: {0}")]
    Address(String),
    /// The network or TLS said no; the text says which.
    #[error("handshake: {0}")]
    Connection(#[from] ConnectionError),
    /// The certificate names nobody.
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// Which end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Dialler,
    Acceptor,
}

fn transport_config(shape: Shape, side: Side) -> TransportConfig {
    let idle = shape.idle_timeout.min(IDLE_TIMEOUT_MAX);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(BIDI_FIRST.min(1 + shape.streams)))
        .max_concurrent_uni_streams(VarInt::from_u32(UNI_MAX))
        .stream_receive_window(VarInt::from_u32(shape.stream_window))
        .receive_window(VarInt::from_u32(shape.connection_window))
        .send_window(shape.send_window)
        .max_idle_timeout(Some(IdleTimeout::try_from(idle).expect("an hour fits a varint")))
        .keep_alive_interval(None)
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .congestion_controller_factory(Arc::<congestion::CubicWithinDelay>::default())
        .allow_spin(false);
    if side == Side::Acceptor {
        // Probes of every path, by who has 100 000 of them, to save a fifth of the packets of few.
        config.mtu_discovery_config(None);
    }
    config
}

/// Serves a port beside everything else. It is no task of anybody's group: it goes on until the last of its
/// connections has said goodbye.
#[allow(clippy::disallowed_methods)]
fn start(worker: Worker) {
    drop(tokio::spawn(async move {
        if let Err(error) = worker.await {
            tracing::error!(%error, "a QUIC port is lost, and its links");
        }
    }));
}

/// Gives connections no id.
struct NoId;

impl ConnectionIdGenerator for NoId {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&[])
    }

    fn cid_len(&self) -> usize {
        0
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn bind_socket(address: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    // The kernel caps these at its own maximum and says nothing: less is slower, not wrong.
    socket.set_recv_buffer_size(LISTENER_SOCKET_BYTES)?;
    socket.set_send_buffer_size(LISTENER_SOCKET_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// An authenticated QUIC connection.
#[derive(Clone)]
pub struct QuicTransport {
    connection: Connection,
    /// Streams that the peer may have open at a time.
    streams: u32,
}

impl QuicTransport {
    /// Waits for the handshake's end. Dropping the future gives it up.
    async fn connected(
        connection: Connection,
        streams: u32,
    ) -> Result<(Self, PeerCertificate), HandshakeError> {
        poll_fn(|cx| connection.poll_connected(cx)).await?;
        let certificate = tls::peer_of(connection.peer_chain().as_deref())?;
        Ok((Self { connection, streams }, certificate))
    }

    /// The peer's address.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.connection.remote()
    }

    async fn open_lane(&self, dir: Dir) -> Result<StreamId, Broken> {
        poll_fn(|cx| self.connection.poll_open(dir, cx)).await.map_err(|_lost| Broken)
    }

    async fn accept_lane(&self, dir: Dir) -> Result<StreamId, Broken> {
        poll_fn(|cx| self.connection.poll_accept(dir, cx)).await.map_err(|_lost| Broken)
    }

    fn byte_stream(&self, id: StreamId, class: Class) -> ByteStream {
        let mut writer = StreamWriter { stream: self.connection.sender(id), finished: false };
        writer.set_class(class);
        ByteStream::new(StreamReader(self.connection.receiver(id)), writer)
    }
}

impl fmt::Debug for QuicTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicTransport").field(&self.remote()).finish()
    }
}

impl Transport for QuicTransport {
    type Sender = QuicSender;
    type Receiver = QuicReceiver;
    const NAME: &'static str = "QUIC";

    async fn control(&self, dialler: bool) -> Result<(QuicSender, QuicReceiver), Broken> {
        let id = if dialler { self.open_lane(Dir::Bi).await? } else { self.accept_lane(Dir::Bi).await? };
        let sender = QuicSender::new(self.connection.sender(id), Class::Control);
        Ok((sender, QuicReceiver(self.connection.receiver(id))))
    }

    async fn open(&self, class: Class) -> Result<QuicSender, Broken> {
        let id = self.open_lane(Dir::Uni).await?;
        Ok(QuicSender::new(self.connection.sender(id), class))
    }

    async fn accept(&self) -> Result<QuicReceiver, Broken> {
        let id = self.accept_lane(Dir::Uni).await?;
        Ok(QuicReceiver(self.connection.receiver(id)))
    }

    async fn open_stream(&self, class: Class) -> Result<ByteStream, Broken> {
        Ok(self.byte_stream(self.open_lane(Dir::Bi).await?, class))
    }

    async fn accept_stream(&self) -> Result<ByteStream, Broken> {
        let id = self.accept_lane(Dir::Bi).await?;
        // The first: more may follow. Permitting the same again does nothing.
        self.connection.permit_streams(1 + self.streams);
        Ok(self.byte_stream(id, Class::Event))
    }

    fn close(&self, code: CloseCode, reason: &str) {
        let mut end = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.connection.close(VarInt::from_u32(code.0), &reason.as_bytes()[..end]);
    }

    async fn closed(&self) -> Closed {
        match poll_fn(|cx| self.connection.poll_closed(cx)).await {
            ConnectionError::ApplicationClosed(close) => Closed::ByPeer {
                code: CloseCode(u32::try_from(close.error_code.into_inner()).unwrap_or(u32::MAX)),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::LocallyClosed => Closed::ByUs,
            error => Closed::Lost(error.to_string()),
        }
    }

    fn path(&self) -> Path {
        let stats = self.connection.stats();
        Path { rtt: stats.path.rtt, received: stats.udp_rx.datagrams }
    }
}

/// Bytes of a close reason: it has to fit one packet.
const REASON_MAX: usize = 256;

/// The sending half of a QUIC stream.
pub struct QuicSender {
    stream: SendStream,
    finished: bool,
}

impl QuicSender {
    fn new(stream: SendStream, class: Class) -> Self {
        stream.set_priority(-2 * class as i32);
        Self { stream, finished: false }
    }
}

impl LaneSender for QuicSender {
    async fn write(&mut self, mut buffers: Vec<Bytes>) -> Result<(), Broken> {
        let mut rest = &mut buffers[..];
        while !rest.is_empty() {
            let written = poll_fn(|cx| self.stream.poll_write(rest, cx)).await.map_err(|_lost| Broken)?;
            rest = &mut rest[written.chunks..];
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<(), Broken> {
        self.stream.finish().map_err(|_closed| Broken)?;
        self.finished = true;
        match poll_fn(|cx| self.stream.poll_stopped(cx)).await {
            Ok(None) => Ok(()),
            Ok(Some(_)) | Err(_) => Err(Broken),
        }
    }
}

impl Drop for QuicSender {
    fn drop(&mut self) {
        if !self.finished {
            // Unfinished it would stay open: half a batch must not look like a whole lane, nor like a slow one.
            self.stream.reset(VarInt::from_u32(CloseCode::DONE.0));
        }
    }
}

impl fmt::Debug for QuicSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicSender").field(&self.stream.id()).finish()
    }
}

/// The sending direction of a Stream. Dropped unfinished it is reset: what was cut off must not look complete.
struct StreamWriter {
    stream: SendStream,
    finished: bool,
}

/// Bytes of a Stream that are handed over at a time.
const STREAM_CHUNK: usize = 64 << 10;

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = ready!(self.stream.poll_write_slice(&buf[..buf.len().min(STREAM_CHUNK)], cx));
        Poll::Ready(wrote.map_err(stream_error))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished = true;
        Poll::Ready(self.stream.finish().map_err(stream_error))
    }
}

impl WriteSide for StreamWriter {
    fn reset(&mut self, code: StreamCode) {
        self.finished = true;
        self.stream.reset(VarInt::from_u32(code.0));
    }

    fn set_class(&mut self, class: Class) {
        self.stream.set_priority(-2 * class as i32 - 1);
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(StreamCode::CANCELLED);
        }
    }
}

/// The receiving direction of a Stream. Dropped before its end, it is stopped with code 0, which is
/// [`StreamCode::CANCELLED`].
struct StreamReader(RecvStream);

impl AsyncRead for StreamReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.poll_read(buf, cx).map_err(stream_error)
    }
}

impl ReadSide for StreamReader {
    fn stop(&mut self, code: StreamCode) {
        self.0.stop(VarInt::from_u32(code.0));
    }
}

fn stream_error(error: StreamError) -> io::Error {
    match error {
        StreamError::Ended(code) => StreamCode(u32::try_from(code.into_inner()).unwrap_or(u32::MAX)).into(),
        StreamError::Lost => io::ErrorKind::NotConnected.into(),
    }
}

/// The receiving half of a QUIC stream.
pub struct QuicReceiver(RecvStream);

impl AsyncRead for QuicReceiver {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.poll_read(buf, cx).map_err(stream_error)
    }
}

impl fmt::Debug for QuicReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicReceiver").field(&self.0.id()).finish()
    }
}
