//! One connection's protocol state after CONNECT, without I/O: packets become [`Event`]s, [`Output`]s become
//! packets.
//!
//! What lasts (subscriptions, packet ids, QoS 2, the will) is the core's. Here lives only what dies with the
//! connection: topic aliases, the receive maximum, answers that wait for the core's word.
//!
//! Invariants:
//! - Events are in the order of the packets. Publishes in a row share one event, and so do acknowledgements.
//! - PUBACK and PUBREC leave in the order of their PUBLISH packets: one that is refused here waits until the
//!   core has answered all earlier ones.

mod receive;

use std::{collections::VecDeque, sync::Arc, sync::atomic::AtomicU64};

use codec::FrameView;

use super::{
    counters::Counters,
    encode::{self, ConnAck, DeliveryError, ack},
    error::{Cause, PacketError, reason},
    publish::Arena,
    wire::Version,
    writer::Writer,
};
use crate::{
    core::event::{ClientAck, CloseReason, Delivery, Event, Output, PublishRefusal, Reply, SessionId},
    front::auth::Permissions,
};

/// What both sides agreed to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Largest packet from the client.
    pub(super) packet_max: usize,
    /// Largest packet to the client.
    pub(super) client_packet_max: usize,
    /// Unanswered QoS 1 and 2 publishes of the client (MQTT 5).
    pub(super) receive_max: u16,
    /// Highest topic alias that the client may use (MQTT 5).
    pub(super) topic_alias_max: u16,
    /// The session outlives its connection; one that does not cannot be made to (MQTT 5).
    pub(super) lasting: bool,
    /// Longest time, in seconds, that a session may outlive its connection.
    pub(super) expiry_max_s: u32,
    /// What the client gets where it asked for more.
    pub(super) lowered_expiry_s: Option<u32>,
}

/// The end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Closing {
    /// For the counter.
    pub(super) cause: Cause,
    /// What the client is told, if anything.
    pub(super) code: Option<u8>,
    /// The client asked for it: its will is not published.
    pub(super) clean: bool,
    /// The client changed how long its session lasts.
    pub(super) expiry_s: Option<u32>,
    /// For the log.
    pub(super) detail: String,
}

impl Closing {
    pub(super) fn new(cause: Cause, code: Option<u8>, detail: impl Into<String>) -> Self {
        Self { cause, code, clean: false, expiry_s: None, detail: detail.into() }
    }
}

