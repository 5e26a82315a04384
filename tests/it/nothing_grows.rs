//! Pins that a node and a hub can be left alone: under a mixed load, with clients that come and go and a
//! link that breaks, memory, file descriptors and disk stay where they were once the quotas are full.
//!
//! By night a day's load (8.6 million messages at 100 a second) passes as fast as the machine takes it, or
//! for `SOAK_MINUTES`; the short run of every test sees that the measuring itself works.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use octobus_tests::{
    clock, mqtt, nats,
    octobus::{NODE, Pair, Running, folder},
    procfs,
    relay::{Faults, UdpRelay},
    seed,
};
use rand::{Rng, rngs::SmallRng};

/// Bytes that each stream keeps: small, so that retention works all the time.
const QUOTA: &str = "8MiB";
/// A day at 100 messages a second.
const DAY_OF_MESSAGES: u64 = 8_640_000;
const RETAINED_KEYS: u32 = 500;
const CLIENTS: u32 = 40;

#[test]
#[ignore = "nightly: up to twenty minutes"]
fn nightly_a_day_of_mixed_load_leaves_memory_descriptors_and_disk_flat() {
    let minutes = std::env::var("SOAK_MINUTES").map_or(20, |text| text.parse().expect("a number"));
    let samples = soak(Duration::from_secs(60 * minutes), DAY_OF_MESSAGES);
    let quarter = samples.len() / 4;
    assert!(quarter >= 4, "too short to compare: {} samples", samples.len());
    let (early, late) = (&samples[quarter..2 * quarter], &samples[samples.len() - quarter..]);
    for (what, of) in FIGURES {
        let (early, late) = (median(early, of), median(late, of));
        let allowed = early + early / 8 + slack(what);
        assert!(late <= allowed, "{what} grew from {early} to {late} (allowed {allowed})");
    }
}

#[test]
fn a_mixed_load_holds_no_descriptor_and_no_disk_beyond_its_quotas() {
    let samples = soak(Duration::from_secs(12), u64::MAX);
    let last = samples.last().expect("sampled");
    for side in [&last.node, &last.hub] {
        assert!(side.descriptors < 64 + u64::from(CLIENTS), "{last:?}");
        // Journal segments of 8 and 64 MiB that wait to be freed, the checkpoint, twelve seconds of load.
        assert!(side.disk < 512 << 20, "{last:?}");
    }
}

type Figure = (&'static str, fn(&Sample) -> u64);

const FIGURES: [Figure; 6] = [
    ("memory of the node", |sample| sample.node.memory),
    ("memory of the hub", |sample| sample.hub.memory),
    ("descriptors of the node", |sample| sample.node.descriptors),
    ("descriptors of the hub", |sample| sample.hub.descriptors),
    ("disk of the node", |sample| sample.node.disk),
    ("disk of the hub", |sample| sample.hub.disk),
];

/// What a figure may move by whatever its size: clients that happen to be connected, a segment in the making.
fn slack(what: &str) -> u64 {
    match what.split(' ').next() {
        Some("memory") => 8 << 20,
        Some("descriptors") => u64::from(CLIENTS) / 2,
        _ => 80 << 20,
    }
}

fn median(samples: &[Sample], of: fn(&Sample) -> u64) -> u64 {
    let mut values: Vec<u64> = samples.iter().map(of).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    node: Side,
    hub: Side,
}

#[derive(Debug, Clone, Copy)]
struct Side {
    memory: u64,
    descriptors: u64,
    /// Allocated bytes of the data folder.
    disk: u64,
}

impl Side {
    fn of(running: &Running, data: &Path) -> Self {
        let pid = running.process.pid();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count();
        let descriptors = u64::try_from(descriptors).expect("few");
        Self { memory: procfs::resident_bytes(pid), descriptors, disk: allocated(data) }
    }
}

/// Files may go while they are counted.
fn allocated(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_gone) => 0,
    };
    entries.flatten().map(size).sum()
}

/// Loads a hub and a node until the time is over or so many messages were acknowledged; a sample each second
/// or sixtieth of the time.
fn soak(time: Duration, messages: u64) -> Vec<Sample> {
    let seed = seed::seed();
    let folder = folder();
    let config = folder.path().join("octobus.toml");
    fs::write(&config, format!("[[stream]]\nname = \"default\"\nmax_bytes = \"{QUOTA}\"\n")).unwrap();
    let mut relay = None;
    let mut pair = Pair::joined(folder.path(), |quic| relay.insert(UdpRelay::new(quic, seed)).address());
    let relay = relay.expect("the link goes through it");
    let config = ["--config", config.to_str().unwrap()];
    pair.hub = pair.hub.args(&config);
    pair.node = pair.node.args(&config);
    let (hub, node) = (pair.hub.start(), pair.node.start());
    let (mqtt, nats) = (node.endpoint("mqtt"), hub.endpoint("nats"));

    let load = Load { stop: AtomicBool::new(false), acknowledged: AtomicU64::new(0) };
    let mut samples = Vec::new();
    std::thread::scope(|scope| {
        let load = &load;
        let _stop = load.until_dropped();
        for device in 0..3 {
            scope.spawn(move || load.keep_on(|| load.device(mqtt, device)));
        }
        scope.spawn(move || load.keep_on(|| load.once_only(mqtt)));
        scope.spawn(move || load.keep_on(|| load.retained(mqtt, seed::rng(seed, 2))));
        scope.spawn(move || load.keep_on(|| load.come_and_go(mqtt, seed::rng(seed, 3))));
        scope.spawn(move || load.keep_on(|| load.down(nats)));
        scope.spawn(move || load.keep_on(|| load.listen(nats)));
        let every = Duration::from_secs(1).max(time / 60);
        let began = clock::now();
        while began.elapsed() < time && load.acknowledged.load(Ordering::Relaxed) < messages {
            clock::pause(every);
            samples.push(Sample {
                node: Side::of(&node, pair.node.data()),
                hub: Side::of(&hub, pair.hub.data()),
            });
            eprintln!("{:?} {:?}", load.acknowledged, samples.last().expect("just pushed"));
            relay.set(Faults { cut: true, ..Faults::default() });
            clock::pause(Duration::from_millis(200));
            relay.set(Faults::default());
        }
    });
    assert!(load.acknowledged.load(Ordering::Relaxed) > 1000, "there was a load");
    node.stop();
    hub.stop();
    samples
}

