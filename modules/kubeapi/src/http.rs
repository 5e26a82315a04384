//! The way in: TLS, HTTP/1.1, and one task per connection. Nodes come by Streams of their links instead.

pub(crate) mod body;
pub(crate) mod negotiate;
mod nodes;
mod protobuf;
pub(crate) mod request;
pub(crate) mod route;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use broker::Tasks;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    auth::certificate,
    http::route::Server,
    limits,
    user::{MASTERS, NODES, User},
};

/// When `accept` fails (no file descriptors), others need a moment to close theirs.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A server and its TLS: serves connections, whichever way they come. Cloning shares the bound on how many.
#[derive(Debug, Clone)]
pub struct Front {
    tls: Arc<ServerConfig>,
    server: Arc<Server>,
    slots: Arc<Semaphore>,
}

/// Of who does not come from an address.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

impl Front {
    pub(crate) fn new(tls: Arc<ServerConfig>, server: Arc<Server>) -> Self {
        Self { tls, server, slots: Arc::new(Semaphore::new(limits::CONNECTIONS_MAX)) }
    }

    /// Serves a byte pipe to a node that its link has identified: who asks there and shows no token is the node.
    /// Returns when the pipe ends, and at once if there are too many.
    pub async fn serve_node(&self, pipe: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, node: &str) {
        let groups = vec![NODES.to_owned()];
        self.serve_pipe(pipe, User { name: format!("system:node:{node}"), groups, ..User::default() }).await;
    }

    /// Serves a byte pipe at whose other end is the administrator of this machine.
    pub async fn serve_admin(&self, pipe: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
        let groups = vec![MASTERS.to_owned()];
        self.serve_pipe(pipe, User { name: "kubernetes-admin".to_owned(), groups, ..User::default() }).await;
    }

    async fn serve_pipe(&self, pipe: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, user: User) {
        let Ok(_slot) = self.slots.try_acquire() else { return };
        let who = Who { certificate: Some(user), token_counts_first: true };
        Box::pin(serve_http(pipe, NOWHERE, Arc::clone(&self.server), who)).await;
    }
}

/// Who is at the other end of a connection.
struct Who {
    certificate: Option<User>,
    /// Somebody else may speak over it, who shows a token then.
    token_counts_first: bool,
}

/// The next connection. Cancel safe.
pub(crate) async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the Kubernetes API");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// Serves a connection that was accepted already, if there is one, and all others until `tasks` are asked to
/// stop.
pub(crate) async fn serve(
    listener: TcpListener,
    mut first: Option<(TcpStream, SocketAddr)>,
    front: Front,
    tasks: Tasks,
) {
    let acceptor = TlsAcceptor::from(Arc::clone(&front.tls));
    let stopped = tasks.stopped();
    loop {
        let accepting = async {
            // Both steps are cancel safe: a slot not yet used goes back.
            let slot = Arc::clone(&front.slots).acquire_owned().await;
            let accepted = match first.take() {
                Some(accepted) => accepted,
                None => accept(&listener).await,
            };
            (slot, accepted)
        };
        let (slot, (stream, from)) = tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            accepted = accepting => accepted,
        };
        let Ok(slot) = slot else { return };
        let connection = connection(stream, from, acceptor.clone(), Arc::clone(&front.server), slot);
        let stopped = stopped.clone();
        tasks.spawn("kubernetes connection", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = connection => {}
            }
        });
    }
}

async fn connection(
    stream: TcpStream,
    from: SocketAddr,
    acceptor: TlsAcceptor,
    server: Arc<Server>,
    _slot: OwnedSemaphorePermit,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%from, %error, "a connection to the Kubernetes API waits for full packets");
    }
    let stream = match timeout(limits::HANDSHAKE_MAX, Box::pin(acceptor.accept(stream))).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%from, %error, "Kubernetes API handshake failed"),
        Err(_elapsed) => return tracing::debug!(%from, "Kubernetes API handshake took too long"),
    };
    let certificates = stream.get_ref().1.peer_certificates();
    let certificate = certificates.and_then(|chain| certificate::user_of(chain.first()?));
    Box::pin(serve_http(stream, from, server, Who { certificate, token_counts_first: false })).await;
}

async fn serve_http(
    pipe: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    from: SocketAddr,
    server: Arc<Server>,
    who: Who,
) {
    let who = Arc::new(who);
    let service = service_fn(move |request: Request<Incoming>| {
        let (server, who) = (Arc::clone(&server), Arc::clone(&who));
        async move {
            let speaks_for_another =
                who.token_counts_first && request.headers().contains_key("authorization");
            let user = who.certificate.as_ref().filter(|_| !speaks_for_another);
            Ok::<_, std::convert::Infallible>(server.answer(request, user, from).await)
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HANDSHAKE_MAX.max(limits::REQUEST_MAX))
        .max_buf_size(limits::HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(pipe), service)
        .with_upgrades();
    if let Err(error) = Box::pin(serving).await {
        tracing::debug!(%from, %error, "a connection to the Kubernetes API failed");
    }
}
