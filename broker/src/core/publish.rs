//! A message enters: it is appended, routed, forwarded.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, FrameView, Kind, frame::header, proto};

use super::{
    Core, DropReason, Party,
    client::{ClientIx, inbound_key},
    event::{Delivery, Front, Origin, Output, Position, Publish, PublishRefusal, Reply, SessionId, Target},
    intent,
    ledger::Effect,
    log::LogId,
    request, trie,
};
use crate::limits;

/// A message on its way through routing.
#[derive(Debug)]
pub(super) struct Message<'a> {
    pub(super) origin: &'a Origin,
    pub(super) topic: &'a str,
    pub(super) frame: &'a Bytes,
    /// Retain flag as published.
    pub(super) retain: bool,
    /// Mark of the client that published it; 0 = none here.
    pub(super) publisher: u64,
    pub(super) position: Option<&'a Position>,
    pub(super) reply: Option<&'a Arc<str>>,
    /// Its Log and QoS, if it came out of one: subscribers of QoS >= 1 get it by their cursors.
    pub(super) logged: Option<(LogId, u64, u8)>,
}

impl Core {
    pub(super) fn on_published(&mut self, session: SessionId, messages: Vec<Publish>) {
        let publisher = match self.sessions.get(&session) {
            Some(Party::Client(ix)) => *ix,
            _ => return,
        };
        for message in messages {
            let (packet_id, qos) = (message.packet_id, message.qos);
            if let Err(reason) = self.publish(Some((session, publisher)), message) {
                self.output(session, Output::Reply(Reply::Refused { packet_id, qos, reason }));
            }
        }
    }

    /// Takes one message. `from` is the client that gets the acknowledgement.
    pub(super) fn publish(
        &mut self,
        from: Option<(SessionId, ClientIx)>,
        message: Publish,
    ) -> Result<(), PublishRefusal> {
        if message.frame.len() > limits::FRAME_MAX {
            return Err(PublishRefusal::BadFrame);
        }
        let view = FrameView::parse(&message.frame).map_err(|_malformed| PublishRefusal::BadFrame)?;
        let topic = view.topic();
        self.stats.published[usize::from(message.qos.min(2))] += 1;
        self.stats.published_bytes += message.frame.len() as u64;
        if let Target::Node(node) = &message.target {
            return self.publish_down(node, from, &message);
        }
        if topic.starts_with(request::HOP_PREFIX) {
            self.answer_hop(topic, &message.frame);
            return self.acknowledge_unlogged(from, &message);
        }
        let inbox = topic.starts_with("_INBOX/");
        if message.qos == 0 || inbox {
            if message.retain && !inbox {
                if self.takes_no_data() {
                    self.stats.drop(DropReason::StoreUnavailable);
                } else {
                    self.retain(topic, &message, view.payload().is_empty());
                }
            }
            self.publish_live(from, &message, topic);
            return self.acknowledge_unlogged(from, &message);
        }
        if message.qos == 2 && self.accepted_before(from, message.packet_id) {
            return Ok(());
        }
        if self.takes_no_data() {
            self.stats.drop(DropReason::StoreUnavailable);
            return Err(PublishRefusal::StoreUnavailable);
        }
        let (stream, class) = self.stream_of(topic);
        let own = Arc::clone(&self.own);
        let log = self.log_of(&own, &stream, class, None);
        if !self.admits(log, message.frame.len()) {
            self.stats.drop(DropReason::Quota);
            return Err(PublishRefusal::Quota);
        }
        if message.qos == 2 {
            self.accept_once(from, message.packet_id);
        }
        if message.retain {
            self.retain(topic, &message, view.payload().is_empty());
        }
        let mut flags = if message.qos == 2 { Flags::QOS2 } else { Flags::QOS1 };
        if message.retain {
            flags = flags.union(Flags::RETAIN);
        }
        if self.now.trusted {
            flags = flags.union(Flags::TIME_TRUSTED);
        }
        let publisher = self.mark_of(from);
        self.append(log, flags, publisher, message.frame.clone());
        if let Some((session, _)) = from.filter(|_| message.packet_id != 0) {
            let reply = if message.qos == 2 { Reply::PubRec } else { Reply::PubAck };
            self.ledger.after(Effect::Reply(session, reply(message.packet_id)));
        }
        Ok(())
    }

