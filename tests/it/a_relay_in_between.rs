//! Nodes that reach their hub through a relay: four processes. What they publish arrives as their own, what
//! is sent to them arrives, and a relay that is killed in the middle loses and repeats nothing.

use std::{net::SocketAddr, path::Path, time::Duration};

use octobus_tests::{
    clock, log, mqtt, nats,
    octobus::{Octobus, Role, Running, folder, join_with, octobus},
    stock::Place,
};

const SOON: Duration = Duration::from_secs(20);

/// A hub, a relay, two nodes behind it; all joined, none started but the hub.
struct Site {
    _folder: tempfile::TempDir,
    hub: Running,
    hub_again: Octobus,
    relay: Octobus,
    pumps: [Octobus; 2],
}

impl Site {
    fn new() -> Self {
        let folder = folder();
        let hub = Octobus::new(Role::Cloud, &folder.path().join("hub"));
        let running = hub.start();
        let data = |name: &str| folder.path().join(name);
        let relay = Octobus::new(Role::Edge, &data("gw-1"));
        let quic = octobus_tests::octobus::free_port().to_string();
        let relay = relay.args(&["--quic", &quic]);
        join_with(Place::Here, &running, &hub, "gw-1", &["--forwards", "pump-1,pump-2"], relay.data());
        let pumps = ["pump-1", "pump-2"].map(|name| {
            join_with(Place::Here, &running, &hub, name, &[], &data(name));
            let pump = Octobus::new(Role::Edge, &data(name));
            pump.args(&["--hub", &relay.address("--quic").to_string(), "--relay", "gw-1"])
        });
        Self { _folder: folder, hub: running, hub_again: hub, relay, pumps }
    }

    /// Payloads of a node's Log at the hub.
    fn at_hub(&self, node: &str) -> Vec<String> {
        let lines = log::read(log::From::Admin(&self.hub.admin()), node, &[]);
        log::assert_no_silent_loss(&lines);
        log::records(&lines)
            .into_iter()
            .map(|record| String::from_utf8(record.payload).expect("these tests send text"))
            .collect()
    }
}

fn mqtt_at(address: SocketAddr, name: &str) -> mqtt::Client {
    mqtt::Client::connect(address, &mqtt::Options::new(name)).expect("the node lets it in")
}

/// What `octobus get nodes` at the hub says of a node.
fn is_linked(admin: &Path, node: &str) -> bool {
    let nodes = octobus(&["get", "nodes", "--admin", admin.to_str().expect("a UTF-8 path")]).ok();
    nodes.iter().any(|row| row.contains(node) && row.contains("yes"))
}

fn numbered(numbers: std::ops::RangeInclusive<u32>) -> Vec<String> {
    numbers.map(|number| number.to_string()).collect()
}

#[test]
fn a_relay_killed_in_the_middle_loses_and_repeats_nothing() {
    let site = Site::new();
    let mut relay = site.relay.start();
    let [one, _two] = site.pumps.each_ref().map(Octobus::start);

    let mut watcher = nats::Client::connect(site.hub.endpoint("nats")).unwrap();
    watcher.subscribe("octobus.up.pump-1.>").unwrap();
    watcher.flush().unwrap();
    let mut device = mqtt_at(one.endpoint("mqtt"), "valve");
    device.subscribe("valves/#", 1).unwrap();
    let mut sensor = mqtt_at(one.endpoint("mqtt"), "sensor");

    // Up, under the node's own name.
    sensor.publish_acked("sensors/temp", b"1", false).unwrap();
    let seen = watcher.next(SOON).unwrap();
    assert_eq!((&*seen.subject, &*seen.payload), ("octobus.up.pump-1.sensors.temp", &b"1"[..]));
    assert!(is_linked(&site.hub.admin(), "gw-1") && is_linked(&site.hub.admin(), "pump-1"));

    // Down.
    let mut ops = nats::Client::connect(site.hub.endpoint("nats")).unwrap();
    ops.publish("octobus.down.pump-1.valves.3", b"open").unwrap();
    ops.flush().unwrap();
    let message = device.next_publish(SOON).unwrap();
    assert!(format!("{message:?}").contains("valves/3"), "{message:?}");

    // Killed while messages pass, and once more while the hub has not all of them.
    for number in 2..=200 {
        sensor.publish_acked("sensors/temp", number.to_string().as_bytes(), false).unwrap();
        if number == 80 || number == 140 {
            relay.process.kill();
            if number == 80 {
                ops.publish("octobus.down.pump-1.valves.3", b"shut").unwrap();
                ops.flush().unwrap();
            }
            relay = site.relay.start();
        }
    }
    clock::wait_for("everything at the hub", Duration::from_secs(60), || {
        (site.at_hub("pump-1").len() >= 200).then_some(())
    });
    assert_eq!(site.at_hub("pump-1"), numbered(1..=200));
    for number in 2..=200 {
        assert_eq!(watcher.next(SOON).unwrap().payload, number.to_string().as_bytes());
    }
    let message = device.next_publish(SOON).unwrap();
    assert!(format!("{message:?}").contains("valves/3"), "{message:?}");

    one.stop();
    relay.stop();
    site.hub.stop();
}

#[test]
fn a_relay_admits_its_nodes_without_the_hub_and_brings_what_they_said_when_it_is_back() {
    let Site { _folder, hub: running, hub_again, relay, pumps } = Site::new();
    // The relay hears who may link, once.
    let gateway = relay.start();
    let admin = running.admin();
    clock::wait_for("the relay's link", SOON, || is_linked(&admin, "gw-1").then_some(()));
    running.stop();
    gateway.stop();
    let gateway = relay.start();
    let pump = pumps[1].start();
    let mut sensor = mqtt_at(pump.endpoint("mqtt"), "sensor");
    for number in 1..=20 {
        sensor.publish_acked("sensors/temp", number.to_string().as_bytes(), false).unwrap();
    }
    let read = |admin: &Path| log::records(&log::read(log::From::Admin(admin), "pump-2", &[])).len();
    clock::wait_for("the relay to hold it", SOON, || (read(&gateway.admin()) == 20).then_some(()));
    pump.stop();
    let hub = hub_again.start();
    clock::wait_for("the hub to have it", Duration::from_secs(60), || {
        (read(&hub.admin()) == 20).then_some(())
    });
    assert!(!is_linked(&hub.admin(), "pump-2"));
    gateway.stop();
    hub.stop();
}

#[test]
fn a_node_without_permission_is_no_relay() {
    let site = Site::new();
    let pump = site.pumps[0].clone().args(&["--quic", &site.relay.address("--quic").to_string()]);
    let mut process = pump.spawn(&pump.data().with_extension("ready"));
    let status = process.wait(SOON);
    assert!(!status.success());
    assert!(process.output().contains("--forwards"), "{}", process.output());
}