struct Load {
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

/// Ends the load, also when the test fails.
struct Stop<'a>(&'a Load);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

impl Load {
    fn until_dropped(&self) -> Stop<'_> {
        Stop(self)
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Again and again, whatever breaks.
    fn keep_on(&self, mut body: impl FnMut() -> io::Result<()>) {
        while self.goes_on() {
            if body().is_err() {
                clock::pause(Duration::from_millis(50));
            }
        }
    }

    /// A device at QoS 1, 64 in flight, and something at QoS 0 in between.
    fn device(&self, address: SocketAddr, number: u32) -> io::Result<()> {
        let options = mqtt::Options::new(&format!("device-{number}")).persistent();
        let mut client = mqtt::Client::connect(address, &options)?;
        let topic = format!("telemetry/{number}");
        let payload = [7; 200];
        while self.goes_on() {
            let mut burst = Vec::new();
            for packet_id in 1..=64 {
                burst.extend(mqtt::publish(&topic, &payload, 1, packet_id, false, false));
            }
            burst.extend(mqtt::publish("live", &payload, 0, 0, false, false));
            client.write(&burst)?;
            for _ in 1..=64 {
                client.read_until(|packet| matches!(packet, mqtt::Packet::PubAck(_)).then_some(()))?;
            }
            self.acknowledged.fetch_add(64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// QoS 2, one by one.
    fn once_only(&self, address: SocketAddr) -> io::Result<()> {
        let options = mqtt::Options::new("meter").persistent();
        let mut client = mqtt::Client::connect(address, &options)?;
        for packet_id in (1..=u16::MAX).cycle() {
            if !self.goes_on() {
                break;
            }
            client.write(&mqtt::publish("meter", b"12.5", 2, packet_id, false, false))?;
            client.read_until(|packet| (packet == mqtt::Packet::PubRec(packet_id)).then_some(()))?;
            client.write(&mqtt::acknowledge(0x62, packet_id))?;
            client.read_until(|packet| (packet == mqtt::Packet::PubComp(packet_id)).then_some(()))?;
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Retained values that are set and cleared.
    fn retained(&self, address: SocketAddr, mut rng: SmallRng) -> io::Result<()> {
        let mut client = mqtt::Client::connect(address, &mqtt::Options::new("setter"))?;
        while self.goes_on() {
            let topic = format!("state/{}", rng.random_range(0..RETAINED_KEYS));
            let value: &[u8] = if rng.random_bool(0.3) { b"" } else { &[9; 100] };
            client.publish_acked(&topic, value, true)?;
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Clients with sessions that outlive their connections, never more than a few names.
    fn come_and_go(&self, address: SocketAddr, mut rng: SmallRng) -> io::Result<()> {
        while self.goes_on() {
            let name = format!("visitor-{}", rng.random_range(0..CLIENTS));
            let mut client = mqtt::Client::connect(address, &mqtt::Options::new(&name).persistent())?;
            client
                .subscribe(if rng.random_bool(0.5) { "telemetry/0" } else { "#" }, rng.random_range(1..=2))?;
            for _ in 0..rng.random_range(0..50) {
                client.next_publish(Duration::from_secs(5))?;
            }
            if rng.random_bool(0.5) {
                client.disconnect(); // else the connection just breaks
            }
        }
        Ok(())
    }

    /// Commands to the node.
    fn down(&self, address: SocketAddr) -> io::Result<()> {
        let mut client = nats::Client::connect(address)?;
        while self.goes_on() {
            client.publish(&format!("octobus.down.{NODE}.valves.3"), b"open")?;
            client.flush()?;
        }
        Ok(())
    }

    /// Somebody who reads all telemetry at the hub.
    fn listen(&self, address: SocketAddr) -> io::Result<()> {
        let mut client = nats::Client::connect(address)?;
        client.subscribe("octobus.up.>")?;
        while self.goes_on() {
            match client.next(Duration::from_secs(1)) {
                Err(error) if error.kind() != io::ErrorKind::TimedOut => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
