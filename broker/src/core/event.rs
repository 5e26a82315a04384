//! What goes into a [`Core`](super::Core) and what comes out of it.
//!
//! Events are past tense, actions imperative. Both are plain data, so that a simulation can record,
//! reorder and replay them.

pub mod tier;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Filter, FrameView, Kind, Record, proto};

use crate::store::Damage;

/// The time at one turn of the driver. The core never reads a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time since the process started.
    pub mono: Duration,
    /// Wall clock, microseconds since 1970; never behind the last persisted value.
    pub wall_us: u64,
    /// Whether the wall clock is known to be right. Nothing is deleted for age on untrusted time.
    pub trusted: bool,
}

/// Whose topic space: a node's name, or the empty string for the tier.
pub type Origin = Arc<str>;

/// Log sequence number of a journal group. Counts groups, starting at 1.
pub type Lsn = u64;

/// One connection of a client or of a link. Never reused within a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// A subscription's number within its session; chosen by the front.
pub type SubId = u32;

/// A read that the core asked for.
pub type ReadId = u64;

/// A command whose answer somebody waits for.
pub type CommandId = u64;

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// A client's connection has authenticated.
    SessionOpened(SessionOpen),
    /// A client published; the messages are in the order they were received.
    Published { session: SessionId, messages: Vec<Publish> },
    /// A client subscribed. Answered by [`Reply::Subscribed`] with the same token.
    Subscribed { session: SessionId, token: u32, subscriptions: Vec<Subscription> },
    /// A client unsubscribed. Answered by [`Reply::Unsubscribed`] with the same token.
    Unsubscribed { session: SessionId, token: u32, which: Vec<Unsubscribe> },
    /// A client acknowledged deliveries, or released QoS 2 publishes.
    Acked { session: SessionId, acks: Vec<ClientAck> },
    /// The writer of a session is done with outputs of this cost (see [`Output::cost`]).
    Sent { session: SessionId, bytes: usize },
    /// A client changed how long its session outlives its connection (DISCONNECT of MQTT 5); 0 = not at all.
    ExpiryChanged { session: SessionId, expiry_s: u32 },
    /// A connection ended. Not clean: the will is published.
    SessionClosed { session: SessionId, clean: bool },
    /// A link's transport is up and its peer's certificate verified.
    LinkOpened(LinkOpen),
    /// A link delivered records of one batch.
    LinkReceived { session: SessionId, records: Vec<Record> },
    /// A link's transport ended.
    LinkClosed { session: SessionId },
    /// Every group up to this lsn is durable. The only place where acknowledgements are born.
    Persisted(Lsn),
    /// A read came back: records of one Log in order, starting at the asked seq or at the next that
    /// exists, and where to read on; see [`Store::read`](crate::store::Store::read).
    ReadDone { read: ReadId, records: Vec<Record>, next: u64 },
    /// The store cannot take writes (full disk, I/O error). Publishes are refused until it can.
    StoreRefused { lsn: Lsn, reason: String },
    /// The store's space comes to an end. What adds data is refused until [`Event::StoreAmple`]; what frees
    /// space or moves a position goes on.
    StoreLow { reason: String },
    /// The store has room again.
    StoreAmple,
    /// The store found something on disk damaged; what was in it is lost, everything else goes on.
    StoreDamaged(Damage),
    /// Administration and modules. Answered by [`Action::Respond`].
    Commanded { command: Command, id: CommandId },
    /// In a tier: something happened to what the replicas share.
    Tier(tier::News),
    /// The deadline that [`Core::deadline`](super::Core::deadline) named has passed.
    TimerFired,
}

/// Do something. The driver performs actions in order.
#[derive(Debug)]
pub enum Action {
    /// Make this group durable; then say [`Event::Persisted`].
    Persist(Group),
    /// Put this into the session's outbox.
    Output { session: SessionId, output: Output },
    /// Read a Log from the store; then say [`Event::ReadDone`].
    Read(ReadRequest),
    /// Answer a command.
    Respond { id: CommandId, response: Response },
    /// In a tier: ask what the replicas share.
    Tier(tier::Ask),
}

