//! Administration over a unix socket: HTTP/1.1, JSON and NDJSON.
//!
//! The socket stands in a folder of mode 0700 and has mode 0600, and the peer of every connection is
//! asked of the kernel: only root and the user of this process are answered. So the routes themselves
//! need no authentication, and no TCP port ever serves them.
//!
//! | route | answers |
//! |---|---|
//! | `GET /v1/logs?node=` | [`LogRow`](crate::api::LogRow)s |
//! | `GET /v1/log?node=&stream=&from=&topic=&follow=` | NDJSON of [`Entry`](crate::api::Entry) |
//! | `GET /v1/sessions`, `GET /v1/conditions` | rows |
//! | `GET /v1/state?origin=&space=&prefix=&at=` | NDJSON of [`StateRow`](crate::api::StateRow) |
//! | `POST /v1/state` | [`WriteOp`](crate::api::WriteOp)s, all or none: [`Written`](crate::api::Written) |
//! | `GET`, `PUT`, `DELETE /v1/state/entry?space=&key=&revision=&create=` | one entry; the body is its value |
//! | `GET /v1/state/watch?origin=&space=&prefix=&from=&previous=` | NDJSON of [`WatchRow`](crate::api::WatchRow) |
//! | `GET`, `POST /v1/state/want?node=&action=` | the keys that a node must have |
//! | `POST /v1/state/intent?space=&key=&node=&delete=&force=`, `GET ...?id=&node=` | asks the owner; its answer |
//! | `POST /v1/state/barrier`, `POST /v1/state/accept-removal?node=` | what an operator says of `fleet` |
//! | `GET /v1/stats` | the page of metrics |
//! | `POST /v1/backup?to=` | NDJSON of one [`Manifest`](broker::store::backup::Manifest), or a problem |
//! | `GET /v1/ping?node=&count=&bytes=` | a [`PingRow`](crate::api::PingRow): an echo over a link |
//! | `POST /v1/publish?topic=&node=&qos=&retain=` | done, once durable for QoS 1; the body is the payload |
//! | `GET /v1/kubernetes`, upgraded | a connection to the node's own API ([`pipe`]) |
//! | `GET /v1/subscribe?filter=&node=` | NDJSON of [`MessageRow`](crate::api::MessageRow), without end |
//!
//! Whoever composes the process merges further routes into the router (`POST /v1/tokens` at a hub).

pub mod backup;
mod client_session;
mod logs;
mod messages;
mod ping;
pub mod pipe;
mod state;
mod stream;
pub mod tier;

use std::{
    os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use broker::{Handle, Tasks, event, event::Command, limits, link::Links};
use tokio::net::{UnixListener, UnixStream};

use crate::{
    api::{ConditionRow, Problem, SessionRow},
    metrics::Exporter,
};

/// People and scripts are few; a follower holds its connection.
const CONNECTIONS_MAX: usize = 64;

/// Why the admin socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// A path of a unix socket has at most 107 bytes.
    #[error(
        "the path of the admin socket is too long ({length} bytes, at most 107): name a shorter one with --admin"
    )]
    PathTooLong { length: usize },
    /// Something else than a socket is there; it was left alone.
    #[error("{path} exists and is not a socket: remove it, or name another path with --admin")]
    NotASocket { path: PathBuf },
    /// Somebody serves it.
    #[error("{path} is served by another process: stop that one, or name another path with --admin")]
    InUse { path: PathBuf },
    /// The file system says no.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
}

/// A bound admin socket. Dropping it (the task that serves it does) removes the file.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminSocket {
    /// Binds the socket, replacing one that a dead process left behind. Needs a runtime.
    ///
    /// # Errors
    /// See [`AdminError`].
    pub fn bind(path: &Path) -> Result<Self, AdminError> {
        let length = path.as_os_str().len();
        if length > 107 {
            return Err(AdminError::PathTooLong { length });
        }
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| AdminError::Io { doing, path, source }
        };
        if let Some(folder) =
            path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        {
            let mut builder = std::fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(folder).map_err(io("create", folder))?;
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(io("listen at", path))?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, mode).map_err(io("set the mode of", path))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves the router until the tasks are stopped.
    pub fn serve(self, router: Router, tasks: &Tasks) {
        let router = router.layer(DefaultBodyLimit::max(limits::FRAME_MAX));
        let own = rustix::process::geteuid().as_raw();
        let socket = Arc::new(self);
        let accept = move || {
            let socket = Arc::clone(&socket);
            async move {
                let (stream, _address) = socket.listener.accept().await?;
                Ok(is_permitted(&stream, own).then_some(stream))
            }
        };
        let serving = crate::http::serve("admin", tasks.clone(), router, CONNECTIONS_MAX, None, accept);
        tasks.spawn("admin", serving);
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "admin socket was already gone");
        }
    }
}

