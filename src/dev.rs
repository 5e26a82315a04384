//! `octobus dev`: a hub and a node in one process, linked as on two machines.
//!
//! The first start makes a token and joins with it through the hub's real bootstrap port; nothing between
//! the two is a shortcut. Both halves keep their own data folder, so that each also runs alone.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use broker::{
    link::dial::{self, State},
    tasks::Drained,
};
use cloudhub::{hub::Hub, token::TokenRequest};
use edgehub::{
    edge::Edge,
    identity::Identity,
    join::{self, JoinOptions},
};
use ops::{
    config::{Config, Flags, Role},
    endpoints::Endpoints,
};

use crate::{
    exit::{Failure, Outcome},
    output,
    serve::{STOP_DEADLINE, announce, cannot_start, prepare},
};

/// The link of two halves of one process is up in some 10 ms; longer than this, and the user is told
/// instead of kept waiting.
const LINKED_WITHIN: Duration = Duration::from_secs(5);
const TOKEN_TTL: Duration = Duration::from_secs(60);

pub(crate) async fn run(flags: &Flags) -> Outcome {
    let (config, mut signals) = prepare(Role::Dev, flags)?;
    let dev = tokio::select! {
        biased;
        () = signals.first() => return Ok(()),
        dev = Box::pin(Dev::start(&config)) => dev?,
    };
    let endpoints = dev.endpoints();
    output::bytes(banner(&config, dev.edge.name(), &endpoints).as_bytes())?;
    announce(&config, &endpoints)?;
    signals.first().await;
    signals.or_second(dev.stop()).await
}

struct Dev {
    hub: Hub,
    edge: Edge,
}

impl Dev {
    async fn start(config: &Config) -> Outcome<Self> {
        let hub = Hub::start(&config.dev_hub()).await.map_err(cannot_start)?;
        match start_node(config, &hub).await {
            Ok(edge) => Ok(Self { hub, edge }),
            Err(failure) => {
                hub.stop(STOP_DEADLINE).await;
                Err(failure)
            }
        }
    }

    fn endpoints(&self) -> Endpoints {
        self.hub.endpoints().clone().with_node(self.edge.endpoints().clone())
    }

    /// The node first: what it was just told is at the hub before that ends.
    async fn stop(self) -> Drained {
        let node = self.edge.stop(STOP_DEADLINE / 2).await;
        match (node, self.hub.stop(STOP_DEADLINE / 2).await) {
            (Drained::Clean, hub) => hub,
            (Drained::Forced(tasks), Drained::Clean) => Drained::Forced(tasks),
            (Drained::Forced(node), Drained::Forced(hub)) => Drained::Forced(node + hub),
        }
    }
}

async fn start_node(config: &Config, hub: &Hub) -> Outcome<Edge> {
    let (quic, websocket) = (hub.endpoints().quic.map(reachable), hub.endpoints().websocket.map(reachable));
    let host = quic.or(websocket).map(|address| address.ip().to_string());
    let host = host.ok_or_else(|| {
        Failure::usage("dev's node links by QUIC or WebSocket: --quic and --websocket cannot both be off")
    })?;
    let port = |address: SocketAddr| address.port();
    let node = config.dev_node(dial::Hub { host, quic: quic.map(port), websocket: websocket.map(port) });
    if Identity::load(&node.data).map_err(cannot_start)?.is_none() {
        enrol(config, hub, &node.data).await?;
    }
    let edge = Edge::start(&node).await.map_err(cannot_start)?;
    let mut link = edge.link();
    let linked =
        tokio::time::timeout(LINKED_WITHIN, link.wait_for(|status| status.state == State::Live)).await;
    if !matches!(linked, Ok(Ok(_))) {
        tracing::warn!("the node serves, but is not linked to the hub yet; it goes on trying");
    }
    Ok(edge)
}

