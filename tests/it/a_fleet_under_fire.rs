//! Pins that a fleet keeps what it was promised while its tier is shot at: three replicas, nats-servers as a cluster,
//! nodes that publish and are told of changes of State; replicas and servers end at random, and what lies between
//! them is cut or falls silent. At the end nothing is lost, nothing is there twice, State is equal and never went
//! back; and all the time, read from the tier itself, each node is one replica's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use cloudhub::fabric::nats::{
    claims::{Claim, DEAD_AFTER, GIVE_UP_AFTER, Lease},
    connection::Connection,
    follow::{Entry, Follow, Followed, Start},
    names::Bucket,
};
use octobus_tests::{
    clock,
    octobus::{Running, binary, folder},
    process::Process,
    seed,
    tier::Tier,
};
use ops::{api::SessionRow, client::Client};
use rand::{Rng as _, rngs::SmallRng};
use serde_json::Value;
use tokio::time::timeout;

use crate::a_tier_under_fire::connect;

const HUBS: usize = 3;
/// Until all nodes are linked, and from the last shot to everything having arrived.
const PATIENCE: Duration = Duration::from_secs(180);
/// How often it is asked whose the nodes are.
const SAMPLE: Duration = Duration::from_secs(1);
/// A replica lets go of a node this long after another has taken it, at the latest: it may be cut from the servers, and
/// then it knows that by itself only. The rest is for a machine that is busy.
const OVERLAP_MAX: Duration = Duration::from_secs(GIVE_UP_AFTER.as_secs() + 4);

/// What is shot at, and how long.
struct Size {
    servers: usize,
    nodes: u32,
    heartbeat: &'static str,
    fire: Duration,
    /// From the last shot to the last message.
    calm: Duration,
    /// Messages of each node in a second.
    per_s: f64,
    /// Changes of State in a second.
    changes_per_s: f64,
}

impl Size {
    const fn of(servers: usize, nodes: u32, fire: u64) -> Self {
        Self {
            servers,
            nodes,
            heartbeat: "1s",
            fire: Duration::from_secs(fire),
            calm: Duration::from_secs(15),
            per_s: 1.0,
            changes_per_s: 10.0,
        }
    }
}

#[test]
fn sixty_nodes_on_three_servers() {
    under_fire(&Size::of(3, 60, 15));
}

#[test]
#[ignore = "nightly: minutes of fire at a hundred nodes"]
fn nightly_a_hundred_nodes_on_three_servers() {
    under_fire(&Size { calm: Duration::from_secs(30), ..Size::of(3, 100, 180) });
}

#[test]
#[ignore = "nightly: minutes of fire at a thousand nodes"]
fn nightly_a_thousand_nodes_on_three_servers() {
    let calm = Duration::from_secs(40);
    under_fire(&Size { heartbeat: "5s", calm, per_s: 0.2, ..Size::of(3, 1_000, 180) });
}

#[test]
#[ignore = "nightly: minutes of fire at three thousand nodes"]
fn nightly_three_thousand_nodes_on_three_servers() {
    let calm = Duration::from_secs(60);
    under_fire(&Size { heartbeat: "10s", calm, per_s: 0.05, ..Size::of(3, 3_000, 240) });
}

#[test]
#[ignore = "nightly: minutes of fire at three thousand nodes"]
fn nightly_three_thousand_nodes_on_one_server() {
    let calm = Duration::from_secs(60);
    under_fire(&Size { heartbeat: "10s", calm, per_s: 0.05, ..Size::of(1, 3_000, 240) });
}

