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
//!
//! Every link has an end *above*, nearer to the tier, and one *below*. A node dials above; what dials a hub
//! or a relay is below. A relay is a node with both: what comes from below it keeps and sends above with its
//! origin, and the other way round. Nothing is sent to where it came from.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use codec::{Class, Flags, Kind, Record, RecordHeader, proto};

use super::{
    Core, Party, claims, credit,
    event::{CloseReason, LinkOpen, Origin, Output, Peer, Role, SessionId},
    export_scope::PartExport,
    few::Few,
    forwards::Behind,
    ledger::Effect,
    log::LogId,
    space::Pair,
};
use crate::{limits, store::SourceKind};

/// Protocol versions that this build speaks.
const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;

/// What a build can do beyond its protocol version: one bit, and its name in Hello and Welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Feature(u8);

/// The peer understands presence, fences, the list of forwards, and origins that are not its own.
pub(super) const FEATURE_RELAY: Feature = Feature(1);
/// The peer grants windows and keeps to those that it is granted.
pub(super) const FEATURE_CREDIT: Feature = Feature(2);
/// The peer above, a tier, applies no intents: they are refused where they are asked.
pub(super) const FEATURE_NO_INTENTS: Feature = Feature(4);
/// What this build can do, or understands.
const FEATURES: [(&str, Feature); 3] =
    [("relay", FEATURE_RELAY), ("credit", FEATURE_CREDIT), ("no-intents", FEATURE_NO_INTENTS)];

/// A number that the peer declared for a source of its own.
pub(super) type LinkSource = u32;

/// Where the peer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// Nearer to the tier: it was dialled.
    Above,
    /// A node, or a relay with what is behind it: it dialled.
    Below,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    AwaitingHello,
    /// Hello came to a tier: its node is being adopted.
    Adopting,
    /// Hello came; Welcome waits for the disk.
    Greeting,
    AwaitingWelcome,
    Established,
    /// A refusal was sent; whatever still arrives is ignored.
    Closing,
}

/// One end of a link. A hub has one for each of very many nodes, most of them idle: what only few need is
/// boxed, and its maps hold no more than they must.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) peer: Peer,
    pub(super) phase: Phase,
    pub(super) side: Side,
    /// What both ends can do.
    features: u8,
    /// What it exports may have changed since its exports were completed.
    pub(super) exports_changed: bool,
    /// Whom a peer below may speak for beside itself, if anybody.
    pub(super) behind: Option<Box<Behind>>,
    /// Nodes that are reached by this link now.
    pub(super) present: Few<Origin, ()>,
    /// Requests that went this way and wait for their answers.
    pub(super) asked: BTreeSet<u64>,
    /// What the peer held when the session began, of what may still be exported to it.
    pub(super) peer_marks: Vec<proto::LogMark>,
    pub(super) peer_positions: Vec<proto::StatePosition>,
    /// Bytes that may be in flight, as the peer grants them; and those that are.
    pub(super) window: proto::Window,
    pub(super) in_flight_bytes: usize,
    /// The window that the peer was granted.
    pub(super) granted: proto::Window,
    /// Bytes in its outbox.
    pub(super) queued: usize,
    next_number: u32,
    /// Numbers that this side declared for its live sources.
    live: Few<(Origin, Class), u32>,
    pub(super) logs: Few<LogId, LogExport>,
    pub(super) spaces: Few<usize, StateExport>,
    /// Of a node's link: its part of `fleet`.
    pub(super) part: Option<PartExport>,
    pub(super) imports: Few<LinkSource, Import>,
    /// Records of sources that are parts of a space: received, and durable.
    pub(super) part_records: Few<LinkSource, (u64, u64)>,
    /// The run of the owner of each space that the peer sends, until it is declared.
    pub(super) runs: Few<(Origin, Arc<str>), u64>,
    /// Sources of the peer whose durable position it has not been told.
    pub(super) owed: Few<LinkSource, ()>,
    /// Sources of the peer of which it was told to send no more for now.
    pub(super) holding: Few<LinkSource, ()>,
    pending: Few<Class, Vec<Record>>,
    /// What came before Welcome: classes overtake control, because each has a stream of its own.
    early: Vec<Record>,
    early_bytes: usize,
    /// Hello or Welcome waits until what earlier sessions brought is durable.
    pub(super) greeting: Option<Greeting>,
}

