//! A core with a disk that is as slow as a test wants, and links between two of them.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use codec::{Kind, Record};

use super::{
    Config, Core, WindowBounds,
    event::{
        Action, Command, Condition, Event, Expect, Front, Group, LinkOpen, Now, Output, Peer, Response, Role,
        SessionId, SessionOpen, StateChange, StateEvent, StateOp,
        tier::{Ask, News},
    },
};
use crate::store::{Store, StoreEvent, mem::MemStore};

/// A core, its store and what it said.
pub(super) struct Host {
    pub(super) config: Config,
    pub(super) core: Core,
    pub(super) store: MemStore,
    waiting: Vec<Group>,
    /// What a tier's core asked.
    pub(super) asks: VecDeque<Ask>,
    /// In a tier: what reads of a node's `down` find, two at a time.
    pub(super) shelf: Vec<Record>,
    /// What it wrote.
    pub(super) written: Vec<Record>,
    pub(super) mono: Duration,
    pub(super) responses: BTreeMap<u64, Response>,
    pub(super) seen: BTreeMap<SessionId, Vec<StateEvent>>,
    /// Outputs that were not reported as sent.
    pub(super) owed: BTreeMap<SessionId, usize>,
    pub(super) commands: u64,
    /// For the peers of links.
    out: VecDeque<(SessionId, Vec<Record>)>,
    sessions: u64,
    restarts: u64,
}

impl Host {
    pub(super) fn new(config: Config) -> Self {
        let mut host = Self {
            core: Core::restore(
                config.clone(),
                MemStore::new().recover(),
                now(Duration::ZERO),
                &mut Vec::new(),
            ),
            config,
            store: MemStore::new(),
            waiting: Vec::new(),
            asks: VecDeque::new(),
            written: Vec::new(),
            shelf: Vec::new(),
            mono: Duration::ZERO,
            responses: BTreeMap::new(),
            seen: BTreeMap::new(),
            owed: BTreeMap::new(),
            commands: 0,
            out: VecDeque::new(),
            sessions: 1000,
            restarts: 0,
        };
        host.restart();
        host
    }

    /// A hub whose space `k8s` keeps this window.
    pub(super) fn hub(window: Option<WindowBounds>) -> Self {
        let mut config = Config::hub("hub", "tier", [9; 16], 12);
        config.windows = window.map(|bounds| ("k8s".into(), bounds)).into_iter().collect();
        Self::new(config)
    }

    /// What is not durable is gone; so is every session.
    pub(super) fn restart(&mut self) {
        let (store, _) = std::mem::take(&mut self.store).crash();
        self.start_on(store);
    }

    /// The process starts anew on this disk.
    pub(super) fn start_on(&mut self, store: MemStore) {
        self.waiting.clear();
        self.seen.clear();
        self.owed.clear();
        self.out.clear();
        self.store = store;
        self.restarts += 1;
        let mut config = self.config.clone();
        config.seed += self.restarts << 32;
        let mut actions = Vec::new();
        self.core = Core::restore(config, self.store.recover(), now(self.mono), &mut actions);
        self.perform(actions);
        self.persist();
    }

