//! P17 and P14: from a pod's creation at the Kubernetes API to its process on the edge node, one at a time and 30 at
//! once, against the floor: the same sandbox and container asked for at the same runtime's socket by hand. And what the
//! node agent holds with no pods and with 30.
//!
//! The hub (with the API, the scheduler and the bridge) runs in this process, the agent (`edgehub` as shipped) in one of
//! its own, linked by QUIC; containerd is private to the run. A process runs when it has made its file in a folder of
//! the host.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use cloudhub::{hub::Hub, token::TokenRequest};
use edged::{
    containerd::{
        Containerd, Settings,
        archive::{Entry, Image},
    },
    cri::Socket,
    runtime::{Runtime, cri},
};
use edgehub::join::{self, JoinOptions};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use octobus_benches::{
    measure::{self, Figure, round},
    procfs,
    report::{self, say},
    server,
};
use ops::config::{Config, Role, Sources};
use serde_json::{Value, json};

const NODE: &str = "bench-1";
const IMAGE: &str = "octobus.bench/busybox:1";
/// Pods at once.
const MANY: usize = 30;
const ROUNDS: usize = 20;
const PATIENCE: Duration = Duration::from_secs(60);
const REST: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let cases = runtime.block_on(Box::pin(run()))?;
    report::print("P17", &cases)
}

/// The agent, killed when this is dropped.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Agent {
    fn start(data: &Path, socket: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(server::beside_us("edgehub")?);
        let any = "127.0.0.1:0";
        for (flag, value) in [("--mqtt", any), ("--nats", "off"), ("--metrics", any), ("--log-level", "warn")]
        {
            command.args([flag, value]);
        }
        command.arg("--anonymous=true").arg("--data").arg(data).stdin(Stdio::null()).stdout(Stdio::null());
        command.env("OCTOBUS_EDGED_RUNTIME", format!("unix://{}", socket.display()));
        Ok(Self(command.spawn().context("start edgehub")?))
    }

    fn pss_mib(&self) -> anyhow::Result<f64> {
        Ok(procfs::pss(self.0.id())? as f64 / f64::from(1 << 20))
    }

    async fn rest(&self, what: &str) -> anyhow::Result<Value> {
        tokio::time::sleep(REST).await;
        let (cpu, started) = (procfs::cpu_time(self.0.id())?, measure::now());
        tokio::time::sleep(REST).await;
        let idle = (procfs::cpu_time(self.0.id())? - cpu).as_secs_f64() / started.elapsed().as_secs_f64();
        let pss = self.pss_mib()?;
        say(format_args!("agent with {what}: PSS {pss:.1} MiB, {:.2} % of a core", idle * 100.0));
        Ok(
            json!({ "case": format!("P14: agent, {what}"), "ours": { "pss_mib": round(pss) }, "idle_cores": round(idle) }),
        )
    }
}

/// A folder in which each process makes a file with its name.
struct Stamps(PathBuf);

