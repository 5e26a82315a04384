//! The life of a client session: open, subscribe, close, expire.

use std::{sync::Arc, time::Duration};

use codec::{FrameView, Kind, frame::FrameParts, proto};

use super::{
    Core, Party, Timer,
    client::{Client, ClientIx, Cursor, inbound_key, outbound_key},
    event::{
        ClientAck, CloseReason, Front, OriginFilter, Output, Publish, Reply, RetainedOnSubscribe, SessionId,
        SessionOpen, Subscription, Unsubscribe,
    },
    ledger::Effect,
    log::{Log, LogId},
    trie,
};
use crate::limits;

/// How long a cursor may have moved before it is written: what a crash may deliver again at QoS 1.
const WRITE_CURSORS: Duration = Duration::from_secs(1);
/// When the next part of very many is written.
const WRITE_MORE: Duration = Duration::from_millis(20);
/// Reason code of MQTT 5 for a subscription too many; MQTT 3.1.1 knows only "failure".
const QUOTA_EXCEEDED: u8 = 0x97;

impl Core {
    pub(super) fn on_session_opened(&mut self, open: SessionOpen) {
        if self.draining.is_some() {
            let output = Output::Close(CloseReason::Shutdown);
            self.out.push(super::Action::Output { session: open.session, output });
            return;
        }
        let (ix, present) = self.find_or_add_client(&open);
        let client = self.clients.get_mut(&ix).expect("found or added");
        if open.expiry_s == 0 && client.is_durable() {
            // What was kept on disk for it ends with this connection.
            client.erase(&mut self.ledger);
        }
        client.session = Some(open.session);
        client.visits += 1;
        client.expiry_s = open.expiry_s;
        client.receive_max = open.receive_max.max(1);
        client.will = open.will;
        client.lost_at_us = 0;
        client.queued = 0;
        client.closing = false;
        if client.is_durable() {
            client.write_session(&mut self.ledger);
        }
        self.sessions.insert(open.session, Party::Client(ix));
        self.output(open.session, Output::Reply(Reply::Opened { session_present: present }));
        if present {
            self.redeliver(ix);
            self.wake_client(ix);
        }
    }

    /// The client of this id, taken over from its older connection, or a new one; whether it has state.
    fn find_or_add_client(&mut self, open: &SessionOpen) -> (ClientIx, bool) {
        if let Some(ix) = self.client_ids.get(&open.client_id).copied().filter(|_| !open.client_id.is_empty())
        {
            if let Some(older) = self.clients[&ix].session {
                self.output(older, Output::Close(CloseReason::TakenOver));
                self.detach(older, ix, false);
            }
            // A transient session is gone by now.
            if self.clients.contains_key(&ix) {
                if !open.clean_start {
                    return (ix, true);
                }
                // The session ends, and with it the delay of its will.
                let visits = self.clients[&ix].visits;
                self.on_will_due(ix, visits);
                self.end_client(ix);
            }
        }
        let ix = ClientIx(self.next_client);
        self.next_client += 1;
        self.clients.insert(ix, Client::new(ix, Arc::clone(&open.client_id), open.front));
        if !open.client_id.is_empty() {
            self.client_ids.insert(Arc::clone(&open.client_id), ix);
        }
        (ix, false)
    }

    pub(super) fn on_expiry_changed(&mut self, session: SessionId, expiry_s: u32) {
        let Some(Party::Client(ix)) = self.sessions.get(&session) else { return };
        let client = self.clients.get_mut(ix).expect("a session's client exists");
        if client.is_durable() && expiry_s == 0 {
            client.erase(&mut self.ledger);
        }
        client.expiry_s = expiry_s;
    }

    pub(super) fn on_session_closed(&mut self, session: SessionId, clean: bool) {
        if let Some(Party::Client(ix)) = self.sessions.get(&session) {
            let ix = *ix;
            self.detach(session, ix, clean);
        }
    }

