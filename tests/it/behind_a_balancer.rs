//! Pins what a tier promises behind load balancers: nodes that know one address move between replicas as those drain,
//! die and return, over haproxy and over a balancer of datagrams, and nothing that was acknowledged is lost on the
//! way. Both balancers are configured with what docs/tier.md shows.

use std::{
    collections::BTreeSet,
    env, fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use cloudhub::fabric::nats::{
    claims::{Claim, Lease},
    connection::Connection,
    names::Bucket,
};
use octobus_tests::{
    clock,
    netns::{Cable, Machine},
    octobus::{Octobus, Role, Running, create_token, folder, free_port, octobus, octobus_at},
    process::{Process, run_command},
    stock::Place,
    tier::Tier,
};

use crate::a_tier_under_fire::{connect, once_in_order, owner};

/// Says to the test inside where nodes run.
const NODES_ON: &str = "TEST_NODES_ON";
/// From a drain or a death to every node being somebody else's.
const MOVED: Duration = Duration::from_secs(60);
const HUBS: usize = 3;

/// The tier and its balancers are on one machine, nodes on another, joined by a cable.
#[test]
fn nodes_move_between_replicas_behind_haproxy_and_a_balancer_of_datagrams() {
    let cable = Cable::new().expect("network namespaces; run as root");
    let mut command = cable.b.command(env::current_exe().unwrap());
    command.args(["--exact", "behind_a_balancer::inside", "--ignored", "--nocapture"]);
    let ran = run_command(Duration::from_secs(170), command.env(NODES_ON, &cable.a.name));
    assert!(ran.status.success(), "{}", ran.describe());
    let told = ran.stdout.iter().any(|line| line.contains("1 passed"));
    assert!(told, "{}", ran.describe());
    ran.stderr.iter().for_each(|line| eprintln!("{line}"));
}

#[test]
#[ignore = "run by the test above, on a machine of its own"]
fn inside() {
    let Ok(name) = env::var(NODES_ON) else { return };
    let nodes_on = Machine { name, address: "10.231.7.1" };
    let folder = folder();
    let mut tier = Tier::new(folder.path(), HUBS, 1);
    for hub in &mut tier.hubs {
        let [quic, websocket, bootstrap] = [(); 3].map(|()| at_cable(free_port().port()).to_string());
        let here = ["--quic", &quic, "--websocket", &websocket, "--bootstrap", &bootstrap];
        *hub = hub.clone().args(&here);
    }
    let mut running: Vec<Option<Running>> = tier.hubs.iter().map(|hub| Some(hub.start())).collect();
    let guide = Guide::read(&tier.hubs);
    let file = folder.path().join("haproxy.cfg");
    fs::write(&file, &guide.haproxy).unwrap();
    let _haproxy = Process::spawn("haproxy", Command::new("haproxy").arg("-db").arg("-f").arg(&file));
    clock::wait_for("haproxy", MOVED, || TcpStream::connect(at_cable(10_002)).ok());
    sh(&guide.begin);

    let admin = running[0].as_ref().unwrap().admin();
    let nodes: Vec<Node> = Way::ALL
        .iter()
        .cycle()
        .zip(0..6)
        .map(|(way, n)| node(*way, n, &admin, folder.path(), &nodes_on))
        .collect();
    let nodes = Arc::new(nodes);
    let (stop, publishing) = publish(&nodes);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let nats = runtime.block_on(connect(&tier));
    let owners = |which: &dyn Fn(&Node) -> bool, not: &[&str], what: &str| {
        clock::wait_for(what, MOVED, || {
            let of = nodes.iter().filter(|node| which(node));
            let owners: Option<Vec<String>> =
                of.map(|node| runtime.block_on(owned_by(&nats, &node.name))).collect();
            owners.filter(|owners| owners.iter().all(|owner| !not.contains(&owner.as_str())))
        })
    };
    let everybody = |_node: &Node| true;
    let first = owners(&everybody, &[], "every node at a replica");
    let different: BTreeSet<&String> = first.iter().collect();
    assert!(different.len() > 1, "the balancers gave all to one: {first:?}");

    // A drain, announced to whoever does not look by itself.
    sh(&guide.without_first);
    running[0].take().unwrap().stop();
    let second = owners(&everybody, &["hub-0"], "every node away from the drained replica");
    // A death that nobody was told of. Datagrams still go to the dead one, so who has another way takes that.
    drop(running[1].take());
    let can = |node: &Node| node.way != Way::Quic;
    owners(&can, &["hub-0", "hub-1"], "nodes with WebSocket away from the dead replica");
    sh(&guide.without_second);
    let third = owners(&everybody, &["hub-0", "hub-1"], "every node away from the dead replica");
    // They return, and are used again: the last one drains.
    running[0] = Some(tier.hubs[0].start());
    running[1] = Some(tier.hubs[1].start());
    sh(&guide.begin_again);
    let mut check = Command::new("sh");
    check.args(["-c", "iptables -t nat -S OCTOBUS"]);
    assert_eq!(run_command(MOVED, &mut check).ok().len(), 1 + HUBS);
    sh(&guide.without_third);
    running[2].take().unwrap().stop();
    let fourth = owners(&everybody, &["hub-2"], "every node at the replicas that returned");
    eprintln!("{first:?}, then {second:?}, then {third:?}, then {fourth:?}");

    stop.store(true, Ordering::Relaxed);
    publishing.join().unwrap();
    runtime.block_on(async {
        for node in nodes.iter() {
            let published = node.published.load(Ordering::Relaxed);
            assert!(published > 3, "{}: {published}", node.name);
            arrived(&nats, &node.name, published).await;
            once_in_order(&nats, &node.name, published).await;
            owner(&nats, &node.name).await;
        }
    });
    let nodes = Arc::into_inner(nodes).expect("its publisher has ended");
    nodes.into_iter().for_each(|node| node.running.stop());
    running.into_iter().flatten().for_each(Running::stop);
}

/// By what a node may link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Quic,
    WebSocket,
    Both,
}

