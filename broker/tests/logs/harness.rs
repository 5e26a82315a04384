//! Brokers in simulated time: the real core over the store in memory, and the link between two of them.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::{
        Config, Core, Policy, StreamConfig,
        event::{
            Action, Command, Event, Front, LinkOpen, LogInfo, Now, OriginFilter, Output, Peer, Publish,
            PublishRefusal, Reply, Response, RetainedOnSubscribe, Role, SessionId, SessionOpen, Subscription,
            Target,
        },
    },
    store::{Store, StoreEvent, mem::MemStore},
};
use bytes::Bytes;
use codec::{Class, Filter, FrameView, Kind, Record, frame::FrameParts, proto};

/// 2026, in microseconds.
pub(crate) const EPOCH_US: u64 = 1_767_225_600_000_000;
pub(crate) const CLIENT: SessionId = SessionId(1);

/// A core, its store, one client.
pub(crate) struct Broker {
    pub(crate) config: Config,
    core: Core,
    pub(crate) store: MemStore,
    pub(crate) now: Duration,
    started: Duration,
    pub(crate) trusted: bool,
    actions: Vec<Action>,
    responses: VecDeque<Response>,
    pub(crate) acked: Vec<u16>,
    pub(crate) refused: Vec<PublishRefusal>,
    /// (seq, packet id) of deliveries that await their acknowledgement.
    pub(crate) delivered: Vec<(u64, u16)>,
    sent: VecDeque<(SessionId, Vec<Record>)>,
    restarts: u64,
    sessions: u64,
}

impl Broker {
    pub(crate) fn new(config: Config, now: Duration) -> Self {
        let store = MemStore::new();
        let mut actions = Vec::new();
        let at = Now { mono: Duration::ZERO, wall_us: EPOCH_US + now.as_micros() as u64, trusted: true };
        let core = Core::restore(config.clone(), store.recover(), at, &mut actions);
        let mut broker = Self {
            config,
            core,
            store,
            now,
            started: now,
            trusted: true,
            actions,
            responses: VecDeque::new(),
            acked: Vec::new(),
            refused: Vec::new(),
            delivered: Vec::new(),
            sent: VecDeque::new(),
            restarts: 0,
            sessions: 0,
        };
        broker.open();
        broker
    }

    pub(crate) fn at(&self) -> Now {
        let wall_us = EPOCH_US + self.now.as_micros() as u64;
        Now { mono: self.now - self.started, wall_us, trusted: self.trusted }
    }

    pub(crate) fn open(&mut self) {
        self.event(Event::SessionOpened(SessionOpen {
            session: CLIENT,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        }));
    }

    /// A lasting MQTT session that reads the stream `s`.
    pub(crate) fn open_mqtt(&mut self, client: &str, new: bool) -> SessionId {
        self.sessions += 1;
        let session = SessionId(1000 + self.sessions);
        self.event(Event::SessionOpened(SessionOpen {
            session,
            front: Front::Mqtt,
            client_id: client.into(),
            clean_start: new,
            expiry_s: u32::MAX,
            receive_max: u16::MAX,
            will: None,
        }));
        if new {
            let subscription = Subscription {
                id: 1,
                origin: OriginFilter::Own,
                filter: Filter::parse("s/#").expect("a filter"),
                qos: 1,
                group: None,
                no_local: false,
                retain_as_published: false,
                retained: RetainedOnSubscribe::DoNotSend,
                wildcard_matches_dollar: false,
                identifier: 0,
            };
            self.event(Event::Subscribed { session, token: 1, subscriptions: vec![subscription] });
        }
        self.settle();
        session
    }

    /// The power is cut: what was not flushed is lost.
    pub(crate) fn crash(&mut self) {
        let (store, recovered) = std::mem::take(&mut self.store).crash();
        self.store = store;
        self.restarts += 1;
        self.started = self.now;
        self.actions.clear();
        self.acked.clear();
        self.delivered.clear();
        let config = Config { seed: self.config.seed + self.restarts, ..self.config.clone() };
        self.core = Core::restore(config, recovered, self.at(), &mut self.actions);
        self.open();
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.core.apply(self.at(), event, &mut self.actions);
        self.perform();
    }

