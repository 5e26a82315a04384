//! The session with another broker: hello, resume, acknowledgements, fencing, refusal.
//!
//! ```text
//!  dialler                                      acceptor
//!  Hello{offers, marks, positions}  ---------->  claim the name, or Refusal
//!                                   <----------  Welcome{marks, positions, offers}
//!  established                                   established
//!  declare, records ...             <--------->  declare, records ...
//!                                   <--------->  Ack{source, epoch, seq, crc}   (durable at the receiver)
//! ```
//!
//! Resume positions always come from the receiver. Identity comes from the peer's certificate alone; every
//! source that a peer declares is authorized against it, and a record can only belong to a declared source.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{
    Core, Party, Timer,
    event::{CloseReason, LinkOpen, Origin, Output, Peer, Role, SessionId},
    log::LogId,
    space::Pair,
};
use crate::{limits, store::SourceKind};

/// Protocol versions that this build speaks.
const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;
/// Sources that one peer may declare.
const SOURCES_MAX: usize = 256;

const REPLACED: &str = "this enrolment was replaced by a newer one: join again with a new token";

/// A number that the peer declared for a source of its own.
pub(super) type LinkSource = u32;

/// Who holds a node's name at this hub.
#[derive(Debug)]
pub(super) struct Claim {
    instance: Vec<u8>,
    pub(super) session: Option<SessionId>,
    /// When its last link ended.
    released: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    AwaitingHello,
    AwaitingWelcome,
    Established,
    /// A refusal was sent; whatever still arrives is ignored.
    Closing,
}

#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: Peer,
    pub(super) phase: Phase,
    /// Bytes in its outbox.
    pub(super) queued: usize,
    next_number: u32,
    /// Numbers that this side declared for its live sources.
    live: BTreeMap<(Origin, Class), u32>,
    pub(super) logs: BTreeMap<LogId, LogExport>,
    pub(super) spaces: BTreeMap<usize, StateExport>,
    pub(super) imports: BTreeMap<LinkSource, Import>,
    /// Sources of the peer whose durable position it has not been told.
    pub(super) owed: BTreeSet<LinkSource>,
    pending: BTreeMap<Class, Vec<Record>>,
    /// What came before Welcome: classes overtake control, because each has a stream of its own.
    early: Vec<Record>,
    early_bytes: usize,
}

/// A Log on its way to the peer.
#[derive(Debug, Default)]
pub(super) struct LogExport {
    /// Declared as this; 0 = not yet.
    pub(super) number: u32,
    /// Epoch that the peer knows to be current.
    pub(super) epoch: u64,
    /// Next seq to send.
    pub(super) next: u64,
    /// Sent and not acknowledged.
    pub(super) in_flight: VecDeque<(u64, usize)>,
    pub(super) in_flight_bytes: usize,
    /// A read is under way.
    pub(super) reading: bool,
    /// The peer's mark is being compared with a record in the store.
    pub(super) checking: Option<proto::LogMark>,
    /// What the peer acknowledged last, and whether that is on disk.
    pub(super) mark: Option<proto::Mark>,
    pub(super) mark_is_new: bool,
}

/// A space on its way to the peer.
#[derive(Debug)]
pub(super) struct StateExport {
    pub(super) number: u32,
    /// Sent up to here.
    pub(super) position: Pair,
    pub(super) in_flight: VecDeque<(Pair, usize)>,
    pub(super) in_flight_bytes: usize,
    /// A barrier is owed once everything up to this pair is sent.
    pub(super) barrier: Option<Pair>,
    /// What the peer acknowledged last, and whether that is on disk.
    pub(super) mark: Pair,
    pub(super) mark_is_new: bool,
}

/// What a number of the peer's stands for.
#[derive(Debug, Clone)]
pub(super) enum Import {
    Log {
        origin: Origin,
        stream: Arc<str>,
        class: Class,
    },
    State {
        space: usize,
    },
    Live {
        origin: Origin,
    },
    /// From a newer peer, or not taken by configuration: skipped.
    Unknown,
}

