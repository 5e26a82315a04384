//! `octobus ctl`: for somebody who stands at the machine. It asks the node's own API, over the admin socket, so it
//! needs neither hub nor network; logs and commands come from the node's container runtime.

mod describe;
mod exec;
mod get;
mod top;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http1};
use ops::{admin::pipe, client::Client};
use serde_json::Value;

use crate::{
    cli::ctl::{Ctl, LogsArgs, RestartArgs},
    exit::{Failure, Outcome},
    output,
};

/// Largest answer that is not a stream.
const ANSWER_BYTES_MAX: usize = 64 << 20;

pub(crate) async fn run(command: Ctl) -> Outcome {
    match command {
        Ctl::Get(args) => get::run(&args).await,
        Ctl::Describe(args) => describe::run(&args).await,
        Ctl::Logs(args) => logs(&args).await,
        Ctl::Exec(args) => exec::run(&args).await,
        Ctl::Restart(args) => restart(&args).await,
        Ctl::Top(args) => top::run(&args).await,
    }
}

/// The node's own API.
struct Api {
    client: Client,
}

impl Api {
    fn new(client: Client) -> Self {
        Self { client }
    }

    /// Sends a request; refusals as the API words them.
    async fn send(&self, request: Request<Full<Bytes>>) -> Outcome<Response<Incoming>> {
        let io = self.client.pipe(pipe::PATH).await?;
        let (mut sender, connection) = http1::handshake(io).await.map_err(Failure::failed)?;
        #[allow(clippy::disallowed_methods)] // it ends with the command, or with the answer
        tokio::spawn(async move { drop(connection.with_upgrades().await) });
        let response = sender.send_request(request).await.map_err(Failure::failed)?;
        let code = response.status();
        if code.is_success() || code == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let text = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let status: Value = serde_json::from_slice(&text).unwrap_or_default();
        let said = status["message"]
            .as_str()
            .map_or_else(|| format!("{code}: {}", String::from_utf8_lossy(&text).trim()), str::to_owned);
        Err(if code == StatusCode::NOT_FOUND { Failure::not_found(said) } else { Failure::failed(said) })
    }

    async fn ask(&self, method: Method, path: &str, accept: &str) -> Outcome<Response<Incoming>> {
        let request = Request::builder().method(method).uri(path).header("host", "octobus");
        let request = request.header("accept", accept).body(Full::default()).map_err(Failure::usage)?;
        self.send(request).await
    }

    /// The whole answer, JSON.
    async fn json(&self, path: &str, accept: &str) -> Outcome<Value> {
        let response = self.ask(Method::GET, path, accept).await?;
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let text = body.map_err(Failure::failed)?.to_bytes();
        serde_json::from_slice(&text).map_err(Failure::failed)
    }

    /// The name of this node: the only one of its own API.
    async fn node(&self) -> Outcome<String> {
        let nodes = self.json("/api/v1/nodes", "application/json").await?;
        let name = nodes["items"][0]["metadata"]["name"].as_str().map(str::to_owned);
        name.ok_or_else(|| Failure::not_found("the hub has told this node nothing of itself yet"))
    }
}

/// Escaped for a query or a part of a path.
fn escaped(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("a String takes everything");
        }
        out
    })
}

/// Where a pod stands in the API.
fn pod_path(namespace: &str, pod: &str) -> String {
    format!("/api/v1/namespaces/{}/pods/{}", escaped(namespace), escaped(pod.trim_start_matches("pod/")))
}

async fn logs(args: &LogsArgs) -> Outcome {
    let api = Api::new(args.target.client()?);
    let mut query = Vec::new();
    for (name, is_set) in
        [("follow", args.follow), ("previous", args.previous), ("timestamps", args.timestamps)]
    {
        if is_set {
            query.push(format!("{name}=true"));
        }
    }
    query.extend(args.container.as_ref().map(|name| format!("container={}", escaped(name))));
    query.extend(args.tail.map(|lines| format!("tailLines={lines}")));
    query.extend(args.since.map(|since| format!("sinceSeconds={}", since.as_secs().max(1))));
    let path = format!("{}/log?{}", pod_path(&args.namespace, &args.pod), query.join("&"));
    let mut body = api.ask(Method::GET, &path, "*/*").await?.into_body();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.map_err(Failure::failed)?.into_data() {
            output::bytes(&data)?;
        }
    }
    Ok(())
}

async fn restart(args: &RestartArgs) -> Outcome {
    let api = Api::new(args.target.client()?);
    let node = escaped(&api.node().await?);
    let (namespace, pod) = (escaped(&args.namespace), escaped(args.pod.trim_start_matches("pod/")));
    let mut path = format!("/api/v1/nodes/{node}/proxy/restart/{namespace}/{pod}");
    if let Some(container) = &args.container {
        path = format!("{path}/{}", escaped(container));
    }
    api.ask(Method::POST, &path, "*/*").await?;
    output::line(format!("pod/{} restarts", args.pod.trim_start_matches("pod/")).as_bytes())
}
