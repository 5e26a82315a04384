//! The front over real sockets, with a real core behind it.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::*;
use crate::{core, driver, store::mem::MemStore};

const PATIENCE: Duration = Duration::from_secs(20);
const CONNECT: &str = "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\n";

struct Server {
    address: SocketAddr,
    tasks: Tasks,
    config: Arc<Config>,
}

impl Server {
    async fn start(adjust: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(Side::Node, adjust).await
    }

    async fn start_on(side: Side, adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(side, "test", Auth::Anonymous);
        adjust(&mut config);
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = Tasks::new();
        let core = match side {
            Side::Node => core::Config::node("edge-1", [1; 16], 1),
            Side::Hub => core::Config::hub("hub-1", "tier", [2; 16], 2),
        };
        let store = MemStore::auto();
        let recovered = store.recover();
        let broker = driver::start(core, store, recovered, &tasks);
        tasks.spawn("nats", serve(listener, Arc::clone(&config), broker, tasks.clone()));
        Self { address, tasks, config }
    }

    async fn client(&self) -> Client {
        let mut client = Client { stream: TcpStream::connect(self.address).await.unwrap() };
        assert!(client.line().await.starts_with("INFO {"));
        client
    }

    async fn connected(&self) -> Client {
        let mut client = self.client().await;
        client.sends(CONNECT).await;
        client.flushed().await;
        client
    }
}

struct Client {
    stream: TcpStream,
}

impl Client {
    async fn sends(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).await.unwrap();
    }

    async fn reads(&mut self, expected: impl AsRef<[u8]>) {
        let expected = expected.as_ref();
        let mut found = vec![0; expected.len()];
        timeout(PATIENCE, self.stream.read_exact(&mut found)).await.expect("an answer").unwrap();
        assert!(found == expected, "{} instead of {}", found.escape_ascii(), expected.escape_ascii());
    }

    async fn line(&mut self) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(timeout(PATIENCE, self.stream.read_u8()).await.expect("an answer").unwrap());
        }
        String::from_utf8(line).unwrap()
    }

    /// Everything sent before has taken effect.
    async fn flushed(&mut self) {
        self.sends("PING\r\n").await;
        self.reads("PONG\r\n").await;
    }

    async fn is_closed(&mut self) -> bool {
        timeout(PATIENCE, self.stream.read(&mut [0; 64])).await.expect("the end").is_ok_and(|read| read == 0)
    }
}

#[tokio::test]
async fn a_message_reaches_every_subscriber_and_one_of_each_queue_group() {
    let server = Server::start(|_| {}).await;
    let (mut alone, mut first, mut second) =
        (server.connected().await, server.connected().await, server.connected().await);
    alone.sends("SUB a.* 1\r\n").await;
    alone.flushed().await;
    for member in [&mut first, &mut second] {
        member.sends("SUB a.> workers 1\r\n").await;
        member.flushed().await;
    }
    alone.sends("PUB a.b 1\r\nx\r\nPUB a.b 1\r\ny\r\n").await;
    alone.reads("MSG a.b 1 1\r\nx\r\nMSG a.b 1 1\r\ny\r\n").await;
    let mut got = 0;
    for member in [&mut first, &mut second] {
        member.sends("PING\r\n").await;
        while member.line().await != "PONG\r\n" {
            got += 1;
            member.line().await;
        }
    }
    assert_eq!(got, 2, "one member for each message");
}

#[tokio::test]
async fn a_request_gets_its_answer_or_hears_that_nobody_answers() {
    let server = Server::start(|_| {}).await;
    let (mut asker, mut service) = (server.connected().await, server.connected().await);
    asker.sends("SUB _INBOX.q.* 1\r\nPUB svc _INBOX.q.1 2\r\nhi\r\n").await;
    asker.reads("HMSG _INBOX.q.1 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n").await;
    service.sends("SUB svc 9\r\n").await;
    service.flushed().await;
    asker.sends("PUB svc _INBOX.q.2 2\r\nhi\r\n").await;
    service.reads("MSG svc 9 _INBOX.q.2 2\r\nhi\r\n").await;
    service.sends("PUB _INBOX.q.2 5\r\nhello\r\n").await;
    asker.reads("MSG _INBOX.q.2 1 5\r\nhello\r\n").await;
}

