//! Real QUIC over loopback: who gets in, and the dialler's and acceptor's loops.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::{sync::Notify, time::timeout};

use super::*;
use crate::{
    link::{
        accept::{Acceptor, Admission, Attempt as _, Listener as _},
        dial::{Backoff, Dialler, State},
        identity::PeerCertificate,
        quic::{HandshakeError, QuicAddress, QuicDialler, QuicListener, QuicSocket, QuicTransport, Shape},
        tls::{self, Credentials, TierSecret},
    },
    tasks::Tasks,
};

pub(super) const NODE: &str = "octobus://tier-1/node/edge-1/3";
pub(super) const HUB: &str = "octobus://tier-1/hub/r0";
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(super) fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    /// With the usages that its role has.
    pub(super) fn issue(&self, uri: &str) -> Credentials {
        let mut usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if uri.contains("/hub/") {
            usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        self.issue_for(uri, usages)
    }

    pub(super) fn issue_for(&self, uri: &str, usages: Vec<ExtendedKeyUsagePurpose>) -> Credentials {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        params.extended_key_usages = usages;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Credentials {
            ca: vec![self.der()],
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        }
    }
}

fn listen(credentials: Credentials) -> (QuicListener, SocketAddr) {
    let secret = TierSecret::new(&[5; 32]);
    let tls = tls::acceptor(credentials, &secret).unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = QuicListener::bind(any, Arc::new(tls), &secret, Shape::HUB).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A dialler of node edge-1 under a CA of its own.
pub(in crate::link) fn some_dialler() -> QuicDialler {
    dialler(Ca::new().issue(NODE))
}

fn dialler(credentials: Credentials) -> QuicDialler {
    QuicDialler::new(Arc::new(tls::dialler(credentials, "tier-1").unwrap()), Shape::NODE).unwrap()
}

type Accepted = Result<(QuicTransport, PeerCertificate), HandshakeError>;

/// Both ends' views of one handshake.
async fn handshake(hub: Credentials, node: Credentials) -> (Accepted, Accepted) {
    let (listener, address) = listen(hub);
    let accepting = async {
        let attempt = listener.accept().await.unwrap();
        attempt.handshake().await
    };
    let node = dialler(node);
    timeout(PATIENCE, async { tokio::join!(node.dial(address), accepting) }).await.unwrap()
}

#[tokio::test]
async fn both_ends_learn_who_the_other_is_and_exchange_records() {
    let ca = Ca::new();
    let (dialled, accepted) = handshake(ca.issue(HUB), ca.issue(NODE)).await;
    let ((at_node, hub_certificate), (at_hub, node_certificate)) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!(hub_certificate.identity.to_string(), HUB);
    assert_eq!(node_certificate.identity.to_string(), NODE);

    exchange_records(at_node, at_hub).await;
}

#[tokio::test]
async fn a_dialler_refuses_whoever_is_not_a_hub_of_its_tier() {
    let (ca, other_ca) = (Ca::new(), Ca::new());
    let both = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let impostors = [
        (ca.issue("octobus://tier-2/hub/r0"), "not a hub of tier"),
        // A relay, for a node that was told of none.
        (ca.issue_for(NODE, both), "not a hub of tier"),
        (ca.issue_for(HUB, vec![ExtendedKeyUsagePurpose::ServerAuth]), "may not be used"),
        (ca.issue("octobus://tier-1/hub/r0/1"), "not an identity"),
        (Credentials { ca: vec![ca.der()], ..other_ca.issue(HUB) }, "BadSignature"),
        // A node's certificate has no serverAuth at all.
        (ca.issue(NODE), ""),
    ];
    for (impostor, expected) in impostors {
        let (dialled, _) = handshake(impostor, ca.issue(NODE)).await;
        let error = dialled.map(|_| ()).unwrap_err();
        let text = format!("{error:?}");
        assert!(text.contains(expected), "{text}");
    }
}

#[tokio::test]
async fn an_acceptor_refuses_whoever_has_no_identity_of_its_ca() {
    let (ca, other_ca) = (Ca::new(), Ca::new());
    let strangers = [
        Credentials { ca: vec![ca.der()], ..other_ca.issue(NODE) },
        ca.issue("https://edge-1"),
        ca.issue_for(NODE, vec![ExtendedKeyUsagePurpose::ServerAuth]),
    ];
    for stranger in strangers {
        let (_, accepted) = handshake(ca.issue(HUB), stranger).await;
        accepted.map(|_| ()).unwrap_err();
    }
}

#[tokio::test]
async fn a_dialler_takes_the_one_relay_that_it_was_told_and_no_other_node() {
    let ca = Ca::new();
    let both = || vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let gateway = |tier: &str| ca.issue_for(&format!("octobus://{tier}/node/gw-1/1"), both());
    let dial = |acceptor: Credentials, relay: Option<&'static str>| {
        let tls = tls::dialler_through(ca.issue(NODE), "tier-1", relay).unwrap();
        let dialler = QuicDialler::new(Arc::new(tls), Shape::NODE).unwrap();
        let (listener, address) = listen(acceptor);
        async move {
            let accepting = async { listener.accept().await.unwrap().handshake().await };
            let both = async { tokio::join!(dialler.dial(address), accepting) };
            timeout(PATIENCE, both).await.unwrap().0.map(|(_, certificate)| certificate.identity.to_string())
        }
    };
    assert_eq!(dial(gateway("tier-1"), Some("gw-1")).await.unwrap(), "octobus://tier-1/node/gw-1/1");
    assert_eq!(dial(ca.issue(HUB), Some("gw-1")).await.unwrap(), HUB);
    let plain = ca.issue_for("octobus://tier-1/node/gw-1/1", vec![ExtendedKeyUsagePurpose::ClientAuth]);
    for (acceptor, relay) in [
        (gateway("tier-1"), None),
        (gateway("tier-1"), Some("gw-2")),
        (gateway("tier-2"), Some("gw-1")),
        (plain, Some("gw-1")),
    ] {
        dial(acceptor, relay).await.unwrap_err();
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new();
    let (listener, address) = listen(ca.issue(HUB));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut anonymous = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Whoever attacks does not verify.
    let verified = tls::dialler(ca.issue(NODE), "tier-1").unwrap();
    anonymous.alpn_protocols = verified.alpn_protocols.clone();
    anonymous.dangerous().set_certificate_verifier(Arc::new(TrustAll(provider)));
    let anonymous = QuicDialler::new(Arc::new(anonymous), Shape::NODE).unwrap();
    let accepting = async { listener.accept().await.unwrap().handshake().await };
    let (_, accepted) =
        timeout(PATIENCE, async { tokio::join!(anonymous.dial(address), accepting) }).await.unwrap();
    let error = accepted.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("peer sent no certificates") || error.contains("ertificate"), "{error}");
}