    /// The connection is gone. The will is published, and a session without expiry ends.
    fn detach(&mut self, session: SessionId, ix: ClientIx, clean: bool) {
        self.sessions.remove(&session);
        self.end_watches(session);
        let now = self.now;
        let logs: Vec<LogId> = self.clients[&ix].cursors.keys().copied().collect();
        for log in logs {
            self.leave_head(ix, log);
        }
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        client.session = None;
        client.queued = 0;
        client.lost_at_us = now.wall_us;
        let will = if clean { client.will.take().filter(|_| false) } else { client.will.clone() };
        let (visits, expiry_s, durable) = (client.visits, client.expiry_s, client.is_durable());
        if let Some(will) = will {
            let delay = will.delay.min(Duration::from_secs(expiry_s.into()));
            if delay.is_zero() {
                self.on_will_due(ix, visits);
            } else {
                self.after(delay, Timer::Will(ix, visits));
            }
        }
        if durable {
            self.write_cursors_of(ix);
            self.clients[&ix].write_session(&mut self.ledger);
            self.arm_expiry(ix, Duration::from_secs(expiry_s.into()));
        } else {
            self.end_client(ix);
        }
    }

    pub(super) fn on_will_due(&mut self, ix: ClientIx, visits: u64) {
        let Some(client) = self.clients.get_mut(&ix) else { return };
        if client.visits != visits || client.session.is_some() {
            return;
        }
        let Some(will) = client.will.take() else { return };
        if client.is_durable() {
            client.write_session(&mut self.ledger);
        }
        let message = self.dated_now(will.message);
        if let Err(reason) = self.publish(None, message) {
            tracing::warn!(client = %self.clients[&ix].id, %reason, "will not published");
        }
    }

    /// A will was encoded when its client connected; it is published, and begins to age, now.
    fn dated_now(&self, message: Publish) -> Publish {
        let Ok(view) = FrameView::parse(&message.frame) else { return message };
        let headers: Vec<(&str, &[u8])> = view.headers().collect();
        let frame = FrameParts {
            topic: view.topic(),
            time_us: self.now.wall_us,
            time_trusted: self.now.trusted,
            trace: view.trace(),
            ttl_s: view.ttl_s(),
            headers: &headers,
            payload: view.payload(),
        };
        Publish { frame: frame.encode(), ..message }
    }

    /// The client is away: its session ends after this long, unless that is for ever.
    pub(super) fn arm_expiry(&mut self, ix: ClientIx, left: Duration) {
        let now = self.now.mono;
        let client = self.clients.get_mut(&ix).expect("the client exists");
        if client.expiry_s == u32::MAX {
            return;
        }
        client.expires_at = now + left;
        if !std::mem::replace(&mut client.expiry_armed, true) {
            self.after(left, Timer::Expire(ix));
        }
    }

    pub(super) fn on_expiry_due(&mut self, ix: ClientIx) {
        let now = self.now.mono;
        let Some(client) = self.clients.get_mut(&ix) else { return };
        client.expiry_armed = false;
        if client.session.is_some() {
            return;
        }
        if client.expires_at > now {
            let left = client.expires_at - now;
            return self.arm_expiry(ix, left);
        }
        let visits = client.visits;
        self.on_will_due(ix, visits);
        self.end_client(ix);
    }

    /// Forgets a session, in memory and on disk.
    fn end_client(&mut self, ix: ClientIx) {
        let Some(client) = self.clients.remove(&ix) else { return };
        if client.is_durable() {
            client.erase(&mut self.ledger);
        }
        for subscription in client.subscriptions.values() {
            let (origin, filter) = (&subscription.origin, &subscription.filter);
            self.trie.remove(&self.own, origin, filter, ix, subscription.id);
        }
        for log in client.cursors.keys() {
            if let Some(log) = self.logs.get_mut(log) {
                log.consumers.remove(&ix);
            }
        }
        self.stats.subscriptions -= client.subscriptions.len() as u64;
        if self.client_ids.get(&client.id) == Some(&ix) {
            self.client_ids.remove(&client.id);
        }
    }