fn under_fire(size: &Size) {
    let folder = folder();
    let seed = seed::seed();
    let mut tier = Tier::cuttable(folder.path(), HUBS, size.servers, size.heartbeat);
    let mut running: Vec<Option<Running>> = tier.hubs.iter().map(|hub| Some(hub.start())).collect();
    let admins: Vec<PathBuf> = running.iter().flatten().map(Running::admin).collect();
    let mut fleet = fleet(size, &tier, &admins);
    let watch = Watch::start(&tier, admins, size.nodes);
    let linked = clock::now();
    clock::wait_for("every node to be linked", PATIENCE, || {
        assert!(fleet.exited().is_none(), "{}", fleet.output());
        watch.at_peace_since(linked).then_some(())
    });
    eprintln!("{} nodes linked after {:?}", size.nodes, linked.elapsed());

    let mut random = seed::rng(seed, 1);
    let mut shots: BTreeMap<&'static str, u32> = BTreeMap::new();
    let began = clock::now();
    while began.elapsed() < size.fire {
        let kind = shoot(&mut random, &mut tier, &mut running);
        *shots.entry(kind).or_default() += 1;
        clock::pause(Duration::from_millis(random.random_range(300..2_000)));
        watch.check();
    }
    let calm = clock::now();
    eprintln!("{shots:?} in {:?}", began.elapsed());
    // Before the fleet ends, all its nodes are owned again.
    clock::wait_for("each node to be one live replica's", PATIENCE, || {
        watch.check();
        assert!(fleet.exited().is_none(), "{}\n{}", watch.unrest(), fleet.output());
        watch.at_peace_since(calm).then_some(())
    });
    eprintln!("each node is one live replica's {:?} after the last shot", calm.elapsed());
    let status = fleet.wait(size.fire + size.calm + 2 * PATIENCE);
    let line = fleet.stdout().pop().unwrap_or_default();
    assert!(status.success(), "{status}:\n{}", fleet.output());
    let told: Value = serde_json::from_str(&line).unwrap();
    let count = |key: &str| told[key].as_u64().unwrap_or_else(|| panic!("{key} of {told}"));
    for key in ["missing", "twice", "disordered", "behind", "backwards"] {
        assert_eq!(count(key), 0, "{key} of {told}");
    }
    assert_eq!(count("arrived"), count("published"));
    assert!(count("published") > u64::from(size.nodes) && count("changes_written") > 20, "{told}");
    let seen = watch.stop();
    eprintln!(
        "{} messages, {} changes of State ({} refused), {} welcomes by ticket, {} failed dials; {} samples, {} claims",
        count("published"),
        count("changes_written"),
        count("changes_refused"),
        count("resumed"),
        count("failed_dials"),
        seen.samples,
        seen.claims_seen,
    );
    eprintln!("longest time that two replicas had a link of one node: {:?}", seen.overlap_max);
    running.into_iter().flatten().for_each(Running::stop);
}

/// The fleet, as a process of its own.
fn fleet(size: &Size, tier: &Tier, admins: &[PathBuf]) -> Process {
    let (user, _password) = tier.servers.hub_user();
    let mut command = Command::new(binary("loadtest"));
    command.arg("endure").arg("--ca").arg(tier.alone()).args(["--fabric", &tier.servers.list()]);
    command.args(["--fabric-user", user, "--fabric-password-file"]).arg(tier.servers.password_file());
    for (hub, admin) in tier.hubs.iter().zip(admins) {
        command.args(["--hub", &hub.address("--quic").to_string()]).arg("--admin").arg(admin);
    }
    let hold = (size.fire + size.calm).as_secs();
    let (nodes, hold) = (size.nodes.to_string(), format!("{hold}s"));
    command.args([
        "--nodes",
        &nodes,
        "--heartbeat",
        size.heartbeat,
        "--hold",
        &hold,
        "-o",
        "json",
        "--cache",
    ]);
    command.arg(tier.alone().join("fleet"));
    for (key, value) in [("per_s", size.per_s), ("changes_per_s", size.changes_per_s)] {
        command.args(["--set", &format!("{key}={value}")]);
    }
    command.env_remove("RUST_LOG");
    Process::spawn("loadtest", &mut command)
}

