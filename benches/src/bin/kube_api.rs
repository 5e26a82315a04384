//! The embedded Kubernetes API of a hub as shipped (`cloudhub --kubernetes`), at 1 000 nodes and 10 000 pods: objects
//! made per second and their CPU, a list of all pods, from a write to the watchers that see it, memory, rest.
//!
//! The hub runs on processor 0, its clients on processor 1: the crate `kube` over TLS, which is what controllers use.
//! Objects are written to the journal with fdatasync before they are answered.

use std::{
    collections::HashMap,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, Config,
    api::{ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use octobus_benches::{
    measure::{self, Figure, round},
    procfs,
    report::{self, say},
    server,
};
use serde_json::{Value, json};

const NODES: usize = 1_000;
const PODS: usize = 10_000;
/// Requests under way at once.
const CLIENTS: usize = 16;
const WATCHERS: usize = 16;
/// Status patches that the watchers are timed by, and how many of them a second.
const PATCHES: usize = 2_000;
const PER_SECOND: u64 = 200;
const STARTS_WITHIN: Duration = Duration::from_secs(10);
const REST: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    server::take_processor(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cases = runtime.block_on(Box::pin(run()))?;
    report::print("Kubernetes API, 1 000 nodes and 10 000 pods", &cases)
}

/// The hub, killed when this is dropped.
struct Hub(Child);

impl Drop for Hub {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Hub {
    fn start(data: &Path) -> anyhow::Result<(Self, String)> {
        let ready = data.join("ready.json");
        let any = "127.0.0.1:0";
        let mut command = server::on_processor(0, &server::beside_us("cloudhub")?);
        for (flag, value) in [
            ("--kubernetes", any),
            ("--nats", "off"),
            ("--quic", any),
            ("--websocket", "off"),
            ("--bootstrap", "off"),
            ("--metrics", "off"),
            ("--log-level", "warn"),
        ] {
            command.args([flag, value]);
        }
        command.arg("--data").arg(data.join("hub")).arg("--ready-file").arg(&ready);
        let hub = Self(spawn(&mut command)?);
        let started = measure::now();
        while !ready.exists() {
            ensure!(started.elapsed() < STARTS_WITHIN, "cloudhub is not ready within {STARTS_WITHIN:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ready: Value = serde_json::from_slice(&std::fs::read(ready)?)?;
        let kubeconfig = ready["kubeconfig"].as_str().context("the ready file names a kubeconfig")?;
        Ok((hub, kubeconfig.to_owned()))
    }

    fn pss_mib(&self) -> anyhow::Result<f64> {
        Ok(procfs::pss(self.0.id())? as f64 / f64::from(1 << 20))
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        procfs::cpu_time(self.0.id())
    }
}

fn spawn(command: &mut Command) -> anyhow::Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start cloudhub")
}

async fn run() -> anyhow::Result<Vec<Value>> {
    let folder = server::data_folder()?;
    let (hub, kubeconfig) = Hub::start(folder.path())?;
    let config = Kubeconfig::read_from(&kubeconfig)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let empty = hub.pss_mib()?;

    let nodes: Api<Node> = Api::all(client.clone());
    create(&hub, "nodes", NODES, |number| {
        let (nodes, node) = (nodes.clone(), node(number));
        async move { nodes.create(&PostParams::default(), &node?).await.map(drop).map_err(Into::into) }
    })
    .await?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let made = create(&hub, "pods", PODS, |number| {
        let (pods, pod) = (pods.clone(), pod(number));
        async move { pods.create(&PostParams::default(), &pod?).await.map(drop).map_err(Into::into) }
    })
    .await?;
    let full = hub.pss_mib()?;
    say(format_args!("memory: {empty:.1} MiB empty, {full:.1} MiB with all"));
    let listed = list(&hub, &pods).await?;
    let watched = Box::pin(watch(&hub, &client)).await?;
    let after = hub.pss_mib()?;
    let (cpu, started) = (hub.cpu()?, measure::now());
    tokio::time::sleep(REST).await;
    let idle = (hub.cpu()? - cpu).as_secs_f64() / started.elapsed().as_secs_f64();
    say(format_args!("after it all {after:.1} MiB, idle {:.2} % of a core", idle * 100.0));
    let memory = json!({
        "case": "memory",
        "ours": { "empty_mib": round(empty), "full_mib": round(full), "after_watches_mib": round(after) },
        "idle_cores": round(idle),
    });
    Ok(vec![made, listed, watched, memory])
}

fn node(number: usize) -> anyhow::Result<Node> {
    Ok(serde_json::from_value(json!({
        "metadata": { "name": format!("bench-{number}"), "labels": { "kubernetes.io/os": "linux" } },
    }))?)
}

fn pod(number: usize) -> anyhow::Result<Pod> {
    Ok(serde_json::from_value(json!({
        "metadata": { "name": format!("web-{number}"), "labels": { "app": "web", "part": format!("{}", number % 100) } },
        "spec": {
            "nodeName": format!("bench-{}", number % NODES),
            "containers": [{
                "name": "web",
                "image": "localhost/busybox:1",
                "command": ["httpd", "-f", "-p", "8080"],
                "env": [{ "name": "SITE", "value": format!("site-{number}") }],
                "resources": { "requests": { "cpu": "10m", "memory": "16Mi" }, "limits": { "memory": "32Mi" } },
            }],
        },
    }))?)
}

/// Makes this many objects, some at once.
async fn create<F>(hub: &Hub, what: &str, count: usize, one: impl Fn(usize) -> F) -> anyhow::Result<Value>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let (cpu, started) = (hub.cpu()?, measure::now());
    stream::iter((0..count).map(one)).buffer_unordered(CLIENTS).try_collect::<Vec<()>>().await?;
    let (wall, cpu) = (started.elapsed(), hub.cpu()? - cpu);
    let per_second = count as f64 / wall.as_secs_f64();
    let each = cpu.as_micros() as f64 / count as f64;
    say(format_args!("{count} {what} made: {per_second:.0} a second, {each:.0} us of CPU each"));
    Ok(json!({
        "case": format!("make {what}, {CLIENTS} at once"),
        "ours": { "per_s": round(per_second) },
        "cpu_ns_per_op": round(each * 1e3),
    }))
}

async fn list(hub: &Hub, pods: &Api<Pod>) -> anyhow::Result<Value> {
    let mut rounds = Vec::new();
    let cpu = hub.cpu()?;
    for _ in 0..measure::ROUNDS {
        let started = measure::now();
        let all = pods.list(&ListParams::default()).await?;
        rounds.push(started.elapsed().as_secs_f64() * 1e3);
        ensure!(all.items.len() == PODS, "{} pods are listed, not {PODS}", all.items.len());
    }
    let cpu = (hub.cpu()? - cpu).as_secs_f64() * 1e3 / measure::ROUNDS as f64;
    let wall = Figure::of(rounds);
    say(format_args!("a list of all pods: {:.0} ms, {cpu:.0} ms of the hub's CPU", wall.median));
    Ok(json!({ "case": "list all pods", "ours": { "ms": wall.json() }, "cpu_ns_per_op": round(cpu * 1e6) }))
}

/// When each patch was sent, by what it wrote.
type Sent = Arc<Mutex<HashMap<String, Instant>>>;

async fn watch(hub: &Hub, client: &Client) -> anyhow::Result<Value> {
    let sent = Sent::default();
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let from = pods.list_metadata(&ListParams::default().limit(1)).await?;
    let from = from.metadata.resource_version.context("a list has a resource version")?;
    let mut watchers = Vec::new();
    for _ in 0..WATCHERS {
        #[allow(clippy::disallowed_methods)] // they are awaited below
        watchers.push(tokio::spawn(follow(pods.clone(), from.clone(), Arc::clone(&sent))));
    }
    // They count from the same revision: who begins late sees all the same, but would be timed for it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cpu = hub.cpu()?;
    let (gap, started) = (Duration::from_micros(1_000_000 / PER_SECOND), tokio::time::Instant::now());
    for number in 0..PATCHES {
        tokio::time::sleep_until(started + gap * number as u32).await;
        let name = format!("web-{}", number * 5);
        let stamp = format!("patch-{number}");
        let status = json!({ "status": { "phase": "Running", "reason": stamp } });
        sent.lock().expect("no panic under this lock").insert(stamp, measure::now());
        pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
    }
    let mut delays = Vec::new();
    for watcher in watchers {
        delays.extend(
            tokio::time::timeout(STARTS_WITHIN, watcher).await.context("a watcher misses changes")???,
        );
    }
    let cpu = hub.cpu()? - cpu;
    delays.sort_by(f64::total_cmp);
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize];
    let each = cpu.as_micros() as f64 / PATCHES as f64;
    say(format_args!(
        "a patch to {WATCHERS} watchers: p50 {:.2} ms, p99 {:.2} ms, {each:.0} us of the hub's CPU",
        at(0.5),
        at(0.99)
    ));
    Ok(json!({
        "case": format!("status patches, {PER_SECOND} a second, to {WATCHERS} watchers of all pods"),
        "ours": { "p50_ms": round(at(0.5)), "p99_ms": round(at(0.99)), "max_ms": round(at(1.0)) },
        "cpu_ns_per_op": round(each * 1e3),
    }))
}

/// Milliseconds from sending each patch to seeing it.
async fn follow(pods: Api<Pod>, from: String, sent: Sent) -> anyhow::Result<Vec<f64>> {
    let mut events = pods.watch(&WatchParams::default(), &from).await?.boxed();
    let mut delays = Vec::with_capacity(PATCHES);
    while delays.len() < PATCHES {
        let Some(event) = events.try_next().await? else { bail!("a watch ended early") };
        let WatchEvent::Modified(pod) = event else { continue };
        let stamp = pod.status.and_then(|status| status.reason).unwrap_or_default();
        let at = sent.lock().expect("no panic under this lock").get(&stamp).copied();
        delays.extend(at.map(|at| at.elapsed().as_secs_f64() * 1e3));
    }
    Ok(delays)
}
