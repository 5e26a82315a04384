//! One simulated process: a core, its disk and clock, and the clients that speak to it.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use broker::{
    core::{
        Config, Core,
        event::{
            Action, Command, Delivery, Event, Front, LinkOpen, Now, OriginFilter, Output, Peer, Publish,
            Reply, Response, RetainedOnSubscribe, SessionId, SessionOpen, StateEvent, Subscription, Target,
        },
    },
    limits,
    store::StoreEvent,
};
use codec::{Class, Filter, Record, frame::FrameParts};

use crate::{
    client::{Client, Message},
    disk::{Copy, Disk},
    shadow::{rule, tag_of},
};

/// What a host wants of the world after a turn.
#[derive(Debug)]
pub(crate) enum Out {
    /// Records for the peer of this link session.
    Send(SessionId, Class, Vec<Record>),
    /// The link session is to be closed.
    CloseLink(SessionId),
    /// A client's publish (by its tag) is acknowledged.
    Acknowledged(String),
    /// A client's publish (by its tag) is refused: nothing of it is kept.
    Refused(String),
    /// A client's publish (by its tag) was sent again.
    Repeated(String),
    /// A client was given a message.
    Delivered { client: String, payload: String, origin: String, qos: u8, at: Option<At> },
    /// A client was told that nobody answers its request.
    NoResponders,
    /// A State watcher saw this.
    Watched(String, StateEvent),
}

/// Where a delivery stands, and in which life of its client's connection it came.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct At {
    pub(crate) stream: String,
    pub(crate) epoch: u64,
    pub(crate) seq: u64,
    pub(crate) session: u64,
    pub(crate) dup: bool,
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
    pub(crate) config: Config,
    core: Core,
    pub(crate) disk: Disk,
    /// Counts the disks that this host has had: what holds within one life need not hold across.
    pub(crate) life: u64,
    started: Duration,
    /// How far the wall clock is off, and whether it is known to be right.
    pub(crate) off_s: i64,
    pub(crate) trusted: bool,
    wall_us: u64,
    actions: Vec<Action>,
    performing: bool,
    next_session: u64,
    next_command: u64,
    restarts: u64,
    pub(crate) clients: BTreeMap<String, Client>,
    owners: BTreeMap<SessionId, String>,
    /// What a client answers to every request.
    answers: BTreeMap<SessionId, &'static str>,
    /// Bytes in the outbox of each client's session.
    queued: BTreeMap<SessionId, usize>,
    /// The core was told that its store takes no writes.
    refusing: bool,
    /// The core was told that its store has little room.
    low: bool,
    /// Publishes that were refused.
    pub(crate) refused: usize,
    pub(crate) responses: Vec<Response>,
    pub(crate) out: VecDeque<Out>,
}

impl Host {
    pub(crate) fn new(config: Config, now: Duration) -> Self {
        let disk = Disk::default();
        let mut actions = Vec::new();
        let core = Core::restore(config.clone(), disk.recover(), wall(now, now, 0, true), &mut actions);
        Self {
            name: config.name.to_string(),
            config,
            core,
            disk,
            life: 1,
            started: now,
            off_s: 0,
            trusted: true,
            wall_us: 0,
            actions,
            performing: false,
            next_session: 1,
            next_command: 1,
            restarts: 0,
            clients: BTreeMap::new(),
            owners: BTreeMap::new(),
            answers: BTreeMap::new(),
            queued: BTreeMap::new(),
            refusing: false,
            low: false,
            refused: 0,
            responses: Vec::new(),
            out: VecDeque::new(),
        }
    }

    /// The power is cut and comes back. Every connection is gone.
    pub(crate) fn crash(&mut self, now: Duration) {
        let recovered = self.disk.crash();
        self.boot(now, recovered);
    }

    /// Another disk stands in this machine. `mint`: it knows that it is another.
    pub(crate) fn replace_disk(&mut self, now: Duration, copy: Option<&Copy>, mint: bool) {
        self.disk = copy.map(Disk::from).unwrap_or_default();
        self.life += 1;
        if mint || copy.is_none() {
            let turn = u8::try_from(self.life & 0x7f).expect("seven bits");
            self.config.instance[1] = turn;
        }
        let recovered = self.disk.recover();
        self.config.mint = mint;
        self.boot(now, recovered);
        self.config.mint = false;
        for client in self.clients.values_mut() {
            client.fresh = true;
        }
    }

    fn boot(&mut self, now: Duration, recovered: broker::store::Recovered) {
        self.restarts += 1;
        let mut config = self.config.clone();
        config.seed = config.seed.wrapping_add((self.restarts << 32) + (self.life << 48));
        self.actions.clear();
        self.out.clear();
        self.responses.clear();
        self.started = now;
        self.wall_us = 0;
        self.refusing = false;
        self.low = false;
        let at = self.at(now);
        self.core = Core::restore(config, recovered, at, &mut self.actions);
        self.owners.clear();
        self.answers.clear();
        self.queued.clear();
        self.clients.values_mut().for_each(Client::disconnected);
    }