impl Way {
    const ALL: [Self; 3] = [Self::Quic, Self::WebSocket, Self::Both];

    fn hubs(self) -> String {
        let (quic, websocket) = (at_cable(10_001), at_cable(10_000));
        match self {
            Self::Quic => format!("quic://{quic}"),
            Self::WebSocket => format!("wss://{websocket}"),
            Self::Both => format!("quic://{quic},wss://{websocket}"),
        }
    }
}

/// A node that runs, and how many of its messages were acknowledged.
struct Node {
    name: String,
    way: Way,
    running: Running,
    published: AtomicU64,
}

/// Joins through haproxy, and starts.
fn node(way: Way, number: u32, admin: &Path, folder: &Path, on: &Machine) -> Node {
    let name = format!("edge-{number}");
    let data = folder.join(&name);
    let file = folder.join(format!("{name}.toml"));
    fs::write(&file, "[limits]\nheartbeat = '1s'\n").unwrap();
    let token = create_token(admin, &name);
    let hub = format!("https://{}", at_cable(10_002));
    let join = ["join", "--hub", &hub, "--token", &token, "--data", data.to_str().unwrap()];
    octobus_at(Place::On(on), &join).ok();
    let args = ["--hub", &way.hubs(), "--config", file.to_str().unwrap()];
    let off = ["--mqtt", "off", "--nats", "off", "--api", "off", "--metrics", "off"];
    let running = Octobus::on_machine(Role::Edge, &data, on).args(&args).args(&off).start();
    Node { name, way, running, published: AtomicU64::new(0) }
}

/// Each node publishes numbered durable messages, one after the other, until told to stop.
fn publish(nodes: &Arc<Vec<Node>>) -> (Arc<AtomicBool>, std::thread::JoinHandle<()>) {
    let (stop, nodes) = (Arc::new(AtomicBool::new(false)), Arc::clone(nodes));
    let told = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let admins: Vec<PathBuf> = nodes.iter().map(|node| node.running.admin()).collect();
        for number in 1_u64.. {
            for (node, admin) in nodes.iter().zip(&admins) {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                let admin = admin.to_str().unwrap();
                let _said = octobus(&["pub", "--admin", admin, "samples", &number.to_string()]).ok();
                node.published.store(number, Ordering::Relaxed);
            }
        }
    });
    (stop, thread)
}

