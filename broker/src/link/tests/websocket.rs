//! Real WebSockets over loopback: who gets in, what is carried, and peers that do not play by the rules.

use std::net::SocketAddr;

use futures_util::{SinkExt as _, StreamExt as _};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, ClientRequestBuilder, Message as Raw, http::Uri},
};

use super::{
    quic::{Ca, HUB, NODE, PATIENCE, TrustAll, until},
    *,
};
use crate::{
    link::{
        accept::{Acceptor, Admission, Attempt as _, Listener as _},
        dial::{self, Backoff, Dialler, State, Way},
        identity::PeerCertificate,
        quic::{QuicDialler, QuicListener, Shape},
        stream::{OpenError, StreamCode},
        tls::{self, Credentials, TierSecret},
        websocket::{
            PATH, Proxy, SUBPROTOCOL, WebSocketDialler, WebSocketError, WebSocketListener, WebSocketTransport,
        },
    },
    tasks::{Drained, Tasks},
};

fn listen(credentials: Credentials, tasks: &Tasks) -> (WebSocketListener, SocketAddr) {
    let tls = tls::acceptor(credentials, &TierSecret::new(&[5; 32])).unwrap();
    let listener = WebSocketListener::bind("127.0.0.1:0".parse().unwrap(), &tls, tasks.clone()).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn dialler(credentials: Credentials, tasks: &Tasks) -> WebSocketDialler {
    WebSocketDialler::new(&tls::dialler(credentials, "tier-1").unwrap(), None, tasks.clone())
}

/// A dialler of node edge-1 under a CA of its own.
pub(in crate::link) fn some_dialler() -> WebSocketDialler {
    dialler(Ca::new().issue(NODE), &Tasks::new())
}

type Accepted = Result<(WebSocketTransport, PeerCertificate), WebSocketError>;

/// Both ends' views of one handshake.
async fn handshake(hub: Credentials, node: Credentials, tasks: &Tasks) -> (Accepted, Accepted) {
    let (listener, address) = listen(hub, tasks);
    let accepting = Box::pin(async { listener.accept().await.unwrap().handshake().await });
    let node = dialler(node, tasks);
    let dialling = Box::pin(node.dial("127.0.0.1", address.port(), PATIENCE));
    timeout(PATIENCE, async { tokio::join!(dialling, accepting) }).await.unwrap()
}

/// Two authenticated ends.
async fn pair(tasks: &Tasks) -> (WebSocketTransport, WebSocketTransport) {
    let ca = Ca::new();
    let (dialled, accepted) = handshake(ca.issue(HUB), ca.issue(NODE), tasks).await;
    let ((at_node, hub), (at_hub, node)) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!((hub.identity.to_string(), node.identity.to_string()), (HUB.to_owned(), NODE.to_owned()));
    (at_node, at_hub)
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is_and_exchange_records() {
    let tasks = Tasks::new();
    let (at_node, at_hub) = pair(&tasks).await;
    exchange_records(at_node, at_hub).await;
    assert_eq!(tasks.drain(PATIENCE).await, Drained::Clean, "connections end with their links");
}

#[tokio::test]
async fn bulk_that_nobody_reads_delays_no_control_on_the_wire() {
    let tasks = Tasks::new();
    let (at_node, peer) = pair(&tasks).await;
    leave_bulk_unread(at_node, peer).await;
}

#[tokio::test]
async fn only_a_hub_of_the_tier_is_dialled_and_only_its_nodes_are_accepted() {
    let (ca, other_ca, tasks) = (Ca::new(), Ca::new(), Tasks::new());
    let stolen = |credentials: Credentials| Credentials { ca: vec![ca.der()], ..credentials };
    let impostors = [
        ca.issue("octobus://tier-2/hub/r0"),
        ca.issue(NODE),
        ca.issue("https://hub"),
        stolen(other_ca.issue(HUB)),
    ];
    for impostor in impostors {
        let (dialled, _) = handshake(impostor, ca.issue(NODE), &tasks).await;
        assert!(matches!(dialled, Err(WebSocketError::Tls(_))), "{dialled:?}");
    }
    for stranger in [stolen(other_ca.issue(NODE)), ca.issue("https://edge-1")] {
        let (_, accepted) = handshake(ca.issue(HUB), stranger, &tasks).await;
        accepted.map(|_| ()).unwrap_err();
    }
}

/// A hub whose links are run by its acceptor.
struct Hub {
    address: SocketAddr,
    broker: Broker,
    tasks: Tasks,
    counters: Arc<Counters>,
}

fn hub(credentials: Credentials, params: Params) -> Hub {
    let tasks = Tasks::new();
    let (listener, address) = listen(credentials, &tasks);
    let broker = Broker::new();
    let acceptor = Acceptor {
        broker: broker.handle.clone(),
        params: Arc::new(params),
        admission: Admission::default(),
        counters: Arc::clone(&broker.counters),
        links: Arc::clone(&broker.links),
        tasks: tasks.clone(),
    };
    tasks.spawn("accept", acceptor.run(listener, |_certificate| async { Ok(()) }));
    let counters = Arc::clone(&broker.counters);
    Hub { address, broker, tasks, counters }
}

/// TLS as a client that does what it likes.
async fn raw_tls(
    address: SocketAddr,
    ca: &Ca,
    with_certificate: bool,
    alpn: &[&[u8]],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let trusting = Arc::new(TrustAll(Arc::clone(&provider)));
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(trusting);
    let mut config = if with_certificate {
        let Credentials { chain, key, .. } = ca.issue(NODE);
        config.with_client_auth_cert(chain, key).unwrap()
    } else {
        config.with_no_client_auth()
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn upgrade(
    stream: TlsStream<TcpStream>,
    path: &str,
    subprotocol: Option<&str>,
    origin: bool,
) -> Result<WebSocketStream<TlsStream<TcpStream>>, tungstenite::Error> {
    let uri: Uri = format!("wss://127.0.0.1:10000{path}").parse().unwrap();
    let mut request = ClientRequestBuilder::new(uri);
    if let Some(subprotocol) = subprotocol {
        request = request.with_sub_protocol(subprotocol);
    }
    if origin {
        request = request.with_header("Origin", "https://evil.example");
    }
    client_async(request, stream).await.map(|(socket, _)| socket)
}

const HTTP: &[u8] = b"http/1.1";

/// A client with a node's certificate that says what it likes.
async fn raw(address: SocketAddr, ca: &Ca) -> WebSocketStream<TlsStream<TcpStream>> {
    let stream = raw_tls(address, ca, true, &[HTTP]).await.unwrap();
    upgrade(stream, PATH, Some(SUBPROTOCOL), false).await.unwrap()
}

/// Reads until the server closes.
async fn is_closed(mut stream: TlsStream<TcpStream>) {
    let mut byte = [0; 1];
    timeout(PATIENCE, async { while !matches!(stream.read(&mut byte).await, Ok(0) | Err(_)) {} })
        .await
        .unwrap();
}

#[tokio::test]
async fn who_has_no_certificate_or_agrees_on_nothing_gets_no_upgrade() {
    let ca = Ca::new();
    let hub = hub(ca.issue(HUB), Params::default());
    // TLS 1.3: the client is done before the server has refused it.
    if let Ok(stream) = raw_tls(hub.address, &ca, false, &[HTTP]).await {
        is_closed(stream).await;
    }
    assert!(raw_tls(hub.address, &ca, true, &[b"octobus/1"]).await.is_err(), "another protocol");
    is_closed(raw_tls(hub.address, &ca, true, &[]).await.unwrap()).await;
    let refused = [
        ("/", Some(SUBPROTOCOL), false, 404),
        ("/octobus/v2/link", Some(SUBPROTOCOL), false, 404),
        (PATH, None, false, 400),
        (PATH, Some("octobus.2"), false, 400),
        (PATH, Some(SUBPROTOCOL), true, 403),
    ];
    for (path, subprotocol, origin, status) in refused {
        let stream = raw_tls(hub.address, &ca, true, &[HTTP]).await.unwrap();
        match upgrade(stream, path, subprotocol, origin).await.map(|_| ()) {
            Err(tungstenite::Error::Http(response)) => assert_eq!(response.status().as_u16(), status),
            other => panic!("{path}: {other:?}"),
        }
    }
    hub.tasks.drain(PATIENCE).await;
}

#[tokio::test]
async fn who_says_nothing_is_gone_after_the_handshake_time() {
    let ca = Ca::new();
    let hub = hub(ca.issue(HUB), Params { handshake: Duration::from_millis(300), ..Params::default() });
    let mut silent = TcpStream::connect(hub.address).await.unwrap();
    assert_eq!(timeout(PATIENCE, silent.read(&mut [0; 64])).await.unwrap().unwrap_or(0), 0);
    is_closed(raw_tls(hub.address, &ca, true, &[HTTP]).await.unwrap()).await;
    // Behind the upgrade the link's own times hold: without hello there is no link.
    let mut mute = raw(hub.address, &ca).await;
    while let Some(Ok(message)) = timeout(PATIENCE, mute.next()).await.unwrap() {
        assert!(!matches!(message, Raw::Binary(_)), "nothing is said to who says nothing");
    }
    hub.tasks.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_message_that_is_no_fragment_ends_the_link_as_a_protocol_error() {
    let ca = Ca::new();
    let long = vec![0; (16 << 10) + 3];
    let wrong: [(&str, Raw); 6] = [
        ("too long", Raw::Binary(long.into())),
        ("unknown flags", Raw::Binary(vec![0, 0x40, 1].into())),
        ("no lane of ours", Raw::Binary(vec![9, 1, 1].into())),
        ("a Stream of the other's numbers", Raw::Binary(vec![17, 1, 1].into())),
        ("credit out of nowhere", Raw::Binary(vec![0, 16, 255, 255, 255, 255].into())),
        ("text", Raw::Text("hello".into())),
    ];
    for (what, message) in wrong {
        let mut hub = hub(ca.issue(HUB), Params::default());
        let mut socket = raw(hub.address, &ca).await;
        let hello = [&[0, 1][..], &batch(&[hello()]).concat()].concat();
        socket.send(Raw::Binary(hello.into())).await.unwrap();
        hub.broker.opened().await;
        hub.broker.received().await;
        socket.send(message).await.unwrap();
        hub.broker.closed().await;
        let mut closed = None;
        while let Some(Ok(message)) = timeout(PATIENCE, socket.next()).await.unwrap() {
            if let Raw::Close(frame) = message {
                closed = frame;
            }
        }
        assert_eq!(closed.map(|frame| u16::from(frame.code)), Some(4001), "{what}");
        // Counted just behind what the broker was told.
        hub.tasks.drain(PATIENCE).await;
        assert_eq!(hub.counters.ended().get("protocol"), Some(&1), "{what}");
    }
}

/// A TCP connection whose middle can be stopped: nothing is said to either side.
async fn swallowing_relay(to: SocketAddr, tasks: &Tasks, swallow: CancellationToken) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = tasks.stopped();
    tasks.spawn("relay", async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        tokio::select! {
            biased;
            () = swallow.cancelled() => {}
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
        }
        stop.cancelled().await;
        drop((near, far));
    });
    address
}

#[tokio::test]
async fn a_half_open_connection_is_noticed_by_both_sides_within_two_heartbeats() {
    let (ca, tasks, swallow) = (Ca::new(), Tasks::new(), CancellationToken::new());
    let heartbeat = Duration::from_millis(400);
    let params = Params { heartbeat, drain: Duration::from_millis(100), ..Params::default() };
    let mut hub = hub(ca.issue(HUB), params.clone());
    let through = swallowing_relay(hub.address, &tasks, swallow.clone()).await;
    let (transport, _) =
        dialler(ca.issue(NODE), &tasks).dial("127.0.0.1", through.port(), PATIENCE).await.unwrap();
    let mut node = Broker::new();
    let link = Link { params: Arc::new(params), ..node.link(true) };
    let mut running = JoinSet::new();
    running.spawn(async move { (run(transport, link).await, Instant::now()) });
    node.opened().await;
    node.send(Class::Control, vec![hello()]);
    hub.broker.opened().await;
    hub.broker.received().await;
    // Heartbeats alone keep it up.
    timeout(4 * heartbeat, hub.broker.closed()).await.unwrap_err();
    swallow.cancel();
    let cut = Instant::now();
    hub.broker.closed().await;
    let at_hub = cut.elapsed();
    let (ended, at_node) = running.join_next().await.unwrap().unwrap();
    assert_eq!(ended.end, LinkEnd::PeerSilent);
    let bound = 2 * heartbeat + heartbeat;
    assert!(at_hub <= bound && at_node - cut <= bound, "{at_hub:?}, {:?}", at_node - cut);
    tasks.drain(PATIENCE).await;
    hub.tasks.drain(PATIENCE).await;
}

/// Two links that are up over WebSocket.
async fn linked(tasks: &Tasks) -> (Broker, Broker, JoinSet<Ended>) {
    let (at_node, at_hub) = pair(tasks).await;
    let (mut node, mut hub, mut running) = (Broker::new(), Broker::new(), JoinSet::new());
    let (node_link, hub_link) = (node.link(true), hub.link(false));
    running.spawn(async move { run(at_node, node_link).await });
    running.spawn(async move { run(at_hub, hub_link).await });
    node.opened().await;
    node.send(Class::Control, vec![hello()]);
    hub.opened().await;
    hub.received().await;
    (node, hub, running)
}

#[tokio::test]
async fn a_stream_that_nobody_reads_delays_no_control() {
    let tasks = Tasks::new();
    let (node, mut hub, _running) = linked(&tasks).await;
    let mut taken = node.links.accept("exec", 4);
    let open = proto::StreamOpen { kind: "exec".into(), ..Default::default() };
    let opening =
        tokio::join!(hub.links.open("peer", &open), async { taken.recv().await.unwrap().accept().await });
    let (mut stream, unread) = (opening.0.unwrap(), opening.1.unwrap());
    let mut stuffing = JoinSet::new();
    stuffing.spawn(async move {
        let written = stream.write_all(&vec![7; 4 << 20]).await;
        drop(written);
    });
    for seq in 0..50 {
        node.send(Class::Control, vec![record(Class::Control, seq, 100)]);
        let received = timeout(SECOND, hub.received()).await.expect("control passes");
        assert_eq!(received[0].header.seq, seq);
    }
    assert!(stuffing.try_join_next().is_none(), "four megabytes do not fit a window");
    drop(unread);
}

#[tokio::test]
async fn streams_are_refused_by_type_and_no_more_than_asked_for_wait() {
    let tasks = Tasks::new();
    let (node, hub, _running) = linked(&tasks).await;
    let open =
        |kind: &str| proto::StreamOpen { kind: kind.into(), target: "pod/x".into(), ..Default::default() };
    let refused = |result: Result<ByteStream, OpenError>| match result.unwrap_err() {
        OpenError::Refused { code, .. } => code,
        other => panic!("{other}"),
    };
    assert_eq!(refused(hub.links.open("peer", &open("logs")).await), StreamCode::UNKNOWN_KIND);
    assert_eq!(
        hub.links.open("nobody", &open("logs")).await.unwrap_err(),
        OpenError::NoLink("nobody".into())
    );
    let mut taken = node.links.accept("logs", 1);
    let logs = open("logs");
    let (first, second) = tokio::join!(hub.links.open("peer", &logs), async {
        let second = hub.links.open("peer", &logs).await;
        let incoming = taken.recv().await.unwrap();
        assert_eq!((&*incoming.peer.name, &*incoming.open.target), ("peer", "pod/x"));
        incoming.refuse(StreamCode::NOT_FOUND, "no such pod").await;
        second
    });
    assert_eq!(refused(second), StreamCode::BUSY);
    assert_eq!(
        first.unwrap_err(),
        OpenError::Refused { code: StreamCode::NOT_FOUND, message: "no such pod".into() }
    );
    drop(taken);
    assert_eq!(refused(hub.links.open("peer", &open("logs")).await), StreamCode::UNKNOWN_KIND);
}

#[tokio::test]
async fn an_echo_of_many_windows_comes_back_whole() {
    let tasks = Tasks::new();
    let (_node, hub, _running) = linked(&tasks).await;
    let open = proto::StreamOpen { kind: stream::ECHO.into(), ..Default::default() };
    let echo = hub.links.open("peer", &open).await.unwrap();
    let (mut reader, mut writer) = echo.into_split();
    let sent: Vec<u8> = record(Class::Bulk, 1, 8 << 20).body.to_vec();
    let (wrote, back) = tokio::join!(
        async {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        },
        async {
            let mut back = Vec::new();
            reader.read_to_end(&mut back).await.map(|_| back)
        }
    );
    wrote.unwrap();
    assert!(back.unwrap() == sent);
}

#[tokio::test]
async fn a_link_goes_through_an_http_proxy_and_a_refusal_is_told() {
    let (ca, tasks) = (Ca::new(), Tasks::new());
    let (listener, address) = listen(ca.issue(HUB), &tasks);
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = Proxy { host: "127.0.0.1".into(), port: proxy.local_addr().unwrap().port() };
    tasks.spawn("proxy", async move {
        for answer in ["HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"] {
            let (mut client, _) = proxy.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(client.read_u8().await.unwrap());
            }
            let line = String::from_utf8(request).unwrap();
            assert!(line.starts_with("CONNECT 127.0.0.1:"), "{line}");
            client.write_all(answer.as_bytes()).await.unwrap();
            if answer.contains("200") {
                let mut server = TcpStream::connect(address).await.unwrap();
                drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
            }
        }
    });
    let tls = tls::dialler(ca.issue(NODE), "tier-1").unwrap();
    let node = WebSocketDialler::new(&tls, Some(at), tasks.clone());
    let refused = node.dial("127.0.0.1", address.port(), PATIENCE).await.unwrap_err();
    assert!(refused.to_string().contains("407"), "{refused}");
    let accepting = async { listener.accept().await.unwrap().handshake().await };
    let (dialled, accepted) = tokio::join!(node.dial("127.0.0.1", address.port(), PATIENCE), accepting);
    dialled.unwrap();
    accepted.unwrap();
}

#[tokio::test]
async fn a_node_whose_udp_is_swallowed_links_by_websocket_and_moves_back_when_it_comes_through() {
    let (ca, tasks) = (Ca::new(), Tasks::new());
    let hub = welcoming_hub(&ca);
    // Nobody reads: as a firewall that drops.
    let swallowing = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let udp = swallowing.local_addr().unwrap();
    let mut broker = Broker::new();
    let tls = Arc::new(tls::dialler(ca.issue(NODE), "tier-1").unwrap());
    let dialler = Dialler {
        hubs: vec![dial::Hub {
            host: "127.0.0.1".into(),
            quic: Some(udp.port()),
            websocket: Some(hub.address.port()),
        }],
        websocket: WebSocketDialler::new(&tls, None, tasks.clone()),
        quic: QuicDialler::new(tls, Shape::NODE).unwrap(),
        prefer: Way::Quic,
        broker: broker.handle.clone(),
        params: Arc::default(),
        backoff: Backoff::new(Duration::from_millis(20), Duration::from_millis(50)),
        probes: Backoff::new(Duration::from_millis(50), Duration::from_millis(100)),
        counters: Arc::default(),
        links: Arc::default(),
        tasks: tasks.clone(),
        network_changed: Arc::new(tokio::sync::Notify::new()),
    };
    let (status, mut watching) = Dialler::status();
    tasks.spawn("dial", dialler.run(status));
    let stopped = tasks.stopped();
    tasks.spawn("node's broker", async move {
        loop {
            tokio::select! {
                biased;
                event = broker.event() => if let Event::LinkOpened(open) = event {
                    broker.session = open.session;
                    broker.send(Class::Control, vec![hello()]);
                },
                () = stopped.cancelled() => return,
            }
        }
    });
    let live = until(&mut watching, |status| status.state == State::Live).await;
    assert_eq!((live.way, live.fallback), (Way::WebSocket, true));
    drop(swallowing);
    let secret = TierSecret::new(&[5; 32]);
    let tls = tls::acceptor(ca.issue(HUB), &secret).unwrap();
    let listener = QuicListener::bind(udp, Arc::new(tls), &secret, Shape::HUB).unwrap();
    hub.tasks.spawn("accept QUIC", hub.acceptor.clone().run(listener, |_certificate| async { Ok(()) }));
    // A probe under way still waits for its own end: handshakes have 10 s.
    let back =
        timeout(3 * PATIENCE, watching.wait_for(|status| status.state == State::Live && !status.fallback));
    assert_eq!(back.await.unwrap().unwrap().way, Way::Quic);
    tasks.drain(PATIENCE).await;
    hub.tasks.drain(PATIENCE).await;
}

/// A hub that welcomes whoever comes.
struct Welcoming {
    address: SocketAddr,
    acceptor: Acceptor,
    tasks: Tasks,
}

fn welcoming_hub(ca: &Ca) -> Welcoming {
    let tasks = Tasks::new();
    let (listener, address) = listen(ca.issue(HUB), &tasks);
    let mut broker = Broker::new();
    let acceptor = Acceptor {
        broker: broker.handle.clone(),
        params: Arc::default(),
        admission: Admission::default(),
        counters: Arc::default(),
        links: Arc::default(),
        tasks: tasks.clone(),
    };
    tasks.spawn("accept", acceptor.clone().run(listener, |_certificate| async { Ok(()) }));
    let stopped = tasks.stopped();
    tasks.spawn("hub's broker", async move {
        let welcome = proto::Welcome { protocol: 1, ..Default::default() };
        loop {
            tokio::select! {
                biased;
                event = broker.event() => if let Event::LinkOpened(open) = event {
                    broker.session = open.session;
                    broker.send(Class::Control, vec![control_record(Message::Welcome(welcome.clone()))]);
                },
                () = stopped.cancelled() => return,
            }
        }
    });
    Welcoming { address, acceptor, tasks }
}
