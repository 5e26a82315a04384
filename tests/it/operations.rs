//! Pins what an operator meets: health and metrics with their names and units, `doctor`, a configuration
//! whose mistakes are all said at once, and data folders that never have two masters.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use octobus_tests::{
    clock, log, mqtt,
    octobus::{NODE, Octobus, Pair, Role, folder, octobus},
};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn health_readiness_and_metrics_are_served_over_http() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let metrics = dev.endpoint("metrics");
    let mut client = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    client.publish_acked("a", b"x", false).unwrap();

    assert_eq!(get(metrics, "/healthz").0, 200);
    let (ready, said) = get(metrics, "/readyz");
    assert_eq!(ready, 200, "{said}");
    assert!(said.contains("durability"), "readiness says how durable this hub is: {said}");
    assert_eq!(get(metrics, "/nothing").0, 404);

    let text = metrics_of(metrics);
    assert!(samples(&text).any(|line| line.starts_with("octobus_sessions")), "{text}");
    assert_speaks_of(&text, &["sessions", "reconnects", "queue_bytes", "oldest", "drops", "gaps", "flush"]);
}

#[test]
fn a_node_measures_its_link_and_its_disk() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    let hub = pair.hub.start();
    let node = pair.node.start();
    let text = metrics_of(node.endpoint("metrics"));
    assert_speaks_of(&text, &["sessions", "reconnects", "queue_bytes", "oldest", "drops", "gaps", "flush"]);
    node.stop();
    hub.stop();
}

/// The page, if it follows Prometheus's rules for names and units.
fn metrics_of(address: SocketAddr) -> String {
    let (status, text) = get(address, "/metrics");
    assert_eq!(status, 200);
    for line in samples(&text) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        assert!(name.starts_with("octobus_") || name.starts_with("process_"), "{line}");
        let value = line.rsplit(' ').next().unwrap_or_default();
        assert!(value.parse::<f64>().is_ok(), "no number: {line}");
        for wrong in ["_ms", "_millis", "_us", "_micros", "_kb", "_mb"] {
            assert!(!name.ends_with(wrong), "{name}: seconds and bytes are the units of Prometheus");
        }
    }
    for name in families(&text) {
        let counter = text.contains(&format!("# TYPE {name} counter"));
        assert_eq!(
            counter,
            name.ends_with("_total"),
            "{name}: a counter, and only a counter, ends in _total"
        );
        assert!(text.contains(&format!("# HELP {name} ")), "{name} has no HELP");
    }
    text
}

fn samples(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty())
}

fn families(text: &str) -> Vec<&str> {
    text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect()
}

fn assert_speaks_of(text: &str, subjects: &[&str]) {
    let names = families(text);
    let missing: Vec<_> =
        subjects.iter().filter(|one| !names.iter().any(|name| name.contains(**one))).collect();
    assert!(missing.is_empty(), "no metric about {missing:?}: {names:?}");
}

#[test]
fn every_mistake_of_a_configuration_is_said_at_once() {
    let folder = folder();
    let file = folder.path().join("octobus.toml");
    fs::write(&file, "nod = \"edge-1\"\n[listen]\nmqtt = \"not an address\"\nmqttt = \"127.0.0.1:0\"\n[limits]\nheartbeat = \"5\"\n").unwrap();
    let said = octobus(&["dev", "--config", file.to_str().unwrap(), "--nats", "4222"]);
    assert!(!said.status.success());
    let text = said.stderr.join("\n");
    for mistake in ["nod", "listen.mqtt", "mqttt", "heartbeat", "--nats"] {
        assert!(text.contains(mistake), "nothing about {mistake}:\n{}", said.describe());
    }
}

#[test]
fn a_folder_in_use_is_refused_and_the_admin_socket_named() {
    let folder = folder();
    let data = folder.path().join("data");
    let dev = Octobus::new(Role::Dev, &data);
    let running = dev.start();
    let hub = data.join("hub");
    let said = octobus(&["log", "read", "--data", hub.to_str().unwrap(), "--node", NODE, "-o", "json"]);
    assert!(!said.status.success(), "{}", said.describe());
    assert!(said.stderr.join("\n").contains("--admin"), "{}", said.describe());

    let mut second = Octobus::new(Role::Dev, &data).spawn(&folder.path().join("never"));
    assert!(!second.wait(SOON).success(), "two processes on one folder");
    running.stop();
}

#[test]
fn doctor_finds_a_healthy_machine_healthy_and_names_what_is_not() {
    let folder = folder();
    let data = folder.path().join("data");
    let dev = Octobus::new(Role::Dev, &data);
    let running = dev.start();
    octobus(&["doctor", "--data", data.join("node").to_str().unwrap()]).ok();
    running.stop();

    let nowhere = octobus(&["doctor", "--data", folder.path().join("nothing").to_str().unwrap()]);
    assert!(!nowhere.status.success(), "{}", nowhere.describe());
}

#[test]
fn the_command_line_publishes_subscribes_and_shows() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let admin = dev.admin();
    let admin = admin.to_str().unwrap();
    let mut device = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    device.subscribe("valves/#", 1).unwrap();
    octobus(&["pub", "--admin", admin, "--node", NODE, "valves/3", "open"]).ok();
    let got = device.next_publish(SOON).unwrap();
    assert!(
        matches!(&got, mqtt::Packet::Publish { topic, payload, .. } if topic == "valves/3" && payload == b"open"),
        "{got:?}"
    );

    let nodes = octobus(&["get", "nodes", "--admin", admin, "-o", "json"]).ok().join("\n");
    assert!(nodes.contains(NODE), "{nodes}");
    let help = octobus(&["--help"]).ok().join("\n");
    for command in ["dev", "cloud", "edge", "token", "join", "pub", "sub", "get", "log", "top", "doctor"] {
        assert!(help.contains(command), "--help does not name {command}");
    }
}

#[test]
fn a_node_serves_its_devices_before_it_ever_saw_its_hub() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    // The edge never waits for the cloud: it serves with no hub at all.
    let node = pair.node.start();
    let mut device = mqtt::Client::connect(node.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    device.publish_acked("a", b"x", false).unwrap();
    let hub = pair.hub.start();
    clock::wait_for("the message at the hub", SOON, || {
        let lines = log::read(log::From::Admin(&hub.admin()), NODE, &[]);
        (log::records(&lines).len() == 1).then_some(())
    });
    node.stop();
    hub.stop();
}

/// Status and body of a GET.
pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}
