//! A hub and nodes in one process, over real sockets on loopback.
#![allow(clippy::unwrap_used)] // what fails in a helper fails the test

#[path = "node/enrolment.rs"]
mod enrolment;
#[path = "node/link.rs"]
mod link;
#[path = "node/streams.rs"]
mod streams;

use std::{path::Path, time::Duration};

use broker::tasks::Drained;
use cloudhub::{hub::Hub, token::TokenRequest};
use edgehub::{
    edge::Edge,
    identity::Identity,
    join::{JoinError, JoinOptions, join},
};
use ops::config::{Config, Role, Sources};
use tempfile::TempDir;

const STOP: Duration = Duration::from_secs(15);

fn config(role: Role, data: &Path, more: &[(&'static str, &str)]) -> Config {
    let mut flags = vec![("--data", data.display().to_string())];
    flags.extend(more.iter().map(|&(flag, value)| (flag, value.to_owned())));
    Config::resolve(role, Sources { file: None, env: Vec::new(), flags }).unwrap()
}

/// A hub with its folder.
struct TestHub {
    data: TempDir,
    hub: Hub,
}

impl TestHub {
    async fn start() -> Self {
        Self::restart(tempfile::tempdir().unwrap()).await
    }

    async fn restart(data: TempDir) -> Self {
        let any = "127.0.0.1:0";
        let flags = [
            ("--nats", any),
            ("--quic", any),
            ("--websocket", any),
            ("--bootstrap", any),
            ("--metrics", any),
            ("--anonymous", "true"),
        ];
        let hub = Box::pin(Hub::start(&config(Role::Cloud, data.path(), &flags))).await.unwrap();
        Self { data, hub }
    }

    fn url(&self) -> String {
        format!("https://{}", self.hub.endpoints().bootstrap.unwrap())
    }

    async fn token(&self, node: &str, replace: bool) -> String {
        let ttl = Duration::from_secs(60);
        self.hub.create_token(&TokenRequest { replace, ttl, ..TokenRequest::new(node) }).await.unwrap()
    }

    async fn join(&self, data: &Path, token: &str) -> Result<Identity, JoinError> {
        Box::pin(join(data, &JoinOptions { hub: self.url(), token: token.into(), again: false })).await
    }

    async fn stop(self) -> TempDir {
        assert_eq!(Box::pin(self.hub.stop(STOP)).await, Drained::Clean);
        self.data
    }
}

async fn stop_edge(edge: Edge) {
    assert_eq!(Box::pin(edge.stop(STOP)).await, Drained::Clean);
}

async fn start_edge(data: &Path, more: &[(&'static str, &str)]) -> Edge {
    let mut flags = vec![
        ("--mqtt", "127.0.0.1:0"),
        ("--nats", "127.0.0.1:0"),
        ("--metrics", "off"),
        ("--api", "off"),
        ("--anonymous", "true"),
    ];
    flags.extend(more);
    Box::pin(Edge::start(&config(Role::Edge, data, &flags))).await.unwrap()
}
