//! Client sessions: what a client subscribed to, where it stands in each Log, what it has not yet
//! acknowledged.
//!
//! ```text
//!            SessionOpened                 SessionClosed, expiry > 0
//!   (none) ---------------> connected ---------------------------------> away
//!      ^                      |    ^                                     |  |
//!      | SessionClosed,       |    +------------ SessionOpened ----------+  |
//!      | expiry = 0           v                                             |
//!      +----------------------+<--------------- expiry, clean start --------+
//! ```
//!
//! A session holds one cursor per Log. A cursor *at the head* has no position of its own: the client is
//! in the Log's consumer list and gets what matches as it becomes durable. It falls behind when its window
//! is full or its client is away, and is then pumped from the Log's tail or the store.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use codec::{Filter, Kind, proto};
use sha2::{Digest, Sha256};

use super::{
    event::{Delivery, Front, SessionId, SubId, Subscription, Will},
    ledger::Ledger,
    log::LogId,
};
use crate::limits;

/// With more filters than this a store is not asked to look for what matches them.
const WANTED_MAX: usize = 64;

/// A client's place in the core's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ClientIx(pub(super) u32);

#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: Arc<str>,
    /// Stands in what it publishes, for subscribers that do not want their own: a hash of its id, so that
    /// it holds across restarts.
    pub(super) mark: u64,
    pub(super) front: Front,
    /// The connection, unless it is away.
    pub(super) session: Option<SessionId>,
    pub(super) expiry_s: u32,
    pub(super) receive_max: u16,
    /// Bytes in the connection's outbox.
    pub(super) queued: usize,
    pub(super) subscriptions: BTreeMap<SubId, Subscription>,
    pub(super) cursors: BTreeMap<LogId, Cursor>,
    pub(super) inflight: BTreeMap<u16, InFlight>,
    pub(super) inflight_bytes: usize,
    next_packet_id: u16,
    next_order: u64,
    /// Inbound QoS 2 packet ids not yet released.
    pub(super) received: BTreeSet<u16>,
    pub(super) will: Option<Will>,
    /// Wall time since when it is away.
    pub(super) lost_at_us: u64,
    /// Monotonic time at which it ends, while it is away.
    pub(super) expires_at: Duration,
    /// A timer for that is set: one for each client, however often it comes and goes.
    pub(super) expiry_armed: bool,
    /// Raised at each connect, so that a timer of an earlier absence does nothing.
    pub(super) visits: u64,
    /// It is being closed as a slow consumer.
    pub(super) closing: bool,
}

/// Where a client stands in a Log.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    /// Next seq to look at; `None` at the head.
    pub(super) next: Option<u64>,
    /// Acknowledged above the lowest unacknowledged one.
    pub(super) acked: BTreeSet<u64>,
    /// A read is under way.
    pub(super) reading: bool,
    /// Moved since it was last written.
    pub(super) dirty: bool,
}

/// A delivery that the client has not acknowledged.
#[derive(Debug)]
pub(super) struct InFlight {
    /// Its Log and seq; a retained message has none.
    pub(super) at: Option<(LogId, u64)>,
    /// The delivery, to send again. `None` after a restart, until it was read.
    pub(super) delivery: Option<Delivery>,
    pub(super) qos: u8,
    /// The client holds it (PUBREC); PUBREL is owed.
    pub(super) released: bool,
    /// Order of first sending.
    pub(super) order: u64,
}

impl Client {
    pub(super) fn new(ix: ClientIx, id: Arc<str>, front: Front) -> Self {
        Self {
            mark: mark_of(ix, &id),
            id,
            front,
            session: None,
            expiry_s: 0,
            receive_max: u16::MAX,
            queued: 0,
            subscriptions: BTreeMap::new(),
            cursors: BTreeMap::new(),
            inflight: BTreeMap::new(),
            inflight_bytes: 0,
            next_packet_id: 1,
            next_order: 0,
            received: BTreeSet::new(),
            will: None,
            lost_at_us: 0,
            expires_at: Duration::MAX,
            expiry_armed: false,
            visits: 0,
            closing: false,
        }
    }

    /// Its state is kept on disk.
    pub(super) fn is_durable(&self) -> bool {
        self.expiry_s > 0 && !self.id.is_empty()
    }

