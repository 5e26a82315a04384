//! Deliveries to clients out of Logs: at the head, behind it, again after a reconnect.

use std::sync::Arc;

use codec::{Filter, Flags, FrameView, Kind, Record};

use super::{
    Core, DropReason, Reading,
    client::{Client, ClientIx},
    event::{Delivery, Output, Position, Reply, SessionId, Subscription},
    ledger::Effect,
    log::{self, LogId},
    publish::Message,
    trie,
};
use crate::limits;

/// A read for a cursor.
#[derive(Debug)]
pub(super) struct CursorRead {
    client: ClientIx,
    log: LogId,
    /// Where the cursor stood.
    from: u64,
    /// What the client wanted then: the store may have left out all else.
    pub(super) wanted: Option<Arc<[Filter]>>,
}

/// Records looked at for one client in one `apply`.
const PUMP_RECORDS: usize = 256;
/// Bytes of one read for a client that is behind.
const READ_BYTES: usize = 32 << 10;

impl Core {
    /// Something may have become possible for this client: it acknowledged, read, or came back.
    pub(super) fn wake_client(&mut self, ix: ClientIx) {
        let Some(client) = self.clients.get(&ix) else { return };
        for (log, cursor) in &client.cursors {
            if cursor.next.is_some() && !cursor.reading {
                self.pump_clients.insert((ix, *log));
            }
        }
    }

    /// A durable record that a client's subscription matches: delivered now if the client is at the head
    /// and has room, else its cursor falls behind here.
    pub(super) fn deliver_at_head(
        &mut self,
        target: &trie::Target,
        log: LogId,
        seq: u64,
        qos: u8,
        message: &Message<'_>,
    ) {
        let Some(client) = self.clients.get_mut(&target.client) else { return };
        let Some(cursor) = client.cursors.get(&log) else { return };
        if cursor.next.is_some() {
            return; // it is behind, and will come to this record
        }
        cursor_dirty(client, log);
        let client = &self.clients[&target.client];
        let room = client.queued < limits::CLIENT_QUEUE_BYTES;
        if !room || !client.has_window(log, message.frame.len()) {
            let next = self.logs[&log].durable_next.min(seq);
            self.fall_behind(target.client, log, next);
            return;
        }
        let delivery = Delivery {
            frame: message.frame.clone(),
            origin: Arc::clone(message.origin),
            sub: target.sub,
            identifiers: target.identifiers.clone(),
            qos,
            packet_id: 0,
            dup: false,
            retain: message.retain && target.retain_as_published,
            position: message.position.cloned(),
            reply: None,
            no_responders: false,
        };
        self.deliver(target.client, Some((log, seq)), delivery);
    }

    fn fall_behind(&mut self, ix: ClientIx, log: LogId, next: u64) {
        if let Some(held) = self.logs.get_mut(&log) {
            held.consumers.remove(&ix);
        }
        let client = self.clients.get_mut(&ix).expect("the client exists");
        if let Some(cursor) = client.cursors.get_mut(&log) {
            cursor.next = Some(next);
        }
    }

    /// The client is away: its cursor keeps a position of its own.
    pub(super) fn leave_head(&mut self, ix: ClientIx, log: LogId) {
        let at_head = self.clients[&ix].cursors.get(&log).is_some_and(|cursor| cursor.next.is_none());
        if at_head && let Some(held) = self.logs.get(&log) {
            let next = held.durable_next;
            self.fall_behind(ix, log, next);
        }
    }

    /// Sends a delivery and, from QoS 1 on, holds it until it is acknowledged. A QoS 2 delivery of a
    /// durable session is sent once its packet id is on disk.
    fn deliver(&mut self, ix: ClientIx, at: Option<(LogId, u64)>, delivery: Delivery) {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        let Some(session) = client.session else { return };
        self.stats.delivered += 1;
        if delivery.qos == 0 {
            return self.output(session, Output::Deliver(delivery));
        }
        let delivery = client.hold(at, delivery);
        if delivery.qos == 2 && client.is_durable() {
            let id = Arc::clone(&client.id);
            self.write_outbound(&id, delivery.packet_id, at, false);
            self.ledger.after(Effect::Output(session, Output::Deliver(delivery)));
        } else {
            self.output(session, Output::Deliver(delivery));
        }
    }