impl Stamps {
    async fn seen(&self, names: &[String]) -> anyhow::Result<()> {
        let until = measure::now() + PATIENCE;
        for name in names {
            while !self.0.join(name).exists() {
                ensure!(measure::now() < until, "{name} does not run within {PATIENCE:?}");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        Ok(())
    }

    fn command(name: &str) -> Vec<String> {
        vec!["sh".to_owned(), "-c".to_owned(), format!("touch /stamps/{name}; exec sleep 3600")]
    }
}

async fn run() -> anyhow::Result<Vec<Value>> {
    let folder = server::data_folder()?;
    let [hub_data, node_data, stamps] = ["hub", "node", "stamps"].map(|name| folder.path().join(name));
    fs::create_dir_all(&stamps)?;
    let stamps = Stamps(stamps);
    put_image(&folder.path().join("images"))?;
    let containerd =
        Containerd::start(&Settings { data: folder.path().to_owned(), sandbox_image: None }).await?;
    let (_images, failed) = containerd.import(&folder.path().join("images")).await;
    ensure!(failed.is_empty(), "the image is not imported: {failed:?}");
    let measured = Box::pin(measured(&hub_data, &node_data, &stamps, containerd.runtime())).await;
    containerd.stop().await?;
    measured
}

async fn measured(
    hub_data: &Path,
    node_data: &Path,
    stamps: &Stamps,
    runtime: Socket,
) -> anyhow::Result<Vec<Value>> {
    let any = "127.0.0.1:0";
    let hub = [("--nats", "off"), ("--quic", any), ("--websocket", "off"), ("--bootstrap", any)];
    let mut flags = vec![("--data", hub_data.display().to_string())];
    flags.extend(hub.map(|(flag, value)| (flag, value.to_owned())));
    flags.extend([("--kubernetes", any.to_owned()), ("--metrics", "off".to_owned())]);
    let config = Config::resolve(Role::Cloud, Sources { file: None, env: Vec::new(), flags })?;
    let hub = Box::pin(Hub::start(&config)).await.context("start the hub")?;
    join(&hub, node_data).await?;
    let kubeconfig = hub.endpoints().kubeconfig.clone().context("the hub serves the Kubernetes API")?;
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let client = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(client)?;

    let execed = measure::now();
    let agent = Agent::start(node_data, runtime.path())?;
    ready(&client).await?;
    let ready_ms = execed.elapsed().as_secs_f64() * 1e3;
    say(format_args!("agent Ready at the API {ready_ms:.0} ms after exec"));
    let mut cases =
        vec![json!({ "case": "P14: exec to Ready at the API", "ours": { "ms": round(ready_ms) } })];
    cases.push(agent.rest("no pods").await?);

    let pods: Api<Pod> = Api::namespaced(client, "default");
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        let names = vec![format!("one-{number}")];
        ours.push(create(&pods, stamps, &names).await?);
        delete(&pods, &names).await?;
        let names = vec![format!("floor-{number}")];
        let (took, sandboxes) = by_hand(&runtime, stamps, &names).await?;
        floor.push(took);
        remove(&runtime, &sandboxes).await?;
    }
    cases.push(compared("one pod", &ours, &floor));

    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for round in 0..measure::ROUNDS {
        let names: Vec<_> = (0..MANY).map(|number| format!("floor-{round}-{number}")).collect();
        let (took, sandboxes) = by_hand(&runtime, stamps, &names).await?;
        floor.push(took);
        remove(&runtime, &sandboxes).await?;
        let names: Vec<_> = (0..MANY).map(|number| format!("many-{round}-{number}")).collect();
        ours.push(create(&pods, stamps, &names).await?);
        if round + 1 == measure::ROUNDS {
            cases.push(agent.rest(&format!("{MANY} pods")).await?);
        }
        delete(&pods, &names).await?;
    }
    cases.push(compared(&format!("{MANY} pods at once, until the last runs"), &ours, &floor));
    drop(agent);
    hub.stop(Duration::from_secs(5)).await;
    Ok(cases)
}

fn compared(case: &str, ours: &[f64], floor: &[f64]) -> Value {
    let [ours, floor] = [ours, floor].map(|of| Figure::of(of.iter().copied()));
    say(format_args!(
        "{case}: {:.0} ms [{:.0}-{:.0}], floor {:.0} ms [{:.0}-{:.0}]",
        ours.median, ours.min, ours.max, floor.median, floor.min, floor.max
    ));
    json!({
        "case": case,
        "ours": { "ms": ours.json() },
        "peer": { "the same by hand at the CRI socket": { "ms": floor.json() } },
        "above_ms": round(ours.median - floor.median),
    })
}

fn put_image(folder: &Path) -> anyhow::Result<()> {
    let busybox = fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox"));
    let busybox = busybox.context("busybox-static is installed")?;
    let mut entries = vec![("bin/busybox".to_owned(), Entry::Program(busybox))];
    for name in ["sh", "sleep", "touch"] {
        entries.push((format!("bin/{name}"), Entry::Link("busybox".to_owned())));
    }
    let image = Image { name: IMAGE.to_owned(), entries, ..Image::default() };
    fs::create_dir_all(folder)?;
    Ok(fs::write(folder.join("busybox.tar"), image.archive()?)?)
}

async fn join(hub: &Hub, data: &Path) -> anyhow::Result<()> {
    let token = hub.create_token(&TokenRequest { ttl: PATIENCE, ..TokenRequest::new(NODE) }).await?;
    let bootstrap = hub.endpoints().bootstrap.context("the hub has a bootstrap port")?;
    let options = JoinOptions { hub: format!("https://{bootstrap}"), token, again: false };
    join::join(data, &options).await.context("join")?;
    Ok(())
}

async fn ready(client: &Client) -> anyhow::Result<()> {
    let nodes: Api<Node> = Api::all(client.clone());
    let until = measure::now() + PATIENCE;
    loop {
        let node = nodes.get_opt(NODE).await?;
        let conditions = node.and_then(|node| node.status).and_then(|status| status.conditions);
        if conditions.into_iter().flatten().any(|is| is.type_ == "Ready" && is.status == "True") {
            return Ok(());
        }
        ensure!(measure::now() < until, "the node is not Ready within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Milliseconds from the first request to the last process.
async fn create(pods: &Api<Pod>, stamps: &Stamps, names: &[String]) -> anyhow::Result<f64> {
    let wanted = names.iter().map(|name| {
        Ok(serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "main",
                    "image": IMAGE,
                    "command": Stamps::command(name),
                    "volumeMounts": [{ "name": "stamps", "mountPath": "/stamps" }],
                }],
                "volumes": [{ "name": "stamps", "hostPath": { "path": stamps.0 } }],
            },
        }))?)
    });
    let wanted: Vec<Pod> = wanted.collect::<anyhow::Result<_>>()?;
    let started = measure::now();
    let posting = stream::iter(&wanted).map(|pod| async { pods.create(&PostParams::default(), pod).await });
    posting.buffer_unordered(8).try_collect::<Vec<_>>().await?;
    stamps.seen(names).await?;
    Ok(started.elapsed().as_secs_f64() * 1e3)
}

