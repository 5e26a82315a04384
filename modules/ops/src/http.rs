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
};
use tokio_util::sync::CancellationToken;

/// A request's head must be complete within this.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest request head, and the read buffer of a connection.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// After a failed accept (no file descriptors left) wait this long.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves connections from `accept` until the tasks are stopped, at most `connections_max` at a time;
/// one more is closed at once.
///
/// `accept` is called again after an error, so it must not be one that fails for ever at once.
pub(crate) async fn serve<IO, Accept, Accepting>(
    name: &'static str,
    tasks: Tasks,
    router: axum::Router,
    connections_max: usize,
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
                    connection(io, router, stop).await;
                    drop(slot);
                });
            }
            Ok(None) => {} // refused by `accept` itself
            Err(error) => {
                tracing::warn!(server = name, %error, "cannot accept");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn connection<IO>(io: IO, router: axum::Router, stop: CancellationToken)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    let mut connection =
        Box::pin(builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        biased;
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        ended = connection.as_mut() => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "http connection ended");
    }
}