impl Link {
    fn new(open: &LinkOpen) -> Self {
        Self {
            peer: open.peer.clone(),
            phase: if open.dialler { Phase::AwaitingWelcome } else { Phase::AwaitingHello },
            queued: 0,
            next_number: 0,
            live: BTreeMap::new(),
            logs: BTreeMap::new(),
            spaces: BTreeMap::new(),
            imports: BTreeMap::new(),
            owed: BTreeSet::new(),
            pending: BTreeMap::new(),
            early: Vec::new(),
            early_bytes: 0,
        }
    }

    /// The key of what is stored about this peer as a receiver: replicas of a tier are one.
    pub(super) fn receiver(&self) -> &str {
        if self.peer.role == Role::Hub { "" } else { &self.peer.name }
    }

    /// Keeps a record that overtook Welcome. The peer's windows bound what can come.
    fn park(&mut self, record: Record) -> Result<(), String> {
        self.early_bytes += record.wire_len();
        if self.early_bytes > limits::LINK_EARLY_BYTES {
            return Err("more records before welcome than any window allows".to_owned());
        }
        self.early.push(record);
        Ok(())
    }

    /// Declares a source; the record goes on the class stream of the records that follow it.
    pub(super) fn declare(&mut self, origin: &str, kind: SourceKind, name: &str, class: Class) -> u32 {
        self.next_number += 1;
        let source = crate::store::Source {
            number: self.next_number,
            origin: origin.into(),
            kind,
            name: name.into(),
            class,
        };
        self.push(class, super::declare_record(&source, self.next_number));
        self.next_number
    }

    pub(super) fn push(&mut self, class: Class, record: Record) {
        self.pending.entry(class).or_default().push(record);
    }

    /// Sends a live record of an origin; the source is declared at first use.
    pub(super) fn push_live(
        &mut self,
        origin: &Origin,
        class: Class,
        flags: Flags,
        correlation: u64,
        body: bytes::Bytes,
    ) {
        let key = (Arc::clone(origin), class);
        let number = match self.live.get(&key) {
            Some(number) => *number,
            None => {
                let number = self.declare(origin, SourceKind::Live, "", class);
                self.live.insert(key, number);
                number
            }
        };
        let header = RecordHeader {
            kind: Kind::LIVE,
            class: class as u8,
            flags,
            source: number,
            epoch: 0,
            seq: correlation,
            aux: 0,
        };
        self.push(class, Record { header, body });
    }
}

impl Core {
    pub(super) fn on_link_opened(&mut self, open: LinkOpen) {
        let link = Link::new(&open);
        self.sessions.insert(open.session, Party::Link);
        self.links.insert(open.session, link);
        if self.draining.is_some() {
            self.refuse(open.session, proto::RefusalReason::Overloaded, "this process is stopping", 1000);
        } else if open.dialler {
            let hello = self.hello(&open.peer);
            self.send_control(open.session, proto::control::Message::Hello(hello));
        }
    }

    pub(super) fn on_link_closed(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        self.pump_links.remove(&session);
        let Some(link) = self.links.remove(&session) else { return };
        self.write_marks_of(&link);
        if let Some(claim) = self.claims.get_mut(&link.peer.name)
            && claim.session == Some(session)
        {
            claim.session = None;
            claim.released = self.now.mono;
        }
    }

    pub(super) fn on_link_received(&mut self, session: SessionId, records: Vec<Record>) {
        for record in records {
            let Some(link) = self.links.get_mut(&session) else { return };
            let phase = link.phase;
            if phase == Phase::Closing {
                return;
            }
            let outcome = match record.header.kind {
                Kind::CONTROL => self.on_control(session, phase, record),
                _ if phase == Phase::AwaitingWelcome => link.park(record),
                _ if phase != Phase::Established => Err("records before hello and welcome".to_owned()),
                Kind::DECLARE => self.on_declare(session, record),
                kind if kind.is_journal_only() => Err(format!("a record of kind {} on a link", kind.0)),
                _ => self.on_import(session, record),
            };
            if let Err(what) = outcome {
                tracing::warn!(peer = %self.links[&session].peer.name, what, "link protocol error");
                self.refuse(session, proto::RefusalReason::ProtocolError, &what, 0);
                return;
            }
        }
    }

