//! Pins that a tier keeps its promises while its parts are killed: replicas and nats-servers end at random, nodes
//! with durable telemetry move between what is left, and at the end nothing is lost, nothing is there twice, State
//! is equal everywhere and went backwards nowhere, and every node is one replica's.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use broker::{
    Handle,
    event::{Command, Event, Front, Output, Publish, Reply, Response, SessionOpen, StateEntry, Target},
};
use bytes::Bytes;
use cloudhub::fabric::nats::{
    claims::{Claim, Lease},
    connection::{Access, Connection, Tls},
    names::{self, Bucket},
};
use codec::{FrameView, Kind, Record, batch, frame::FrameParts};
use edgehub::{
    edge::Edge,
    join::{JoinOptions, join},
};
use octobus_tests::{
    clock,
    octobus::{Running, create_token, folder, octobus},
    seed,
    tier::Tier,
};
use ops::config::{Config, Role, Sources};
use rand::Rng as _;
use tokio::time::sleep;

const SHARDS: u32 = 2;
/// From the last kill to everything having arrived.
const CALM: Duration = Duration::from_secs(90);
const HUBS: usize = 3;

#[test]
fn three_replicas_on_one_server() {
    under_fire(1, 12, Duration::from_secs(15));
}

#[test]
fn three_replicas_on_three_servers() {
    under_fire(3, 12, Duration::from_secs(20));
}

#[test]
#[ignore = "nightly: minutes of kills with a hundred nodes"]
fn nightly_three_replicas_on_three_servers_for_minutes() {
    under_fire(3, 100, Duration::from_secs(300));
}

#[test]
fn buckets_and_streams_that_are_deleted_under_nodes_remove_nothing_from_them() {
    let folder = folder();
    let tier = Tier::new(folder.path(), 1, 1);
    let hub = tier.hubs[0].start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dialled = tier.dialled();
    let nodes: Vec<Node> = (0..8)
        .map(|number| {
            let name = format!("edge-{number}");
            let token = create_token(&hub.admin(), &name);
            let url = format!("https://{}", hub.endpoint("bootstrap"));
            let data = folder.path().join(&name);
            runtime.block_on(start_node(&name, url, token, &data, &dialled))
        })
        .collect();
    let admin = hub.admin();
    let admin = admin.to_str().unwrap();
    let common = "obj/core/configmaps/ns/common";
    for node in &nodes {
        let _said =
            octobus(&["want", "add", "--admin", admin, &node.name, common, &own_key(&node.name)]).ok();
        let _said = octobus(&["put", "--admin", admin, "fleet", &own_key(&node.name), "own"]).ok();
    }
    let _said = octobus(&["put", "--admin", admin, "fleet", common, "before"]).ok();
    let _said = octobus(&["barrier", "--admin", admin]).ok();
    runtime.block_on(async {
        let nats = connect(&tier).await;
        for node in &nodes {
            fleet_is_equal(&nats, node).await;
        }
        let (stop, published) = (Arc::<AtomicBool>::default(), Arc::clone(&nodes[0].published));
        let publishing = runtime.spawn(publish(nodes[0].edge.handle().clone(), published, Arc::clone(&stop)));
        let log = names::log_stream(names::shard(&nodes[0].name, SHARDS));
        for stream in [Bucket::Fleet.stream(), Bucket::Sys.stream(), Bucket::Node.stream(), &log] {
            let path = format!("STREAM.DELETE.{stream}");
            let answer: serde_json::Value = nats.ask(&path, &serde_json::json!({})).await.unwrap();
            assert_eq!(answer["success"], true, "{answer}");
        }
        // Nothing goes while all of it is put back.
        let until = clock::now() + Duration::from_secs(8);
        while clock::now() < until {
            for node in &nodes {
                let held: Vec<String> =
                    fleet_of(node.edge.handle()).await.into_iter().map(|entry| entry.key).collect();
                let has = |key: &str| held.iter().any(|held| held == key);
                assert!(has(common) && has(&own_key(&node.name)), "{} holds {held:?}", node.name);
            }
            sleep(Duration::from_millis(100)).await;
        }
        stop.store(true, Ordering::Relaxed);
        publishing.await.unwrap();
    });
    clock::wait_for("a change of State after it", CALM, || {
        octobus(&["put", "--admin", admin, "fleet", common, "after"]).status.success().then_some(())
    });
    runtime.block_on(async {
        let nats = connect(&tier).await;
        for node in nodes {
            arrived(&node).await;
            fleet_is_equal(&nats, &node).await;
            Box::pin(node.edge.stop(Duration::from_secs(10))).await;
        }
    });
    hub.stop();
}

/// One node, and what it has done.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) edge: Edge,
    pub(crate) published: Arc<AtomicU64>,
}

