//! The bridge between a Kubernetes API server and the tier.
//!
//! ```text
//!             watch: pods, nodes; metadata of secrets, config maps, accounts
//! API server ───────────────────────────────────────────────> down ──> fleet: obj/..., want/<node>
//!            <─────────── up: statuses, nodes, events <────── status of each node, links, enrolments
//! ```
//!
//! One task owns all of it: it takes [`Input`]s in, writes `fleet` itself, and has everything that asks the API
//! server done by [`work`], each thing once however often it became due. **Level-triggered**: an input changes
//! what is known, and what is known decides what is to be written. So an input that is told twice, or after it
//! is no longer true, does no harm, and a bridge that starts anew writes differences and nothing else.
//!
//! **Invariants.** Nothing is deleted in `fleet` before every kind was listed completely once. An object that
//! nobody's pods name is never fetched. A node's want names nothing that does not stand in `fleet`, and waits
//! for what is being fetched for it. Statuses are written where the API says something else, never because
//! something was received.
//!
//! Kept in memory: of a pod what [`pod::Pod`] has, of a secret or config map its uid and version.

pub mod access;
mod cluster;
mod down;
mod event;
mod fixed;
pub mod init;
mod json;
mod lease;
mod mirror;
mod node;
mod pod;
mod policy;
mod source;
mod up;
mod watch;
mod work;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use broker::{Handle, Tasks, link::Links, seal::SealKey};
use bytes::Bytes;
use ops::metrics::Exporter;
use serde_json::Value;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

pub(crate) use self::cluster::Cluster;
pub use self::cluster::{ClusterError, Source};
use self::{
    cluster::CallError,
    mirror::Mirror,
    pod::Pod,
    source::Said,
    watch::{Update, Watched},
    work::{Next, Work},
};
use crate::fabric::{Fabric, FabricError};

/// Inputs that wait for the bridge: a page of a list and more. Whoever has more waits.
const INPUTS_MAX: usize = 256;
/// Inputs that are taken in before anything is written.
const INPUTS_AT_ONCE: usize = 500;
/// Between tries while the fabric does not answer.
const FABRIC_RETRY: Duration = Duration::from_secs(1);

/// What a bridge needs.
#[derive(Debug)]
pub struct Options {
    /// Where the API server is.
    pub source: Source,
    /// Readiness of nodes is kept by Leases, as a cluster's own controllers expect. With the embedded API it
    /// follows the links, and no Lease is ever written.
    pub leases: bool,
    /// Addresses or names at which the hub answers for its nodes; published as theirs.
    pub addresses: Vec<String>,
    /// The port there, if it does.
    pub port: Option<u16>,
    /// Writes to the API server per second, Leases not counted.
    pub writes_per_second: u32,
    /// Seals secrets in `fleet`.
    pub seal: Option<SealKey>,
    /// The tier's id.
    pub tier: String,
    /// The hub's broker.
    pub broker: Handle,
    /// The hub's links.
    pub links: Arc<Links>,
    /// What the tier shares.
    pub fabric: Arc<dyn Fabric>,
    /// Its tasks run in this group and end with it.
    pub tasks: Tasks,
}

/// Starts a bridge. It runs until its tasks are asked to stop, whether the API server answers or not.
///
/// # Errors
/// See [`ClusterError`]: there is no way to an API server.
pub async fn start(options: Options, exporter: &Exporter) -> Result<(), ClusterError> {
    let cluster = Cluster::open(&options.source, options.writes_per_second).await?;
    exporter.register(cluster.metrics());
    let tasks = options.tasks.clone();
    tasks.spawn("kubernetes bridge", run(options, cluster));
    Ok(())
}

async fn run(options: Options, cluster: Cluster) {
    let stop = options.tasks.stopped();
    let running = async {
        let mut bridge = loop {
            match Box::pin(Bridge::open(&options, cluster.clone())).await {
                Ok(bridge) => break bridge,
                Err(FabricError::Stopped(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "the bridge cannot read fleet");
                    tokio::time::sleep(FABRIC_RETRY).await;
                }
            }
        };
        let (out, inputs) = mpsc::channel(INPUTS_MAX);
        bridge.follow(&options, &out);
        Box::pin(bridge.turn(inputs, out)).await;
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = running => {}
    }
}