    fn on_control(&mut self, session: SessionId, phase: Phase, record: Record) -> Result<(), String> {
        use proto::control::Message;
        let control: proto::Control =
            codec::decode(record.body).map_err(|error| format!("a control message that is none: {error}"))?;
        match (control.message, phase) {
            (Some(Message::Hello(hello)), Phase::AwaitingHello) => self.on_hello(session, &hello),
            (Some(Message::Welcome(welcome)), Phase::AwaitingWelcome) => self.on_welcome(session, &welcome),
            (Some(Message::Refusal(refusal)), _) => {
                self.on_refused(session, refusal);
                Ok(())
            }
            (Some(Message::Ack(ack)), Phase::Established) => {
                self.on_ack(session, &ack);
                Ok(())
            }
            (Some(Message::Drain(_)), _) => {
                let reason = CloseReason::Shutdown;
                self.output(session, Output::Close(reason));
                Ok(())
            }
            // Heartbeats end in the link task; what a newer peer says is skipped.
            (Some(Message::Heartbeat(_) | Message::HeartbeatAck(_)) | None, _) => Ok(()),
            (Some(Message::Hello(_) | Message::Welcome(_) | Message::Ack(_)), _) => {
                Err("a control message out of order".to_owned())
            }
        }
    }

    fn hello(&self, peer: &Peer) -> proto::Hello {
        proto::Hello {
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
            features: Vec::new(),
            instance: bytes::Bytes::copy_from_slice(&self.config.instance),
            dictionaries: Vec::new(),
            logs: self.log_offers(peer),
            states: self.state_offers(peer),
            marks: self.marks_for(peer),
            positions: self.positions_for(peer),
            software: concat!("octobus/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    fn on_hello(&mut self, session: SessionId, hello: &proto::Hello) -> Result<(), String> {
        if hello.protocol_max < *PROTOCOL.start() || hello.protocol_min > *PROTOCOL.end() {
            let (min, max) = (hello.protocol_min, hello.protocol_max);
            let what = format!(
                "this hub speaks protocol {PROTOCOL:?}, the node {min} to {max}: upgrade the older one"
            );
            self.refuse(session, proto::RefusalReason::ProtocolVersion, &what, 0);
            return Ok(());
        }
        if hello.instance.len() != 16 {
            return Err("an instance that has not 16 bytes".to_owned());
        }
        let peer = self.links[&session].peer.clone();
        if self.generations.get(&peer.name).is_some_and(|least| peer.generation < *least) {
            self.refuse(session, proto::RefusalReason::Revoked, REPLACED, 0);
            return Ok(());
        }
        if !self.claim(session, &peer, &hello.instance) {
            return Ok(());
        }
        let welcome = proto::Welcome {
            protocol: hello.protocol_max.min(*PROTOCOL.end()),
            features: Vec::new(),
            time_us: self.now.wall_us,
            marks: self.marks_for(&peer),
            positions: self.positions_for(&peer),
            logs: self.log_offers(&peer),
            states: self.state_offers(&peer),
            instance: bytes::Bytes::copy_from_slice(&self.config.instance),
            tier: self.config.tier.to_string(),
        };
        self.send_control(session, proto::control::Message::Welcome(welcome));
        self.establish(session, &hello.marks, &hello.positions);
        Ok(())
    }

    fn on_welcome(&mut self, session: SessionId, welcome: &proto::Welcome) -> Result<(), String> {
        if !PROTOCOL.contains(&welcome.protocol) {
            return Err(format!("the hub chose protocol {}", welcome.protocol));
        }
        self.conditions.remove(&("DuplicateIdentity", self.config.name.to_string()));
        self.conditions.remove(&("LinkRefused", self.config.name.to_string()));
        self.establish(session, &welcome.marks, &welcome.positions);
        let link = self.links.get_mut(&session).expect("just established");
        let early = std::mem::take(&mut link.early);
        self.on_link_received(session, early);
        Ok(())
    }

    fn establish(
        &mut self,
        session: SessionId,
        marks: &[proto::LogMark],
        positions: &[proto::StatePosition],
    ) {
        let link = self.links.get_mut(&session).expect("the link that said hello");
        link.phase = Phase::Established;
        self.begin_exports(session, marks, positions);
        self.pump_links.insert(session);
    }

    /// Takes the node's name for this session, or refuses. The newest session of an instance fences the
    /// older; a second instance waits until the first has been away for a while.
    fn claim(&mut self, session: SessionId, peer: &Peer, instance: &[u8]) -> bool {
        let hold = self.config.duplicate_hold;
        let now = self.now.mono;
        if let Some(held) = self.claims.get(&peer.name) {
            let other = held.instance != instance;
            let busy = held.session.is_some() || now < held.released + hold;
            if other && busy {
                let what = format!(
                    "another instance of node {} is linked (or was within {} s): two machines hold the same \
                     certificate; stop one, or enrol it under its own name",
                    peer.name,
                    hold.as_secs()
                );
                self.set_condition("DuplicateIdentity", peer.name.to_string(), what.clone());
                let since_us = self.now.wall_us;
                let subject = peer.name.to_string();
                self.after(Duration::from_mins(10), Timer::Condition("DuplicateIdentity", subject, since_us));
                let retry = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
                self.refuse(session, proto::RefusalReason::DuplicateIdentity, &what, retry);
                return false;
            }
            if let Some(older) = held.session {
                self.refuse(
                    older,
                    proto::RefusalReason::Fenced,
                    "a newer session of this instance exists",
                    0,
                );
            }
        }
        let claim = Claim { instance: instance.to_vec(), session: Some(session), released: now };
        self.claims.insert(Arc::clone(&peer.name), claim);
        true
    }

    /// Whoever holds an older certificate of this node is out, whatever it has said so far; the new one is
    /// no duplicate of it.
    pub(super) fn replace_generation(&mut self, node: &Origin, generation: u32) {
        self.generations.insert(Arc::clone(node), generation);
        let older = |link: &Link| {
            let theirs = link.peer.role == Role::Node && link.peer.name == *node;
            theirs && link.peer.generation < generation && link.phase != Phase::Closing
        };
        let out: Vec<SessionId> =
            self.links.iter().filter(|(_, link)| older(link)).map(|(session, _)| *session).collect();
        for session in out {
            self.refuse(session, proto::RefusalReason::Revoked, REPLACED, 0);
        }
        self.claims.remove(node);
    }

    /// The peer refused this side: remembered as a condition, because somebody has to do something.
    fn on_refused(&mut self, session: SessionId, refusal: proto::Refusal) {
        let kind = match refusal.reason() {
            proto::RefusalReason::DuplicateIdentity => "DuplicateIdentity",
            _ => "LinkRefused",
        };
        if refusal.reason() != proto::RefusalReason::Fenced {
            self.set_condition(kind, self.config.name.to_string(), refusal.message.clone());
        }
        let link = self.links.get_mut(&session).expect("the link that was refused");
        link.phase = Phase::Closing;
        self.output(session, Output::Close(CloseReason::Refused(refusal)));
    }

    /// Says why, then closes. Whatever the peer still sends is ignored.
    pub(super) fn refuse(
        &mut self,
        session: SessionId,
        reason: proto::RefusalReason,
        message: &str,
        retry_after_ms: u32,
    ) {
        self.stats.refuse(reason.as_str_name());
        let refusal = proto::Refusal { reason: reason as i32, message: message.to_owned(), retry_after_ms };
        self.send_control(session, proto::control::Message::Refusal(refusal.clone()));
        self.flush_link(session);
        let link = self.links.get_mut(&session).expect("a link to refuse");
        link.phase = Phase::Closing;
        let peer = Arc::clone(&link.peer.name);
        self.output(session, Output::Close(CloseReason::Refused(refusal)));
        if let Some(claim) = self.claims.get_mut(&peer)
            && claim.session == Some(session)
        {
            claim.session = None;
            claim.released = self.now.mono;
        }
    }

    /// The established link of a node, at a hub.
    pub(super) fn link_of(&self, node: &str) -> Option<SessionId> {
        let session = self.claims.get(node)?.session?;
        let link = self.links.get(&session)?;
        (link.phase == Phase::Established).then_some(session)
    }

    /// A declare binds a number, if this peer may speak of that source.
    fn on_declare(&mut self, session: SessionId, record: Record) -> Result<(), String> {
        let number = record.header.source;
        let declare: proto::Declare =
            codec::decode(record.body).map_err(|error| format!("a declare that is none: {error}"))?;
        let Some(class) = u8::try_from(declare.class).ok().and_then(Class::from_u8) else {
            return Err(format!("a source of class {}", declare.class));
        };
        let link = &self.links[&session];
        if link.imports.len() >= SOURCES_MAX || number == 0 || link.imports.contains_key(&number) {
            return Err(format!("source number {number} declared twice, or too many sources"));
        }
        let import = match self.authorize(&link.peer.clone(), &declare, class) {
            Ok(import) => import,
            Err(what) => {
                self.stats.drop(super::DropReason::NotAuthorized);
                let peer = Arc::clone(&self.links[&session].peer.name);
                self.set_condition("NotAuthorized", peer.to_string(), what.clone());
                self.refuse(session, proto::RefusalReason::NotAuthorized, &what, 0);
                return Ok(());
            }
        };
        let link = self.links.get_mut(&session).expect("looked at it");
        link.imports.insert(number, import);
        Ok(())
    }

    /// Default deny: what is not listed here, nobody may send.
    fn authorize(&mut self, peer: &Peer, declare: &proto::Declare, class: Class) -> Result<Import, String> {
        let origin: Origin = declare.origin.as_str().into();
        let name: Arc<str> = declare.name.as_str().into();
        let refused = || {
            Err(format!(
                "{} may not send source origin={:?} kind={} name={:?}",
                peer.name, declare.origin, declare.kind, declare.name
            ))
        };
        let from_node = self.config.is_hub() && peer.role == Role::Node && origin == peer.name;
        let from_hub = !self.config.is_hub() && peer.role == Role::Hub;
        let to_me = from_hub && origin == self.own;
        let imports = &self.config.imports;
        let taken = match declare.kind {
            2 => imports.has_stream(&name),
            3 => imports.has_space(&name),
            _ => true,
        };
        let import = match declare.kind {
            1 if from_node || to_me => Ok(Import::Live { origin }),
            2 if from_node => {
                codec::topic::validate_topic(&name).map_err(|error| format!("stream name: {error}"))?;
                Ok(Import::Log { origin, stream: name, class })
            }
            2 if from_hub && origin.is_empty() && *name == *format!("down/{}", self.config.name) => {
                Ok(Import::Log { origin, stream: name, class })
            }
            3 if from_node && super::NODE_SPACES.contains(&&*name) => {
                Ok(Import::State { space: self.space_of(&origin, &name) })
            }
            3 if from_hub && origin.is_empty() && &*name == "fleet" => {
                Ok(Import::State { space: self.space_of(&origin, &name) })
            }
            1..=3 => refused(),
            _ => Ok(Import::Unknown),
        };
        // What configuration does not take is skipped, and stays unacknowledged with its sender.
        import.map(|import| if taken { import } else { Import::Unknown })
    }

    pub(super) fn send_control(&mut self, session: SessionId, message: proto::control::Message) {
        let body = codec::encode(&proto::Control { message: Some(message) });
        let header = RecordHeader {
            kind: Kind::CONTROL,
            class: Class::Control as u8,
            flags: Flags::default(),
            source: 0,
            epoch: 0,
            seq: 0,
            aux: 0,
        };
        if let Some(link) = self.links.get_mut(&session) {
            link.push(Class::Control, Record { header, body });
            self.pump_links.insert(session);
        }
    }

    /// Hands what a link has collected to its writer.
    pub(super) fn flush_link(&mut self, session: SessionId) {
        let Some(link) = self.links.get_mut(&session) else { return };
        let pending = std::mem::take(&mut link.pending);
        for (class, records) in pending {
            self.stats.link_records_out += records.len() as u64;
            self.output(session, Output::Send { class, records });
        }
    }
}
