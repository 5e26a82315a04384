//! Pins what an MQTT client may rely on at a node: retained messages, wills, sessions that outlive their
//! connection and the broker's process, takeover, keep-alive, and QoS 2 exactly once.

use std::{net::SocketAddr, time::Duration};

use octobus_tests::{
    mqtt::{self, Client, Options, Packet},
    octobus::{Octobus, Role, folder},
    process::run_command,
    stock::{MosquittoSub, Place, mosquitto_pub, python},
};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_retained_message_greets_every_later_subscriber_until_it_is_cleared() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    mosquitto_pub(Place::Here, address, &["-q", "1", "-r", "-t", "state/door", "-m", "open"]).ok();
    mosquitto_pub(Place::Here, address, &["-q", "1", "-r", "-t", "state/door", "-m", "closed"]).ok();
    let late = MosquittoSub::start(Place::Here, address, &["-t", "state/+"]);
    late.expect("state/door", "closed");
    assert_eq!(late.messages(), ["state/door closed"]);

    mosquitto_pub(Place::Here, address, &["-q", "1", "-r", "-n", "-t", "state/door"]).ok();
    let mut later = Client::connect(address, &Options::new("later")).unwrap();
    let before = later.subscribe("state/+", 1).unwrap();
    publish_beside(&later, "state/marker", b"end");
    assert_eq!(before, []);
    match later.next_publish(SOON).unwrap() {
        Packet::Publish { topic, .. } => assert_eq!(topic, "state/marker", "a cleared message came back"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_will_is_published_when_the_connection_breaks_and_not_after_disconnect() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let mut watcher = Client::connect(address, &Options::new("watcher")).unwrap();
    watcher.subscribe("gone/#", 1).unwrap();
    let polite =
        Client::connect(address, &Options::new("polite").with_will("gone/polite", b"x", 1, false)).unwrap();
    polite.disconnect();
    let rude =
        Client::connect(address, &Options::new("rude").with_will("gone/rude", b"bye", 1, false)).unwrap();
    drop(rude);
    let got = watcher.next_publish(SOON).unwrap();
    assert!(
        matches!(&got, Packet::Publish { topic, payload, .. } if topic == "gone/rude" && payload == b"bye"),
        "{got:?}"
    );
}

#[test]
fn a_persistent_session_keeps_what_comes_while_its_client_is_away() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let session = ["-c", "-i", "worker", "-q", "1", "-t", "jobs/#"];
    MosquittoSub::start(Place::Here, address, &session).stop();
    for n in 0..5 {
        mosquitto_pub(Place::Here, address, &["-q", "1", "-t", "jobs/a", "-m", &n.to_string()]).ok();
    }
    let back = MosquittoSub::start(Place::Here, address, &session);
    back.expect("jobs/a", "4");
    assert_eq!(back.messages(), (0..5).map(|n| format!("jobs/a {n}")).collect::<Vec<_>>());
}

#[test]
fn a_session_survives_a_power_cut_of_the_node() {
    let folder = folder();
    let node = Octobus::new(Role::Dev, &folder.path().join("data"));
    let mut running = node.start();
    let address = running.endpoint("mqtt");
    let away = Options::new("away").persistent();
    let mut client = Client::connect(address, &away).unwrap();
    client.subscribe("jobs/#", 1).unwrap();
    let mut publisher = Client::connect(address, &Options::new("publisher")).unwrap();
    publisher.publish_acked("jobs/1", b"seen", false).unwrap();
    assert!(matches!(client.next_publish(SOON).unwrap(), Packet::Publish { .. }));
    // Its PUBACK is on its way in when the ping is answered; that it is durable nobody has promised.
    client.ping().unwrap();
    client.disconnect();
    publisher.publish_acked("jobs/2", b"waiting", false).unwrap();
    running.process.kill();

    let running = node.start();
    let mut client = Client::connect(address, &away).unwrap();
    assert!(client.session_present);
    let mut payloads = Vec::new();
    while payloads.last().map(Vec::as_slice) != Some(b"waiting") {
        let Packet::Publish { payload, .. } = client.next_publish(SOON).unwrap() else { unreachable!() };
        payloads.push(payload);
    }
    assert!(payloads.len() <= 2, "{payloads:?}");
    running.stop();
}