/// One shot at the tier, and what was hit is put right again.
fn shoot(random: &mut SmallRng, tier: &mut Tier, running: &mut [Option<Running>]) -> &'static str {
    let servers = tier.servers.count();
    let pause = |random: &mut SmallRng, longest| Duration::from_millis(random.random_range(300..longest));
    let hub = random.random_range(0..HUBS);
    let server = random.random_range(0..servers);
    let other = (server + random.random_range(1..servers.max(2))) % servers;
    match random.random_range(0..10) {
        0..4 => {
            drop(running[hub].take());
            clock::pause(pause(random, 2_000));
            running[hub] = Some(tier.hubs[hub].start());
            "replica killed"
        }
        4..7 => {
            tier.servers.kill(server);
            clock::pause(pause(random, 2_000));
            tier.servers.run(server);
            "server killed"
        }
        7 if servers > 1 => {
            tier.servers.cut(server, other, true);
            clock::pause(pause(random, 4_000));
            tier.servers.cut(server, other, false);
            "servers cut from each other"
        }
        8 if servers > 1 => {
            tier.servers.stall(server, other, true);
            clock::pause(pause(random, 4_000));
            tier.servers.stall(server, other, false);
            "servers silent to each other"
        }
        _ => {
            // Beyond the time after which it has to let go of its nodes, at times.
            let longest = if random.random_bool(0.3) { 13_000 } else { 3_000 };
            let silent = random.random_bool(0.5);
            if silent {
                tier.stall(hub, true)
            } else {
                tier.cut(hub, true)
            }
            clock::pause(pause(random, longest));
            if silent {
                tier.stall(hub, false)
            } else {
                tier.cut(hub, false)
            }
            "replica cut from the servers"
        }
    }
}

/// Sees whose nodes are, all the time: every claim and lease as the tier has them, and what each replica says.
struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<std::sync::Mutex<Seen>>,
    thread: std::thread::JoinHandle<()>,
}

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    leases: HashMap<String, (Lease, Instant)>,
    claims: HashMap<String, Claim>,
    claims_seen: u64,
    samples: u64,
    /// Nodes that two replicas have a link of, and since when.
    overlaps: HashMap<String, Instant>,
    overlap_max: Duration,
    /// When each node was last one live replica's, by claim and by link.
    peace: Option<Instant>,
    /// Why that was not so at the last look.
    unrest: String,
    wrong: Vec<String>,
}

impl Watch {
    fn start(tier: &Tier, admins: Vec<PathBuf>, nodes: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let nats = runtime.block_on(connect(tier));
        let (stop, seen) = (Arc::<AtomicBool>::default(), Arc::<std::sync::Mutex<Seen>>::default());
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = std::thread::spawn(move || {
            runtime.spawn(follow(nats, Arc::clone(&shared)));
            runtime.block_on(async {
                while !stopped.load(Ordering::Relaxed) {
                    let listed = sessions(&admins).await;
                    shared.lock().unwrap().sample(&listed, nodes);
                    tokio::time::sleep(SAMPLE).await;
                }
            });
        });
        Self { stop, seen, thread }
    }

