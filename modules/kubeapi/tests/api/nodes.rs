//! Logs, exec, attach and port-forward, against a node that is a small HTTP server behind an in-memory pipe.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, combinators::BoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use kubeapi::nodes::{NodeStreams, Opening, Unreachable};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    sync::{mpsc, watch},
    time::timeout,
};

use super::client::{TestServer, token, value_of};

const PATIENCE: Duration = Duration::from_secs(10);

/// A node, and how to find out what it sees.
#[derive(Debug)]
pub(crate) struct StandIn {
    /// Bytes that followers were sent.
    sent: AtomicU64,
    /// Streams that are open.
    open: watch::Sender<usize>,
    asked: mpsc::UnboundedSender<String>,
}

#[derive(Debug)]
pub(crate) struct StandIns(Arc<StandIn>);

impl StandIns {
    pub(crate) fn new() -> (Arc<Self>, Arc<StandIn>, mpsc::UnboundedReceiver<String>) {
        #[allow(clippy::disallowed_methods)] // as many as the test asks
        let (asked, asks) = mpsc::unbounded_channel();
        let node = Arc::new(StandIn { sent: AtomicU64::new(0), open: watch::Sender::new(0), asked });
        (Arc::new(Self(Arc::clone(&node))), node, asks)
    }
}

impl NodeStreams for StandIns {
    fn open<'a>(&'a self, node: &'a str) -> Opening<'a> {
        Box::pin(async move {
            if node != "edge-1" {
                return Err(Unreachable::Offline(node.to_owned()));
            }
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            let node = Arc::clone(&self.0);
            #[allow(clippy::disallowed_methods)] // it ends with its pipe
            tokio::spawn(async move { node.serve(theirs).await });
            Ok(Box::new(ours) as _)
        })
    }
}

impl StandIn {
    async fn serve(self: Arc<Self>, pipe: DuplexStream) {
        self.open.send_modify(|open| *open += 1);
        let node = Arc::clone(&self);
        let service = service_fn(move |request| Arc::clone(&node).answer(request));
        let served =
            http1::Builder::new().serve_connection(TokioIo::new(pipe), service).with_upgrades().await;
        drop(served);
        self.open.send_modify(|open| *open -= 1);
    }

    async fn until_none_is_open(&self) {
        let mut open = self.open.subscribe();
        timeout(PATIENCE, open.wait_for(|open| *open == 0)).await.expect("Streams end").unwrap();
    }

    async fn answer(
        self: Arc<Self>,
        mut request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, std::io::Error>>, std::convert::Infallible> {
        let whole = |text: &str| {
            http_body_util::Full::new(Bytes::from(text.to_owned())).map_err(|never| match never {}).boxed()
        };
        self.asked.send(format!("{} {} {:?}", request.method(), request.uri(), request.headers())).unwrap();
        let path = request.uri().path().to_owned();
        let answer = |status: u16, body| Response::builder().status(status).body(body).unwrap();
        Ok(match path.as_str() {
            "/containerLogs/default/p/c" => answer(200, whole("a line\n")),
            "/containerLogs/default/p/waiting" => {
                answer(400, whole("container \"waiting\" in pod \"p\" is waiting to start"))
            }
            "/containerLogs/default/p/cut" => {
                let (body, pieces) = channel();
                #[allow(clippy::disallowed_methods)] // two pieces
                tokio::spawn(async move {
                    pieces.send(Ok(Frame::data("half a l".into()))).await.unwrap();
                    pieces.send(Err(std::io::ErrorKind::BrokenPipe.into())).await.unwrap();
                });
                answer(200, body)
            }
            "/containerLogs/default/p/endless" => {
                let (body, pieces) = channel();
                #[allow(clippy::disallowed_methods)] // it ends when nobody reads
                tokio::spawn(async move {
                    while pieces.send(Ok(Frame::data(vec![b'x'; 4096].into()))).await.is_ok() {
                        self.sent.fetch_add(4096, Ordering::Relaxed);
                    }
                });
                answer(200, body)
            }
            path if path.starts_with("/exec/") => {
                let upgraded = hyper::upgrade::on(&mut request);
                #[allow(clippy::disallowed_methods)] // it ends with its pipe
                tokio::spawn(async move {
                    // Everything until the client's end, and only then the answer: a half-close.
                    let mut pipe = TokioIo::new(upgraded.await.unwrap());
                    let mut all = Vec::new();
                    pipe.read_to_end(&mut all).await.unwrap();
                    all.reverse();
                    pipe.write_all(&all).await.unwrap();
                    pipe.shutdown().await.unwrap();
                });
                let switch = Response::builder().status(101).header("connection", "Upgrade");
                switch.header("upgrade", "SPDY/3.1").body(whole("")).unwrap()
            }
            "/stats/summary" => {
                let used = json!({"cpu": {"time": "2026-01-02T03:04:05Z", "usageNanoCores": 250_000_000_u64},
                    "memory": {"workingSetBytes": 64 << 20}});
                let mut container = used.clone();
                container["name"] = json!("c");
                let pod = json!({"podRef": {"namespace": "default", "name": "p"}, "containers": [container]});
                answer(200, whole(&json!({"node": used, "pods": [pod]}).to_string()))
            }
            _ => answer(404, whole("no such path")),
        })
    }
}

/// A piece of a body.
type Piece = Result<Frame<Bytes>, std::io::Error>;

fn channel() -> (BoxBody<Bytes, std::io::Error>, mpsc::Sender<Piece>) {
    struct Pieces(mpsc::Receiver<Piece>);
    impl hyper::body::Body for Pieces {
        type Data = Bytes;
        type Error = std::io::Error;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            cx: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
            self.0.poll_recv(cx)
        }
    }
    let (sender, receiver) = mpsc::channel(1);
    (Pieces(receiver).boxed(), sender)
}