#[derive(Debug)]
pub(super) struct TrustAll(pub(super) Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for TrustAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls_pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A hub: an accept loop with a broker that welcomes whoever comes.
struct Hub {
    address: SocketAddr,
    tasks: Tasks,
    asked: Arc<AtomicUsize>,
}

fn hub(credentials: Credentials, refusal: Option<proto::Refusal>) -> Hub {
    let (listener, address) = listen(credentials);
    let (tasks, asked) = (Tasks::new(), Arc::new(AtomicUsize::new(0)));
    let mut broker = Broker::new();
    let acceptor = Acceptor {
        broker: broker.handle.clone(),
        params: Arc::default(),
        admission: Admission::default(),
        counters: Arc::default(),
        links: Arc::default(),
        tasks: tasks.clone(),
    };
    let counting = Arc::clone(&asked);
    let authorize = move |certificate: PeerCertificate| {
        assert_eq!(certificate.identity.to_string(), NODE);
        counting.fetch_add(1, Relaxed);
        let refusal = refusal.clone();
        async move { refusal.map_or(Ok(()), Err) }
    };
    tasks.spawn("accept", acceptor.run(listener, authorize));
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
    Hub { address, tasks, asked }
}

/// A node: a dial loop with a broker that says hello, and its status.
fn node(quic: QuicDialler, hubs: Vec<dial::Hub>) -> (Tasks, watch::Receiver<dial::Status>) {
    let tasks = Tasks::new();
    let mut broker = Broker::new();
    let dialler = Dialler {
        hubs,
        quic,
        websocket: websocket::some_dialler(),
        prefer: dial::Way::Quic,
        probes: Backoff::of_probes(),
        broker: broker.handle.clone(),
        params: Arc::default(),
        backoff: Backoff::new(Duration::from_millis(20), Duration::from_millis(50)),
        counters: Arc::default(),
        links: Arc::default(),
        tasks: tasks.clone(),
        network_changed: Arc::new(Notify::new()),
    };
    let (status, watching) = Dialler::status();
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
    (tasks, watching)
}

fn at(address: SocketAddr) -> dial::Hub {
    dial::Hub { host: address.ip().to_string(), quic: Some(address.port()), websocket: None }
}

pub(super) async fn until(
    status: &mut watch::Receiver<dial::Status>,
    wanted: impl Fn(&dial::Status) -> bool,
) -> dial::Status {
    let seen = timeout(PATIENCE, status.wait_for(wanted)).await;
    seen.expect("in time").unwrap().clone()
}

#[tokio::test]
async fn a_node_is_live_after_welcome_and_links_again_when_its_hub_is_gone() {
    let ca = Ca::new();
    let (first, second) = (hub(ca.issue(HUB), None), hub(ca.issue("octobus://tier-1/hub/r1"), None));
    let hubs = vec![at(first.address), at(second.address)];
    let (tasks, mut status) = node(dialler(ca.issue(NODE)), hubs.clone());
    let live = until(&mut status, |status| status.state == State::Live).await;
    assert_eq!(live.hub, hubs[0].to_string());

    assert_eq!(first.tasks.drain(PATIENCE).await, crate::tasks::Drained::Clean);
    let live =
        until(&mut status, |status| status.state == State::Live && status.hub == hubs[1].to_string()).await;
    assert!(live.last_error.unwrap().contains("shutdown"));
    assert_eq!(second.asked.load(Relaxed), 1);

    assert_eq!(tasks.drain(PATIENCE).await, crate::tasks::Drained::Clean);
    assert_eq!(second.tasks.drain(PATIENCE).await, crate::tasks::Drained::Clean);
}

#[tokio::test]
async fn the_authorizer_is_asked_at_every_session_start_and_its_refusal_reaches_the_node() {
    let ca = Ca::new();
    let refusal = proto::Refusal { reason: 7, message: "generation 4 is current".into(), retry_after_ms: 1 };
    let refusing = hub(ca.issue(HUB), Some(refusal));
    let (tasks, mut status) = node(dialler(ca.issue(NODE)), vec![at(refusing.address)]);
    // Handshakes after the first may resume: the authorizer is asked all the same.
    let seen = until(&mut status, |_| refusing.asked.load(Relaxed) >= 3).await;
    assert!(seen.last_error.unwrap().contains("generation 4 is current"));
    assert_ne!(seen.state, State::Live);
    tasks.drain(PATIENCE).await;
    refusing.tasks.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_node_without_a_reachable_hub_backs_off_and_says_why() {
    let ca = Ca::new();
    let hubs = vec![dial::Hub { host: "no-such-host.invalid".into(), quic: Some(1), websocket: None }];
    let (tasks, mut status) = node(dialler(ca.issue(NODE)), hubs);
    let status = until(&mut status, |status| status.state == State::Backoff).await;
    assert!(status.last_error.unwrap().contains("cannot resolve"));
    assert_eq!(tasks.drain(PATIENCE).await, crate::tasks::Drained::Clean);
}

#[tokio::test]
async fn random_datagrams_disturb_nobody() {
    let ca = Ca::new();
    let hub = hub(ca.issue(HUB), None);
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for seed in 0..200 {
        let noise = record(Class::Bulk, seed, 1200).body;
        socket.send_to(&noise, hub.address).await.unwrap();
    }
    let (tasks, mut status) = node(dialler(ca.issue(NODE)), vec![at(hub.address)]);
    until(&mut status, |status| status.state == State::Live).await;
    tasks.drain(PATIENCE).await;
    hub.tasks.drain(PATIENCE).await;
}

#[tokio::test]
async fn bulk_that_nobody_reads_delays_no_control_on_the_wire() {
    let ca = Ca::new();
    let (dialled, accepted) = handshake(ca.issue(HUB), ca.issue(NODE)).await;
    let ((at_node, _), (peer, _)) = (dialled.unwrap(), accepted.unwrap());
    leave_bulk_unread(at_node, peer).await;
}

/// Connects from one socket to several ports at one address and says something both ways.
async fn connect_to_ports(by_kernel: bool) -> Vec<usize> {
    const PORTS: usize = 3;
    const CONNECTIONS: usize = 24;
    let ca = Ca::new();
    let secret = TierSecret::new(&[5; 32]);
    let tls = Arc::new(tls::acceptor(ca.issue(HUB), &secret).unwrap());
    let any = "127.0.0.1:0".parse().unwrap();
    let address = QuicAddress::bind(any, tls, &secret, Shape::HUB, PORTS).unwrap();
    let to = address.local_addr().unwrap();
    let mut accepting = JoinSet::new();
    let (accepted, mut accepts) = mpsc::channel(CONNECTIONS);
    for (number, port) in address.into_ports_with(by_kernel).into_iter().enumerate() {
        let (listener, accepted) = (port.listen().unwrap(), accepted.clone());
        accepting.spawn(async move {
            let mut open = Vec::new();
            while let Some(attempt) = listener.accept().await {
                let (transport, _who) = attempt.handshake().await.unwrap();
                let (mut sender, mut receiver) = transport.control(false).await.unwrap();
                receiver.read_exact(&mut [0; 5]).await.unwrap();
                sender.write(vec![Bytes::from_static(b"there")]).await.unwrap();
                open.push((transport, sender, receiver));
                accepted.send(number).await.unwrap();
            }
        });
    }
    let socket = QuicSocket::bind(any, Shape::NODE).unwrap();
    let tls = Arc::new(tls::dialler(ca.issue(NODE), "tier-1").unwrap());
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        let (transport, _hub) = socket.dial(Arc::clone(&tls), to).await.unwrap();
        let (mut sender, mut receiver) = transport.control(true).await.unwrap();
        sender.write(vec![Bytes::from_static(b"hello")]).await.unwrap();
        receiver.read_exact(&mut [0; 5]).await.unwrap();
        open.push((transport, sender, receiver));
    }
    let mut taken = vec![0; PORTS];
    for _ in 0..CONNECTIONS {
        taken[accepts.recv().await.unwrap()] += 1;
    }
    taken
}

#[tokio::test]
async fn connections_of_one_socket_are_spread_over_the_ports_of_an_address() {
    for by_kernel in [true, false] {
        let taken = timeout(PATIENCE, connect_to_ports(by_kernel)).await.unwrap();
        // By the address alone all of them would be at one.
        assert!(taken.iter().all(|count| *count > 0), "{taken:?}, steered by the kernel: {by_kernel}");
    }
}

/// Counts how often a hub's certificate is looked at: a resumed session has none.
#[derive(Debug)]
struct Looks(Arc<AtomicUsize>, TrustAll);

impl rustls::client::danger::ServerCertVerifier for Looks {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &rustls_pki_types::ServerName<'_>,
        ocsp: &[u8],
        now: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        self.0.fetch_add(1, Relaxed);
        self.1.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.1.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.1.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.1.supported_verify_schemes()
    }
}

