//! The way in: TLS, HTTP/1.1, and one task per connection.

pub(crate) mod body;
pub(crate) mod negotiate;
mod nodes;
mod protobuf;
pub(crate) mod request;
pub(crate) mod route;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use broker::Tasks;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{auth::certificate, http::route::Server, limits, user::User};

/// When `accept` fails (no file descriptors), others need a moment to close theirs.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves until `tasks` are asked to stop.
pub(crate) async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, server: Arc<Server>, tasks: Tasks) {
    let acceptor = TlsAcceptor::from(tls);
    let slots = Arc::new(Semaphore::new(limits::CONNECTIONS_MAX));
    let stopped = tasks.stopped();
    loop {
        let slot = Arc::clone(&slots).acquire_owned();
        let accepted = tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            // Both steps are cancel safe: a slot not yet used goes back.
            accepted = async { (slot.await, listener.accept().await) } => accepted,
        };
        match accepted {
            (Ok(slot), Ok((stream, from))) => {
                let connection = connection(stream, from, acceptor.clone(), Arc::clone(&server), slot);
                let stopped = stopped.clone();
                tasks.spawn("kubernetes connection", async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = connection => {}
                    }
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "cannot accept a connection to the Kubernetes API");
                sleep(ACCEPT_BACKOFF).await;
            }
            (Err(_closed), _) => return,
        }
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
    let user: Option<Arc<User>> =
        certificates.and_then(|chain| certificate::user_of(chain.first()?)).map(Arc::new);
    let service = service_fn(move |request: Request<Incoming>| {
        let (server, user) = (Arc::clone(&server), user.clone());
        async move { Ok::<_, std::convert::Infallible>(server.answer(request, user.as_deref(), from).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits::HANDSHAKE_MAX.max(limits::REQUEST_MAX))
        .max_buf_size(limits::HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = Box::pin(serving).await {
        tracing::debug!(%from, %error, "a connection to the Kubernetes API failed");
    }
}
