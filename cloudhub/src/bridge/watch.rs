//! One watch of one kind for the whole tier: lists in pages, then changes, and from the beginning where the
//! server no longer knows what came since.
//!
//! ```text
//! list ──pages──> Begun, Seen*, Complete ──> watch ──Seen | Gone──> the stream ends: watch on from there
//!   ^                                          └── 410: too old ──┐
//!   └─────────────────────────────────────────────────────────────┘
//! ```
//!
//! Whatever was seen before `Begun` and not between `Begun` and `Complete` does not exist any more.

use std::time::Duration;

use futures_util::{StreamExt as _, pin_mut};
use kube::core::WatchEvent;
use serde_json::Value;
use tokio::{sync::mpsc, time::timeout};

use super::{
    Input,
    cluster::{CallError, Cluster},
    json,
};

/// Objects of one page of a list.
const PAGE: usize = 500;
/// A watch is asked to end by itself after this long, so that a dead connection is noticed.
const WATCH_SECONDS: u64 = 290;
const SILENCE_MAX: Duration = Duration::from_secs(WATCH_SECONDS + 20);
/// Between tries: doubled up to the longest, less up to a half by chance.
const WAIT_MIN: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(20);

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Watched {
    Pods,
    Nodes,
    Secrets,
    ConfigMaps,
    Accounts,
}

impl Watched {
    pub(super) const ALL: [Self; 5] =
        [Self::Pods, Self::Nodes, Self::Secrets, Self::ConfigMaps, Self::Accounts];

    pub(super) const fn resource(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Nodes => "nodes",
            Self::Secrets => "secrets",
            Self::ConfigMaps => "configmaps",
            Self::Accounts => "serviceaccounts",
        }
    }

    const fn kind(self) -> &'static str {
        match self {
            Self::Pods => "Pod",
            Self::Nodes => "Node",
            Self::Secrets => "Secret",
            Self::ConfigMaps => "ConfigMap",
            Self::Accounts => "ServiceAccount",
        }
    }

    /// Without their contents: what is needed of them is fetched.
    const fn is_metadata(self) -> bool {
        matches!(self, Self::Secrets | Self::ConfigMaps | Self::Accounts)
    }

    const fn selector(self) -> &'static str {
        match self {
            // Bound to some node.
            Self::Pods => "&fieldSelector=spec.nodeName!%3D",
            Self::Nodes => "&labelSelector=node-role.kubernetes.io%2Fedge",
            _ => "",
        }
    }
}

/// What became known.
#[derive(Debug)]
pub(super) enum Update {
    /// A list begins.
    Begun,
    /// An object as it is.
    Seen(Value),
    /// An object as it was last.
    Gone(Value),
    /// The list is complete.
    Complete,
}

/// The receiver is gone.
struct Over;

/// Follows a kind until the receiver is gone.
pub(super) async fn follow(cluster: Cluster, what: Watched, out: mpsc::Sender<Input>) {
    let mut wait = WAIT_MIN;
    let mut version = None;
    loop {
        let result = match version.take() {
            None => list(&cluster, what, &out).await,
            Some(version) => changes(&cluster, what, version, &out).await,
        };
        match result {
            Ok(Ok(next)) => {
                version = next;
                wait = WAIT_MIN;
            }
            Ok(Err(Over)) => return,
            Err((error, next)) => {
                version = next;
                tracing::warn!(resource = what.resource(), %error, "a watch of the Kubernetes API ended");
                tokio::time::sleep(jittered(wait)).await;
                wait = (wait * 2).min(WAIT_MAX);
            }
        }
        if out.is_closed() {
            return;
        }
    }
}

/// What to go on from, or why not and what to go on from.
type Step = Result<Result<Option<String>, Over>, (CallError, Option<String>)>;

async fn list(cluster: &Cluster, what: Watched, out: &mpsc::Sender<Input>) -> Step {
    let mut next = String::new();
    let mut begun = false;
    loop {
        let resource = what.resource();
        let path = format!("/api/v1/{resource}?limit={PAGE}{}{next}", what.selector());
        let mut page =
            cluster.list(resource, &path, what.is_metadata()).await.map_err(|error| (error, None))?;
        if !begun {
            begun = true;
            if out.send(Input::Watched(what, Update::Begun)).await.is_err() {
                return Ok(Err(Over));
            }
        }
        let items = match page.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => items,
            _ => Vec::new(),
        };
        for mut object in items {
            // A list says once what its items are.
            if let Some(object) = object.as_object_mut() {
                object.insert("apiVersion".to_owned(), "v1".into());
                object.insert("kind".to_owned(), what.kind().into());
            }
            if out.send(Input::Watched(what, Update::Seen(object))).await.is_err() {
                return Ok(Err(Over));
            }
        }
        let token = json::text(&page, "metadata.continue");
        if token.is_empty() {
            let version = json::text(&page, "metadata.resourceVersion").to_owned();
            let told = out.send(Input::Watched(what, Update::Complete)).await;
            return Ok(told.map(|()| Some(version)).map_err(|_gone| Over));
        }
        next = format!("&continue={}", escaped(token));
    }
}

