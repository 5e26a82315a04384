//! A node over a store on disk, driven by hand: the driver's work without its task, and the clients' side.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::Path,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::Duration,
};

use bytes::Bytes;
use codec::{Class, Filter, FrameView, Kind, frame::FrameParts};
use rand::{Rng, rngs::SmallRng};

use super::clients::{Note, Place, World};
use crate::{
    core::{Config, Core, Full, Policy, StreamConfig, event::*},
    store::{
        Recovered, Store, StoreEvent,
        files::tape::Tape,
        journal::{JournalIo, disk::Disk, tests::Tape as Faults},
        lmdb::{self, LmdbStore, Options},
        mem::MemStore,
    },
};

const KEYS: u64 = 6;
const SUBSCRIBER: usize = 10;

/// See the module's documentation.
pub(super) struct Run<'a> {
    core: Core,
    store: Option<LmdbStore>,
    path: &'a Path,
    faults: Faults,
    tape: Option<&'a Tape>,
    now: Now,
    world: World,
    notes: Vec<Note>,
    unpersisted: VecDeque<Group>,
    reads: usize,
    outputs: VecDeque<(SessionId, Output)>,
    next_session: u64,
    /// Sessions of devices (0, 1) and subscribers (10, 11).
    sessions: BTreeMap<usize, SessionId>,
    next_command: CommandId,
    /// Writes of State that were not answered.
    asked: BTreeMap<CommandId, Vec<(String, Option<u64>)>>,
    answer: Option<Response>,
    /// Subscribers acknowledge at once.
    eager: bool,
}

fn config() -> Config {
    let stream = |name: &str, filter: &str, bytes_max| StreamConfig {
        name: name.into(),
        filters: vec![Filter::parse(filter).unwrap()],
        policy: Policy::of_class(Class::Event, bytes_max),
        ..Config::node("n", [1; 16], 1).default_stream
    };
    let telemetry = Policy::of_class(Class::Event, 128 << 10);
    Config {
        streams: vec![stream("alarm", "alarm/#", 1 << 20)],
        default_stream: StreamConfig {
            policy: Policy { full: Full::Thin { window: Duration::from_secs(1) }, ..telemetry },
            ..stream("default", "#", 0)
        },
        ..Config::node("n", [1; 16], getrandom::u64().unwrap())
    }
}

fn options() -> Options {
    Options {
        segment_bytes: 8 << 10,
        checkpoint_bytes: 24 << 10,
        checkpoint_every: Duration::from_millis(4),
        map_bytes: 16 << 20,
        rewrite_after: 1,
        io: JournalIo::Plain,
        ..Options::node()
    }
}

/// What the store must hold after these groups, by the model.
fn model(world: &World, last: Lsn) -> Recovered {
    let mut model = MemStore::auto();
    for (lsn, group) in world.groups.range(..=last) {
        assert_eq!(*lsn, group.lsn);
        model.submit(group.clone());
    }
    let polled = model.poll_event(&mut Context::from_waker(Waker::noop()));
    assert!(last == 0 || matches!(polled, Poll::Ready(StoreEvent::Persisted(lsn)) if lsn == last));
    model.recover()
}

fn assert_equal(found: &Recovered, expected: &Recovered) {
    let last = found.last_lsn;
    assert_eq!(found.sources, expected.sources, "after group {last}");
    assert_eq!(found.locals, expected.locals, "after group {last}");
    assert_eq!(found.state, expected.state, "after group {last}");
    // How bytes are spread over a Log is an estimate after cuts.
    let ends = |recovered: &Recovered| -> Vec<_> {
        let logs = recovered.logs.iter();
        logs.map(|log| (log.source, log.first, log.last, log.last_epoch, log.last_crc)).collect()
    };
    assert_eq!(ends(found), ends(expected), "after group {last}");
}

impl<'a> Run<'a> {
    /// Opens the store in this folder, which held what `world` was told and perhaps more, and compares it
    /// with the model; then starts a node over it, to which all clients connect. What is said goes on the tape.
    pub(super) fn open(path: &'a Path, world: World, tape: Option<&'a Tape>, rng: &mut SmallRng) -> Self {
        Self::open_after(path, world, Vec::new(), tape, rng)
    }