    pub(super) fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(now(self.mono), event, &mut actions);
        self.perform(actions);
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut reads = Vec::new();
        for action in actions {
            match action {
                Action::Persist(group) => self.waiting.push(group),
                Action::Output { session, output } => {
                    *self.owed.entry(session).or_default() += output.cost();
                    match output {
                        Output::State(event) => self.seen.entry(session).or_default().push(event),
                        Output::Send { records, .. } => self.out.push_back((session, records)),
                        _ => {}
                    }
                }
                Action::Respond { id, response } => drop(self.responses.insert(id, response)),
                Action::Tier(ask) => self.asks.push_back(ask),
                Action::Read(request) if self.config.shared => reads.push(request),
                Action::Read(request) => {
                    self.store.read(request);
                    self.take_reads();
                }
            }
        }
        for request in reads {
            let records = self.shelf.iter().filter(|record| record.header.seq >= request.from);
            let records: Vec<_> = records.take(2).cloned().collect();
            let next = records.last().map_or(request.from, |last| last.header.seq + 1);
            self.apply(Event::ReadDone { read: request.read, records, next });
        }
    }

    fn take_reads(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(event) = self.store.poll_event(&mut cx) {
            if let StoreEvent::Read { read, records, next } = event {
                self.apply(Event::ReadDone { read, records, next });
            }
        }
    }

    pub(super) fn persist(&mut self) {
        while !self.waiting.is_empty() {
            let groups = std::mem::take(&mut self.waiting);
            if self.config.shared {
                for group in groups {
                    self.written.extend(group.records.iter().cloned());
                    self.apply(Event::Tier(News::Written { node: group.lane, lsn: group.lsn }));
                }
                continue;
            }
            let last = groups.last().expect("not empty").lsn;
            groups.into_iter().for_each(|group| self.store.submit(group));
            self.store.flush_some(usize::MAX);
            self.apply(Event::Persisted(last));
        }
    }

    /// Links that were told to go and where that was not carried yet.
    pub(super) fn told_to_go(&self) -> usize {
        self.last_controls().iter().filter(|control| **control == "drain").count()
    }

    /// Acknowledgements and words of farewell that wait to be carried.
    pub(super) fn last_controls(&self) -> Vec<&'static str> {
        use codec::proto::control::Message;
        let records = self.out.iter().flat_map(|(_, records)| records);
        let controls = records.filter(|record| record.header.kind == Kind::CONTROL);
        controls
            .filter_map(|record| {
                match codec::decode::<codec::proto::Control>(record.body.clone()).ok()?.message? {
                    Message::Ack(_) => Some("ack"),
                    Message::Drain(_) => Some("drain"),
                    _ => None,
                }
            })
            .collect()
    }

    /// Due timers fire.
    pub(super) fn tick(&mut self) {
        for _ in 0..64 {
            if self.core.deadline().is_none_or(|at| at > self.mono) {
                return;
            }
            self.apply(Event::TimerFired);
        }
    }

    pub(super) fn ask(&mut self, command: Command) -> Option<Response> {
        self.commands += 1;
        let id = self.commands;
        self.apply(Event::Commanded { command, id });
        self.responses.remove(&id)
    }

    /// As [`Self::ask`], once the answer is durable.
    pub(super) fn run(&mut self, command: Command) -> Response {
        match self.ask(command) {
            Some(response) => response,
            None => {
                self.persist();
                self.responses.remove(&self.commands).expect("answered once durable")
            }
        }
    }

    pub(super) fn write(&mut self, ops: Vec<StateOp>) -> Response {
        self.run(Command::StateWrite(ops))
    }

    /// Every page of a list of `k8s`.
    pub(super) fn list(&mut self, prefix: &str, at: Option<u64>, limit: usize) -> Result<Listed, u64> {
        self.list_of("", "k8s", prefix, at, limit)
    }

    pub(super) fn list_of(
        &mut self,
        origin: &str,
        space: &str,
        prefix: &str,
        at: Option<u64>,
        limit: usize,
    ) -> Result<Listed, u64> {
        let (mut all, mut at, mut after) = (Vec::new(), at, None);
        loop {
            let command = Command::StateList {
                origin: origin.into(),
                space: space.into(),
                prefix: prefix.into(),
                after,
                limit,
                at,
            };
            match self.ask(command).expect("answered at once") {
                Response::Entries { entries, revision, more } => {
                    after = entries.last().map(|entry| entry.key.clone());
                    let text = |value: Bytes| String::from_utf8_lossy(&value).into_owned();
                    all.extend(entries.iter().map(|entry| (entry.key.clone(), text(entry.value()))));
                    at = Some(revision);
                    if !more {
                        return Ok((all, revision));
                    }
                }
                Response::TooOld { oldest } => return Err(oldest),
                other => panic!("entries, not {other:?}"),
            }
        }
    }

    /// Keys of live entries.
    pub(super) fn keys(&mut self, origin: &str, space: &str, prefix: &str) -> Vec<String> {
        let (all, _) = self.list_of(origin, space, prefix, None, 100).expect("now is always known");
        all.into_iter().map(|(key, _)| key).collect()
    }

    pub(super) fn conditions(&mut self) -> Vec<Condition> {
        match self.ask(Command::Conditions) {
            Some(Response::Conditions(conditions)) => conditions,
            other => panic!("conditions, not {other:?}"),
        }
    }

    pub(super) fn open(&mut self, session: u64) -> SessionId {
        let session = SessionId(session);
        self.apply(Event::SessionOpened(SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: 8,
            will: None,
        }));
        self.read(session);
        session
    }

    pub(super) fn watch_of(
        &mut self,
        session: SessionId,
        space: &str,
        prefixes: &[&str],
        from: Option<u64>,
        with_previous: bool,
    ) -> Response {
        let command = Command::StateWatch {
            session,
            origin: "".into(),
            space: space.into(),
            prefixes: prefixes.iter().map(|prefix| (*prefix).to_owned()).collect(),
            from,
            with_previous,
        };
        self.ask(command).expect("answered at once")
    }

    /// The session's writer is done with everything.
    pub(super) fn read(&mut self, session: SessionId) {
        while let Some(bytes) = self.owed.remove(&session).filter(|bytes| *bytes > 0) {
            self.apply(Event::Sent { session, bytes });
        }
    }
}