async fn with_pod(server: &TestServer, name: &str, node: &str) {
    let containers: Vec<_> =
        ["c", "waiting", "cut", "endless"].iter().map(|name| json!({"name": name, "image": "i"})).collect();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"containers": containers, "nodeName": node, "tolerations": [{"operator": "Exists"}]},
    });
    super::semantics::until(async || {
        server.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).await.0 == 200
    })
    .await;
    let (code, said) = server.ask("POST", "/api/v1/namespaces/default/pods", Some(&pod)).await;
    assert_eq!(code, 201, "{said}");
}

fn pod(rest: &str) -> String {
    format!("/api/v1/namespaces/default/pods/p/{rest}")
}

#[tokio::test]
async fn what_a_container_wrote_comes_from_its_node_and_a_refusal_as_a_status() {
    let (nodes, node, mut asks) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    with_pod(&server, "p", "edge-1").await;
    let answer = server.send("GET", &pod("log?container=c&tailLines=3"), &[], None).await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"text/plain".parse().unwrap())
    );
    assert_eq!(value_of(answer).await, "a line\n");
    let asked = asks.recv().await.unwrap();
    assert!(asked.starts_with("GET /containerLogs/default/p/c?tailLines=3"), "{asked}");
    assert!(!asked.contains("admin-token"), "{asked}");

    let (code, said) = server.ask("GET", &pod("log?container=waiting"), None).await;
    assert_eq!((code, said["reason"].as_str().unwrap()), (400, "BadRequest"));
    assert_eq!(said["message"], "container \"waiting\" in pod \"p\" is waiting to start");
    let (code, said) = server.ask("GET", &pod("log"), None).await;
    assert_eq!(code, 400, "{said}");
    let (code, said) = server.ask("GET", "/api/v1/nodes/edge-1/proxy/stats/summary?x=1", None).await;
    assert_eq!((code, &said["pods"][0]["podRef"]["name"]), (200, &json!("p")));
    let (code, _) = server.ask("PUT", &pod("log?container=c"), None).await;
    assert_eq!(code, 405);
    node.until_none_is_open().await;
    server.stop().await;
}

#[tokio::test]
async fn an_offline_node_is_said_at_once_and_not_to_be_asked_again() {
    let (nodes, ..) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    with_pod(&server, "p", "edge-9").await;
    let answer = server.send("GET", &pod("log?container=c"), &[], None).await;
    assert_eq!(answer.status(), 503);
    assert!(!answer.headers().contains_key("retry-after"), "clients would try in silence");
    let said = value_of(answer).await;
    assert_eq!(said["message"], "node edge-9 is offline: no link to it is up");
    server.stop().await;
}

#[tokio::test]
async fn who_hangs_up_ends_the_stream_and_who_reads_slowly_holds_back_the_node() {
    let (nodes, node, _asks) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    with_pod(&server, "p", "edge-1").await;
    let mut client = server.connect().await;
    let request = format!(
        "GET {} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\n\r\n",
        pod("log?container=endless&follow=true"),
        super::client::ADMIN
    );
    client.write_all(request.as_bytes()).await.unwrap();
    client.read_exact(&mut [0; 64]).await.unwrap();
    // The node stands still once all buffers on the way are full, those of the sockets included.
    let mut seen = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = node.sent.load(Ordering::Relaxed);
        if now == seen {
            break;
        }
        seen = now;
    }
    assert!(seen < 16 << 20, "{seen} bytes wait for a reader that does not read");
    drop(client);
    node.until_none_is_open().await;
    server.stop().await;
}

#[tokio::test]
async fn what_was_cut_off_never_looks_complete() {
    let (nodes, node, _asks) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    with_pod(&server, "p", "edge-1").await;
    let answer = server.send("GET", &pod("log?container=cut"), &[], None).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.into_body().collect().await.is_err());
    node.until_none_is_open().await;
    server.stop().await;
}

