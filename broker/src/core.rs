//! The routing core: synchronous and sans-IO.
//!
//! `apply(now, event, &mut actions)` is all of it: no tokio, no clock, no disk, no socket. One driver owns
//! a core and performs its actions; a simulation owns many and decides what happens in between.
//!
//! | file | subject |
//! |---|---|
//! | `event` | what goes in and comes out |
//! | `few` | maps that hold little, of which a hub has very many |
//! | `ledger` | durable effects of one `apply`, and what waits for durability |
//! | `trie` | who wants a topic |
//! | `publish` | a message enters: append, route, forward |
//! | `client`, `session`, `deliver` | client sessions, their life, their cursors |
//! | `log`, `space` | the two durable primitives |
//! | `watch`, `collect` | who is told of changes of State; which tombstones go |
//! | `policy`, `retention`, `thin`, `forecast` | what is kept of a Log, and how long it will do |
//! | `replay`, `dead_letter` | reading a Log from anywhere; records that nobody can take |
//! | `intent` | who does not own a space asks its owner |
//! | `link` | the session with another broker |
//! | `claims`, `forwards`, `authorize` | who holds a node's name, whom a relay speaks for, who may send what |
//! | `exports`, `export_log`, `export_state`, `imports`, `credit` | what flows over it, and how much at a time |
//! | `export_scope`, `import_scope` | a space of which each node gets its part |
//! | `budget`, `spend` | what a node lets itself send, and what it has sent |
//! | `request` | who waits for which answer |
//! | `drain` | the end of a process, in order |
//! | `command` | administration and modules |
//! | `restore` | from what the store recovered |
//! | `tier` | a replica of a tier: nodes are adopted and let go, the tier's State is a mirror |

mod authorize;
mod budget;
mod claims;
mod client;
mod collect;
mod command;
mod credit;
mod dead_letter;
mod deliver;
mod drain;
pub mod event;
mod export_log;
mod export_scope;
mod export_state;
mod exports;
mod few;
#[cfg(test)]
mod fleet_tests;
mod forecast;
mod forwards;
mod import_scope;
mod imports;
mod intent;
#[cfg(test)]
mod intent_tests;
mod ledger;
mod link;
mod log;
#[cfg(test)]
mod many_tests;
mod policy;
mod publish;
mod replay;
mod request;
mod restore;
mod retention;
mod session;
mod space;
mod spend;
#[cfg(test)]
mod state_tests;
mod stats;
#[cfg(test)]
mod test_host;
mod thin;
mod tier;
#[cfg(test)]
mod tier_tests;
mod trie;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
    time::Duration,
};

use codec::{Class, Filter, Kind, Record, RecordHeader, proto};
use rand::{Rng, SeedableRng, rngs::StdRng};

use self::{
    budget::Budgets,
    claims::Claim,
    client::{Client, ClientIx},
    event::{
        Action, CloseReason, CommandId, Condition, Event, Lsn, Now, Origin, Output, ReadId, ReadRequest,
        SessionId,
    },
    ledger::{Effect, Ledger},
    link::Link,
    log::{Log, LogId},
    request::Requests,
    space::{Space, Window},
    trie::Trie,
    watch::{Watch, WatchId},
};
pub use self::{
    budget::{Budget, BudgetState, HeldBy, Rate},
    dead_letter::STREAM as DEAD_LETTER_STREAM,
    policy::{ACKED_MIN, Full, Policy},
    space::WindowBounds,
    stats::{DropReason, Latencies, Stats},
};
use crate::{
    limits,
    store::{Damage, Source, SourceKind},
};

