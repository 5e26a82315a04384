//! A script of the simulation, on real processes: publishes, kills and cuts as it says, everything else as
//! disks and networks do it by themselves. The promise is the same: what was acknowledged is at the hub
//! exactly once, in the order of its topic.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use octobus_tests::{
    clock, log, mqtt,
    octobus::{NODE, Pair, Running, folder},
    relay::{Faults, UdpRelay},
    script::{Flag, HUB, Script, TOPICS, What},
};

const SCRIPT: &str = include_str!("../sim/seeds/on_real_processes.txt");
const CUT: Duration = Duration::from_millis(200);

/// A device: it sends each message once, and notes whether it saw the acknowledgement.
struct Device {
    address: SocketAddr,
    client: Option<mqtt::Client>,
    packet_id: u16,
    /// Acknowledged tags of each topic, in order.
    acknowledged: BTreeMap<&'static str, Vec<String>>,
    sent: usize,
}

impl Device {
    /// Publishes, and waits for the acknowledgement or goes on without.
    fn publish(&mut self, topic: &'static str, pad: usize, wait: bool) {
        self.sent += 1;
        let tag = format!("{topic}#{}", self.sent);
        let payload = format!("{tag}|{}", ".".repeat(pad));
        let client = self.client.take().or_else(|| {
            // The node may be on its way up.
            let options = mqtt::Options::new("device");
            Some(clock::wait_for("the node to take clients", Duration::from_secs(20), || {
                mqtt::Client::connect(self.address, &options).ok()
            }))
        });
        let Some(mut client) = client else { return };
        self.packet_id += 1;
        let id = self.packet_id;
        let written = client.write(&mqtt::publish(topic, payload.as_bytes(), 1, id, false, false));
        let acknowledged = written.is_ok()
            && wait
            && client
                .read_until(|packet| {
                    matches!(packet, mqtt::Packet::PubAck(acked) if acked == id).then_some(())
                })
                .is_ok();
        if acknowledged {
            self.acknowledged.entry(topic).or_default().push(tag);
        }
        self.client = Some(client);
    }
}

#[test]
fn a_script_of_the_simulation_keeps_its_promises_on_real_processes() {
    let script: Script = SCRIPT.parse().unwrap();
    let folder = folder();
    let mut relay = None;
    let pair = Pair::joined(folder.path(), |quic| relay.insert(UdpRelay::new(quic, script.seed)).address());
    let relay = relay.unwrap();
    let mut hub = pair.hub.start();
    let mut node = pair.node.start();
    let address = pair.node.address("--mqtt");
    let mut device = Device { address, client: None, packet_id: 0, acknowledged: BTreeMap::new(), sent: 0 };
    for step in &script.steps {
        match step.what {
            What::Publish { topic, pad, durable, .. } => {
                device.publish(TOPICS[topic.0], pad as usize, durable == Flag::Yes);
            }
            What::Crash { host } if host.0 == HUB => {
                hub.process.kill();
                hub = pair.hub.start();
            }
            What::Crash { .. } => {
                node.process.kill();
                node = pair.node.start();
                device.client = None;
            }
            What::Cut { .. } => {
                relay.set(Faults { cut: true, ..Faults::default() });
                clock::pause(CUT);
                relay.set(Faults::default());
            }
            _ => {}
        }
    }
    let count: usize = device.acknowledged.values().map(Vec::len).sum();
    assert!(count > 20, "only {count} acknowledged");
    let tags = clock::wait_for("everything acknowledged at the hub", Duration::from_secs(60), || {
        clock::pause(Duration::from_millis(100));
        let tags = tags_at(&hub);
        device.acknowledged.values().flatten().all(|tag| tags.contains(tag)).then_some(tags)
    });
    let once: BTreeSet<&String> = tags.iter().collect();
    assert_eq!(once.len(), tags.len(), "something is there twice: {tags:?}");
    for (topic, acknowledged) in &device.acknowledged {
        let mut rest = tags.iter();
        for tag in acknowledged {
            assert!(rest.any(|found| found == tag), "{tag} of {topic} is out of order in {tags:?}");
        }
    }
    node.stop();
    hub.stop();
}

fn tags_at(hub: &Running) -> Vec<String> {
    let lines = log::read(log::From::Admin(&hub.admin()), NODE, &[]);
    log::assert_no_silent_loss(&lines);
    let text = |record: log::Record| String::from_utf8(record.payload).unwrap();
    log::records(&lines)
        .into_iter()
        .map(|record| text(record).split('|').next().unwrap().to_owned())
        .collect()
}
