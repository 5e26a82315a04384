//! A connection against a broker that a script plays: only the wire and the order of events are under test.

use std::sync::atomic::Ordering::Relaxed;

use codec::{FrameView, frame::FrameParts};
use tokio::{io::DuplexStream, sync::mpsc, task::JoinHandle};

use super::*;
use crate::{
    core::event::{ClientAck, CloseReason, Delivery, PublishRefusal, Reply, Subscription},
    front::auth::{Auth, Users},
    handle::{Input as BrokerInput, Outboxes},
};

const V4: u8 = 4;
const V5: u8 = 5;

/// The other side of a [`Handle`].
struct Script {
    inputs: mpsc::Receiver<BrokerInput>,
    outboxes: Arc<Outboxes>,
}

impl Script {
    async fn event(&mut self) -> Event {
        match self.inputs.recv().await.expect("the handle lives") {
            BrokerInput::Event { event, .. } => event,
            BrokerInput::Command { command, .. } => panic!("a client gives no commands: {command:?}"),
        }
    }

    fn push(&self, session: SessionId, output: Output) {
        let outbox = self.outboxes.lock().unwrap().get(&session).cloned();
        outbox.expect("the session is open").push(output);
    }

    async fn published(&mut self) -> Vec<Publish> {
        match self.event().await {
            Event::Published { messages, .. } => messages,
            other => panic!("{other:?}"),
        }
    }

    async fn acked(&mut self) -> Vec<ClientAck> {
        match self.event().await {
            Event::Acked { acks, .. } => acks,
            other => panic!("{other:?}"),
        }
    }

    async fn closed(&mut self) -> bool {
        match self.event().await {
            Event::SessionClosed { clean, .. } => clean,
            other => panic!("{other:?}"),
        }
    }
}

/// A client, as raw as it gets.
struct Client {
    stream: DuplexStream,
    task: JoinHandle<()>,
}