impl From<PacketError> for Closing {
    fn from(error: PacketError) -> Self {
        Self::new(error.cause(), Some(error.code()), error.to_string())
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Session {
    id: SessionId,
    version: Version,
    limits: Limits,
    permissions: Arc<Permissions>,
    counters: Arc<Counters>,
    /// The client identifier that the server chose.
    assigned_client_id: Option<Arc<str>>,
    opened: bool,
    events: Vec<Event>,
    arena: Arena,
    aliases: Vec<Option<Arc<str>>>,
    /// QoS 1 and 2 publishes whose exchange is not complete.
    in_flight: usize,
    /// QoS 1 and 2 publishes handed to the core so far, and answered by it.
    asked: u64,
    answered: u64,
    /// Refusals and how many answers of the core come before each.
    refusals: VecDeque<(u64, Refusal)>,
    pending: VecDeque<Pending>,
}

#[derive(Debug, Clone, Copy)]
struct Refusal {
    first: u8,
    packet_id: u16,
    code: u8,
}

/// A SUBSCRIBE or UNSUBSCRIBE that the core has not answered.
#[derive(Debug)]
struct Pending {
    packet_id: u16,
    unsubscribe: bool,
    /// One for each filter; [`ASK_CORE`] where the core's answer goes.
    codes: Vec<u8>,
}

/// Stands for a code that the core will give; no reason code of MQTT.
const ASK_CORE: u8 = 0xff;
/// SUBSCRIBE and UNSUBSCRIBE packets that wait for an answer; further packets wait in the socket.
const PENDING_MAX: usize = 64;
/// Refusals that wait for their turn; further packets wait in the socket.
const REFUSALS_MAX: usize = 4096;
/// Unwritten answers above which no further packet is taken: a client that only asks and never reads.
/// Large payloads do not count: who sends and receives them with one thread must not be locked up.
const READ_BELOW: usize = 128 << 10;

impl Session {
    pub(super) fn new(
        id: SessionId,
        version: Version,
        limits: Limits,
        permissions: Arc<Permissions>,
        counters: Arc<Counters>,
        assigned_client_id: Option<Arc<str>>,
    ) -> Self {
        Self {
            id,
            version,
            limits,
            permissions,
            counters,
            assigned_client_id,
            opened: false,
            events: Vec::new(),
            arena: Arena::default(),
            aliases: Vec::new(),
            in_flight: 0,
            asked: 0,
            answered: 0,
            refusals: VecDeque::new(),
            pending: VecDeque::new(),
        }
    }

    /// True once CONNACK was sent.
    pub(super) fn is_open(&self) -> bool {
        self.opened
    }

    /// True if packets may be taken now. Before CONNACK nothing may be answered, and what waits for an answer
    /// is bounded.
    pub(super) fn takes_packets(&self, out: &Writer) -> bool {
        self.opened
            && self.pending.len() < PENDING_MAX
            && self.refusals.len() < REFUSALS_MAX
            && out.gathered_len() < READ_BELOW
    }

    /// The events that packets have become since the last call, in order.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Turns one output into packets.
    ///
    /// # Errors
    /// The connection is to be closed once `out` is written.
    pub(super) fn send(&mut self, output: Output, now_us: u64, out: &mut Writer) -> Result<(), Closing> {
        match output {
            Output::Deliver(delivery) => {
                self.deliver(&delivery, now_us, out);
                Ok(())
            }
            Output::Reply(reply) => self.reply(reply, out),
            Output::Close(reason) => Err(Self::closing(&reason)),
            Output::Send { .. } | Output::State(_) => {
                tracing::error!(session = self.id.0, "an output that no MQTT session asks for");
                Ok(())
            }
        }
    }

    fn deliver(&mut self, delivery: &Delivery, now_us: u64, out: &mut Writer) {
        if !self.may_have(delivery) {
            Counters::add(&self.counters.deliveries_denied, 1);
            return self.settle_unsent(delivery);
        }
        let error = match encode::publish(out, self.version, delivery, now_us, self.limits.client_packet_max)
        {
            Ok(_len) => return self.count_out(),
            Err(error) => error,
        };
        Counters::add(&self.counters.deliveries_too_large, 1);
        if let DeliveryError::Frame(error) = error {
            tracing::error!(session = self.id.0, %error, "a delivery without a frame");
        }
        // MQTT 5, 3.1.2.11.4: dropped, and the server behaves as if it had been delivered.
        self.settle_unsent(delivery);
    }

    /// A resumed session may hold subscriptions, and messages for them, that its user no longer may have.
    fn may_have(&self, delivery: &Delivery) -> bool {
        self.permissions.is_all()
            || FrameView::parse(&delivery.frame)
                .is_ok_and(|frame| self.permissions.may_receive(frame.topic()))
    }

    /// Tells the core that a delivery is done with, as if the client had taken it.
    fn settle_unsent(&mut self, delivery: &Delivery) {
        match delivery.qos {
            0 => {}
            1 => self.push_ack(ClientAck::Ack(delivery.packet_id)),
            _ => self.push_ack(ClientAck::Comp(delivery.packet_id)),
        }
    }

    fn reply(&mut self, reply: Reply, out: &mut Writer) -> Result<(), Closing> {
        match reply {
            Reply::Opened { session_present } => self.open(session_present, out),
            Reply::PubAck(packet_id) => {
                self.in_flight = self.in_flight.saturating_sub(1);
                self.acknowledge(ack::PUBACK, packet_id, reason::SUCCESS, out);
                self.answer(out);
            }
            Reply::PubRec(packet_id) => {
                self.acknowledge(ack::PUBREC, packet_id, reason::SUCCESS, out);
                self.answer(out);
            }
            Reply::PubComp(packet_id) => {
                self.in_flight = self.in_flight.saturating_sub(1);
                self.acknowledge(ack::PUBCOMP, packet_id, reason::SUCCESS, out);
            }
            Reply::PubRel(packet_id) => self.acknowledge(ack::PUBREL, packet_id, reason::SUCCESS, out),
            Reply::Refused { packet_id: 0, .. } => {}
            Reply::Refused { packet_id, qos, reason } => self.refused(packet_id, qos, reason, out)?,
            Reply::Subscribed { token, granted } => self.answer_pending(token, false, &granted, out),
            Reply::Unsubscribed { token, existed } => {
                let code = |existed: &bool| if *existed { reason::SUCCESS } else { reason::NO_SUBSCRIPTION };
                let codes: Vec<u8> = existed.iter().map(code).collect();
                self.answer_pending(token, true, &codes, out);
            }
        }
        Ok(())
    }

    fn open(&mut self, session_present: bool, out: &mut Writer) {
        self.opened = true;
        let connack = ConnAck {
            session_present,
            receive_max: self.limits.receive_max,
            packet_max: self.limits.packet_max,
            topic_alias_max: self.limits.topic_alias_max,
            lowered_expiry_s: self.limits.lowered_expiry_s,
            assigned_client_id: self.assigned_client_id.as_deref(),
        };
        encode::connack(out.gather(), self.version, &connack);
        self.count_out();
    }

    /// The core did not take a publish. MQTT 3.1.1 cannot say so, and an acknowledgement would be a lie: the
    /// connection is closed and the client will send it again.
    fn refused(
        &mut self,
        packet_id: u16,
        qos: u8,
        refusal: PublishRefusal,
        out: &mut Writer,
    ) -> Result<(), Closing> {
        if self.version == Version::V4 {
            return Err(Closing::new(Cause::PublishRefused, None, refusal.to_string()));
        }
        let code = match refusal {
            PublishRefusal::Quota | PublishRefusal::StoreUnavailable => reason::QUOTA,
            PublishRefusal::NoSuchNode | PublishRefusal::NodeOffline => reason::UNSPECIFIED,
            PublishRefusal::BadFrame => reason::IMPLEMENTATION,
        };
        self.in_flight = self.in_flight.saturating_sub(1);
        let first = if qos == 2 { ack::PUBREC } else { ack::PUBACK };
        self.acknowledge(first, packet_id, code, out);
        self.answer(out);
        Ok(())
    }

    fn acknowledge(&self, first: u8, packet_id: u16, code: u8, out: &mut Writer) {
        encode::acknowledge(out.gather(), self.version, first, packet_id, code);
        self.count_out();
    }

    /// The core has answered one more publish: refusals that waited for it may go.
    fn answer(&mut self, out: &mut Writer) {
        self.answered += 1;
        while let Some((after, refusal)) = self.refusals.front().copied()
            && after <= self.answered
        {
            self.refusals.pop_front();
            self.acknowledge(refusal.first, refusal.packet_id, refusal.code, out);
        }
    }

    fn answer_pending(&mut self, token: u32, unsubscribe: bool, answers: &[u8], out: &mut Writer) {
        let found = self
            .pending
            .iter()
            .position(|pending| u32::from(pending.packet_id) == token && pending.unsubscribe == unsubscribe);
        let Some(mut pending) = found.and_then(|at| self.pending.remove(at)) else { return };
        let failure = if self.version == Version::V5 { reason::UNSPECIFIED } else { SUBACK_FAILURE };
        let mut answers = answers.iter().copied();
        for code in pending.codes.iter_mut().filter(|code| **code == ASK_CORE) {
            *code = answers.next().unwrap_or(failure);
        }
        self.write_answer(&pending, out);
    }

    fn write_answer(&self, pending: &Pending, out: &mut Writer) {
        let write = if pending.unsubscribe { encode::unsuback } else { encode::suback };
        write(out.gather(), self.version, pending.packet_id, &pending.codes);
        self.count_out();
    }

    fn push_ack(&mut self, ack: ClientAck) {
        if let Some(Event::Acked { acks, .. }) = self.events.last_mut() {
            acks.push(ack);
        } else {
            self.events.push(Event::Acked { session: self.id, acks: vec![ack] });
        }
    }

    fn count_out(&self) {
        count(&self.counters.packets_out);
    }
}

/// The only failure that a SUBACK of MQTT 3.1.1 knows.
const SUBACK_FAILURE: u8 = 0x80;

fn count(counter: &AtomicU64) {
    Counters::add(counter, 1);
}

impl Session {
    /// What a client is told when the core closes its connection.
    pub(super) fn closing(reason: &CloseReason) -> Closing {
        let (cause, code, detail) = match reason {
            CloseReason::TakenOver => {
                (Cause::TakenOver, reason::TAKEN_OVER, "a newer connection has this client identifier")
            }
            CloseReason::SlowConsumer => {
                (Cause::SlowConsumer, reason::QUOTA, "does not read what it asked for")
            }
            CloseReason::Shutdown => (Cause::Shutdown, reason::SHUTTING_DOWN, "the broker stops"),
            CloseReason::Protocol(text) => (Cause::ProtocolError, reason::PROTOCOL, text.as_str()),
            CloseReason::Refused(refusal) => {
                (Cause::NotAuthorized, reason::NOT_AUTHORIZED, refusal.message.as_str())
            }
            CloseReason::Revoked => (Cause::Revoked, reason::ADMINISTRATIVE, "ended by an administrator"),
        };
        Closing::new(cause, Some(code), detail)
    }
}
