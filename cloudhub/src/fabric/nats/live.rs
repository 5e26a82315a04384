//! Live messages between nodes and the users of NATS, who never see a hub.
//!
//! Up: one session of the core is subscribed to every node's topics; what it gets is published as
//! `octobus.up.<n>.<topic>`, by the replica that has the node. What comes out of a Log has its place in the
//! headers, and was durable before.
//!
//! Down: `octobus.down.<n>.<topic>` goes to one replica of the tier. With a reply subject it is a request: passed
//! to the replica that has the node (`octobus.replica.<replica>.<n>.<topic>`), and answered with *node offline* at
//! once if none has. Without one it is appended to the stream of what the tier sends nodes, and reaches the node
//! whenever it links. That message is acknowledged to nobody: who wants to know asks for a reply.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{HeaderMap, Message, Subscriber};
use broker::{
    Handle, Outbox, Stopped, clock,
    event::{
        Delivery, Event, Front, OriginFilter, Output, Publish, RetainedOnSubscribe, SessionOpen,
        Subscription, Target,
    },
    limits,
};
use bytes::Bytes;
use codec::{
    Filter, FrameView,
    frame::{FrameParts, Trace, header},
    name,
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::{Instant, sleep};

use super::{
    claims::{Claims, Owner},
    connection::{Connection, NatsError},
    names,
};

/// Name of the stream that a message stands in.
const STREAM: &str = "Octobus-Stream";
/// Its epoch there, 16 hex digits.
const EPOCH: &str = "Octobus-Epoch";
/// Its sequence number there.
const SEQ: &str = "Octobus-Seq";
/// What the servers say of who asks, from another account: it is not the node's business.
const REQUEST_INFO: &str = "Nats-Request-Info";
/// Between replicas: where the answer to a request goes. The servers let nobody publish with a reply subject that
/// they made for another account.
const PASSED_REPLY: &str = "Octobus-Reply-To";
/// W3C trace context.
const TRACEPARENT: &str = "traceparent";
/// A message that the servers do not take now is tried again for this long.
const APPEND_PATIENCE: Duration = Duration::from_secs(30);
const APPEND_RETRY: Duration = Duration::from_millis(250);
/// Bytes that wait to be appended for nodes; beyond it nothing more is read from the servers.
const APPENDING_BYTES: usize = 16 << 20;
/// Requests that wait for an answer; more are told that the hub is overloaded.
const ASKED_MAX: usize = 16_384;
/// The core answers within a minute, always.
const ASKED_FOR: Duration = Duration::from_secs(90);
const UP: u32 = 1;
const ANSWERS: u32 = 2;

/// What crossed, for the metrics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Published for users.
    pub up: AtomicU64,
    /// Larger than the servers take, or refused by the library: not published.
    pub up_dropped: AtomicU64,
    /// Requests to nodes.
    pub requests: AtomicU64,
    /// Of those, answered with *node offline*.
    pub offline: AtomicU64,
    /// Appended for nodes.
    pub appended: AtomicU64,
    /// Not appended: malformed, for nobody, or refused by the servers.
    pub down_dropped: AtomicU64,
}

/// Live messages of this replica. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Live {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connection: Connection,
    claims: Claims,
    broker: Handle,
    replica: String,
    session: broker::event::SessionId,
    /// Reply topics of requests that went to nodes begin with this.
    inbox: String,
    asked: Mutex<Asked>,
    counters: Counters,
}

/// Requests on their way: the number in the reply topic, where the answer goes.
#[derive(Debug, Default)]
struct Asked {
    last: u64,
    waiting: BTreeMap<u64, (String, Instant)>,
}