    /// It holds cursors: it subscribed to something at QoS 1 or 2.
    pub(super) fn wants_logs(&self) -> bool {
        self.front == Front::Mqtt && self.subscriptions.values().any(|held| held.qos > 0)
    }

    /// The filters for which it reads Logs: a store may leave out what matches none of them. `None` if that would
    /// leave out nothing, or costs more than it spares.
    pub(super) fn wanted_of_logs(&self) -> Option<Arc<[Filter]>> {
        let filters = || self.subscriptions.values().filter(|held| held.qos > 0).map(|held| &held.filter);
        let few = filters().count() <= WANTED_MAX && filters().all(|filter| filter.as_str() != "#");
        few.then(|| filters().cloned().collect())
    }

    /// It may get another unacknowledged delivery of this size.
    pub(super) fn has_window(&self, log: LogId, bytes: usize) -> bool {
        let few = self.inflight.len() < usize::from(self.receive_max);
        let small = self.inflight.is_empty() || self.inflight_bytes + bytes <= limits::CLIENT_QUEUE_BYTES;
        // What is in flight may all be acknowledged before the oldest. With nothing in flight the next delivery is
        // the oldest itself, which lets go of what was acknowledged behind it: after a restart at the bound
        // there is no other way on.
        let apart = self.cursors.get(&log).map_or(0, |at| at.acked.len()) + self.inflight.len();
        let sparse = self.inflight.is_empty() || apart < limits::CURSOR_ACKED_MAX;
        self.session.is_some() && !self.closing && few && small && sparse
    }

    /// Registers an unacknowledged delivery and gives it a packet id.
    pub(super) fn hold(&mut self, at: Option<(LogId, u64)>, mut delivery: Delivery) -> Delivery {
        // receive_max < 65 535 ids in use: there is a free one.
        while self.inflight.contains_key(&self.next_packet_id) || self.next_packet_id == 0 {
            self.next_packet_id = self.next_packet_id.wrapping_add(1);
        }
        delivery.packet_id = self.next_packet_id;
        self.next_packet_id = self.next_packet_id.wrapping_add(1);
        let mut held = delivery.clone();
        if self.inflight.len() >= limits::INFLIGHT_SHARED && held.frame.len() < limits::PARK_COPY_BYTES {
            // A client that acknowledges nothing must not keep a read buffer for each small frame.
            held.frame = Bytes::copy_from_slice(&held.frame);
        }
        self.hold_as(held.packet_id, at, Some(held), delivery.qos, false);
        delivery
    }

    /// Registers a delivery that has a packet id already.
    pub(super) fn hold_as(
        &mut self,
        packet_id: u16,
        at: Option<(LogId, u64)>,
        delivery: Option<Delivery>,
        qos: u8,
        released: bool,
    ) {
        self.inflight_bytes += delivery.as_ref().map_or(0, |delivery| delivery.frame.len());
        let order = self.next_order;
        self.next_order += 1;
        self.inflight.insert(packet_id, InFlight { at, delivery, qos, released, order });
    }

    /// The client is done with a delivery.
    pub(super) fn release(&mut self, packet_id: u16) -> Option<InFlight> {
        let done = self.inflight.remove(&packet_id)?;
        self.inflight_bytes -= done.delivery.as_ref().map_or(0, |delivery| delivery.frame.len());
        if let Some((log, seq)) = done.at
            && let Some(cursor) = self.cursors.get_mut(&log)
        {
            cursor.acked.insert(seq);
            cursor.dirty = true;
        }
        Some(done)
    }

    /// Everything up to and including this seq is acknowledged; forgets single acknowledgements below.
    pub(super) fn low_of(&mut self, log: LogId, durable_next: u64) -> u64 {
        let oldest = self.inflight.values().filter_map(|held| match held.at {
            Some((at, seq)) if at == log => Some(seq),
            _ => None,
        });
        let oldest = oldest.min();
        let Some(cursor) = self.cursors.get_mut(&log) else { return durable_next - 1 };
        let next = cursor.next.unwrap_or(durable_next);
        let low = oldest.unwrap_or(next).min(next) - 1;
        cursor.acked = cursor.acked.split_off(&(low + 1));
        low
    }