/// A socket file that nobody serves is removed; the data folder's lock, taken before, keeps a second
/// process from racing here.
fn remove_stale(path: &Path) -> Result<(), AdminError> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    let path = path.to_owned();
    if !meta.file_type().is_socket() {
        return Err(AdminError::NotASocket { path });
    }
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(AdminError::InUse { path });
    }
    std::fs::remove_file(&path).map_err(|source| AdminError::Io { doing: "remove the stale", path, source })
}

/// SO_PEERCRED: the kernel says who connected.
fn is_permitted(stream: &UnixStream, own: u32) -> bool {
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == own => true,
        Ok(peer) => {
            tracing::warn!(
                uid = peer.uid(),
                "refused at the admin socket: neither root nor this process's user"
            );
            false
        }
        Err(error) => {
            tracing::warn!(%error, "refused at the admin socket: the peer cannot be known");
            false
        }
    }
}

/// What the routes need.
#[derive(Debug, Clone)]
pub struct Admin {
    /// The broker.
    pub broker: Handle,
    /// Where streaming answers run.
    pub tasks: Tasks,
    /// What `GET /v1/stats` shows.
    pub exporter: Exporter,
    /// What `GET /v1/ping` goes over.
    pub links: Arc<Links>,
    /// Of a hub: who owns the tier's State. Subscriptions that name no node see every node's topics; on a node,
    /// where there is none, its own.
    pub tier: Option<Arc<dyn tier::Tier>>,
}

impl Admin {
    fn is_hub(&self) -> bool {
        self.tier.is_some()
    }

    /// Writes State that this process or its tier owns.
    async fn write(&self, command: Command) -> Result<event::Response, broker::Stopped> {
        match &self.tier {
            Some(tier) => tier.write(command).await,
            None => self.broker.call(command).await,
        }
    }
}

/// The routes.
pub fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/logs", get(logs::list))
        .route("/v1/log", get(logs::read))
        .route("/v1/sessions", get(sessions))
        .route("/v1/conditions", get(conditions))
        .route("/v1/state", get(state::list).post(state::write))
        .route("/v1/state/entry", get(state::get).put(state::put).delete(state::delete))
        .route("/v1/state/watch", get(state::watch))
        .route("/v1/state/want", get(state::wants).post(state::want))
        .route("/v1/state/intent", get(state::answer).post(state::intend))
        .route("/v1/state/barrier", post(state::barrier))
        .route("/v1/state/accept-removal", post(state::accept_removal))
        .route("/v1/stats", get(stats))
        .route("/v1/ping", get(ping::ping))
        .route("/v1/publish", post(messages::publish))
        .route("/v1/subscribe", get(messages::subscribe))
        .with_state(admin)
}

/// An answer that is not 2xx: JSON [`Problem`].
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    /// A refusal that says what it is and what to do.
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: error.into() }
    }

    fn bad(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, error)
    }
}

impl From<broker::Stopped> for Refusal {
    fn from(stopped: broker::Stopped) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, stopped.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(Problem { error: self.error })).into_response()
    }
}

/// The broker answered something that does not belong to the question, or refused it.
fn unexpected(response: event::Response) -> Refusal {
    match response {
        event::Response::Refused(reason) => Refusal::new(StatusCode::CONFLICT, reason),
        other => {
            tracing::error!(?other, "the broker's answer does not fit the question");
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the broker's answer does not fit the question")
        }
    }
}

async fn sessions(State(admin): State<Admin>) -> Result<Json<Vec<SessionRow>>, Refusal> {
    match admin.broker.call(Command::Sessions).await? {
        event::Response::Sessions(sessions) => Ok(Json(sessions.iter().map(SessionRow::from).collect())),
        other => Err(unexpected(other)),
    }
}

async fn conditions(State(admin): State<Admin>) -> Result<Json<Vec<ConditionRow>>, Refusal> {
    match admin.broker.call(Command::Conditions).await? {
        event::Response::Conditions(all) => Ok(Json(all.iter().map(ConditionRow::from).collect())),
        other => Err(unexpected(other)),
    }
}

async fn stats(State(admin): State<Admin>) -> String {
    admin.exporter.render().await
}

#[cfg(test)]
mod tests;