/// What the bridge is told.
#[derive(Debug)]
enum Input {
    /// By the API server.
    Watched(Watched, Update),
    /// Of enrolments; `None`: all that there are have been told.
    Enrolled(Option<Said>),
    /// Which nodes are linked.
    Linked(BTreeMap<Arc<str>, &'static str>),
    /// By a node, in its space of statuses.
    Reported(Arc<str>, Option<Said>),
    /// An event, by a node.
    Told(Arc<str>, Bytes),
}

/// What became of a [`work::Task`].
#[derive(Debug)]
enum Outcome {
    /// An object, as the API server has it now; `None`: there is none.
    Object(Result<Option<Value>, CallError>),
    /// A Node, what was written to it, and how the API server shows that.
    Node { object: Value, written: (u64, u64) },
    /// Nothing was to be done.
    Nothing,
}

/// A node of the tier.
#[derive(Debug)]
struct Node {
    /// Its Node, if there is one.
    object: Option<node::Object>,
    enrolled: bool,
    link: node::Link,
    /// Since when its link is down.
    down_since: Instant,
    /// What was written last, and how the API server showed it.
    written: Option<(u64, u64)>,
    /// Ends what follows its reports.
    gone: CancellationToken,
}

/// What a node says of a pod.
#[derive(Debug, PartialEq, Eq)]
struct Report {
    node: Arc<str>,
    uid: Arc<str>,
    status: u64,
    finished: bool,
    /// What was written last, and how the API server showed it.
    written: Option<(u64, u64)>,
}

/// A token that stands in `fleet`.
#[derive(Debug)]
struct TokenHeld {
    uid: Arc<str>,
    audience: String,
    renew_at: Instant,
}

#[derive(Debug)]
struct Bridge {
    cluster: Cluster,
    broker: Handle,
    tasks: Tasks,
    tier: String,
    hub: node::Hub,
    mirror: Mirror,
    /// Writes, which wait for their turn in the budget.
    work: Work<Outcome>,
    /// Reads and Leases, which do not.
    swift: Work<Outcome>,
    events: event::Events,
    leases: lease::Leases,
    inputs: Option<mpsc::Sender<Input>>,

    pods: HashMap<Arc<str>, Pod>,
    pods_of: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// Nodes whose pods name a key, with how many do.
    users: HashMap<Arc<str>, BTreeMap<Arc<str>, usize>>,
    /// Uid and version of what can be named.
    metas: HashMap<Arc<str>, (Arc<str>, u64)>,
    tokens: HashMap<Arc<str>, TokenHeld>,
    /// Which pod a token is for.
    token_of: HashMap<Arc<str>, Arc<str>>,
    nodes: BTreeMap<Arc<str>, Node>,
    linked: BTreeMap<Arc<str>, &'static str>,
    reports: HashMap<Arc<str>, Report>,
    /// Which node has a static pod that is shown under a key.
    statics: HashMap<Arc<str>, Arc<str>>,
    /// Tolerations that a pod is given, of which version of it; `None` once it was.
    tolerations: HashMap<Arc<str>, Option<(u64, Vec<Value>)>>,

