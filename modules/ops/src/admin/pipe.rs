//! A byte pipe to what else a process serves: the command line speaks HTTP to a node's own API over it.
//!
//! `GET /v1/kubernetes` with `Upgrade: octobus-pipe`: after 101 the connection is one to the API, whose peer is
//! the administrator of this machine, as everybody is who gets this far.

use std::{fmt, pin::Pin, sync::Arc};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use broker::Tasks;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Refusal;

/// What the connection becomes.
pub const PROTOCOL: &str = "octobus-pipe";
/// Where.
pub const PATH: &str = "/v1/kubernetes";

/// Both directions of a connection.
pub trait Pipe: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Pipe for T {}

/// What stands at the other end of pipes.
pub trait Pipes: fmt::Debug + Send + Sync {
    /// Serves one until it ends. Dropping it ends it.
    fn serve(&self, pipe: Box<dyn Pipe>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The route.
pub fn router(pipes: Arc<dyn Pipes>, tasks: Tasks) -> Router {
    Router::new().route(PATH, get(open)).with_state((pipes, tasks))
}

async fn open(
    State((pipes, tasks)): State<(Arc<dyn Pipes>, Tasks)>,
    mut request: Request,
) -> Result<Response, Refusal> {
    if request.headers().get(header::UPGRADE).is_none_or(|protocol| protocol != PROTOCOL) {
        let why = format!("this is a pipe: ask with `Upgrade: {PROTOCOL}`");
        return Err(Refusal::new(StatusCode::UPGRADE_REQUIRED, why));
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let stop = tasks.stopped();
    tasks.spawn("admin pipe", async move {
        let serving = async {
            match upgrade.await {
                Ok(upgraded) => pipes.serve(Box::new(TokioIo::new(upgraded))).await,
                Err(error) => tracing::debug!(%error, "an admin pipe was not opened"),
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = serving => {}
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(PROTOCOL)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}
