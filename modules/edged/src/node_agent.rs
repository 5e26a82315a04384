//! Composition: the runtime that this node has, its pods, and who asks for them.
//!
//! Everything here comes up beside the node, never before it: a node serves its devices whether there is a container
//! runtime or not. Without one it says so in a condition and an event, and looks for one from time to time.

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use broker::{Handle, Tasks, clock, event::Command, link::Links, seal::SealKey};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep},
};

use crate::{
    cgroups::{Driver, Layout},
    containerd::{self, Containerd},
    cri::Socket,
    logs::rotate,
    make::{self, dns},
    node::{self, Load, Machine},
    pods::{self, Agent, Clock, Hands, Limits, Maker, Reporter, Source, Table, Workshop},
    runtime::Runtime,
    server::{self, Pods, Server},
};

/// Sockets of runtimes where packages put them.
const SOCKETS: [&str; 4] = [
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
    "/var/run/crio/crio.sock",
];
/// Between looks for a runtime while there is none.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// How often it is looked whether something of the node changed.
const NODE_BEAT: Duration = Duration::from_secs(10);
/// Streams that wait to be taken.
const STREAMS_WAITING: usize = 32;
/// The condition.
const CONDITION: &str = "ContainerRuntime";

/// Which runtime to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// A socket that is there; else one of our own, where that is allowed.
    Auto,
    /// None: this node runs no pods.
    Off,
    /// This socket.
    Socket(PathBuf),
}

/// What the agent is started with.
#[derive(Clone)]
pub struct Options {
    /// Name of the node.
    pub node: Arc<str>,
    /// The node's data folder.
    pub data: PathBuf,
    /// Which runtime.
    pub runtime: Choice,
    /// Start a containerd of our own where no socket is there, and end it and all pods with the node.
    pub private: bool,
    /// Folder of archives of images, which a containerd of our own imports when it starts.
    pub images: PathBuf,
    /// Folder of static pods.
    pub static_pods: Option<PathBuf>,
    /// Pods at a time.
    pub max_pods: usize,
    /// Image of sandboxes of a containerd of our own; none: one that is built in.
    pub sandbox_image: Option<String>,
    /// Name servers of the cluster.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    pub cluster_domain: String,
    /// Host and port of the API that pods are told of.
    pub api: Option<(String, u16)>,
    /// The key that secrets are sealed with, once the node has it.
    pub secrets: Arc<dyn Fn() -> Option<SealKey> + Send + Sync>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, data, runtime, private, static_pods, max_pods, .. } = self;
        f.debug_struct("Options")
            .field("node", node)
            .field("data", data)
            .field("runtime", runtime)
            .field("private", private)
            .field("static_pods", static_pods)
            .field("max_pods", max_pods)
            .finish_non_exhaustive()
    }
}

/// The node agent for pods.
#[derive(Debug)]
pub struct Edged {
    table: Arc<Table>,
    private: Arc<Mutex<Option<Containerd>>>,
    workshop: Arc<OnceLock<Arc<Workshop>>>,
    tasks: Tasks,
}

impl Edged {
    /// Starts it beside the node: this returns at once, pods follow when there is a runtime.
    #[must_use]
    pub fn start(options: Options, handle: Handle, links: Arc<Links>) -> Self {
        let table = Arc::new(Table::new(Arc::clone(&options.secrets)));
        let private = Arc::<Mutex<Option<Containerd>>>::default();
        let workshop = Arc::<OnceLock<Arc<Workshop>>>::default();
        let tasks = Tasks::new();
        if options.runtime != Choice::Off {
            let starting = Starting {
                options,
                handle,
                links,
                table: Arc::clone(&table),
                private: Arc::clone(&private),
                workshop: Arc::clone(&workshop),
                tasks: tasks.clone(),
            };
            let stopped = tasks.stopped();
            tasks.spawn("pods", async move {
                tokio::select! {
                    biased;
                    () = stopped.cancelled() => {}
                    () = starting.run() => {}
                }
            });
        }
        Self { table, private, workshop, tasks }
    }

    /// The node's pods, for whoever shows them.
    #[must_use]
    pub fn pods(&self) -> Arc<dyn Pods> {
        Arc::<Table>::clone(&self.table)
    }

    /// Stops the agent. Containers run on, unless their runtime is one of our own: that ends with all of them.
    pub async fn stop(self, deadline: Duration) {
        self.tasks.drain(deadline / 4).await;
        let Some(containerd) = self.private.lock().await.take() else { return };
        match tokio::time::timeout(deadline - deadline / 4, containerd.stop()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "pods were left behind; the next start ends them"),
            Err(_elapsed) => return tracing::warn!("pods did not end in time; the next start ends them"),
        }
        // No container is left that could use them.
        let Some(workshop) = self.workshop.get().cloned() else { return };
        let removed = tokio::task::spawn_blocking(move || {
            for uid in workshop.uids() {
                if let Err(error) = workshop.tear_down(&uid) {
                    tracing::warn!(uid, error, "the folder of a pod stays");
                }
            }
        });
        if let Err(error) = removed.await {
            tracing::error!(%error, "folders of pods");
        }
    }
}

