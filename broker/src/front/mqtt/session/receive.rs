//! Packets become events.

use std::sync::Arc;

use codec::{Filter, topic::validate_topic};

use super::{ASK_CORE, Closing, Pending, Refusal, SUBACK_FAILURE, Session, count};
use crate::{
    core::event::{Event, OriginFilter, Publish, RetainedOnSubscribe, Subscription, Target, Unsubscribe},
    front::mqtt::{
        encode::{self, ack},
        error::{Cause, PacketError, reason},
        gate::{self, Gate, Kind, Packet},
        packet::{self, Disconnect, SubscribeFilter},
        publish::{self, Entered},
        wire::Version,
        writer::Writer,
    },
};

/// How much of the input was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::front::mqtt) struct Received {
    /// Bytes of complete packets.
    pub(in crate::front::mqtt) consumed: usize,
    /// Bytes that the packet behind them needs in all; `None` if the session takes no more packets for now.
    pub(in crate::front::mqtt) need: Option<usize>,
}

impl Session {
    /// Takes the complete packets at the beginning of `input`. Answers that need no core go to `out`.
    ///
    /// # Errors
    /// The connection is to be closed. Events of the packets before the culprit stand.
    pub(in crate::front::mqtt) fn receive(
        &mut self,
        input: &[u8],
        entered: Entered,
        out: &mut Writer,
    ) -> Result<Received, Closing> {
        let mut consumed = 0;
        let need = loop {
            if !self.takes_packets(out) {
                break None;
            }
            let rest = &input[consumed..];
            match gate::check(rest, Some(self.version), self.limits.packet_max)? {
                Gate::Incomplete(need) => break Some(need),
                Gate::Packet(packet) => {
                    count(&self.counters.packets_in);
                    self.take(packet, entered, rest.len(), out)?;
                    consumed += packet.len;
                }
            }
        };
        self.arena.release();
        Ok(Received { consumed, need })
    }

    fn take(
        &mut self,
        packet: Packet<'_>,
        entered: Entered,
        expected: usize,
        out: &mut Writer,
    ) -> Result<(), Closing> {
        match packet.kind {
            Kind::Publish => {
                let publish = publish::Publish::parse(self.version, packet.flags, packet.body)?;
                Ok(self.publish(publish, entered, expected, out)?)
            }
            Kind::PubAck | Kind::PubRec | Kind::PubRel | Kind::PubComp => {
                let ack = packet::ack(packet.kind, self.version, packet.body)?;
                self.push_ack(ack);
                Ok(())
            }
            Kind::Subscribe => Ok(self.subscribe(packet.body, out)?),
            Kind::Unsubscribe => Ok(self.unsubscribe(packet.body, out)?),
            Kind::PingReq => {
                encode::pingresp(out.gather());
                self.count_out();
                Ok(())
            }
            Kind::Disconnect => Err(self.disconnected(Disconnect::parse(packet.body)?)),
            Kind::Connect => Err(PacketError::Protocol("a second CONNECT").into()),
        }
    }

    fn publish(
        &mut self,
        publish: publish::Publish<'_>,
        entered: Entered,
        expected: usize,
        out: &mut Writer,
    ) -> Result<(), PacketError> {
        let aliased = self.resolve_alias(&publish)?;
        let mut publish = publish;
        if let Some(topic) = &aliased {
            publish.message.topic = topic;
        } else {
            validate_topic(publish.message.topic).map_err(|_invalid| PacketError::BadTopic)?;
        }
        if publish.qos > 0 && self.version == Version::V5 {
            let allowed = usize::from(self.limits.receive_max);
            if self.in_flight + self.refusals.len() >= allowed {
                return Err(PacketError::ReceiveMax);
            }
        }
        if !self.permissions.may_publish(publish.message.topic) {
            self.deny(publish.qos, publish.packet_id, out);
            return Ok(());
        }
        let reply = answer_topic(&mut publish);
        let frame = self.arena.encode(&publish.message, entered, expected);
        if publish.qos > 0 {
            self.in_flight += 1;
            self.asked += 1;
        }
        self.push_publish(Publish {
            target: Target::Own,
            frame,
            qos: publish.qos,
            packet_id: publish.packet_id,
            dup: publish.dup,
            retain: publish.retain,
            reply,
        });
        Ok(())
    }

    /// Learns or looks up a topic alias. A topic that comes back is valid.
    fn resolve_alias(&mut self, publish: &publish::Publish<'_>) -> Result<Option<Arc<str>>, PacketError> {
        let Some(alias) = publish.alias else { return Ok(None) };
        if alias == 0 || alias > self.limits.topic_alias_max {
            return Err(PacketError::BadTopicAlias);
        }
        let at = usize::from(alias) - 1;
        let topic = publish.message.topic;
        if topic.is_empty() {
            let known = self.aliases.get(at).cloned().flatten();
            return known.map(Some).ok_or(PacketError::BadTopicAlias);
        }
        validate_topic(topic).map_err(|_invalid| PacketError::BadTopic)?;
        if self.aliases.len() <= at {
            self.aliases.resize(at + 1, None);
        }
        let topic: Arc<str> = topic.into();
        self.aliases[at] = Some(Arc::clone(&topic));
        Ok(Some(topic))
    }