impl Live {
    /// Opens the core's session.
    ///
    /// # Errors
    /// The broker has stopped.
    pub async fn open(
        connection: Connection,
        claims: Claims,
        broker: Handle,
        replica: &str,
    ) -> Result<(Self, Outbox), Stopped> {
        let (session, outbox) = broker.open_session();
        let inbox = format!("_INBOX/tier-{:016x}/", rand_u64());
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        broker.send(Event::SessionOpened(open), 0).await?;
        let answers = Filter::parse(&format!("{inbox}#")).expect("a filter");
        let everything = Filter::parse("#").expect("a filter");
        let subscriptions = vec![
            subscription(UP, OriginFilter::AnyNode, everything),
            subscription(ANSWERS, OriginFilter::Own, answers),
        ];
        broker.send(Event::Subscribed { session, token: 0, subscriptions }, 0).await?;
        let shared = Shared {
            connection,
            claims,
            broker,
            replica: replica.to_owned(),
            session,
            inbox,
            asked: Mutex::default(),
            counters: Counters::default(),
        };
        Ok((Self { shared: Arc::new(shared) }, outbox))
    }

    /// What is counted.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Publishes what the core has for users, until the broker stops.
    pub async fn run_up(self, mut outbox: Outbox) {
        let shared = &*self.shared;
        let mut outputs = VecDeque::new();
        loop {
            outbox.recv(&mut outputs).await;
            let mut cost = 0;
            for output in outputs.drain(..) {
                cost += output.cost();
                match output {
                    Output::Deliver(delivery) if delivery.sub == ANSWERS => shared.answer(&delivery).await,
                    Output::Deliver(delivery) => shared.publish_up(&delivery).await,
                    Output::Close(_) => return,
                    _ => {}
                }
            }
            let sent = Event::Sent { session: shared.session, bytes: cost };
            if shared.broker.send(sent, 0).await.is_err() {
                return;
            }
        }
    }

    /// Takes what users send to nodes, as one member of the tier's group.
    pub async fn run_down(self) {
        loop {
            let group = names::DOWN_GROUP.to_owned();
            match self.shared.connection.client().queue_subscribe(names::DOWN_ALL, group).await {
                Ok(subscriber) => self.shared.serve_down(subscriber).await,
                Err(error) => tracing::warn!(%error, "cannot subscribe to {}", names::DOWN_ALL),
            }
            sleep(APPEND_RETRY).await;
        }
    }

    /// Takes requests that other replicas pass on.
    pub async fn run_passed(self) {
        let prefix = names::replica_prefix(&self.shared.replica);
        loop {
            match self.shared.connection.client().subscribe(names::replica_all(&self.shared.replica)).await {
                Ok(mut passed) => {
                    while let Some(message) = passed.next().await {
                        self.shared.on_passed(&prefix, message).await;
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot subscribe to {prefix}"),
            }
            sleep(APPEND_RETRY).await;
        }
    }
}

impl Shared {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().expect("no panic under this lock")
    }

    async fn publish_up(&self, delivery: &Delivery) {
        let Ok(view) = FrameView::parse(&delivery.frame) else { return };
        let mut subject = String::new();
        name::node_subject(name::UP_PREFIX, &delivery.origin, view.topic(), &mut subject);
        let payload = delivery.frame.slice_ref(view.payload());
        let headers = up_headers(delivery, &view);
        let client = self.connection.client();
        let published = match headers {
            Some(headers) => client.publish_with_headers(subject, headers, payload).await,
            None => client.publish(subject, payload).await,
        };
        match published {
            Ok(()) => self.counters.up.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(node = %delivery.origin, topic = view.topic(), %error, "not published");
                self.counters.up_dropped.fetch_add(1, Ordering::Relaxed)
            }
        };
    }

    /// A node has answered, or nobody will.
    async fn answer(&self, delivery: &Delivery) {
        let Ok(view) = FrameView::parse(&delivery.frame) else { return };
        let number = view.topic().strip_prefix(&self.inbox).and_then(|number| number.parse().ok());
        let waiting = number.and_then(|number: u64| self.asked().waiting.remove(&number));
        let Some((reply, _)) = waiting else { return };
        if delivery.no_responders {
            self.counters.offline.fetch_add(1, Ordering::Relaxed);
        }
        let mut headers = HeaderMap::new();
        for (name, value) in view.headers() {
            append_header(&mut headers, name, value);
        }
        self.reply(reply, headers, delivery.frame.slice_ref(view.payload())).await;
    }