    pub(super) fn on_subscribed(&mut self, session: SessionId, token: u32, subscriptions: Vec<Subscription>) {
        let Some(Party::Client(ix)) = self.sessions.get(&session) else { return };
        let ix = *ix;
        if self.clients[&ix].is_durable() {
            // In one group with what is new: after a crash a new filter must not find what was before it.
            self.write_cursors_of(ix);
        }
        let mut granted = Vec::with_capacity(subscriptions.len());
        let mut retained = Vec::new();
        for mut subscription in subscriptions {
            granted.push(subscription.qos);
            let is_new = self.replace_equal_filter(ix, &mut subscription);
            if is_new && self.clients[&ix].subscriptions.len() >= limits::CLIENT_SUBSCRIPTIONS_MAX {
                *granted.last_mut().expect("just pushed") = QUOTA_EXCEEDED;
                continue;
            }
            let send = match subscription.retained {
                RetainedOnSubscribe::Send => true,
                RetainedOnSubscribe::SendIfNew => is_new,
                RetainedOnSubscribe::DoNotSend => false,
            };
            if send {
                retained.push(subscription.clone());
            }
            self.add_subscription(ix, subscription);
        }
        let client = &self.clients[&ix];
        let reply = Reply::Subscribed { token, granted };
        if client.is_durable() {
            client.write_session(&mut self.ledger);
            self.ledger.after(Effect::Reply(session, reply));
        } else if client.front == Front::Mqtt || token != 0 {
            self.output(session, Output::Reply(reply));
        }
        for subscription in retained {
            self.send_retained(session, ix, &subscription);
        }
    }

    /// An MQTT subscription replaces the one with the same filter. True: there was none.
    fn replace_equal_filter(&mut self, ix: ClientIx, subscription: &mut Subscription) -> bool {
        let client = &self.clients[&ix];
        if client.front != Front::Mqtt {
            return true;
        }
        let same = client.subscriptions.values().find(|held| held.filter == subscription.filter);
        match same.map(|held| held.id) {
            Some(id) => {
                subscription.id = id;
                false
            }
            None => {
                subscription.id = client.subscriptions.keys().next_back().map_or(1, |last| last + 1);
                true
            }
        }
    }

    fn add_subscription(&mut self, ix: ClientIx, subscription: Subscription) {
        let wants_cursors = self.clients[&ix].front == Front::Mqtt && subscription.qos > 0;
        self.index_subscription(ix, subscription);
        if wants_cursors {
            self.add_cursors(ix);
        }
    }

    /// Gives a client a cursor at the head of every Log in which it has none.
    pub(super) fn add_cursors(&mut self, ix: ClientIx) {
        let logs: Vec<LogId> = self.readable_logs().collect();
        for log in logs {
            self.add_cursor(ix, log);
        }
    }

    /// Makes routing know a subscription.
    pub(super) fn index_subscription(&mut self, ix: ClientIx, subscription: Subscription) {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        let mqtt = client.front == Front::Mqtt;
        let entry = trie::Entry {
            client: ix,
            sub: subscription.id,
            qos: subscription.qos,
            group: subscription.group.clone(),
            no_local: subscription.no_local,
            retain_as_published: subscription.retain_as_published,
            wildcard_matches_dollar: subscription.wildcard_matches_dollar,
            identifier: subscription.identifier,
            merge: mqtt,
        };
        if let Some(older) = client.subscriptions.insert(subscription.id, subscription.clone()) {
            self.trie.remove(&self.own, &older.origin, &older.filter, ix, older.id);
        } else {
            self.stats.subscriptions += 1;
        }
        self.trie.insert(&self.own, &subscription.origin, &subscription.filter, entry);
    }

