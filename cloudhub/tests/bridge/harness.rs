//! A hub with its own API and a node, and everything a test asks of them.

use std::{path::Path, sync::Arc, time::Duration};

use broker::{
    Handle,
    event::{Command, Event, Expect, Front, Publish, Response, SessionOpen, StateChange, StateOp, Target},
    seal::{self, SealKey},
    tasks::Drained,
};
use cloudhub::{hub::Hub, token::TokenRequest};
use codec::proto::Want;
use edgehub::{
    edge::Edge,
    identity::Identity,
    join::{JoinOptions, join},
};
use hyper::Request;
use kube::{Client, Config, config::Kubeconfig};
use ops::config::{Config as Settings, Role, Sources};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{sleep, timeout},
};

pub(crate) const SOON: Duration = Duration::from_secs(20);
const STOP: Duration = Duration::from_secs(15);
/// How often something is looked at that nobody tells of.
const LOOK: Duration = Duration::from_millis(20);
pub(crate) const NODE: &str = "edge-1";

/// A hub, a node that is linked to it, and a client of its API.
pub(crate) struct Site {
    pub(crate) hub: Hub,
    edge: Option<Edge>,
    client: Client,
    hub_data: TempDir,
    node_data: TempDir,
}

fn settings(role: Role, data: &Path, more: &[(&'static str, &str)]) -> Settings {
    let mut flags = vec![("--data", data.display().to_string())];
    flags.extend(more.iter().map(|&(flag, value)| (flag, value.to_owned())));
    // What a node reports is what a test says.
    let env = vec![("OCTOBUS_EDGED_RUNTIME".to_owned(), "off".to_owned())];
    Settings::resolve(role, Sources { file: None, env, flags }).unwrap()
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

pub(crate) async fn start_edge(data: &Path) -> Edge {
    let flags = [
        ("--mqtt", "off"),
        ("--nats", "off"),
        ("--api", "off"),
        ("--metrics", "off"),
        ("--anonymous", "true"),
    ];
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
        let edge = Some(start_edge(node_data.path()).await);
        let client = client_of(hub.endpoints().kubeconfig.as_deref().unwrap()).await;
        Self { hub, edge, client, hub_data, node_data }
    }

    /// A site whose node is ready to run pods.
    pub(crate) async fn ready() -> Self {
        let site = Self::start().await;
        site.node_appears().await;
        site.report("node", &ready_report()).await;
        site.until_node(|node| condition(node, "Ready") == "True" && node["spec"].get("taints").is_none())
            .await;
        site
    }

    pub(crate) async fn stop(mut self) -> (TempDir, TempDir) {
        self.cut().await;
        assert_eq!(Box::pin(self.hub.stop(STOP)).await, Drained::Clean);
        (self.hub_data, self.node_data)
    }

    /// Hub and node end and start again, with what they kept.
    pub(crate) async fn restart(self) -> Self {
        let (hub_data, node_data) = self.stop().await;
        let hub = start_hub(hub_data.path(), &[("--kubernetes", "127.0.0.1:0")]).await;
        Self::over(hub, hub_data, node_data).await
    }

    /// The node ends.
    pub(crate) async fn cut(&mut self) {
        if let Some(edge) = self.edge.take() {
            assert_eq!(Box::pin(edge.stop(STOP)).await, Drained::Clean);
        }
    }

    /// The node is back.
    pub(crate) async fn mend(&mut self) {
        self.edge = Some(start_edge(self.node_data.path()).await);
    }

    pub(crate) fn node(&self) -> &Handle {
        self.edge.as_ref().unwrap().handle()
    }

    /// Requests of the bridge so far, of this verb and resource.
    pub(crate) async fn requests(&self, verb: &str, resource: &str) -> u64 {
        requests(&self.hub, verb, resource).await
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

    pub(crate) async fn until(&self, path: &str, such: impl Fn(&Value) -> bool) -> Value {
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

    /// Looks until it is so.
    pub(crate) async fn soon(what: &str, mut holds: impl AsyncFnMut() -> bool) {
        for _ in 0..SOON.as_millis() / LOOK.as_millis() {
            if holds().await {
                return;
            }
            sleep(LOOK).await;
        }
        panic!("not soon: {what}");
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
        report(self.node(), key, value).await;
    }

    /// The node publishes an event.
    pub(crate) async fn tell(&self, event: &Value) {
        let (session, _outbox) = self.node().open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: Arc::from(""),
            clean_start: true,
            expiry_s: 0,
            receive_max: 100,
            will: None,
        };
        self.node().send(Event::SessionOpened(open), 0).await.unwrap();
        let frame = codec::proto::Frame {
            topic: "$octobus/event".into(),
            payload: event.to_string().into(),
            ..Default::default()
        };
        let publish = Publish {
            target: Target::Own,
            frame: codec::encode(&frame),
            qos: 1,
            packet_id: 0,
            dup: false,
            retain: false,
            reply: None,
        };
        self.node().send(Event::Published { session, messages: vec![publish] }, 0).await.unwrap();
        self.node().send(Event::SessionClosed { session, clean: true }, 0).await.unwrap();
    }

    /// With what secrets are sealed, as the node was told when it joined.
    fn secrets_key(&self) -> SealKey {
        Identity::load(self.node_data.path()).unwrap().unwrap().secrets_key().expect("told at the enrolment")
    }

    /// What the node holds of `fleet` under a key.
    pub(crate) async fn held(&self, key: &str) -> Option<Value> {
        let value = fleet(self.node(), key).await?;
        let value = match seal::is_sealed(&value) {
            true => seal::open(&self.secrets_key(), key, &value).expect("sealed with the tier's key"),
            false => value.to_vec(),
        };
        Some(serde_json::from_slice(&value).unwrap())
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
        let want = fleet(self.node(), &format!("want/{NODE}")).await.unwrap_or_default();
        codec::decode::<Want>(want).unwrap().keys
    }
}

/// A node writes a key of its space of statuses.
pub(crate) async fn report(node: &Handle, key: &str, value: &Value) {
    let change = StateChange::Put(value.to_string().into());
    let op = StateOp { space: "status".into(), key: key.to_owned(), change, expect: Expect::Any };
    let written = node.call(Command::StateWrite(vec![op])).await.unwrap();
    assert!(matches!(written, Response::Written(_)), "{written:?}");
}

/// Requests of a hub's bridge so far, of this verb and resource, as its metrics say.
pub(crate) async fn requests(hub: &Hub, verb: &str, resource: &str) -> u64 {
    let mut stream = TcpStream::connect(hub.endpoints().metrics.unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).await.unwrap();
    let wanted = format!("octobus_kubernetes_requests_total{{verb=\"{verb}\",resource=\"{resource}\"}} ");
    page.lines().find_map(|line| line.strip_prefix(&wanted)).map_or(0, |count| count.trim().parse().unwrap())
}

/// Revision of a key of `fleet`; 0 if there is none.
pub(crate) async fn revision(handle: &Handle, key: &str) -> u64 {
    let command = Command::StateGet { origin: Arc::from(""), space: "fleet".into(), key: key.to_owned() };
    match handle.call(command).await.unwrap() {
        Response::Entry(entry) => entry.map_or(0, |entry| entry.revision),
        other => panic!("{other:?}"),
    }
}

/// Keys of `fleet` with this prefix.
pub(crate) async fn keys(handle: &Handle, prefix: &str) -> Vec<String> {
    let command = Command::StateList {
        origin: Arc::from(""),
        space: "fleet".into(),
        prefix: prefix.to_owned(),
        after: None,
        limit: 10_000,
        at: None,
    };
    match handle.call(command).await.unwrap() {
        Response::Entries { entries, .. } => entries.into_iter().map(|entry| entry.key).collect(),
        other => panic!("{other:?}"),
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
