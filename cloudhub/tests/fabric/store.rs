//! What nodes own, through a real nats-server: written once, in order, whoever fails in between.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::atomic::Ordering,
    time::Duration,
};

use async_nats::jetstream::stream::Config;

use broker::{
    Handle, Tasks, core, driver,
    event::{
        Command, Event, Front, LinkOpen, Output, Peer, Publish, Response, Role as PeerRole, SessionId,
        SessionOpen, Target,
    },
    handle::Outbox,
    store::{Recovered, mem::MemStore},
};
use bytes::Bytes;
use cloudhub::fabric::nats::{
    Tier,
    names::{self, Bucket},
    store::NatsStore,
};
use codec::{Kind, Record, batch, frame::FrameParts};
use octobus_tests::servers::NatsServers;
use tokio::{task::AbortHandle, time::sleep};

use super::{hub_config, identity};

/// A replica whose store is what is tested.
struct Hub {
    name: String,
    tier: Tier,
    handle: Handle,
    tasks: Tasks,
}

impl Hub {
    async fn start(servers: &NatsServers, name: &str) -> Self {
        let (tier, feed) = Box::pin(Tier::open(&hub_config(servers, name), &identity())).await.unwrap();
        let opened = NatsStore::open(tier.connection().clone(), tier.claims().clone(), feed).await;
        let (store, recovered) = opened.unwrap();
        let tasks = Tasks::new();
        let mut config = core::Config::replica(name, "t", [1; 16], 1);
        config.seed = u64::from(name.as_bytes()[name.len() - 1]);
        let handle = driver::start(config, store, recovered, &tasks);
        tier.start(&handle, &tasks).await.unwrap();
        Self { name: name.to_owned(), tier, handle, tasks }
    }

    async fn stop(self) {
        drop(self.handle.call(Command::Drain { within: Duration::ZERO }).await);
        drop((self.tier, self.handle));
        self.tasks.drain(Duration::from_secs(10)).await;
    }

    /// The stream that holds a node's Logs, with a changed configuration.
    async fn edit(&self, node: &str, change: impl FnOnce(&mut Config)) {
        let connection = self.tier.connection();
        let stream = names::log_stream(names::shard(node, connection.shards()));
        let mut config = connection.info(&stream).await.unwrap().config;
        change(&mut config);
        connection.jetstream().update_stream(config).await.unwrap();
    }

    /// How many requests to JetStream it has made.
    fn requests(&self) -> u64 {
        self.tier.connection().counters().requests.load(Ordering::Relaxed)
    }

    fn link_of(&self, node: &str) -> impl AsyncFnMut() -> bool {
        let (handle, node) = (self.handle.clone(), node.to_owned());
        async move || match handle.call(Command::Sessions).await {
            Ok(Response::Sessions(sessions)) => {
                sessions.iter().any(|session| *session.name == *node && session.established)
            }
            _ => false,
        }
    }

    /// Every record of a node's Log, in the order of the stream.
    async fn log(&self, node: &str, stream: &str) -> Vec<Record> {
        let connection = self.tier.connection();
        let shards = connection.shards();
        let subject = names::log_subject(node, stream, shards);
        let shard = names::log_stream(names::shard(node, shards));
        let (mut records, mut next) = (Vec::new(), 1);
        while let Some(stored) = connection.next(&shard, &subject, next).await.unwrap() {
            next = stored.sequence + 1;
            let prefix = stored.payload[..batch::Prefix::LEN].try_into().unwrap();
            let prefix = batch::Prefix::decode(prefix).unwrap();
            records.extend(batch::decode(&prefix, stored.payload.slice(batch::Prefix::LEN..)).unwrap());
        }
        records
    }

    async fn seqs(&self, node: &str, stream: &str) -> Vec<u64> {
        let records = self.log(node, stream).await;
        records
            .iter()
            .filter(|record| record.header.kind == Kind::LOG)
            .map(|record| record.header.seq)
            .collect()
    }

