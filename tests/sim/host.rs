//! One simulated process: a core, its store, and the clients that speak to it.

use std::{
    collections::{BTreeMap, VecDeque},
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{
        Config, Core,
        event::{
            Action, ClientAck, Command, Delivery, Event, Front, LinkOpen, Now, OriginFilter, Output, Peer,
            Publish, Reply, Response, RetainedOnSubscribe, SessionId, SessionOpen, StateEvent, Subscription,
            Target,
        },
    },
    store::{Store, StoreEvent, mem::MemStore},
};
use codec::{Class, Filter, Record, frame::FrameParts};

/// What a host wants of the world after a turn.
#[derive(Debug)]
pub(crate) enum Out {
    /// Records for the peer of this link session.
    Send(SessionId, Class, Vec<Record>),
    /// The link session is to be closed.
    CloseLink(SessionId),
    /// A client's publish (by its tag) is acknowledged.
    Acknowledged(String),
    /// A client was given a message.
    Delivered { client: String, payload: String, origin: String, qos: u8 },
    /// A client was told that nobody answers its request.
    NoResponders,
    /// A State watcher saw this.
    Watched(StateEvent),
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

/// A publish, as far as these tests care.
#[derive(Clone, Copy)]
pub(crate) struct Say<'a> {
    pub(crate) to: &'a Target,
    pub(crate) topic: &'a str,
    pub(crate) tag: &'a str,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
}

pub(crate) struct Host {
    pub(crate) name: String,
    config: Config,
    core: Core,
    store: MemStore,
    started: Duration,
    actions: Vec<Action>,
    performing: bool,
    next_session: u64,
    next_command: u64,
    restarts: u64,
    /// Connected clients: id to session.
    clients: BTreeMap<String, SessionId>,
    owners: BTreeMap<SessionId, String>,
    /// What a client answers to every request.
    answers: BTreeMap<SessionId, &'static str>,
    /// Publishes on their way: (session, packet id) to tag.
    awaiting: BTreeMap<(SessionId, u16), String>,
    next_packet: u16,
    /// Publishes that were refused.
    pub(crate) refused: usize,
    pub(crate) responses: Vec<Response>,
    pub(crate) out: VecDeque<Out>,
}

impl Host {
    pub(crate) fn new(config: Config, now: Duration) -> Self {
        let store = MemStore::new();
        let mut actions = Vec::new();
        let core = Core::restore(config.clone(), store.recover(), at(now, now), &mut actions);
        Self {
            name: config.name.to_string(),
            config,
            core,
            store,
            started: now,
            actions,
            performing: false,
            next_session: 1,
            next_command: 1,
            restarts: 0,
            clients: BTreeMap::new(),
            owners: BTreeMap::new(),
            answers: BTreeMap::new(),
            awaiting: BTreeMap::new(),
            next_packet: 1,
            refused: 0,
            responses: Vec::new(),
            out: VecDeque::new(),
        }
    }

    /// The power is cut and comes back. Every connection is gone.
    pub(crate) fn crash(&mut self, now: Duration) {
        let store = std::mem::take(&mut self.store);
        let (store, recovered) = store.crash();
        self.restarts += 1;
        let mut config = self.config.clone();
        config.seed = config.seed.wrapping_add(self.restarts << 32);
        self.actions.clear();
        self.out.clear();
        self.responses.clear();
        self.core = Core::restore(config, recovered, at(now, now), &mut self.actions);
        self.store = store;
        self.started = now;
        self.clients.clear();
        self.owners.clear();
        self.answers.clear();
        self.awaiting.clear();
    }

    /// Another process on a copy of the disk as it is now.
    pub(crate) fn snapshot(&self, now: Duration) -> Self {
        let mut copy = Self::new(self.config.clone(), now);
        copy.store = self.store.copy();
        let recovered = copy.store.recover();
        copy.actions.clear();
        copy.config.seed = copy.config.seed.wrapping_add(1 << 40);
        copy.core = Core::restore(copy.config.clone(), recovered, at(now, now), &mut copy.actions);
        copy
    }

    pub(crate) fn apply(&mut self, now: Duration, event: Event) {
        self.core.apply(at(now, self.started), event, &mut self.actions);
        // What a client answers comes after everything that the core already wants done.
        if !self.performing {
            self.perform(now);
        }
    }

