//! The server over a pipe, with a runtime in memory and a streaming server of the test's own.

use std::{fs, path::Path};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Response, client::conn::http1 as client, upgrade};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    net::TcpListener,
    time::timeout,
};

use super::*;
use crate::fake::{Behaviour, Fake};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct One(PodView);

impl Pods for One {
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        (self.0.namespace == namespace && self.0.name == name).then(|| self.0.clone())
    }

    fn pods(&self) -> Vec<PodView> {
        vec![self.0.clone()]
    }

    fn objects(&self) -> Vec<serde_json::Value> {
        vec![serde_json::json!({ "metadata": { "name": self.0.name } })]
    }
}

struct Node {
    fake: Fake,
    folder: tempfile::TempDir,
    server: Arc<Server>,
    tasks: Tasks,
    container: String,
}

impl Node {
    /// With a pod `ns/web` of three containers: one runs, one waits for its image, one has not been looked at yet.
    async fn new(behaviour: Behaviour) -> Self {
        let fake = Fake::default();
        fake.script("web", [behaviour]);
        fake.add_image("web", 1);
        let metadata = cri::PodSandboxMetadata { name: "web".into(), ..cri::PodSandboxMetadata::default() };
        let config = cri::PodSandboxConfig { metadata: Some(metadata), ..cri::PodSandboxConfig::default() };
        let sandbox = fake.run_sandbox(config.clone()).await.unwrap();
        let container = cri::ContainerConfig {
            image: Some(cri::ImageSpec { image: "web".into(), ..cri::ImageSpec::default() }),
            ..cri::ContainerConfig::default()
        };
        let container = fake.create_container(&sandbox, container, config).await.unwrap();
        fake.start_container(&container).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let view = |name: &str| ContainerView { name: name.into(), ..ContainerView::default() };
        let main = ContainerView {
            id: Some(container.clone()),
            running: true,
            log: Some(folder.path().join("0.log")),
            ..view("main")
        };
        let pulling = ContainerView { waiting: Some("ImagePullBackOff".into()), ..view("pulling") };
        let creating = ContainerView { waiting: Some("ContainerCreating".into()), ..view("creating") };
        let pod = PodView {
            namespace: "ns".into(),
            name: "web".into(),
            uid: "u-1".into(),
            started_at: 0,
            sandbox: Some(sandbox),
            containers: vec![main, pulling, creating],
        };
        print(folder.path(), "one\n");
        let server = Server::new("edge-1", folder.path().into(), Arc::new(fake.clone()), Arc::new(One(pod)));
        Self { fake, folder, server, tasks: Tasks::new(), container }
    }

    async fn ask(&self, method: &str, path: &str, upgrade: bool) -> Response<Incoming> {
        let (near, far) = duplex(4096);
        let (server, tasks) = (Arc::clone(&self.server), self.tasks.clone());
        self.tasks.spawn("server", async move { server.serve(far, &tasks).await });
        let (mut sender, connection) = client::handshake(TokioIo::new(near)).await.unwrap();
        self.tasks.spawn("client", async move {
            drop(connection.with_upgrades().await);
        });
        let mut request = Request::builder().method(method).uri(path).header("host", "edge-1");
        if upgrade {
            request = request.header("connection", "Upgrade").header("upgrade", "SPDY/3.1");
        }
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap()
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let response = self.ask("GET", path, false).await;
        let status = response.status().as_u16();
        let body = timeout(PATIENCE, response.into_body().collect()).await.unwrap().unwrap();
        (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
    }
}

fn print(folder: &Path, text: &str) {
    let lines: String = text.lines().map(|line| format!("2026-01-02T03:04:05Z stdout F {line}\n")).collect();
    let path = folder.join("0.log");
    let before = fs::read_to_string(&path).unwrap_or_default();
    fs::write(path, before + &lines).unwrap();
}

#[tokio::test]
async fn what_cannot_be_had_is_refused_in_kubelets_words() {
    let node = Node::new(Behaviour::forever()).await;
    for (path, status, text) in [
        ("/containerLogs/ns/none/main", 404, "pod \"none\" does not exist"),
        ("/containerLogs/ns/web/none", 404, "container \"none\" not found in pod \"web\""),
        (
            "/containerLogs/ns/web/main?previous=true",
            400,
            "previous terminated container \"main\" in pod \"web\" not found",
        ),
        (
            "/containerLogs/ns/web/pulling",
            400,
            "container \"pulling\" in pod \"web\" is waiting to start: trying and failing to pull image",
        ),
        (
            "/containerLogs/ns/web/creating",
            400,
            "container \"creating\" in pod \"web\" is waiting to start: ContainerCreating",
        ),
        ("/exec/ns/web/creating?command=ls&output=1", 500, "container not found (\"creating\")"),
        ("/exec/ns/web/other/main?command=ls&output=1", 404, "pod \"web\" does not exist"),
        ("/portForward/ns/web/other", 404, "pod \"web\" does not exist"),
        ("/nothing", 404, "404 page not found"),
    ] {
        assert_eq!(node.get(path).await, (status, format!("{text}\n")), "{path}");
    }
    node.fake.kill();
    assert_eq!(node.get("/exec/ns/web/main?command=ls&output=1").await.0, 503);
}

#[tokio::test]
async fn pods_figures_and_health_are_served() {
    let node = Node::new(Behaviour::forever()).await;
    assert_eq!(node.get("/healthz").await, (200, "ok".into()));
    let (_, pods) = node.get("/pods").await;
    let pods: serde_json::Value = serde_json::from_str(&pods).unwrap();
    assert_eq!((&pods["kind"], &pods["items"][0]["metadata"]["name"]), (&"PodList".into(), &"web".into()));
    let (_, summary) = node.get("/stats/summary").await;
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["pods"][0]["containers"][0]["memory"]["workingSetBytes"], 1 << 20);
    assert!(summary["node"]["cpu"]["usageNanoCores"].is_u64(), "{summary}");
    assert!(node.get("/metrics/resource").await.1.contains("resource_scrape_error 0"));
    node.fake.on_exec(|_, command| cri::ExecSyncResponse {
        stdout: command.join("|").into_bytes(),
        ..cri::ExecSyncResponse::default()
    });
    let run = node.ask("POST", "/run/ns/web/main?cmd=ls+-l", false).await;
    assert_eq!(run.into_body().collect().await.unwrap().to_bytes(), "ls|-l");
}