    fn open_after(
        path: &'a Path,
        world: World,
        notes: Vec<Note>,
        tape: Option<&'a Tape>,
        rng: &mut SmallRng,
    ) -> Self {
        let faults = Faults::default();
        let mut disk = Disk::new(JournalIo::Plain).unwrap();
        disk.tape = Some(faults.clone());
        let (store, recovered) = lmdb::open_on(path, options(), disk).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(recovered.damage, [], "a crash damages nothing");
        let last = recovered.last_lsn;
        assert!(last >= world.durable, "groups up to {} were durable, {last} is the last", world.durable);
        assert!(world.groups.len() as u64 >= last, "group {last} was never written");
        assert_equal(&recovered, &model(&world, last));

        let now = Now { mono: Duration::ZERO, wall_us: 1_800_000_000_000_000, trusted: true };
        let mut actions = Vec::new();
        let core = Core::restore(config(), recovered, now, &mut actions);
        let mut run = Self {
            core,
            store: Some(store),
            path,
            faults,
            tape,
            now,
            world,
            notes,
            unpersisted: VecDeque::new(),
            reads: 0,
            outputs: VecDeque::new(),
            next_session: 1,
            sessions: BTreeMap::new(),
            next_command: 1,
            asked: BTreeMap::new(),
            answer: None,
            eager: rng.random_bool(0.5),
        };
        run.note(Note::Opened(last));
        run.perform(actions);
        run.connect_all();
        run
    }

    fn note(&mut self, note: Note) {
        self.world.take(&note);
        self.notes.push(note);
        if let Some(tape) = self.tape {
            tape.said(self.notes.len());
        }
    }

    /// Closes the store; everything that was said.
    pub(super) fn end(self) -> Vec<Note> {
        self.notes
    }

    fn connect_all(&mut self) {
        for client in [0, 1, SUBSCRIBER, SUBSCRIBER + 1] {
            let session = SessionId(self.next_session);
            self.next_session += 1;
            self.sessions.insert(client, session);
            self.apply(Event::SessionOpened(SessionOpen {
                session,
                front: Front::Mqtt,
                client_id: format!("client-{client}").into(),
                clean_start: false,
                expiry_s: u32::MAX,
                receive_max: 20,
                will: None,
            }));
        }
        for subscriber in 0..2 {
            if self.world.subscribers[subscriber].from.is_none() {
                let subscription = Subscription {
                    id: 1,
                    origin: OriginFilter::Own,
                    filter: Filter::parse("#").unwrap(),
                    qos: subscriber as u8 + 1,
                    group: None,
                    no_local: false,
                    retain_as_published: false,
                    retained: RetainedOnSubscribe::DoNotSend,
                    wildcard_matches_dollar: false,
                    identifier: 0,
                };
                let session = self.sessions[&(SUBSCRIBER + subscriber)];
                let subscriptions = vec![subscription];
                self.apply(Event::Subscribed { session, token: 1, subscriptions });
            }
        }
        // At QoS 2 a device sends again what it does not know to be released.
        for device in 0..2 {
            for (packet, sending) in self.world.devices[device].open.clone() {
                if sending.received {
                    self.release(device, packet);
                } else {
                    self.send(device, packet, sending.id, sending.qos, sending.retain, true);
                }
            }
        }
    }

    /// Random steps.
    pub(super) fn go(&mut self, steps: usize, rng: &mut SmallRng) {
        for _ in 0..steps {
            self.step(rng);
            match rng.random_range(0..10) {
                0..4 => self.settle(),
                4..8 => self.poll(),
                _ => {}
            }
        }
    }