    /// The Logs that clients of this broker can hold cursors in: its own, and on a node what comes down.
    fn readable_logs(&self) -> impl Iterator<Item = LogId> + '_ {
        self.logs.values().filter(|log| !log.retired && self.is_readable(log)).map(|log| log.id)
    }

    /// Whether clients here read a Log: this broker's own, and what came down for this node.
    pub(super) fn is_readable(&self, log: &Log) -> bool {
        let intents = super::intent::is_log(&log.stream);
        (log.origin == self.own && !intents) || log.down_to() == Some(&*self.config.name)
    }

    /// Gives a client a cursor at the head of a Log, unless it has one.
    fn add_cursor(&mut self, ix: ClientIx, log: LogId) {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        if client.cursors.contains_key(&log) {
            return;
        }
        client.cursors.insert(log, Cursor::default());
        let held = self.logs.get_mut(&log).expect("a Log's id is valid");
        if client.session.is_some() {
            held.consumers.insert(ix);
        } else {
            client.cursors.get_mut(&log).expect("just inserted").next = Some(held.durable_next);
        }
        if client.is_durable() {
            client.write_cursor(&mut self.ledger, log, held.epoch(), held.durable_next);
        }
    }

    /// A Log is new: everybody who may want what it gets holds a cursor from its beginning.
    pub(super) fn join_new_log(&mut self, log: LogId) {
        if !self.is_readable(&self.logs[&log]) {
            return;
        }
        let interested: Vec<ClientIx> =
            self.clients.iter().filter(|(_, client)| client.wants_logs()).map(|(ix, _)| *ix).collect();
        for ix in interested {
            self.add_cursor(ix, log);
        }
    }

    pub(super) fn on_unsubscribed(&mut self, session: SessionId, token: u32, which: &[Unsubscribe]) {
        let Some(Party::Client(ix)) = self.sessions.get(&session) else { return };
        let ix = *ix;
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        let mut existed = Vec::with_capacity(which.len());
        for one in which {
            let id = match one {
                Unsubscribe::Id(id) => Some(*id),
                Unsubscribe::Filter(filter) => {
                    client.subscriptions.values().find(|held| held.filter == *filter).map(|held| held.id)
                }
            };
            let gone = id.and_then(|id| client.subscriptions.remove(&id));
            if let Some(gone) = &gone {
                self.trie.remove(&self.own, &gone.origin, &gone.filter, ix, gone.id);
                self.stats.subscriptions -= 1;
            }
            existed.push(gone.is_some());
        }
        let reply = Reply::Unsubscribed { token, existed };
        if client.is_durable() {
            client.write_session(&mut self.ledger);
            self.ledger.after(Effect::Reply(session, reply));
        } else if client.front == Front::Mqtt || token != 0 {
            self.output(session, Output::Reply(reply));
        }
    }

    pub(super) fn on_acked(&mut self, session: SessionId, acks: &[ClientAck]) {
        let Some(Party::Client(ix)) = self.sessions.get(&session) else { return };
        let ix = *ix;
        for ack in acks {
            match *ack {
                ClientAck::Ack(id) => self.release(ix, id, 1),
                ClientAck::Comp(id) => self.release(ix, id, 2),
                ClientAck::Rec(id) => self.on_received(session, ix, id),
                ClientAck::Rel(id) => self.on_released(session, ix, id),
            }
        }
        self.forget_acked(ix);
        self.wake_client(ix);
        self.cursors_moved();
    }

    /// Forgets single acknowledgements below what is in flight, before they fill the cursor's bound: a session
    /// that is not durable writes no cursor, and a busy one acknowledges more in a second than the bound.
    fn forget_acked(&mut self, ix: ClientIx) {
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        let many: Vec<LogId> = client
            .cursors
            .iter()
            .filter(|(_, cursor)| cursor.acked.len() >= limits::CURSOR_ACKED_MAX / 2)
            .map(|(log, _)| *log)
            .collect();
        for log in many {
            let durable_next = self.logs.get(&log).map_or(1, |log| log.durable_next);
            client.low_of(log, durable_next);
        }
    }

    /// PUBACK or PUBCOMP. A wrong or repeated id changes nothing.
    fn release(&mut self, ix: ClientIx, packet_id: u16, qos: u8) {
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        if client.inflight.get(&packet_id).is_none_or(|held| held.qos != qos) {
            return;
        }
        let done = client.release(packet_id).expect("looked at it");
        if qos == 2 && client.is_durable() {
            // The packet id and the cursor go together, or a crash would deliver it once more.
            self.ledger.write_local(Kind::PACKET_ID, outbound_key(&client.id, packet_id), None);
            if let Some((log, _)) = done.at {
                let (epoch, next) = self.logs.get(&log).map_or((0, 1), |log| (log.epoch(), log.durable_next));
                client.write_cursor(&mut self.ledger, log, epoch, next);
            }
        }
    }

    /// PUBREC: the client holds a QoS 2 delivery.
    pub(super) fn on_received(&mut self, session: SessionId, ix: ClientIx, packet_id: u16) {
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        let durable = client.is_durable();
        let id = Arc::clone(&client.id);
        let release = Reply::PubRel(packet_id);
        let Some(held) = client.inflight.get_mut(&packet_id).filter(|held| held.qos == 2) else {
            // Unknown: the client gets the PUBREL that it needs to forget it.
            return self.output(session, Output::Reply(release));
        };
        held.released = true;
        let at = held.at;
        if durable {
            self.write_outbound(&id, packet_id, at, true);
            self.ledger.after(Effect::Reply(session, release));
        } else {
            self.output(session, Output::Reply(release));
        }
    }

    pub(super) fn write_outbound(
        &mut self,
        id: &str,
        packet_id: u16,
        at: Option<(LogId, u64)>,
        released: bool,
    ) {
        let mut value = proto::Outbound { released, ..proto::Outbound::default() };
        if let Some((log, seq)) = at
            && let Some(log) = self.logs.get(&log)
        {
            value.origin = log.origin.to_string();
            value.stream = log.stream.to_string();
            value.epoch = log.epoch_at(seq);
            value.seq = seq;
        }
        self.ledger.write_local(Kind::PACKET_ID, outbound_key(id, packet_id), Some(codec::encode(&value)));
    }

    /// PUBREL: the client releases a QoS 2 publish of its own.
    fn on_released(&mut self, session: SessionId, ix: ClientIx, packet_id: u16) {
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        let known = client.received.remove(&packet_id);
        let reply = Reply::PubComp(packet_id);
        if known && client.is_durable() {
            self.ledger.write_local(Kind::PACKET_ID, inbound_key(&client.id, packet_id), None);
            self.ledger.after(Effect::Reply(session, reply));
        } else {
            self.output(session, Output::Reply(reply));
        }
    }

    /// Cursors moved: they are written within a second.
    pub(super) fn cursors_moved(&mut self) {
        if !self.cursors_due {
            self.cursors_due = true;
            self.after(WRITE_CURSORS, Timer::WriteCursors);
        }
    }

    pub(super) fn write_cursors(&mut self) {
        self.cursors_due = false;
        let dirty: Vec<ClientIx> = self
            .clients
            .iter()
            .filter(|(_, client)| client.is_durable() && client.cursors.values().any(|at| at.dirty))
            .map(|(ix, _)| *ix)
            .collect();
        for ix in dirty {
            self.write_cursors_of(ix);
        }
        self.write_marks();
        for id in std::mem::take(&mut self.acknowledgements_moved) {
            self.note_acknowledged(id);
        }
        self.budgets.spend.write(&mut self.ledger);
        if !self.marks_moved.is_empty() {
            // So many that one group would hold up everything else.
            self.cursors_due = true;
            self.after(WRITE_MORE, Timer::WriteCursors);
        }
    }

    pub(super) fn write_cursors_of(&mut self, ix: ClientIx) {
        let client = self.clients.get_mut(&ix).expect("the client exists");
        let logs: Vec<LogId> = client.cursors.keys().copied().collect();
        for id in &logs {
            let Some(log) = self.logs.get(id) else { continue };
            client.write_cursor(&mut self.ledger, *id, log.epoch(), log.durable_next);
        }
        self.acknowledgements_moved.extend(logs);
    }

    /// Restores a subscription's defaults that are not stored.
    pub(super) fn stored_subscription(id: u32, stored: &proto::ClientSubscription) -> Option<Subscription> {
        Some(Subscription {
            id,
            origin: OriginFilter::Own,
            filter: codec::Filter::parse(&stored.filter).ok()?,
            qos: u8::try_from(stored.qos).ok()?.min(2),
            group: None,
            no_local: stored.options & 1 != 0,
            retain_as_published: stored.options & 2 != 0,
            retained: RetainedOnSubscribe::DoNotSend,
            wildcard_matches_dollar: false,
            identifier: stored.identifier,
        })
    }
}