fn under_fire(servers: usize, nodes: usize, time: Duration) {
    let folder = folder();
    let seed = seed::seed();
    let mut tier = Tier::new(folder.path(), HUBS, servers);
    let mut running: Vec<Option<Running>> = tier.hubs.iter().map(|hub| Some(hub.start())).collect();
    // Nodes go on while this thread kills and waits.
    let runtime = Arc::new(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let driven = Arc::clone(&runtime);
    std::thread::spawn(move || driven.block_on(std::future::pending::<()>()));
    let stop = Arc::new(AtomicBool::new(false));
    let backwards = Arc::new(Mutex::new(Vec::new()));
    let nodes: Vec<Node> = (0..nodes)
        .map(|number| {
            let hub = running[number % HUBS].as_ref().unwrap();
            let name = format!("edge-{number}");
            let token = create_token(&hub.admin(), &name);
            let url = format!("https://{}", hub.endpoint("bootstrap"));
            let data = folder.path().join(&name);
            runtime.block_on(start_node(&name, url, token, &data, &tier.dialled()))
        })
        .collect();
    let admin = running[0].as_ref().unwrap().admin();
    for node in &nodes {
        let (common, own) = ("obj/core/configmaps/ns/common".to_owned(), own_key(&node.name));
        let args = ["want", "add", "--admin", admin.to_str().unwrap(), &node.name, &common, &own];
        let _said = octobus(&args).ok();
    }
    let _said = octobus(&["barrier", "--admin", admin.to_str().unwrap()]).ok();
    for node in &nodes {
        let (handle, published) = (node.edge.handle().clone(), Arc::clone(&node.published));
        runtime.spawn(publish(handle, published, Arc::clone(&stop)));
        runtime.spawn(watch(node.name.clone(), node.edge.handle().clone(), Arc::clone(&backwards)));
    }

    let mut random = seed::rng(seed, 1);
    let (mut kills, mut written, mut crowded) = (0, 0_u64, 0);
    let until = clock::now() + time;
    while clock::now() < until {
        let pause = Duration::from_millis(random.random_range(300..1_500));
        if random.random_bool(0.5) {
            let victim = random.random_range(0..HUBS);
            drop(running[victim].take());
            clock::pause(pause);
            written += change(&running, written, &nodes);
            running[victim] = Some(tier.hubs[victim].start());
        } else {
            let victim = random.random_range(0..servers);
            tier.servers.kill(victim);
            clock::pause(pause);
            tier.servers.run(victim);
        }
        kills += 1;
        written += change(&running, written, &nodes);
        // Two claims at once would show as more nodes than there are, and go on.
        let owned: u64 = running.iter().flatten().filter_map(nodes_owned).sum();
        crowded = if owned > nodes.len() as u64 { crowded + 1 } else { 0 };
        assert!(crowded < 3, "{owned} nodes are owned, and there are {}", nodes.len());
    }
    stop.store(true, Ordering::Relaxed);
    eprintln!("{kills} kills, {written} changes of State");

    runtime.block_on(async {
        for node in &nodes {
            arrived(node).await;
        }
    });
    let said = backwards.lock().unwrap().clone();
    assert!(said.is_empty(), "{said:?}");
    // The last word of State reaches everybody.
    change_until_taken(&running, "obj/core/configmaps/ns/common", "the end");
    runtime.block_on(async {
        let nats = connect(&tier).await;
        for node in &nodes {
            let published = node.published.load(Ordering::Relaxed);
            assert!(published > 20, "{} has published {published}", node.name);
            once_in_order(&nats, &node.name, published).await;
            retained_is_equal(&nats, node).await;
            fleet_is_equal(&nats, node).await;
            owner(&nats, &node.name).await;
        }
        for node in nodes {
            Box::pin(node.edge.stop(Duration::from_secs(10))).await;
        }
    });
    running.into_iter().flatten().for_each(Running::stop);
}

pub(crate) async fn connect(tier: &Tier) -> Connection {
    let (list, (user, password)) = (tier.servers.list(), tier.servers.hub_user());
    let access = Access {
        servers: list.split(',').map(str::to_owned).collect(),
        name: "test".to_owned(),
        login: Some((user.to_owned(), password.to_owned())),
        tls: Tls::default(),
    };
    Connection::open(&access, SHARDS).await.unwrap()
}

pub(crate) fn own_key(node: &str) -> String {
    format!("obj/core/configmaps/ns/{node}")
}

pub(crate) async fn start_node(name: &str, url: String, token: String, data: &Path, hubs: &str) -> Node {
    Box::pin(join(data, &JoinOptions { hub: url, token, again: false })).await.unwrap();
    let flags = [
        ("--data", data.to_str().unwrap()),
        ("--hub", hubs),
        ("--mqtt", "off"),
        ("--api", "off"),
        ("--nats", "off"),
        ("--metrics", "off"),
        ("--anonymous", "true"),
    ];
    let flags = flags.map(|(flag, value)| (flag, value.to_owned())).to_vec();
    let env = vec![("OCTOBUS_LIMITS_HEARTBEAT".to_owned(), "1s".to_owned())];
    let config = Config::resolve(Role::Edge, Sources { file: None, env, flags }).unwrap();
    let edge = Box::pin(Edge::start(&config)).await.unwrap();
    Node { name: name.to_owned(), edge, published: Arc::default() }
}

/// Durable telemetry: the number of each message is its payload; each tenth is retained too.
pub(crate) async fn publish(broker: Handle, published: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let (session, mut outbox) = broker.open_session();
    let open = SessionOpen {
        session,
        front: Front::Internal,
        client_id: "".into(),
        clean_start: true,
        expiry_s: 0,
        receive_max: u16::MAX,
        will: None,
    };
    broker.send(Event::SessionOpened(open), 0).await.unwrap();
    let mut outputs = std::collections::VecDeque::new();
    for number in 1.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (payload, retain) = (number.to_string(), number % 10 == 0);
        let topic = if retain { format!("level/{}", number / 10 % 3) } else { "samples".to_owned() };
        let parts = FrameParts { topic: &topic, payload: payload.as_bytes(), ..FrameParts::default() };
        let message = Publish {
            target: Target::Own,
            frame: parts.encode(),
            qos: 1,
            packet_id: 1,
            dup: false,
            retain,
            reply: None,
        };
        broker.send(Event::Published { session, messages: vec![message] }, 64).await.unwrap();
        let mut acknowledged = false;
        while !acknowledged {
            outbox.recv(&mut outputs).await;
            let mut cost = 0;
            for output in outputs.drain(..) {
                cost += output.cost();
                acknowledged |= matches!(output, Output::Reply(Reply::PubAck(_)));
            }
            broker.send(Event::Sent { session, bytes: cost }, 0).await.unwrap();
        }
        published.store(number, Ordering::Relaxed);
        sleep(Duration::from_millis(20)).await;
    }
}