    pub(crate) fn perform(&mut self) {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Persist(group) => self.store.submit(group),
                Action::Read(request) => self.store.read(request),
                Action::Respond { response, .. } => self.responses.push_back(response),
                Action::Tier(ask) => panic!("no tier here: {ask:?}"),
                Action::Output { session, output } => {
                    let bytes = output.cost();
                    match output {
                        Output::Reply(Reply::PubAck(id)) => self.acked.push(id),
                        Output::Reply(Reply::Refused { reason, .. }) => self.refused.push(reason),
                        Output::Deliver(delivery) if delivery.packet_id != 0 => {
                            let seq = delivery.position.map_or(0, |position| position.seq);
                            self.delivered.push((seq, delivery.packet_id));
                        }
                        Output::Send { records, .. } => self.sent.push_back((session, records)),
                        Output::Close(reason) => panic!("{} was closed: {reason:?}", self.config.name),
                        _ => {}
                    }
                    self.core.apply(self.at(), Event::Sent { session, bytes }, &mut self.actions);
                }
            }
        }
        if !self.actions.is_empty() {
            self.perform();
        }
    }

    /// Makes everything durable, does all that is due, until nothing moves.
    pub(crate) fn settle(&mut self) {
        loop {
            self.perform();
            self.store.flush();
            let mut cx = Context::from_waker(Waker::noop());
            let mut moved = false;
            while let Poll::Ready(event) = self.store.poll_event(&mut cx) {
                moved = true;
                self.event(match event {
                    StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                    StoreEvent::Read { read, records, next } => Event::ReadDone { read, records, next },
                    StoreEvent::Refused { lsn, reason } => Event::StoreRefused { lsn, reason },
                    StoreEvent::Low { reason } => Event::StoreLow { reason },
                    StoreEvent::Ample => Event::StoreAmple,
                    StoreEvent::Damaged(damage) => Event::StoreDamaged(damage),
                    StoreEvent::Tier(news) => Event::Tier(news),
                });
            }
            if self.core.deadline().is_some_and(|at| at <= self.now - self.started) {
                moved = true;
                self.event(Event::TimerFired);
            }
            if !moved {
                return;
            }
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.settle();
    }

    pub(crate) fn message(&self, topic: &str, payload: &[u8], packet_id: u16) -> Publish {
        let frame = FrameParts {
            topic,
            time_us: self.at().wall_us,
            time_trusted: self.trusted,
            payload,
            ..FrameParts::default()
        };
        let (target, reply) = (Target::Own, None);
        Publish { target, frame: frame.encode(), qos: 1, packet_id, dup: false, retain: false, reply }
    }

    pub(crate) fn publish(&mut self, messages: Vec<Publish>) {
        self.event(Event::Published { session: CLIENT, messages });
    }

    pub(crate) fn ask(&mut self, command: Command) -> Response {
        self.event(Event::Commanded { command, id: 1 });
        self.settle();
        self.responses.pop_front().expect("an answer")
    }

    pub(crate) fn log(&mut self, origin: &str, stream: &str) -> Option<LogInfo> {
        match self.ask(Command::LogList { origin: Some(origin.into()) }) {
            Response::Logs(logs) => logs.into_iter().rfind(|log| *log.stream == *stream),
            other => panic!("{other:?}"),
        }
    }

    /// Everything that is told of a Log, from its beginning.
    pub(crate) fn read(&mut self, log: &LogInfo) -> Vec<Record> {
        let mut all: Vec<Record> = Vec::new();
        let mut from = 0;
        while from < log.next {
            let (origin, stream) = (Arc::clone(&log.origin), Arc::clone(&log.stream));
            let command = Command::LogRead { origin, stream, epoch: None, from, bytes_max: 1 << 20 };
            let Response::Records { records, next } = self.ask(command) else { panic!("records") };
            assert!(next > from, "a read goes on");
            all.extend(records);
            from = next;
        }
        all
    }
}

pub(crate) fn range(record: &Record) -> (u64, u64) {
    if record.header.kind == Kind::GAP {
        let gap: proto::Gap = codec::decode(record.body.clone()).expect("a gap");
        assert_eq!(gap.count, gap.to + 1 - gap.from, "a gap counts what it stands for");
        return (gap.from, gap.to);
    }
    (record.header.seq, record.header.seq)
}

pub(crate) fn payload(record: &Record) -> Bytes {
    let view = FrameView::parse(&record.body).expect("a frame");
    record.body.slice_ref(view.payload())
}