    /// Keys and values of a node's space.
    async fn space(&self, node: &str, space: &str) -> BTreeMap<String, (bool, String)> {
        let connection = self.tier.connection();
        let (mut entries, mut next) = (BTreeMap::new(), 1);
        let below = Bucket::Node.below(&format!("{node}/{space}"));
        while let Some(stored) = connection.next(Bucket::Node.stream(), &below, next).await.unwrap() {
            next = stored.sequence + 1;
            let record = Record::take(&mut stored.payload.clone()).unwrap();
            let frame = codec::FrameView::parse(&record.body).unwrap();
            let value = String::from_utf8(frame.payload().to_vec()).unwrap();
            entries.insert(frame.topic().to_owned(), (record.header.kind == Kind::PUT, value));
        }
        entries
    }
}

/// A node, whose disk is memory.
struct Node {
    name: String,
    handle: Handle,
    client: SessionId,
    _tasks: Tasks,
    link: Option<Link>,
}

struct Link {
    ends: Vec<AbortHandle>,
    node: (Handle, SessionId),
    hub: (Handle, SessionId),
}

impl Link {
    /// Both ends learn of it, or the hub does not.
    async fn cut(self, hub_hears: bool) {
        self.ends[0].abort();
        self.ends[1].abort();
        let (node, session) = self.node;
        node.send(Event::LinkClosed { session }, 0).await.unwrap();
        let (hub, session) = self.hub;
        if hub_hears {
            // Perhaps it is gone itself.
            drop(hub.send(Event::LinkClosed { session }, 0).await);
        }
    }
}

