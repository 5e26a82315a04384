//! Health, readiness and metrics by plain HTTP: read only, no secrets.
//!
//! `/healthz` answers as long as the process turns; `/readyz` names what is not ready yet; `/metrics` is
//! Prometheus text. Whoever has counters registers a [`Collect`] that writes them.

mod links;
mod stats;
mod store;
mod text;

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use broker::{Handle, Tasks, event};
use tokio::net::TcpListener;

use crate::config::fabric::Durability;

pub use self::{
    links::links,
    store::store,
    text::{Kind, Text},
};

/// Scrapers and probes are few.
const CONNECTIONS_MAX: usize = 32;
/// Nobody is known here: a place is held no longer than this.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(30);

/// Writes one component's metrics. Called at each scrape: it reads counters, it does not compute.
pub type Collect = Arc<dyn Fn(&mut Text) + Send + Sync>;

/// What is not ready yet. Cloning shares it.
///
/// A component takes a token when it starts and drops it once it serves; so a component that dies early
/// cannot be forgotten as "not ready", and one nobody registered cannot block.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    pending: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Readiness {
    /// Not ready until the token is dropped.
    #[must_use = "dropping the token says ready"]
    pub fn register(&self, name: impl Into<String>) -> NotReady {
        let name = name.into();
        let mut pending = self.pending.lock().expect("no panic under this lock");
        *pending.entry(name.clone()).or_default() += 1;
        drop(pending);
        NotReady { name, pending: Arc::clone(&self.pending) }
    }

    /// Names of what is not ready, in order.
    #[must_use]
    pub fn pending(&self) -> Vec<String> {
        self.pending.lock().expect("no panic under this lock").keys().cloned().collect()
    }
}

/// Somebody is not ready as long as this exists.
#[derive(Debug)]
pub struct NotReady {
    name: String,
    pending: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for NotReady {
    fn drop(&mut self) {
        let mut pending = self.pending.lock().expect("no panic under this lock");
        if let Some(count) = pending.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&self.name);
            }
        }
    }
}

/// What `/metrics` and `/readyz` show. Cloning shares it.
#[derive(Clone)]
pub struct Exporter {
    broker: Option<Handle>,
    readiness: Readiness,
    collectors: Arc<Mutex<Vec<Collect>>>,
    /// What an acknowledgement survives.
    durability: Durability,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("readiness", &self.readiness).finish_non_exhaustive()
    }
}

impl Exporter {
    /// Shows a broker's counters and this readiness.
    #[must_use]
    pub fn new(broker: Option<Handle>, readiness: Readiness) -> Self {
        // The journal is flushed before anything is acknowledged.
        Self { broker, readiness, collectors: Arc::default(), durability: Durability::PowerLoss }
    }

    /// The same of a hub whose tier's servers may acknowledge earlier.
    #[must_use]
    pub fn with_durability(self, durability: Durability) -> Self {
        Self { durability, ..self }
    }

    /// Adds a component's metrics.
    pub fn register(&self, collect: Collect) {
        self.collectors.lock().expect("no panic under this lock").push(collect);
    }

    /// The routes, to be served by [`serve`] or tested without a socket.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }

    /// The whole page of metrics.
    pub async fn render(&self) -> String {
        let mut text = Text::new();
        let name = "octobus_build_info";
        text.family(name, Kind::Gauge, "Constant 1; the label is the version.");
        text.sample(name, &[("version", env!("CARGO_PKG_VERSION"))], 1);
        let name = "octobus_ready";
        text.family(name, Kind::Gauge, "1 once everything serves.");
        text.sample(name, &[], u8::from(self.readiness.pending().is_empty()));
        let name = "octobus_durability";
        text.family(name, Kind::Gauge, "Constant 1; the label says what an acknowledgement survives.");
        text.sample(name, &[("survives", self.durability.as_str())], 1);
        if let Some(broker) = &self.broker
            && let Ok(event::Response::Stats(core)) = broker.call(event::Command::Stats).await
        {
            stats::write(&core, &mut text);
        }
        let collectors = self.collectors.lock().expect("no panic under this lock").clone();
        for collect in collectors {
            collect(&mut text);
        }
        text.finish()
    }
}

/// Listens at `addr` and serves until the tasks are stopped. Returns the bound address.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(addr: SocketAddr, exporter: &Exporter, tasks: &Tasks) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(addr).await?;
    let bound = listener.local_addr()?;
    let listener = Arc::new(listener);
    let accept = move || {
        let listener = Arc::clone(&listener);
        async move { listener.accept().await.map(|(stream, _peer)| Some(stream)) }
    };
    tasks.spawn(
        "metrics",
        crate::http::serve(
            "metrics",
            tasks.clone(),
            exporter.router(),
            CONNECTIONS_MAX,
            Some(CONNECTION_LIFETIME),
            accept,
        ),
    );
    Ok(bound)
}

async fn readyz(State(exporter): State<Exporter>) -> Response {
    let pending = exporter.readiness.pending();
    if pending.is_empty() {
        return format!("ready\ndurability: {}\n", exporter.durability.as_str()).into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", pending.join(", "))).into_response()
}

async fn metrics(State(exporter): State<Exporter>) -> Response {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], exporter.render().await).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_names_what_is_missing_until_the_last_token_is_dropped() {
        let readiness = Readiness::default();
        let (front, link, again) =
            (readiness.register("mqtt front"), readiness.register("link"), readiness.register("link"));
        let tasks = Tasks::new();
        let exporter = Exporter::new(None, readiness);
        let addr = serve("127.0.0.1:0".parse().unwrap(), &exporter, &tasks).await.unwrap();
        assert!(get(addr, "/readyz").await.contains("503"));
        drop(front);
        drop(link);
        assert!(get(addr, "/readyz").await.ends_with("not ready: link\n"));
        drop(again);
        assert!(get(addr, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(get(addr, "/healthz").await.ends_with("ok\n"));
        assert!(get(addr, "/nothing").await.starts_with("HTTP/1.1 404"));
        tasks.drain(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_registered_component_is_on_the_page() {
        let exporter = Exporter::new(None, Readiness::default());
        exporter.register(Arc::new(|text: &mut Text| {
            text.family("octobus_link_reconnects_total", Kind::Counter, "Links that were dialled again.");
            text.sample("octobus_link_reconnects_total", &[("reason", "time\"out")], 3);
        }));
        let page = exporter.render().await;
        assert!(page.contains("# TYPE octobus_link_reconnects_total counter\n"));
        assert!(page.contains("octobus_link_reconnects_total{reason=\"time\\\"out\"} 3\n"));
        assert!(page.contains("octobus_ready 1\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_finishes_its_request_is_closed() {
        let tasks = Tasks::new();
        let exporter = Exporter::new(None, Readiness::default());
        let addr = serve("127.0.0.1:0".parse().unwrap(), &exporter, &tasks).await.unwrap();
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        stream.write_all(b"GET /metr").await.unwrap();
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest).await;
        assert!(ended.is_ok(), "{ended:?}");
        tasks.drain(Duration::from_secs(5)).await;
    }
}