/// Every durable effect of one `apply`: one atomic journal group. In a tier, of one `apply` and one node.
#[derive(Debug, Clone)]
pub struct Group {
    /// Consecutive, starting after the recovered one.
    pub lsn: Lsn,
    /// In a tier: the node that all of it belongs to; groups of different nodes are durable in any order. Empty
    /// for what belongs to none, and everywhere else.
    pub lane: Origin,
    /// In order of effect.
    pub records: Vec<Record>,
}

/// Which records of a Log to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRequest {
    /// Comes back in [`Event::ReadDone`].
    pub read: ReadId,
    /// The store's number of the Log.
    pub source: u32,
    /// First seq wanted. Gap records that cover it or follow it are returned in place.
    pub from: u64,
    /// Stop after this many bytes of records; at least one record is returned, unless some were left out.
    pub bytes_max: usize,
    /// Records whose topics match none of these may be left out, gaps never. `None`: all are wanted.
    pub wanted: Option<Arc<[Filter]>>,
}

impl ReadRequest {
    /// Whether the record must be returned. A frame that cannot be read is left to who asks.
    #[must_use]
    pub fn wants(&self, record: &Record) -> bool {
        let Some(wanted) = self.wanted.as_deref().filter(|_| record.header.kind == Kind::LOG) else {
            return true;
        };
        FrameView::parse(&record.body)
            .map_or(true, |view| wanted.iter().any(|filter| filter.matches(view.topic(), true)))
    }
}

/// A client connects.
#[derive(Debug)]
pub struct SessionOpen {
    /// From [`Handle::open_session`](crate::Handle::open_session).
    pub session: SessionId,
    /// Which front.
    pub front: Front,
    /// Identity of the session: MQTT client id. A second session of the same id takes over. NATS and
    /// internal sessions leave it empty.
    pub client_id: Arc<str>,
    /// Drop what is stored of an earlier session (MQTT 5 clean start, MQTT 3.1.1 clean session).
    pub clean_start: bool,
    /// How long the session outlives its connection, in seconds; `u32::MAX` = for ever.
    pub expiry_s: u32,
    /// Unacknowledged QoS 1 and 2 deliveries that the client allows at a time.
    pub receive_max: u16,
    /// Published if the connection ends uncleanly.
    pub will: Option<Will>,
}

/// The kind of a client session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Front {
    /// An MQTT client.
    Mqtt,
    /// A NATS client.
    Nats,
    /// A part of this process: admin, a module.
    Internal,
}

/// A client's last will.
#[derive(Debug, Clone)]
pub struct Will {
    /// What to publish.
    pub message: Publish,
    /// Wait this long for the session to come back first.
    pub delay: Duration,
}

/// A message enters the bus.
#[derive(Debug, Clone)]
pub struct Publish {
    /// Whose topic space it enters.
    pub target: Target,
    /// Encoded [`proto::Frame`]; its topic was validated by the front.
    pub frame: Bytes,
    /// 0, 1 or 2. From 1 on the message is appended to a Log and acknowledged once durable.
    pub qos: u8,
    /// MQTT packet id; 0 for QoS 0. With 0 and QoS >= 1 no acknowledgement is sent.
    pub packet_id: u16,
    /// The client says it has sent this before.
    pub dup: bool,
    /// Also set (or with an empty payload clear) the retained message of the topic.
    pub retain: bool,
    /// Topic for an answer; makes it a Live request.
    pub reply: Option<Arc<str>>,
}

/// Whose topic space a publish enters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// This broker's own: the node's on a node, the tier's on a hub.
    Own,
    /// A node's, from its hub.
    Node(Origin),
}