    /// Fires due timers.
    pub(crate) fn tick(&mut self, now: Duration) {
        self.perform(now);
        for _ in 0..64 {
            let due = self.core.deadline().is_some_and(|deadline| deadline + self.started <= now);
            if !due {
                return;
            }
            self.apply(now, Event::TimerFired);
        }
    }

    /// Makes some of what waits durable and tells the core.
    pub(crate) fn sync(&mut self, now: Duration, groups: usize) {
        self.store.flush_some(groups);
        self.poll_store(now);
    }

    pub(crate) fn unsynced(&self) -> usize {
        self.store.unsynced()
    }

    fn poll_store(&mut self, now: Duration) {
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(event) = self.store.poll_event(&mut cx) {
            let event = match event {
                StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                StoreEvent::Read { read, records } => Event::ReadDone { read, records },
                StoreEvent::Low { reason } => Event::StoreLow { reason },
                StoreEvent::Ample => Event::StoreAmple,
                StoreEvent::Refused { lsn, reason } => Event::StoreRefused { lsn, reason },
            };
            self.apply(now, event);
        }
    }

    fn perform(&mut self, now: Duration) {
        let mut reads = false;
        self.performing = true;
        let mut queue = VecDeque::new();
        loop {
            queue.extend(self.actions.drain(..));
            let Some(action) = queue.pop_front() else { break };
            match action {
                Action::Persist(group) => self.store.submit(group),
                Action::Output { session, output } => self.on_output(now, session, output),
                Action::Read(request) => {
                    self.store.read(request);
                    reads = true;
                }
                Action::Respond { response, .. } => self.responses.push(response),
            }
        }
        self.performing = false;
        if reads {
            self.poll_store(now);
        }
    }

    fn on_output(&mut self, now: Duration, session: SessionId, output: Output) {
        let bytes = output.cost();
        match output {
            Output::Send { class, records } => self.out.push_back(Out::Send(session, class, records)),
            Output::Close(_) => match self.owners.remove(&session) {
                Some(client) => {
                    self.clients.remove(&client);
                    self.apply(now, Event::SessionClosed { session, clean: false });
                }
                None => self.out.push_back(Out::CloseLink(session)),
            },
            Output::Reply(Reply::PubAck(id)) => {
                if let Some(tag) = self.awaiting.remove(&(session, id)) {
                    self.out.push_back(Out::Acknowledged(tag));
                }
            }
            Output::Reply(Reply::PubRec(id)) => {
                if let Some(tag) = self.awaiting.remove(&(session, id)) {
                    self.out.push_back(Out::Acknowledged(tag));
                }
                self.apply(now, Event::Acked { session, acks: vec![ClientAck::Rel(id)] });
            }
            Output::Reply(Reply::PubRel(id)) => {
                self.apply(now, Event::Acked { session, acks: vec![ClientAck::Comp(id)] });
            }
            Output::Deliver(delivery) => self.on_delivery(now, session, &delivery),
            Output::State(event) => self.out.push_back(Out::Watched(event)),
            Output::Reply(Reply::Refused { .. }) => self.refused += 1,
            Output::Reply(_) => {}
        }
        self.apply(now, Event::Sent { session, bytes });
    }

    fn on_delivery(&mut self, now: Duration, session: SessionId, delivery: &Delivery) {
        let view = codec::FrameView::parse(&delivery.frame).expect("the core delivers frames");
        let Some(client) = self.owners.get(&session).cloned() else { return };
        if delivery.no_responders {
            return self.out.push_back(Out::NoResponders);
        }
        if let Some((topic, text)) = delivery.reply.as_ref().zip(self.answers.get(&session)) {
            let parts = FrameParts { topic, payload: text.as_bytes(), ..FrameParts::default() };
            let message = Publish {
                target: Target::Own,
                frame: parts.encode(),
                qos: 0,
                packet_id: 0,
                dup: false,
                retain: false,
                reply: None,
            };
            return self.apply(now, Event::Published { session, messages: vec![message] });
        }
        self.out.push_back(Out::Delivered {
            client,
            payload: String::from_utf8_lossy(view.payload()).into_owned(),
            origin: delivery.origin.to_string(),
            qos: delivery.qos,
        });
        let ack = match delivery.qos {
            1 => ClientAck::Ack(delivery.packet_id),
            2 => ClientAck::Rec(delivery.packet_id),
            _ => return,
        };
        self.apply(now, Event::Acked { session, acks: vec![ack] });
    }