    /// Moves every cursor that may have something to deliver, within the turn's bound.
    pub(super) fn pump_deliveries(&mut self) {
        let due = std::mem::take(&mut self.pump_clients);
        for (ix, log) in due {
            self.pump_client(ix, log);
        }
    }

    fn pump_client(&mut self, ix: ClientIx, id: LogId) {
        for _ in 0..PUMP_RECORDS {
            let (Some(client), Some(log)) = (self.clients.get_mut(&ix), self.logs.get_mut(&id)) else {
                return;
            };
            let Some(cursor) = client.cursors.get_mut(&id) else { return };
            let (Some(next), false, true) = (cursor.next, cursor.reading, client.session.is_some()) else {
                return;
            };
            if next >= log.durable_next {
                if log.retired {
                    return;
                }
                cursor.next = None;
                log.consumers.insert(ix);
                return;
            }
            if next < log.first {
                cursor.next = Some(log.first);
                self.stats.gap("cursor_overtaken", log.first - next);
                continue;
            }
            let Some(record) = log.in_tail(next).cloned() else {
                if client.has_window(id, 0) && client.queued < limits::CLIENT_QUEUE_BYTES {
                    client.cursors.get_mut(&id).expect("looked at it").reading = true;
                    let wanted = client.wanted_of_logs();
                    let reading = CursorRead { client: ix, log: id, from: next, wanted };
                    self.read(id, next, READ_BYTES, Reading::Cursor(reading));
                }
                return;
            };
            if !self.offer(ix, id, &record) {
                return;
            }
        }
        self.pump_clients.insert((ix, id));
    }

    pub(super) fn on_cursor_read(&mut self, reading: CursorRead, records: &[Record], next: u64) {
        let CursorRead { client: ix, log: id, from, wanted } = reading;
        let Some(client) = self.clients.get_mut(&ix) else { return };
        let is_stale = wanted.is_some() && client.wanted_of_logs() != wanted;
        let Some(cursor) = client.cursors.get_mut(&id) else { return };
        cursor.reading = false;
        if is_stale || cursor.next != Some(from) {
            // What was left out may be wanted by now: it is read again.
            self.pump_clients.insert((ix, id));
            return;
        }
        if records.is_empty() && next <= from {
            // The store has nothing from here on although the Log says so: say it, and go on.
            let durable_next = self.logs.get(&id).map_or(1, |log| log.durable_next);
            let next = cursor.next.replace(durable_next).unwrap_or(durable_next);
            self.stats.gap("unreadable", durable_next.saturating_sub(next));
        }
        // Without room nothing is pumped: an acknowledgement, a read or a reconnect wakes the client.
        if records.iter().all(|record| self.offer(ix, id, record)) {
            self.pass_over(ix, id, next);
            self.pump_clients.insert((ix, id));
        }
    }

    /// Moves a cursor over records that a read left out. Those that are not told to be durable stay in front of it.
    fn pass_over(&mut self, ix: ClientIx, id: LogId, next: u64) {
        let Some(durable_next) = self.logs.get(&id).map(|log| log.durable_next) else { return };
        let cursor = self.cursor_mut(ix, id);
        cursor.next = cursor.next.map(|at| at.max(next.min(durable_next)));
    }

