//! QUIC: the only file that names quinn.
//!
//! Settings are for fleets. Every permitted stream and every table costs memory in each of 100 000
//! connections, so few streams are permitted; windows bound what a peer can make us hold; datagrams are off;
//! heartbeats are ours, so quinn sends none. Windows: all streams of a connection together are less than the
//! connection's window, and that less than the send window, so no class that is not read can stop another.

mod congestion;
mod shared;

use std::{
    fmt, io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use codec::Class;
use quinn::{
    Connection, ConnectionError, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, IdleTimeout,
    Incoming, ReadError, RecvStream, SendStream, TokioRuntime, TransportConfig, VarInt, WriteError,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
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

/// Control and three Streams, until the peer has opened one: quinn keeps an entry for each that is permitted,
/// in every connection, and most connections never see a Stream.
const BIDI_FIRST: u32 = 4;
/// Five classes, one of them while its predecessor is being finished.
const UNI_MAX: u32 = 6;
/// Lanes that can hold a full window at a time: a successor opens when its predecessor is empty.
const CLASS_LANES_MAX: u32 = 5;
/// For heartbeats of 10 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(45);
const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Handshakes and first packets a listener keeps before it refuses.
const INCOMING_MAX: usize = 1024;
const INCOMING_BYTES_MAX: u64 = 4 << 20;
/// Kernel buffers of a listener, best effort: thousands of peers share one socket.
const LISTENER_SOCKET_BYTES: usize = 4 << 20;
/// What the certificate says counts, not this name; it keys the session cache.
const SERVER_NAME: &str = "octobus";

const _: () = assert!(Shape::NODE.is_sound(&Shape::HUB) && Shape::HUB.is_sound(&Shape::NODE));

/// A bound port that accepts links.
#[derive(Debug)]
pub struct QuicListener {
    endpoint: Endpoint,
    streams: u32,
}

impl QuicListener {
    /// Binds a UDP port; port 0 picks a free one. `tls` is from [`tls::acceptor`].
    ///
    /// # Errors
    /// The address cannot be bound, or the TLS provider lacks QUIC's initial suite.
    pub fn bind(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        secret: &TierSecret,
        shape: Shape,
    ) -> Result<Self, BindError> {
        let crypto = QuicServerConfig::try_from(tls).map_err(|_suite| TlsError::NoInitialSuite)?;
        let mut server = quinn::ServerConfig::new(Arc::new(crypto), Arc::new(secret.token_key()));
        server
            .transport_config(Arc::new(transport_config(shape)))
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(16 << 10)
            .incoming_buffer_size_total(INCOMING_BYTES_MAX);
        let endpoint_config = EndpointConfig::new(Arc::new(secret.reset_key()));
        let socket = bind_socket(address).map_err(|source| BindError::Socket { address, source })?;
        let endpoint = Endpoint::new(endpoint_config, Some(server), socket, Arc::new(TokioRuntime))
            .map_err(|source| BindError::Socket { address, source })?;
        Ok(Self { endpoint, streams: shape.streams })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }
}

impl Listener for QuicListener {
    type Attempt = QuicAttempt;

    async fn accept(&self) -> Option<QuicAttempt> {
        Some(QuicAttempt { incoming: self.endpoint.accept().await?, streams: self.streams })
    }

    async fn close(&self, deadline: Duration) {
        self.endpoint.close(VarInt::from_u32(CloseCode::DONE.0), b"shutdown");
        // Whoever has not heard by then will by its idle timeout or a stateless reset.
        drop(timeout(deadline, self.endpoint.wait_idle()).await);
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

/// First packets of a peer; nothing was spent on it yet.
#[derive(Debug)]
pub struct QuicAttempt {
    incoming: Incoming,
    streams: u32,
}

impl Attempt for QuicAttempt {
    type Transport = QuicTransport;
    type Error = HandshakeError;

    fn remote(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    fn prove(self) -> Option<Self> {
        if self.incoming.remote_address_validated() {
            return Some(self);
        }
        // Statelessly: the peer comes again with what we gave it.
        if let Err(error) = self.incoming.retry() {
            error.into_incoming().refuse();
        }
        None
    }

    fn refuse(self) {
        self.incoming.refuse();
    }

    async fn handshake(self) -> Result<(QuicTransport, PeerCertificate), HandshakeError> {
        let connection = self.incoming.await?;
        QuicTransport::new(connection, None, self.streams)
    }
}

/// Dials hubs, each time from a fresh local port: a path that a middlebox has broken is left behind.
#[derive(Debug, Clone)]
pub struct QuicDialler {
    config: quinn::ClientConfig,
    streams: u32,
}

impl QuicDialler {
    /// `tls` is from [`tls::dialler`]; sessions resume as long as it lives.
    ///
    /// # Errors
    /// The TLS provider lacks QUIC's initial suite.
    pub fn new(tls: Arc<rustls::ClientConfig>, shape: Shape) -> Result<Self, TlsError> {
        let crypto = QuicClientConfig::try_from(tls).map_err(|_suite| TlsError::NoInitialSuite)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport_config(shape)));
        Ok(Self { config, streams: shape.streams })
    }

    /// Connects to one address. Dropping the future gives the attempt up.
    ///
    /// # Errors
    /// No socket, no answer, or not a hub of the pinned tier.
    pub async fn dial(&self, to: SocketAddr) -> Result<(QuicTransport, PeerCertificate), HandshakeError> {
        let any: SocketAddr = match to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let mut config = EndpointConfig::default();
        // One connection per socket: packets need no id to find it.
        config.cid_generator(|| Box::new(NoId));
        let endpoint = Endpoint::new(config, None, UdpSocket::bind(any)?, Arc::new(TokioRuntime))?;
        let connecting = endpoint
            .connect_with(self.config.clone(), to, SERVER_NAME)
            .map_err(|error| HandshakeError::Address(error.to_string()))?;
        let connection = connecting.await?;
        QuicTransport::new(connection, Some(endpoint), self.streams)
    }
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

fn transport_config(shape: Shape) -> TransportConfig {
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
    config
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

fn bind_socket(address: SocketAddr) -> io::Result<UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    // The kernel caps these at its own maximum and says nothing: less is slower, not wrong.
    socket.set_recv_buffer_size(LISTENER_SOCKET_BYTES)?;
    socket.set_send_buffer_size(LISTENER_SOCKET_BYTES)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// An authenticated QUIC connection.
#[derive(Debug, Clone)]
pub struct QuicTransport {
    connection: Connection,
    /// Streams that the peer may have open at a time.
    streams: u32,
    /// A dialler's own endpoint lives as long as its connection.
    _endpoint: Option<Endpoint>,
}

impl QuicTransport {
    fn new(
        connection: Connection,
        endpoint: Option<Endpoint>,
        streams: u32,
    ) -> Result<(Self, PeerCertificate), HandshakeError> {
        let chain = connection
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        let certificate = tls::peer_of(chain.as_ref().map(|chain| chain.as_slice()))?;
        Ok((Self { connection, streams, _endpoint: endpoint }, certificate))
    }

    /// The peer's address.
    #[must_use]
    pub fn remote(&self) -> SocketAddr {
        self.connection.remote_address()
    }
}

impl Transport for QuicTransport {
    type Sender = QuicSender;
    type Receiver = QuicReceiver;

    async fn control(&self, dialler: bool) -> Result<(QuicSender, QuicReceiver), Broken> {
        let opened =
            if dialler { self.connection.open_bi().await } else { self.connection.accept_bi().await };
        let (sender, receiver) = opened.map_err(|_lost| Broken)?;
        Ok((QuicSender::new(sender, Class::Control), QuicReceiver(receiver)))
    }

    async fn open(&self, class: Class) -> Result<QuicSender, Broken> {
        let sender = self.connection.open_uni().await.map_err(|_lost| Broken)?;
        Ok(QuicSender::new(sender, class))
    }

    async fn accept(&self) -> Result<QuicReceiver, Broken> {
        self.connection.accept_uni().await.map(QuicReceiver).map_err(|_lost| Broken)
    }

    async fn open_stream(&self, class: Class) -> Result<ByteStream, Broken> {
        let (sender, receiver) = self.connection.open_bi().await.map_err(|_lost| Broken)?;
        let mut writer = StreamWriter { stream: sender, finished: false };
        writer.set_class(class);
        Ok(ByteStream::new(StreamReader(receiver), writer))
    }

    async fn accept_stream(&self) -> Result<ByteStream, Broken> {
        let (sender, receiver) = self.connection.accept_bi().await.map_err(|_lost| Broken)?;
        // The first: more may follow. Permitting the same again does nothing.
        self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(1 + self.streams));
        let mut writer = StreamWriter { stream: sender, finished: false };
        writer.set_class(Class::Event);
        Ok(ByteStream::new(StreamReader(receiver), writer))
    }

    fn close(&self, code: CloseCode, reason: &str) {
        let mut end = reason.len().min(REASON_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.connection.close(VarInt::from_u32(code.0), &reason.as_bytes()[..end]);
    }

    async fn closed(&self) -> Closed {
        match self.connection.closed().await {
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
        // Fails only on a stream that is closed; then writing says so.
        drop(stream.set_priority(-2 * class as i32));
        Self { stream, finished: false }
    }
}

impl LaneSender for QuicSender {
    async fn write(&mut self, mut buffers: Vec<Bytes>) -> Result<(), Broken> {
        self.stream.write_all_chunks(&mut buffers).await.map_err(|_lost| Broken)
    }

    async fn finish(mut self) -> Result<(), Broken> {
        self.stream.finish().map_err(|_closed| Broken)?;
        self.finished = true;
        match self.stream.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) | Err(_) => Err(Broken),
        }
    }
}

impl Drop for QuicSender {
    fn drop(&mut self) {
        if !self.finished {
            // quinn would finish it: half a batch would look like a whole lane.
            drop(self.stream.reset(VarInt::from_u32(CloseCode::DONE.0)));
        }
    }
}

impl fmt::Debug for QuicSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QuicSender").field(&self.stream.id()).finish()
    }
}

/// The sending direction of a Stream. Dropped unfinished it is reset: quinn would finish it, and what was cut
/// off would look complete.
struct StreamWriter {
    stream: SendStream,
    finished: bool,
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf).map_err(|error| match error {
            WriteError::Stopped(code) => stream_code(code).into(),
            other => other.into(),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished = true;
        Poll::Ready(self.stream.finish().map_err(io::Error::other))
    }
}

impl WriteSide for StreamWriter {
    fn reset(&mut self, code: StreamCode) {
        self.finished = true;
        // Fails on a stream that is closed: then there is nothing to reset.
        drop(self.stream.reset(VarInt::from_u32(code.0)));
    }

    fn set_class(&mut self, class: Class) {
        drop(self.stream.set_priority(-2 * class as i32 - 1));
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.reset(StreamCode::CANCELLED);
        }
    }
}

/// The receiving direction of a Stream. Dropped before its end, quinn stops it with code 0, which is
/// [`StreamCode::CANCELLED`].
struct StreamReader(RecvStream);

impl AsyncRead for StreamReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(self.0.poll_read_buf(cx, buf));
        Poll::Ready(read.map_err(|error| match error {
            ReadError::Reset(code) => stream_code(code).into(),
            other => other.into(),
        }))
    }
}

impl ReadSide for StreamReader {
    fn stop(&mut self, code: StreamCode) {
        drop(self.0.stop(VarInt::from_u32(code.0)));
    }
}

fn stream_code(code: VarInt) -> StreamCode {
    StreamCode(u32::try_from(code.into_inner()).unwrap_or(u32::MAX))
}

/// The receiving half of a QUIC stream.
#[derive(Debug)]
pub struct QuicReceiver(RecvStream);

impl AsyncRead for QuicReceiver {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.0), cx, buf)
    }
}
