//! What nodes own, through a real nats-server: written once, in order, whoever fails in between.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

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
        drop((self.tier, self.handle));
        self.tasks.drain(Duration::from_secs(10)).await;
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

    /// Publishes so many, and a retained value.
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
    async fn is_acknowledged(&self, messages: u64) {
        let what = format!("{messages} messages of {} acknowledged", self.name);
        until(&what, async || {
            let Ok(Response::Logs(logs)) = self.handle.call(Command::LogList { origin: None }).await else {
                return false;
            };
            let durable =
                logs.iter().filter(|log| *log.origin == *self.name).map(|log| log.next - 1).sum::<u64>();
            durable == messages && self.unacknowledged().await == 0
        })
        .await;
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
    node.is_acknowledged(100).await;
    consecutive(&hub.seqs("n1", "default").await, 100);
    node.publish(50).await;
    node.link(&hub).await;
    node.is_acknowledged(150).await;
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
    node.is_acknowledged(2_000).await;
    consecutive(&one.seqs("n1", "default").await, 2_000);
    until("the last value is in the tier", async || {
        one.space("n1", "retained").await.get("a") == Some(&(true, "9".to_owned()))
    })
    .await;
    drop(older);
    one.stop().await;
    two.stop().await;
}