/// What a core is and what it lets through.
#[derive(Debug, Clone)]
pub struct Config {
    /// A node's name, or a replica's.
    pub name: Origin,
    /// Node or hub.
    pub role: event::Role,
    /// A node that lets others link, and forwards for those it is told it may.
    pub relay: bool,
    /// The tier's id: said in Welcome.
    pub tier: Arc<str>,
    /// A hub that is one replica of a tier: Logs and State of nodes, and the tier's own, are durable in what the
    /// replicas share, not in a store of this process.
    pub shared: bool,
    /// 128 random bits of this store.
    pub instance: [u8; 16],
    /// The store was restored or cloned: begin new epochs and a new incarnation.
    pub mint: bool,
    /// Declared streams, most specific first; what matches none belongs to `default`.
    pub streams: Vec<StreamConfig>,
    /// Policy of every other Log, those of other brokers included.
    pub default_stream: StreamConfig,
    /// What is offered over links.
    pub exports: Exchange,
    /// What is taken from links. What is not stays with its sender, unacknowledged.
    pub imports: Exchange,
    /// Spaces of State that keep a change window.
    pub windows: Vec<(Arc<str>, WindowBounds)>,
    /// How long a tombstone is kept at least.
    pub tombstone_age: Duration,
    /// What may be spent on links above; of no meaning for a hub.
    pub budgets: Vec<Budget>,
    /// How long a message of a Log `down/<n>` waits for its node.
    pub down_ttl: Duration,
    /// How long an instance keeps its name after its last link.
    pub duplicate_hold: Duration,
    /// Seed of ids that must not repeat (epochs, incarnations): from the system's random source, except
    /// in simulation.
    pub seed: u64,
}

/// A stream of a Log.
#[derive(Debug, Clone)]
pub struct StreamConfig {
    /// Its name.
    pub name: Arc<str>,
    /// Which topics belong to it.
    pub filters: Vec<Filter>,
    /// Class of all its records.
    pub class: Class,
    /// What is kept of it.
    pub policy: Policy,
}

/// What goes over links in one direction, within what the peer's certificate permits.
#[derive(Debug, Clone, Default)]
pub struct Exchange {
    /// Streams by name, `down` for every `down/<n>`, `intent` for every `intent/<space>`; `None` is all.
    pub streams: Option<Vec<Arc<str>>>,
    /// Topics of Live messages and requests.
    pub live: Vec<Filter>,
    /// Spaces by name; `None` is all.
    pub spaces: Option<Vec<Arc<str>>>,
}

impl Exchange {
    fn everything() -> Self {
        Self { streams: None, live: vec![Filter::parse("#").expect("a valid filter")], spaces: None }
    }

    fn has_stream(&self, stream: &str) -> bool {
        let name = match stream.split_once('/') {
            Some((kind @ ("down" | "intent"), _)) => kind,
            _ => stream,
        };
        self.streams.as_ref().is_none_or(|streams| streams.iter().any(|held| **held == *name))
    }

    fn has_space(&self, space: &str) -> bool {
        self.spaces.as_ref().is_none_or(|spaces| spaces.iter().any(|held| **held == *space))
    }

    fn has_live(&self, topic: &str) -> bool {
        self.live.iter().any(|filter| filter.matches(topic, false))
    }
}

/// Spaces that every node owns.
const NODE_SPACES: [&str; 3] = ["status", "twin", "retained"];

impl Config {
    /// A node with the default policy: everything it has of its own goes up.
    #[must_use]
    pub fn node(name: &str, instance: [u8; 16], seed: u64) -> Self {
        Self {
            name: name.into(),
            role: event::Role::Node,
            relay: false,
            shared: false,
            tier: "".into(),
            instance,
            mint: false,
            streams: Vec::new(),
            default_stream: StreamConfig {
                name: "default".into(),
                filters: Vec::new(),
                class: Class::Event,
                policy: Policy::of_class(Class::Event, 64 << 20),
            },
            exports: Exchange::everything(),
            imports: Exchange::everything(),
            windows: vec![("k8s".into(), WindowBounds::DEFAULT)],
            tombstone_age: Duration::from_mins(10),
            budgets: Vec::new(),
            down_ttl: Duration::from_hours(24),
            duplicate_hold: Duration::from_mins(1),
            seed,
        }
    }

    /// A hub with the default policy.
    #[must_use]
    pub fn hub(replica: &str, tier: &str, instance: [u8; 16], seed: u64) -> Self {
        let mut config = Self::node(replica, instance, seed);
        config.role = event::Role::Hub;
        config.tier = tier.into();
        config.default_stream.policy.bytes_max = 1 << 30;
        config
    }

    /// One replica of a tier.
    #[must_use]
    pub fn replica(replica: &str, tier: &str, instance: [u8; 16], seed: u64) -> Self {
        Self { shared: true, ..Self::hub(replica, tier, instance, seed) }
    }

    fn is_hub(&self) -> bool {
        self.role == event::Role::Hub
    }