#[tokio::test]
async fn a_large_message_passes_and_a_too_large_one_costs_only_its_sender() {
    let server = Server::start(|_| {}).await;
    let (mut good, mut bad) = (server.connected().await, server.connected().await);
    good.sends("SUB a 1\r\n").await;
    let payload = vec![b'x'; 1_000_000];
    good.sends(b"PUB a 1000000\r\n").await;
    good.sends(&payload).await;
    good.sends("\r\n").await;
    bad.sends("PUB a 1073741824\r\n").await;
    bad.reads("-ERR 'Maximum Payload Violation'\r\n").await;
    assert!(bad.is_closed().await);
    good.reads("MSG a 1 1000000\r\n").await;
    good.reads(&payload).await;
    good.reads("\r\n").await;
    good.flushed().await;
}

#[tokio::test]
async fn a_client_that_says_nothing_is_told_and_closed() {
    let server = Server::start(|config| config.connect_timeout = Duration::from_millis(50)).await;
    let mut client = server.client().await;
    client.sends("CONN").await;
    client.reads("-ERR 'Authentication Timeout'\r\n").await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn one_client_too_many_is_told_so_and_the_others_stay() {
    let server = Server::start(|config| config.max_connections = 1).await;
    let mut first = server.connected().await;
    let mut second = server.client().await;
    second.reads("-ERR 'maximum connections exceeded'\r\n").await;
    assert!(second.is_closed().await);
    first.flushed().await;
    assert_eq!(server.config.counters.refused.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_and_delays_nobody() {
    let server = Server::start(|config| config.write_timeout = Duration::from_millis(200)).await;
    let (mut mute, mut sender) = (server.connected().await, server.connected().await);
    mute.sends("SUB a 1\r\n").await;
    mute.flushed().await;
    let message = [&b"PUB a 1000000\r\n"[..], &vec![b'x'; 1_000_000], b"\r\n"].concat();
    while server.config.counters.slow_consumers.load(Ordering::Relaxed) == 0 {
        timeout(PATIENCE, sender.sends(&message)).await.expect("not delayed");
        sender.flushed().await;
    }
}

#[tokio::test]
async fn stopping_closes_every_connection() {
    let server = Server::start(|_| {}).await;
    let mut client = server.connected().await;
    let draining = server.tasks.drain(PATIENCE);
    assert!(tokio::join!(draining, client.is_closed()).1, "without an error, so that it connects again");
    assert_eq!(server.config.counters.connections.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_hub_says_that_a_node_does_not_exist() {
    let server = Server::start_on(Side::Hub, |_| {}).await;
    let mut client = server.connected().await;
    let complaint = "-ERR 'Permissions Violation for Publish: no node of that name is enrolled'\r\n";
    client.sends("PUB octobus.down.nowhere.a 1\r\nx\r\n").await;
    client.reads(complaint).await;
    client.sends("SUB _INBOX.q 1\r\nPUB octobus.down.nowhere.a _INBOX.q 1\r\nx\r\n").await;
    let answer = client.line().await;
    assert!(answer.starts_with("HMSG _INBOX.q 1 "), "{answer}");
    assert_eq!(client.line().await, "NATS/1.0 503\r\n");
}

#[tokio::test]
async fn a_durable_publish_on_a_node_comes_back_with_its_place_in_the_log() {
    let server = Server::start(|_| {}).await;
    let mut client = server.connected().await;
    client.sends("SUB a.> 1\r\nHPUB a.b 28 29\r\nNATS/1.0\r\nOctobus-QoS: 1\r\n\r\nx\r\n").await;
    assert!(client.line().await.starts_with("HMSG a.b 1 "));
    assert_eq!(client.line().await, "NATS/1.0\r\n");
    assert_eq!(client.line().await, "Octobus-Stream: default\r\n");
    assert!(client.line().await.starts_with("Octobus-Epoch: "));
    assert_eq!(client.line().await, "Octobus-Seq: 1\r\n");
    client.reads("\r\nx\r\n").await;
}

#[tokio::test]
async fn topics_at_the_limits_make_the_round_trip() {
    let server = Server::start(|_| {}).await;
    let mut client = server.connected().await;
    client.sends("SUB > 1\r\n").await;
    let deep = vec!["x"; 32].join("/");
    let topics =
        ["a//b", "/", "100%", "v1.2/*", "größe/µ", "a b/\u{1}", &"/".repeat(31), &deep, &"é".repeat(512)];
    for topic in topics {
        let mut subject = String::new();
        codec::name::topic_to_subject(topic, &mut subject);
        client.sends(format!("PUB {subject} 1\r\nx\r\n")).await;
        client.reads(format!("MSG {subject} 1 1\r\nx\r\n")).await;
    }
}