/// What this side says first. It names positions, and they must be all that is held: what an earlier session
/// brought and the disk does not have yet would be taken for what this one sends, even if the peer has
/// another history since.
#[derive(Debug)]
pub(super) enum Greeting {
    Hello,
    Welcome(Box<proto::Hello>),
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
    pub(super) in_flight: InFlight<u64>,
    /// A read is under way.
    pub(super) reading: bool,
    /// The peer takes no more of it for now.
    pub(super) held: bool,
    /// The peer's mark is being compared with a record in the store.
    pub(super) checking: Option<proto::LogMark>,
    /// What the peer acknowledged last, and whether that is on disk.
    pub(super) mark: Option<proto::Mark>,
    pub(super) mark_is_new: bool,
}

/// What was sent and not acknowledged, in order of its positions.
#[derive(Debug)]
pub(super) struct InFlight<P> {
    records: VecDeque<(P, usize)>,
    pub(super) bytes: usize,
}

impl<P> Default for InFlight<P> {
    fn default() -> Self {
        Self { records: VecDeque::new(), bytes: 0 }
    }
}

impl<P: PartialOrd> InFlight<P> {
    pub(super) fn sent(&mut self, at: P, bytes: usize) {
        self.records.push_back((at, bytes));
        self.bytes += bytes;
    }

    /// The peer holds everything up to here: the bytes that are no longer in flight.
    pub(super) fn acknowledged(&mut self, upto: &P) -> usize {
        let before = self.bytes;
        while self.records.front().is_some_and(|(at, _)| at <= upto) {
            self.bytes -= self.records.pop_front().expect("looked at the front").1;
        }
        if self.records.is_empty() {
            // Most links are idle for long, and there are many.
            self.records = VecDeque::new();
        }
        before - self.bytes
    }
}

/// A space on its way to the peer.
#[derive(Debug)]
pub(super) struct StateExport {
    pub(super) number: u32,
    /// Sent up to here, and to this local revision.
    pub(super) position: Pair,
    pub(super) cursor: u64,
    pub(super) in_flight: InFlight<Pair>,
    /// The peer had not heard of it when the session began.
    pub(super) unknown: bool,
    /// A barrier is owed once everything up to this pair is sent.
    pub(super) barrier: Option<Pair>,
    /// What the peer acknowledged last, and whether that is on disk.
    pub(super) mark: Pair,
    pub(super) mark_is_new: bool,
}

impl StateExport {
    /// The owner has begun a new incarnation, and nothing of it is sent. Its barrier, owed once it is durable,
    /// must say so by name even where no entry is left to go before it: only that takes away at the receiver
    /// what was deleted.
    pub(super) fn begin_anew(&mut self, incarnation: u64) {
        self.position = (incarnation, 0);
        self.barrier = None;
    }
}