/// A client's interest.
#[derive(Debug, Clone)]
pub struct Subscription {
    /// Comes back in every delivery that it causes. Replaces an earlier one of the same id.
    pub id: SubId,
    /// Whose topics.
    pub origin: OriginFilter,
    /// Which topics.
    pub filter: Filter,
    /// Highest QoS of deliveries. From 1 on the session gets a cursor in each Log that can match.
    pub qos: u8,
    /// Only one member of a group gets each message (Live).
    pub group: Option<Arc<str>>,
    /// Not what this session itself published.
    pub no_local: bool,
    /// Keep the retain flag as published.
    pub retain_as_published: bool,
    /// Which retained messages to send at once.
    pub retained: RetainedOnSubscribe,
    /// A wildcard in the first level also matches `$`-topics (NATS: yes, MQTT: no).
    pub wildcard_matches_dollar: bool,
    /// MQTT 5 subscription identifier; 0 = none.
    pub identifier: u32,
}

/// Whose topics a subscription sees.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum OriginFilter {
    /// This broker's own topic space; on a node, also what comes down from the hub.
    Own,
    /// One node's, at a hub.
    Node(Origin),
    /// Every node's, at a hub.
    AnyNode,
}

/// Which retained messages a subscription asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetainedOnSubscribe {
    /// All that match.
    Send,
    /// All that match if the session did not hold this subscription before.
    SendIfNew,
    /// None.
    DoNotSend,
}

/// How a subscription is named when it ends.
#[derive(Debug, Clone)]
pub enum Unsubscribe {
    /// NATS: by number.
    Id(SubId),
    /// MQTT: by the filter's text.
    Filter(Filter),
}

/// An acknowledgement from an MQTT client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAck {
    /// PUBACK: a QoS 1 delivery is done.
    Ack(u16),
    /// PUBREC: the client holds a QoS 2 delivery.
    Rec(u16),
    /// PUBCOMP: a QoS 2 delivery is done.
    Comp(u16),
    /// PUBREL: the client releases a QoS 2 publish of its own. Answered by [`Reply::PubComp`].
    Rel(u16),
}

/// What a session's writer gets.
#[derive(Debug)]
pub enum Output {
    /// A message for a client.
    Deliver(Delivery),
    /// An answer to a client.
    Reply(Reply),
    /// Records for a link's peer, all of one class. Sent in order within the class.
    Send { class: Class, records: Vec<Record> },
    /// An entry for a State watcher.
    State(StateEvent),
    /// Finish what is queued, then close the connection.
    Close(CloseReason),
}

impl Output {
    /// Bytes this output counts for in the session's queue. The writer gives the sum back in
    /// [`Event::Sent`].
    #[must_use]
    pub fn cost(&self) -> usize {
        const FIXED: usize = 64;
        match self {
            Self::Deliver(delivery) => FIXED + delivery.frame.len(),
            Self::Reply(_) | Self::Close(_) => FIXED,
            Self::Send { records, .. } => FIXED + records.iter().map(Record::wire_len).sum::<usize>(),
            Self::State(event) => FIXED + event.cost(),
        }
    }
}

/// A message on its way to one subscription of one client.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Encoded [`proto::Frame`], shared with everybody else who gets it.
    pub frame: Bytes,
    /// Whose topic it is: relevant at a hub, where the subject names the node.
    pub origin: Origin,
    /// The subscription (of an MQTT session: one of those that match).
    pub sub: SubId,
    /// MQTT 5 identifiers of all of the session's subscriptions that match.
    pub identifiers: Option<Box<[u32]>>,
    /// QoS of this delivery.
    pub qos: u8,
    /// MQTT packet id; 0 for QoS 0.
    pub packet_id: u16,
    /// Delivered before, not acknowledged.
    pub dup: bool,
    /// The retain flag to show.
    pub retain: bool,
    /// Where it stands in its Log, if it came from one.
    pub position: Option<Position>,
    /// Topic for the answer.
    pub reply: Option<Arc<str>>,
    /// Not a message: nobody answers this request. The frame's headers say why.
    pub no_responders: bool,
}

/// A place in a Log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Epoch.
    pub epoch: u64,
    /// Sequence number.
    pub seq: u64,
}