impl Node {
    async fn start(name: &str) -> Self {
        let tasks = Tasks::new();
        let config = core::Config::node(name, [5; 16], 7);
        let handle = driver::start(config, MemStore::auto(), Recovered::default(), &tasks);
        let (client, mut outbox) = handle.open_session();
        let open = SessionOpen {
            session: client,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        handle.send(Event::SessionOpened(open), 0).await.unwrap();
        #[allow(clippy::disallowed_methods)] // ends with the test
        tokio::spawn(async move {
            let mut outputs = VecDeque::new();
            loop {
                outbox.recv(&mut outputs).await;
                outputs.clear();
            }
        });
        Self { name: name.to_owned(), handle, client, _tasks: tasks, link: None }
    }

    /// The same node, to be linked by itself.
    fn shadow(node: &Self) -> Self {
        let (name, handle) = (node.name.clone(), node.handle.clone());
        Self { name, handle, client: node.client, _tasks: Tasks::new(), link: None }
    }

    async fn link(&mut self, hub: &Hub) {
        if let Some(link) = self.link.take() {
            link.cut(true).await;
        }
        self.link_again(hub).await;
    }

    /// The hub that it was linked to has not heard that it is gone.
    async fn link_while_linked(&mut self, hub: &Hub) -> Link {
        let older = self.link.take().unwrap();
        let (node, session) = &older.node;
        node.send(Event::LinkClosed { session: *session }, 0).await.unwrap();
        self.link_again(hub).await;
        older
    }

    async fn link_again(&mut self, hub: &Hub) {
        let (at_node, from_node) = self.handle.open_session();
        let (at_hub, from_hub) = hub.handle.open_session();
        let peer = Peer { name: self.name.as_str().into(), role: PeerRole::Node, generation: 1 };
        let open = LinkOpen { session: at_hub, peer, dialler: false };
        hub.handle.send(Event::LinkOpened(open), 0).await.unwrap();
        let peer = Peer { name: hub.name.as_str().into(), role: PeerRole::Hub, generation: 0 };
        let open = LinkOpen { session: at_node, peer, dialler: true };
        self.handle.send(Event::LinkOpened(open), 0).await.unwrap();
        let ends = (self.handle.clone(), hub.handle.clone());
        #[allow(clippy::disallowed_methods)] // aborted with the link
        let up = tokio::spawn(carry(from_node, (ends.0.clone(), at_node), (ends.1.clone(), at_hub)));
        #[allow(clippy::disallowed_methods)] // aborted with the link
        let down = tokio::spawn(carry(from_hub, (ends.1.clone(), at_hub), (ends.0.clone(), at_node)));
        let ends = (vec![up.abort_handle(), down.abort_handle()], (ends.0, at_node), (ends.1, at_hub));
        self.link = Some(Link { ends: ends.0, node: ends.1, hub: ends.2 });
    }

    /// Publishes so many.
    async fn publish(&self, messages: usize) {
        let frame = FrameParts { topic: "sensors/a", payload: b"21.5", ..FrameParts::default() }.encode();
        self.send(vec![message(frame, 1, false); messages]).await;
    }

    async fn retain(&self, topic: &str, value: &str) {
        let frame = FrameParts { topic, payload: value.as_bytes(), ..FrameParts::default() }.encode();
        self.send(vec![message(frame, 0, true)]).await;
    }

    async fn send(&self, messages: Vec<Publish>) {
        self.handle.send(Event::Published { session: self.client, messages }, 0).await.unwrap();
    }

    async fn unacknowledged(&self) -> u64 {
        match self.handle.call(Command::Stats).await.unwrap() {
            Response::Stats(stats) => stats.log_unacknowledged,
            other => panic!("stats, not {other:?}"),
        }
    }

    /// So many messages are published, and the tier has them.
    async fn is_acknowledged(&mut self, messages: u64, hub: &Hub) {
        let what = format!("{messages} messages of {} acknowledged", self.name);
        for _ in 0..3_000 {
            // A refusal ends a link; whoever dials comes again.
            if self.link.as_ref().is_none_or(|link| link.ends[0].is_finished()) {
                self.link(hub).await;
            }
            if self.has_acknowledged(messages).await {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("it never came to this: {what}");
    }

    async fn has_acknowledged(&self, messages: u64) -> bool {
        let Ok(Response::Logs(logs)) = self.handle.call(Command::LogList { origin: None }).await else {
            return false;
        };
        let durable =
            logs.iter().filter(|log| *log.origin == *self.name).map(|log| log.next - 1).sum::<u64>();
        durable == messages && self.unacknowledged().await == 0
    }
}

fn message(frame: Bytes, qos: u8, retain: bool) -> Publish {
    Publish { target: Target::Own, frame, qos, packet_id: 0, dup: false, retain, reply: None }
}

async fn carry(mut outbox: Outbox, from: (Handle, SessionId), to: (Handle, SessionId)) {
    let mut outputs = VecDeque::new();
    loop {
        outbox.recv(&mut outputs).await;
        for output in outputs.drain(..) {
            let bytes = output.cost();
            match output {
                Output::Send { records, .. } => {
                    let received = Event::LinkReceived { session: to.1, records };
                    if to.0.send(received, bytes).await.is_err() {
                        return;
                    }
                }
                Output::Close(_) => {
                    for (handle, session) in [&from, &to] {
                        drop(handle.send(Event::LinkClosed { session: *session }, 0).await);
                    }
                    return;
                }
                _ => {}
            }
            drop(from.0.send(Event::Sent { session: from.1, bytes }, 0).await);
        }
    }
}

/// Every seq up to `last`, once and in order.
fn consecutive(seqs: &[u64], last: u64) {
    let wrong = (1..).zip(seqs).find(|(wanted, seq)| wanted != *seq);
    assert_eq!((wrong, seqs.len() as u64), (None, last), "(wanted, found), and how many there are");
}

/// Waits for what must come.
async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    for _ in 0..1_500 {
        if is().await {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came to this: {what}");
}

#[tokio::test]
async fn a_log_is_in_the_tier_once_and_in_order_before_it_is_acknowledged() {
    let servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let mut node = Node::start("n1").await;
    node.publish(100).await;
    node.link(&hub).await;
    node.is_acknowledged(100, &hub).await;
    consecutive(&hub.seqs("n1", "default").await, 100);
    node.publish(50).await;
    node.link(&hub).await;
    node.is_acknowledged(150, &hub).await;
    consecutive(&hub.seqs("n1", "default").await, 150);
    hub.stop().await;
}

#[tokio::test]
async fn a_node_that_moves_goes_on_and_what_its_old_replica_still_writes_is_not_twice() {
    let servers = NatsServers::start(1);
    let (one, two) = (Hub::start(&servers, "hub-1").await, Hub::start(&servers, "hub-2").await);
    let mut node = Node::start("n1").await;
    node.link(&one).await;
    let mut older = Vec::new();
    for round in 0..10 {
        node.publish(200).await;
        node.retain("a", &round.to_string()).await;
        older.push(node.link_while_linked(if round % 2 == 0 { &two } else { &one }).await);
    }
    node.is_acknowledged(2_000, &one).await;
    consecutive(&one.seqs("n1", "default").await, 2_000);
    until("the last value is in the tier", async || {
        one.space("n1", "retained").await.get("a") == Some(&(true, "9".to_owned()))
    })
    .await;
    drop(older);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_stream_that_lost_its_end_gets_it_again_from_its_node() {
    let servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let mut node = Node::start("n1").await;
    for round in 1..=3 {
        node.publish(100).await;
        node.is_acknowledged(round * 100, &hub).await;
    }
    let connection = hub.tier.connection();
    let stream = names::log_stream(names::shard("n1", connection.shards()));
    let stream = connection.jetstream().get_stream(stream).await.unwrap();
    let last = connection.info(&stream.cached_info().config.name).await.unwrap().state.last_sequence;
    stream.delete_message(last).await.unwrap();
    assert!(hub.seqs("n1", "default").await.len() < 300, "nothing was lost");
    node.link(&hub).await;
    until("what was lost is there again", async || hub.seqs("n1", "default").await.len() == 300).await;
    consecutive(&hub.seqs("n1", "default").await, 300);
    // The next is found to be lost by the next write, without a new link.
    let last = connection.info(&stream.cached_info().config.name).await.unwrap().state.last_sequence;
    stream.delete_message(last).await.unwrap();
    node.publish(1).await;
    node.is_acknowledged(301, &hub).await;
    consecutive(&hub.seqs("n1", "default").await, 301);
    hub.stop().await;
}

#[tokio::test]
async fn servers_that_are_killed_in_the_middle_lose_nothing_and_repeat_nothing() {
    let mut servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let mut node = Node::start("n1").await;
    node.link(&hub).await;
    for round in 1..=5 {
        for burst in 0..10 {
            node.publish(50).await;
            node.retain("a", &format!("{round}-{burst}")).await;
        }
        servers.kill(0);
        node.publish(50).await;
        servers.run(0);
    }
    node.is_acknowledged(5 * 550, &hub).await;
    consecutive(&hub.seqs("n1", "default").await, 5 * 550);
    until("the last value is in the tier", async || {
        hub.space("n1", "retained").await.get("a") == Some(&(true, "5-9".to_owned()))
    })
    .await;
    hub.stop().await;
}

#[tokio::test]
async fn a_full_stream_holds_its_nodes_back_and_nobody_else() {
    let servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let other = (2..20).map(|n| format!("n{n}")).find(|name| names::shard(name, 2) != names::shard("n1", 2));
    let (mut node, mut other) = (Node::start("n1").await, Node::start(&other.unwrap()).await);
    hub.edit("n1", |config| config.max_bytes = 20_000).await;
    node.link(&hub).await;
    other.link(&hub).await;
    for _ in 0..20 {
        node.publish(200).await;
        sleep(Duration::from_millis(5)).await;
    }
    other.publish(500).await;
    other.is_acknowledged(500, &hub).await;
    assert!(!node.has_acknowledged(4_000).await, "a stream of 20 kB is not full");
    hub.edit("n1", |config| config.max_bytes = 20_000_000).await;
    node.is_acknowledged(4_000, &hub).await;
    consecutive(&hub.seqs("n1", "default").await, 4_000);
    hub.stop().await;
}

#[tokio::test]
async fn a_record_that_nats_never_takes_is_put_aside_alone() {
    let servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let mut node = Node::start("n1").await;
    hub.edit("n1", |config| config.max_message_size = 16_000).await;
    node.publish(20).await;
    let mut state = 1_u64;
    let big: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[6] // nothing that could be made smaller
    })
    .take(40_000)
    .collect();
    let frame = FrameParts { topic: "sensors/big", payload: &big, ..FrameParts::default() }.encode();
    node.send(vec![message(frame, 1, false)]).await;
    node.publish(20).await;
    node.link(&hub).await;
    node.is_acknowledged(41, &hub).await;
    let records = hub.log("n1", "default").await;
    let kinds: Vec<(Kind, u64)> =
        records.iter().map(|record| (record.header.kind, record.header.seq)).collect();
    assert!(kinds.contains(&(Kind::GAP, 21)), "a gap stands in its place: {kinds:?}");
    let logs = records.iter().filter(|record| record.header.kind == Kind::LOG).count();
    assert_eq!(logs, 40);
    let connection = hub.tier.connection();
    let letter = connection.next(names::LETTERS, &names::letter_subject("n1"), 1).await.unwrap().unwrap();
    assert_eq!(letter.headers.get("Octobus-Seq").unwrap().as_str(), "21");
    node.publish(5).await;
    node.is_acknowledged(46, &hub).await;
    hub.stop().await;
}

#[tokio::test]
async fn what_is_sent_to_a_node_reaches_it_once_by_whichever_replica() {
    let servers = NatsServers::start(1);
    let (one, two) = (Hub::start(&servers, "hub-1").await, Hub::start(&servers, "hub-2").await);
    let node = Node::start("n1").await;
    let send = async |to: &str, text: &str| {
        let payload = text.as_bytes();
        let frame = FrameParts { topic: "valves/3", payload, ..FrameParts::default() }.encode();
        let subject = names::downlog_subject(to);
        one.tier.connection().append(subject, async_nats::HeaderMap::new(), frame).await.unwrap();
    };
    let received = async || {
        let stream = "down/n1".into();
        let read = Command::LogRead { origin: "".into(), stream, epoch: None, from: 1, bytes_max: 1 << 20 };
        let Ok(Response::Records { records, .. }) = node.handle.call(read).await else {
            return String::new();
        };
        let logs = records.iter().filter(|record| record.header.kind == Kind::LOG);
        let texts = logs.map(|record| {
            let frame = codec::FrameView::parse(&record.body).unwrap();
            String::from_utf8(frame.payload().to_vec()).unwrap()
        });
        texts.collect::<Vec<_>>().join(" ")
    };
    for (to, text) in [("n1", "a"), ("n2", "x"), ("n2", "y"), ("n1", "b")] {
        send(to, text).await;
    }
    let mut link = Node::shadow(&node);
    link.link(&one).await;
    until("what waited has come", async || received().await == "a b").await;
    send("n2", "z").await;
    send("n1", "c").await;
    until("what is new has come", async || received().await == "a b c").await;
    link.link(&two).await;
    send("n1", "d").await;
    until("by the other replica", async || received().await == "a b c d").await;
    drop(link);
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_connect_costs_a_claim_and_one_read_of_each_thing_that_may_have_moved() {
    let servers = NatsServers::start(1);
    let hub = Hub::start(&servers, "hub-1").await;
    let mut node = Node::start("n1").await;
    node.link(&hub).await;
    until("linked", hub.link_of("n1")).await;
    node.publish(10).await;
    node.retain("a", "1").await;
    node.is_acknowledged(10, &hub).await;
    until("its State too", async || hub.space("n1", "retained").await.len() == 1).await;
    let mut costs = Vec::new();
    for _ in 0..5 {
        if let Some(link) = node.link.take() {
            link.cut(true).await;
        }
        // Its release, and the lease, are not of the connect.
        sleep(Duration::from_millis(300)).await;
        let before = hub.requests();
        node.link(&hub).await;
        until("linked", hub.link_of("n1")).await;
        sleep(Duration::from_millis(200)).await; // and nothing is sent again
        costs.push(hub.requests() - before);
    }
    // The claim, where its spaces stand, its down Log, and the one Log that it holds records of. A renewal of the
    // lease may fall in between.
    let least = costs.iter().min();
    assert_eq!(least, Some(&4), "{costs:?}");
    hub.stop().await;
}