#[tokio::test]
async fn a_log_is_followed_until_its_container_has_ended() {
    let node = Node::new(Behaviour::forever()).await;
    assert_eq!(node.get("/containerLogs/ns/web/main").await, (200, "one\n".into()));
    let mut body = node.ask("GET", "/containerLogs/ns/web/main?follow=true", false).await.into_body();
    let mut next = async || {
        let frame = timeout(PATIENCE, body.frame()).await.unwrap()?;
        Some(String::from_utf8(frame.unwrap().into_data().unwrap().to_vec()).unwrap())
    };
    assert_eq!(next().await.as_deref(), Some("one\n"));
    print(node.folder.path(), "two");
    assert_eq!(next().await.as_deref(), Some("two\n"));
    node.fake.crash(&node.container, 1);
    print(node.folder.path(), "last words");
    assert_eq!(next().await.as_deref(), Some("last words\n"));
    assert_eq!(next().await, None);
}

/// A streaming server that answers one connection: it upgrades, sends back what it gets, and ends when the client has.
async fn streaming() -> (String, tokio::sync::oneshot::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (told, asked) = tokio::sync::oneshot::channel();
    Tasks::new().spawn("streaming server", async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        told.send(String::from_utf8(head).unwrap()).unwrap();
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\
                      x-stream-protocol-version: v4.channel.k8s.io\r\n\r\nfirst";
        stream.write_all(answer.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.unwrap();
        stream.write_all(&all).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    (url, asked)
}

#[tokio::test]
async fn an_upgraded_connection_is_passed_on_and_half_closed_in_each_direction() {
    let node = Node::new(Behaviour::forever()).await;
    let (url, asked) = streaming().await;
    node.fake.stream_at(&url);
    let path = "/exec/ns/web/u-1/main?command=sh&input=1&output=1";
    let mut response = node.ask("POST", path, true).await;
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["x-stream-protocol-version"], "v4.channel.k8s.io");
    let asked = timeout(PATIENCE, asked).await.unwrap().unwrap();
    assert!(asked.starts_with(&format!("POST /exec/{} HTTP/1.1\r\n", node.container)), "{asked}");
    assert!(asked.contains("upgrade: SPDY/3.1\r\n") && !asked.contains("edge-1"), "{asked}");
    let upgraded = timeout(PATIENCE, upgrade::on(&mut response)).await.unwrap().unwrap();
    let mut stream = TokioIo::new(upgraded);
    // More than all buffers on the way, and all of it before the end of the own direction.
    let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut got = vec![0; 5];
    stream.read_exact(&mut got).await.unwrap();
    assert_eq!(got, b"first");
    stream.write_all(&sent).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut back)).await.unwrap().unwrap();
    assert!(back == sent, "{} of {} bytes came back", back.len(), sent.len());
}

#[tokio::test]
async fn a_refusal_of_the_streaming_server_is_passed_on() {
    let node = Node::new(Behaviour::forever()).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    node.fake.stream_at(&format!("http://{}", listener.local_addr().unwrap()));
    node.tasks.spawn("streaming server", async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 1024];
        let read = stream.read(&mut head).await.unwrap();
        assert!(read > 0);
        let answer = "HTTP/1.1 403 Forbidden\r\ncontent-length: 6\r\n\r\nno SPD";
        stream.write_all(answer.as_bytes()).await.unwrap();
    });
    assert_eq!(node.get("/portForward/ns/web").await, (403, "no SPD".into()));
}