/// What comes up beside the node.
struct Starting {
    options: Options,
    handle: Handle,
    links: Arc<Links>,
    table: Arc<Table>,
    private: Arc<Mutex<Option<Containerd>>>,
    workshop: Arc<OnceLock<Arc<Workshop>>>,
    tasks: Tasks,
}

impl Starting {
    async fn run(self) {
        let report = Reporter::new(&self.options.node);
        let (stopped, writing) = (self.tasks.stopped(), report.clone().run(self.handle.clone()));
        self.tasks.spawn("pod statuses", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = writing => {}
            }
        });
        let found = watch::Sender::new(Err("the agent is starting".to_owned()));
        let machine = Machine::read();
        let beat =
            Beat { folder: self.options.data.clone(), found: found.subscribe(), report: report.clone() };
        let (stopped, beating) = (self.tasks.stopped(), beat.run(self.node(), machine.clone()));
        self.tasks.spawn("node status", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = beating => {}
            }
        });
        let runtime = self.runtime(&report, &found).await;
        let settings = self.settings(&machine);
        let workshop = Arc::new(Workshop::new(settings.clone()));
        if self.workshop.set(Arc::clone(&workshop)).is_err() {
            tracing::error!("the agent was started twice");
        }
        let table = Arc::clone(&self.table);
        self.answer(&runtime);
        let hands = Hands::new(Arc::clone(&runtime), workshop, report, table, &self.options.node);
        let agent = Agent::new(
            pods::Settings {
                node: self.options.node.to_string(),
                host_ips: settings.addresses.iter().map(IpAddr::to_string).collect(),
                limits: Limits { pods: self.options.max_pods, allocatable: settings.allocatable },
                clock: Clock { began: Instant::now(), simulated: None },
            },
            Arc::new(hands),
        );
        let folder = self.options.static_pods.clone();
        let source = Source::new(&self.options.node, self.handle.clone(), folder);
        agent.run(self.handle.clone(), source, self.tasks.clone()).await;
    }

    /// Answers who asks for logs, commands, ports and figures, and keeps logs short.
    fn answer(&self, runtime: &Arc<dyn Runtime>) {
        let pods: Arc<dyn Pods> = Arc::<Table>::clone(&self.table);
        let incoming = self.links.accept(server::KIND, STREAMS_WAITING);
        let data = self.options.data.clone();
        let server = Server::new(&self.options.node, data, Arc::clone(runtime), Arc::clone(&pods));
        let (stopped, tasks) = (self.tasks.stopped(), self.tasks.clone());
        self.tasks.spawn("kubelet streams", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = server.run(incoming, tasks) => {}
            }
        });
        let (stopped, collected) = (self.tasks.stopped(), Arc::clone(runtime));
        self.tasks.spawn("images", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = pods::images::run(collected) => {}
            }
        });
        let (stopped, runtime) = (self.tasks.stopped(), Arc::clone(runtime));
        self.tasks.spawn("rotation of logs", async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = rotate::run(pods, runtime, rotate::Limits::default()) => {}
            }
        });
    }

    /// The runtime, however long it takes until there is one.
    async fn runtime(&self, report: &Reporter, found: &watch::Sender<Found>) -> Arc<dyn Runtime> {
        let mut said = None;
        loop {
            match self.find().await {
                Ok(runtime) => {
                    self.condition(None).await;
                    drop(found.send_replace(Ok(Arc::clone(&runtime))));
                    return runtime;
                }
                Err(why) => {
                    if said.as_ref() != Some(&why) {
                        tracing::warn!("this node runs no pods: {why}");
                        report.of_node(true, "NoContainerRuntime", why.clone());
                        self.condition(Some(why.clone())).await;
                        drop(found.send_replace(Err(why.clone())));
                        said = Some(why);
                    }
                    sleep(LOOK_AGAIN).await;
                }
            }
        }
    }

    async fn find(&self) -> Result<Arc<dyn Runtime>, String> {
        let socket = |path: &Path| -> Result<Arc<dyn Runtime>, String> {
            Ok(Arc::new(Socket::new(path).map_err(|error| error.to_string())?))
        };
        if let Choice::Socket(path) = &self.options.runtime {
            return socket(path);
        }
        if let Some(path) = SOCKETS.iter().map(Path::new).find(|path| path.exists()) {
            return socket(path);
        }
        if !self.options.private {
            return Err(
                "there is no socket of a container runtime; install containerd (Debian: apt install \
                        containerd) or CRI-O, or name its socket (edged.runtime = \"unix:///path\")"
                    .to_owned(),
            );
        }
        let settings = containerd::Settings {
            data: self.options.data.clone(),
            sandbox_image: self.options.sandbox_image.clone(),
        };
        let containerd = Containerd::start(&settings).await.map_err(|error| error.to_string())?;
        let (names, errors) = containerd.import(&self.options.images).await;
        if !names.is_empty() {
            tracing::info!(?names, "imported images");
        }
        for error in errors {
            tracing::warn!(%error, "an image was not imported");
        }
        let runtime = Arc::new(containerd.runtime());
        *self.private.lock().await = Some(containerd);
        Ok(runtime)
    }

    async fn condition(&self, message: Option<String>) {
        let subject = self.options.node.to_string();
        let command = Command::SetCondition { kind: CONDITION, subject, message };
        if self.handle.call(command).await.is_err() {
            tracing::debug!("the broker stopped");
        }
    }

    fn settings(&self, machine: &Machine) -> make::Settings {
        let disk = node::Disk::read(&self.options.data).unwrap_or_default();
        let node = self.node();
        let allocatable = node::allocatable(&node::capacity(machine, disk, &node), &node);
        make::Settings {
            node: self.options.node.to_string(),
            folder: self.options.data.join("edged"),
            addresses: addresses(),
            cluster_dns: self.options.cluster_dns.clone(),
            cluster_domain: self.options.cluster_domain.clone(),
            host_dns: dns::of_host(),
            api: self.options.api.clone(),
            cgroups: Layout::find(Driver::Cgroupfs),
            memory: machine.memory,
            allocatable,
        }
    }

    fn node(&self) -> node::Node {
        node::Node {
            name: self.options.node.to_string(),
            max_pods: u32::try_from(self.options.max_pods).unwrap_or(u32::MAX),
            reserved: BTreeMap::new(),
            labels: BTreeMap::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// The address from which this node reaches others: where its pods are told that it is.
fn addresses() -> Vec<IpAddr> {
    // Nothing is sent: connecting a datagram socket asks for the route alone.
    let route = |to: &str, from: &str| {
        let socket = std::net::UdpSocket::bind(from).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    let found = [route("192.0.2.1:9", "0.0.0.0:0"), route("[2001:db8::1]:9", "[::]:0")];
    let found: Vec<IpAddr> = found
        .into_iter()
        .flatten()
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .collect();
    if found.is_empty() { vec![IpAddr::from([127, 0, 0, 1])] } else { found }
}

/// The runtime, or why there is none.
type Found = Result<Arc<dyn Runtime>, String>;

/// Tells of the node itself, when something of it changed.
struct Beat {
    folder: PathBuf,
    found: watch::Receiver<Found>,
    report: Reporter,
}

impl Beat {
    async fn run(mut self, node: node::Node, machine: Machine) {
        let mut report = node::Report::new(node, machine);
        let mut beat = clock::every(NODE_BEAT);
        loop {
            tokio::select! {
                _ = beat.tick() => {}
                changed = self.found.changed() => if changed.is_err() {
                    return; // the agent has ended
                }
            }
            let Some(observed) = self.observe().await else { continue };
            let seconds = i64::try_from(clock::wall_us() / 1_000_000).unwrap_or(0);
            let now = k8s_openapi::jiff::Timestamp::from_second(seconds).unwrap_or_default();
            if let Some(value) = report.changed(now, &observed) {
                self.report.put("node".to_owned(), value);
            }
        }
    }

    async fn observe(&self) -> Option<node::Observed> {
        let found = self.found.borrow().clone();
        let (mut images, mut images_at) = (Vec::new(), None);
        let runtime = match &found {
            Err(why) => Err(why.clone()),
            Ok(runtime) => {
                images = runtime.images().await.unwrap_or_default();
                let disks = runtime.image_disks().await.unwrap_or_default();
                images_at =
                    disks.into_iter().find_map(|disk| disk.fs_id.map(|id| PathBuf::from(id.mountpoint)));
                match (runtime.version().await, runtime.status().await) {
                    (Ok(version), Ok(status)) => Ok((version, status)),
                    (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
                }
            }
        };
        let folder = self.folder.clone();
        let load = tokio::task::spawn_blocking(move || Load::read(&folder, images_at.as_deref())).await;
        let load = match load {
            Ok(Ok(load)) => load,
            Ok(Err(error)) => {
                tracing::warn!(%error, "what the machine has left cannot be read");
                return None;
            }
            Err(_panicked) => return None,
        };
        let clock_trusted = Some(clock::wall_us() >= clock::TRUSTED_FROM_US);
        Some(node::Observed { runtime, images, load, clock_trusted, addresses: addresses() })
    }
}