    /// Offers one record to a cursor that is behind. False: no room, the cursor stays before it.
    fn offer(&mut self, ix: ClientIx, id: LogId, record: &Record) -> bool {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        let Some(cursor) = client.cursors.get_mut(&id) else { return false };
        let Some(next) = cursor.next else { return false };
        let seq = record.header.seq;
        // The store knows of a durable record before this core is told; the client gets it then, at the head.
        if seq < next || self.logs.get(&id).is_some_and(|log| seq >= log.durable_next) {
            return true;
        }
        let acked = cursor.acked.contains(&seq);
        if record.header.kind != Kind::LOG || acked {
            if record.header.kind == Kind::GAP {
                let (from, to) = log::range_of(record);
                self.stats.gap("read", (to + 1).saturating_sub(from.max(next)));
            }
            cursor.next = Some(seq + 1);
            return true;
        }
        let Ok(view) = FrameView::parse(&record.body) else {
            cursor.next = Some(seq + 1);
            return true;
        };
        let matching = best_match(client, view.topic(), record.header.aux);
        let in_flight = client.inflight.values().any(|held| held.at == Some((id, seq)));
        let Some((qos, template)) = matching.filter(|_| !in_flight) else {
            self.cursor_mut(ix, id).next = Some(seq + 1);
            return true;
        };
        let ttl = self.logs.get(&id).and_then(|log| log.policy.ttl).unwrap_or_default();
        if self.has_expired(&view, ttl) {
            self.stats.drop(DropReason::Expired);
            self.cursor_mut(ix, id).next = Some(seq + 1);
            return true;
        }
        let client = &self.clients[&ix];
        let room = client.queued < limits::CLIENT_QUEUE_BYTES;
        if !room || !client.has_window(id, record.body.len()) {
            return false;
        }
        let log = &self.logs[&id];
        let published = if record.header.flags.contains(Flags::QOS2) { 2 } else { 1 };
        let delivery = Delivery {
            frame: record.body.clone(),
            origin: Arc::clone(&self.own),
            qos: published.min(qos),
            retain: template.retain && record.header.flags.contains(Flags::RETAIN),
            position: Some(Position { stream: Arc::clone(&log.stream), epoch: record.header.epoch, seq }),
            ..template
        };
        let cursor = self.cursor_mut(ix, id);
        cursor.next = Some(seq + 1);
        cursor.dirty = true;
        self.deliver(ix, Some((id, seq)), delivery);
        true
    }

    fn cursor_mut(&mut self, ix: ClientIx, id: LogId) -> &mut super::client::Cursor {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        client.cursors.get_mut(&id).expect("the cursor exists")
    }

    /// Sends again what a returning client has not acknowledged, in the order of first sending.
    pub(super) fn redeliver(&mut self, ix: ClientIx) {
        let client = &self.clients[&ix];
        let session = client.session.expect("it has just connected");
        let mut again: Vec<(u64, u16)> = client.inflight.iter().map(|(id, held)| (held.order, *id)).collect();
        again.sort_unstable();
        for (_, packet_id) in again {
            let held = &self.clients[&ix].inflight[&packet_id];
            let at = held.at;
            if held.released {
                // That it was received may still be on its way to the disk: a crash would deliver it anew.
                self.ledger.after(Effect::Reply(session, Reply::PubRel(packet_id)));
            } else if let Some(delivery) = held.delivery.clone() {
                // As at its first sending: a packet id of QoS 2 is on disk before the client sees it.
                let output = Output::Deliver(Delivery { dup: true, ..delivery });
                if held.qos == 2 && self.clients[&ix].is_durable() {
                    self.ledger.after(Effect::Output(session, output));
                } else {
                    self.output(session, output);
                }
            } else if let Some((log, seq)) = at {
                self.read(log, seq, 1, Reading::Redelivery(ix, packet_id));
            } else {
                // A retained message that was under way before a restart: its Log keeps no copy.
                self.on_received(session, ix, packet_id);
            }
        }
    }

