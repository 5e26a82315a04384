//! Pins what happens behind a firewall that drops UDP without a word: the node links by WebSocket within
//! seconds, says so, remembers it over a restart, and moves back by itself when UDP comes through.

use std::time::{Duration, Instant};

use octobus_tests::{
    clock, mqtt, nats,
    octobus::{NODE, Pair, Running, folder, octobus},
    relay::{Faults, UdpRelay},
    seed,
};

/// From a start to the first message at the hub, on a busy machine: the head start of QUIC is 1.5 s.
const LINKED: Duration = Duration::from_secs(15);
/// The first probe of QUIC comes after 10 to 20 s, and the next after twice as long.
const BACK: Duration = Duration::from_secs(90);

#[test]
fn a_node_links_by_websocket_says_so_and_moves_back() {
    let folder = folder();
    let mut relay = None;
    let pair = Pair::joined(folder.path(), |quic| relay.insert(UdpRelay::new(quic, seed::seed())).address());
    let relay = relay.expect("the link goes through it");
    relay.set(Faults { cut: true, ..Faults::default() });
    let both = format!("quic://{},wss://{}", relay.address(), pair.hub.address("--websocket"));
    let hub = pair.hub.start();
    let node = pair.node.args(&["--hub", &both]);
    let address = node.address("--mqtt");

    let running = node.start();
    arrives(address, &hub, "first");
    clock::wait_for("the condition", LINKED, || conditions(&running).contains("LinkFallback").then_some(()));
    let admin = hub.admin();
    let ping = octobus(&["ping", NODE, "--admin", admin.to_str().unwrap(), "--bytes", "1MiB"]).ok();
    assert!(
        ping[0].starts_with("edge-1: 5 round trips") && ping[0].contains("1.0MiB there and back"),
        "{ping:?}"
    );
    running.stop();
    let way = std::fs::read_to_string(node.data().join("link-way")).unwrap();
    assert_eq!(way, "websocket", "the next start does not wait for QUIC");

    let running = node.start();
    arrives(address, &hub, "again");
    relay.set(Faults::default());
    clock::wait_for("QUIC", BACK, || {
        clock::pause(Duration::from_millis(300));
        (!conditions(&running).contains("LinkFallback")).then_some(())
    });
    arrives(address, &hub, "back");
    running.stop();
    hub.stop();
}

/// A message of a device is at the hub's subscriber in time.
fn arrives(device: std::net::SocketAddr, hub: &Running, text: &str) {
    let mut at_hub = nats::Client::connect(hub.endpoint("nats")).unwrap();
    at_hub.subscribe(&format!("octobus.up.{NODE}.>")).unwrap();
    let mut client = mqtt::Client::connect(device, &mqtt::Options::new("device")).unwrap();
    client.write(&mqtt::publish("a/b", text.as_bytes(), 1, 1, false, false)).unwrap();
    let began: Instant = clock::now();
    let message = at_hub.next(LINKED).expect("it arrives");
    assert_eq!(message.payload, text.as_bytes());
    eprintln!("{text}: after {:?}", began.elapsed());
}

fn conditions(node: &Running) -> String {
    octobus(&["get", "conditions", "--admin", node.admin().to_str().unwrap()]).ok().join("\n")
}