/// Whether an earlier start got as far as using a token or not, this ends with the node enrolled: dev's own
/// node may always be replaced by dev.
async fn enrol(config: &Config, hub: &Hub, data: &Path) -> Outcome {
    let bootstrap = hub.endpoints().bootstrap.ok_or_else(|| {
        Failure::usage("dev's node enrols by HTTPS at its first start: --bootstrap cannot be off then")
    })?;
    let node = config.node.as_deref().unwrap_or("edge-1").to_owned();
    let request = TokenRequest { replace: true, ttl: TOKEN_TTL, ..TokenRequest::new(&node) };
    let token = hub.create_token(&request).await.map_err(cannot_start)?;
    let hub = format!("https://{}", reachable(bootstrap));
    join::join(data, &JoinOptions { hub, token, again: false }).await.map_err(cannot_start)?;
    Ok(())
}

/// Where a listener of this machine can be reached from it.
fn reachable(addr: SocketAddr) -> SocketAddr {
    match addr.ip() {
        ip if !ip.is_unspecified() => addr,
        IpAddr::V4(_) => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), addr.port()),
        IpAddr::V6(_) => SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), addr.port()),
    }
}

fn banner(config: &Config, node: &str, endpoints: &Endpoints) -> String {
    let mut text = format!("octobus dev: a hub and node {node}, data in {}\n\n", config.data.display());
    let mut row = |name: &str, value: Option<String>, what: &str| {
        if let Some(value) = value {
            writeln!(text, "  {name:<11}{value:<24}{what}").expect("a String takes everything");
        }
    };
    let shown = |addr: Option<SocketAddr>| addr.map(|addr| addr.to_string());
    row("mqtt", shown(endpoints.mqtt), &format!("devices of node {node}"));
    row("nats", shown(endpoints.nats), "clients of the hub");
    row("node nats", shown(endpoints.node_nats), &format!("applications on node {node}"));
    row("quic", shown(endpoints.quic), "links of nodes (UDP)");
    row("websocket", shown(endpoints.websocket), "links of nodes where UDP is blocked (TCP)");
    row("bootstrap", shown(endpoints.bootstrap), "nodes join here (octobus join)");
    row("kubernetes", shown(endpoints.kubernetes), "kubectl and other clients of Kubernetes");
    row("node api", shown(endpoints.api), &format!("the same of node {node}, with or without the hub"));
    row("metrics", shown(endpoints.metrics), "/metrics /healthz /readyz");
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    row("admin", path(&endpoints.admin), "");
    row("node admin", path(&endpoints.node_admin), "");
    text.push_str(&lines_to_try(node, endpoints));
    if let Some(kubeconfig) = &endpoints.kubeconfig {
        writeln!(text, "\n  export KUBECONFIG={}", kubeconfig.display()).expect("a String takes everything");
    }
    text.push_str("\nCtrl-C stops.\n");
    text.lines().map(str::trim_end).flat_map(|line| [line, "\n"]).collect()
}

fn lines_to_try(node: &str, endpoints: &Endpoints) -> String {
    let mqtt = endpoints.mqtt.map_or(String::new(), |addr| format!(" -p {}", addr.port()));
    let nats = match endpoints.nats {
        Some(addr) if addr.port() != ops::config::HUB_NATS_PORT => format!(" -s nats://{}", reachable(addr)),
        _ => String::new(),
    };
    let mut token = String::new();
    codec::name::escape_token(node, &mut token);
    let lines = [
        (
            format!("mosquitto_pub{mqtt} -q 1 -t sensors/boiler/temp -m 71.5"),
            format!("a device on node {node}"),
        ),
        (format!("nats{nats} sub 'octobus.up.{token}.>'"), "any NATS client at the hub".to_owned()),
        (
            format!("nats{nats} pub octobus.down.{token}.valves.3 open"),
            format!("mosquitto_sub{mqtt} -t 'valves/#' receives it"),
        ),
    ];
    let mut text = "\nTry:\n\n".to_owned();
    for (line, what) in lines {
        writeln!(text, "  {line:<64}  # {what}").expect("a String takes everything");
    }
    text
}