#[test]
fn a_second_connection_of_a_client_takes_over_from_the_first() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let mut first = Client::connect(address, &Options::new("one").persistent()).unwrap();
    first.subscribe("a", 1).unwrap();
    let mut second = Client::connect(address, &Options::new("one").persistent()).unwrap();
    assert!(second.session_present);
    assert!(first.is_closed_within(SOON), "two connections of one client");
    publish_beside(&second, "a", b"x");
    assert!(matches!(second.next_publish(SOON).unwrap(), Packet::Publish { .. }));
}

#[test]
fn a_client_that_falls_silent_is_closed_after_one_and_a_half_keep_alives() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let mut options = Options::new("silent");
    options.keep_alive = 1;
    let mut silent = Client::connect(dev.endpoint("mqtt"), &options).unwrap();
    assert!(silent.is_closed_within(Duration::from_secs(5)));
}

#[test]
fn qos_2_is_delivered_once_however_often_it_is_sent() {
    let folder = folder();
    let node = Octobus::new(Role::Dev, &folder.path().join("data"));
    let mut running = node.start();
    let address = running.endpoint("mqtt");
    let sender = Options::new("sender").persistent();
    let receiver = Options::new("receiver").persistent();
    let mut listener = Client::connect(address, &receiver).unwrap();
    listener.subscribe("once/#", 2).unwrap();

    let mut client = Client::connect(address, &sender).unwrap();
    publish_qos2(&mut client, b"one", 5, false);
    publish_qos2(&mut client, b"one", 5, true);
    running.process.kill(); // PUBREC was given: the node must know this packet id still
    let running = node.start();
    let mut client = Client::connect(address, &sender).unwrap();
    assert!(client.session_present);
    publish_qos2(&mut client, b"one", 5, true);
    release(&mut client, 5);
    publish_qos2(&mut client, b"two", 5, false);
    release(&mut client, 5);

    let mut listener = Client::connect(address, &receiver).unwrap();
    let mut got = Vec::new();
    while got.last().map(Vec::as_slice) != Some(b"two") {
        let Packet::Publish { payload, qos: 2, .. } = listener.next_publish(SOON).unwrap() else {
            panic!("not QoS 2")
        };
        got.push(payload);
    }
    // The first delivery may have been under way, unacknowledged, when the node was killed.
    got.dedup();
    assert_eq!(got, [b"one".to_vec(), b"two".to_vec()]);
    running.stop();
}

#[test]
fn stock_clients_exchange_qos_2() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let sub = MosquittoSub::start(Place::Here, address, &["-q", "2", "-t", "once/#"]);
    for n in 0..5 {
        mosquitto_pub(Place::Here, address, &["-q", "2", "-t", "once/a", "-m", &n.to_string()]).ok();
    }
    sub.expect("once/a", "4");
    assert_eq!(sub.messages(), (0..5).map(|n| format!("once/a {n}")).collect::<Vec<_>>());
}

#[test]
fn an_mqtt_5_client_of_stock_finds_its_session_properties_and_reason_codes() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let mut command = python(Place::Here, "paho_v5.py");
    command.args([address.ip().to_string(), address.port().to_string()]);
    let said = run_command(Duration::from_secs(60), &mut command).ok();
    assert_eq!(said.last().map(String::as_str), Some("all is well"), "{said:?}");
}

fn publish_qos2(client: &mut Client, payload: &[u8], packet_id: u16, dup: bool) {
    client.write(&mqtt::publish("once/x", payload, 2, packet_id, dup, false)).unwrap();
    client.read_until(|packet| (packet == Packet::PubRec(packet_id)).then_some(())).unwrap();
}

fn release(client: &mut Client, packet_id: u16) {
    client.write(&mqtt::acknowledge(0x62, packet_id)).unwrap();
    client.read_until(|packet| (packet == Packet::PubComp(packet_id)).then_some(())).unwrap();
}

/// Through another connection to the same broker, so that acknowledgements do not mix with deliveries.
fn publish_beside(client: &Client, topic: &str, payload: &[u8]) {
    let address: SocketAddr = client.stream().peer_addr().unwrap();
    let mut other = Client::connect(address, &Options::new("other")).unwrap();
    other.publish_acked(topic, payload, false).unwrap();
    other.disconnect();
}
