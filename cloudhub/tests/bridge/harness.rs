//! A hub with its own API and a node, and everything a test asks of them.

use std::{path::Path, sync::Arc, time::Duration};

use broker::{
    Handle,
    event::{Command, Expect, Response, StateChange, StateOp},
    tasks::Drained,
};
use cloudhub::{hub::Hub, token::TokenRequest};
use codec::proto::Want;
use edgehub::{
    edge::Edge,
    join::{JoinOptions, join},
};
use hyper::Request;
use kube::{Client, Config, config::Kubeconfig};
use ops::config::{Config as Settings, Role, Sources};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

const SOON: Duration = Duration::from_secs(20);
/// How often something is looked at that nobody tells of.
const LOOK: Duration = Duration::from_millis(20);
pub(crate) const NODE: &str = "edge-1";

/// A hub, a node that is linked to it, and a client of its API.
pub(crate) struct Site {
    pub(crate) hub: Hub,
    pub(crate) edge: Edge,
    client: Client,
    hub_data: TempDir,
    node_data: TempDir,
}

fn settings(role: Role, data: &Path, more: &[(&'static str, &str)]) -> Settings {
    let mut flags = vec![("--data", data.display().to_string())];
    flags.extend(more.iter().map(|&(flag, value)| (flag, value.to_owned())));
    Settings::resolve(role, Sources { file: None, env: Vec::new(), flags }).unwrap()
}

pub(crate) async fn start_hub(data: &Path, more: &[(&'static str, &str)]) -> Hub {
    let any = "127.0.0.1:0";
    let mut flags = vec![
        ("--nats", "off"),
        ("--quic", any),
        ("--websocket", any),
        ("--bootstrap", any),
        ("--metrics", any),
        ("--anonymous", "true"),
    ];
    flags.extend(more);
    Box::pin(Hub::start(&settings(Role::Cloud, data, &flags))).await.unwrap()
}

async fn start_edge(data: &Path) -> Edge {
    let flags = [("--mqtt", "off"), ("--nats", "off"), ("--metrics", "off"), ("--anonymous", "true")];
    Box::pin(Edge::start(&settings(Role::Edge, data, &flags))).await.unwrap()
}

pub(crate) async fn enrol(hub: &Hub, data: &Path, node: &str) {
    let ttl = Duration::from_secs(60);
    let token = hub.create_token(&TokenRequest { ttl, ..TokenRequest::new(node) }).await.unwrap();
    let at = format!("https://{}", hub.endpoints().bootstrap.unwrap());
    Box::pin(join(data, &JoinOptions { hub: at, token, again: false })).await.unwrap();
}

pub(crate) async fn client_of(kubeconfig: &Path) -> Client {
    let file = Kubeconfig::read_from(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(file, &kube::config::KubeConfigOptions::default()).await;
    Client::try_from(config.unwrap()).unwrap()
}

impl Site {
    pub(crate) async fn start() -> Self {
        let (hub_data, node_data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let hub = start_hub(hub_data.path(), &[("--kubernetes", "127.0.0.1:0")]).await;
        enrol(&hub, node_data.path(), NODE).await;
        Self::over(hub, hub_data, node_data).await
    }

    async fn over(hub: Hub, hub_data: TempDir, node_data: TempDir) -> Self {
        let edge = start_edge(node_data.path()).await;
        let client = client_of(hub.endpoints().kubeconfig.as_deref().unwrap()).await;
        Self { hub, edge, client, hub_data, node_data }
    }

    pub(crate) async fn stop(self, within: Duration) -> (TempDir, TempDir) {
        assert_eq!(Box::pin(self.edge.stop(within)).await, Drained::Clean);
        assert_eq!(Box::pin(self.hub.stop(within)).await, Drained::Clean);
        (self.hub_data, self.node_data)
    }

    /// Asks the API; the body of the answer, or the code of a refusal.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, u16> {
        let media = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request = Request::builder().method(method).uri(path).header("content-type", media).body(body);
        match timeout(SOON, self.client.request::<Value>(request.unwrap())).await.unwrap() {
            Ok(value) => Ok(value),
            Err(kube::Error::Api(status)) => Err(status.code),
            Err(error) => panic!("{method} {path}: {error}"),
        }
    }

    /// Creates an object of the core group in namespace default.
    pub(crate) async fn apply(&self, resource: &str, object: Value) -> Value {
        let path = format!("/api/v1/namespaces/default/{resource}");
        // The namespace and its account are made by controllers, a moment after the start.
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            match self.ask("POST", &path, Some(&object)).await {
                Ok(made) => return made,
                Err(403 | 404) => sleep(LOOK).await,
                Err(code) => panic!("{path}: {code}"),
            }
        }
        panic!("{path}: refused all the time");
    }

    /// A pod that the scheduler places on the node.
    pub(crate) async fn run(&self, name: &str, volume: Value) -> Value {
        let volumes = if volume.is_null() { json!([]) } else { json!([volume]) };
        let pod = json!({"metadata": {"name": name}, "spec": {"volumes": volumes,
            "containers": [{"name": "c", "image": "i"}]}});
        self.apply("pods", pod).await
    }

    pub(crate) async fn delete_pod(&self, name: &str, grace: u64) {
        let path = format!("/api/v1/namespaces/default/pods/{name}");
        self.ask("DELETE", &path, Some(&json!({"gracePeriodSeconds": grace}))).await.unwrap();
    }

    pub(crate) async fn node_appears(&self) {
        self.until_node(|node| node["metadata"]["labels"]["node-role.kubernetes.io/edge"] == "").await;
    }

    pub(crate) async fn until_node(&self, such: impl Fn(&Value) -> bool) -> Value {
        self.until("/api/v1/nodes/edge-1", such).await
    }

    pub(crate) async fn until_pod(&self, name: &str, such: impl Fn(&Value) -> bool) -> Value {
        self.until(&format!("/api/v1/namespaces/default/pods/{name}"), such).await
    }

    async fn until(&self, path: &str, such: impl Fn(&Value) -> bool) -> Value {
        let mut last = Ok(Value::Null);
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            last = self.ask("GET", path, None).await;
            if let Ok(object) = &last
                && such(object)
            {
                return object.clone();
            }
            sleep(LOOK).await;
        }
        panic!("{path} stays {last:?}");
    }

    pub(crate) async fn until_no_pod(&self, name: &str) {
        let path = format!("/api/v1/namespaces/default/pods/{name}");
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            if self.ask("GET", &path, None).await == Err(404) {
                return;
            }
            sleep(LOOK).await;
        }
        panic!("{name} stays");
    }

    /// The node writes a key of its space of statuses.
    pub(crate) async fn report(&self, key: &str, value: &Value) {
        let change = StateChange::Put(value.to_string().into());
        let op = StateOp { space: "status".into(), key: key.to_owned(), change, expect: Expect::Any };
        let written = self.edge.handle().call(Command::StateWrite(vec![op])).await.unwrap();
        assert!(matches!(written, Response::Written(_)), "{written:?}");
    }

    /// What the node holds of `fleet` under a key.
    pub(crate) async fn held(&self, key: &str) -> Option<Value> {
        fleet(self.edge.handle(), key).await.map(|value| serde_json::from_slice(&value).unwrap())
    }

    pub(crate) async fn until_held(&self, key: &str) -> Value {
        self.until_held_such(key, |_| true).await
    }

    pub(crate) async fn until_held_such(&self, key: &str, such: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            if let Some(value) = self.held(key).await.filter(|value| such(value)) {
                return value;
            }
            sleep(LOOK).await;
        }
        panic!("{key} at the node stays {:?}", self.held(key).await);
    }

    pub(crate) async fn until_gone(&self, key: &str) {
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            if self.held(key).await.is_none() {
                return;
            }
            sleep(LOOK).await;
        }
        panic!("{key} stays at the node");
    }

    /// A key with this prefix, once the node's want has one.
    pub(crate) async fn until_wanted(&self, prefix: &str) -> String {
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            let wanted = self.wanted().await;
            if let Some(key) = wanted.iter().find(|key| key.starts_with(prefix)) {
                return key.clone();
            }
            sleep(LOOK).await;
        }
        panic!("nothing with {prefix} is wanted: {:?}", self.wanted().await);
    }

    pub(crate) async fn wanted(&self) -> Vec<String> {
        let want = fleet(self.edge.handle(), &format!("want/{NODE}")).await.unwrap_or_default();
        codec::decode::<Want>(want).unwrap().keys
    }
}

pub(crate) async fn fleet(handle: &Handle, key: &str) -> Option<bytes::Bytes> {
    let command = Command::StateGet { origin: Arc::from(""), space: "fleet".into(), key: key.to_owned() };
    match handle.call(command).await.unwrap() {
        Response::Entry(entry) => entry.map(|entry| entry.value()),
        other => panic!("{other:?}"),
    }
}

/// Status of a condition; empty if there is none.
pub(crate) fn condition<'a>(object: &'a Value, ty: &str) -> &'a str {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.into_iter().flatten().find(|held| held["type"] == ty);
    found.and_then(|held| held["status"].as_str()).unwrap_or_default()
}

/// What the agent of a node that can run pods says.
pub(crate) fn ready_report() -> Value {
    json!({"labels": {}, "addresses": ["192.0.2.7"], "status": {
        "capacity": {"cpu": "2", "memory": "4Gi", "pods": "110"},
        "allocatable": {"cpu": "2", "memory": "4Gi", "pods": "110"},
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "ready"}],
        "nodeInfo": {"operatingSystem": "linux", "architecture": "amd64", "kubeletVersion": "v1.32.0"}}})
}
