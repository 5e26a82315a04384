//! What the clients of a recorded node know: what they were told, and what they hold.
//!
//! It is a fold over [`Note`]s, so that it can be had for every point of a recording. The rules of the
//! protocol that a client can see broken are asserted where it sees them.

use std::collections::{BTreeMap, BTreeSet};

use crate::core::event::{Group, Lsn};

/// A record as a client sees it: stream and seq.
pub(super) type Place = (String, u64);

/// Something was said to the node, or by it.
#[derive(Debug, Clone)]
pub(super) enum Note {
    /// The store was given this group.
    Given(Group),
    /// The store said that all up to here is durable.
    Persisted(Lsn),
    /// The store was opened and held this much.
    Opened(Lsn),
    /// A device sends message `id`; at QoS 2 perhaps again.
    Sent { device: usize, packet: u16, id: u64, qos: u8, retain: bool },
    /// It was refused.
    Refused { device: usize, packet: u16 },
    /// PUBACK, PUBREC.
    Acked { device: usize, packet: u16 },
    /// A device sends PUBREL.
    Releasing { device: usize, packet: u16 },
    /// PUBCOMP.
    Released { device: usize, packet: u16 },
    /// SUBACK.
    Subscribed { subscriber: usize },
    /// A PUBLISH from QoS 1 on reached a subscriber.
    Delivered { subscriber: usize, packet: u16, qos: u8, place: Place },
    /// It sends PUBACK or PUBREC.
    Acking { subscriber: usize, packet: u16 },
    /// PUBREL reached it; it sends PUBCOMP.
    Completing { subscriber: usize, packet: u16 },
    /// A write of State was answered.
    Written { key: String, revision: u64, value: Option<u64> },
}

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub(super) struct World {
    /// Every group that was ever given and may be there.
    pub(super) groups: BTreeMap<Lsn, Group>,
    /// Up to here all must be there.
    pub(super) durable: Lsn,
    pub(super) next_id: u64,
    /// Messages that the node has acknowledged.
    pub(super) acked: BTreeSet<u64>,
    /// The newest acknowledged retained message of each device.
    pub(super) retained: BTreeMap<usize, u64>,
    pub(super) devices: [Device; 2],
    pub(super) subscribers: [Subscriber; 2],
    pub(super) written: BTreeMap<String, (u64, Option<u64>)>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Device {
    pub(super) next_packet: u16,
    pub(super) open: BTreeMap<u16, Sending>,
}

/// A message that a device is not done with.
#[derive(Debug, Clone)]
pub(super) struct Sending {
    pub(super) id: u64,
    pub(super) qos: u8,
    pub(super) retain: bool,
    /// PUBREC was seen.
    pub(super) received: bool,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Subscriber {
    /// Messages from this id on are promised to it.
    pub(super) from: Option<u64>,
    /// What it has acknowledged, finally at QoS 1, by PUBREC at QoS 2.
    pub(super) seen: BTreeSet<Place>,
    pub(super) open: BTreeMap<u16, Receiving>,
}

/// A delivery that a subscriber is not done with.
#[derive(Debug, Clone)]
pub(super) struct Receiving {
    pub(super) place: Place,
    pub(super) qos: u8,
    /// At QoS 2: PUBREC was sent.
    pub(super) received: bool,
}

impl World {
    pub(super) fn take(&mut self, note: &Note) {
        match note {
            Note::Given(group) => drop(self.groups.insert(group.lsn, group.clone())),
            Note::Persisted(lsn) => self.durable = *lsn,
            Note::Opened(lsn) => {
                drop(self.groups.split_off(&(lsn + 1)));
                self.durable = *lsn;
                // Connections ended; at QoS 1 nothing is kept of what was under way.
                for device in &mut self.devices {
                    device.open.retain(|_, sending| sending.qos == 2);
                }
                for subscriber in &mut self.subscribers {
                    subscriber.open.retain(|_, receiving| receiving.qos == 2);
                }
            }
            Note::Sent { device, packet, id, qos, retain } => {
                self.next_id = self.next_id.max(id + 1);
                let device = &mut self.devices[*device];
                device.next_packet = device.next_packet.max(*packet);
                let sending = Sending { id: *id, qos: *qos, retain: *retain, received: false };
                device.open.entry(*packet).or_insert(sending);
            }
            Note::Refused { device, packet } => drop(self.devices[*device].open.remove(packet)),
            Note::Acked { device, packet } => self.acked_by_node(*device, *packet),
            Note::Releasing { device, packet } => {
                let sending = &self.devices[*device].open[packet];
                assert!(sending.qos == 2 && sending.received);
            }
            Note::Released { device, packet } => drop(self.devices[*device].open.remove(packet)),
            Note::Subscribed { subscriber } => {
                self.subscribers[*subscriber].from.get_or_insert(self.next_id);
            }
            Note::Delivered { subscriber, packet, qos, place } => {
                self.subscribers[*subscriber].delivered(*packet, *qos, place);
            }
            Note::Acking { subscriber, packet } => self.subscribers[*subscriber].acking(*packet),
            Note::Completing { subscriber, packet } => {
                self.subscribers[*subscriber].open.remove(packet);
            }
            Note::Written { key, revision, value } => {
                let (newest, held) = self.written.entry(key.clone()).or_default();
                if revision > newest {
                    (*newest, *held) = (*revision, *value);
                }
            }
        }
    }

    fn acked_by_node(&mut self, device: usize, packet: u16) {
        let Some(sending) = self.devices[device].open.get_mut(&packet) else { return };
        self.acked.insert(sending.id);
        if sending.retain {
            let newest = self.retained.entry(device).or_default();
            *newest = sending.id.max(*newest);
        }
        sending.received = true;
        if sending.qos == 1 {
            self.devices[device].open.remove(&packet);
        }
    }
}

impl Subscriber {
    fn delivered(&mut self, packet: u16, qos: u8, place: &Place) {
        if let Some(held) = self.open.get(&packet) {
            if held.place == *place {
                return;
            }
            assert!(
                !held.received,
                "packet id {packet} of {:?} is given to {place:?} before it is free",
                held.place
            );
        }
        if qos == 2 {
            assert!(!self.seen.contains(place), "{place:?} is delivered twice at QoS 2");
            let elsewhere = self.open.iter().find(|(_, held)| held.place == *place);
            assert!(
                elsewhere.is_none(),
                "{place:?} is delivered under two packet ids: {packet} and {elsewhere:?}"
            );
        }
        self.open.insert(packet, Receiving { place: place.clone(), qos, received: false });
    }

    fn acking(&mut self, packet: u16) {
        let Some(held) = self.open.get_mut(&packet) else { return };
        self.seen.insert(held.place.clone());
        held.received = true;
        if held.qos == 1 {
            self.open.remove(&packet);
        }
    }
}