impl Client {
    #[allow(clippy::disallowed_methods)] // a test's own task, awaited by `ended`
    fn connect(config: &Arc<Config>, broker: &Handle, stop: &CancellationToken) -> Self {
        let (stream, theirs) = tokio::io::duplex(1 << 16);
        let peer = "192.0.2.1:1883".parse().unwrap();
        let served = serve_connection(theirs, peer, Arc::clone(config), broker.clone(), stop.clone());
        Self { stream, task: tokio::spawn(served) }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet, whole.
    async fn packet(&mut self) -> Vec<u8> {
        let mut packet = vec![self.stream.read_u8().await.expect("the server says something")];
        let (mut len, mut shift) = (0, 0);
        loop {
            let byte = self.stream.read_u8().await.unwrap();
            packet.push(byte);
            len |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let head = packet.len();
        packet.resize(head + len, 0);
        self.stream.read_exact(&mut packet[head..]).await.unwrap();
        packet
    }

    async fn expect(&mut self, packet: &[u8]) {
        assert_eq!(self.packet().await, packet);
    }

    /// Everything until the server hangs up.
    async fn last_words(&mut self) -> Vec<u8> {
        let mut words = Vec::new();
        self.stream.read_to_end(&mut words).await.unwrap();
        words
    }
}

struct World {
    config: Arc<Config>,
    broker: Handle,
    script: Script,
    stop: CancellationToken,
}

impl World {
    fn new() -> Self {
        Self::with(Config::new(Auth::Anonymous))
    }

    fn with(config: Config) -> Self {
        let (broker, inputs, outboxes) = Handle::new();
        let script = Script { inputs, outboxes };
        Self { config: Arc::new(config), broker, script, stop: CancellationToken::new() }
    }

    fn dial(&self) -> Client {
        Client::connect(&self.config, &self.broker, &self.stop)
    }

    /// A client whose session is open and whose CONNACK has been read.
    async fn client(&mut self, version: u8) -> (Client, SessionId) {
        let mut client = self.dial();
        client.send(&connect(version, 0)).await;
        let session = self.opened().await.session;
        self.script.push(session, Output::Reply(Reply::Opened { session_present: false }));
        let connack = client.packet().await;
        assert_eq!((connack[0], connack[connack.len().min(4) - 1]), (0x20, 0), "{connack:?}");
        (client, session)
    }

    async fn opened(&mut self) -> SessionOpen {
        match self.script.event().await {
            Event::SessionOpened(open) => open,
            other => panic!("{other:?}"),
        }
    }

    fn reply(&self, session: SessionId, reply: Reply) {
        self.script.push(session, Output::Reply(reply));
    }
}

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    super::super::wire::put_varint(&mut out, body.len());
    out.extend_from_slice(body);
    out
}

fn connect(version: u8, keep_alive: u8) -> Vec<u8> {
    let properties: &[u8] = if version == V5 { &[0] } else { &[] };
    packet(0x10, &[b"\0\x04MQTT", &[version, 2, 0, keep_alive][..], properties, b"\0\x02c1"].concat())
}

fn publish(version: u8, qos: u8, packet_id: u8, topic: &str, payload: &[u8]) -> Vec<u8> {
    let id: &[u8] = if qos > 0 { &[0, packet_id] } else { &[] };
    let properties: &[u8] = if version == V5 { &[0] } else { &[] };
    let topic = [&[0, topic.len() as u8], topic.as_bytes()].concat();
    packet(0x30 | qos << 1, &[&topic, id, properties, payload].concat())
}

fn delivery(topic: &str, payload: &[u8], qos: u8, packet_id: u16) -> Delivery {
    Delivery {
        frame: FrameParts { topic, payload, ..FrameParts::default() }.encode(),
        origin: "".into(),
        sub: 1,
        identifiers: None,
        qos,
        packet_id,
        dup: false,
        retain: false,
        position: None,
        reply: None,
        no_responders: false,
    }
}

#[tokio::test]
async fn connack_or_suback_from_a_client_closes_that_client_only() {
    for version in [V4, V5] {
        for poison in [[0x20, 1, 0], [0xb0, 1, 0], [0x90, 1, 0]] {
            let mut world = World::new();
            let (mut bystander, other) = world.client(version).await;
            let (mut client, _session) = world.client(version).await;
            client.send(&poison).await;
            let words = client.last_words().await;
            let expected: &[u8] = if version == V5 { &[0xe0, 2, reason::PROTOCOL, 0] } else { &[] };
            assert_eq!(words, expected, "{version} {poison:?}");
            assert!(!world.script.closed().await, "the will is published");
            drop(client.stream);
            client.task.await.expect("no panic");
            assert_eq!(world.config.counters.closed(Cause::ProtocolError), 1);
            bystander.send(&[0xc0, 0]).await;
            bystander.expect(&[0xd0, 0]).await;
            world.reply(other, Reply::PubAck(9));
            bystander.expect(&[0x40, 2, 0, 9]).await;
        }
    }
}

#[tokio::test]
async fn a_publish_is_acknowledged_when_the_broker_says_that_it_is_durable() {
    for version in [V4, V5] {
        let mut world = World::new();
        let (mut client, session) = world.client(version).await;
        client.send(&publish(version, 1, 7, "a/b", b"71.5")).await;
        let messages = world.script.published().await;
        let view = FrameView::parse(&messages[0].frame).unwrap();
        assert_eq!((view.topic(), view.payload()), ("a/b", &b"71.5"[..]));
        assert_eq!((messages[0].qos, messages[0].packet_id), (1, 7));
        client.send(&[0xc0, 0]).await;
        client.expect(&[0xd0, 0]).await;
        world.reply(session, Reply::PubAck(7));
        client.expect(&[0x40, 2, 0, 7]).await;
    }
}

#[tokio::test]
async fn publishes_of_one_read_are_one_event_in_order() {
    let mut world = World::new();
    let (mut client, _session) = world.client(V4).await;
    let burst: Vec<u8> = (0..20).flat_map(|id| publish(V4, 1, id + 1, "t", &[id])).collect();
    client.send(&burst).await;
    let mut payloads = Vec::new();
    let mut events = 0;
    while payloads.len() < 20 {
        events += 1;
        for message in world.script.published().await {
            payloads.push(FrameView::parse(&message.frame).unwrap().payload()[0]);
        }
    }
    assert_eq!(payloads, (0..20).collect::<Vec<u8>>());
    assert_eq!(events, 1, "a burst that fits one read");
}

#[tokio::test]
async fn qos_2_runs_through_all_four_packets_in_both_directions() {
    for version in [V4, V5] {
        let mut world = World::new();
        let (mut client, session) = world.client(version).await;
        client.send(&publish(version, 2, 3, "t", b"in")).await;
        assert_eq!(world.script.published().await[0].qos, 2);
        world.reply(session, Reply::PubRec(3));
        client.expect(&[0x50, 2, 0, 3]).await;
        client.send(&[0x62, 2, 0, 3]).await;
        assert_eq!(world.script.acked().await, [ClientAck::Rel(3)]);
        world.reply(session, Reply::PubComp(3));
        client.expect(&[0x70, 2, 0, 3]).await;

        world.script.push(session, Output::Deliver(delivery("t", b"out", 2, 5)));
        client.expect(&{ publish(version, 2, 5, "t", b"out") }).await;
        client.send(&[0x50, 2, 0, 5]).await;
        assert_eq!(world.script.acked().await, [ClientAck::Rec(5)]);
        world.reply(session, Reply::PubRel(5));
        client.expect(&[0x62, 2, 0, 5]).await;
        client.send(&[0x70, 2, 0, 5]).await;
        assert_eq!(world.script.acked().await, [ClientAck::Comp(5)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_is_silent_for_at_most_one_and_a_half_keep_alive_intervals() {
    for version in [V4, V5] {
        let mut world = World::new();
        let mut client = world.dial();
        client.send(&connect(version, 10)).await;
        let session = world.opened().await.session;
        world.reply(session, Reply::Opened { session_present: false });
        client.packet().await;
        tokio::time::sleep(Duration::from_millis(14_900)).await;
        client.send(&[0xc0, 0]).await;
        client.expect(&[0xd0, 0]).await;
        let pinged = Instant::now();
        let words = client.last_words().await;
        let expected: &[u8] = if version == V5 { &[0xe0, 2, reason::KEEP_ALIVE, 0] } else { &[] };
        assert_eq!(words, expected);
        let silence = pinged.elapsed();
        assert!((15_000..15_100).contains(&silence.as_millis()), "{silence:?}");
        assert!(!world.script.closed().await, "the will is published");
        assert_eq!(world.config.counters.closed(Cause::KeepAlive), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_has_ten_seconds_to_say_connect() {
    let world = World::new();
    let started = Instant::now();
    let mut client = world.dial();
    // A byte now and then does not help.
    for byte in &connect(V5, 0)[..8] {
        client.send(&[*byte]).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(client.last_words().await.is_empty());
    assert_eq!(started.elapsed().as_secs(), 10);
    drop(client.stream);
    client.task.await.unwrap();
    assert_eq!(world.config.counters.closed(Cause::ConnectTimeout), 1);
    assert_eq!(world.config.counters.connections.load(Relaxed), 0);
}

#[tokio::test]
async fn a_wrong_protocol_level_is_answered_in_the_old_language() {
    let world = World::new();
    let mut client = world.dial();
    client.send(&packet(0x10, b"\0\x06MQIsdp\x03\x02\0\0\0\x01a")).await;
    assert_eq!(client.last_words().await, [0x20, 2, 0, 1]);
}

#[tokio::test]
async fn a_malformed_packet_is_answered_with_its_reason() {
    for (bytes, cause, code) in [
        (vec![0x36, 3, 0, 1, b'a'], Cause::Malformed, reason::MALFORMED),
        (publish(V5, 0, 0, "a/+", b""), Cause::ProtocolError, reason::BAD_TOPIC),
        (vec![0x30, 0xff, 0xff, 0xff, 0x7f], Cause::PacketTooLarge, reason::PACKET_TOO_LARGE),
        (connect(V5, 0), Cause::ProtocolError, reason::PROTOCOL),
        (vec![0xf0, 2, 0, 0], Cause::ProtocolError, reason::PROTOCOL),
        (vec![0x30, 6, 0, 0, 3, 35, 0, 1], Cause::ProtocolError, reason::BAD_TOPIC_ALIAS),
    ] {
        let mut world = World::new();
        let (mut client, _session) = world.client(V5).await;
        client.send(&bytes).await;
        assert_eq!(client.last_words().await, [0xe0, 2, code, 0], "{bytes:?}");
        assert_eq!(world.config.counters.closed(cause), 1, "{bytes:?}");
    }
}

#[tokio::test]
async fn disconnect_takes_the_will_away_unless_it_asks_for_it() {
    for (version, bytes, clean) in
        [(V4, &[0xe0, 0][..], true), (V5, &[0xe0, 0], true), (V5, &[0xe0, 1, 4], false)]
    {
        let mut world = World::new();
        let (mut client, _session) = world.client(version).await;
        client.send(bytes).await;
        assert_eq!(world.script.closed().await, clean);
        assert!(client.last_words().await.is_empty());
    }
    let mut world = World::new();
    let (client, _session) = world.client(V4).await;
    drop(client.stream);
    assert!(!world.script.closed().await, "hanging up is not saying goodbye");
}

#[tokio::test]
async fn disconnect_may_shorten_a_lasting_session_but_not_make_one_last() {
    for (expiry, lasts) in [(60, true), (0, false)] {
        let mut world = World::new();
        let mut client = world.dial();
        let body = [b"\0\x04MQTT\x05\x02\0\0\x05\x11\0\0\0", &[expiry][..], b"\0\x02c1"].concat();
        client.send(&packet(0x10, &body)).await;
        let open = world.opened().await;
        assert_eq!(open.expiry_s, u32::from(expiry));
        world.reply(open.session, Reply::Opened { session_present: false });
        client.packet().await;
        client.send(&[0xe0, 7, 0, 5, 0x11, 0, 0, 0, 5]).await;
        if lasts {
            let event = world.script.event().await;
            assert!(matches!(event, Event::ExpiryChanged { expiry_s: 5, .. }), "{event:?}");
            assert!(world.script.closed().await);
        } else {
            assert_eq!(client.last_words().await, [0xe0, 2, reason::PROTOCOL, 0]);
        }
    }
}

#[tokio::test]
async fn a_takeover_is_told_to_the_older_connection() {
    let mut world = World::new();
    let (mut client, session) = world.client(V5).await;
    world.script.push(session, Output::Close(CloseReason::TakenOver));
    assert_eq!(client.last_words().await, [0xe0, 2, reason::TAKEN_OVER, 0]);
}

#[tokio::test]
async fn a_session_that_the_broker_does_not_open_is_refused_in_connack() {
    for (version, expected) in [(V4, &[0x20, 2, 0, 3][..]), (V5, &[0x20, 3, 0, reason::UNAVAILABLE, 0])] {
        let mut world = World::new();
        let mut client = world.dial();
        client.send(&connect(version, 0)).await;
        let session = world.opened().await.session;
        world.script.push(session, Output::Close(CloseReason::Shutdown));
        assert_eq!(client.last_words().await, expected);
    }
}

#[tokio::test]
async fn nothing_but_a_listed_user_gets_in() {
    let users = Users::parse("").unwrap();
    let world = World::with(Config::new(Auth::Users(Arc::new(users))));
    for (version, expected) in [(V4, &[0x20, 2, 0, 4][..]), (V5, &[0x20, 3, 0, reason::BAD_CREDENTIALS, 0])] {
        let mut client = world.dial();
        client.send(&connect(version, 0)).await;
        assert_eq!(client.last_words().await, expected);
    }
    assert_eq!(world.config.counters.closed(Cause::BadCredentials), 2);
}

#[tokio::test]
async fn a_refused_publish_is_acknowledged_after_those_before_it() {
    for (version, refusal) in [(V4, &[0x40, 2, 0, 2][..]), (V5, &[0x40, 3, 0, 2, reason::NOT_AUTHORIZED])] {
        let mut world = World::new();
        let (mut client, session) = world.client(version).await;
        let mut burst = publish(version, 1, 1, "a", b"x");
        burst.extend(publish(version, 1, 2, "$SYS/a", b"x"));
        burst.extend(publish(version, 1, 3, "a", b"x"));
        client.send(&burst).await;
        let ids: Vec<u16> = world.script.published().await.iter().map(|sent| sent.packet_id).collect();
        assert_eq!(ids, [1, 3], "what is refused never reaches the broker");
        world.reply(session, Reply::PubAck(1));
        world.reply(session, Reply::PubAck(3));
        client.expect(&[0x40, 2, 0, 1]).await;
        client.expect(refusal).await;
        client.expect(&[0x40, 2, 0, 3]).await;
        assert_eq!(world.config.counters.publishes_denied.load(Relaxed), 1);
    }
}

#[tokio::test]
async fn a_publish_that_cannot_be_stored_is_never_acknowledged_as_if_it_were() {
    let refused = || Reply::Refused { packet_id: 1, qos: 1, reason: PublishRefusal::StoreUnavailable };
    for version in [V4, V5] {
        let mut world = World::new();
        let (mut client, session) = world.client(version).await;
        client.send(&publish(version, 1, 1, "a", b"x")).await;
        world.script.published().await;
        world.reply(session, refused());
        if version == V5 {
            client.expect(&[0x40, 3, 0, 1, reason::QUOTA]).await;
        } else {
            assert!(client.last_words().await.is_empty(), "3.1.1 cannot say no: it is closed");
            assert_eq!(world.config.counters.closed(Cause::PublishRefused), 1);
        }
    }
}

#[tokio::test]
async fn subscriptions_are_granted_by_the_broker_or_refused_here() {
    let mut world = World::new();
    let (mut client, session) = world.client(V5).await;
    let filters = b"\0\x03a/b\x01\0\x0a$share/g/t\0\0\x04a/#b\0\0\x01#\x02";
    client.send(&packet(0x82, &[&[0, 9, 2, 11, 5][..], filters].concat())).await;
    let Event::Subscribed { token, subscriptions, .. } = world.script.event().await else { panic!() };
    let wanted: Vec<(&str, u8, u32)> = subscriptions
        .iter()
        .map(|one: &Subscription| (one.filter.as_str(), one.qos, one.identifier))
        .collect();
    assert_eq!(wanted, [("a/b", 1, 5), ("#", 2, 5)]);
    world.reply(session, Reply::Subscribed { token, granted: vec![1, 2] });
    client.expect(&[0x90, 7, 0, 9, 0, 1, reason::NO_SHARED, reason::BAD_FILTER, 2]).await;

    client.send(&packet(0xa2, b"\0\x0a\0\0\x03a/b\0\x01z")).await;
    let Event::Unsubscribed { token, which, .. } = world.script.event().await else { panic!() };
    assert_eq!(which.len(), 2);
    world.reply(session, Reply::Unsubscribed { token, existed: vec![true, false] });
    client.expect(&[0xb0, 5, 0, 10, 0, 0, reason::NO_SUBSCRIPTION]).await;
}

#[tokio::test]
async fn a_client_beyond_the_receive_maximum_is_closed() {
    let mut config = Config::new(Auth::Anonymous);
    config.receive_max = 2;
    let mut world = World::with(config);
    let (mut client, session) = world.client(V5).await;
    for id in [1, 2] {
        client.send(&publish(V5, 1, id, "a", b"x")).await;
        world.script.published().await;
    }
    world.reply(session, Reply::PubAck(1));
    client.expect(&[0x40, 2, 0, 1]).await;
    client.send(&publish(V5, 1, 3, "a", b"x")).await;
    world.script.published().await;
    client.send(&publish(V5, 1, 4, "a", b"x")).await;
    assert_eq!(client.last_words().await, [0xe0, 2, reason::RECEIVE_MAX, 0]);
}

#[tokio::test]
async fn a_topic_alias_stands_for_its_topic() {
    let mut world = World::new();
    let (mut client, _session) = world.client(V5).await;
    client.send(&packet(0x30, b"\0\x03a/b\x03\x23\0\x01one")).await;
    client.send(&packet(0x30, b"\0\0\x03\x23\0\x01two")).await;
    let mut messages = world.script.published().await;
    while messages.len() < 2 {
        messages.extend(world.script.published().await);
    }
    for (message, payload) in messages.iter().zip(["one", "two"]) {
        let view = FrameView::parse(&message.frame).unwrap();
        assert_eq!((view.topic(), view.payload()), ("a/b", payload.as_bytes()));
    }
}

#[tokio::test]
async fn a_delivery_that_the_client_cannot_take_counts_as_done() {
    let mut world = World::new();
    let mut client = world.dial();
    let small = packet(0x10, b"\0\x04MQTT\x05\x02\0\0\x05\x27\0\0\0\x40\0\x02c1");
    client.send(&small).await;
    let session = world.opened().await.session;
    world.reply(session, Reply::Opened { session_present: true });
    assert_eq!(client.packet().await[2], 1, "session present");
    world.script.push(session, Output::Deliver(delivery("t", &[7; 100], 1, 4)));
    assert_eq!(world.script.acked().await, [ClientAck::Ack(4)]);
    world.script.push(session, Output::Deliver(delivery("t", b"fits", 0, 0)));
    client.expect(&publish(V5, 0, 0, "t", b"fits")).await;
}

#[tokio::test]
async fn outputs_are_reported_as_sent_in_steps() {
    let mut world = World::new();
    let (mut client, session) = world.client(V4).await;
    let mut cost = 0;
    for number in 0..40 {
        let output = Output::Deliver(delivery("t", &[number; 1000], 0, 0));
        cost += output.cost();
        world.script.push(session, output);
    }
    for number in 0..40 {
        client.expect(&publish(V4, 0, 0, "t", &[number; 1000])).await;
    }
    let mut reported = 0;
    while cost + 200 - reported >= limits::SENT_REPORT_BYTES {
        let Event::Sent { bytes, .. } = world.script.event().await else { panic!() };
        assert!(bytes >= limits::SENT_REPORT_BYTES);
        reported += bytes;
    }
    assert!(reported <= cost + 200);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_no_bytes_is_given_up() {
    let mut world = World::new();
    let (client, session) = world.client(V4).await;
    for _ in 0..10 {
        world.script.push(session, Output::Deliver(delivery("t", &[1; 50_000], 0, 0)));
    }
    loop {
        if let Event::SessionClosed { clean, .. } = world.script.event().await {
            break assert!(!clean);
        }
    }
    client.task.await.unwrap();
    assert_eq!(world.config.counters.closed(Cause::SlowConsumer), 1);
}

#[tokio::test]
async fn stopping_says_goodbye_and_ends_the_task() {
    let mut world = World::new();
    let (mut client, _session) = world.client(V5).await;
    world.stop.cancel();
    assert_eq!(client.last_words().await, [0xe0, 2, reason::SHUTTING_DOWN, 0]);
    assert!(!world.script.closed().await);
    drop(client.stream);
    client.task.await.unwrap();
}

#[tokio::test]
async fn an_idle_connection_is_small() {
    let (broker, _inputs, _outboxes) = Handle::new();
    let config = Arc::new(Config::new(Auth::Anonymous));
    let (stream, _theirs) = tokio::io::duplex(64);
    let peer = "192.0.2.1:1".parse().unwrap();
    let future = serve_connection(stream, peer, config, broker, CancellationToken::new());
    let outer = size_of_val(&future);
    assert!(
        outer <= 1536,
        "{outer}: with {} of the session and the read buffer, 4 KiB",
        size_of::<Session>()
    );
}
