//! WebSocket over TLS 1.3 over TCP: links where UDP is blocked. The only file that names tokio-tungstenite.
//!
//! The same mutual TLS, verifier, tickets and identities as QUIC; the protocol that both ends must agree on
//! is `http/1.1`, as firewalls expect of a WebSocket, and the link's own version stands in the path and the
//! subprotocol of the upgrade. What comes after is [`mux`]: its fragments are binary messages.
//!
//! Priority ends where bytes enter the kernel, so little is kept there: `TCP_NOTSENT_LOWAT`, and no more
//! handed over than the line takes in a short time. Pings measure the line: an answer says that all
//! before it has arrived.
//!
//! Each connection has one task; it ends with the connection, at the latest [`LINGER`] after its close.

mod proxy;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use codec::Class;
use futures_util::{Sink, SinkExt as _, StreamExt as _, stream::Stream};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::ServerName;
use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, lookup_host},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async_with_config, client_async_with_config,
    tungstenite::{
        self, ClientRequestBuilder, Message,
        handshake::server::{Callback, ErrorResponse, Request, Response},
        http::{HeaderValue, StatusCode, Uri, header},
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode as Code},
    },
};

use super::{
    Broken, ByteStream, CloseCode, Closed, Path, Transport,
    accept::{Attempt, Listener},
    identity::PeerCertificate,
    mux::{self, BODY_MAX, HEADER, Mux},
    tls::{self, PeerError},
};
use crate::tasks::Tasks;
pub use proxy::{Proxy, ProxyError};

/// Default TCP port.
pub const PORT: u16 = 10000;
/// Where the upgrade is asked for; the number is the version of the fragments.
pub const PATH: &str = "/octobus/v1/link";
/// The subprotocol, likewise.
pub const SUBPROTOCOL: &str = "octobus.1";
/// Agreed in TLS.
const ALPN: &[u8] = b"http/1.1";

/// Unsent bytes in the kernel above which it takes no more.
const NOTSENT_LOWAT: u32 = 16 << 10;
/// The kernel gives a connection up after this long without an acknowledgement: heartbeats notice before,
/// this is for what is left when nobody looks any more.
const UNACKED_MAX: Duration = Duration::from_secs(60);
/// A listener's queue of connections that were not yet accepted.
const BACKLOG: i32 = 1024;
/// When `accept` fails (no file descriptors), others need a moment to close theirs.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// How long a closing connection waits for the peer to have read its end.
const LINGER: Duration = Duration::from_secs(2);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;
/// Bytes of a close reason: a control frame holds 125, two of them the code.
const REASON_MAX: usize = 123;
/// Our close codes in the range that WebSocket leaves to applications.
const CODES_FROM: u16 = 4000;

/// A bound port that accepts links.
pub struct WebSocketListener {
    tcp: TcpListener,
    tls: TlsAcceptor,
    tasks: Tasks,
}

impl WebSocketListener {
    /// Binds a TCP port; port 0 picks a free one. `tls` is from [`tls::acceptor`]; the connections' tasks run
    /// in `tasks` and outlive its stop until their links have ended.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn bind(address: SocketAddr, tls: &ServerConfig, tasks: Tasks) -> io::Result<Self> {
        use socket2::{Domain, Protocol, Type};
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self { tcp: TcpListener::from_std(socket.into())?, tls: Arc::new(tls).into(), tasks })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

impl std::fmt::Debug for WebSocketListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WebSocketListener").field(&self.tcp).finish()
    }
}

impl Listener for WebSocketListener {
    type Attempt = WebSocketAttempt;

