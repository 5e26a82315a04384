//! Pins what is left when the servers of a tier lose what they acknowledged: a nats-server comes back with an older
//! copy of its disk, under replicas and nodes that know better. Nothing goes from any node, what replicas held
//! stands in the buckets again, and what nodes sent stands in their Logs once and in order.

use std::{
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use octobus_tests::{
    clock,
    octobus::{create_token, folder, octobus},
    process::run_command,
    tier::Tier,
};
use tokio::{runtime::Runtime, time::sleep};

use crate::a_tier_under_fire::{
    Node, arrived, connect, fleet_is_equal, fleet_of, once_in_order, own_key, publish, retained_is_equal,
    start_node, watch,
};

const COMMON: &str = "obj/core/configmaps/ns/common";
const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_server_that_comes_back_with_an_older_disk_takes_nothing_from_nodes() {
    let folder = folder();
    let mut tier = Tier::new(folder.path(), 2, 1);
    let hubs: Vec<_> = tier.hubs.iter().map(|hub| hub.start()).collect();
    // Nodes go on while this thread waits.
    let runtime = Arc::new(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
    let driven = Arc::clone(&runtime);
    std::thread::spawn(move || driven.block_on(std::future::pending::<()>()));
    let (admin, bootstrap) = (hubs[0].admin(), hubs[0].endpoint("bootstrap"));
    let admin = admin.to_str().unwrap();
    let dialled = tier.dialled();
    let begin = |name: String| {
        let token = create_token(Path::new(admin), &name);
        let data = folder.path().join(&name);
        runtime.block_on(start_node(&name, format!("https://{bootstrap}"), token, &data, &dialled))
    };
    let want = |node: &Node| {
        octobus(&["want", "add", "--admin", admin, &node.name, COMMON, &own_key(&node.name)]).ok();
        octobus(&["put", "--admin", admin, "fleet", &own_key(&node.name), "own"]).ok();
    };
    let put = |value: &str| {
        clock::wait_for("a change of State", SOON, || {
            octobus(&["put", "--admin", admin, "fleet", COMMON, value]).status.success().then_some(())
        });
    };
    let mut nodes: Vec<Node> = (0..4).map(|number| begin(format!("edge-{number}"))).collect();
    nodes.iter().for_each(want);
    put("before");
    octobus(&["barrier", "--admin", admin]).ok();
    let (stop, backwards) = (Arc::<AtomicBool>::default(), Arc::<Mutex<Vec<String>>>::default());
    for node in &nodes {
        let handle = node.edge.handle();
        runtime.spawn(publish(handle.clone(), Arc::clone(&node.published), Arc::clone(&stop)));
        runtime.spawn(watch(node.name.clone(), handle.clone(), Arc::clone(&backwards)));
    }
    equal(&runtime, &tier, &nodes);

    // The disk as it is now comes back later.
    let store = tier.servers.store(0);
    let copy = folder.path().join("copy");
    tier.servers.kill(0);
    cp(&store, &copy);
    tier.servers.run(0);
    for number in 0..10 {
        put(&format!("after-{number}"));
    }
    nodes.push(begin("late".to_owned()));
    want(&nodes[4]);
    equal(&runtime, &tier, &nodes);
    tier.servers.kill(0);
    std::fs::remove_dir_all(&store).unwrap();
    cp(&copy, &store);
    tier.servers.run(0);

    runtime.block_on(async {
        let until = clock::now() + Duration::from_secs(8);
        while clock::now() < until {
            for node in &nodes {
                let held = fleet_of(node.edge.handle()).await;
                let common = held.iter().find(|entry| entry.key == COMMON).map(|entry| entry.value());
                assert_eq!(common.as_deref(), Some(&b"after-9"[..]), "{}", node.name);
                assert!(held.iter().any(|entry| entry.key == own_key(&node.name)), "{}: {held:?}", node.name);
            }
            sleep(Duration::from_millis(100)).await;
        }
    });
    equal(&runtime, &tier, &nodes);
    put("the end");
    stop.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        let nats = connect(&tier).await;
        for node in &nodes {
            arrived(node).await;
            fleet_is_equal(&nats, node).await;
            retained_is_equal(&nats, node).await;
            if node.name != "late" {
                once_in_order(&nats, &node.name, node.published.load(Ordering::Relaxed)).await;
            }
        }
        let said = backwards.lock().unwrap().clone();
        assert!(said.is_empty(), "{said:?}");
        for node in nodes {
            Box::pin(node.edge.stop(Duration::from_secs(10))).await;
        }
    });
    hubs.into_iter().for_each(octobus_tests::octobus::Running::stop);
}

/// What nodes want is what the tier says.
fn equal(runtime: &Runtime, tier: &Tier, nodes: &[Node]) {
    runtime.block_on(async {
        let nats = connect(tier).await;
        for node in nodes {
            fleet_is_equal(&nats, node).await;
        }
    });
}

fn cp(from: &Path, to: &Path) {
    run_command(SOON, Command::new("cp").arg("-a").arg(from).arg(to)).ok();
}