    /// A QoS 2 delivery that was under way before a restart was read again.
    pub(super) fn on_redelivery_read(&mut self, ix: ClientIx, packet_id: u16, records: &[Record]) {
        let Some(client) = self.clients.get_mut(&ix) else { return };
        let Some(session) = client.session else { return };
        let Some(held) = client.inflight.get_mut(&packet_id) else { return };
        let Some((log, seq)) = held.at else { return };
        if held.released {
            // The client had it, and has said so in the meantime: sent now it would be another message.
            return;
        }
        let found =
            records.first().filter(|record| record.header.seq == seq && record.header.kind == Kind::LOG);
        let (Some(record), Some(log)) = (found, self.logs.get(&log)) else {
            // Retention took it. The client may hold it already, and then takes the next message of this packet id
            // for the same one: it is told to let go of the id, whether it has it or not.
            self.on_received(session, ix, packet_id);
            self.stats.gap("cursor_overtaken", 1);
            return;
        };
        let delivery = Delivery {
            frame: record.body.clone(),
            origin: Arc::clone(&self.own),
            sub: 0,
            identifiers: None,
            qos: 2,
            packet_id,
            dup: true,
            retain: false,
            position: Some(Position { stream: Arc::clone(&log.stream), epoch: record.header.epoch, seq }),
            reply: None,
            no_responders: false,
        };
        client.inflight_bytes += delivery.frame.len();
        held.delivery = Some(delivery.clone());
        self.output(session, Output::Deliver(delivery));
    }

    /// The retained messages that a new subscription asks for.
    pub(super) fn send_retained(&mut self, session: SessionId, ix: ClientIx, subscription: &Subscription) {
        let name = (Arc::clone(&self.own), Arc::from("retained"));
        let Some(space) = self.space_names.get(&name) else { return };
        let dollar = subscription.wildcard_matches_dollar;
        let found: Vec<(Flags, bytes::Bytes)> = self.spaces[*space]
            .frames(|topic| subscription.filter.matches(topic, dollar))
            .map(|(flags, frame)| (flags, frame.clone()))
            .collect();
        for (flags, frame) in found {
            let Ok(view) = FrameView::parse(&frame) else { continue };
            if self.has_expired(&view, std::time::Duration::ZERO) {
                continue;
            }
            let published =
                if flags.contains(Flags::QOS2) { 2 } else { u8::from(flags.contains(Flags::QOS1)) };
            let mut delivery = template(subscription);
            delivery.qos = published.min(subscription.qos);
            delivery.retain = true;
            delivery.origin = Arc::clone(&self.own);
            delivery.frame = frame;
            let client = &self.clients[&ix];
            let room = client.queued + delivery.frame.len() <= limits::CLIENT_QUEUE_BYTES_HARD / 2;
            if !room || (delivery.qos > 0 && client.inflight.len() >= usize::from(client.receive_max)) {
                // No room to hold it for an acknowledgement: it goes at most once rather than not at all.
                delivery.qos = 0;
            }
            if !room {
                self.stats.drop(DropReason::ClientQueue);
                continue;
            }
            if delivery.qos == 0 {
                self.stats.delivered += 1;
                self.output(session, Output::Deliver(delivery));
            } else {
                self.deliver(ix, None, delivery);
            }
        }
    }
}

fn cursor_dirty(client: &mut Client, log: LogId) {
    if let Some(cursor) = client.cursors.get_mut(&log) {
        cursor.dirty = true;
    }
}

/// The highest QoS of the subscriptions that match, and a delivery with what they ask for.
fn best_match(client: &Client, topic: &str, publisher: u64) -> Option<(u8, Delivery)> {
    let mut best: Option<(u8, Delivery)> = None;
    let mut identifiers = Vec::new();
    let own = publisher == client.mark;
    for held in client.subscriptions.values() {
        if (own && held.no_local) || !held.filter.matches(topic, held.wildcard_matches_dollar) {
            continue;
        }
        if held.identifier != 0 {
            identifiers.push(held.identifier);
        }
        match &mut best {
            Some((qos, delivery)) => {
                *qos = (*qos).max(held.qos);
                delivery.retain |= held.retain_as_published;
            }
            None => best = Some((held.qos, template(held))),
        }
    }
    let (qos, mut delivery) = best?;
    delivery.identifiers = (!identifiers.is_empty()).then(|| identifiers.into());
    // A subscription of QoS 0 alone gets what is live, not what is logged.
    (qos > 0).then_some((qos, delivery))
}