    async fn accept(&self) -> Option<WebSocketAttempt> {
        loop {
            match self.tcp.accept().await {
                Ok((stream, remote)) => {
                    let (tls, tasks) = (self.tls.clone(), self.tasks.clone());
                    return Some(WebSocketAttempt { stream, remote, tls, tasks });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a WebSocket connection");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    async fn close(&self, _deadline: Duration) {}
}

/// A TCP connection of a peer of whom nothing is known yet.
pub struct WebSocketAttempt {
    stream: TcpStream,
    remote: SocketAddr,
    tls: TlsAcceptor,
    tasks: Tasks,
}

impl std::fmt::Debug for WebSocketAttempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WebSocketAttempt").field(&self.remote).finish()
    }
}

impl Attempt for WebSocketAttempt {
    type Transport = WebSocketTransport;
    type Error = WebSocketError;

    fn remote(&self) -> SocketAddr {
        self.remote
    }

    fn refuse(self) {}

    async fn handshake(self) -> Result<(WebSocketTransport, PeerCertificate), WebSocketError> {
        tune(&self.stream)?;
        let stream = self.tls.accept(self.stream).await.map_err(WebSocketError::Tls)?;
        let (_, session) = stream.get_ref();
        let peer = tls::peer_of(session.peer_certificates())?;
        if session.alpn_protocol() != Some(ALPN) {
            return Err(WebSocketError::Alpn);
        }
        let upgrade = Upgrade { sni: session.server_name().map(str::to_owned) };
        let socket = accept_hdr_async_with_config(stream, upgrade, Some(config())).await?;
        Ok((WebSocketTransport::new(socket, false, &self.tasks), peer))
    }
}

/// Dials hubs.
#[derive(Clone)]
pub struct WebSocketDialler {
    tls: TlsConnector,
    proxy: Option<Proxy>,
    tasks: Tasks,
}

impl std::fmt::Debug for WebSocketDialler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebSocketDialler").field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

impl WebSocketDialler {
    /// `tls` is from [`tls::dialler`]; sessions resume as long as it lives. With a proxy, it alone is
    /// connected to. The connections' tasks run in `tasks`, see [`WebSocketListener::bind`].
    #[must_use]
    pub fn new(tls: &ClientConfig, proxy: Option<Proxy>, tasks: Tasks) -> Self {
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // Whoever forwards by name may: it is no secret on this port, and no identity either.
        tls.enable_sni = true;
        Self { tls: Arc::new(tls).into(), proxy, tasks }
    }

    /// Connects to a hub by name or address, all within `patience`. Dropping the future gives the attempt
    /// up.
    ///
    /// # Errors
    /// No connection, or not a hub of the pinned tier.
    pub async fn dial(
        &self,
        host: &str,
        port: u16,
        patience: Duration,
    ) -> Result<(WebSocketTransport, PeerCertificate), WebSocketError> {
        let dialling = async {
            let stream = match &self.proxy {
                Some(proxy) => proxy.connect(host, port).await?,
                None => connect(host, port, patience).await?,
            };
            self.handshake(stream, host, port).await
        };
        timeout(patience, Box::pin(dialling)).await.unwrap_or(Err(WebSocketError::NoAnswer))
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        host: &str,
        port: u16,
    ) -> Result<(WebSocketTransport, PeerCertificate), WebSocketError> {
        tune(&stream)?;
        let name = ServerName::try_from(host.to_owned()).map_err(|_name| WebSocketError::Host)?;
        let stream = self.tls.connect(name, stream).await.map_err(WebSocketError::Tls)?;
        let (_, session) = stream.get_ref();
        let peer = tls::peer_of(session.peer_certificates())?;
        if session.alpn_protocol() != Some(ALPN) {
            return Err(WebSocketError::Alpn);
        }
        let authority =
            if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let uri: Uri = format!("wss://{authority}{PATH}").parse().map_err(|_uri| WebSocketError::Host)?;
        let request = ClientRequestBuilder::new(uri).with_sub_protocol(SUBPROTOCOL);
        let (socket, _response) = client_async_with_config(request, stream, Some(config())).await?;
        Ok((WebSocketTransport::new(socket, true, &self.tasks), peer))
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum WebSocketError {
    /// No connection.
    #[error("TCP: {0}")]
    Tcp(#[from] io::Error),
    /// The proxy gives none.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// The name cannot be dialled.
    #[error("not a host name or address")]
    Host,
    /// TLS said no; the text says which side.
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    /// The peer speaks something else behind TLS.
    #[error("the peer does not agree on http/1.1 in TLS")]
    Alpn,
    /// The certificate names nobody.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The upgrade was refused, or is not one.
    #[error("upgrade to WebSocket: {0}")]
    Upgrade(#[source] Box<tungstenite::Error>),
    /// Nothing came back in time.
    #[error("no answer")]
    NoAnswer,
}

impl From<tungstenite::Error> for WebSocketError {
    fn from(error: tungstenite::Error) -> Self {
        Self::Upgrade(Box::new(error))
    }
}

/// Tries the addresses of a host one after the other.
async fn connect(host: &str, port: u16, patience: Duration) -> io::Result<TcpStream> {
    let addresses: Vec<SocketAddr> = lookup_host((host, port)).await?.take(ADDRESSES_MAX).collect();
    let each = patience / u32::try_from(addresses.len().max(1)).expect("few");
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match timeout(each, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_elapsed) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(NOTSENT_LOWAT)?;
    socket.set_tcp_user_timeout(Some(UNACKED_MAX))
}

/// Bounds before allocation: one fragment, and no more than that buffered.
fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(4 << 10)
        .write_buffer_size(2 * BODY_MAX)
        .max_write_buffer_size(8 * BODY_MAX)
        .max_message_size(Some(BODY_MAX + HEADER))
        .max_frame_size(Some(BODY_MAX + HEADER))
}

/// What an acceptor wants of the request.
struct Upgrade {
    sni: Option<String>,
}

impl Callback for Upgrade {
    fn on_request(self, request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
        let headers = request.headers();
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        if request.uri().path() != PATH {
            return Err(refused(StatusCode::NOT_FOUND, "links are at another path"));
        }
        // Browsers say where a page came from; no page has business here.
        if headers.contains_key(header::ORIGIN) {
            return Err(refused(StatusCode::FORBIDDEN, "not for pages"));
        }
        let Some(host) =
            text(header::HOST).and_then(|host| host.parse::<tungstenite::http::uri::Authority>().ok())
        else {
            return Err(refused(StatusCode::BAD_REQUEST, "no host"));
        };
        if self.sni.is_some_and(|sni| !sni.eq_ignore_ascii_case(host.host())) {
            return Err(refused(StatusCode::MISDIRECTED_REQUEST, "another host than in TLS"));
        }
        let offered = text(header::SEC_WEBSOCKET_PROTOCOL).unwrap_or_default();
        if !offered.split(',').any(|one| one.trim() == SUBPROTOCOL) {
            return Err(refused(StatusCode::BAD_REQUEST, "no common subprotocol"));
        }
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        Ok(response)
    }
}

fn refused(status: StatusCode, why: &str) -> ErrorResponse {
    let mut response = ErrorResponse::new(Some(why.to_owned()));
    *response.status_mut() = status;
    response
}

/// An authenticated WebSocket connection.
#[derive(Debug, Clone)]
pub struct WebSocketTransport {
    mux: Mux,
    connection: Arc<Connection>,
    /// Closes the connection with the last clone.
    _open: Arc<Open>,
}

/// What the connection's task and its users share.
#[derive(Debug, Default)]
struct Connection {
    /// Messages that came.
    received: AtomicU64,
    /// What the peer is told at the end.
    farewell: Mutex<Option<(CloseCode, String)>>,
}

#[derive(Debug)]
struct Open(Mux);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.close(Closed::ByUs);
    }
}

impl WebSocketTransport {
    fn new<S>(socket: WebSocketStream<S>, dialler: bool, tasks: &Tasks) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (mux, connection) = (Mux::new(dialler), Arc::<Connection>::default());
        tasks.spawn("websocket", Box::pin(drive(socket, mux.clone(), Arc::clone(&connection))));
        Self { _open: Arc::new(Open(mux.clone())), mux, connection }
    }
}

impl Transport for WebSocketTransport {
    type Sender = mux::Sender;
    type Receiver = mux::Receiver;
    const NAME: &'static str = "WebSocket";

    async fn control(&self, _dialler: bool) -> Result<(mux::Sender, mux::Receiver), Broken> {
        self.mux.control().await
    }

    async fn open(&self, class: Class) -> Result<mux::Sender, Broken> {
        self.mux.open(class).await
    }

    async fn accept(&self) -> Result<mux::Receiver, Broken> {
        self.mux.accept().await
    }

    async fn open_stream(&self, class: Class) -> Result<ByteStream, Broken> {
        self.mux.open_stream(class).await
    }

    async fn accept_stream(&self) -> Result<ByteStream, Broken> {
        self.mux.accept_stream().await
    }

    fn close(&self, code: CloseCode, reason: &str) {
        let mut farewell = self.connection.farewell.lock().expect("no panic under this lock");
        farewell.get_or_insert_with(|| (code, reason.to_owned()));
        drop(farewell);
        self.mux.close(Closed::ByUs);
    }

    async fn closed(&self) -> Closed {
        self.mux.closed().await
    }

    fn path(&self) -> Path {
        Path { rtt: self.mux.rtt(), received: self.connection.received.load(Relaxed) }
    }
}

/// Carries messages both ways until the connection ends or is closed, then says so.
async fn drive<S>(socket: WebSocketStream<S>, mux: Mux, connection: Arc<Connection>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut sink, mut stream) = socket.split();
    let ended = tokio::select! {
        biased; // an end that the peer explains before one that is only felt
        ended = read(&mut stream, &mux, &connection) => ended,
        ended = write(&mut sink, &mux) => ended,
    };
    let by_us = matches!(mux.is_closed(), Some(Closed::ByUs));
    let (code, reason) = match (&ended, connection.farewell.lock().expect("no panic under this lock").take())
    {
        (_, Some(farewell)) => farewell,
        (Closed::Protocol(what), None) if !by_us => (CloseCode::PROTOCOL, what.clone()),
        (_, None) => (CloseCode::DONE, String::new()),
    };
    mux.close(ended);
    // Closing with unread bytes would reset the connection, and with it what is on its way to the peer.
    let farewell = async {
        drop(sink.send(Message::Close(Some(close_frame(code, &reason)))).await);
        while let Some(Ok(_)) = stream.next().await {}
    };
    drop(timeout(LINGER, farewell).await);
}

async fn read<S>(stream: &mut S, mux: &Mux, connection: &Connection) -> Closed
where
    S: Stream<Item = Result<Message, tungstenite::Error>> + Unpin,
{
    while let Some(message) = stream.next().await {
        connection.received.fetch_add(1, Relaxed);
        match message {
            Ok(Message::Binary(bytes)) => {
                if let Err(what) = mux.receive(bytes) {
                    return Closed::Protocol(what.into());
                }
            }
            Ok(Message::Pong(payload)) => mux.on_pong(&payload),
            Ok(Message::Ping(_)) => {}
            Ok(Message::Close(frame)) => return by_peer(frame),
            Ok(Message::Text(_) | Message::Frame(_)) => {
                return Closed::Protocol("a message that is not binary".into());
            }
            Err(tungstenite::Error::Io(error)) => return Closed::Lost(error.to_string()),
            Err(error) => return Closed::Protocol(error.to_string()),
        }
    }
    Closed::Lost("the connection ended without a close".into())
}

async fn write<S>(sink: &mut S, mux: &Mux) -> Closed
where
    S: Sink<Message, Error = tungstenite::Error> + Unpin,
{
    loop {
        if mux.is_closed().is_some() {
            return Closed::ByUs;
        }
        let (mut waits, max) = (0, mux.unsent_max());
        while waits < max
            && let Some(message) = mux.next_message()
        {
            let (message, len) = match message {
                mux::Message::Fragment(bytes) => {
                    let len = bytes.len();
                    (Message::Binary(bytes), len)
                }
                mux::Message::Ping(payload) => {
                    (Message::Ping(Bytes::copy_from_slice(&payload)), payload.len())
                }
            };
            waits += len;
            if let Err(error) = sink.feed(message).await {
                return felt(error).await;
            }
        }
        if waits == 0 {
            mux.changed().await;
        } else if let Err(error) = sink.flush().await {
            return felt(error).await;
        }
    }
}

/// What cannot be sent any more; the reader has a moment to learn why.
async fn felt(error: tungstenite::Error) -> Closed {
    sleep(ACCEPT_BACKOFF).await;
    Closed::Lost(error.to_string())
}

fn close_frame(code: CloseCode, reason: &str) -> CloseFrame {
    let mut end = reason.len().min(REASON_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let code = u16::try_from(code.0).ok().and_then(|code| CODES_FROM.checked_add(code)).unwrap_or(CODES_FROM);
    CloseFrame { code: Code::from(code), reason: reason[..end].into() }
}

fn by_peer(frame: Option<CloseFrame>) -> Closed {
    let Some(frame) = frame else { return Closed::Lost("closed without a code".into()) };
    match u16::from(frame.code).checked_sub(CODES_FROM) {
        Some(code) => {
            Closed::ByPeer { code: CloseCode(code.into()), reason: frame.reason.as_str().to_owned() }
        }
        None => Closed::Lost(format!("closed by WebSocket: {}", frame.code)),
    }
}