    /// A message that enters no Log is acknowledged at once: an inbox's, whatever QoS it was given.
    fn acknowledge_unlogged(
        &mut self,
        from: Option<(SessionId, ClientIx)>,
        message: &Publish,
    ) -> Result<(), PublishRefusal> {
        if let Some((session, _)) = from
            && message.packet_id != 0
        {
            let reply = if message.qos == 2 { Reply::PubRec } else { Reply::PubAck };
            self.output(session, Output::Reply(reply(message.packet_id)));
        }
        Ok(())
    }

    /// True if the message of this QoS 2 packet id was taken before; its PUBREC is sent again once that is
    /// durable, also while the store refuses what is new.
    fn accepted_before(&mut self, from: Option<(SessionId, ClientIx)>, packet_id: u16) -> bool {
        let Some((session, ix)) = from else { return false };
        let known = self.clients[&ix].received.contains(&packet_id);
        if known {
            self.ledger.after(Effect::Reply(session, Reply::PubRec(packet_id)));
        }
        known
    }

    /// Notes a QoS 2 packet id, in one group with its message.
    fn accept_once(&mut self, from: Option<(SessionId, ClientIx)>, packet_id: u16) {
        let Some((_, ix)) = from else { return };
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        client.received.insert(packet_id);
        if client.is_durable() {
            let key = inbound_key(&client.id, packet_id);
            let value = codec::encode(&proto::Outbound::default());
            self.ledger.write_local(Kind::PACKET_ID, key, Some(value));
        }
    }

    fn mark_of(&self, from: Option<(SessionId, ClientIx)>) -> u64 {
        from.and_then(|(_, ix)| self.clients.get(&ix)).map_or(0, |client| client.mark)
    }

    pub(super) fn append(&mut self, log: LogId, flags: Flags, publisher: u64, frame: Bytes) -> u64 {
        let held = self.logs.get_mut(&log).expect("a Log's id is valid");
        let before = held.appended;
        let seq = held.append(&mut self.ledger, flags, publisher, frame);
        held.forecast.appended.add(self.now.mono, held.appended - before);
        self.keep_policy(log);
        seq
    }

    fn stream_of(&self, topic: &str) -> (Arc<str>, Class) {
        let streams = &self.config.streams;
        let found =
            streams.iter().find(|stream| stream.filters.iter().any(|filter| filter.matches(topic, false)));
        let stream = found.unwrap_or(&self.config.default_stream);
        (Arc::clone(&stream.name), stream.class)
    }

    /// Sets or clears the retained message of a topic. A hub's own topics have none.
    pub(super) fn retain(&mut self, topic: &str, message: &Publish, empty: bool) {
        if self.config.is_hub() {
            return;
        }
        let flags = match message.qos {
            0 => Flags::default(),
            1 => Flags::QOS1,
            _ => Flags::QOS2,
        };
        let own = Arc::clone(&self.own);
        let space = self.space_of(&own, &"retained".into());
        // The frame is parked for long: it must not keep the buffer it came in.
        let frame = Bytes::copy_from_slice(&message.frame);
        self.spaces[space].write_frame(&mut self.ledger, topic, empty, flags, frame);
    }

    fn publish_live(&mut self, from: Option<(SessionId, ClientIx)>, message: &Publish, topic: &str) {
        let own = Arc::clone(&self.own);
        let reached = self.route(&Message {
            origin: &own,
            topic,
            frame: &message.frame,
            retain: message.retain,
            publisher: self.mark_of(from),
            position: None,
            reply: message.reply.as_ref(),
            logged: None,
        });
        if reached == 0
            && let Some(inbox) = &message.reply
        {
            self.no_responders(inbox, "503", "no responders");
        }
        if message.reply.is_none() {
            self.export_live(&own, topic, &message.frame);
        }
    }