#[tokio::test]
async fn an_upgraded_connection_is_two_pipes_that_end_by_themselves() {
    let (nodes, _node, mut asks) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    with_pod(&server, "p", "edge-1").await;
    let mut client = server.connect().await;
    let request = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\nconnection: Upgrade\r\nupgrade: SPDY/3.1\r\n\
         x-stream-protocol-version: v4.channel.k8s.io\r\ncontent-length: 0\r\n\r\n",
        pod("exec?container=c&command=rev&stdin=true&stdout=true"),
        super::client::ADMIN
    );
    client.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: spdy/3.1"), "{head}");
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    client.write_all(&sent).await.unwrap();
    client.shutdown().await.unwrap();
    let mut back = Vec::new();
    timeout(PATIENCE, client.read_to_end(&mut back)).await.unwrap().unwrap();
    assert!(back.iter().eq(sent.iter().rev()), "{} bytes of {}", back.len(), sent.len());
    let asked = asks.recv().await.unwrap();
    assert!(asked.contains("command=rev") && asked.contains("x-stream-protocol-version"), "{asked}");
    server.stop().await;
}

#[tokio::test]
async fn a_websocket_needs_the_right_to_create_and_a_protocol_that_runtimes_speak() {
    let (nodes, _node, mut asks) = StandIns::new();
    let reader = token("reader", "reader", &[]);
    let server = TestServer::with(vec![reader], Some(nodes)).await;
    with_pod(&server, "p", "edge-1").await;
    let rule = json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods/exec"]});
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "r"}, "rules": [rule]});
    let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
    assert_eq!(server.ask("POST", roles, Some(&role)).await.0, 201);
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "r"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "r"},
        "subjects": [{"kind": "User", "name": "reader", "apiGroup": "rbac.authorization.k8s.io"}],
    });
    let bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
    assert_eq!(server.ask("POST", bindings, Some(&binding)).await.0, 201);
    let ask = async |who: &str, protocol: &str| {
        let headers = [
            ("authorization", who),
            ("connection", "Upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-protocol", protocol),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let answer = server.send("GET", &pod("exec?container=c&command=x&stdout=1"), &headers, None).await;
        (answer.status().as_u16(), value_of(answer).await)
    };
    super::semantics::until(async || {
        ask("Bearer reader", "v4.channel.k8s.io").await.1["message"]
            .as_str()
            .unwrap()
            .contains("cannot create resource")
    })
    .await;
    let (code, said) = ask("Bearer admin-token", "v5.channel.k8s.io").await;
    assert_eq!(code, 400, "{said}");
    assert!(asks.try_recv().is_err(), "the node was not asked");
    server.stop().await;
}

#[tokio::test]
async fn what_nodes_and_pods_use_is_asked_of_those_that_answer_and_once() {
    let (nodes, _node, mut asks) = StandIns::new();
    let server = TestServer::with(Vec::new(), Some(nodes)).await;
    for node in ["edge-1", "edge-9"] {
        super::workloads::node(&server, node).await;
    }
    with_pod(&server, "p", "edge-1").await;
    with_pod(&server, "q", "edge-9").await;
    let group = "/apis/metrics.k8s.io/v1beta1";
    super::semantics::until(async || {
        let (code, listed) = server.ask("GET", &format!("{group}/nodes"), None).await;
        code == 200 && listed["items"].as_array().unwrap().len() == 1
    })
    .await;
    let (_, listed) = server.ask("GET", &format!("{group}/nodes?labelSelector=zone%3Dedge-1"), None).await;
    assert_eq!(listed["kind"], "NodeMetricsList");
    assert_eq!(listed["items"][0]["usage"], json!({"cpu": "250000000n", "memory": "65536Ki"}));
    assert_eq!(listed["items"][0]["metadata"]["labels"]["zone"], "edge-1");
    let (_, listed) = server.ask("GET", &format!("{group}/pods"), None).await;
    assert_eq!(listed["items"].as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed["items"][0]["containers"][0]["name"], "c");
    let one = format!("{group}/namespaces/default/pods");
    assert_eq!(server.ask("GET", &format!("{one}/p"), None).await.1["kind"], "PodMetrics");
    assert_eq!(server.ask("GET", &format!("{one}/q"), None).await.0, 404);
    assert_eq!(server.ask("POST", &one, Some(&json!({}))).await.0, 405);
    assert!(asks.recv().await.unwrap().starts_with("GET /stats/summary"));
    assert!(asks.try_recv().is_err(), "one answer serves everybody for a while");

    if super::kubectl::is_installed().await {
        let kubectl = super::kubectl::Kubectl::new(&server);
        let top = kubectl.ok("top node").await;
        assert!(top.contains("edge-1") && top.contains("250m") && top.contains("64Mi"), "{top}");
        let top = kubectl.ok("top pod").await;
        assert!(top.contains("p ") && top.contains("250m"), "{top}");
    }
    server.stop().await;
}