    async fn reply(&self, to: String, headers: HeaderMap, payload: Bytes) {
        let client = self.connection.client();
        let sent = if headers.is_empty() {
            client.publish(to, payload).await
        } else {
            client.publish_with_headers(to, headers, payload).await
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "an answer was not sent");
        }
    }

    async fn refuse(&self, to: String, reason: &str) {
        let mut headers = HeaderMap::new();
        headers.insert(header::SERVICE_ERROR_CODE, "503");
        headers.insert(header::SERVICE_ERROR, reason);
        self.reply(to, headers, Bytes::new()).await;
    }

    async fn serve_down(&self, mut subscriber: Subscriber) {
        let mut appending = Appending::default();
        let mut done = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some(appended) = done.next(), if !done.is_empty() => {
                    let (node, bytes): (String, usize) = appended;
                    if let Some(frame) = appending.next(&node, bytes) {
                        done.push(self.append(node, frame));
                    }
                }
                message = subscriber.next(), if appending.bytes < APPENDING_BYTES => {
                    let Some(message) = message else { return };
                    if let Some((node, frame)) = self.on_down(message).await
                        && let Some(frame) = appending.add(&node, frame)
                    {
                        done.push(self.append(node, frame));
                    }
                }
            }
        }
    }

    /// Takes what a user sent to a node: what is to be appended for it, if it is no request.
    async fn on_down(&self, message: Message) -> Option<(String, Bytes)> {
        let destination = destination(name::DOWN_PREFIX, &message.subject);
        let reply = message.reply.as_ref().map(ToString::to_string);
        match (destination, reply) {
            (Some((node, topic)), None) => {
                let frame = frame_of(&topic, &message);
                self.counters.down_dropped.fetch_add(u64::from(frame.is_none()), Ordering::Relaxed);
                return Some((node, frame?));
            }
            (Some((node, topic)), Some(reply)) => {
                self.counters.requests.fetch_add(1, Ordering::Relaxed);
                match self.claims.owner(&node) {
                    Owner::Here => self.ask(node, &topic, &message, reply).await,
                    Owner::Replica(replica) => self.pass(&replica, message, reply).await,
                    Owner::Nobody => {
                        self.counters.offline.fetch_add(1, Ordering::Relaxed);
                        self.refuse(reply, "node offline").await;
                    }
                }
            }
            (None, reply) => {
                self.counters.down_dropped.fetch_add(1, Ordering::Relaxed);
                if let Some(reply) = reply {
                    self.refuse(reply, "not a subject of a node's topic").await;
                }
            }
        }
        None
    }

    async fn pass(&self, replica: &str, message: Message, reply: String) {
        let after = &message.subject[name::DOWN_PREFIX.len()..];
        let subject = format!("{}{after}", names::replica_prefix(replica));
        let mut headers = message.headers.unwrap_or_default();
        headers.insert(PASSED_REPLY, reply);
        let passed = self.connection.client().publish_with_headers(subject, headers, message.payload).await;
        if let Err(error) = passed {
            tracing::debug!(%error, "a request was not passed on");
        }
    }

    async fn on_passed(&self, prefix: &str, message: Message) {
        let reply = message.headers.as_ref().and_then(|headers| headers.get(PASSED_REPLY));
        let reply = reply.map(ToString::to_string);
        if let (Some((node, topic)), Some(reply)) = (destination(prefix, &message.subject), reply) {
            self.ask(node, &topic, &message, reply).await;
        }
    }

    /// Asks a node that is linked here; the core says at once if it is not.
    async fn ask(&self, node: String, topic: &str, message: &Message, reply: String) {
        let Some(frame) = frame_of(topic, message) else {
            return self.refuse(reply, "the message is malformed or too large").await;
        };
        let number = {
            let mut asked = self.asked();
            let now = Instant::now();
            while asked.waiting.first_key_value().is_some_and(|(_, (_, at))| *at + ASKED_FOR < now) {
                asked.waiting.pop_first();
            }
            if asked.waiting.len() >= ASKED_MAX {
                None
            } else {
                asked.last += 1;
                let number = asked.last;
                asked.waiting.insert(number, (reply.clone(), now));
                Some(number)
            }
        };
        let Some(number) = number else { return self.refuse(reply, "overloaded").await };
        let inbox = format!("{}{number}", self.inbox);
        let bytes = frame.len();
        let publish = Publish {
            target: Target::Node(node.into()),
            frame,
            qos: 0,
            packet_id: 0,
            dup: false,
            retain: false,
            reply: Some(inbox.into()),
        };
        // Not sent: the broker stops, and with it this.
        drop(
            self.broker
                .send(Event::Published { session: self.session, messages: vec![publish] }, bytes)
                .await,
        );
    }

    async fn append(&self, node: String, frame: Bytes) -> (String, usize) {
        let bytes = frame.len();
        match append_down(&self.connection, &node, frame).await {
            Ok(_seq) => self.counters.appended.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                tracing::warn!(node, %error, "a message to a node was not kept");
                self.counters.down_dropped.fetch_add(1, Ordering::Relaxed)
            }
        };
        (node, bytes)
    }
}

