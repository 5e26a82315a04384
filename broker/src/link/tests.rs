//! Two links, or a link and a peer that behaves badly, with the test playing the broker's driver.

pub(super) mod quic;
mod replicas;
pub(super) mod websocket;

use std::collections::VecDeque;

use bytes::BytesMut;
use codec::{Flags, FrameParts, Kind, Record, RecordHeader, batch::Encoder, proto::control::Message};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{mem::MemTransport, *};
use crate::{
    core::event::{Event, LinkOpen, Output, Role, SessionId},
    handle::{Input, Outboxes},
};

const SECOND: Duration = Duration::from_secs(1);

/// A broker whose driver is the test.
struct Broker {
    handle: Handle,
    inputs: mpsc::Receiver<Input>,
    outboxes: Arc<Outboxes>,
    session: SessionId,
    sent: usize,
    progress: watch::Sender<Progress>,
    counters: Arc<Counters>,
    links: Arc<Links>,
    stop: CancellationToken,
}

impl Broker {
    fn new() -> Self {
        let (handle, inputs, outboxes) = Handle::new();
        Self {
            handle,
            inputs,
            outboxes,
            session: SessionId(0),
            sent: 0,
            progress: watch::Sender::default(),
            counters: Arc::default(),
            links: Arc::default(),
            stop: CancellationToken::new(),
        }
    }

    fn link(&self, dialler: bool) -> Link {
        let role = if dialler { Role::Hub } else { Role::Node };
        Link {
            peer: Peer { name: "peer".into(), role, generation: 1 },
            dialler,
            broker: self.handle.clone(),
            params: Arc::default(),
            counters: Arc::clone(&self.counters),
            stop: self.stop.clone(),
            progress: Some(self.progress.clone()),
            links: Arc::clone(&self.links),
        }
    }

    /// The next event that is not a report of what was sent.
    async fn event(&mut self) -> Event {
        loop {
            match self.inputs.recv().await.unwrap() {
                Input::Event { event: Event::Sent { bytes, .. }, .. } => self.sent += bytes,
                Input::Event { event, .. } => return event,
                Input::Command { .. } => panic!("no commands here"),
            }
        }
    }

    async fn opened(&mut self) -> LinkOpen {
        match self.event().await {
            Event::LinkOpened(open) => {
                self.session = open.session;
                open
            }
            event => panic!("{event:?}"),
        }
    }

    async fn received(&mut self) -> Vec<Record> {
        match self.event().await {
            Event::LinkReceived { records, .. } => records,
            event => panic!("{event:?}"),
        }
    }

    async fn closed(&mut self) {
        match self.event().await {
            Event::LinkClosed { session } => assert_eq!(session, self.session),
            event => panic!("{event:?}"),
        }
    }

    fn output(&self, output: Output) {
        self.outboxes.lock().unwrap()[&self.session].push(output);
    }

    fn send(&self, class: Class, records: Vec<Record>) -> usize {
        let output = Output::Send { class, records };
        let cost = output.cost();
        self.output(output);
        cost
    }
}

fn record(class: Class, seq: u64, payload: usize) -> Record {
    // Incompressible enough to fill windows.
    let mut state = seq + 1;
    let payload: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as u8
    })
    .take(payload)
    .collect();
    let body = FrameParts { topic: "a/b", payload: &payload, ..FrameParts::default() }.encode();
    let header = RecordHeader {
        kind: Kind::LOG,
        class: class as u8,
        flags: Flags::default(),
        source: class as u32,
        epoch: 1,
        seq,
        aux: 0,
    };
    Record { header, body }
}

fn hello() -> Record {
    control_record(Message::Hello(proto::Hello::default()))
}

