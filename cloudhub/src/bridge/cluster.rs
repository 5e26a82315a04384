//! The API server, as the bridge asks it: every request counted, every write within the budget.
//!
//! Objects are plain JSON here: what a newer server adds to a pod goes to the node as it is.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::Stream;
use hyper::{Method, Request, header::ACCEPT, header::CONTENT_TYPE};
use kube::{
    Client, Config, Error,
    config::{KubeConfigOptions, Kubeconfig},
    core::WatchEvent,
};
use ops::metrics::{Collect, Kind, Text};
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};

use super::access;

/// A request that is not a watch is given up after this long.
const REQUEST_MAX: Duration = Duration::from_secs(30);
/// Metadata without the object, of lists and watches.
const METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
/// Merge patch: lists are replaced.
pub(super) const MERGE: &str = "application/merge-patch+json";
/// Strategic merge patch: lists with keys are merged.
pub(super) const STRATEGIC: &str = "application/strategic-merge-patch+json";

/// Where an API server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A kubeconfig.
    File(PathBuf),
    /// The cluster that this process runs in, as its service account.
    InCluster,
}

/// Why there is no way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The kubeconfig.
    #[error("{path}: {why}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// This process runs in no cluster.
    #[error(
        "this process has no service account of a cluster ({0}): name a kubeconfig instead of \"in-cluster\""
    )]
    NotInCluster(String),
    /// The client cannot be made.
    #[error("no client for the Kubernetes API: {0}")]
    Client(String),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The server said no, with this code.
    #[error("{message} ({code})")]
    Refused { code: u16, message: String },
    /// It did not answer, or not in a way that says what happened. Trying again is right.
    #[error("the Kubernetes API does not answer: {0}")]
    Unavailable(String),
}

impl CallError {
    pub(super) fn is(&self, wanted: u16) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == wanted)
    }

    /// Asking again may help.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == 429 || *code >= 500,
            Self::Unavailable(_) => true,
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::Api(status) => Self::Refused { code: status.code, message: status.message },
            other => Self::Unavailable(other.to_string()),
        }
    }
}

/// An API server. Cloning shares the connection, the budget and the counts.
#[derive(Clone)]
pub(crate) struct Cluster {
    client: Client,
    shared: Arc<Shared>,
}

struct Shared {
    budget: Budget,
    counts: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}

impl Cluster {
    /// A client. Nothing is asked yet.
    pub(crate) async fn open(source: &Source, writes_per_second: u32) -> Result<Self, ClusterError> {
        let mut config = match source {
            Source::File(path) => {
                let wrong = |error: &dyn std::fmt::Display| ClusterError::Kubeconfig {
                    path: path.clone(),
                    why: error.to_string(),
                };
                let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
                let read = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
                read.map_err(|error| wrong(&error))?
            }
            Source::InCluster => {
                Config::incluster().map_err(|error| ClusterError::NotInCluster(error.to_string()))?
            }
        };
        // What is tried again is counted, and tried with what is right by then.
        config.default_retry = false;
        let client = Client::try_from(config).map_err(|error| ClusterError::Client(error.to_string()))?;
        let shared = Shared { budget: Budget::new(writes_per_second), counts: Mutex::default() };
        Ok(Self { client, shared: Arc::new(shared) })
    }

    /// Requests by verb and resource, for `/metrics`.
    pub(super) fn metrics(&self) -> Collect {
        let shared = Arc::clone(&self.shared);
        Arc::new(move |text: &mut Text| {
            let name = "octobus_kubernetes_requests_total";
            text.family(name, Kind::Counter, "Requests of the bridge to the Kubernetes API.");
            for ((verb, resource), count) in shared.counts.lock().expect("no panic under this lock").iter() {
                text.sample(name, &[("verb", *verb), ("resource", *resource)], *count);
            }
        })
    }