    fn step(&mut self, rng: &mut SmallRng) {
        self.now.mono += Duration::from_millis(rng.random_range(0..60));
        self.now.wall_us += 60_000;
        match rng.random_range(0..100) {
            0..60 => {
                let (device, qos) = (rng.random_range(0..2), rng.random_range(1..3));
                let retain = rng.random_bool(0.1);
                for _ in 0..rng.random_range(1..4) {
                    let known = &mut self.world.devices[device];
                    let (packet, id) = (known.next_packet + 1, self.world.next_id);
                    self.send(device, packet, id, qos, retain, false);
                }
            }
            60..70 => {
                let device = rng.random_range(0..2);
                let open = self.world.devices[device].open.iter();
                let held = open.filter(|(_, sending)| sending.received).map(|(packet, _)| *packet);
                for packet in held.collect::<Vec<_>>() {
                    self.release(device, packet);
                }
            }
            70..82 => self.acknowledge(rng.random_range(0..2), rng),
            82..94 => self.write_state(rng),
            94..96 => self.eager = !self.eager,
            96..98 => self.faults.fail_after(rng.random_range(0..1500)),
            _ => self.restart(rng),
        }
    }

    fn send(&mut self, device: usize, packet_id: u16, id: u64, qos: u8, retain: bool, dup: bool) {
        let topic = match id % 5 {
            0 => format!("alarm/{device}"),
            _ if retain => format!("retained/{device}"),
            _ => format!("telemetry/{device}"),
        };
        let retain = retain && topic.starts_with("retained");
        let mut payload = id.to_le_bytes().to_vec();
        payload.resize(8 + (id as usize * 37 % 700), id as u8);
        let frame = FrameParts { topic: &topic, payload: &payload, ..FrameParts::default() }.encode();
        self.note(Note::Sent { device, packet: packet_id, id, qos, retain });
        let target = Target::Own;
        let message = Publish { target, frame, qos, packet_id, dup, retain, reply: None };
        let session = self.sessions[&device];
        self.apply(Event::Published { session, messages: vec![message] });
    }

    fn release(&mut self, device: usize, packet: u16) {
        self.note(Note::Releasing { device, packet });
        let session = self.sessions[&device];
        self.apply(Event::Acked { session, acks: vec![ClientAck::Rel(packet)] });
    }

    /// A subscriber acknowledges some of what it holds.
    fn acknowledge(&mut self, subscriber: usize, rng: &mut SmallRng) {
        let open = &self.world.subscribers[subscriber].open;
        let waiting =
            open.iter().filter(|(_, held)| !held.received).map(|(packet, held)| (*packet, held.qos));
        for (packet, qos) in waiting.collect::<Vec<_>>() {
            if rng.random_bool(0.7) {
                self.acknowledge_one(subscriber, packet, qos);
            }
        }
    }

    fn acknowledge_one(&mut self, subscriber: usize, packet: u16, qos: u8) {
        self.note(Note::Acking { subscriber, packet });
        let ack = if qos == 1 { ClientAck::Ack(packet) } else { ClientAck::Rec(packet) };
        let session = self.sessions[&(SUBSCRIBER + subscriber)];
        self.apply(Event::Acked { session, acks: vec![ack] });
    }

    /// Some keys in one write.
    fn write_state(&mut self, rng: &mut SmallRng) {
        let mut writes = Vec::new();
        for _ in 0..rng.random_range(1..4) {
            writes.push((
                format!("key/{}", rng.random_range(0..KEYS)),
                rng.random_bool(0.85).then(|| rng.random()),
            ));
        }
        let op = |(key, value): &(String, Option<u64>)| StateOp {
            space: "twin".into(),
            key: key.clone(),
            change: value.map_or(StateChange::Delete, |value| {
                StateChange::Put(Bytes::copy_from_slice(&value.to_le_bytes().repeat(20)))
            }),
            expect: Expect::Any,
        };
        let ops = writes.iter().map(op).collect();
        let id = self.next_command;
        self.next_command += 1;
        self.asked.insert(id, writes);
        self.apply(Event::Commanded { command: Command::StateWrite(ops), id });
    }

    /// The process ends, in order or not, and starts again.
    fn restart(&mut self, rng: &mut SmallRng) {
        let store = self.store.take().expect("a run has a store");
        if rng.random_bool(0.5) {
            store.kill()
        } else {
            drop(store)
        }
        let (world, notes) = (self.world.clone(), std::mem::take(&mut self.notes));
        *self = Self::open_after(self.path, world, notes, self.tape, rng);
    }

