//! A server for a test, and a client for it.

use std::{sync::Arc, time::Duration};

use broker::{
    Tasks,
    core::{self, WindowBounds},
    driver,
    store::mem::MemStore,
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use kubeapi::{Options, Serving, StaticToken, nodes::NodeStreams};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsConnector, client::TlsStream};

pub(crate) const ADMIN: &str = "Bearer admin-token";

/// A running server with nothing in it.
pub(crate) struct TestServer {
    pub(crate) serving: Serving,
    tasks: Tasks,
    tls: Arc<ClientConfig>,
    _folder: tempfile::TempDir,
}

impl TestServer {
    pub(crate) async fn start() -> Self {
        Self::with_tokens(Vec::new()).await
    }

    /// One whose changes are known for this many.
    pub(crate) async fn with_window(changes: usize) -> Self {
        Self::of(Vec::new(), None, WindowBounds { changes, ..WindowBounds::DEFAULT }).await
    }

    pub(crate) async fn with_tokens(tokens: Vec<StaticToken>) -> Self {
        Self::with(tokens, None).await
    }

    pub(crate) async fn with(tokens: Vec<StaticToken>, nodes: Option<Arc<dyn NodeStreams>>) -> Self {
        Self::of(tokens, nodes, WindowBounds::DEFAULT).await
    }

    async fn of(
        mut tokens: Vec<StaticToken>,
        nodes: Option<Arc<dyn NodeStreams>>,
        window: WindowBounds,
    ) -> Self {
        tokens.push(token("admin-token", "admin", &["system:masters"]));
        let folder = tempfile::tempdir().unwrap();
        let tasks = Tasks::new();
        let store = MemStore::auto();
        let recovered = store.recover();
        let windows = vec![("k8s".into(), window)];
        let config = core::Config { windows, ..core::Config::hub("hub", "test", [1; 16], 7) };
        let broker = driver::start(config, store, recovered, &tasks);
        let options = Options {
            listener: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            folder: &folder.path().join("kubernetes"),
            broker,
            tasks: tasks.clone(),
            tokens,
            anonymous: true,
            nodes,
            controllers: true,
        };
        let serving = kubeapi::serve(options).await.unwrap();
        let pem = std::fs::read(folder.path().join("kubernetes/ca.pem")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { serving, tasks, tls: Arc::new(tls), _folder: folder }
    }

    pub(crate) async fn stop(self) {
        self.tasks.drain(Duration::from_secs(5)).await;
    }

    pub(crate) async fn connect(&self) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.serving.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await.unwrap()
    }

    /// Sends a request with the administrator's token unless the headers say otherwise.
    pub(crate) async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(String, String)],
        body: Option<Bytes>,
    ) -> Response<Incoming> {
        let stream = self.connect().await;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        self.tasks.spawn("test connection", async move { drop(connection.await) });
        let mut request = Request::builder().method(Method::from_bytes(method.as_bytes()).unwrap()).uri(path);
        for (name, value) in headers {
            // An empty one says that there are no credentials.
            if !value.is_empty() {
                request = request.header(name, value);
            }
        }
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("authorization")) {
            request = request.header("authorization", ADMIN);
        }
        let request = request.header("host", "localhost").body(Full::new(body.unwrap_or_default())).unwrap();
        sender.send_request(request).await.unwrap()
    }

    /// The status and the object of an answer.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.ask_as(method, path, "application/json", ADMIN, body).await
    }

    pub(crate) async fn ask_as(
        &self,
        method: &str,
        path: &str,
        media: &str,
        who: &str,
        body: Option<&Value>,
    ) -> (u16, Value) {
        let headers = [("content-type", media), ("accept", "application/json"), ("authorization", who)];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let body = body.map(|body| Bytes::from(body.to_string()));
        let response = self.send(method, path, &headers, body).await;
        (response.status().as_u16(), value_of(response).await)
    }
}

pub(crate) fn token(token: &str, user: &str, groups: &[&str]) -> StaticToken {
    StaticToken {
        token: token.to_owned(),
        user: user.to_owned(),
        uid: user.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
    }
}

/// A body as JSON, or as a text.
pub(crate) async fn value_of(response: Response<Incoming>) -> Value {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&bytes)
        .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()))
}