/// What a number of the peer's stands for.
#[derive(Debug, Clone)]
pub(super) enum Import {
    Log {
        origin: Origin,
        stream: Arc<str>,
        class: Class,
        /// The history that its last record belongs to.
        log: Option<LogId>,
    },
    State {
        space: usize,
        /// The process of the owner that writes it, as was said at hello; 0 = not said.
        run: u64,
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
            side: if open.dialler { Side::Above } else { Side::Below },
            features: 0,
            exports_changed: true,
            behind: None,
            present: Few::new(),
            asked: BTreeSet::new(),
            peer_marks: Vec::new(),
            peer_positions: Vec::new(),
            window: credit::UNTOLD,
            in_flight_bytes: 0,
            granted: credit::UNTOLD,
            queued: 0,
            next_number: 0,
            live: Few::new(),
            logs: Few::new(),
            spaces: Few::new(),
            part: None,
            imports: Few::new(),
            part_records: Few::new(),
            runs: Few::new(),
            owed: Few::new(),
            holding: Few::new(),
            pending: Few::new(),
            early: Vec::new(),
            early_bytes: 0,
            greeting: None,
        }
    }

    /// The key of what is stored about this peer as a receiver: replicas of a tier are one.
    pub(super) fn receiver(&self) -> &str {
        if self.peer.role == Role::Hub { "" } else { &self.peer.name }
    }

    /// As [`Self::receiver`], to keep.
    pub(super) fn receiver_name(&self) -> Arc<str> {
        if self.peer.role == Role::Hub { "".into() } else { Arc::clone(&self.peer.name) }
    }

    /// An origin, without another copy of a name that is held already.
    pub(super) fn origin_named(&self, origin: &str) -> Origin {
        if *origin == *self.peer.name { Arc::clone(&self.peer.name) } else { origin.into() }
    }

    /// Whether both ends can do this.
    pub(super) fn can(&self, feature: Feature) -> bool {
        self.features & feature.0 != 0
    }

    /// Whether the peer may speak for this node beside itself.
    pub(super) fn speaks_for(&self, node: &str) -> bool {
        self.behind.as_ref().is_some_and(|behind| behind.contains(node))
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
        self.pending.get_or_insert_with(class, Vec::new).push(record);
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
        self.sessions.insert(open.session, Party::Link);
        self.links.insert(open.session, Box::new(Link::new(&open)));
        let among = if open.dialler { &mut self.above } else { &mut self.strangers };
        among.insert(open.session);
        if self.draining.is_some() {
            self.refuse(open.session, proto::RefusalReason::Overloaded, "this process is stopping", 1000);
        } else if open.dialler {
            self.greet_once_durable(open.session, Greeting::Hello);
        } else if !self.config.is_hub() && !self.config.relay {
            self.refuse(open.session, proto::RefusalReason::NotAuthorized, "this node is no relay", 0);
        }
    }

    pub(super) fn greet_once_durable(&mut self, session: SessionId, greeting: Greeting) {
        self.links.get_mut(&session).expect("a link to greet").greeting = Some(greeting);
        if self.refusing {
            // The disk may be full for long; a link is worth more than what this guards against.
            self.greet(session);
        } else {
            self.ledger.after(Effect::Greet(session));
        }
    }

    /// Says what was to be said first, unless the link is over by now.
    pub(super) fn greet(&mut self, session: SessionId) {
        let Some(link) = self.links.get_mut(&session) else { return };
        match link.greeting.take().filter(|_| link.phase != Phase::Closing) {
            Some(Greeting::Hello) => {
                let hello = self.hello(session);
                self.send_control(session, proto::control::Message::Hello(hello));
            }
            Some(Greeting::Welcome(hello)) => self.welcome(session, *hello),
            None => {}
        }
    }

    /// The store takes no writes: nobody knows when what is waited for will be durable.
    pub(super) fn greet_all(&mut self) {
        for session in self.links.keys().copied().collect::<Vec<_>>() {
            self.greet(session);
        }
    }

    pub(super) fn on_link_closed(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        self.pump_links.remove(&session);
        let Some(mut link) = self.links.remove(&session) else { return };
        self.links_queued -= link.queued;
        self.established -= usize::from(link.phase == Phase::Established);
        for among in [&mut self.above, &mut self.strangers, &mut self.speakers, &mut self.marks_moved] {
            among.remove(&session);
        }
        self.write_marks_of(&link);
        if self.above.is_empty() {
            self.budgets.rest();
        }
        self.release_all(session, &std::mem::take(&mut link.present));
        self.fail_all_requests(&std::mem::take(&mut link.asked));
        self.release_later(session, &link.peer.name);
        self.grant_anew();
        self.has_left(session);
    }

    pub(super) fn on_link_received(&mut self, session: SessionId, records: Vec<Record>) {
        if let Some(link) = self.links.get(&session).filter(|_| self.config.shared) {
            self.ledger.enter(&link.peer.name);
        }
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
        let side = self.links[&session].side;
        match (control.message, phase) {
            (Some(Message::Hello(hello)), Phase::AwaitingHello) => self.on_hello(session, hello),
            (Some(Message::Welcome(welcome)), Phase::AwaitingWelcome) => self.on_welcome(session, welcome),
            (Some(Message::Refusal(refusal)), _) => {
                self.on_refused(session, refusal);
                Ok(())
            }
            (Some(Message::Ack(ack)), Phase::Established) => {
                self.on_ack(session, &ack);
                Ok(())
            }
            (Some(Message::Presence(presence)), Phase::Established) if side == Side::Below => {
                self.on_presence(session, &presence)
            }
            (Some(Message::Fence(fence)), Phase::Established) if side == Side::Above => {
                self.on_fence(fence);
                Ok(())
            }
            (Some(Message::Forwards(told)), Phase::Established) if side == Side::Above => {
                self.on_forwards(&told.forwards);
                Ok(())
            }
            (Some(Message::Drain(_)), _) => {
                let reason = CloseReason::Shutdown;
                self.output(session, Output::Close(reason));
                Ok(())
            }
            // Heartbeats end in the link task; what a newer peer says is skipped.
            (Some(Message::Heartbeat(_) | Message::HeartbeatAck(_)) | None, _) => Ok(()),
            (Some(_), _) => Err("a control message out of order".to_owned()),
        }
    }

    /// What this side says that it can do. Who is above says what it does not, if it does not.
    fn features(&self) -> Vec<String> {
        let says = |feature: Feature| feature != FEATURE_NO_INTENTS || self.config.shared;
        let said = FEATURES.into_iter().filter(|(_, feature)| says(*feature));
        said.map(|(name, _)| name.to_owned()).collect()
    }

    fn hello(&mut self, session: SessionId) -> proto::Hello {
        // A wall clock that was set back must not make a newer dial look older.
        self.last_claim = self.now.wall_us.max(self.last_claim + 1);
        let window = self.grant(session);
        let link = &self.links[&session];
        proto::Hello {
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
            features: self.features(),
            instance: bytes::Bytes::copy_from_slice(&self.config.instance),
            dictionaries: Vec::new(),
            logs: self.log_offers(link),
            states: self.state_offers(link),
            marks: self.marks_for(link),
            positions: self.positions_for(link),
            software: concat!("octobus/", env!("CARGO_PKG_VERSION")).to_owned(),
            claim: self.last_claim,
            window: Some(window),
        }
    }

    fn on_hello(&mut self, session: SessionId, hello: proto::Hello) -> Result<(), String> {
        if hello.protocol_max < *PROTOCOL.start() || hello.protocol_min > *PROTOCOL.end() {
            let (min, max) = (hello.protocol_min, hello.protocol_max);
            let what = format!(
                "this side speaks protocol {PROTOCOL:?}, the node {min} to {max}: upgrade the older one"
            );
            self.refuse(session, proto::RefusalReason::ProtocolVersion, &what, 0);
            return Ok(());
        }
        if hello.instance.len() != 16 {
            return Err("an instance that has not 16 bytes".to_owned());
        }
        self.check_positions(&hello.positions)?;
        let peer = self.links[&session].peer.clone();
        if peer.role != Role::Node {
            self.refuse(session, proto::RefusalReason::NotAuthorized, "only nodes link here", 0);
            return Ok(());
        }
        let present = proto::Present {
            name: peer.name.to_string(),
            linked: true,
            instance: hello.instance.clone(),
            generation: peer.generation,
            claim: hello.claim,
            via: Vec::new(),
        };
        let admitted = self.admit(&peer).and_then(|()| self.claim(session, &peer.name, &present));
        if let Err(refusal) = admitted {
            self.refuse_with(session, refusal);
            return Ok(());
        }
        self.strangers.remove(&session);
        if self.config.shared {
            self.adopt(session, peer, hello);
            return Ok(());
        }
        self.links.get_mut(&session).expect("the link that said hello").phase = Phase::Greeting;
        self.greet_once_durable(session, Greeting::Welcome(Box::new(hello)));
        Ok(())
    }

    fn check_positions(&self, positions: &[proto::StatePosition]) -> Result<(), String> {
        let greatest = positions.iter().map(|at| at.incarnation.max(at.reached_incarnation)).max();
        match greatest.filter(|greatest| !self.is_plausible(*greatest)) {
            Some(greatest) => Err(format!("a position of the far future: incarnation {greatest}")),
            None => Ok(()),
        }
    }

    fn welcome(&mut self, session: SessionId, hello: proto::Hello) {
        let behind = self.behind(&self.links[&session].peer.name);
        let window = self.grant(session);
        let link = self.links.get_mut(&session).expect("the link that said hello");
        link.features = common(&hello.features);
        let forwards = behind.list();
        self.stand_behind(session, behind);
        let link = &self.links[&session];
        let welcome = proto::Welcome {
            protocol: hello.protocol_max.min(*PROTOCOL.end()),
            features: self.features(),
            time_us: self.now.wall_us,
            marks: self.marks_for(link),
            positions: self.positions_for(link),
            logs: self.log_offers(link),
            states: self.state_offers(link),
            instance: bytes::Bytes::copy_from_slice(&self.config.instance),
            tier: self.config.tier.to_string(),
            forwards,
            window: Some(window),
        };
        self.send_control(session, proto::control::Message::Welcome(welcome));
        self.establish(session, hello.marks, hello.positions, &hello.states, hello.window);
    }

    fn on_welcome(&mut self, session: SessionId, welcome: proto::Welcome) -> Result<(), String> {
        if !PROTOCOL.contains(&welcome.protocol) {
            return Err(format!("the peer chose protocol {}", welcome.protocol));
        }
        self.check_positions(&welcome.positions)?;
        self.conditions.remove(&("DuplicateIdentity", self.config.name.to_string()));
        self.conditions.remove(&("LinkRefused", self.config.name.to_string()));
        let link = self.links.get_mut(&session).expect("the link that was welcomed");
        link.features = common(&welcome.features);
        if link.can(FEATURE_RELAY) {
            self.on_forwards(&welcome.forwards);
        }
        self.establish(session, welcome.marks, welcome.positions, &welcome.states, welcome.window);
        let link = self.links.get_mut(&session).expect("just established");
        let early = std::mem::take(&mut link.early);
        if link.can(FEATURE_RELAY) {
            self.tell_presence(session);
        }
        self.on_link_received(session, early);
        Ok(())
    }

    fn establish(
        &mut self,
        session: SessionId,
        marks: Vec<proto::LogMark>,
        positions: Vec<proto::StatePosition>,
        states: &[proto::StateOffer],
        window: Option<proto::Window>,
    ) {
        let runs = self.runs_of(session, states);
        let link = self.links.get_mut(&session).expect("the link that said hello");
        link.phase = Phase::Established;
        self.established += 1;
        link.peer_marks = marks;
        link.peer_positions = positions;
        link.runs = runs;
        if let Some(window) = window.filter(|_| link.can(FEATURE_CREDIT)) {
            link.window = window;
        }
        link.exports_changed = true;
        self.add_missing_exports(session);
        let link = self.links.get_mut(&session).expect("just established");
        if link.part.is_some() {
            // Of spaces, only its part is for a peer below.
            link.peer_positions = Vec::new();
        }
        self.pump_links.insert(session);
        self.grant_anew();
        self.grant_if_outdated(session);
    }

    /// The run of each space that a peer offers.
    fn runs_of(&self, session: SessionId, states: &[proto::StateOffer]) -> Few<(Origin, Arc<str>), u64> {
        let link = &self.links[&session];
        let offered = states.iter().take(super::authorize::SOURCES_BEHIND_MAX);
        let name =
            |offer: &proto::StateOffer| (link.origin_named(&offer.origin), self.known_name(&offer.space));
        offered.filter(|offer| offer.run != 0).map(|offer| (name(offer), offer.run)).collect()
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
        self.close_link(session);
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
        self.refuse_with(session, claims::refusal(reason, message.to_owned(), retry_after_ms));
    }

    pub(super) fn refuse_with(&mut self, session: SessionId, refusal: proto::Refusal) {
        self.stats.refuse(refusal.reason().as_str_name());
        self.send_control(session, proto::control::Message::Refusal(refusal.clone()));
        self.flush_link(session);
        let link = self.close_link(session);
        let (present, asked) = (std::mem::take(&mut link.present), std::mem::take(&mut link.asked));
        self.output(session, Output::Close(CloseReason::Refused(refusal)));
        self.release_all(session, &present);
        self.fail_all_requests(&asked);
    }

    /// Whatever the peer still sends is ignored.
    fn close_link(&mut self, session: SessionId) -> &mut Link {
        let link = self.links.get_mut(&session).expect("a link to close");
        self.established -= usize::from(link.phase == Phase::Established);
        link.phase = Phase::Closing;
        link
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
        if link.side == Side::Above && !pending.is_empty() {
            for (class, records) in pending.iter() {
                let bytes = records.iter().map(|record| record.wire_len() as u64).sum();
                self.budgets.spend.by_link(self.now, link.receiver(), *class, bytes);
            }
            self.cursors_moved();
        }
        for (class, records) in pending {
            self.stats.link_records_out += records.len() as u64;
            self.output(session, Output::Send { class, records });
        }
    }
}

/// What the peer names and this build can do as well.
fn common(theirs: &[String]) -> u8 {
    let both = FEATURES.into_iter().filter(|(name, _)| theirs.iter().any(|named| named == name));
    both.fold(0, |bits, (_, feature)| bits | feature.0)
}