    fn apply(&mut self, event: Event) {
        let mut actions = Vec::new();
        self.core.apply(self.now, event, &mut actions);
        self.perform(actions);
    }

    fn store(&mut self) -> &mut LmdbStore {
        self.store.as_mut().expect("a run has a store")
    }

    /// The driver's part.
    fn perform(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Persist(group) => {
                    self.note(Note::Given(group.clone()));
                    self.store().submit(group.clone());
                    self.unpersisted.push_back(group);
                }
                Action::Read(request) => {
                    self.reads += 1;
                    self.store().read(request);
                }
                Action::Output { session, output } => self.outputs.push_back((session, output)),
                Action::Respond { id, response } => match (self.asked.remove(&id), response) {
                    (Some(writes), Response::Written(revisions)) => {
                        for ((key, value), revision) in writes.into_iter().zip(revisions) {
                            self.note(Note::Written { key, revision, value });
                        }
                    }
                    (Some(_), Response::Refused(_)) => {}
                    (None, response) => self.answer = Some(response),
                    (asked, response) => panic!("{asked:?} is answered by {response:?}"),
                },
                Action::Tier(ask) => panic!("no tier here: {ask:?}"),
            }
        }
    }

    fn on_stored(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Persisted(lsn) => {
                self.unpersisted.retain(|group| group.lsn > lsn);
                self.note(Note::Persisted(lsn));
                self.apply(Event::Persisted(lsn));
            }
            StoreEvent::Read { read, records, next } => {
                self.reads -= 1;
                self.apply(Event::ReadDone { read, records, next });
            }
            StoreEvent::Low { reason } => panic!("{reason}"),
            StoreEvent::Damaged(damage) => panic!("a crash damages nothing: {damage}"),
            StoreEvent::Ample => {}
            StoreEvent::Tier(news) => panic!("no tier here: {news:?}"),
            StoreEvent::Refused { lsn, reason } => {
                self.apply(Event::StoreRefused { lsn, reason });
                for group in self.unpersisted.clone() {
                    self.store().submit(group);
                }
            }
        }
    }

    /// Takes what the store has to say now, and lets the clients answer.
    fn poll(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        while let Poll::Ready(event) = self.store().poll_event(&mut cx) {
            self.on_stored(event);
        }
        self.react();
    }

    /// Until nothing is under way.
    fn settle(&mut self) {
        loop {
            self.react();
            if !self.unpersisted.is_empty() || self.reads > 0 {
                let store = self.store.as_mut().expect("a run has a store");
                let event = block_on(|cx| store.poll_event(cx));
                self.on_stored(event);
            } else if self.core.deadline().is_some_and(|due| due <= self.now.mono) {
                self.apply(Event::TimerFired);
            } else if self.outputs.is_empty() {
                return;
            }
        }
    }

    /// The clients' part.
    fn react(&mut self) {
        while let Some((session, output)) = self.outputs.pop_front() {
            self.apply(Event::Sent { session, bytes: output.cost() });
            let Some(client) = self.sessions.iter().find(|(_, held)| **held == session).map(|(n, _)| *n)
            else {
                continue;
            };
            match output {
                Output::Reply(reply) if client < SUBSCRIBER => self.device_heard(client, &reply),
                Output::Reply(reply) => self.subscriber_heard(client - SUBSCRIBER, &reply),
                Output::Deliver(delivery) => self.delivered(client - SUBSCRIBER, &delivery),
                other => panic!("client {client} gets {other:?}"),
            }
        }
    }

    fn device_heard(&mut self, device: usize, reply: &Reply) {
        match *reply {
            Reply::PubAck(packet) | Reply::PubRec(packet) => self.note(Note::Acked { device, packet }),
            Reply::PubComp(packet) => self.note(Note::Released { device, packet }),
            Reply::Refused { packet_id: packet, .. } => self.note(Note::Refused { device, packet }),
            Reply::Opened { .. } => {}
            ref other => panic!("device {device} hears {other:?}"),
        }
    }

    fn subscriber_heard(&mut self, subscriber: usize, reply: &Reply) {
        match *reply {
            Reply::Opened { session_present } => {
                let known = self.world.subscribers[subscriber].from.is_some();
                assert!(session_present || !known, "the session of subscriber {subscriber} is lost");
            }
            Reply::Subscribed { .. } => self.note(Note::Subscribed { subscriber }),
            Reply::PubRel(packet) => {
                self.note(Note::Completing { subscriber, packet });
                let session = self.sessions[&(SUBSCRIBER + subscriber)];
                self.apply(Event::Acked { session, acks: vec![ClientAck::Comp(packet)] });
            }
            ref other => panic!("subscriber {subscriber} hears {other:?}"),
        }
    }

    fn delivered(&mut self, subscriber: usize, delivery: &Delivery) {
        let position = delivery.position.as_ref().expect("retained messages were not asked for");
        let place = (position.stream.to_string(), position.seq);
        let (packet, qos) = (delivery.packet_id, delivery.qos);
        self.note(Note::Delivered { subscriber, packet, qos, place });
        let held = self.world.subscribers[subscriber].open.get(&packet);
        if self.eager || held.is_some_and(|held| held.received) {
            self.acknowledge_one(subscriber, packet, qos);
        }
    }

    /// The clients finish what they know to be under way; then everything is compared.
    pub(super) fn finish_and_compare(mut self) {
        self.eager = true;
        for _ in 0..100 {
            self.settle();
            let idle = self.world.devices.iter().all(|device| device.open.is_empty())
                && self.world.subscribers.iter().all(|subscriber| subscriber.open.is_empty());
            if idle {
                self.compare();
                return self.store.take().expect("a run has a store").kill();
            }
            self.now.mono += Duration::from_secs(2);
            for device in 0..2 {
                let open = &self.world.devices[device].open;
                let held = open.iter().filter(|(_, sending)| sending.received).map(|(packet, _)| *packet);
                for packet in held.collect::<Vec<_>>() {
                    self.release(device, packet);
                }
            }
            for subscriber in 0..2 {
                for (packet, held) in self.world.subscribers[subscriber].open.clone() {
                    if !held.received {
                        self.acknowledge_one(subscriber, packet, held.qos);
                    }
                }
            }
        }
        panic!("not done: {:?} {:?}", self.world.devices, self.world.subscribers.map(|sub| sub.open));
    }

    fn compare(&mut self) {
        let found = self.read_logs();
        let ids: BTreeMap<u64, &Place> = found.records.iter().map(|(place, id)| (*id, place)).collect();
        assert_eq!(ids.len(), found.records.len(), "a message is there twice");
        for group in self.world.groups.values() {
            for record in group.records.iter().filter(|record| record.header.kind == Kind::LOG) {
                let id = id_of(&record.body);
                let kept =
                    found.firsts.get(&record.header.source).is_some_and(|first| record.header.seq >= *first);
                assert!(
                    !kept || ids.contains_key(&id) || found.is_thinned(record),
                    "record {:?} of message {id} is missing",
                    record.header
                );
            }
        }
        let given: BTreeSet<u64> = self.world.groups.values().flat_map(messages).collect();
        let unknown: Vec<_> = self.world.acked.iter().filter(|id| !given.contains(id)).collect();
        assert!(unknown.is_empty(), "acknowledged and not in the Log: {unknown:?}");
        for subscriber in &self.world.subscribers {
            let from = subscriber.from.unwrap_or(u64::MAX);
            let due = found.records.iter().filter(|(_, id)| *id >= from);
            let missed: Vec<_> = due.filter(|(place, _)| !subscriber.seen.contains(place)).collect();
            assert!(missed.is_empty(), "never delivered: {missed:?}");
        }
        self.compare_state();
    }

    fn compare_state(&mut self) {
        for (key, (revision, value)) in self.world.written.clone() {
            let found = self.state("twin", &key);
            let now = found.as_ref().map(|entry| first_word(&entry.value()));
            let newer = found.as_ref().is_some_and(|entry| entry.revision > revision);
            // A tombstone shows no revision; then the model has compared it.
            assert!(newer || now == value || now.is_none(), "{key} at {revision}: {now:?}, not {value:?}");
        }
        for (device, id) in self.world.retained.clone() {
            let found = self.state("retained", &format!("retained/{device}")).expect("it was acknowledged");
            assert!(first_word(&found.value()) >= id, "an older retained message of device {device}");
        }
    }

    fn ask(&mut self, command: Command) -> Response {
        let id = self.next_command;
        self.next_command += 1;
        self.apply(Event::Commanded { command, id });
        self.settle();
        self.answer.take().expect("commands are answered")
    }

    fn state(&mut self, space: &str, key: &str) -> Option<StateEntry> {
        let command = Command::StateGet { origin: "n".into(), space: space.into(), key: key.to_owned() };
        match self.ask(command) {
            Response::Entry(entry) => entry,
            other => panic!("{other:?}"),
        }
    }

    /// Everything that stands in the Logs; each seq must be a record or in a gap.
    fn read_logs(&mut self) -> Found {
        let Response::Logs(logs) = self.ask(Command::LogList { origin: None }) else { panic!("not Logs") };
        let mut found = Found::default();
        for log in logs {
            let (mut next, mut at) = (log.first, log.first);
            let mut last_ids = [None; 2];
            while at < log.next {
                let (origin, stream) = (Arc::clone(&log.origin), Arc::clone(&log.stream));
                let command = Command::LogRead { origin, stream, epoch: None, from: at, bytes_max: 64 << 10 };
                let Response::Records { records, next: more } = self.ask(command) else {
                    panic!("not records")
                };
                assert!(more > at, "a read of {}..{} ends at {at}", log.first, log.next);
                at = more;
                for record in records {
                    let (from, to) = span(&record);
                    found.firsts.insert(record.header.source, log.first);
                    if to < next || to < from {
                        continue;
                    }
                    assert!(from <= next, "{} has nothing at {next}, and then {from}", log.stream);
                    next = to + 1;
                    if record.header.kind == Kind::GAP {
                        assert_eq!(&*log.stream, "default", "alarms are never thinned");
                        found.gaps.push((record.header.source, from, to));
                    }
                    if record.header.kind == Kind::LOG {
                        let id = id_of(&record.body);
                        let device = device_of(&record.body);
                        let before = last_ids[device].replace(id);
                        assert!(before < Some(id), "device {device}: {id} after {before:?}");
                        found.records.push(((log.stream.to_string(), to), id));
                    }
                }
            }
            assert_eq!(next, log.next, "{} ends early", log.stream);
        }
        found
    }
}

