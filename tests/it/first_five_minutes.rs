//! Pins what a new user meets first: one command starts everything, stock clients work at once, an idle
//! machine stays idle, Ctrl-C is clean, and a restart on the same data has lost nothing.

use std::time::Duration;

use octobus_tests::{
    clock, log, mqtt,
    octobus::{NODE, Octobus, Role, folder},
    procfs,
    stock::{MosquittoSub, NatsSub, Place, mosquitto_pub, nats_pub},
};

#[test]
fn measured_dev_is_ready_within_two_seconds() {
    let folder = folder();
    let fresh = Octobus::new(Role::Dev, &folder.path().join("data"));
    let first = fresh.start();
    assert!(first.took < Duration::from_secs(2), "ready {:?} after the first start", first.took);
    first.stop();
    let second = fresh.start();
    assert!(second.took < Duration::from_secs(2), "ready {:?} after a restart", second.took);
}

#[test]
fn measured_dev_is_idle_when_nothing_happens() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let span = Duration::from_secs(5);
    // What follows the start (checkpoint, first heartbeats) is not idleness yet.
    clock::pause(Duration::from_secs(2));
    let before = procfs::cpu_time(dev.process.pid());
    clock::pause(span);
    let used = procfs::cpu_time(dev.process.pid()) - before;
    assert!(used < span / 100, "{used:?} of CPU in {span:?} without any work");
}

#[test]
fn the_three_lines_work_with_stock_clients() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let (mqtt, nats) = (dev.endpoint("mqtt"), dev.endpoint("nats"));

    let at_the_hub = NatsSub::start(Place::Here, nats, "octobus.up.edge-1.>");
    let on_the_node = MosquittoSub::start(Place::Here, mqtt, &["-q", "1", "-t", "valves/#"]);
    mosquitto_pub(Place::Here, mqtt, &["-q", "1", "-t", "sensors/boiler/temp", "-m", "71.5"]).ok();
    nats_pub(Place::Here, nats, "octobus.down.edge-1.valves.3", "open");

    at_the_hub.expect("octobus.up.edge-1.sensors.boiler.temp", "71.5");
    on_the_node.expect("valves/3", "open");
    // Each exactly once, and neither comes back where it came from.
    mosquitto_pub(Place::Here, mqtt, &["-q", "1", "-t", "sensors/last", "-m", "x"]).ok();
    at_the_hub.expect("octobus.up.edge-1.sensors.last", "x");
    assert_eq!(
        at_the_hub.messages(),
        ["octobus.up.edge-1.sensors.boiler.temp 71.5", "octobus.up.edge-1.sensors.last x"]
    );
    assert_eq!(on_the_node.messages(), ["valves/3 open"]);
}

#[test]
fn dev_prints_what_to_try() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let limit = Duration::from_secs(5);
    for (program, what) in
        [("mosquitto_pub", "sensors/"), ("nats", "sub 'octobus.up."), ("nats", "pub octobus.down.")]
    {
        let is = |said: &str| (said.trim_start().starts_with(program) && said.contains(what)).then_some(());
        dev.process.wait_line(what, limit, is);
    }
    let said = dev.process.output();
    for part in ["mqtt", "nats"] {
        let port = dev.endpoint(part).port().to_string();
        assert!(said.contains(&port), "the {part} port {port} is not in what dev prints:\n{said}");
    }
}

#[test]
fn a_restart_on_the_same_data_loses_nothing() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data"));
    let running = dev.start();
    let address = running.endpoint("mqtt");
    let away = mqtt::Options::new("away").persistent();
    let mut client = mqtt::Client::connect(address, &away).unwrap();
    client.subscribe("jobs/#", 1).unwrap();
    client.disconnect();
    let mut publisher = mqtt::Client::connect(address, &mqtt::Options::new("publisher")).unwrap();
    for n in 0..200 {
        publisher.publish_acked(&format!("jobs/{n}"), format!("job {n}").as_bytes(), false).unwrap();
    }
    publisher.publish_acked("state/door", b"open", true).unwrap();
    drop(publisher);
    let hub_has_all = || {
        let lines = log::read(log::From::Admin(&running.admin()), NODE, &[]);
        (log::records(&lines).len() == 201).then_some(lines)
    };
    let before = clock::wait_for("201 messages at the hub", Duration::from_secs(20), hub_has_all);
    log::assert_no_silent_loss(&before);
    running.stop();

    let running = dev.start();
    assert_eq!(log::read(log::From::Admin(&running.admin()), NODE, &[]), before);
    let mut client = mqtt::Client::connect(address, &away).unwrap();
    assert!(client.session_present, "the session was forgotten");
    for n in 0..200 {
        match client.next_publish(Duration::from_secs(10)).unwrap() {
            mqtt::Packet::Publish { topic, payload, qos: 1, .. } => {
                assert_eq!(topic, format!("jobs/{n}"));
                assert_eq!(payload, format!("job {n}").as_bytes());
            }
            other => panic!("{other:?} instead of job {n}"),
        }
    }
    let mut late = mqtt::Client::connect(address, &mqtt::Options::new("late")).unwrap();
    late.subscribe("state/#", 1).unwrap();
    match late.next_publish(Duration::from_secs(10)).unwrap() {
        mqtt::Packet::Publish { topic, payload, retain: true, .. } => {
            assert_eq!((topic.as_str(), payload.as_slice()), ("state/door", b"open".as_slice()));
        }
        other => panic!("{other:?} instead of the retained message"),
    }
    running.stop();
}