/// Records and gaps tell every seq from `begin` on once, in order. How many seqs the gaps stand for.
pub(crate) fn check_partition(log: &LogInfo, entries: &[Record]) -> u64 {
    let (mut next, mut in_gaps) = (log.begin, 0);
    for entry in entries {
        let (from, to) = range(entry);
        assert_eq!(from, next, "{}: every seq is told once", log.stream);
        if entry.header.kind == Kind::GAP {
            in_gaps += to + 1 - from;
        }
        next = to + 1;
    }
    assert_eq!(next, log.next, "{}: up to the end", log.stream);
    in_gaps
}

/// What the Log says it keeps is what stands in the store.
pub(crate) fn check_accounting(log: &LogInfo, entries: &[Record]) {
    let kept: Vec<&Record> = entries.iter().filter(|entry| range(entry).1 >= log.first).collect();
    let bytes: usize = kept.iter().map(|entry| entry.wire_len()).sum();
    let records = kept.iter().filter(|entry| entry.header.kind == Kind::LOG).count();
    assert_eq!((log.bytes, log.records), (bytes as u64, records as u64), "{}", log.stream);
}

pub(crate) fn stream(name: &str, class: Class, policy: Policy) -> StreamConfig {
    let filters = vec![Filter::parse(&format!("{name}/#")).expect("a filter")];
    StreamConfig { name: name.into(), filters, class, policy }
}

pub(crate) fn node(streams: Vec<StreamConfig>) -> Config {
    Config { streams, ..Config::node("n1", [7; 16], 1) }
}

/// Two brokers and the link between them.
pub(crate) fn link(node: &mut Broker, hub: &mut Broker, session: SessionId) {
    let peer = |name: &str, role| Peer { name: name.into(), role, generation: u32::from(role == Role::Node) };
    hub.event(Event::LinkOpened(LinkOpen { session, peer: peer("n1", Role::Node), dialler: false }));
    node.event(Event::LinkOpened(LinkOpen { session, peer: peer("h", Role::Hub), dialler: true }));
    exchange(node, hub);
}

pub(crate) fn exchange(node: &mut Broker, hub: &mut Broker) {
    loop {
        node.settle();
        hub.settle();
        if node.sent.is_empty() && hub.sent.is_empty() {
            return;
        }
        while let Some((session, records)) = node.sent.pop_front() {
            hub.event(Event::LinkReceived { session, records });
        }
        while let Some((session, records)) = hub.sent.pop_front() {
            node.event(Event::LinkReceived { session, records });
        }
    }
}

pub(crate) fn unlink(node: &mut Broker, hub: &mut Broker, session: SessionId) {
    node.event(Event::LinkClosed { session });
    hub.event(Event::LinkClosed { session });
    node.settle();
    hub.settle();
}

/// A Log at the hub tells the same as at the node.
pub(crate) fn assert_same(node: &mut Broker, hub: &mut Broker, stream: &str) {
    let (here, there) = (node.log("n1", stream).expect("here"), hub.log("n1", stream).expect("there"));
    let (here, there) = (node.read(&here), hub.read(&there));
    let told = |records: &[Record]| -> Vec<(u64, u64, Option<Bytes>)> {
        let one = |record: &Record| {
            let (from, to) = range(record);
            (from, to, (record.header.kind == Kind::LOG).then(|| record.body.clone()))
        };
        // A change of epoch covers nothing, and stands only at the receiver.
        records.iter().filter(|record| range(record).0 <= range(record).1).map(one).collect()
    };
    let (here, there) = (told(&here), told(&there));
    assert_eq!(here.len(), there.len());
    for (here, there) in here.iter().zip(&there) {
        assert_eq!(here, there);
    }
}

/// A node with one stream `s`, of this policy.
pub(crate) fn node_with(policy: Policy) -> Broker {
    Broker::new(node(vec![stream("s", Class::Telemetry, policy)]), Duration::ZERO)
}

/// Publishes `count` messages of 1 KB, a second apart.
pub(crate) fn fill(node: &mut Broker, topic: &str, count: u64) {
    for _ in 0..count {
        node.pass(Duration::from_secs(1));
        let message = node.message(topic, &[b'x'; 1000], 1);
        node.publish(vec![message]);
    }
    node.settle();
}

pub(crate) fn reasons(entries: &[Record]) -> Vec<proto::GapReason> {
    let gaps = entries.iter().filter(|entry| entry.header.kind == Kind::GAP);
    let mut reasons: Vec<proto::GapReason> =
        gaps.map(|entry| codec::decode::<proto::Gap>(entry.body.clone()).expect("a gap").reason()).collect();
    reasons.dedup();
    reasons
}