/// An answer to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The session is open. For a client: CONNACK may be sent.
    Opened { session_present: bool },
    /// A QoS 1 publish is durable.
    PubAck(u16),
    /// A QoS 2 publish is durable and will not be accepted twice.
    PubRec(u16),
    /// A QoS 2 publish of the client is released (or was not known).
    PubComp(u16),
    /// Second step of a QoS 2 delivery: send PUBREL.
    PubRel(u16),
    /// A publish was not taken; nothing of it is kept. `packet_id` 0: no acknowledgement is owed.
    Refused { packet_id: u16, qos: u8, reason: PublishRefusal },
    /// For each subscription in order: the granted QoS.
    Subscribed { token: u32, granted: Vec<u8> },
    /// For each in order: whether it existed.
    Unsubscribed { token: u32, existed: Vec<bool> },
}

/// Why a publish was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PublishRefusal {
    /// The store refuses writes; the client should try again later.
    #[error("the store takes no writes now (disk full or failing)")]
    StoreUnavailable,
    /// The stream's quota is used up and its policy is to reject.
    #[error("the stream's quota is used up")]
    Quota,
    /// A hub was asked to send to a node that is not enrolled.
    #[error("no node of that name is enrolled")]
    NoSuchNode,
    /// A hub was asked to send to a node that is not linked, live.
    #[error("the node is offline")]
    NodeOffline,
    /// The frame is not one (a front's mistake) or exceeds the limit.
    #[error("the message is malformed or too large")]
    BadFrame,
}

/// Why a connection is to be closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// A newer session of the same client id or instance exists.
    TakenOver,
    /// The client does not read what it asked for.
    SlowConsumer,
    /// This process stops.
    Shutdown,
    /// The peer broke the protocol; the text says how.
    Protocol(String),
    /// A link peer was refused: a `Refusal` was sent before this.
    Refused(proto::Refusal),
    /// An administrator or a change of identity ended the session.
    Revoked,
}

/// A link comes up.
#[derive(Debug)]
pub struct LinkOpen {
    /// From [`Handle::open_session`](crate::Handle::open_session).
    pub session: SessionId,
    /// Who the verified certificate says the peer is.
    pub peer: Peer,
    /// This side dialled: it says Hello.
    pub dialler: bool,
}

/// The peer of a link, from its verified certificate and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Node or replica name.
    pub name: Origin,
    /// What the certificate says it may be.
    pub role: Role,
    /// Enrolment generation of a node; 0 for a hub.
    pub generation: u32,
}

/// Roles that stand in certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// An edge node.
    Node,
    /// A replica of the tier.
    Hub,
}