/// What is to be appended: one message on its way for each node, so that theirs stay in order, and none waits for
/// another node's.
#[derive(Debug, Default)]
struct Appending {
    /// What waits behind the one on its way.
    nodes: BTreeMap<String, VecDeque<Bytes>>,
    bytes: usize,
}

impl Appending {
    /// Takes a frame; it comes back if it may be sent now.
    fn add(&mut self, node: &str, frame: Bytes) -> Option<Bytes> {
        self.bytes += frame.len();
        match self.nodes.get_mut(node) {
            Some(waiting) => {
                waiting.push_back(frame);
                None
            }
            None => {
                self.nodes.insert(node.to_owned(), VecDeque::new());
                Some(frame)
            }
        }
    }

    /// The one on its way, of so many bytes, has arrived: what may be sent now.
    fn next(&mut self, node: &str, bytes: usize) -> Option<Bytes> {
        self.bytes -= bytes;
        let next = self.nodes.get_mut(node).and_then(VecDeque::pop_front);
        if next.is_none() {
            self.nodes.remove(node);
        }
        next
    }
}

/// Appends a frame to what the tier sends a node; durable as the servers make it when this returns.
///
/// # Errors
/// See [`NatsError`].
pub async fn append_down(connection: &Connection, node: &str, frame: Bytes) -> Result<u64, NatsError> {
    let deadline = Instant::now() + APPEND_PATIENCE;
    loop {
        match connection.append(names::downlog_subject(node), HeaderMap::new(), frame.clone()).await {
            // It did not happen, so it may be tried again without happening twice.
            Err(NatsError::Unavailable) if Instant::now() < deadline => sleep(APPEND_RETRY).await,
            appended => return appended,
        }
    }
}

fn subscription(id: u32, origin: OriginFilter, filter: Filter) -> Subscription {
    Subscription {
        id,
        origin,
        filter,
        qos: 0,
        group: None,
        no_local: false,
        retain_as_published: false,
        retained: RetainedOnSubscribe::DoNotSend,
        wildcard_matches_dollar: true,
        identifier: 0,
    }
}

fn rand_u64() -> u64 {
    getrandom::u64().unwrap_or_else(|_| clock::wall_us())
}

/// Node and topic of a subject behind a prefix.
fn destination(prefix: &str, subject: &str) -> Option<(String, String)> {
    let (node, rest) = name::split_node(subject.strip_prefix(prefix)?).ok()?;
    codec::topic::validate_node_name(&node).ok()?;
    Some((node, name::subject_to_topic(rest).ok()?))
}