    /// A durable Log record may be seen: it is routed, and its Log's exports go on.
    pub(super) fn on_log_durable(&mut self, id: LogId, seq: u64) {
        let log = self.logs.get_mut(&id).expect("a Log's id is valid");
        log.durable_next = log.durable_next.max(seq + 1);
        if self.config.shared {
            log.kept.free_below(seq); // it is kept elsewhere
        }
        let is_it = |record: &&codec::Record| record.header.kind == Kind::LOG && record.header.seq == seq;
        let Some(record) = log.in_tail(seq).filter(is_it).cloned() else {
            return self.pump_exports_of(id); // a gap, which is passed on in its place
        };
        let position = Position { stream: Arc::clone(&log.stream), epoch: record.header.epoch, seq };
        // On a node, what came down for it is a local topic. What is for another, and what a relay passes
        // on, is nobody's here.
        let down = log.down_to().is_some();
        let origin = if down { Arc::clone(&self.own) } else { Arc::clone(&log.origin) };
        let foreign = if self.config.is_hub() { down } else { !self.is_readable(&self.logs[&id]) };
        let intents = intent::is_log(&self.logs[&id].stream);
        if foreign || intents || (down && is_intent(&record)) {
            return self.pump_exports_of(id);
        }
        let Ok(view) = FrameView::parse(&record.body) else { return };
        let qos = if record.header.flags.contains(Flags::QOS2) { 2 } else { 1 };
        self.route(&Message {
            origin: &origin,
            topic: view.topic(),
            frame: &record.body,
            retain: record.header.flags.contains(Flags::RETAIN),
            publisher: record.header.aux,
            position: Some(&position),
            reply: None,
            logged: Some((id, seq, qos)),
        });
        self.pump_exports_of(id);
    }

    /// Gives a message to everybody who wants it; how many that are.
    pub(super) fn route(&mut self, message: &Message<'_>) -> usize {
        let mut reached = 0;
        for matched in self.trie.matches(&self.own, message.origin, message.topic).into_iter().flatten() {
            for target in &matched.targets {
                reached += usize::from(self.give(message, target));
            }
            for members in &matched.groups {
                reached += usize::from(self.give_one(message, members));
            }
        }
        reached
    }

    /// Gives a message to one member of a group: the next in turn that can take it.
    fn give_one(&mut self, message: &Message<'_>, members: &[trie::Target]) -> bool {
        self.group_turn = self.group_turn.wrapping_add(1);
        let start = self.group_turn % members.len();
        let in_turn = (0..members.len()).map(|n| &members[(start + n) % members.len()]);
        let has_room = |core: &Self, target: &trie::Target| {
            core.clients.get(&target.client).is_some_and(|client| client.queued < limits::CLIENT_QUEUE_BYTES)
        };
        let chosen = in_turn.clone().find(|target| has_room(self, target));
        let Some(target) = chosen.or_else(|| in_turn.clone().next()) else { return false };
        self.give(message, target)
    }

    fn give(&mut self, message: &Message<'_>, target: &trie::Target) -> bool {
        let Some(client) = self.clients.get(&target.client) else { return false };
        if target.no_local && message.publisher == client.mark {
            return false;
        }
        let durable_interest = target.qos > 0 && client.front == Front::Mqtt;
        if let Some((log, seq, qos)) = message.logged
            && durable_interest
        {
            self.deliver_at_head(target, log, seq, qos.min(target.qos), message);
            return true;
        }
        let Some(session) = client.session else { return false };
        if client.queued >= limits::CLIENT_QUEUE_BYTES {
            self.stats.drop(DropReason::ClientQueue);
            return true;
        }
        let delivery = Delivery {
            frame: message.frame.clone(),
            origin: Arc::clone(message.origin),
            sub: target.sub,
            identifiers: target.identifiers.clone(),
            qos: 0,
            packet_id: 0,
            dup: false,
            retain: message.retain && target.retain_as_published,
            position: message.position.cloned(),
            reply: message.reply.cloned(),
            no_responders: false,
        };
        self.stats.delivered += 1;
        self.output_to_client(target.client, session, Output::Deliver(delivery));
        true
    }