    /// As [`Self::low_of`], for whoever only asks; `None` if this client does not read the Log.
    pub(super) fn lowest(&self, log: LogId, durable_next: u64) -> Option<u64> {
        let next = self.cursors.get(&log)?.next.unwrap_or(durable_next);
        let held = self.inflight.values().filter_map(|held| held.at.filter(|(at, _)| *at == log));
        let oldest = held.map(|(_, seq)| seq).min();
        Some(oldest.unwrap_or(next).min(next) - 1)
    }

    /// Writes the cursor of a durable session.
    pub(super) fn write_cursor(&mut self, ledger: &mut Ledger, log: LogId, epoch: u64, durable_next: u64) {
        let low = self.low_of(log, durable_next);
        let Some(cursor) = self.cursors.get_mut(&log) else { return };
        cursor.dirty = false;
        let value = proto::Cursor { epoch, low, acked: cursor.acked.iter().copied().collect() };
        ledger.write_local(Kind::CURSOR, cursor_key(&self.id, log), Some(codec::encode(&value)));
    }

    /// Writes the session itself.
    pub(super) fn write_session(&self, ledger: &mut Ledger) {
        let will = self.will.as_ref().map(|will| proto::Will {
            frame: will.message.frame.clone(),
            qos: will.message.qos.into(),
            retain: will.message.retain,
            delay_s: u32::try_from(will.delay.as_secs()).unwrap_or(u32::MAX),
        });
        let value = proto::ClientSession {
            client_id: self.id.to_string(),
            expiry_s: self.expiry_s,
            subscriptions: self.subscriptions.values().map(stored).collect(),
            lost_at_us: self.lost_at_us,
            will,
        };
        ledger.write_local(
            Kind::SESSION,
            Bytes::copy_from_slice(self.id.as_bytes()),
            Some(codec::encode(&value)),
        );
    }

    /// Deletes everything that was written of this session.
    pub(super) fn erase(&self, ledger: &mut Ledger) {
        for log in self.cursors.keys() {
            ledger.write_local(Kind::CURSOR, cursor_key(&self.id, *log), None);
        }
        for (packet_id, held) in &self.inflight {
            if held.qos == 2 {
                ledger.write_local(Kind::PACKET_ID, outbound_key(&self.id, *packet_id), None);
            }
        }
        for packet_id in &self.received {
            ledger.write_local(Kind::PACKET_ID, inbound_key(&self.id, *packet_id), None);
        }
        ledger.write_local(Kind::SESSION, Bytes::copy_from_slice(self.id.as_bytes()), None);
    }
}

fn mark_of(ix: ClientIx, id: &str) -> u64 {
    if id.is_empty() {
        return u64::from(ix.0) + 1;
    }
    let digest: [u8; 32] = Sha256::digest(id.as_bytes()).into();
    u64::from_le_bytes(*digest.first_chunk().expect("32 bytes hold 8"))
}

fn stored(subscription: &Subscription) -> proto::ClientSubscription {
    let no_local = u32::from(subscription.no_local);
    let as_published = u32::from(subscription.retain_as_published) << 1;
    proto::ClientSubscription {
        filter: subscription.filter.as_str().to_owned(),
        qos: subscription.qos.into(),
        options: no_local | as_published,
        identifier: subscription.identifier,
    }
}

/// Keys of facts: the client id, a zero (which no client id contains), a tag, a number.
fn key(id: &str, tag: u8, number: &[u8]) -> Bytes {
    let mut key = Vec::with_capacity(id.len() + 2 + number.len());
    key.extend_from_slice(id.as_bytes());
    key.extend_from_slice(&[0, tag]);
    key.extend_from_slice(number);
    key.into()
}

pub(super) fn cursor_key(id: &str, log: LogId) -> Bytes {
    key(id, b'c', &log.to_be_bytes())
}

pub(super) fn outbound_key(id: &str, packet_id: u16) -> Bytes {
    key(id, b'o', &packet_id.to_be_bytes())
}

pub(super) fn inbound_key(id: &str, packet_id: u16) -> Bytes {
    key(id, b'i', &packet_id.to_be_bytes())
}

/// Takes a key apart again.
pub(super) fn parse_key(key: &[u8]) -> Option<(&str, u8, &[u8])> {
    let zero = key.iter().position(|byte| *byte == 0)?;
    let id = std::str::from_utf8(&key[..zero]).ok()?;
    Some((id, *key.get(zero + 1)?, key.get(zero + 2..)?))
}