    fn session(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(self.next_session)
    }

    /// Connects a client, unless it is.
    pub(crate) fn connect(&mut self, now: Duration, client: &str, front: Front, durable: bool) -> SessionId {
        if let Some(session) = self.clients.get(client) {
            return *session;
        }
        let session = self.session();
        self.clients.insert(client.to_owned(), session);
        self.owners.insert(session, client.to_owned());
        let open = SessionOpen {
            session,
            front,
            client_id: if durable { client.into() } else { "".into() },
            clean_start: !durable,
            expiry_s: if durable { u32::MAX } else { 0 },
            receive_max: 8,
            will: None,
        };
        self.apply(now, Event::SessionOpened(open));
        session
    }

    pub(crate) fn disconnect(&mut self, now: Duration, client: &str) {
        if let Some(session) = self.clients.remove(client) {
            self.owners.remove(&session);
            self.apply(now, Event::SessionClosed { session, clean: false });
        }
    }

    pub(crate) fn subscribe(
        &mut self,
        now: Duration,
        session: SessionId,
        origin: OriginFilter,
        filter: &str,
        qos: u8,
    ) {
        let subscription = Subscription {
            id: 1,
            origin,
            filter: Filter::parse(filter).expect("a valid filter"),
            qos,
            group: None,
            no_local: false,
            retain_as_published: false,
            retained: RetainedOnSubscribe::DoNotSend,
            wildcard_matches_dollar: false,
            identifier: 0,
        };
        self.apply(now, Event::Subscribed { session, token: 1, subscriptions: vec![subscription] });
    }

    /// From now on this client answers requests instead of taking them as messages.
    pub(crate) fn answer_requests(&mut self, session: SessionId, with: &'static str) {
        self.answers.insert(session, with);
    }

    /// Publishes `tag` as payload; its acknowledgement comes back as [`Out::Acknowledged`].
    pub(crate) fn publish(&mut self, now: Duration, session: SessionId, what: &Say<'_>) {
        let Say { to, topic, tag, qos, retain } = *what;
        self.next_packet = self.next_packet.wrapping_add(1).max(1);
        let packet_id = if qos == 0 { 0 } else { self.next_packet };
        if qos > 0 {
            self.awaiting.insert((session, packet_id), tag.to_owned());
        }
        let wall_us = at(now, self.started).wall_us;
        let parts = FrameParts { topic, time_us: wall_us, payload: tag.as_bytes(), ..FrameParts::default() };
        let message = Publish {
            target: to.clone(),
            frame: parts.encode(),
            qos,
            packet_id,
            dup: false,
            retain,
            reply: None,
        };
        self.apply(now, Event::Published { session, messages: vec![message] });
    }

    pub(crate) fn open_link(&mut self, now: Duration, peer: Peer, dialler: bool) -> SessionId {
        let session = self.session();
        self.apply(now, Event::LinkOpened(LinkOpen { session, peer, dialler }));
        session
    }

    pub(crate) fn watch(&mut self, now: Duration, origin: &str, space: &str) {
        let session = self.connect(now, &format!("watch-{origin}"), Front::Internal, false);
        self.command(
            now,
            Command::StateWatch {
                session,
                origin: origin.into(),
                space: space.into(),
                prefixes: vec![String::new()],
                from: None,
                with_previous: false,
            },
        );
    }

    pub(crate) fn command(&mut self, now: Duration, command: Command) {
        self.next_command += 1;
        let id = self.next_command;
        self.apply(now, Event::Commanded { command, id });
    }

    /// Runs a command that is answered at once.
    pub(crate) fn ask(&mut self, now: Duration, command: Command) -> Response {
        self.responses.clear();
        self.command(now, command);
        self.responses.pop().expect("answered at once")
    }
}

/// The time as a host sees it that started at `started`.
fn at(now: Duration, started: Duration) -> Now {
    const BEGINNING_US: u64 = 1_790_000_000_000_000;
    let wall_us = BEGINNING_US + u64::try_from(now.as_micros()).expect("short runs");
    Now { mono: now - started, wall_us, trusted: true }
}
