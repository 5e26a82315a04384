//! What a kubelet serves, for all nodes of this hub: where the API server of a cluster asks for logs, exec, attach and
//! port-forward, and metrics-server for metrics.
//!
//! A request is let in by [`access`], sent to the node that [`place`] finds in it, and passed on over a Stream as it
//! is; the answer comes back as the node gives it. The node is the HTTP server.

mod access;
mod place;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use broker::Tasks;
use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use kubeapi::nodes::{
    Unreachable,
    forward::{Forwarder, NodeBody},
};
use rustls::{RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use self::access::{Refused, User};
pub(crate) use self::{access::Access, place::Places};
use crate::ca::HubIdentity;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// TLS handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Between two requests on one connection, and for the headers of one.
const IDLE_MAX: Duration = Duration::from_secs(90);
const HEADER_BYTES_MAX: usize = 64 << 10;
/// When `accept` fails (no file descriptors), others need a moment to close theirs.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Why it cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// The CA of clients.
    #[error("kubernetes.client_ca: {path}: {why}")]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// TLS.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// What answers a request.
#[derive(Debug)]
pub(crate) struct Kubelet {
    pub(crate) access: Access,
    pub(crate) places: Places,
    pub(crate) nodes: Forwarder,
}

/// An answer: of a node, or a text.
type Reply = Response<Either<NodeBody, Full<Bytes>>>;

/// TLS that asks clients for a certificate of this CA, and takes those without one, who show a token.
///
/// # Errors
/// See [`KubeletError`].
pub(crate) fn tls(
    identity: HubIdentity,
    client_ca: Option<&PathBuf>,
) -> Result<Arc<ServerConfig>, KubeletError> {
    let provider = Arc::new(ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let wrong = |why: String| KubeletError::ClientCa { path: path.clone(), why };
            let mut roots = RootCertStore::empty();
            let certificates =
                CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
                roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| wrong(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until `tasks` are asked to stop. Each connection is a task of its own.
pub(crate) async fn serve(listener: TcpListener, tls: Arc<ServerConfig>, kubelet: Kubelet, tasks: Tasks) {
    let (acceptor, kubelet) = (TlsAcceptor::from(tls), Arc::new(kubelet));
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
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
                let connection = connection(stream, from, acceptor.clone(), Arc::clone(&kubelet), slot);
                let stopped = stopped.clone();
                tasks.spawn("kubelet connection", async move {
                    tokio::select! {
                        biased;
                        () = stopped.cancelled() => {}
                        () = connection => {}
                    }
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "cannot accept a connection to the kubelet endpoint");
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
    kubelet: Arc<Kubelet>,
    _slot: OwnedSemaphorePermit,
) {
    let handshake = async {
        stream.set_nodelay(true)?;
        acceptor.accept(stream).await
    };
    let stream = match timeout(HANDSHAKE_MAX, Box::pin(handshake)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%from, %error, "kubelet handshake failed"),
        Err(_elapsed) => return tracing::debug!(%from, "kubelet handshake took too long"),
    };
    let certificates = stream.get_ref().1.peer_certificates();
    let user = certificates.and_then(|chain| User::of_certificate(chain.first()?)).map(Arc::new);
    let service = service_fn(move |request: Request<Incoming>| {
        let (kubelet, user) = (Arc::clone(&kubelet), user.clone());
        async move { Ok::<_, io::Error>(kubelet.answer(request, user.as_deref()).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    if let Err(error) = Box::pin(serving).await {
        tracing::debug!(%from, %error, "a connection to the kubelet endpoint failed");
    }
}

impl Kubelet {
    async fn answer(&self, request: Request<Incoming>, certificate: Option<&User>) -> Reply {
        let user = match self.access.user(certificate, request.headers()).await {
            Ok(user) => user,
            Err(refused) => return said(&refused),
        };
        // Who may not even ask about a node is told nothing of which there are.
        let host = request.headers().get("host").and_then(|host| host.to_str().ok()).unwrap_or_default();
        let asked = request.uri().path_and_query().map_or("/", |path| path.as_str());
        let Some((node, path)) = self.places.find(asked, host).await else {
            return text(
                StatusCode::NOT_FOUND,
                "no node: name it by /nodes/NODE/..., by a pod, or by the host\n",
            );
        };
        if let Err(refused) = self.access.may(&user, request.method(), &path, &node).await {
            return said(&refused);
        }
        match self.nodes.pass(&node, request, &path).await {
            Ok(answer) => answer.map(Either::Left),
            Err(error) => {
                let code = match error {
                    Unreachable::Slow(_) => StatusCode::GATEWAY_TIMEOUT,
                    Unreachable::Broken { .. } => StatusCode::BAD_GATEWAY,
                    Unreachable::TooMany => StatusCode::TOO_MANY_REQUESTS,
                    Unreachable::Offline(_) | Unreachable::Refused { .. } => StatusCode::SERVICE_UNAVAILABLE,
                };
                text(code, &format!("{error}\n"))
            }
        }
    }
}

fn said(refused: &Refused) -> Reply {
    let code = match refused {
        Refused::Unknown => StatusCode::UNAUTHORIZED,
        Refused::Forbidden(_) => StatusCode::FORBIDDEN,
        Refused::Undecided(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    text(code, &format!("{refused}\n"))
}

fn text(code: StatusCode, body: &str) -> Reply {
    let mut reply = Response::new(Either::Right(Full::new(Bytes::from(body.to_owned()))));
    *reply.status_mut() = code;
    reply
}