/// Waits until the tier's Log has so many of a node's messages.
async fn arrived(nats: &Connection, node: &str, published: u64) {
    let until = clock::now() + MOVED;
    while crate::a_tier_under_fire::messages_of(nats, node).await < published {
        assert!(clock::now() < until, "{node}: {published} published");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Which live replica has a node now.
async fn owned_by(nats: &Connection, node: &str) -> Option<String> {
    let value = nats.get(Bucket::Sys, &format!("claims/{node}")).await.ok()??.value?;
    let claim: Claim = serde_json::from_slice(&value).ok()?;
    let value = nats.get(Bucket::Sys, &format!("lease/{}", claim.replica)).await.ok()??.value?;
    let lease: Lease = serde_json::from_slice(&value).ok()?;
    (!claim.away && !lease.closed && claim.epoch == lease.epoch).then_some(claim.replica)
}

/// On this side of the cable: where the tier is.
fn at_cable(port: u16) -> SocketAddr {
    SocketAddr::from(([10, 231, 7, 2], port))
}

fn sh(lines: &[String]) {
    for line in lines {
        let mut command = Command::new("sh");
        run_command(MOVED, command.args(["-c", line])).ok();
    }
}

/// What docs/tier.md says to configure, with this test's addresses.
struct Guide {
    haproxy: String,
    begin: Vec<String>,
    begin_again: Vec<String>,
    without_first: Vec<String>,
    without_second: Vec<String>,
    without_third: Vec<String>,
}

impl Guide {
    fn read(hubs: &[Octobus]) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/tier.md");
        let text = fs::read_to_string(path).unwrap();
        let blocks = |language: &str| -> Vec<String> {
            let opening = format!("```{language}\n");
            let blocks = text.split(opening.as_str()).skip(1).filter_map(|block| block.split("```").next());
            blocks.map(|block| block.lines().map(|line| of_this_test(line, hubs) + "\n").collect()).collect()
        };
        let shell = blocks("sh");
        let lines = |block: &str| block.lines().map(str::to_owned).collect::<Vec<_>>();
        let (begin, without_first) = (lines(&shell[0]), lines(&shell[1]));
        let rules: Vec<&String> = begin.iter().filter(|line| line.contains("-A OCTOBUS")).collect();
        assert_eq!((rules.len(), without_first.len()), (HUBS, 1));
        assert_eq!(without_first[0], rules[0].replace("-A", "-D"), "the rule that is there is taken away");
        let begin_again = ["iptables -t nat -F OCTOBUS".to_owned()].into_iter();
        Self {
            haproxy: blocks("haproxy").concat(),
            begin_again: begin_again.chain(rules.iter().map(|rule| (*rule).clone())).collect(),
            without_second: vec![rules[1].replace("-A", "-D")],
            // The last one takes what is left: without it the one before does.
            without_third: vec![
                rules[2].replace("-A", "-D"),
                rules[1].replace("-m statistic --mode random --probability 0.5 ", ""),
            ],
            begin,
            without_first,
        }
    }
}

/// A line of the guide, with the addresses of these replicas and of the balancer.
fn of_this_test(line: &str, hubs: &[Octobus]) -> String {
    let mut line = line.replace("10.0.0.100", "10.231.7.2");
    for (number, hub) in (1..).zip(hubs) {
        let of = format!("10.0.0.{number}:");
        if !line.contains(&of) {
            continue;
        }
        for (port, flag) in [("10000", "--websocket"), ("10001", "--quic"), ("10002", "--bootstrap")] {
            line = line.replace(&format!("{of}{port}"), &hub.address(flag).to_string());
        }
        line =
            line.replace("port 10003", &format!("port {} addr 127.0.0.1", hub.address("--metrics").port()));
    }
    line
}
