//! Serving HTTP/1.1 with bounds: how many connections, how large a header, how long a peer may dawdle.

use std::{sync::Arc, time::Duration};

use broker::Tasks;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// A request's head must be complete within this.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest request head, and the read buffer of a connection.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// What is being answered when a connection is to end has this long to be read.
const END_MAX: Duration = Duration::from_secs(2);
/// After a failed accept (no file descriptors left) wait this long.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves connections from `accept` until the tasks are stopped, at most `connections_max` at a time;
/// one more is closed at once. With `lifetime`, each is ended after that long.
///
/// `accept` is called again after an error, so it must not be one that fails for ever at once.
pub(crate) async fn serve<IO, Accept, Accepting>(
    name: &'static str,
    tasks: Tasks,
    router: axum::Router,
    connections_max: usize,
    lifetime: Option<Duration>,
    mut accept: Accept,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    Accept: FnMut() -> Accepting,
    Accepting: Future<Output = std::io::Result<Option<IO>>>,
{
    let stop = tasks.stopped();
    let slots = Arc::new(Semaphore::new(connections_max));
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = accept() => accepted,
        };
        match accepted {
            Ok(Some(io)) => {
                let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                    tracing::debug!(server = name, connections_max, "too many connections, one closed");
                    continue;
                };
                let (router, stop) = (router.clone(), stop.clone());
                tasks.spawn(name, async move {
                    connection(io, router, lifetime, stop).await;
                    drop(slot);
                });
            }
            Ok(None) => {} // refused by `accept` itself
            Err(error) => {
                tracing::warn!(server = name, %error, "cannot accept");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn connection<IO>(io: IO, router: axum::Router, lifetime: Option<Duration>, stop: CancellationToken)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    let mut connection = Box::pin(
        builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(router)).with_upgrades(),
    );
    let lived = async {
        match lifetime {
            Some(lifetime) => sleep(lifetime).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        biased;
        () = stop.cancelled() => None,
        ended = connection.as_mut() => Some(ended),
        () = lived => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            match timeout(END_MAX, connection).await {
                Ok(ended) => ended,
                Err(_elapsed) => return tracing::debug!("http connection cut: its peer does not read"),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "http connection ended");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncWriteExt as _, DuplexStream},
        time::Instant,
    };

    use super::*;

    /// Asks for more than it will ever read.
    async fn mute() -> (DuplexStream, DuplexStream, axum::Router) {
        let (mut peer, io) = tokio::io::duplex(256);
        peer.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        (peer, io, axum::Router::new().route("/", get(|| async { vec![0; 1 << 20] })))
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_is_cut_at_the_end_of_its_lifetime() {
        let (_peer, io, router) = mute().await;
        let began = Instant::now();
        let lifetime = Duration::from_secs(30);
        connection(io, router, Some(lifetime), CancellationToken::new()).await;
        assert!(began.elapsed() < lifetime + END_MAX + Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_delays_the_stop_by_two_seconds_at_most() {
        let (_peer, io, router) = mute().await;
        let (began, stop) = (Instant::now(), CancellationToken::new());
        let stopping = async {
            sleep(Duration::from_secs(60)).await;
            stop.cancel();
        };
        tokio::join!(connection(io, router, None, stop.clone()), stopping);
        assert!(began.elapsed() >= Duration::from_secs(60), "it has no lifetime");
        assert!(began.elapsed() < Duration::from_secs(63), "{:?}", began.elapsed());
    }
}