/// What the Logs hold.
#[derive(Debug, Default)]
struct Found {
    records: Vec<(Place, u64)>,
    firsts: BTreeMap<u32, u64>,
    /// (source, first seq, last seq) of what was thinned.
    gaps: Vec<(u32, u64, u64)>,
}

impl Found {
    fn is_thinned(&self, record: &codec::Record) -> bool {
        let (source, seq) = (record.header.source, record.header.seq);
        self.gaps.iter().any(|(of, from, to)| *of == source && (*from..=*to).contains(&seq))
    }
}

fn span(record: &codec::Record) -> (u64, u64) {
    if record.header.kind == Kind::LOG {
        return (record.header.seq, record.header.seq);
    }
    let gap: codec::proto::Gap = codec::decode(record.body.clone()).unwrap();
    assert_ne!(gap.reason(), codec::proto::GapReason::Corruption, "{gap:?}");
    (gap.from, record.header.seq)
}

fn first_word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("a payload of ours"))
}

fn id_of(frame: &Bytes) -> u64 {
    first_word(FrameView::parse(frame).unwrap().payload())
}

fn device_of(frame: &Bytes) -> usize {
    FrameView::parse(frame).unwrap().topic().rsplit('/').next().unwrap().parse().unwrap()
}

fn messages(group: &Group) -> impl Iterator<Item = u64> + '_ {
    group.records.iter().filter(|record| record.header.kind == Kind::LOG).map(|record| id_of(&record.body))
}

/// Blocks this thread until the store says something.
fn block_on<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut cx = Context::from_waker(&waker);
    loop {
        match poll(&mut cx) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