    /// Whose topics its own clients speak of.
    fn own_origin(&self) -> Origin {
        if self.is_hub() { "".into() } else { Arc::clone(&self.name) }
    }
}

/// Why a read was asked.
#[derive(Debug)]
enum Reading {
    /// A client's cursor.
    Cursor(deliver::CursorRead),
    /// A QoS 2 delivery that is to be sent again after a restart.
    Redelivery(ClientIx, u16),
    /// A link's export.
    Export(SessionId, LogId),
    /// The crc at a receiver's mark.
    Mark(SessionId, LogId),
    /// A `LogRead` command, with the gaps that stand in front of what is read.
    Command(CommandId, LogId, Vec<Record>),
    /// A `LogSeek` command.
    Seek(CommandId, LogId, Box<replay::Seek>),
    /// The oldest records, for age and count.
    Front(LogId),
    /// A page to be thinned at this level.
    Thin(LogId, usize),
}

/// What is due at a time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// Cursors and marks that moved are written.
    WriteCursors,
    /// A session that is away ends, unless it came back.
    Expire(ClientIx),
    /// A will is published, unless its session came back.
    Will(ClientIx, u64),
    /// Answers to intents go after a day.
    IntentResults,
    /// Tombstones that nobody needs are forgotten.
    Tombstones,
    /// Requests that nobody answered are forgotten.
    Requests,
    /// The next links are told to go, or the time to go is over.
    Drain,
    /// A budget may permit what it held back.
    Budget,
    /// A condition ends unless it was renewed.
    Condition(&'static str, String, u64),
    /// Records of a Log may have become too old.
    Age(LogId),
    /// Acknowledged records of a Log have been kept long enough.
    FreeAcknowledged(LogId),
    /// A link has waited long enough for the mirror.
    Mirror(SessionId),
}

/// The broker's state. See the module's documentation.
#[derive(Debug)]
pub struct Core {
    config: Config,
    own: Origin,
    now: Now,
    rng: StdRng,
    ledger: Ledger,
    out: Vec<Action>,

    /// The greatest source number that was ever given.
    last_source: u32,
    /// Boxed like links: a node of the tree has room for eleven.
    logs: BTreeMap<LogId, Box<Log>>,
    /// Current Log of each (origin, stream).
    log_names: BTreeMap<(Origin, Arc<str>), LogId>,
    /// All Logs of each (origin, stream), oldest history first.
    histories: BTreeMap<(Origin, Arc<str>), Vec<LogId>>,
    /// Boxed, so that the list grows by little: there may be several for each of very many nodes.
    #[allow(clippy::vec_box)]
    spaces: Vec<Box<Space>>,
    /// Names of streams and spaces that many nodes have.
    names: BTreeSet<Arc<str>>,
    /// The space that this broker sends its nodes parts of.
    scoped: Option<usize>,
    /// Spaces that hold tombstones.
    littered: BTreeSet<usize>,
    space_names: BTreeMap<(Origin, Arc<str>), usize>,
    /// Places in `spaces` that are nobody's.
    vacant: Vec<usize>,
    watches: BTreeMap<WatchId, Watch>,
    /// A look through the tombstones is due.
    collecting: bool,
    /// A look through the answers to intents is due.
    sweeping: bool,
    /// When a node's position last made this broker begin a new incarnation.
    minted_for: BTreeMap<Origin, Duration>,
    /// Incarnation of the spaces that this broker owns.
    incarnation: u64,
    /// Random number of this process, for the lineage of owned spaces.
    run: u64,

    trie: Trie,
    group_turn: usize,
    clients: BTreeMap<ClientIx, Client>,
    client_ids: BTreeMap<Arc<str>, ClientIx>,
    sessions: BTreeMap<SessionId, Party>,
    next_client: u32,