    /// Another process on a copy of the disk as it is now.
    pub(crate) fn snapshot(&self, now: Duration) -> Self {
        let mut config = self.config.clone();
        config.seed = config.seed.wrapping_add(1 << 40);
        let mut copy = Self::new(config, now);
        copy.disk = Disk::from(&self.disk.copy());
        copy.actions.clear();
        let at = copy.at(now);
        copy.core = Core::restore(copy.config.clone(), copy.disk.recover(), at, &mut copy.actions);
        copy
    }

    /// The time as this host sees it: its wall clock never runs backwards within one process.
    fn at(&mut self, now: Duration) -> Now {
        let at = wall(now, self.started, self.off_s, self.trusted);
        self.wall_us = self.wall_us.max(at.wall_us);
        Now { wall_us: self.wall_us, ..at }
    }

    pub(crate) fn apply(&mut self, now: Duration, event: Event) {
        match &event {
            Event::StoreRefused { .. } => self.refusing = true,
            Event::Persisted(_) => self.refusing = false,
            Event::StoreLow { .. } => self.low = true,
            Event::StoreAmple => self.low = false,
            _ => {}
        }
        let at = self.at(now);
        self.core.apply(at, event, &mut self.actions);
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
        self.disk.sync(now, groups);
        self.poll_store(now);
    }

    /// Whether a publish is refused now, as far as the core can know.
    pub(crate) fn takes_no_data(&self) -> bool {
        self.refusing || self.low
    }

    pub(crate) fn unsynced(&self) -> usize {
        self.disk.unsynced()
    }

    pub(crate) fn poll_store(&mut self, now: Duration) {
        while let Some(event) = self.disk.poll(now) {
            let event = match event {
                StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                StoreEvent::Read { read, records, next } => Event::ReadDone { read, records, next },
                StoreEvent::Low { reason } => Event::StoreLow { reason },
                StoreEvent::Ample => Event::StoreAmple,
                StoreEvent::Damaged(damage) => Event::StoreDamaged(damage),
                StoreEvent::Refused { lsn, reason } => Event::StoreRefused { lsn, reason },
                StoreEvent::Tier(news) => Event::Tier(news),
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
                Action::Persist(group) => self.disk.persist(group),
                Action::Output { session, output } => self.on_output(now, session, output),
                Action::Read(request) => {
                    self.disk.read(request);
                    reads = true;
                }
                Action::Respond { response, .. } => self.responses.push(response),
                Action::Tier(ask) => panic!("a single hub asks nobody: {ask:?}"),
            }
        }
        self.performing = false;
        if reads {
            self.poll_store(now);
        }
    }

    fn on_output(&mut self, now: Duration, session: SessionId, output: Output) {
        let bytes = output.cost();
        let Some(name) = self.owners.get(&session).cloned() else {
            match output {
                Output::Send { class, records } => self.out.push_back(Out::Send(session, class, records)),
                Output::Close(_) => self.out.push_back(Out::CloseLink(session)),
                _ => {}
            }
            return self.apply(now, Event::Sent { session, bytes });
        };
        let held = self.queued.entry(session).or_default();
        *held += bytes;
        rule!(
            *held <= limits::CLIENT_QUEUE_BYTES_HARD + limits::FRAME_MAX,
            "every_queue_is_bounded",
            "{held} bytes for {name} at {}",
            self.name
        );
        if matches!(output, Output::Close(_)) {
            self.close(&name);
            self.apply(now, Event::SessionClosed { session, clean: false });
            return;
        }
        let client = self.clients.get_mut(&name).expect("a session's client exists");
        let greeting = matches!(output, Output::Reply(Reply::Opened { .. }));
        client.inbox.push_back(output);
        if greeting || !client.lazy {
            self.read(now, &name, usize::MAX);
        }
    }

    fn close(&mut self, name: &str) -> Option<SessionId> {
        let client = self.clients.get_mut(name)?;
        let session = client.session?;
        client.disconnected();
        self.owners.remove(&session);
        self.queued.remove(&session);
        Some(session)
    }

    /// A client handles what it was sent.
    pub(crate) fn read(&mut self, now: Duration, name: &str, count: usize) {
        for _ in 0..count {
            let Some(client) = self.clients.get_mut(name) else { return };
            let (Some(session), Some(output)) = (client.session, client.inbox.pop_front()) else { return };
            self.handle(now, name, session, output);
        }
    }