/// Administration and modules.
#[derive(Debug)]
pub enum Command {
    /// Read one key, as far as it is durable.
    StateGet { origin: Origin, space: Arc<str>, key: String },
    /// List keys by prefix, in order, starting after `after`, at most `limit`; as they are durable now, or
    /// were at a revision that the space's change window reaches ([`Response::TooOld`] if it does not). A
    /// further page of the same list asks for the revision of the first.
    StateList {
        origin: Origin,
        space: Arc<str>,
        prefix: String,
        after: Option<String>,
        limit: usize,
        at: Option<u64>,
    },
    /// Write keys of spaces this broker owns, all or none, in one group. Answered once durable. No key may
    /// stand there twice.
    StateWrite(Vec<StateOp>),
    /// Send [`Output::State`] to this session: all that match now, `Synced`, then changes; or changes alone,
    /// beginning with revision `from`. A watch that falls behind what is known ends with
    /// [`StateEvent::TooOld`].
    StateWatch {
        session: SessionId,
        origin: Origin,
        space: Arc<str>,
        /// Keys that begin with any of them.
        prefixes: Vec<String>,
        from: Option<u64>,
        /// Show with each change what was there before: only with a change window.
        with_previous: bool,
    },
    /// Ask the owner of a space to change it: a node asks the tier (the empty origin), a hub a node. Answered
    /// once the question is durable. What becomes of it is State of the owner: key
    /// `intent-result/<node>/<id>` of `fleet`, or `intent-result/<id>` of the node's `status`.
    Intend { owner: Origin, intent: Intent },
    /// This broker has listed the source of its space `fleet` completely: what its receivers hold of an older
    /// incarnation, and was not told again, may go. Answered once durable.
    StateBarrier { space: Arc<str> },
    /// Which Logs there are; older histories of a stream stand before its current one.
    LogList { origin: Option<Origin> },
    /// Read a Log: the history that had this epoch, or the current one.
    LogRead { origin: Origin, stream: Arc<str>, epoch: Option<u64>, from: u64, bytes_max: usize },
    /// Find the seq from which on to read a Log for what happened from this time on (its frames' time).
    LogSeek { origin: Origin, stream: Arc<str>, epoch: Option<u64>, time_us: u64 },
    /// Counters, gauges, sessions.
    Stats,
    /// Connected clients and links.
    Sessions,
    /// Standing conditions (DuplicateIdentity, StoreUnavailable, ...).
    Conditions,
    /// Set or clear a condition from outside the core.
    SetCondition { kind: &'static str, subject: String, message: Option<String> },
    /// A node was enrolled anew: close every link of an older generation, and let none in again.
    CloseNode { node: Origin, generation: u32 },
    /// Of a relay: whom it may forward for, and what their certificates must be.
    Forwards,
    /// Refuse new sessions, tell the existing ones to go, links in waves; answer once they are gone and all is
    /// durable. What is left after this time is closed as it is.
    Drain { within: Duration },
}

/// One write of a [`Command::StateWrite`].
#[derive(Debug, Clone)]
pub struct StateOp {
    /// A space this broker owns.
    pub space: Arc<str>,
    /// The key; a topic by form.
    pub key: String,
    /// What to do with it.
    pub change: StateChange,
    /// What must hold for the whole write to happen.
    pub expect: Expect,
}

/// What the owner of a space is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// Names the answer: 1 to 64 letters, digits, dots, hyphens and underscores, never used before.
    pub id: String,
    /// A space of the owner.
    pub space: Arc<str>,
    /// The key.
    pub key: String,
    /// The new value, or `None` to delete.
    pub value: Option<Bytes>,
    /// What the asker knows of the key.
    pub seen: Seen,
}

/// What an asker saw of a key; if it is something else by then, its intent is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It does not matter.
    Any,
    /// Nothing.
    Absent,
    /// An entry.
    At { incarnation: u64, revision: u64 },
}

/// What a [`StateOp`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateChange {
    /// Set the value.
    Put(Bytes),
    /// Delete the key. Of a key that is not there: nothing.
    Delete,
    /// Nothing: only what is expected must hold.
    Check,
}

/// Condition of a compare-and-set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Whatever is there.
    Any,
    /// No live entry.
    Absent,
    /// A live entry at exactly this revision.
    Revision(u64),
}

/// The answer to a command.
#[derive(Debug)]
pub enum Response {
    /// StateGet.
    Entry(Option<StateEntry>),
    /// StateList: a page, the local revision at which it is the truth, and whether more follows.
    Entries { entries: Vec<StateEntry>, revision: u64, more: bool },
    /// StateList, StateWatch: what is asked for is no longer known, or not yet. The oldest revision that can
    /// be listed, or watched from.
    TooOld { oldest: u64 },
    /// StateWrite: the revision of each op in order; 0 of one that changed nothing.
    Written(Vec<u64>),
    /// StateWrite: the op at `index` found another revision (0 = absent); nothing was written.
    Conflict { index: usize, found: u64 },
    /// LogList.
    Logs(Vec<LogInfo>),
    /// LogRead: records and gap records in order; `next` is where to read on.
    Records { records: Vec<Record>, next: u64 },
    /// LogSeek: the seq; where the Log ends if nothing is that young.
    Place(u64),
    /// Stats.
    Stats(Box<super::Stats>),
    /// Sessions.
    Sessions(Vec<SessionInfo>),
    /// Conditions.
    Conditions(Vec<Condition>),
    /// Forwards.
    Forwards(Vec<proto::Forward>),
    /// Drain: links that went by themselves, and those that were closed when the time was over.
    Drained { clean: u64, forced: u64 },
    /// Done, nothing to say.
    Done,
    /// It cannot be done; the text says why.
    Refused(String),
}

