//! Pins priority on a slow line: 256 kbit/s with a second of buffer before it and 50 ms each way, saturated by
//! a bulk stream. Loss-based congestion control keeps such a buffer full, and an alarm would wait all of it;
//! both transports keep what is on its way short instead.

use std::{
    fs,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use octobus_tests::{
    clock, mqtt, nats,
    octobus::{NODE, Octobus, Pair, folder},
    relay::{Faults, Line, TcpRelay, UdpRelay},
    seed,
};
use rand::RngCore;

/// One way.
const DELAY: Duration = Duration::from_millis(50);
/// Alarms come this often, this many times, after the line has been full for [`FULL_FOR`].
const EVERY: Duration = Duration::from_millis(100);
const ALARMS: usize = 100;
const FULL_FOR: Duration = Duration::from_secs(5);
/// Longest one way of an alarm, 99 of 100: the delay, what stands on the line, and a busy machine.
const P99: Duration = Duration::from_millis(500);
/// Of incompressible bulk: more than the line carries during the test.
const BULK: usize = 2 << 20;
const CONFIG: &str = "[[stream]]\nname = 'alarms'\nfilters = ['alarm/#']\nclass = 'alarm'\n\
                      [[stream]]\nname = 'bulk'\nfilters = ['bulk/#']\nclass = 'bulk'\n";

#[test]
fn an_alarm_overtakes_bulk_on_a_slow_line_by_quic() {
    let mut relay = None;
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| relay.insert(UdpRelay::new(quic, seed::seed())).address());
    let relay = relay.expect("the link goes through it");
    relay.set(Faults { delay: DELAY, line: Some(Line::SLOW), ..Faults::default() });
    measure("quic", &pair.hub, pair.node, folder.path());
}

#[test]
fn an_alarm_overtakes_bulk_on_a_slow_line_by_websocket() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    let relay = TcpRelay::slow(pair.hub.address("--websocket"), Line::SLOW, DELAY);
    let through = format!("wss://{}", relay.address());
    measure("websocket", &pair.hub, pair.node.args(&["--hub", &through]), folder.path());
}

fn measure(way: &str, hub: &Octobus, node: Octobus, folder: &std::path::Path) {
    let config = folder.join("octobus.toml");
    fs::write(&config, CONFIG).unwrap();
    let node = node.args(&["--config", config.to_str().unwrap()]);
    let address = node.address("--mqtt");
    let (hub, node) = (hub.start(), node.start());
    let mut at_hub = nats::Client::connect(hub.endpoint("nats")).unwrap();
    at_hub.subscribe(&format!("octobus.up.{NODE}.alarm.>")).unwrap();
    let origin = clock::now();
    let done = AtomicBool::new(false);
    let mut took: Vec<Duration> = std::thread::scope(|scope| {
        scope.spawn(|| fill(address, &done));
        let alarms = scope.spawn(|| {
            let mut device = mqtt::Client::connect(address, &mqtt::Options::new("alarms")).unwrap();
            // The first shows that the link is up; then the line has to be full.
            publish(&mut device, origin, 1);
            clock::pause(FULL_FOR);
            for id in 0..ALARMS {
                publish(&mut device, origin, u16::try_from(id + 2).unwrap());
                clock::pause(EVERY);
            }
        });
        let took = (0..=ALARMS)
            .map(|_| {
                let message = at_hub.next(Duration::from_secs(30)).expect("every alarm comes");
                let sent = u64::from_be_bytes(message.payload[..8].try_into().unwrap());
                origin.elapsed().saturating_sub(Duration::from_micros(sent))
            })
            .collect();
        alarms.join().unwrap();
        done.store(true, Ordering::Relaxed);
        took
    });
    took.remove(0);
    took.sort();
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
    let (median, p99, most) = (at(50), at(99), took[took.len() - 1]);
    eprintln!("{way}: alarms one way: median {median:.0?}, p99 {p99:.0?}, most {most:.0?}");
    assert!(p99 < P99, "{way}: 99 of 100 alarms within {p99:?}, median {median:?}");
    drop((node, hub));
}

fn publish(device: &mut mqtt::Client, origin: std::time::Instant, id: u16) {
    let sent = u64::try_from(origin.elapsed().as_micros()).unwrap();
    device.write(&mqtt::publish("alarm/fire", &sent.to_be_bytes(), 1, id, false, false)).unwrap();
    while !matches!(device.read(Duration::from_secs(20)).unwrap(), mqtt::Packet::PubAck(acked) if acked == id)
    {
    }
}

/// Gives the node more than the line carries.
fn fill(address: SocketAddr, done: &AtomicBool) {
    let mut device = mqtt::Client::connect(address, &mqtt::Options::new("bulk")).unwrap();
    let mut rng = seed::rng(seed::seed(), 7);
    let mut payload = vec![0; 8 << 10];
    for id in 0..BULK / payload.len() {
        rng.fill_bytes(&mut payload);
        let id = u16::try_from(id + 1).unwrap();
        device.write(&mqtt::publish("bulk/file", &payload, 1, id, false, false)).unwrap();
        while !matches!(device.read(Duration::from_secs(20)).unwrap(), mqtt::Packet::PubAck(_)) {}
        if done.load(Ordering::Relaxed) {
            return;
        }
    }
}
