//! A simulated client: it speaks MQTT's two handshakes as a device does, and survives its broker.

use std::collections::{BTreeSet, VecDeque};

use broker::core::event::{ClientAck, Output, Reply, SessionId};

/// A client, connected or not.
#[derive(Debug, Default)]
pub(crate) struct Client {
    pub(crate) session: Option<SessionId>,
    pub(crate) durable: bool,
    /// It handles what it is sent only when told to.
    pub(crate) lazy: bool,
    /// Its broker lost what it knew: it begins anew.
    pub(crate) fresh: bool,
    /// Sent to it, not yet handled.
    pub(crate) inbox: VecDeque<Output>,
    /// QoS 2 deliveries that it holds and that are not released.
    received: BTreeSet<u16>,
    /// Its publishes that are not done, in order.
    pub(crate) sent: VecDeque<Sent>,
    next_packet: u16,
}

/// A publish on its way.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) packet_id: u16,
    pub(crate) message: Message,
    /// PUBREC came.
    released: bool,
}

/// What a client wants said.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) to: broker::core::event::Target,
    pub(crate) topic: String,
    pub(crate) tag: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) headers: bool,
}

/// What a client does about what it got.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) acks: Vec<ClientAck>,
    /// The publish with this tag is acknowledged.
    pub(crate) acknowledged: Option<String>,
    /// The publish with this tag is refused.
    pub(crate) refused: Option<String>,
    /// A message had its effect.
    pub(crate) effect: bool,
    /// Publishes to send again, or their releases.
    pub(crate) again: Vec<Sent>,
}

impl Client {
    /// Notes a publish; its packet id.
    pub(crate) fn send(&mut self, message: &Message) -> u16 {
        if message.qos == 0 {
            return 0;
        }
        loop {
            self.next_packet = self.next_packet.wrapping_add(1).max(1);
            if self.sent.iter().all(|sent| sent.packet_id != self.next_packet) {
                break;
            }
        }
        self.sent.push_back(Sent { packet_id: self.next_packet, message: message.clone(), released: false });
        self.next_packet
    }

    /// The connection is gone.
    pub(crate) fn disconnected(&mut self) {
        self.session = None;
        self.inbox.clear();
        if !self.durable {
            self.forget();
        }
    }

    /// It begins anew: what it sent and got is of another life of its broker.
    pub(crate) fn forget(&mut self) {
        self.sent.clear();
        self.received.clear();
    }

    /// Handles one output.
    pub(crate) fn handle(&mut self, output: &Output) -> Answer {
        let mut answer = Answer::default();
        match output {
            Output::Deliver(delivery) => match delivery.qos {
                0 => answer.effect = true,
                1 => {
                    answer.effect = true;
                    answer.acks.push(ClientAck::Ack(delivery.packet_id));
                }
                _ => {
                    answer.effect = self.received.insert(delivery.packet_id);
                    answer.acks.push(ClientAck::Rec(delivery.packet_id));
                }
            },
            Output::Reply(reply) => self.handle_reply(reply, &mut answer),
            _ => {}
        }
        answer
    }

    fn handle_reply(&mut self, reply: &Reply, answer: &mut Answer) {
        match *reply {
            Reply::Opened { session_present: false } => self.forget(),
            Reply::Opened { session_present: true } => answer.again = self.sent.iter().cloned().collect(),
            Reply::PubAck(id) => answer.acknowledged = self.done(id),
            Reply::PubRec(id) => {
                if let Some(sent) = self.sent.iter_mut().find(|sent| sent.packet_id == id) {
                    let first = !std::mem::replace(&mut sent.released, true);
                    answer.acknowledged = first.then(|| sent.message.tag.clone());
                }
                answer.acks.push(ClientAck::Rel(id));
            }
            Reply::PubComp(id) => drop(self.done(id)),
            Reply::PubRel(id) => {
                self.received.remove(&id);
                answer.acks.push(ClientAck::Comp(id));
            }
            Reply::Refused { packet_id, .. } => answer.refused = self.done(packet_id),
            _ => {}
        }
    }

    fn done(&mut self, packet_id: u16) -> Option<String> {
        let at = self.sent.iter().position(|sent| sent.packet_id == packet_id)?;
        self.sent.remove(at).map(|sent| sent.message.tag)
    }
}

impl Sent {
    /// The PUBREL that is owed instead of the message itself.
    pub(crate) fn release(&self) -> Option<ClientAck> {
        self.released.then_some(ClientAck::Rel(self.packet_id))
    }
}
