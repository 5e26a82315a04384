//! What the nodes of one worker share.

use std::{
    collections::{BTreeMap, HashMap},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use broker::{
    Tasks, clock, core,
    fleet::{self, Fleet},
    link::{
        Counters, Links, Params,
        quic::{BindError, QuicSocket, Shape},
    },
};
use codec::{Flags, Kind, Record};
use hdrhistogram::Histogram;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    gate::Gate,
    mark::Mark,
    node::Leash,
    pki::{self, Identities, PkiError},
    wire::{Counts, Plan, histogram},
};

/// The nodes' common ground.
#[derive(Debug)]
pub struct Crew {
    /// What this worker is.
    pub plan: Plan,
    /// The nodes' brokers.
    pub fleet: Fleet,
    /// The nodes' certificates.
    pub identities: Identities,
    /// Who may dial.
    pub gate: Gate,
    /// Times of links.
    pub params: Arc<Params>,
    /// Counters of the links.
    pub counters: Arc<Counters>,
    /// The links, for their Streams.
    pub links: Arc<Links>,
    /// Ends links and nodes.
    pub stop: CancellationToken,
    /// Where the driver lives, and links that were replaced.
    pub tasks: Tasks,
    /// One for each node.
    pub leashes: Vec<Leash>,
    /// What is counted.
    pub tally: Arc<Tally>,
    sockets: Vec<QuicSocket>,
}

/// Why a worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum CrewError {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No address to dial.
    #[error("no hub to dial")]
    NoHub,
    /// Addresses of both kinds.
    #[error("the hubs have IPv4 and IPv6 addresses: name those of one kind")]
    Mixed,
}

impl Crew {
    /// Binds the sockets and starts the driver; no node is begun. Needs a runtime.
    ///
    /// # Errors
    /// See [`CrewError`].
    pub fn new(plan: Plan) -> Result<Arc<Self>, CrewError> {
        let scenario = &plan.scenario;
        let identities = Identities::open(&plan.kept, scenario.tickets)?;
        let shape = Shape::NODE.with_heartbeat(scenario.heartbeat);
        let local = local_of(&plan.hubs)?;
        let sockets = (0..plan.sockets).map(|_socket| QuicSocket::bind(local, shape));
        let sockets = sockets.collect::<Result<Vec<_>, _>>()?;
        let tasks = Tasks::new();
        let tally = Arc::new(Tally::default());
        let counters = Arc::<Counters>::default();
        let told = Arc::clone(&tally);
        counters.observe_round_trips(move |rtt| record(&told.heartbeat, rtt));
        let (prefix, first, run) = (plan.kept.prefix.clone(), plan.first, plan.run);
        let config = move |place: u32| node_config(&prefix, first + place, run);
        let (told, observed) = (Arc::clone(&tally), plan.run);
        let observe = move |place: u32, record: &Record| told.observe(place, record, observed);
        let fleet = fleet::start(plan.nodes, config, observe, &tasks);
        let params = Params { heartbeat: scenario.heartbeat, ..Params::default() };
        Ok(Arc::new(Self {
            fleet,
            identities,
            gate: Gate::new(plan.in_flight, plan.rate),
            params: Arc::new(params),
            counters,
            links: Arc::default(),
            stop: CancellationToken::new(),
            tasks,
            leashes: (0..plan.nodes).map(|_node| Leash::default()).collect(),
            tally,
            sockets,
            plan,
        }))
    }

    /// Which hub a node dials next, and from where. Nodes begin with different hubs, and come back from another
    /// port.
    #[must_use]
    pub fn way(&self, dials: u32) -> (SocketAddr, &QuicSocket) {
        let (hubs, sockets) = (&self.plan.hubs, &self.sockets);
        (hubs[dials as usize % hubs.len()], &sockets[(dials as usize / hubs.len()) % sockets.len()])
    }
}