    /// What a list that goes on has shown.
    listing: BTreeMap<Watched, HashSet<Arc<str>>>,
    /// Kinds that were listed completely.
    listed: BTreeSet<Watched>,
    /// All enrolments are known.
    enrolled: bool,
    /// Everything stands in `fleet`, and nodes were told so.
    complete: bool,
    /// Nodes whose want may have changed.
    dirty: BTreeSet<Arc<str>>,
    /// Keys that may have to go.
    unused: BTreeSet<Arc<str>>,
}

impl Bridge {
    async fn open(options: &Options, cluster: Cluster) -> Result<Self, FabricError> {
        let mut tokens = HashMap::new();
        let each = |key: &str, object: &Value| {
            if key.starts_with(down::TOKENS) {
                tokens.insert(Arc::from(key), down::token_held(object));
            }
        };
        let mirror = Mirror::open(Arc::clone(&options.fabric), options.seal.clone(), each).await?;
        let hub =
            node::Hub { addresses: options.addresses.clone(), port: options.port, leases: options.leases };
        Ok(Self {
            cluster,
            broker: options.broker.clone(),
            tasks: options.tasks.clone(),
            tier: options.tier.clone(),
            hub,
            mirror,
            work: Work::new(),
            swift: Work::new(),
            events: event::Events::default(),
            leases: lease::Leases::new(),
            inputs: None,
            pods: HashMap::new(),
            pods_of: BTreeMap::new(),
            users: HashMap::new(),
            metas: HashMap::new(),
            tokens,
            token_of: HashMap::new(),
            nodes: BTreeMap::new(),
            linked: BTreeMap::new(),
            reports: HashMap::new(),
            statics: HashMap::new(),
            tolerations: HashMap::new(),
            listing: BTreeMap::new(),
            listed: BTreeSet::new(),
            enrolled: false,
            complete: false,
            dirty: BTreeSet::new(),
            unused: BTreeSet::new(),
        })
    }

    /// Starts everything that tells the bridge something but what follows one node.
    fn follow(&mut self, options: &Options, out: &mpsc::Sender<Input>) {
        for what in Watched::ALL {
            let following = watch::follow(self.cluster.clone(), what, out.clone());
            options.tasks.spawn("kubernetes watch of the bridge", Box::pin(following));
        }
        let broker = self.broker.clone();
        let enrolments = source::follow_state(
            broker.clone(),
            "".into(),
            "sys",
            up::IDENTITY,
            out.clone(),
            Input::Enrolled,
        );
        options.tasks.spawn("enrolments for the bridge", enrolments);
        let links = Arc::clone(&options.links);
        let links = source::follow_links(broker.clone(), links, out.clone(), Input::Linked);
        options.tasks.spawn("links for the bridge", links);
        let events = source::follow_topic(broker, event::TOPIC, out.clone(), Input::Told);
        options.tasks.spawn("events for the bridge", events);
    }

    /// Takes in what is told, and writes what follows from it, until everybody who tells something is gone or
    /// the broker stops.
    async fn turn(&mut self, mut inputs: mpsc::Receiver<Input>, out: mpsc::Sender<Input>) {
        self.inputs = Some(out);
        let mut settled = true;
        loop {
            let next = tokio::select! {
                biased;
                next = self.swift.next() => Some(next),
                next = self.work.next() => Some(next),
                input = inputs.recv() => {
                    let Some(input) = input else { return };
                    self.take(input).await;
                    None
                }
                () = tokio::time::sleep(FABRIC_RETRY), if !settled => None,
            };
            match next {
                Some(Next::Due(task)) => self.begin(task),
                Some(Next::Done(task, outcome)) => self.done(task, outcome),
                None => {}
            }
            for _ in 0..INPUTS_AT_ONCE {
                let Ok(input) = inputs.try_recv() else { break };
                self.take(input).await;
            }
            settled = match self.settle().await {
                Ok(()) => true,
                Err(FabricError::Stopped(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "the bridge cannot write fleet");
                    false
                }
            };
        }
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Watched(what, update) => {
                if self.on_update(what, update)
                    && let Err(error) = self.mirror.flush().await
                {
                    tracing::warn!(%error, "the bridge cannot write fleet");
                }
            }
            Input::Enrolled(said) => self.on_enrolled(said),
            Input::Linked(linked) => self.on_linked(linked),
            Input::Reported(node, Some(said)) => self.on_report(&node, said),
            Input::Reported(node, None) => self.on_all_said(&node),
            Input::Told(node, payload) => self.on_event(&node, &payload),
        }
    }
}