    fn handle(&mut self, now: Duration, name: &str, session: SessionId, output: Output) {
        let bytes = output.cost();
        let client = self.clients.get_mut(name).expect("it has a session");
        let answer = client.handle(&output);
        self.out.extend(answer.acknowledged.map(Out::Acknowledged));
        if let Some(tag) = answer.refused {
            self.refused += 1;
            self.out.push_back(Out::Refused(tag));
        }
        match output {
            Output::Deliver(delivery) if delivery.no_responders => self.out.push_back(Out::NoResponders),
            Output::Deliver(Delivery { reply: Some(topic), .. }) if self.answers.contains_key(&session) => {
                let payload = self.answers[&session].as_bytes().to_vec();
                let (to, topic) = (Target::Own, topic.to_string());
                let tag = String::new();
                let answer = Message { to, topic, tag, payload, qos: 0, retain: false, headers: false };
                self.say(now, session, &answer);
            }
            Output::Deliver(delivery) if answer.effect => {
                let view = codec::FrameView::parse(&delivery.frame).expect("the core delivers frames");
                let at = delivery.position.as_ref().map(|position| At {
                    stream: position.stream.to_string(),
                    epoch: position.epoch,
                    seq: position.seq,
                    session: session.0,
                    dup: delivery.dup,
                });
                self.out.push_back(Out::Delivered {
                    client: name.to_owned(),
                    payload: tag_of(view.payload()),
                    origin: delivery.origin.to_string(),
                    qos: delivery.qos,
                    at,
                });
            }
            Output::State(event) => self.out.push_back(Out::Watched(name.to_owned(), event)),
            _ => {}
        }
        if let Some(held) = self.queued.get_mut(&session) {
            *held -= bytes;
        }
        self.apply(now, Event::Sent { session, bytes });
        if !answer.acks.is_empty() {
            self.apply(now, Event::Acked { session, acks: answer.acks });
        }
        for sent in answer.again {
            match sent.release() {
                Some(release) => self.apply(now, Event::Acked { session, acks: vec![release] }),
                None => {
                    self.out.push_back(Out::Repeated(sent.message.tag.clone()));
                    self.transmit(now, session, &sent.message, sent.packet_id, true);
                }
            }
        }
    }

    fn session(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(self.next_session)
    }

    /// Connects a client, unless it is.
    pub(crate) fn connect(&mut self, now: Duration, client: &str, front: Front, durable: bool) -> SessionId {
        let held = self.clients.entry(client.to_owned()).or_default();
        if let Some(session) = held.session {
            return session;
        }
        held.durable = durable;
        let fresh = std::mem::take(&mut held.fresh);
        if fresh {
            held.forget();
        }
        let session = self.session();
        self.clients.get_mut(client).expect("just added").session = Some(session);
        self.owners.insert(session, client.to_owned());
        let open = SessionOpen {
            session,
            front,
            client_id: if durable { client.into() } else { "".into() },
            clean_start: !durable || fresh,
            expiry_s: if durable { u32::MAX } else { 0 },
            receive_max: 8,
            will: None,
        };
        self.apply(now, Event::SessionOpened(open));
        session
    }

    pub(crate) fn disconnect(&mut self, now: Duration, client: &str) {
        if let Some(session) = self.close(client) {
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
        let message = Message {
            to: to.clone(),
            topic: topic.to_owned(),
            tag: tag.to_owned(),
            payload: tag.as_bytes().to_vec(),
            qos,
            retain,
            headers: false,
        };
        self.say(now, session, &message);
    }

    /// As [`Self::publish`].
    pub(crate) fn say(&mut self, now: Duration, session: SessionId, message: &Message) {
        let owner = self.owners.get(&session).cloned();
        let client = owner.and_then(|name| self.clients.get_mut(&name));
        let packet_id = client.map_or(0, |client| client.send(message));
        self.transmit(now, session, message, packet_id, false);
    }

    fn transmit(&mut self, now: Duration, session: SessionId, what: &Message, packet_id: u16, dup: bool) {
        let at = self.at(now);
        let headers = [(codec::frame::header::RETAIN, b"1".as_slice())];
        let parts = FrameParts {
            topic: &what.topic,
            time_us: at.wall_us,
            time_trusted: at.trusted,
            payload: &what.payload,
            headers: if what.headers { &headers } else { &[] },
            ..FrameParts::default()
        };
        let message = Publish {
            target: what.to.clone(),
            frame: parts.encode(),
            qos: what.qos,
            packet_id,
            dup,
            retain: what.retain,
            reply: None,
        };
        self.apply(now, Event::Published { session, messages: vec![message] });
    }

    pub(crate) fn open_link(&mut self, now: Duration, peer: Peer, dialler: bool) -> SessionId {
        let session = self.session();
        self.apply(now, Event::LinkOpened(LinkOpen { session, peer, dialler }));
        session
    }

    /// Watches a space as client `watch-<origin>/<space>`.
    pub(crate) fn watch(&mut self, now: Duration, origin: &str, space: &str) {
        let session = self.connect(now, &format!("watch-{origin}/{space}"), Front::Internal, false);
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

/// The time of a host that started at `started` and whose clock is off by so much.
fn wall(now: Duration, started: Duration, off_s: i64, trusted: bool) -> Now {
    const BEGINNING_US: u64 = 1_790_000_000_000_000;
    let wall_us = BEGINNING_US + u64::try_from(now.as_micros()).expect("short runs");
    Now { mono: now - started, wall_us: wall_us.saturating_add_signed(off_s * 1_000_000), trusted }
}