    /// Drops a publish that the client may not make. MQTT 3.1.1 has only a positive acknowledgement for it.
    fn deny(&mut self, qos: u8, packet_id: u16, out: &mut Writer) {
        count(&self.counters.publishes_denied);
        if qos == 0 {
            return;
        }
        let first = if qos == 2 { ack::PUBREC } else { ack::PUBACK };
        if self.answered == self.asked {
            self.acknowledge(first, packet_id, reason::NOT_AUTHORIZED, out);
        } else {
            self.refusals.push_back((self.asked, Refusal { first, packet_id, code: reason::NOT_AUTHORIZED }));
        }
    }

    fn push_publish(&mut self, publish: Publish) {
        if let Some(Event::Published { messages, .. }) = self.events.last_mut() {
            messages.push(publish);
        } else {
            self.events.push(Event::Published { session: self.id, messages: vec![publish] });
        }
    }

    fn subscribe(&mut self, body: &[u8], out: &mut Writer) -> Result<(), PacketError> {
        let mut packet = packet::Subscribe::parse(self.version, body)?;
        let mut subscriptions = Vec::new();
        let mut codes = Vec::new();
        while let Some(wanted) = packet.next()? {
            match self.admit_filter(&wanted) {
                Ok(filter) => {
                    codes.push(ASK_CORE);
                    subscriptions.push(self.subscription(filter, &wanted, packet.identifier));
                }
                Err(code) => {
                    codes.push(if self.version == Version::V5 { code } else { SUBACK_FAILURE });
                }
            }
        }
        let pending = Pending { packet_id: packet.packet_id, unsubscribe: false, codes };
        if subscriptions.is_empty() {
            self.write_answer(&pending, out);
            return Ok(());
        }
        let token = u32::from(packet.packet_id);
        self.pending.push_back(pending);
        self.events.push(Event::Subscribed { session: self.id, token, subscriptions });
        Ok(())
    }

    /// The filter, or the reason code why the client does not get it.
    fn admit_filter(&self, wanted: &SubscribeFilter<'_>) -> Result<Filter, u8> {
        if wanted.filter == "$share" || wanted.filter.starts_with("$share/") {
            return Err(reason::NO_SHARED);
        }
        let filter = Filter::parse(wanted.filter).map_err(|_invalid| reason::BAD_FILTER)?;
        if !self.permissions.may_subscribe(&filter) {
            count(&self.counters.subscriptions_denied);
            return Err(reason::NOT_AUTHORIZED);
        }
        Ok(filter)
    }

    fn subscription(&self, filter: Filter, wanted: &SubscribeFilter<'_>, identifier: u32) -> Subscription {
        Subscription {
            // The core numbers MQTT's subscriptions: they outlive this connection and are named by filter.
            id: 0,
            origin: OriginFilter::Own,
            filter,
            qos: wanted.qos,
            group: None,
            no_local: wanted.no_local,
            retain_as_published: wanted.retain_as_published,
            retained: if self.version == Version::V5 { wanted.retained } else { RetainedOnSubscribe::Send },
            wildcard_matches_dollar: false,
            identifier,
        }
    }

    fn unsubscribe(&mut self, body: &[u8], out: &mut Writer) -> Result<(), PacketError> {
        let mut packet = packet::Unsubscribe::parse(self.version, body)?;
        let mut which = Vec::new();
        let mut codes = Vec::new();
        while let Some(text) = packet.next()? {
            match Filter::parse(text) {
                Ok(filter) => {
                    codes.push(ASK_CORE);
                    which.push(Unsubscribe::Filter(filter));
                }
                Err(_invalid) => codes.push(reason::BAD_FILTER),
            }
        }
        let pending = Pending { packet_id: packet.packet_id, unsubscribe: true, codes };
        if which.is_empty() {
            self.write_answer(&pending, out);
            return Ok(());
        }
        let token = u32::from(packet.packet_id);
        self.pending.push_back(pending);
        self.events.push(Event::Unsubscribed { session: self.id, token, which });
        Ok(())
    }

    fn disconnected(&self, disconnect: Disconnect) -> Closing {
        if !self.limits.lasting && disconnect.expiry_s.is_some_and(|seconds| seconds > 0) {
            return PacketError::Protocol("a session that ends with its connection cannot be prolonged")
                .into();
        }
        Closing {
            cause: Cause::Disconnected,
            code: None,
            clean: !disconnect.with_will,
            expiry_s: disconnect.expiry_s.map(|seconds| seconds.min(self.limits.expiry_max_s)),
            detail: String::new(),
        }
    }
}

/// A QoS 0 publish that wants its answer in an inbox is a request. Any other response topic just travels.
fn answer_topic(publish: &mut publish::Publish<'_>) -> Option<Arc<str>> {
    let topic = publish.message.properties.response_topic?;
    let is_request = publish.qos == 0 && topic.starts_with("_INBOX/");
    is_request.then(|| {
        publish.message.properties.response_topic = None;
        topic.into()
    })
}
