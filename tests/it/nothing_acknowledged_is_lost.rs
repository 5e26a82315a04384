//! Pins the promise of PUBACK: messages of several devices, while the node, the hub or both are killed again
//! and again and the link between them is cut or bad. What was acknowledged is at the hub exactly once, in
//! the order of its stream; nothing else is there twice either.
//!
//! Every attempt to send a message carries its own number, because a device that saw no PUBACK sends the
//! message again and both may rightly arrive. An attempt goes out once, so it may arrive once at most.
//! Repeat a run with `TEST_SEED`.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io,
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use octobus_tests::{
    clock, log, mqtt,
    octobus::{NODE, Pair, folder},
    relay::{Faults, UdpRelay},
    seed,
};
use rand::{Rng, rngs::SmallRng};

const DEVICES: u64 = 4;
const PAYLOAD_BYTES: usize = 256;
const WINDOW: usize = 64;

#[test]
fn what_was_acknowledged_survives_twenty_kills_exactly_once() {
    survive(20, 20_000);
}

#[test]
#[ignore = "nightly: three minutes"]
fn nightly_what_was_acknowledged_survives_three_hundred_kills_exactly_once() {
    survive(300, 150_000);
}

/// So many kills while the devices get `messages` acknowledged.
fn survive(kills: u64, messages: u64) {
    let seed = seed::seed();
    let folder = folder();
    let mut relay = None;
    let pair = Pair::joined(folder.path(), |quic| relay.insert(UdpRelay::new(quic, seed)).address());
    let relay = relay.expect("the link goes through it");
    let address = pair.node.address("--mqtt");
    let mut hub = pair.hub.start();
    let mut node = pair.node.start();

    let acked_so_far = AtomicU64::new(0);
    let gone = AtomicBool::new(false);
    let mut acked: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    std::thread::scope(|scope| {
        let give_up = GiveUp(&gone);
        let devices: Vec<_> = (0..DEVICES)
            .map(|number| {
                let (acked_so_far, gone) = (&acked_so_far, &gone);
                scope.spawn(move || Device::new(number, address).run(messages / DEVICES, acked_so_far, gone))
            })
            .collect();
        let mut rng = seed::rng(seed, 1);
        for round in 1..=kills {
            // Progress, not time, spreads the kills: a slow machine has as many as a fast one.
            let due = messages * round / (kills + 2);
            clock::wait_for("the devices to go on", Duration::from_secs(60), || {
                (acked_so_far.load(Ordering::Relaxed) >= due).then_some(())
            });
            let (victim, path) = (Victim::pick(&mut rng), Path::pick(&mut rng));
            eprintln!("after {due} acknowledged: kill {victim:?}, the path: {path:?}");
            path.lay(&relay, &mut rng);
            if victim != Victim::Node {
                hub.process.kill();
            }
            if victim != Victim::Hub {
                node.process.kill();
            }
            clock::pause(Duration::from_millis(rng.random_range(0..200)));
            // The node first: it must come up without its hub.
            if victim != Victim::Hub {
                node = pair.node.start();
            }
            if victim != Victim::Node {
                hub = pair.hub.start();
            }
        }
        relay.set(Faults::default());
        for (number, device) in devices.into_iter().enumerate() {
            let number = u64::try_from(number).expect("few devices");
            acked.insert(number, device.join().expect("the device reports"));
        }
        drop(give_up);
    });

    let total: usize = acked.values().map(BTreeSet::len).sum();
    eprintln!("{total} acknowledged; waiting for the hub");
    let lines = clock::wait_for("every acknowledged message at the hub", Duration::from_secs(60), || {
        clock::pause(Duration::from_millis(500)); // reading 5 MB is not for free
        let lines = log::read(log::From::Admin(&hub.admin()), NODE, &[]);
        (missing(&acked, &log::records(&lines)).is_empty()).then_some(lines)
    });
    check(&acked, &lines);
    node.stop();
    hub.stop();
    // What the admin socket showed is what stands on the disk.
    assert_eq!(log::read(log::From::Data(pair.hub.data()), NODE, &[]), lines);
}

/// Who is killed, and started again.
#[derive(Debug, PartialEq, Eq)]
enum Victim {
    Hub,
    Node,
    Both,
}

impl Victim {
    fn pick(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..5) {
            0..2 => Self::Hub,
            2..4 => Self::Node,
            _ => Self::Both,
        }
    }
}

/// What becomes of the path between them, until the next round.
#[derive(Debug)]
enum Path {
    /// As it was before.
    Same,
    Good,
    /// It loses, doubles, delays and reorders.
    Bad,
    /// Nothing passes for a while.
    Cut,
    /// It forgets which port was whose.
    Rebind,
}

impl Path {
    fn pick(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..10) {
            0..5 => Self::Same,
            5 => Self::Good,
            6..8 => Self::Bad,
            8 => Self::Cut,
            _ => Self::Rebind,
        }
    }

    fn lay(&self, relay: &UdpRelay, rng: &mut SmallRng) {
        match self {
            Self::Same => {}
            Self::Good => relay.set(Faults::default()),
            Self::Bad => relay.set(Faults {
                loss: 0.05,
                duplicate: 0.05,
                reorder: 0.1,
                delay: Duration::from_millis(rng.random_range(0..20)),
                cut: false,
                line: None,
            }),
            Self::Cut => {
                relay.set(Faults { cut: true, ..Faults::default() });
                clock::pause(Duration::from_millis(rng.random_range(50..1000)));
                relay.set(Faults::default());
            }
            Self::Rebind => relay.rebind(),
        }
    }
}