/// Two links over memory, both open.
struct Two {
    node: Broker,
    hub: Broker,
    network: mem::Network,
    tasks: JoinSet<(&'static str, Ended)>,
}

async fn two() -> Two {
    let (dialler, acceptor, network) = mem::pair();
    let (mut node, mut hub) = (Broker::new(), Broker::new());
    let mut tasks = JoinSet::new();
    let (at_node, at_hub) = (node.link(true), hub.link(false));
    tasks.spawn(async move { ("node", run(dialler, at_node).await) });
    tasks.spawn(async move { ("hub", run(acceptor, at_hub).await) });
    assert!(node.opened().await.dialler);
    node.send(Class::Control, vec![hello()]);
    assert!(!hub.opened().await.dialler);
    assert_eq!(hub.received().await, [hello()]);
    Two { node, hub, network, tasks }
}

/// A link over memory, and the other end's bare transport with its control lane.
struct Bare {
    hub: Broker,
    peer: MemTransport,
    control: (mem::MemSender, mem::MemReceiver),
    ended: JoinSet<Ended>,
}

async fn bare() -> Bare {
    let (peer, acceptor, _network) = mem::pair();
    let mut hub = Broker::new();
    let link = hub.link(false);
    let mut ended = JoinSet::new();
    ended.spawn(run(acceptor, link));
    let mut control = peer.control(true).await.unwrap();
    control.0.write(batch(&[hello()])).await.unwrap();
    hub.opened().await;
    hub.received().await;
    Bare { hub, peer, control, ended }
}

fn batch(records: &[Record]) -> Vec<Bytes> {
    Encoder::encode_uncompressed(records).unwrap().into_buffers()
}

async fn protocol_error(mut bare: Bare) -> String {
    let ended = bare.ended.join_next().await.unwrap().unwrap();
    // Well-formed batches before the bad one were delivered.
    while !matches!(bare.hub.event().await, Event::LinkClosed { .. }) {}
    let LinkEnd::Protocol(what) = ended.end else { panic!("{ended:?}") };
    match bare.peer.closed().await {
        Closed::ByPeer { code: CloseCode::PROTOCOL, reason } => assert!(reason.contains(&what)),
        closed => panic!("{closed:?}"),
    }
    what
}

#[tokio::test(start_paused = true)]
async fn records_arrive_in_order_within_their_class_and_are_reported_as_sent() {
    let Two { mut node, mut hub, network, tasks: _tasks } = two().await;
    network.delay(Duration::from_millis(20));
    let classes = [Class::Bulk, Class::Control, Class::Alarm, Class::Telemetry];
    let mut cost = Output::Send { class: Class::Control, records: vec![hello()] }.cost();
    for seq in 0..200 {
        for class in classes.into_iter().filter(|class| *class != Class::Control) {
            cost += node.send(class, vec![record(class, seq, 700)]);
        }
    }
    let mut got: [VecDeque<u64>; 6] = Default::default();
    while got.iter().map(VecDeque::len).sum::<usize>() < 600 {
        for record in hub.received().await {
            got[usize::from(record.header.class)].push_back(record.header.seq);
        }
    }
    for class in [Class::Bulk, Class::Alarm, Class::Telemetry] {
        assert!(got[class as usize].iter().copied().eq(0..200), "{}", class.as_str());
    }
    while node.sent < cost {
        let Input::Event { event: Event::Sent { bytes, .. }, .. } = node.inputs.recv().await.unwrap() else {
            panic!("nothing but reports is due");
        };
        node.sent += bytes;
    }
    assert_eq!(node.sent, cost);
    let batches = node.counters.sent[Class::Bulk as usize].batches.load(std::sync::atomic::Ordering::Relaxed);
    assert!(batches < 20, "what waits is one batch: {batches}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_link_has_one_stream_and_a_class_reopens_its_own() {
    let Two { node, mut hub, network, tasks: _tasks } = two().await;
    const CONTROL_ALONE: usize = 2;
    assert_eq!(network.open_lanes(), CONTROL_ALONE);
    for seq in 0..3 {
        node.send(Class::State, vec![record(Class::State, seq, 10)]);
        assert_eq!(hub.received().await[0].header.seq, seq);
        assert_eq!(network.open_lanes(), CONTROL_ALONE + 1);
        sleep(29 * SECOND).await;
        assert_eq!(network.open_lanes(), CONTROL_ALONE + 1);
        sleep(2 * SECOND).await;
        assert_eq!(network.open_lanes(), CONTROL_ALONE);
    }
}

#[tokio::test(start_paused = true)]
async fn heartbeats_keep_an_idle_link_up_and_never_enter_the_core() {
    let Two { mut node, mut hub, network, tasks: _tasks } = two().await;
    network.delay(Duration::from_millis(40));
    sleep(3600 * SECOND).await;
    assert!(!node.progress.borrow().suspect);
    node.send(Class::Event, vec![record(Class::Event, 7, 1)]);
    assert_eq!(hub.received().await[0].header.seq, 7, "nothing came before it");
    let rtt_us = node.counters.rtt_us.load(std::sync::atomic::Ordering::Relaxed);
    assert!((80_000..90_000).contains(&rtt_us), "{rtt_us}");
    let beats = node.counters.sent[0].batches.load(std::sync::atomic::Ordering::Relaxed);
    assert!((359..=362).contains(&beats), "one exchange a period, and the hello: {beats}");
    hub.send(Class::Control, vec![control_record(Message::Ack(proto::Ack::default()))]);
    node.received().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_path_is_suspect_within_seconds_and_ends_both_links_within_two_heartbeats() {
    let Two { node, network, mut tasks, hub: _hub } = two().await;
    sleep(5 * SECOND).await;
    network.silence();
    let silent_since = Instant::now();
    node.progress.subscribe().wait_for(|progress| progress.suspect).await.unwrap();
    assert!(silent_since.elapsed() < 12 * SECOND, "{:?}", silent_since.elapsed());
    while let Some(ended) = tasks.join_next().await {
        let (side, ended) = ended.unwrap();
        assert_eq!(ended.end, LinkEnd::PeerSilent, "{side}");
        assert!(silent_since.elapsed() <= 20 * SECOND, "{side} {:?}", silent_since.elapsed());
        assert!(silent_since.elapsed() >= 10 * SECOND, "{side} {:?}", silent_since.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspect_path_that_comes_back_is_trusted_again() {
    let Two { node, network, hub: _hub, tasks: _tasks } = two().await;
    network.silence();
    let mut progress = node.progress.subscribe();
    progress.wait_for(|progress| progress.suspect).await.unwrap();
    network.heal();
    progress.wait_for(|progress| !progress.suspect).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_cut_connection_ends_both_links_and_is_told_to_the_brokers() {
    let Two { mut node, mut hub, network, mut tasks } = two().await;
    network.cut();
    while let Some(ended) = tasks.join_next().await {
        assert!(matches!(ended.unwrap().1.end, LinkEnd::Lost(_)));
    }
    node.closed().await;
    hub.closed().await;
    assert_eq!(node.counters.ended().get("lost"), Some(&1));
    assert!(node.links.newest().is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_queued_before_a_close_still_arrives() {
    let Two { node, mut hub, network, mut tasks } = two().await;
    network.delay(Duration::from_millis(50));
    for seq in 0..20 {
        node.send(Class::Bulk, vec![record(Class::Bulk, seq, 30_000)]);
    }
    node.send(Class::Control, vec![control_record(Message::Drain(proto::Drain { retry_after_ms: 1500 }))]);
    node.output(Output::Close(CloseReason::Shutdown));
    let mut seqs = Vec::new();
    let mut controls = 0;
    loop {
        match hub.event().await {
            Event::LinkReceived { records, .. } => {
                controls += records.iter().filter(|record| record.header.kind == Kind::CONTROL).count();
                seqs.extend(
                    records
                        .iter()
                        .filter(|record| record.header.kind == Kind::LOG)
                        .map(|record| record.header.seq),
                );
            }
            Event::LinkClosed { .. } => break,
            event => panic!("{event:?}"),
        }
    }
    assert!(seqs.into_iter().eq(0..20));
    assert_eq!(controls, 1);
    while let Some(ended) = tasks.join_next().await {
        match ended.unwrap() {
            ("node", ended) => assert_eq!(ended.end, LinkEnd::Closed(CloseReason::Shutdown)),
            (_, ended) => {
                assert!(matches!(ended.end, LinkEnd::PeerClosed { code: CloseCode::DONE, .. }), "{ended:?}");
                assert_eq!(ended.retry_after, Some(Duration::from_millis(1500)));
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_does_not_wait_longer_than_its_deadline_for_a_peer_that_does_not_read() {
    let mut bare = bare().await;
    bare.hub.send(Class::Bulk, vec![record(Class::Bulk, 0, 300_000)]);
    bare.hub.output(Output::Close(CloseReason::SlowConsumer));
    let before = Instant::now();
    let ended = bare.ended.join_next().await.unwrap().unwrap();
    assert_eq!(ended.end, LinkEnd::Closed(CloseReason::SlowConsumer));
    assert!(before.elapsed() <= 3 * SECOND + Duration::from_millis(10), "{:?}", before.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_and_its_retry_after_reach_the_dialler() {
    let Two { node, hub, mut tasks, network: _network } = two().await;
    let refusal = proto::Refusal { reason: 5, message: "too many".into(), retry_after_ms: 700 };
    hub.send(Class::Control, vec![control_record(Message::Refusal(refusal.clone()))]);
    hub.output(Output::Close(CloseReason::Refused(refusal.clone())));
    loop {
        let (side, ended) = tasks.join_next().await.unwrap().unwrap();
        if side == "node" {
            assert!(matches!(ended.end, LinkEnd::PeerClosed { code: CloseCode::REFUSED, .. }), "{ended:?}");
            assert_eq!(ended.refusal, Some(refusal));
            assert_eq!(ended.retry_after, Some(Duration::from_millis(700)));
            assert!(!ended.welcomed && !node.progress.borrow().welcomed);
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_class_that_nobody_reads_delays_no_other() {
    let mut bare = bare().await;
    bare.hub.send(Class::Bulk, vec![record(Class::Bulk, 0, 1 << 20)]);
    let _unread = bare.peer.accept().await.unwrap();
    bare.hub.send(Class::Alarm, vec![record(Class::Alarm, 1, 10)]);
    let mut alarms = bare.peer.accept().await.unwrap();
    let mut prefix = [0; 24];
    alarms.read_exact(&mut prefix).await.unwrap();
    bare.control
        .0
        .write(batch(&[control_record(Message::Heartbeat(proto::Heartbeat { nonce: 9, time_us: 0 }))]))
        .await
        .unwrap();
    bare.control.1.read_exact(&mut prefix).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_takes_nothing_stops_the_sender_within_bounds() {
    let Two { mut node, network: _network, hub: _hub, tasks: _tasks } = two().await;
    let mut sent = 0;
    for seq in 0..40 {
        sent += node.send(Class::Bulk, vec![record(Class::Bulk, seq, 1 << 20)]);
    }
    // The hub's driver takes no input at all; a paused clock only advances when everything is stuck.
    sleep(SECOND).await;
    while let Ok(Input::Event { event: Event::Sent { bytes, .. }, .. }) = node.inputs.try_recv() {
        node.sent += bytes;
    }
    assert!(node.sent < sent, "backpressure");
    assert!(node.sent <= crate::limits::INPUT_BYTES_MAX + (4 << 20), "{}", node.sent);
}

#[tokio::test(start_paused = true)]
async fn malformed_input_closes_the_link_with_a_reason() {
    let garbage = [
        (vec![Bytes::from_static(&[0xff; 64])], "version"),
        // One record of 3 GiB; 65 535 records in 100 bytes.
        (
            vec![Bytes::from_static(&[
                1, 0, 1, 0, 0, 0, 0, 0xc0, 0, 0, 0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ])],
            "cannot",
        ),
        (
            vec![Bytes::from_static(&[
                1, 0, 255, 255, 100, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ])],
            "cannot",
        ),
        (batch(&[record(Class::Bulk, 0, 1)]), "another class"),
        (batch(&[Record { body: Bytes::from_static(b"\xff"), ..hello() }]), "control record"),
        (batch(&[Record { body: vec![0; 300_000].into(), ..hello() }]), "300000"),
    ];
    for (bytes, expected) in garbage {
        let mut bare = bare().await;
        bare.control.0.write(bytes).await.unwrap();
        let what = protocol_error(bare).await;
        assert!(what.contains(expected), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn malformed_class_streams_close_the_link_with_a_reason() {
    let bad_frame = Record { body: Bytes::from_static(b"\x0a\xff\x01"), ..record(Class::State, 0, 1) };
    let unknown_class = Record {
        header: RecordHeader { class: 9, ..record(Class::State, 0, 1).header },
        ..record(Class::State, 0, 1)
    };
    let two_classes = [batch(&[record(Class::State, 0, 1)]), batch(&[record(Class::Alarm, 0, 1)])].concat();
    let control_kind = Record { header: RecordHeader { class: 2, ..hello().header }, ..hello() };
    let mut journal_kind = BytesMut::new();
    for buffer in batch(&[record(Class::State, 0, 1)]) {
        journal_kind.extend_from_slice(&buffer);
    }
    journal_kind[24 + 4] = 16;
    let crc = {
        let mut crc_input = journal_kind.clone();
        crc_input[16..20].fill(0);
        crc32c::crc32c(&crc_input)
    };
    journal_kind[16..20].copy_from_slice(&crc.to_le_bytes());
    let garbage = [
        (batch(&[bad_frame]), ""),
        (batch(&[unknown_class]), "class 9"),
        (two_classes, "two classes"),
        (batch(&[control_kind]), "control record"),
        (batch(&[hello()]), "control belongs"),
        (vec![journal_kind.freeze()], "kind 16"),
    ];
    for (bytes, expected) in garbage {
        let bare = bare().await;
        let mut lane = bare.peer.open(Class::State).await.unwrap();
        lane.write(bytes).await.unwrap();
        let what = protocol_error(bare).await;
        assert!(what.contains(expected), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_inside_a_batch_is_a_protocol_error() {
    let bare = bare().await;
    let mut lane = bare.peer.open(Class::State).await.unwrap();
    let mut whole = BytesMut::new();
    for buffer in batch(&[record(Class::State, 0, 100)]) {
        whole.extend_from_slice(&buffer);
    }
    whole.truncate(whole.len() - 1);
    lane.write(vec![whole.freeze()]).await.unwrap();
    let (finished, what) = tokio::join!(lane.finish(), protocol_error(bare));
    assert!(what.contains("inside a batch"), "{what} {finished:?}");
}

#[tokio::test(start_paused = true)]
async fn unknown_record_kinds_are_skipped() {
    let mut bare = bare().await;
    let future = Record {
        header: RecordHeader { kind: Kind(12), ..record(Class::State, 0, 1).header },
        body: Bytes::from_static(b"?"),
    };
    let mut lane = bare.peer.open(Class::State).await.unwrap();
    lane.write(batch(std::slice::from_ref(&future))).await.unwrap();
    lane.write(batch(&[future, record(Class::State, 1, 1)])).await.unwrap();
    assert_eq!(bare.hub.received().await, [record(Class::State, 1, 1)]);
}

#[tokio::test(start_paused = true)]
async fn a_dialler_that_opens_no_control_stream_is_given_up() {
    let (_peer, acceptor, _network) = mem::pair();
    let hub = Broker::new();
    let before = Instant::now();
    let ended = run(acceptor, hub.link(false)).await;
    assert!(matches!(ended.end, LinkEnd::Lost(_)), "{ended:?}");
    assert_eq!(before.elapsed(), 10 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_dialler_that_never_says_hello_is_given_up_although_it_beats() {
    let (peer, acceptor, _network) = mem::pair();
    let hub = Broker::new();
    let (link, mut ended) = (hub.link(false), JoinSet::new());
    let patience = link.params.handshake;
    ended.spawn(run(acceptor, link));
    let mut control = peer.control(true).await.unwrap();
    let began = Instant::now();
    let ended = loop {
        let beat = control_record(Message::Heartbeat(proto::Heartbeat::default()));
        let _ended = control.0.write(batch(&[beat])).await;
        match tokio::time::timeout(SECOND, ended.join_next()).await {
            Ok(ended) => break ended.unwrap().unwrap(),
            Err(_elapsed) => {}
        }
    };
    assert!(matches!(&ended.end, LinkEnd::Protocol(what) if what.contains("hello")), "{ended:?}");
    assert!(began.elapsed() <= patience + SECOND, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_second_lane_of_a_class_waits_for_the_first_and_for_no_other() {
    let turns: Arc<reader::Turns> = Arc::default();
    let mut order = JoinSet::new();
    let (sender, mut receiver) = mpsc::channel(8);
    for (class, hold) in [(Class::Bulk, 5), (Class::State, 1), (Class::Bulk, 1)] {
        let (turn, sender) = (turns.enter(), sender.clone());
        order.spawn(async move {
            turn.wait(class).await;
            sender.send(class).await.unwrap();
            sleep(hold * SECOND).await;
            sender.send(class).await.unwrap();
        });
    }
    drop(sender);
    let mut seen = Vec::new();
    while let Some(class) = receiver.recv().await {
        seen.push(class);
    }
    let (bulk, state) = (Class::Bulk, Class::State);
    assert_eq!(seen, [bulk, state, state, bulk, bulk, bulk]);
}

#[tokio::test(start_paused = true)]
async fn an_echo_stream_returns_what_it_gets_and_unknown_kinds_are_refused() {
    let Two { node, hub: _hub, network: _network, tasks: _tasks } = two().await;
    let link = node.links.find("peer").unwrap();
    let open = |kind: &str| proto::StreamOpen { kind: kind.into(), ..Default::default() };
    let mut echo = link.open_stream(&open(stream::ECHO)).await.unwrap();
    echo.write_all(b"there and back").await.unwrap();
    echo.shutdown().await.unwrap();
    let mut back = Vec::new();
    echo.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, b"there and back");

    let unknown = link.open_stream(&open("?")).await.unwrap_err();
    assert!(
        matches!(&unknown, stream::OpenError::Refused { code: stream::StreamCode::UNKNOWN_KIND, .. }),
        "{unknown}"
    );
    assert_eq!(
        link.open_stream(&open(&"x".repeat(20_000))).await.unwrap_err(),
        stream::OpenError::TooLong(20_004)
    );
}

/// Its task: the ends of the control lane, what waits for it, what the select waits for, one timer. Most of it is
/// tokio's: the timer, and the wait for the stop of all.
#[test]
fn the_future_of_an_idle_link_is_small() {
    fn size<T, F: Future>(_of: impl Fn(T, Link) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(run::<crate::link::quic::QuicTransport>);
    assert!(size <= 1536, "{size} bytes for each of 100 000 links");
}

/// Hello, records of several classes both ways, an echo, and an orderly end.
async fn exchange_records<T: Transport>(at_node: T, at_hub: T) {
    let (mut node, mut hub) = (Broker::new(), Broker::new());
    let mut tasks = JoinSet::new();
    let (node_link, hub_link) = (node.link(true), hub.link(false));
    tasks.spawn(async move { run(at_node, node_link).await });
    tasks.spawn(async move { run(at_hub, hub_link).await });
    node.opened().await;
    node.send(Class::Control, vec![hello()]);
    hub.opened().await;
    assert_eq!(hub.received().await, [hello()]);
    for seq in 0..300 {
        for class in [Class::Bulk, Class::State] {
            node.send(class, vec![record(class, seq, 900)]);
        }
    }
    node.send(Class::Bulk, vec![record(Class::Bulk, 300, 1 << 20)]);
    let mut next = [0; 6];
    while (next[Class::Bulk as usize], next[Class::State as usize]) != (301, 300) {
        for record in hub.received().await {
            let next = &mut next[usize::from(record.header.class)];
            assert_eq!(record.header.seq, *next);
            *next += 1;
        }
    }
    hub.send(Class::Event, vec![record(Class::Event, 5, 5)]);
    assert_eq!(node.received().await, [record(Class::Event, 5, 5)]);

    let echo = proto::StreamOpen { kind: stream::ECHO.into(), ..Default::default() };
    let mut echo = hub.links.find("peer").unwrap().open_stream(&echo).await.unwrap();
    echo.write_all(b"through the firewall").await.unwrap();
    echo.shutdown().await.unwrap();
    let mut back = Vec::new();
    echo.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, b"through the firewall");

    node.send(Class::Bulk, vec![record(Class::Bulk, 301, 200_000)]);
    node.output(Output::Close(CloseReason::Shutdown));
    assert_eq!(hub.received().await[0].header.seq, 301, "a drain flushes");
    hub.closed().await;
    let ends = [tasks.join_next().await.unwrap().unwrap(), tasks.join_next().await.unwrap().unwrap()];
    assert!(ends.iter().any(|ended| ended.end == LinkEnd::Closed(CloseReason::Shutdown)), "{ends:?}");
    assert!(
        ends.iter().any(|ended| matches!(&ended.end, LinkEnd::PeerClosed { code: CloseCode::DONE, .. })),
        "{ends:?}"
    );
}

/// Whatever a peer leaves unread, control passes.
async fn leave_bulk_unread<T: Transport>(at_node: T, peer: T) {
    let mut node = Broker::new();
    let mut tasks = JoinSet::new();
    let link = node.link(true);
    tasks.spawn(async move { run(at_node, link).await });
    node.opened().await;
    let unread = [Class::Bulk, Class::Telemetry, Class::Event, Class::State, Class::Alarm];
    for class in unread {
        for seq in 0..4 {
            node.send(class, vec![record(class, seq, 1 << 20)]);
        }
    }
    let mut lanes = Vec::new();
    while lanes.len() < unread.len() {
        lanes.push(tokio::time::timeout(10 * SECOND, peer.accept()).await.unwrap().unwrap());
    }
    node.send(Class::Control, vec![hello()]);
    let (_sender, mut control) =
        tokio::time::timeout(10 * SECOND, peer.control(false)).await.unwrap().unwrap();
    tokio::time::timeout(10 * SECOND, control.read_exact(&mut [0; 24])).await.unwrap().unwrap();
}