/// Any address of the hubs' kind; of loopback, if that is where they all are.
fn local_of(hubs: &[SocketAddr]) -> Result<SocketAddr, CrewError> {
    let first = hubs.first().ok_or(CrewError::NoHub)?;
    if hubs.iter().any(|hub| hub.is_ipv4() != first.is_ipv4()) {
        return Err(CrewError::Mixed);
    }
    let loopback = hubs.iter().all(|hub| hub.ip().is_loopback());
    Ok(match (first, loopback) {
        (SocketAddr::V4(_), true) => (Ipv4Addr::LOCALHOST, 0).into(),
        (SocketAddr::V4(_), false) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        (SocketAddr::V6(_), true) => (Ipv6Addr::LOCALHOST, 0).into(),
        (SocketAddr::V6(_), false) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    })
}

/// An agent with the default policy. Its instance is always the same, so that the next run does not look like a
/// second machine of the same name; its histories are of this run.
fn node_config(prefix: &str, number: u32, run: u64) -> core::Config {
    let name = pki::name(prefix, number);
    let digest = Sha256::digest(&name);
    let instance = digest[..16].try_into().expect("a digest has 32 bytes");
    let seed = u64::from_le_bytes(digest[16..24].try_into().expect("8 bytes")) ^ run;
    core::Config::node(&name, instance, seed)
}

/// The newest value of an object at a node.
#[derive(Debug, Clone, Copy)]
struct Held {
    /// Incarnation and revision.
    revision: (u64, u64),
    number: u32,
}

/// What a worker counts and measures.
#[derive(Debug)]
pub struct Tally {
    /// Linked now.
    pub connected: AtomicU64,
    welcomed: AtomicU64,
    resumed: AtomicU64,
    failed: AtomicU64,
    lost: AtomicU64,
    noticed: AtomicU64,
    /// Messages published.
    pub published: AtomicU64,
    changes: AtomicU64,
    downs: AtomicU64,
    downs_disordered: AtomicU64,
    last_down_us: AtomicU64,
    backwards: AtomicU64,
    /// The State of this run: of a node (its place) the object that all want (true) or its own.
    held: Mutex<HashMap<(u32, bool), Held>>,
    /// Who answers messages from the hub.
    answers: OnceLock<mpsc::Sender<Mark>>,
    /// From the dial to Welcome.
    pub welcome: Mutex<Histogram<u64>>,
    /// Round trips of heartbeats.
    pub heartbeat: Mutex<Histogram<u64>>,
    /// From the hub's writing to the node.
    pub change: Mutex<Histogram<u64>>,
    ends: Mutex<BTreeMap<String, u64>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            connected: AtomicU64::new(0),
            welcomed: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            noticed: AtomicU64::new(0),
            published: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            downs: AtomicU64::new(0),
            downs_disordered: AtomicU64::new(0),
            last_down_us: AtomicU64::new(0),
            backwards: AtomicU64::new(0),
            held: Mutex::default(),
            answers: OnceLock::new(),
            welcome: Mutex::new(histogram()),
            heartbeat: Mutex::new(histogram()),
            change: Mutex::new(histogram()),
            ends: Mutex::default(),
        }
    }
}

/// Different texts that are kept; hubs and networks fail in few ways.
const ENDS_MAX: usize = 64;