    links: BTreeMap<SessionId, Box<Link>>,
    /// Links toward the tier: of very many links of a hub none, of a node's few most.
    above: BTreeSet<SessionId>,
    /// Links whose peers have not said yet that they are who they are.
    strangers: BTreeSet<SessionId>,
    /// Links whose peers may speak for others.
    speakers: BTreeSet<SessionId>,
    /// Established links, and what is in the outboxes of all.
    established: usize,
    links_queued: usize,
    /// What receivers acknowledged of each Log and space, by its source, as it stands on disk.
    marks: BTreeMap<(LogId, Arc<str>), proto::Mark>,
    /// Links whose peers acknowledged more than stands there.
    marks_moved: BTreeSet<SessionId>,
    acks_owed: BTreeSet<SessionId>,
    claims: BTreeMap<Origin, Claim>,
    /// In a tier: nodes that were asked for, by the session that did last.
    adopted: BTreeMap<Origin, SessionId>,
    /// In a tier: links that wait until this replica's mirror is where their node is.
    awaiting_mirror: BTreeSet<SessionId>,
    /// Least generation that may link, of nodes that were enrolled anew since this process started.
    generations: BTreeMap<Origin, u32>,
    requests: Requests,
    /// A relay: whom it may forward for, as it was told.
    forwards: BTreeMap<Origin, proto::Forward>,
    /// Stamp of the last Hello.
    last_claim: u64,
    /// A link's part of what this broker is ready to hold unacknowledged; and what peers were granted last.
    share: u64,
    granted: proto::Window,
    budgets: Budgets,
    /// When budgets are asked again.
    budgets_due: Option<Duration>,
    /// Budgets that hold something back for long, as conditions say.
    budgets_held: BTreeMap<Arc<str>, HeldBy>,
    reads: BTreeMap<ReadId, Reading>,
    next_read: ReadId,
    timers: BinaryHeap<std::cmp::Reverse<(Duration, Timer)>>,
    cursors_due: bool,
    /// Logs whose marks or cursors were written.
    acknowledgements_moved: BTreeSet<LogId>,
    /// Clients and Logs whose cursors may have something to deliver.
    pump_clients: BTreeSet<(ClientIx, LogId)>,
    pump_links: BTreeSet<SessionId>,
    /// The last link of the turn before, where not all had one.
    pumped_last: SessionId,

    conditions: BTreeMap<(&'static str, String), Condition>,
    /// The store takes no writes.
    refusing: bool,
    /// The store has little room left.
    low: bool,
    draining: Option<drain::Drain>,
    stats: Stats,
}

/// Who is behind a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Client(ClientIx),
    Link,
}

impl Core {
    /// Something happened at `now`; what is to be done is appended to `actions`.
    ///
    /// Never blocks and never panics on what a peer sent.
    pub fn apply(&mut self, now: Now, event: Event, actions: &mut Vec<Action>) {
        debug_assert!(now.mono >= self.now.mono, "monotonic time goes forward");
        self.now = now;
        self.on_event(event);
        self.settle();
        if actions.is_empty() {
            std::mem::swap(actions, &mut self.out);
        } else {
            actions.append(&mut self.out);
        }
    }