    fn check(&self) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.wrong.is_empty(), "{:#?}", seen.wrong);
    }

    fn at_peace_since(&self, since: Instant) -> bool {
        self.seen.lock().unwrap().peace.is_some_and(|peace| peace > since)
    }

    fn unrest(&self) -> String {
        self.seen.lock().unwrap().unrest.clone()
    }

    fn stop(self) -> Seen {
        self.check();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

/// Nodes that each replica has a link of; none of one that does not answer.
async fn sessions(admins: &[PathBuf]) -> Vec<BTreeSet<String>> {
    let mut all = Vec::new();
    for admin in admins {
        let client = Client::new(admin);
        let asked = timeout(Duration::from_secs(3), client.get::<Vec<SessionRow>>("/v1/sessions", &[])).await;
        let rows = asked.ok().and_then(Result::ok).unwrap_or_default();
        let links = rows.into_iter().filter(|row| row.kind == "link" && row.connected && row.established);
        all.push(links.map(|row| row.name).collect());
    }
    all
}

async fn follow(nats: Connection, seen: Arc<std::sync::Mutex<Seen>>) {
    let mut follow = Follow::new(nats, Bucket::Sys.stream().to_owned(), Start::Everything);
    loop {
        match follow.next().await {
            Followed::Entries { entries, .. } => {
                let mut seen = seen.lock().unwrap();
                entries.iter().for_each(|entry| seen.entry(entry));
            }
            Followed::Began { .. } | Followed::CaughtUp { .. } => {}
            lost @ (Followed::Gone | Followed::WentBack { .. }) => {
                seen.lock().unwrap().wrong.push(format!("the servers lost claims: {lost:?}"));
            }
        }
    }
}

impl Seen {
    fn entry(&mut self, entry: &Entry) {
        let (Ok(key), Some(value)) = (Bucket::Sys.key(&entry.subject), &entry.value) else { return };
        if let Some(replica) = key.strip_prefix("lease/") {
            let lease: Lease = serde_json::from_slice(value).unwrap();
            let before = self.leases.insert(replica.to_owned(), (lease.clone(), clock::now()));
            if before.is_some_and(|(before, _at)| before.epoch > lease.epoch) {
                self.wrong.push(format!("an older life of {replica} renewed its lease: {lease:?}"));
            }
        } else if let Some(node) = key.strip_prefix("claims/") {
            let claim: Claim = serde_json::from_slice(value).unwrap();
            self.claims_seen += 1;
            if let Some(before) = self.claims.get(node) {
                self.follows(node, &before.clone(), &claim);
            }
            self.claims.insert(node.to_owned(), claim);
        }
    }

    /// A claim in the place of another: counted on, and of a link that was dialled later unless the other is void.
    fn follows(&mut self, node: &str, before: &Claim, claim: &Claim) {
        let same =
            (&before.replica, before.epoch, before.session) == (&claim.replica, claim.epoch, claim.session);
        if same {
            return;
        }
        if claim.session <= before.session {
            self.wrong.push(format!("{node}: {claim:?} in the place of {before:?}"));
        }
        let holds = !before.away
            && self.leases.get(&before.replica).is_some_and(|(lease, at)| {
                lease.epoch == before.epoch && !lease.closed && at.elapsed() < DEAD_AFTER / 2
            });
        if holds && claim.stamp < before.stamp {
            self.wrong.push(format!("{node}: a link dialled earlier took it: {claim:?} after {before:?}"));
        }
    }

    fn sample(&mut self, listed: &[BTreeSet<String>], nodes: u32) {
        self.samples += 1;
        let now = clock::now();
        let mut count: BTreeMap<&String, u32> = BTreeMap::new();
        listed.iter().flatten().for_each(|node| *count.entry(node).or_default() += 1);
        let twice: BTreeSet<&String> =
            count.iter().filter(|(_node, replicas)| **replicas > 1).map(|(node, _replicas)| *node).collect();
        self.overlaps.retain(|node, _since| twice.contains(node));
        for node in twice {
            let since = *self.overlaps.entry(node.clone()).or_insert(now);
            let overlap = now.saturating_duration_since(since);
            self.overlap_max = self.overlap_max.max(overlap);
            if overlap > OVERLAP_MAX {
                self.wrong.push(format!("{node}: two replicas have had it for {overlap:?}"));
            }
        }
        let replica = |number| format!("hub-{number}");
        let owned = |number: usize, node: &str| {
            let claim = self.claims.get(node);
            claim.is_some_and(|claim| {
                let lease = self.leases.get(&claim.replica);
                let lives = lease.is_some_and(|(lease, _at)| lease.epoch == claim.epoch && !lease.closed);
                claim.replica == replica(number) && !claim.away && lives
            })
        };
        let links =
            || listed.iter().enumerate().flat_map(|(at, nodes)| nodes.iter().map(move |node| (at, node)));
        let strange: Vec<_> = links().filter(|(at, node)| !owned(*at, node)).collect();
        if strange.is_empty() && count.len() == nodes as usize && self.overlaps.is_empty() {
            self.peace = Some(now);
            return;
        }
        let first = strange.first().map(|(at, node)| (replica(*at), *node, self.claims.get(*node)));
        self.unrest = format!(
            "{} of {nodes} nodes linked, {} twice, {} not as claimed, like {first:?}; leases {:?}",
            count.len(),
            self.overlaps.len(),
            strange.len(),
            self.leases
        );
    }
}