    /// From a hub's client to a node: a request goes over the link now or not at all, anything else into
    /// the Log `down/<n>`.
    fn publish_down(
        &mut self,
        node: &Origin,
        from: Option<(SessionId, ClientIx)>,
        message: &Publish,
    ) -> Result<(), PublishRefusal> {
        // What the bus itself says to a node is no client's to say.
        let view = FrameView::parse(&message.frame).map_err(|_malformed| PublishRefusal::BadFrame)?;
        if view.topic() == intent::TOPIC {
            return Err(PublishRefusal::BadFrame);
        }
        if !self.is_enrolled(node) {
            self.stats.drop(DropReason::NoSuchNode);
            if let Some(inbox) = &message.reply {
                self.no_responders(inbox, "404", "no such node");
            }
            return Err(PublishRefusal::NoSuchNode);
        }
        if let Some(inbox) = &message.reply {
            self.forward_request(node, inbox, &message.frame);
            return Ok(());
        }
        // In a tier what is for a node goes to the Log that the replicas share, not through a core.
        if self.takes_no_data() || self.config.shared {
            self.stats.drop(DropReason::StoreUnavailable);
            return Err(PublishRefusal::StoreUnavailable);
        }
        let tier: Origin = "".into();
        let stream: Arc<str> = format!("down/{node}").into();
        let log = self.log_of(&tier, &stream, Class::Event, None);
        if !self.admits(log, message.frame.len()) {
            self.stats.drop(DropReason::Quota);
            return Err(PublishRefusal::Quota);
        }
        self.append(log, Flags::QOS1, 0, message.frame.clone());
        if let Some((session, _)) = from.filter(|_| message.packet_id != 0) {
            self.ledger.after(Effect::Reply(session, Reply::PubAck(message.packet_id)));
        }
        Ok(())
    }

    /// A node exists for this hub if it was enrolled.
    pub(super) fn is_enrolled(&self, node: &str) -> bool {
        let sys = (Arc::clone(&self.own), Arc::from("sys"));
        let space = self.space_names.get(&sys).map(|index| &self.spaces[*index]);
        space.is_some_and(|space| space.latest(&format!("identity/{node}")).is_some())
    }

    /// True if the message has outlived its own time to live.
    pub(super) fn has_expired(&self, view: &FrameView<'_>, default: Duration) -> bool {
        let ttl_s = if view.ttl_s() > 0 { u64::from(view.ttl_s()) } else { default.as_secs() };
        ttl_s > 0
            && self.now.trusted
            && view.time_trusted()
            && view.time_us().saturating_add(ttl_s.saturating_mul(1_000_000)) < self.now.wall_us
    }

    /// What a down message asks for beside its delivery: `Octobus-Retain: 1`.
    pub(super) fn retain_if_asked(&mut self, frame: &Bytes) {
        let Ok(view) = FrameView::parse(frame) else { return };
        if view.header(header::RETAIN) != Some(b"1") {
            return;
        }
        let publish = Publish {
            target: Target::Own,
            frame: frame.clone(),
            qos: 1,
            packet_id: 0,
            dup: false,
            retain: true,
            reply: None,
        };
        self.retain(view.topic(), &publish, view.payload().is_empty());
    }
}

fn is_intent(record: &codec::Record) -> bool {
    FrameView::parse(&record.body).is_ok_and(|view| view.topic() == intent::TOPIC)
}