/// The one frame that a message will ever have.
fn frame_of(topic: &str, message: &Message) -> Option<Bytes> {
    let mut headers: Vec<(&str, &[u8])> = Vec::new();
    let mut trace = None;
    let is_ours = |name: &str| name == REQUEST_INFO || name == PASSED_REPLY;
    let headers_of = message.headers.iter().flat_map(HeaderMap::iter);
    for (name, values) in headers_of.filter(|(name, _)| !is_ours(AsRef::<str>::as_ref(name))) {
        for value in values {
            let name: &str = name.as_ref();
            let text = value.as_str();
            match Trace::from_traceparent(text) {
                Some(parsed) if trace.is_none() && name.eq_ignore_ascii_case(TRACEPARENT) => {
                    trace = Some(parsed)
                }
                _ => headers.push((name, text.as_bytes())),
            }
        }
    }
    let wall_us = clock::wall_us();
    let parts = FrameParts {
        topic,
        time_us: wall_us,
        time_trusted: wall_us >= clock::TRUSTED_FROM_US,
        trace,
        ttl_s: 0,
        headers: &headers,
        payload: &message.payload,
    };
    (parts.encoded_len() <= limits::FRAME_MAX).then(|| parts.encode())
}

/// Ours come first, and a frame cannot bring its own under their names.
fn up_headers(delivery: &Delivery, view: &FrameView<'_>) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    if let Some(position) = &delivery.position {
        headers.insert(STREAM, &*position.stream);
        headers.insert(EPOCH, format!("{:016x}", position.epoch));
        headers.insert(SEQ, position.seq.to_string());
    }
    let trace = view.trace();
    if let Some(trace) = trace {
        headers.insert(TRACEPARENT, trace.to_traceparent());
    }
    for (name, value) in view.headers() {
        let traced = trace.is_some() && name.eq_ignore_ascii_case(TRACEPARENT);
        if !traced && ![STREAM, EPOCH, SEQ].iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
            append_header(&mut headers, name, value);
        }
    }
    (!headers.is_empty()).then_some(headers)
}

/// Headers of NATS are text of one line; one that is not is left out.
fn append_header(headers: &mut HeaderMap, name: &str, value: &[u8]) {
    let name = name.parse::<async_nats::HeaderName>();
    let value = str::from_utf8(value).ok().and_then(|text| text.parse::<async_nats::HeaderValue>().ok());
    if let (Ok(name), Some(value)) = (name, value) {
        headers.append(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_to_one_node_are_appended_one_by_one_and_to_others_meanwhile() {
        let frame = |text: &'static str| Bytes::from_static(text.as_bytes());
        let mut appending = Appending::default();
        assert_eq!(appending.add("a", frame("1")), Some(frame("1")));
        assert_eq!(appending.add("a", frame("22")), None);
        assert_eq!(appending.add("a", frame("3")), None);
        assert_eq!(appending.add("b", frame("4")), Some(frame("4")), "another node does not wait");
        assert_eq!(appending.bytes, 5);
        assert_eq!(appending.next("a", 1), Some(frame("22")));
        assert_eq!(appending.next("a", 2), Some(frame("3")));
        assert_eq!(appending.next("a", 1), None);
        assert_eq!(appending.next("b", 1), None);
        assert_eq!((appending.bytes, appending.nodes.len()), (0, 0), "nothing is left of them");
    }

    #[test]
    fn only_a_nodes_topic_is_a_destination() {
        let of = |subject| destination(name::DOWN_PREFIX, subject);
        assert_eq!(of("octobus.down.plant%2E1.a.b"), Some(("plant.1".to_owned(), "a/b".to_owned())));
        for subject in
            ["octobus.down.edge-1", "octobus.down.Edge.a", "octobus.up.edge-1.a", "octobus.down.e.a%41"]
        {
            assert_eq!(of(subject), None, "{subject}");
        }
    }
}