#[tokio::test]
async fn a_ticket_of_one_replica_resumes_at_another_and_the_node_is_known_there() {
    let ca = Ca::new();
    let (first, second) = (listen(ca.issue(HUB)), listen(ca.issue("octobus://tier-1/hub/r1")));
    let looks = Arc::new(AtomicUsize::new(0));
    let mut tls = tls::dialler(ca.issue(NODE), "tier-1").unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    tls.dangerous().set_certificate_verifier(Arc::new(Looks(Arc::clone(&looks), TrustAll(provider))));
    let node = QuicDialler::new(Arc::new(tls), Shape::NODE).unwrap();
    for (listener, address) in [&first, &second] {
        let accepting = async {
            let (hub, who) = listener.accept().await.unwrap().handshake().await.unwrap();
            assert_eq!(who.identity.to_string(), NODE, "its chain is in the ticket");
            let (mut sender, mut receiver) = hub.control(false).await.unwrap();
            receiver.read_exact(&mut [0; 5]).await.unwrap();
            sender.write(vec![Bytes::from_static(b"there")]).await.unwrap();
            hub.closed().await;
        };
        let dialling = async {
            let (hub, _who) = node.dial(*address).await.unwrap();
            let (mut sender, mut receiver) = hub.control(true).await.unwrap();
            sender.write(vec![Bytes::from_static(b"hello")]).await.unwrap();
            // The ticket was sent before this.
            receiver.read_exact(&mut [0; 5]).await.unwrap();
            hub.close(CloseCode::DONE, "done");
        };
        timeout(PATIENCE, async { tokio::join!(accepting, dialling) }).await.unwrap();
    }
    assert_eq!(looks.load(Relaxed), 1, "the second handshake resumed");
}