async fn changes(cluster: &Cluster, what: Watched, mut version: String, out: &mpsc::Sender<Input>) -> Step {
    let resource = what.resource();
    let path = format!(
        "/api/v1/{resource}?watch=true&allowWatchBookmarks=true&timeoutSeconds={WATCH_SECONDS}\
         &resourceVersion={version}{}",
        what.selector()
    );
    let keep = |error: CallError, version: String| {
        let version = (!error.is(410)).then_some(version);
        (error, version)
    };
    let events = match cluster.watch(resource, &path, what.is_metadata()).await {
        Ok(events) => events,
        Err(error) => return Err(keep(error, version)),
    };
    pin_mut!(events);
    loop {
        let event = tokio::select! {
            biased;
            () = out.closed() => return Ok(Err(Over)),
            event = timeout(SILENCE_MAX, events.next()) => event,
        };
        let event = match event {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(error))) => return Err(keep(error, version)),
            Ok(None) => return Ok(Ok(Some(version))),
            Err(_elapsed) => {
                let error = CallError::Unavailable("a watch fell silent".to_owned());
                return Err((error, Some(version)));
            }
        };
        let update = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                json::text(&object, "metadata.resourceVersion").clone_into(&mut version);
                Update::Seen(object)
            }
            WatchEvent::Deleted(object) => {
                json::text(&object, "metadata.resourceVersion").clone_into(&mut version);
                Update::Gone(object)
            }
            WatchEvent::Bookmark(bookmark) => {
                version = bookmark.metadata.resource_version;
                continue;
            }
            WatchEvent::Error(status) => {
                let error = CallError::Refused { code: status.code, message: status.message.clone() };
                return Err(keep(error, version));
            }
        };
        if out.send(Input::Watched(what, update)).await.is_err() {
            return Ok(Err(Over));
        }
    }
}

fn jittered(wait: Duration) -> Duration {
    let mut bytes = [0; 2];
    // Without randomness there is no jitter, and nothing else is lost.
    let share = getrandom::fill(&mut bytes).map_or(0.0, |()| f64::from(u16::from_le_bytes(bytes)) / 65_536.0);
    wait.mul_f64(1.0 - share / 2.0)
}

/// A value of a query.
pub(super) fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    let each = text.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::{Router, extract::Query, routing::get};
    use serde_json::json;

    use super::{super::cluster::Source, *};

    type Asked = Arc<Mutex<Vec<String>>>;

    /// A server that lists `a` and `b` in two pages, then `c` alone; whose first watch shows a change and then
    /// knows no more.
    async fn server(asked: Asked) -> tempfile::NamedTempFile {
        let answer = move |Query(query): Query<std::collections::BTreeMap<String, String>>| {
            let asked = Arc::clone(&asked);
            async move {
                let said = |name: &str| query.get(name).cloned().unwrap_or_default();
                let what = format!("{}{}", said("continue"), said("resourceVersion"));
                let again = {
                    let mut asked = asked.lock().unwrap();
                    asked.push(what.clone());
                    asked.iter().filter(|asked| asked.is_empty()).count() > 1
                };
                let item = |name: &str| json!({"metadata": {"name": name, "namespace": "n", "resourceVersion": "5"}});
                let list = |name: &str, next: &str| {
                    json!({"metadata": {"resourceVersion": "9", "continue": next}, "items": [item(name)]})
                        .to_string()
                };
                match (what.as_str(), again) {
                    ("", false) => list("a", "tok/en"),
                    ("tok/en", false) => list("b", ""),
                    ("", true) => list("c", ""),
                    ("9", false) => {
                        let event = json!({"type": "MODIFIED", "object": item("a")});
                        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}});
                        format!("{event}\n{gone}\n")
                    }
                    _ => std::future::pending().await,
                }
            }
        };
        let app = Router::new().route("/api/v1/secrets", get(answer));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = broker::Tasks::new();
        tasks.spawn("test server", async move { drop(axum::serve(listener, app).await) });
        let file = tempfile::NamedTempFile::new().unwrap();
        let config = json!({"current-context": "c", "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "c", "user": {}}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}]});
        std::fs::write(file.path(), config.to_string()).unwrap();
        file
    }

    #[tokio::test]
    async fn what_is_too_old_to_go_on_from_is_listed_anew() {
        let asked = Asked::default();
        let file = server(Arc::clone(&asked)).await;
        let cluster = Cluster::open(&Source::File(file.path().to_owned()), 10).await.unwrap();
        let (out, mut inputs) = mpsc::channel(1);
        let tasks = broker::Tasks::new();
        tasks.spawn("test watch", follow(cluster, Watched::Secrets, out));
        let mut told = Vec::new();
        while told.len() < 8 {
            let input = timeout(Duration::from_secs(20), inputs.recv()).await.unwrap().unwrap();
            let Input::Watched(Watched::Secrets, update) = input else { panic!("{input:?}") };
            told.push(match update {
                Update::Begun => "begun".to_owned(),
                Update::Complete => "complete".to_owned(),
                Update::Seen(object) => json::text(&object, "metadata.name").to_owned(),
                Update::Gone(_) => "gone".to_owned(),
            });
        }
        assert_eq!(told, ["begun", "a", "b", "complete", "a", "begun", "c", "complete"]);
        drop(inputs);
        let asked = asked.lock().unwrap().clone();
        assert_eq!(asked[..4], ["", "tok/en", "9", ""]);
    }
}