/// A page's keys and values, and its revision.
pub(super) type Listed = (Vec<(String, String)>, u64);

/// A hub and a node `n1`, linked when told to.
pub(super) struct Pair {
    pub(super) hub: Host,
    pub(super) node: Host,
    /// Sessions at the node and at the hub.
    link: Option<(SessionId, SessionId)>,
    /// Records of State that the hub sent.
    pub(super) sent_down: Vec<Record>,
}

impl Pair {
    pub(super) fn new() -> Self {
        Self::with(Host::hub(None))
    }

    pub(super) fn with(hub: Host) -> Self {
        let node = Host::new(Config::node("n1", [1; 16], 11));
        Self { hub, node, link: None, sent_down: Vec::new() }
    }

    pub(super) fn link_up(&mut self) {
        self.link_down();
        let session = |host: &mut Host| {
            host.sessions += 1;
            SessionId(host.sessions)
        };
        let (at_node, at_hub) = (session(&mut self.node), session(&mut self.hub));
        self.link = Some((at_node, at_hub));
        let node = Peer { name: "n1".into(), role: Role::Node, generation: 1 };
        let hub = Peer { name: "hub".into(), role: Role::Hub, generation: 0 };
        self.hub.apply(Event::LinkOpened(LinkOpen { session: at_hub, peer: node, dialler: false }));
        self.node.apply(Event::LinkOpened(LinkOpen { session: at_node, peer: hub, dialler: true }));
        self.sent_down.clear();
    }

    pub(super) fn link_down(&mut self) {
        if let Some((at_node, at_hub)) = self.link.take() {
            self.node.apply(Event::LinkClosed { session: at_node });
            self.hub.apply(Event::LinkClosed { session: at_hub });
        }
    }

    /// Carries at most this many messages over the link; what is not carried is lost when it is cut.
    pub(super) fn carry(&mut self, mut messages: usize) {
        while messages > 0 {
            let Some((at_node, at_hub)) = self.link else {
                self.node.out.clear();
                self.hub.out.clear();
                return;
            };
            let (up, down) = (self.node.out.pop_front(), self.hub.out.pop_front());
            if up.is_none() && down.is_none() {
                return;
            }
            if let Some((session, records)) = up
                && session == at_node
            {
                self.hub.apply(Event::LinkReceived { session: at_hub, records });
                self.hub.read(at_hub);
            }
            if let Some((session, records)) = down
                && session == at_hub
            {
                let state = [Kind::PUT, Kind::TOMBSTONE, Kind::SYNCED];
                self.sent_down
                    .extend(records.iter().filter(|record| state.contains(&record.header.kind)).cloned());
                self.node.apply(Event::LinkReceived { session: at_node, records });
                self.node.read(at_node);
            }
            messages -= 1;
        }
    }

    /// Everything durable, everything delivered, until nothing moves.
    pub(super) fn quiet(&mut self) {
        for _ in 0..30 {
            self.node.tick();
            self.hub.tick();
            self.node.persist();
            self.hub.persist();
            self.carry(usize::MAX);
        }
    }

    /// The hub's disk is lost. Its identity is elsewhere.
    pub(super) fn wipe_hub(&mut self) {
        self.link_down();
        self.hub.config.instance = [7; 16];
        self.hub.config.seed += 1;
        self.hub.start_on(MemStore::new());
    }
}

pub(super) fn now(mono: Duration) -> Now {
    let wall_us = 1_790_000_000_000_000 + u64::try_from(mono.as_micros()).expect("short runs");
    Now { mono, wall_us, trusted: true }
}

pub(super) fn op(space: &str, key: &str, value: Option<Bytes>, expect: Expect) -> StateOp {
    let change = value.map_or(StateChange::Delete, StateChange::Put);
    StateOp { space: Arc::from(space), key: key.into(), change, expect }
}