    /// One object; `None` if there is none.
    pub(super) async fn get(&self, resource: &'static str, path: &str) -> Result<Option<Value>, CallError> {
        match self.call("get", resource, Method::GET, path, "", Vec::new()).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is(404) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A page of a list.
    pub(super) async fn list(
        &self,
        resource: &'static str,
        path: &str,
        metadata: bool,
    ) -> Result<Value, CallError> {
        let accept = if metadata { METADATA } else { "" };
        self.call("list", resource, Method::GET, path, accept, Vec::new()).await
    }

    /// Changes as they come.
    pub(super) async fn watch(
        &self,
        resource: &'static str,
        path: &str,
        metadata: bool,
    ) -> Result<impl Stream<Item = Result<WatchEvent<Value>, CallError>> + use<>, CallError> {
        use futures_util::StreamExt as _;
        self.count("watch", resource);
        let mut request = request(Method::GET, path, Vec::new())?;
        if metadata {
            request.headers_mut().insert(ACCEPT, METADATA.parse().expect("it is plain text"));
        }
        let events = timeout(REQUEST_MAX, self.client.request_events::<Value>(request)).await;
        let events = events.map_err(|_elapsed| CallError::Unavailable("no answer in time".to_owned()))??;
        Ok(events.map(|event| event.map_err(CallError::from)))
    }

    pub(super) async fn create(
        &self,
        resource: &'static str,
        path: &str,
        object: &Value,
    ) -> Result<Value, CallError> {
        self.shared.budget.take().await;
        let body = object.to_string().into_bytes();
        self.call("create", resource, Method::POST, path, "application/json", body).await
    }

    pub(super) async fn patch(
        &self,
        resource: &'static str,
        path: &str,
        media: &str,
        patch: &Value,
    ) -> Result<Value, CallError> {
        self.shared.budget.take().await;
        self.call("patch", resource, Method::PATCH, path, media, patch.to_string().into_bytes()).await
    }

    /// Renewals of Leases are a line of their own: they are spread by who sends them.
    pub(super) async fn renew(&self, path: &str, patch: &Value) -> Result<Value, CallError> {
        self.call("patch", "leases", Method::PATCH, path, MERGE, patch.to_string().into_bytes()).await
    }

    /// Asks a question that is answered at once and leaves nothing behind: a review.
    pub(crate) async fn review(
        &self,
        resource: &'static str,
        path: &str,
        question: &Value,
    ) -> Result<Value, CallError> {
        self.call(
            "create",
            resource,
            Method::POST,
            path,
            "application/json",
            question.to_string().into_bytes(),
        )
        .await
    }

    /// Deletes this very object; that it is gone already, or is another one by now, is well.
    pub(super) async fn delete(
        &self,
        resource: &'static str,
        path: &str,
        options: &Value,
    ) -> Result<(), CallError> {
        self.shared.budget.take().await;
        let body = options.to_string().into_bytes();
        match self.call("delete", resource, Method::DELETE, path, "application/json", body).await {
            Ok(_) => Ok(()),
            Err(error) if error.is(404) || error.is(409) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn call(
        &self,
        verb: &'static str,
        resource: &'static str,
        method: Method,
        path: &str,
        media: &str,
        body: Vec<u8>,
    ) -> Result<Value, CallError> {
        self.count(verb, resource);
        let reads = method == Method::GET;
        let mut request = request(method, path, body)?;
        if !media.is_empty() {
            let name = if reads { ACCEPT } else { CONTENT_TYPE };
            request.headers_mut().insert(name, media.parse().expect("media types are plain text"));
        }
        match timeout(REQUEST_MAX, self.client.request(request)).await {
            Ok(answer) => Ok(answer?),
            Err(_elapsed) => Err(CallError::Unavailable("no answer in time".to_owned())),
        }
    }

    fn count(&self, verb: &'static str, resource: &'static str) {
        debug_assert!(access::is_listed(verb, resource), "{verb} {resource} is no right of the bridge");
        *self.shared.counts.lock().expect("no panic under this lock").entry((verb, resource)).or_default() +=
            1;
    }
}

fn request(method: Method, path: &str, body: Vec<u8>) -> Result<Request<Vec<u8>>, CallError> {
    let request = Request::builder().method(method).uri(path).body(body);
    request.map_err(|error| CallError::Refused { code: 400, message: format!("{path}: {error}") })
}

/// Writes per second, with a second's worth at once after a pause.
#[derive(Debug)]
struct Budget {
    every: Duration,
    /// When the next write is due if none was saved up.
    next: Mutex<Instant>,
}

impl Budget {
    fn new(per_second: u32) -> Self {
        let every = Duration::from_secs(1) / per_second.max(1);
        Self { every, next: Mutex::new(Instant::now()) }
    }

    /// Waits for a turn. A turn that is dropped is spent.
    async fn take(&self) {
        let at = {
            let mut next = self.next.lock().expect("no panic under this lock");
            let saved = Instant::now().checked_sub(Duration::from_secs(1)).unwrap_or_else(Instant::now);
            *next = (*next).max(saved) + self.every;
            *next
        };
        sleep_until(at).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn writes_are_held_to_their_rate_with_a_seconds_worth_saved_up() {
        let budget = Budget::new(10);
        tokio::time::advance(Duration::from_secs(60)).await;
        let begun = Instant::now();
        for _ in 0..10 {
            budget.take().await;
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "saved up");
        for _ in 0..30 {
            budget.take().await;
        }
        assert!((2_900..=3_100).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    }
}