/// Lets the devices end when the test fails while they run.
struct GiveUp<'a>(&'a AtomicBool);

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// A device that goes on whatever happens.
struct Device {
    number: u64,
    address: SocketAddr,
    /// Attempts so far, over all connections: the order in which bytes were sent.
    attempts: u64,
    /// Messages to send again, before new ones.
    again: VecDeque<u64>,
    next: u64,
    acked: BTreeSet<u64>,
}

impl Device {
    fn new(number: u64, address: SocketAddr) -> Self {
        Self { number, address, attempts: 0, again: VecDeque::new(), next: 0, acked: BTreeSet::new() }
    }

    /// Sends until `count` messages are acknowledged; returns the attempts that were.
    fn run(mut self, count: u64, acked_so_far: &AtomicU64, gone: &AtomicBool) -> BTreeSet<u64> {
        while (self.next < count || !self.again.is_empty()) && !gone.load(Ordering::Relaxed) {
            let mut in_flight = VecDeque::new();
            if self.connection(count, &mut in_flight, acked_so_far).is_err() {
                clock::pause(Duration::from_millis(20));
            }
            // Not acknowledged: again, in order, as new attempts.
            for (_id, message, _attempt) in in_flight.into_iter().rev() {
                self.again.push_front(message);
            }
        }
        self.acked
    }

    /// One connection, until it breaks or everything is acknowledged.
    fn connection(
        &mut self,
        count: u64,
        in_flight: &mut VecDeque<(u16, u64, u64)>,
        acked_so_far: &AtomicU64,
    ) -> io::Result<()> {
        let options = mqtt::Options::new(&format!("device-{}", self.number));
        let mut client = mqtt::Client::connect(self.address, &options)?;
        let mut packet_id = 0;
        loop {
            let mut burst = Vec::new();
            while in_flight.len() < WINDOW {
                let Some(message) = self.again.pop_front().or_else(|| self.fresh(count)) else { break };
                packet_id = packet_id % u16::MAX + 1;
                in_flight.push_back((packet_id, message, self.attempts));
                let topic = format!("device/{}", self.number);
                let payload = payload(self.number, self.attempts, message);
                self.attempts += 1;
                burst.extend(mqtt::publish(&topic, &payload, 1, packet_id, false, false));
            }
            client.write(&burst)?;
            if in_flight.is_empty() {
                client.disconnect();
                return Ok(());
            }
            while in_flight.len() > WINDOW / 2 || (!in_flight.is_empty() && self.next == count) {
                let mqtt::Packet::PubAck(id) = client.read(Duration::from_secs(30))? else { continue };
                let at = in_flight.iter().position(|(sent, ..)| *sent == id);
                let at = at.unwrap_or_else(|| panic!("PUBACK {id} for nothing in flight, or twice"));
                let (_id, _message, attempt) = in_flight.remove(at).expect("just found");
                self.acked.insert(attempt);
                acked_so_far.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn fresh(&mut self, count: u64) -> Option<u64> {
        let message = self.next;
        (message < count).then(|| {
            self.next += 1;
            message
        })
    }
}

/// Says who, which attempt, which message, and fills up with what follows from these.
fn payload(device: u64, attempt: u64, message: u64) -> Vec<u8> {
    let mut payload = [device, attempt, message].map(u64::to_be_bytes).concat();
    let mut next = device ^ attempt << 8 ^ message << 32;
    payload.resize_with(PAYLOAD_BYTES, || {
        next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (next >> 56).try_into().expect("eight bits")
    });
    payload
}

/// Device and attempt of a record; its payload must be what was sent.
fn attempt(record: &log::Record) -> (u64, u64) {
    let word = |n: usize| {
        let bytes = record.payload.get(n * 8..n * 8 + 8).expect("a payload of ours");
        u64::from_be_bytes(bytes.try_into().expect("eight bytes"))
    };
    let (device, attempt, message) = (word(0), word(1), word(2));
    assert_eq!(
        record.payload,
        payload(device, attempt, message),
        "seq {} was changed on the way",
        record.seq
    );
    assert_eq!(record.topic, format!("device/{device}"));
    (device, attempt)
}

fn missing(acked: &BTreeMap<u64, BTreeSet<u64>>, records: &[log::Record]) -> Vec<(u64, u64)> {
    let there: BTreeSet<(u64, u64)> = records.iter().map(attempt).collect();
    let wanted =
        acked.iter().flat_map(|(device, attempts)| attempts.iter().map(|attempt| (*device, *attempt)));
    wanted.filter(|one| !there.contains(one)).collect()
}

fn check(acked: &BTreeMap<u64, BTreeSet<u64>>, lines: &[log::Line]) {
    log::assert_no_silent_loss(lines);
    let records = log::records(lines);
    assert_eq!(missing(acked, &records), [], "acknowledged and not at the hub");
    // Strictly ascending per device: nothing twice, nothing out of order.
    let mut last: BTreeMap<u64, u64> = BTreeMap::new();
    for record in &records {
        let (device, attempt) = attempt(record);
        if let Some(before) = last.insert(device, attempt) {
            assert!(
                before < attempt,
                "device {device}: attempt {attempt} stands at seq {} after {before}",
                record.seq
            );
        }
    }
}