/// A State entry as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateEntry {
    /// Key within its space.
    pub key: String,
    /// The frame; its payload is the value.
    pub frame: Bytes,
    /// Incarnation of its origin.
    pub incarnation: u64,
    /// Origin revision.
    pub revision: u64,
    /// Local revision: lists and watches count in it. Of an owned space it is the origin revision.
    pub local: u64,
    /// Wall time of the change, microseconds.
    pub time_us: u64,
}

impl StateEntry {
    fn cost(&self) -> usize {
        self.key.len() + self.frame.len()
    }

    /// The value, without copying.
    #[must_use]
    pub fn value(&self) -> Bytes {
        FrameView::parse(&self.frame)
            .map_or_else(|_| Bytes::new(), |view| self.frame.slice_ref(view.payload()))
    }
}

/// What a State watcher sees.
#[derive(Debug, Clone)]
pub enum StateEvent {
    /// A key has this value now; with what it had before, if that was asked for and there was anything.
    Put { entry: StateEntry, previous: Option<Box<StateEntry>> },
    /// A key is gone.
    Deleted { key: String, revision: u64, local: u64, previous: Option<Box<StateEntry>> },
    /// Everything that existed at this local revision has been sent, and the space is complete: its owner
    /// has listed its source, and nothing that concerns this broker is on the way. Only now may a reader
    /// conclude anything from an absence.
    Synced { revision: u64 },
    /// The watch fell behind what is known and has ended: list again. `oldest` is the first revision that
    /// can be watched from.
    TooOld { oldest: u64 },
}

impl StateEvent {
    fn cost(&self) -> usize {
        match self {
            Self::Put { entry, previous } => entry.cost() + previous.as_ref().map_or(0, |was| was.cost()),
            Self::Deleted { key, previous, .. } => key.len() + previous.as_ref().map_or(0, |was| was.cost()),
            Self::Synced { .. } | Self::TooOld { .. } => 0,
        }
    }
}

/// A Log as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogInfo {
    /// Whose.
    pub origin: Origin,
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Class of the stream.
    pub class: Class,
    /// Current epoch.
    pub epoch: u64,
    /// Oldest kept seq.
    pub first: u64,
    /// Seq of the next append.
    pub next: u64,
    /// Seq where its history begins; what policy removed since is told as gaps.
    pub begin: u64,
    /// Bytes kept, gaps included.
    pub bytes: u64,
    /// Records kept.
    pub records: u64,
    /// Quota, bytes.
    pub bytes_max: u64,
    /// Seconds until its policy must refuse, thin or drop what has not arrived, at the rate it fills now;
    /// `None` if that is not to be expected.
    pub seconds_to_full: Option<u64>,
}

/// A session as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionInfo {
    /// Number.
    pub session: SessionId,
    /// "mqtt", "nats", "internal", "link"; "relayed": a node that is reached by a relay's link.
    pub kind: &'static str,
    /// Client id or peer name.
    pub name: Arc<str>,
    /// Connected, or kept for a client that is away.
    pub connected: bool,
    /// Subscriptions.
    pub subscriptions: usize,
    /// Bytes in its queue.
    pub queued_bytes: usize,
    /// For a link: whether hello and welcome are through.
    pub established: bool,
}

/// A standing condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// In the manner of Kubernetes: `DuplicateIdentity`.
    pub kind: &'static str,
    /// What it is about: a node's name.
    pub subject: String,
    /// What happened and what to do.
    pub message: String,
    /// Since when, wall microseconds.
    pub since_us: u64,
}