/// Holds that no key of `fleet` at a node ever goes back.
pub(crate) async fn watch(node: String, broker: Handle, backwards: Arc<Mutex<Vec<String>>>) {
    let mut held: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    loop {
        for entry in fleet_of(&broker).await {
            let pair = (entry.incarnation, entry.revision);
            let before = held.insert(entry.key.clone(), pair).unwrap_or_default();
            if pair < before {
                backwards.lock().unwrap().push(format!("{node}: {} from {before:?} to {pair:?}", entry.key));
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

pub(crate) async fn fleet_of(broker: &Handle) -> Vec<StateEntry> {
    state_of(broker, "", "fleet").await
}

async fn state_of(broker: &Handle, origin: &str, space: &str) -> Vec<StateEntry> {
    let command = Command::StateList {
        origin: origin.into(),
        space: space.into(),
        prefix: String::new(),
        after: None,
        limit: 1_000,
        at: None,
    };
    match broker.call(command).await {
        Ok(Response::Entries { entries, .. }) => entries,
        _ => Vec::new(),
    }
}

/// Changes what nodes want, at any replica that runs; how many were taken.
fn change(running: &[Option<Running>], number: u64, nodes: &[Node]) -> u64 {
    let Some(hub) = running.iter().flatten().next() else { return 0 };
    let node = &nodes[usize::try_from(number).unwrap_or(0) % nodes.len()].name;
    let keys = ["obj/core/configmaps/ns/common".to_owned(), own_key(node)];
    let put = |key: &String| {
        let admin = hub.admin();
        let value = number.to_string();
        octobus(&["put", "--admin", admin.to_str().unwrap(), "fleet", key, &value]).status.success()
    };
    keys.iter().map(|key| u64::from(put(key))).sum()
}

fn change_until_taken(running: &[Option<Running>], key: &str, value: &str) {
    let hub = running.iter().flatten().next().expect("all run");
    clock::wait_for("the last change of State", CALM, || {
        let admin = hub.admin();
        octobus(&["put", "--admin", admin.to_str().unwrap(), "fleet", key, value])
            .status
            .success()
            .then_some(())
    });
}

/// What a replica says of itself.
fn nodes_owned(hub: &Running) -> Option<u64> {
    let page = page(hub.endpoint("metrics"))?;
    page.lines().find_map(|line| line.strip_prefix("octobus_nodes_owned ")?.parse().ok())
}

fn page(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Waits until a node holds nothing that was not acknowledged above.
pub(crate) async fn arrived(node: &Node) {
    let until = clock::now() + CALM;
    loop {
        let Ok(Response::Stats(stats)) = node.edge.handle().call(Command::Stats).await else {
            panic!("no stats");
        };
        if stats.log_unacknowledged == 0 && stats.links == 1 {
            return;
        }
        assert!(
            clock::now() < until,
            "{}: {} records have not arrived, {} links; {:?}",
            node.name,
            stats.log_unacknowledged,
            stats.links,
            node.edge.handle().call(Command::Conditions).await
        );
        sleep(Duration::from_millis(100)).await;
    }
}

fn records_of(payload: &Bytes) -> Vec<Record> {
    let prefix = payload[..batch::Prefix::LEN].try_into().unwrap();
    let prefix = batch::Prefix::decode(prefix).unwrap();
    batch::decode(&prefix, payload.slice(batch::Prefix::LEN..)).unwrap()
}

/// Messages of a node that the tier's Log has.
pub(crate) async fn messages_of(nats: &Connection, node: &str) -> u64 {
    let stream = names::log_stream(names::shard(node, SHARDS));
    let subject = names::log_subject(node, "default", SHARDS);
    let (mut next, mut count) = (1, 0);
    while let Some(stored) = nats.next(&stream, &subject, next).await.unwrap() {
        next = stored.sequence + 1;
        count += records_of(&stored.payload).len() as u64;
    }
    count
}

/// Everything that was acknowledged to the node's publisher stands in the tier's Log, once, in order; one more may.
pub(crate) async fn once_in_order(nats: &Connection, node: &str, published: u64) {
    let stream = names::log_stream(names::shard(node, SHARDS));
    let subject = names::log_subject(node, "default", SHARDS);
    let (mut next, mut seq, mut number) = (1, 0, 0_u64);
    while let Some(stored) = nats.next(&stream, &subject, next).await.unwrap() {
        next = stored.sequence + 1;
        for record in records_of(&stored.payload) {
            assert_eq!(record.header.kind, Kind::LOG, "{node}: a gap after seq {seq}");
            assert_eq!(record.header.seq, seq + 1, "{node}: lost or twice");
            seq += 1;
            let view = FrameView::parse(&record.body).unwrap();
            assert_eq!(view.payload(), (number + 1).to_string().as_bytes(), "{node}");
            number += 1;
        }
    }
    assert!(number >= published && number <= published + 1, "{node}: {number} of {published}");
}

/// What the node has retained is what the tier holds of it.
pub(crate) async fn retained_is_equal(nats: &Connection, node: &Node) {
    let until = clock::now() + CALM;
    for entry in state_of(node.edge.handle(), &node.name, "retained").await {
        loop {
            let key = format!("{}/retained/{}", node.name, entry.key);
            let stored = nats.get(Bucket::Node, &key).await.unwrap().and_then(|found| found.value);
            let record = stored.and_then(|mut stored| Record::take(&mut stored));
            let pair = record.as_ref().map(|record| (record.header.epoch, record.header.seq));
            if pair == Some((entry.incarnation, entry.revision)) {
                assert_eq!(record.unwrap().body, entry.frame);
                break;
            }
            assert!(clock::now() < until, "{key}: the tier has {pair:?}, the node {entry:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What the node wants is what the tier says.
pub(crate) async fn fleet_is_equal(nats: &Connection, node: &Node) {
    let until = clock::now() + CALM;
    for key in
        ["obj/core/configmaps/ns/common".to_owned(), own_key(&node.name), format!("want/{}", node.name)]
    {
        loop {
            let stored = nats.get(Bucket::Fleet, &key).await.unwrap();
            let held = fleet_of(node.edge.handle()).await.into_iter().find(|entry| entry.key == key);
            let told = stored.as_ref().and_then(|stored| Some((stored.revision, stored.value.clone()?)));
            if told == held.as_ref().map(|held| (held.revision, held.value())) {
                break;
            }
            assert!(clock::now() < until, "{}: {key}: {held:?} instead of {stored:?}", node.name);
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Whose the node is: one replica's, which lives.
pub(crate) async fn owner(nats: &Connection, node: &str) -> String {
    let value = nats.get(Bucket::Sys, &format!("claims/{node}")).await.unwrap().unwrap().value.unwrap();
    let claim: Claim = serde_json::from_slice(&value).unwrap();
    let value =
        nats.get(Bucket::Sys, &format!("lease/{}", claim.replica)).await.unwrap().unwrap().value.unwrap();
    let lease: Lease = serde_json::from_slice(&value).unwrap();
    assert!(!claim.away && claim.epoch == lease.epoch, "{claim:?} {lease:?}");
    claim.replica
}
