//! P14: the node agent as shipped (`edgehub`: broker over its journal, MQTT front, metrics, admin socket, a live
//! QUIC link to a hub), against mosquitto: proportional set size, and time from exec until it serves.
//!
//! The hub runs in this process, on processor 1; the agent and mosquitto run on processor 0. The agent's start is
//! the time until its ready file stands; mosquitto's until it accepts. Memory is read after some seconds of rest.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use broker::event::{Command, Response};
use cloudhub::{hub::Hub, token::TokenRequest};
use edgehub::join::{self, JoinOptions};
use octobus_benches::{
    measure::{self, Figure, ROUNDS},
    report::{self, say},
    server::{self, Server},
};
use ops::config::{Config, Role, Sources};
use serde_json::json;

const NODE: &str = "bench-1";
const REST: Duration = Duration::from_secs(5);
const LINKS_WITHIN: Duration = Duration::from_secs(10);

/// What each round saw of one server.
#[derive(Default)]
struct Seen {
    pss: Vec<f64>,
    start_ms: Vec<f64>,
    link_ms: Vec<f64>,
    idle_cores: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    server::take_processor(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (edge, mosquitto) = runtime.block_on(Box::pin(run()))?;
    let mut case = json!({ "case": "no pods, linked, at rest" });
    case["ours"] = figures("edgehub", &edge);
    case["ours"]["link_ms"] = Figure::of(edge.link_ms.iter().copied()).json();
    case["peer"]["mosquitto"] = figures("mosquitto", &mosquitto);
    let pss = |seen: &Seen| Figure::of(seen.pss.iter().copied()).median;
    case["ratio"]["pss"] = json!(measure::round(pss(&mosquitto) / pss(&edge)));
    case["binary_bytes"] = json!(std::fs::metadata(server::beside_us("edgehub")?)?.len());
    report::print("P14", &[case])
}

fn figures(name: &str, seen: &Seen) -> serde_json::Value {
    let [pss, start, idle] =
        [&seen.pss, &seen.start_ms, &seen.idle_cores].map(|of| Figure::of(of.iter().copied()));
    say(format_args!(
        "{name:10} PSS {:.2} MiB [{:.2}-{:.2}], ready in {:.1} ms [{:.1}-{:.1}], idle {:.2} % of a core",
        pss.median,
        pss.min,
        pss.max,
        start.median,
        start.min,
        start.max,
        idle.median * 100.0
    ));
    json!({ "pss_mib": pss.json(), "start_ms": start.json(), "idle_cores": idle.json() })
}

async fn run() -> anyhow::Result<(Seen, Seen)> {
    let (hub_data, node_data) = (server::data_folder()?, server::data_folder()?);
    let any = "127.0.0.1:0";
    let flags = [
        ("--nats", any),
        ("--quic", any),
        ("--websocket", any),
        ("--bootstrap", any),
        ("--metrics", "off"),
        ("--anonymous", "true"),
    ];
    let hub = Hub::start(&config(hub_data.path(), &flags)?).await.context("start the hub")?;
    join(&hub, node_data.path()).await?;
    let (mut edge, mut mosquitto) = (Seen::default(), Seen::default());
    for _ in 0..ROUNDS {
        let data = node_data.path().to_owned();
        let flags = ["--nats", "off", "--metrics", any, "--log-level", "warn"].map(str::to_owned);
        let execed = measure::now();
        let server = tokio::task::spawn_blocking(move || Server::edgehub(&data, &flags)).await??;
        linked(&hub).await?;
        edge.link_ms.push(execed.elapsed().as_secs_f64() * 1e3);
        look(&server, &mut edge).await?;
        drop(server);
        unlinked(&hub).await?;
        let server = tokio::task::spawn_blocking(Server::mosquitto).await??;
        look(&server, &mut mosquitto).await?;
    }
    hub.stop(Duration::from_secs(5)).await;
    Ok((edge, mosquitto))
}

fn config(data: &Path, more: &[(&'static str, &str)]) -> anyhow::Result<Config> {
    let mut flags = vec![("--data", data.display().to_string())];
    flags.extend(more.iter().map(|&(flag, value)| (flag, value.to_owned())));
    Ok(Config::resolve(Role::Cloud, Sources { file: None, env: Vec::new(), flags })?)
}

async fn join(hub: &Hub, data: &Path) -> anyhow::Result<()> {
    let request = TokenRequest { replace: true, ttl: Duration::from_secs(60), ..TokenRequest::new(NODE) };
    let token = hub.create_token(&request).await?;
    let bootstrap = hub.endpoints().bootstrap.context("the hub has a bootstrap port")?;
    let options = JoinOptions { hub: format!("https://{bootstrap}"), token, again: false };
    join::join(data, &options).await.context("join")?;
    Ok(())
}

async fn look(server: &Server, seen: &mut Seen) -> anyhow::Result<()> {
    seen.start_ms.push(server.started_in.as_secs_f64() * 1e3);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (cpu, started) = (server.cpu()?, measure::now());
    tokio::time::sleep(REST).await;
    seen.idle_cores.push((server.cpu()? - cpu).as_secs_f64() / started.elapsed().as_secs_f64());
    seen.pss.push(server.pss()? as f64 / f64::from(1 << 20));
    Ok(())
}

async fn linked(hub: &Hub) -> anyhow::Result<()> {
    wait(hub, true).await.context("the agent does not link to its hub")
}

async fn unlinked(hub: &Hub) -> anyhow::Result<()> {
    // A killed agent says nothing: its hub finds out by heartbeats.
    drop(wait(hub, false).await);
    Ok(())
}

async fn wait(hub: &Hub, wanted: bool) -> anyhow::Result<()> {
    let until: Instant = measure::now() + LINKS_WITHIN;
    loop {
        let Response::Sessions(sessions) = hub.handle().call(Command::Sessions).await? else {
            anyhow::bail!("the hub does not list its sessions");
        };
        let links = sessions.iter().any(|session| session.kind == "link" && session.established);
        if links == wanted {
            return Ok(());
        }
        ensure!(measure::now() < until, "waited for {LINKS_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