/// What a delivery of this subscription looks like, without its message.
fn template(subscription: &Subscription) -> Delivery {
    Delivery {
        frame: bytes::Bytes::new(),
        origin: "".into(),
        sub: subscription.id,
        identifiers: (subscription.identifier != 0).then(|| Box::from([subscription.identifier])),
        qos: subscription.qos,
        packet_id: 0,
        dup: false,
        retain: subscription.retain_as_published,
        position: None,
        reply: None,
        no_responders: false,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        task::{Context, Poll, Waker},
        time::Duration,
    };

    use codec::frame::FrameParts;

    use super::*;
    use crate::{
        core::{
            Config,
            event::{
                Action, Event, Front, Now, OriginFilter, Publish, RetainedOnSubscribe, SessionOpen, Target,
            },
        },
        store::{Store, StoreEvent, mem::MemStore},
    };

    const SUBSCRIBER: SessionId = SessionId(1);
    const DEVICE: SessionId = SessionId(2);
    const NOW: Now = Now { mono: Duration::ZERO, wall_us: 1_800_000_000_000_000, trusted: true };

    fn open(session: SessionId, id: &str) -> Event {
        Event::SessionOpened(SessionOpen {
            session,
            front: Front::Mqtt,
            client_id: id.into(),
            clean_start: false,
            expiry_s: u32::MAX,
            receive_max: 20,
            will: None,
        })
    }

    fn publish(packet_id: u16) -> Event {
        let frame = FrameParts { topic: "t", ..FrameParts::default() }.encode();
        let target = Target::Own;
        let message = Publish { target, frame, qos: 2, packet_id, dup: false, retain: false, reply: None };
        Event::Published { session: DEVICE, messages: vec![message] }
    }

    fn subscribe() -> Event {
        subscribe_to("#")
    }

    fn subscribe_to(filter: &str) -> Event {
        let subscription = Subscription {
            id: 1,
            origin: OriginFilter::Own,
            filter: Filter::parse(filter).unwrap(),
            qos: 2,
            group: None,
            no_local: false,
            retain_as_published: false,
            retained: RetainedOnSubscribe::DoNotSend,
            wildcard_matches_dollar: false,
            identifier: 0,
        };
        Event::Subscribed { session: SUBSCRIBER, token: 1, subscriptions: vec![subscription] }
    }

    /// Applies, and gives the store its part; what is durable is not told.
    fn apply(core: &mut Core, store: &mut MemStore, event: Event) -> Vec<u64> {
        let (mut actions, mut delivered) = (Vec::new(), Vec::new());
        core.apply(NOW, event, &mut actions);
        for action in actions {
            match action {
                Action::Persist(group) => store.submit(group),
                Action::Read(request) => store.read(request),
                Action::Output { output: Output::Deliver(delivery), .. } => {
                    delivered.push(delivery.position.unwrap().seq);
                }
                _ => {}
            }
        }
        delivered
    }

    fn restored(store: &mut MemStore) -> Core {
        let mut actions = Vec::new();
        let core = Core::restore(Config::node("n", [1; 16], 1), store.recover(), NOW, &mut actions);
        for action in actions {
            if let Action::Persist(group) = action {
                store.submit(group);
            }
        }
        core
    }

    #[test]
    fn a_record_that_a_read_finds_before_its_durability_is_told_is_delivered_once() {
        let mut store = MemStore::new();
        let mut core = restored(&mut store);
        let run = |core: &mut Core, store: &mut MemStore, event| {
            apply(core, store, event);
            store.flush();
            while let Poll::Ready(event) = store.poll_event(&mut Context::from_waker(Waker::noop())) {
                if let StoreEvent::Persisted(lsn) = event {
                    apply(core, store, Event::Persisted(lsn));
                    store.flush();
                }
            }
        };
        run(&mut core, &mut store, open(SUBSCRIBER, "s"));
        run(&mut core, &mut store, subscribe());
        run(&mut core, &mut store, Event::SessionClosed { session: SUBSCRIBER, clean: true });
        run(&mut core, &mut store, open(DEVICE, "d"));
        run(&mut core, &mut store, publish(1));

        // A restart: the first message is in the store only, and the subscriber behind it.
        let (mut store, _) = store.crash();
        let mut core = restored(&mut store);
        apply(&mut core, &mut store, open(DEVICE, "d"));
        apply(&mut core, &mut store, publish(2));
        store.flush();
        let mut delivered = apply(&mut core, &mut store, open(SUBSCRIBER, "s"));
        let mut events = Vec::new();
        while let Poll::Ready(event) = store.poll_event(&mut Context::from_waker(Waker::noop())) {
            events.push(event);
        }
        // The read overtakes the news that what it read is durable.
        events.sort_by_key(|event| matches!(event, StoreEvent::Persisted(_)));
        while !events.is_empty() {
            let event = match events.remove(0) {
                StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                StoreEvent::Read { read, records, next } => Event::ReadDone { read, records, next },
                other => panic!("{other:?}"),
            };
            delivered.extend(apply(&mut core, &mut store, event));
            delivered.extend(apply(&mut core, &mut store, Event::TimerFired));
            store.flush();
            while let Poll::Ready(event) = store.poll_event(&mut Context::from_waker(Waker::noop())) {
                events.push(event);
            }
        }
        assert_eq!(delivered, [1, 2]);
    }

    #[test]
    fn a_filter_that_comes_while_a_read_leaves_out_its_records_misses_none_of_them() {
        let mut store = MemStore::new();
        let mut core = restored(&mut store);
        let run = |core: &mut Core, store: &mut MemStore, event| {
            let delivered = apply(core, store, event);
            store.flush();
            while let Poll::Ready(StoreEvent::Persisted(lsn)) =
                store.poll_event(&mut Context::from_waker(Waker::noop()))
            {
                apply(core, store, Event::Persisted(lsn));
                store.flush();
            }
            delivered
        };
        run(&mut core, &mut store, open(SUBSCRIBER, "s"));
        run(&mut core, &mut store, subscribe_to("other"));
        run(&mut core, &mut store, Event::SessionClosed { session: SUBSCRIBER, clean: true });
        run(&mut core, &mut store, open(DEVICE, "d"));
        run(&mut core, &mut store, publish(1));

        // A restart: the first message is in the store only, and the cursor goes there for it.
        let (mut store, _) = store.crash();
        let mut core = restored(&mut store);
        run(&mut core, &mut store, open(DEVICE, "d"));
        let (mut actions, mut reads) = (Vec::new(), Vec::new());
        core.apply(NOW, open(SUBSCRIBER, "s"), &mut actions);
        for action in actions {
            match action {
                Action::Persist(group) => store.submit(group),
                Action::Read(request) => reads.push(request),
                _ => {}
            }
        }
        assert_eq!(reads.len(), 1);
        run(&mut core, &mut store, subscribe());
        run(&mut core, &mut store, publish(2));
        // Now the store comes to the read, which was for the old filter.
        store.read(reads.remove(0));
        let mut delivered = Vec::new();
        while let Poll::Ready(event) = store.poll_event(&mut Context::from_waker(Waker::noop())) {
            let event = match event {
                StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                StoreEvent::Read { read, records, next } => Event::ReadDone { read, records, next },
                other => panic!("{other:?}"),
            };
            delivered.extend(apply(&mut core, &mut store, event));
            delivered.extend(apply(&mut core, &mut store, Event::TimerFired));
            store.flush();
        }
        assert!(delivered.contains(&2), "{delivered:?}");
    }
}