async fn delete(pods: &Api<Pod>, names: &[String]) -> anyhow::Result<()> {
    for name in names {
        pods.delete(name, &DeleteParams::default()).await?;
    }
    let until = measure::now() + PATIENCE;
    while !pods.list_metadata(&ListParams::default()).await?.items.is_empty() {
        ensure!(measure::now() < until, "pods are not gone within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The same, asked of the runtime by hand: milliseconds, and the sandboxes.
async fn by_hand(runtime: &Socket, stamps: &Stamps, names: &[String]) -> anyhow::Result<(f64, Vec<String>)> {
    let started = measure::now();
    let making = stream::iter(names).map(|name| run_by_hand(runtime, stamps, name));
    let sandboxes = making.buffer_unordered(8).try_collect().await?;
    stamps.seen(names).await?;
    Ok((started.elapsed().as_secs_f64() * 1e3, sandboxes))
}

async fn run_by_hand(runtime: &Socket, stamps: &Stamps, name: &str) -> anyhow::Result<String> {
    let metadata = cri::PodSandboxMetadata {
        name: name.to_owned(),
        uid: name.to_owned(),
        namespace: "by-hand".to_owned(),
        attempt: 0,
    };
    let sandbox = cri::PodSandboxConfig {
        metadata: Some(metadata),
        hostname: name.to_owned(),
        log_directory: stamps.0.join("logs").join(name).display().to_string(),
        linux: Some(cri::LinuxPodSandboxConfig::default()),
        ..cri::PodSandboxConfig::default()
    };
    let id = runtime.run_sandbox(sandbox.clone()).await?;
    let container = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.to_owned(), ..cri::ImageSpec::default() }),
        command: Stamps::command(name),
        mounts: vec![cri::Mount {
            container_path: "/stamps".to_owned(),
            host_path: stamps.0.display().to_string(),
            ..cri::Mount::default()
        }],
        log_path: "main.log".to_owned(),
        linux: Some(cri::LinuxContainerConfig::default()),
        ..cri::ContainerConfig::default()
    };
    let made = runtime.create_container(&id, container, sandbox).await?;
    runtime.start_container(&made).await?;
    Ok(id)
}

async fn remove(runtime: &Socket, sandboxes: &[String]) -> anyhow::Result<()> {
    for id in sandboxes {
        runtime.stop_sandbox(id).await?;
        runtime.remove_sandbox(id).await?;
    }
    Ok(())
}