#[tokio::test]
async fn a_dialler_that_is_asked_to_prove_its_address_comes_again() {
    let ca = Ca::new();
    let (listener, address) = listen(ca.issue(HUB));
    let node = dialler(ca.issue(NODE));
    let accepting = async {
        assert!(listener.accept().await.unwrap().prove().is_none(), "nothing is proved yet");
        let again = listener.accept().await.unwrap().prove().expect("it has come with the token");
        again.handshake().await
    };
    let (dialled, accepted) =
        timeout(PATIENCE, async { tokio::join!(node.dial(address), accepting) }).await.unwrap();
    dialled.unwrap();
    assert_eq!(accepted.unwrap().1.identity.to_string(), NODE);
}

#[tokio::test]
async fn links_end_when_the_worker_of_their_port_does() {
    let ca = Ca::new();
    let (dialled, accepted) = {
        let credentials = (ca.issue(HUB), ca.issue(NODE));
        // The runtime that serves both ports ends with this thread.
        let run = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(handshake(credentials.0, credentials.1))
        };
        std::thread::spawn(run).join().unwrap()
    };
    for transport in [dialled.unwrap().0, accepted.unwrap().0] {
        assert!(matches!(transport.closed().await, Closed::Lost(_)));
        assert!(transport.open(Class::Bulk).await.is_err());
    }
}
