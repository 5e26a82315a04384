//! Pins what a tier promises: replicas on real nats-servers are one hub to nodes and users, whichever of them has
//! a node, and the end of one is the end of nothing else.

use std::time::Duration;

use octobus_tests::{
    clock, mqtt, nats,
    octobus::{NODE, folder, octobus},
    tier::Tier,
};

const SOON: Duration = Duration::from_secs(30);

#[test]
fn nodes_and_users_meet_on_the_servers_and_outlive_a_replica() {
    let folder = folder();
    let tier = Tier::new(folder.path(), 2, 1);
    let first = tier.hubs[0].start();
    let second = tier.hubs[1].start();
    let node = tier.node(&first, 0, NODE, &folder.path().join("node")).start();
    let mut user = nats::Client::connect_as(tier.servers.address(0), tier.servers.user()).unwrap();
    user.subscribe("octobus.up.>").unwrap();
    user.subscribe("answers.>").unwrap();

    let mut device = mqtt::Client::connect(node.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    device.subscribe("valves/#", 1).unwrap();
    device.publish_acked("sensors/boiler/temp", b"71.5", false).unwrap();
    let heard = user.next(SOON).unwrap();
    assert_eq!(
        (heard.subject.as_str(), &heard.payload[..]),
        ("octobus.up.edge-1.sensors.boiler.temp", &b"71.5"[..])
    );
    assert!(heard.headers.contains("Octobus-Stream: default"), "{}", heard.headers);
    assert!(heard.headers.contains("Octobus-Seq: 1"), "{}", heard.headers);

    user.publish("octobus.down.edge-1.valves.3", b"open").unwrap();
    let got = device.next_publish(SOON).unwrap();
    assert!(
        matches!(&got, mqtt::Packet::Publish { topic, payload, .. } if topic == "valves/3" && payload == b"open")
    );

    // A request, answered by whoever is subscribed on the node; whichever replica gets it, one has the node.
    let mut app = nats::Client::connect(node.endpoint("nats")).unwrap();
    app.subscribe("queries.*").unwrap();
    for number in 0..8 {
        user.request("octobus.down.edge-1.queries.level", &format!("answers.{number}"), b"?").unwrap();
        let asked = app.next(SOON).unwrap();
        app.publish(&asked.reply.unwrap(), b"42 l").unwrap();
        let answer = user.next(SOON).unwrap();
        assert_eq!((answer.subject, &answer.payload[..]), (format!("answers.{number}"), &b"42 l"[..]));
    }
    user.request("octobus.down.edge-9.queries.level", "answers.none", b"?").unwrap();
    let nobody = user.next(SOON).unwrap();
    assert!(nobody.payload.is_empty());
    assert!(nobody.headers.contains("Nats-Service-Error-Code: 503"), "{}", nobody.headers);
    assert!(nobody.headers.contains("Nats-Service-Error: node offline"), "{}", nobody.headers);

    // Whoever has the node ends without a word.
    drop(first);
    device.publish_acked("sensors/boiler/temp", b"72.0", false).unwrap();
    let heard = user.next(SOON).unwrap();
    assert_eq!(&heard.payload[..], b"72.0");
    assert!(heard.headers.contains("Octobus-Seq: 2"), "{}", heard.headers);
    user.publish("octobus.down.edge-1.valves.3", b"shut").unwrap();
    let got = device.next_publish(SOON).unwrap();
    assert!(matches!(&got, mqtt::Packet::Publish { payload, .. } if payload == b"shut"));
    clock::pause(Duration::from_millis(1)); // nothing more is on the way that could come twice
    assert!(user.next(Duration::from_millis(300)).is_err(), "once each");
    node.stop();
    second.stop();
}

#[test]
fn a_stream_reaches_a_node_of_another_replica() {
    let folder = folder();
    let tier = Tier::new(folder.path(), 2, 1);
    let hubs = [tier.hubs[0].start(), tier.hubs[1].start()];
    let node = tier.node(&hubs[0], 0, NODE, &folder.path().join("node")).start();
    // Whichever has the node, the other one does not: with bytes, an echo ends only if half-closing works.
    for hub in &hubs {
        let admin = hub.admin();
        let ping = clock::wait_for("an echo", SOON, || {
            let ping = octobus(&["ping", NODE, "--admin", admin.to_str().unwrap(), "--bytes", "4MiB"]);
            ping.status.success().then_some(ping)
        });
        assert!(ping.ok()[0].contains("4.0MiB there and back"));
    }
    let admin = hubs[1].admin();
    let offline = octobus(&["ping", "edge-9", "--admin", admin.to_str().unwrap()]);
    assert!(offline.describe().contains("edge-9 is not linked"), "{}", offline.describe());
    node.stop();
    for hub in hubs {
        hub.stop();
    }
}