/// Records a time, rounded to microseconds.
pub fn record(histogram: &Mutex<Histogram<u64>>, time: Duration) {
    record_us(histogram, u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
}

fn record_us(histogram: &Mutex<Histogram<u64>>, us: u64) {
    histogram.lock().expect("no panic under this lock").saturating_record(us.max(1));
}

impl Tally {
    pub(crate) fn welcomed(&self, after: Duration, had_ticket: bool) {
        self.welcomed.fetch_add(1, Relaxed);
        self.resumed.fetch_add(u64::from(had_ticket), Relaxed);
        record(&self.welcome, after);
    }

    pub(crate) fn failed(&self, what: &str) {
        self.failed.fetch_add(1, Relaxed);
        self.count_end(format!("no link: {what}"));
    }

    pub(crate) fn lost(&self, what: &str) {
        self.lost.fetch_add(1, Relaxed);
        self.count_end(format!("link ended: {what}"));
    }

    pub(crate) fn left(&self) {
        self.count_end("link ended: it was asked to".to_owned());
    }

    pub(crate) fn noticed(&self) {
        self.noticed.fetch_add(1, Relaxed);
    }

    /// Every message from the hub from now on is also told here.
    pub fn answer(&self, sender: mpsc::Sender<Mark>) {
        // The first one stays.
        drop(self.answers.set(sender));
    }

    /// A record has become durable at a node.
    fn observe(&self, place: u32, record: &Record, run: u64) {
        let is_down = match record.header.kind {
            Kind::PUT => false,
            // What the node published is its own.
            Kind::LOG if record.header.flags.contains(Flags::IMPORTED) => true,
            _ => return,
        };
        let Some(mark) = Mark::of_frame(&record.body, run) else { return };
        let now_us = clock::wall_us();
        if !is_down {
            self.changes.fetch_add(1, Relaxed);
            self.hold(place, record, &mark);
            return record_us(&self.change, now_us.saturating_sub(mark.time_us));
        }
        let before = self.downs.fetch_add(1, Relaxed);
        self.downs_disordered.fetch_add(u64::from(before != u64::from(mark.number)), Relaxed);
        self.last_down_us.store(now_us, Relaxed);
        if let Some(answers) = self.answers.get() {
            // One is in flight at a time; what comes on top of that nobody waits for.
            if answers.try_send(mark).is_err() {
                tracing::debug!(number = mark.number, "not answered");
            }
        }
    }

    fn hold(&self, place: u32, record: &Record, mark: &Mark) {
        let now = Held { revision: (record.header.epoch, record.header.seq), number: mark.number };
        let mut held = self.held.lock().expect("no panic under this lock");
        let before = held.entry((place, mark.node == u32::MAX)).or_insert(now);
        if now.revision < before.revision {
            self.backwards.fetch_add(1, Relaxed);
        }
        *before = now;
    }

    /// Numbers of the newest values, as [`crate::wire::Numbers::held`] has them; 0: none.
    #[must_use]
    pub fn held(&self, nodes: u32) -> Vec<[u32; 2]> {
        let held = self.held.lock().expect("no panic under this lock");
        let number = |place, shared| held.get(&(place, shared)).map_or(0, |held| held.number);
        (0..nodes).map(|place| [number(place, true), number(place, false)]).collect()
    }

    /// When the last message from the hub arrived, wall microseconds.
    #[must_use]
    pub fn last_down_us(&self) -> u64 {
        self.last_down_us.load(Relaxed)
    }

    fn count_end(&self, what: String) {
        let mut ends = self.ends.lock().expect("no panic under this lock");
        let other = || "other".to_owned();
        let what = if ends.len() < ENDS_MAX || ends.contains_key(&what) { what } else { other() };
        *ends.entry(what).or_default() += 1;
    }

    /// How links ended, and why dials came to nothing.
    #[must_use]
    pub fn ends(&self) -> BTreeMap<String, u64> {
        self.ends.lock().expect("no panic under this lock").clone()
    }

    /// Where the nodes stand.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            connected: self.connected.load(Relaxed),
            welcomed: self.welcomed.load(Relaxed),
            resumed: self.resumed.load(Relaxed),
            failed: self.failed.load(Relaxed),
            lost: self.lost.load(Relaxed),
            noticed: self.noticed.load(Relaxed),
            published: self.published.load(Relaxed),
            changes: self.changes.load(Relaxed),
            downs: self.downs.load(Relaxed),
            downs_disordered: self.downs_disordered.load(Relaxed),
            backwards: self.backwards.load(Relaxed),
        }
    }

    /// Forgets the times.
    pub fn forget(&self) {
        for times in [&self.welcome, &self.heartbeat, &self.change] {
            times.lock().expect("no panic under this lock").reset();
        }
    }
}