    /// When [`Event::TimerFired`] is due at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        if !self.pump_clients.is_empty() || !self.pump_links.is_empty() {
            return Some(self.now.mono);
        }
        self.timers.peek().map(|std::cmp::Reverse((at, _))| *at)
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::SessionOpened(open) => self.on_session_opened(open),
            Event::Published { session, messages } => self.on_published(session, messages),
            Event::Subscribed { session, token, subscriptions } => {
                self.on_subscribed(session, token, subscriptions);
            }
            Event::Unsubscribed { session, token, which } => self.on_unsubscribed(session, token, &which),
            Event::Acked { session, acks } => self.on_acked(session, &acks),
            Event::Sent { session, bytes } => self.on_sent(session, bytes),
            Event::ExpiryChanged { session, expiry_s } => self.on_expiry_changed(session, expiry_s),
            Event::SessionClosed { session, clean } => self.on_session_closed(session, clean),
            Event::LinkOpened(open) => self.on_link_opened(open),
            Event::LinkReceived { session, records } => self.on_link_received(session, records),
            Event::LinkClosed { session } => self.on_link_closed(session),
            Event::Persisted(lsn) => self.on_persisted(lsn),
            Event::ReadDone { read, records, next } => self.on_read_done(read, records, next),
            Event::StoreRefused { reason, .. } => self.on_store_refused(reason),
            Event::StoreLow { reason } => self.on_store_low(&reason),
            Event::StoreAmple => self.on_store_ample(),
            Event::StoreDamaged(damage) => self.on_store_damaged(damage),
            Event::Commanded { command, id } => self.on_command(command, id),
            Event::Tier(news) => self.on_tier(news),
            Event::TimerFired => {}
        }
    }

    /// Keeps the invariants after every event: due timers, deliveries, exports, one group.
    fn settle(&mut self) {
        self.fire_timers();
        loop {
            self.pump_deliveries();
            self.pump_exports();
            while let Some(group) = self.ledger.close() {
                self.stats.groups += 1;
                self.out.push(Action::Persist(group));
            }
            // Effects that depend on nothing new happen at once, and may cause more.
            let effects = self.ledger.ready();
            if effects.is_empty() {
                return;
            }
            self.take_effect(effects);
        }
    }

    fn on_persisted(&mut self, lsn: Lsn) {
        if self.refusing {
            self.refusing = false;
            self.clear_condition("StoreUnavailable", "");
            self.grant_anew();
        }
        self.ledger.persisted(&Origin::default(), lsn);
        let effects = self.ledger.ready();
        self.take_effect(effects);
    }

    fn take_effect(&mut self, effects: Vec<Effect>) {
        let mut leaving = Vec::new();
        for effect in effects {
            match effect {
                Effect::Reply(session, reply) => self.output(session, Output::Reply(reply)),
                Effect::Output(session, output) => self.output(session, output),
                Effect::LogDurable { log, seq } => self.on_log_durable(log, seq),
                Effect::StateDurable { space, key, version } => self.on_state_durable(space, &key, version),
                Effect::BarrierDurable { space, pair } => self.on_barrier_durable(space, pair),
                Effect::LinkAck { session, source } => self.on_import_durable(session, source),
                Effect::PartDurable { session, source, count, space } => {
                    self.on_part_acknowledgeable(session, source, count, space);
                }
                Effect::Greet(session) => self.greet(session),
                Effect::Leave(session) => leaving.push(session),
                Effect::Thinned { log } => self.on_thinned(log),
                Effect::Respond(id, response) => self.out.push(Action::Respond { id, response }),
                Effect::Release { node, session } => self.release_adopted(&node, session),
            }
        }
        self.flush_acks();
        // Behind what they are still owed.
        for session in leaving {
            self.leave(session);
        }
    }

    fn on_store_refused(&mut self, reason: String) {
        self.refusing = true;
        self.set_condition(
            "StoreUnavailable",
            String::new(),
            format!("the store takes no writes ({reason}): free disk space or check the disk"),
        );
        self.grant_anew();
        self.greet_all();
    }

    fn on_store_low(&mut self, reason: &str) {
        self.low = true;
        self.set_condition(
            "StoreLow",
            String::new(),
            format!("new data is refused ({reason}) until there is room: free disk space or lower quotas"),
        );
        self.grant_anew();
    }

    fn on_store_ample(&mut self) {
        self.low = false;
        self.clear_condition("StoreLow", "");
        self.grant_anew();
    }

    fn on_store_damaged(&mut self, damage: Damage) {
        let message = format!(
            "{} at byte {} is damaged ({}): what it held is lost and told as gaps; the file is kept in the store's \
             folder quarantine; check the disk",
            damage.file, damage.offset, damage.what
        );
        self.set_condition("StoreDamaged", damage.file, message);
    }

    /// Whether what adds data is refused. What frees space or moves a position is refused by nobody.
    fn takes_no_data(&self) -> bool {
        self.refusing || self.low
    }

    fn on_read_done(&mut self, read: ReadId, records: Vec<Record>, next: u64) {
        let Some(reading) = self.reads.remove(&read) else { return };
        match reading {
            Reading::Cursor(reading) => self.on_cursor_read(reading, &records, next),
            Reading::Redelivery(client, packet_id) => self.on_redelivery_read(client, packet_id, &records),
            Reading::Export(session, log) => self.on_export_read(session, log, &records),
            Reading::Mark(session, log) => self.on_mark_read(session, log, &records),
            Reading::Command(id, log, gaps) => self.on_command_read(id, log, gaps, records),
            Reading::Seek(id, log, seek) => self.on_seek_read(id, log, *seek, &records),
            Reading::Front(log) => self.on_front_read(log, &records),
            Reading::Thin(log, level) => self.on_thin_read(log, level, &records),
        }
    }

    fn read(&mut self, source: LogId, from: u64, bytes_max: usize, reading: Reading) {
        let read = self.next_read;
        self.next_read += 1;
        let wanted = match &reading {
            Reading::Cursor(reading) => reading.wanted.clone(),
            _ => None,
        };
        self.reads.insert(read, reading);
        self.out.push(Action::Read(ReadRequest { read, source, from, bytes_max, wanted }));
    }

    fn after(&mut self, delay: Duration, timer: Timer) {
        self.timers.push(std::cmp::Reverse((self.now.mono + delay, timer)));
    }

    fn fire_timers(&mut self) {
        while let Some(std::cmp::Reverse((at, _))) = self.timers.peek() {
            if *at > self.now.mono {
                return;
            }
            let std::cmp::Reverse((_, timer)) = self.timers.pop().expect("peeked");
            match timer {
                Timer::WriteCursors => self.write_cursors(),
                Timer::Expire(client) => self.on_expiry_due(client),
                Timer::Will(client, visits) => self.on_will_due(client, visits),
                Timer::IntentResults => self.sweep_answers(),
                Timer::Tombstones => self.collect_tombstones(),
                Timer::Requests => self.forget_requests(),
                Timer::Age(log) => self.on_age_due(log),
                Timer::FreeAcknowledged(log) => self.on_free_acknowledged(log),
                Timer::Mirror(session) => self.on_mirror_late(session),
                Timer::Budget => self.on_budget_due(),
                Timer::Drain => self.drain_on(),
                Timer::Condition(kind, subject, since_us) => {
                    let key = (kind, subject);
                    if self.conditions.get(&key).is_some_and(|held| held.since_us <= since_us) {
                        self.conditions.remove(&key);
                    }
                }
            }
        }
    }

    /// Puts an output into a session's outbox and charges it.
    fn output(&mut self, session: SessionId, output: Output) {
        match self.sessions.get(&session) {
            Some(Party::Client(ix)) => self.output_to_client(*ix, session, output),
            Some(Party::Link) => {
                let link = self.links.get_mut(&session).expect("a session's link exists");
                link.queued += output.cost();
                self.links_queued += output.cost();
                self.out.push(Action::Output { session, output });
            }
            None => {}
        }
    }

    /// As [`Self::output`], for whoever knows that the session is this client's.
    fn output_to_client(&mut self, ix: ClientIx, session: SessionId, output: Output) {
        let client = self.clients.get_mut(&ix).expect("a session's client exists");
        client.queued += output.cost();
        if client.queued > limits::CLIENT_QUEUE_BYTES_HARD && !client.closing {
            client.closing = true;
            self.stats.slow_consumers += 1;
            let output = Output::Close(CloseReason::SlowConsumer);
            self.out.push(Action::Output { session, output });
            return;
        }
        if client.closing && !matches!(output, Output::Close(_)) {
            return;
        }
        self.out.push(Action::Output { session, output });
    }

    fn on_sent(&mut self, session: SessionId, bytes: usize) {
        match self.sessions.get(&session) {
            Some(Party::Client(ix)) => {
                let ix = *ix;
                let client = self.clients.get_mut(&ix).expect("a session's client exists");
                client.queued = client.queued.saturating_sub(bytes);
                self.wake_client(ix);
                self.wake_watches(session);
            }
            Some(Party::Link) => {
                let link = self.links.get_mut(&session).expect("a session's link exists");
                let sent = bytes.min(link.queued);
                link.queued -= sent;
                self.links_queued -= sent;
                self.pump_links.insert(session);
            }
            None => {}
        }
    }

    fn set_condition(&mut self, kind: &'static str, subject: String, message: String) {
        let since_us = self.now.wall_us;
        let condition = Condition { kind, subject: subject.clone(), message, since_us };
        self.conditions
            .entry((kind, subject))
            .and_modify(|held| held.message.clone_from(&condition.message))
            .or_insert(condition);
    }

    fn clear_condition(&mut self, kind: &'static str, subject: &str) {
        self.conditions.remove(&(kind, subject.to_owned()));
    }

    /// A name of a stream or space, without another copy of one that many nodes have.
    fn known_name(&self, name: &str) -> Arc<str> {
        self.names.get(name).map_or_else(|| name.into(), Arc::clone)
    }

    /// The current Log of this name, declared and under an epoch.
    fn log_of(&mut self, origin: &Origin, stream: &Arc<str>, class: Class, epoch: Option<u64>) -> LogId {
        if let Some(id) = self.log_names.get(&(Arc::clone(origin), Arc::clone(stream))) {
            return *id;
        }
        self.new_log(origin, stream, class, 1, epoch)
    }

    /// A new source for a Log, which takes over the name from an older one, if there is any.
    fn new_log(
        &mut self,
        origin: &Origin,
        stream: &Arc<str>,
        class: Class,
        first: u64,
        epoch: Option<u64>,
    ) -> LogId {
        let source = self.declare(origin, SourceKind::Log, stream, class);
        let mut log = Box::new(Log::new(&source, self.policy_of(&source), first));
        let epoch = epoch.unwrap_or_else(|| self.rng.random());
        log.begin_epoch(&mut self.ledger, first, epoch);
        let name = (Arc::clone(origin), Arc::clone(stream));
        if let Some(older) = self.log_names.insert(name, source.number) {
            self.logs.get_mut(&older).expect("a named Log exists").retire();
        }
        self.histories.entry(log.name()).or_default().push(source.number);
        self.exports_changed(log.down_to());
        self.logs.insert(source.number, log);
        self.join_new_log(source.number);
        self.bound_older_histories(source.number);
        source.number
    }

    /// The policy of a Log, by the name of its stream.
    fn policy_of(&self, source: &Source) -> Policy {
        if &*source.name == dead_letter::STREAM {
            return dead_letter::policy();
        }
        let declared = self.config.streams.iter().find(|stream| stream.name == source.name);
        let policy = declared.unwrap_or(&self.config.default_stream).policy.clone();
        let is_down = source.origin.is_empty() && source.name.starts_with("down/");
        let published_here = source.origin == self.own || (is_down && self.config.is_hub());
        policy.for_log(source.class, published_here)
    }

    /// A space of State; owned if this broker is its origin.
    fn space_of(&mut self, origin: &Origin, name: &Arc<str>) -> usize {
        if let Some(index) = self.space_names.get(&(Arc::clone(origin), Arc::clone(name))) {
            return *index;
        }
        let source = self.declare(origin, SourceKind::State, name, Class::State);
        let index = self.add_space(&source);
        if self.spaces[index].owned && !self.config.shared {
            self.spaces[index].begin_run(&mut self.ledger, self.run);
        }
        index
    }

    fn add_space(&mut self, source: &Source) -> usize {
        let index = self.vacant.pop().unwrap_or(self.spaces.len());
        let owned = source.origin == self.own;
        let mut space = Space::new(source, index, owned);
        space.elsewhere = self.config.shared;
        if owned && !self.config.shared {
            space.at = (self.incarnation, 0);
            space.horizon.listed = self.incarnation;
        }
        let window = self.config.windows.iter().find(|(name, _)| *name == source.name);
        space.window = window.map(|(_, bounds)| Box::new(Window::new(*bounds, 0)));
        if owned && space.scoped {
            self.scoped = Some(index);
        }
        let space = Box::new(space);
        if index < self.spaces.len() {
            self.spaces[index] = space;
        } else {
            self.spaces.push(space);
        }
        self.space_names.insert((Arc::clone(&source.origin), Arc::clone(&source.name)), index);
        self.exports_changed(None);
        index
    }

    /// Binds the next source number of this store.
    fn declare(&mut self, origin: &Origin, kind: SourceKind, name: &Arc<str>, class: Class) -> Source {
        // Above all that were ever given, also where damage took some out of the middle.
        let number = self.last_source.checked_add(1).expect("fewer than 2^32 sources");
        self.last_source = number;
        let source = Source { number, origin: Arc::clone(origin), kind, name: Arc::clone(name), class };
        self.ledger.write(declare_record(&source, number));
        source
    }
}

/// A `declare` record that binds `number` to a source.
fn declare_record(source: &Source, number: u32) -> Record {
    let body = codec::encode(&proto::Declare {
        origin: source.origin.to_string(),
        kind: source.kind as u32,
        name: source.name.to_string(),
        class: source.class as u32,
    });
    let header = RecordHeader {
        kind: Kind::DECLARE,
        class: source.class as u8,
        flags: codec::Flags::default(),
        source: number,
        epoch: 0,
        seq: 0,
        aux: 0,
    };
    Record { header, body }
}

fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}
