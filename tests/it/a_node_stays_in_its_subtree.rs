//! Pins the border between nodes: with its real certificate a node reaches its own topics and nothing of
//! another's, whatever it says on the wire; nothing it sent comes back to it; and a certificate serves one
//! instance at a time.
//!
//! The intruder speaks the link protocol itself, with quinn and `codec`, because the real agent would never
//! send this. Each attempt is a connection of its own: the hub may close it at the first wrong word.

use std::{net::SocketAddr, path::Path, process::Command, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, FrameParts, FrameView, Kind, Record, RecordHeader, batch, proto};
use octobus_tests::{
    clock, log, mqtt, nats,
    octobus::{NODE, Octobus, Pair, Role, Running, folder, join, octobus},
    stock::Place,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use tokio::{sync::mpsc, task::JoinSet};

const OTHER: &str = "edge-2";
const SOON: Duration = Duration::from_secs(20);
/// How long the hub has to show that it does not answer.
const SILENCE: Duration = Duration::from_secs(2);
const EPOCH: u64 = 0x0c70_b005;

/// A hub at which edge-1 and edge-2 are enrolled; edge-1's identity is in the intruder's hands.
struct Scene {
    _folder: tempfile::TempDir,
    hub: Running,
    identity: serde_json::Value,
    quic: SocketAddr,
    runtime: tokio::runtime::Runtime,
}

impl Scene {
    fn new() -> Self {
        let folder = folder();
        let how = Octobus::new(Role::Cloud, &folder.path().join("hub"));
        let hub = how.start();
        for node in [NODE, OTHER] {
            join(Place::Here, &hub, &how, node, &folder.path().join(node));
        }
        let stored = std::fs::read(folder.path().join(NODE).join("identity/identity.json")).unwrap();
        let identity = serde_json::from_slice(&stored).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { _folder: folder, quic: how.address("--quic"), hub, identity, runtime }
    }

    /// One connection that says hello, then these records, then listens for a while.
    fn attempt(&self, hello: proto::Hello, records: Vec<Record>) -> Outcome {
        self.runtime.block_on(async {
            let mut link = Intruder::connect(&self.identity, self.quic).await;
            link.control(proto::control::Message::Hello(hello)).await;
            let welcomed = link.read_control(SOON).await;
            if !matches!(welcomed, Some(proto::control::Message::Welcome(_))) {
                return Outcome { welcomed: false, closed: true, received: link.received };
            }
            link.send(&records).await;
            let closed = link.listen(SILENCE).await;
            Outcome { welcomed: true, closed, received: link.received }
        })
    }

    fn hub_nats(&self) -> nats::Client {
        nats::Client::connect(self.hub.endpoint("nats")).unwrap()
    }

    fn log_of(&self, node: &str) -> Vec<log::Record> {
        log::records(&log::read(log::From::Admin(&self.hub.admin()), node, &[]))
    }
}

struct Outcome {
    welcomed: bool,
    closed: bool,
    received: Vec<Record>,
}

impl Outcome {
    /// Closed, or told so in the protocol's words.
    fn refused(&self) -> bool {
        let is_refusal = |record: &Record| {
            record.header.kind == Kind::CONTROL
                && matches!(
                    codec::decode::<proto::Control>(record.body.clone()),
                    Ok(proto::Control { message: Some(proto::control::Message::Refusal(_)) })
                )
        };
        self.closed || self.received.iter().any(is_refusal)
    }
}

#[test]
fn what_a_node_says_of_itself_is_taken() {
    // The control: if this were refused, the refusals below would prove nothing.
    let scene = Scene::new();
    let mut up = scene.hub_nats();
    up.subscribe("octobus.up.>").unwrap();
    let hello = hello(vec![offer(NODE)]);
    let outcome = scene.attempt(hello, exported(NODE, "mine"));
    assert!(outcome.welcomed && !outcome.refused());
    let subjects = [up.next(SOON).unwrap().subject, up.next(SOON).unwrap().subject];
    assert!(subjects.iter().all(|subject| subject == "octobus.up.edge-1.mine"), "{subjects:?}");
    assert_eq!(scene.log_of(NODE).len(), 1);
    // An echo would be a record of its own coming back.
    assert_eq!(of_topic(&outcome.received, "mine"), 0, "an echo came back");
}

#[test]
fn a_node_cannot_export_what_is_not_its_own() {
    let scene = Scene::new();
    let mut up = scene.hub_nats();
    up.subscribe("octobus.up.>").unwrap();
    let live = |origin| vec![declare(1, origin, SourceKind::Live, ""), record(Kind::LIVE, 1, 0, 0, "stolen")];
    let state = |origin, space| {
        vec![declare(1, origin, SourceKind::State, space), record(Kind::PUT, 1, EPOCH << 20, 1, "stolen")]
    };
    let attempts = [
        ("a Log of another node", vec![offer(OTHER)], log_records(OTHER, "default")),
        ("a Log of another node, not in hello", vec![], log_records(OTHER, "default")),
        ("a Log of the tier", vec![], log_records("", "default")),
        ("the Log of what goes down to another node", vec![], log_records("", "down/edge-2")),
        ("the Log of what comes down to itself", vec![], log_records("", "down/edge-1")),
        ("Live of another node", vec![], live(OTHER)),
        ("Live of the tier", vec![], live("")),
        ("Live of a name that is no name", vec![], live("edge-1/../edge-2")),
        ("retained messages of another node", vec![], state(OTHER, "retained")),
        ("twins of another node", vec![], state(OTHER, "twin")),
        ("the tier's identities", vec![], state("", "sys")),
        ("the tier's objects", vec![], state("", "fleet")),
    ];
    for (name, offers, records) in attempts {
        let outcome = scene.attempt(hello(offers), records);
        assert!(outcome.refused(), "still welcome after exporting {name}");
    }
    assert_eq!(scene.log_of(OTHER), []);
    assert_eq!(scene.log_of(NODE), []);
    // And none of it was shown to anybody: the next message is a true one.
    let own = scene.attempt(hello(vec![offer(NODE)]), exported(NODE, "mine"));
    assert!(!own.refused());
    assert_eq!(up.next(SOON).unwrap().subject, "octobus.up.edge-1.mine");
}

#[test]
fn a_source_that_was_never_declared_closes_the_link() {
    let scene = Scene::new();
    let outcome = scene.attempt(hello(vec![]), vec![record(Kind::LIVE, 77, 0, 0, "stolen")]);
    assert!(outcome.refused());
}

#[test]
fn a_node_cannot_import_what_is_not_for_it() {
    let scene = Scene::new();
    let mut hub = scene.hub_nats();
    hub.publish("octobus.down.edge-2.secret", b"for edge-2").unwrap();
    hub.publish("octobus.down.edge-1.open", b"for edge-1").unwrap();
    hub.flush().unwrap();
    let mark = |stream: &str| proto::LogMark { stream: stream.to_owned(), ..Default::default() };
    let position = |space: &str| proto::StatePosition { space: space.to_owned(), ..Default::default() };
    let asking = proto::Hello {
        marks: vec![mark("down/edge-1"), mark("down/edge-2"), mark("default")],
        positions: vec![position("sys"), position("k8s"), position("fleet")],
        ..hello(vec![])
    };
    // Closed for asking, or answered with its own: nothing else, at once or while it listens.
    let outcome = scene.attempt(asking, Vec::new());
    let quiet = scene.attempt(hello(vec![]), Vec::new());
    for (received, asked) in [(&outcome.received, true), (&quiet.received, false)] {
        assert_eq!(of_topic(received, "secret"), 0, "edge-1 was given what is for edge-2 (asked: {asked})");
        for record in received {
            let foreign = [&b"edge-2"[..], b"identity/", b"token/", b"claims/"];
            let found =
                foreign.iter().find(|text| record.body.windows(text.len()).any(|part| part == **text));
            assert_eq!(found, None, "{:?} of the tier or of edge-2 came to edge-1", record.header);
        }
    }
    let own = of_topic(&outcome.received, "open") + of_topic(&quiet.received, "open");
    assert!(own >= 1, "what is for edge-1 did not come");
}

#[test]
fn an_answer_that_nobody_asked_for_reaches_nobody() {
    let scene = Scene::new();
    let mut asker = scene.hub_nats();
    asker.subscribe("_INBOX.asker.>").unwrap();
    for correlation in [1, 2, 3, u64::MAX] {
        let mut answer = record(Kind::LIVE, 1, 0, correlation, "_INBOX/asker/1");
        answer.header.flags = Flags::REPLY;
        let outcome = scene.attempt(hello(vec![]), vec![declare(1, NODE, SourceKind::Live, ""), answer]);
        assert!(outcome.welcomed);
    }
    assert!(asker.next(SILENCE).is_err(), "an answer to nothing was delivered");
}

#[test]
fn another_certificate_than_the_tiers_is_nobody() {
    let scene = Scene::new();
    let key = rcgen::KeyPair::generate().unwrap();
    let tier = scene.identity["tier"].as_str().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    let name = format!("octobus://{tier}/node/{NODE}/1");
    params.subject_alt_names = vec![rcgen::SanType::URI(name.as_str().try_into().unwrap())];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let forged = params.self_signed(&key).unwrap();
    let mut identity = scene.identity.clone();
    identity["certificate"] = forged.pem().into();
    identity["key"] = key.serialize_pem().into();
    let welcomed = scene.runtime.block_on(async {
        let Ok(mut link) = Intruder::try_connect(&identity, scene.quic).await else { return false };
        link.try_control(proto::control::Message::Hello(hello(vec![]))).await
            && link.read_control(SILENCE).await.is_some()
    });
    assert!(!welcomed, "a self-signed certificate was let in");
}

#[test]
fn nothing_comes_back_where_it_came_from() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let mut hub = nats::Client::connect(dev.endpoint("nats")).unwrap();
    hub.subscribe("octobus.up.>").unwrap();
    let mut device = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    device.subscribe("#", 1).unwrap();
    hub.publish("octobus.down.edge-1.valves.3", b"open").unwrap();
    let topic = |packet| match packet {
        mqtt::Packet::Publish { topic, .. } => topic,
        other => panic!("{other:?}"),
    };
    assert_eq!(topic(device.next_publish(SOON).unwrap()), "valves/3");
    device.write(&mqtt::publish("marker", b"x", 1, 9, false, false)).unwrap();
    assert_eq!(topic(device.next_publish(SOON).unwrap()), "marker");
    assert_eq!(hub.next(SOON).unwrap().subject, "octobus.up.edge-1.marker", "what came down went up again");
    assert!(hub.next(SILENCE).is_err());
    assert!(device.next_publish(SILENCE).is_err(), "what went up came down again");
}

#[test]
fn a_second_instance_with_the_same_certificate_is_refused_and_named() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |quic| quic);
    let hub = pair.hub.start();
    let node = pair.node.start();
    let mut device = mqtt::Client::connect(node.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    let mut up = nats::Client::connect(hub.endpoint("nats")).unwrap();
    up.subscribe("octobus.up.>").unwrap();
    device.publish_acked("first", b"x", false).unwrap();
    assert_eq!(up.next(SOON).unwrap().subject, "octobus.up.edge-1.first");

    let copy = folder.path().join("copy");
    copy_while_running(pair.node.data(), &copy);
    let clone =
        Octobus::new(Role::Edge, &copy).args(&["--hub", &pair.hub.address("--quic").to_string()]).start();
    let mut double = mqtt::Client::connect(clone.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    double.publish_acked("from-the-copy", b"x", false).unwrap();

    let admin = hub.admin();
    let conditions = ["get", "conditions", "--admin", admin.to_str().unwrap(), "-o", "json"];
    clock::wait_for("condition DuplicateIdentity", SOON, || {
        let said = octobus(&conditions).ok().join("\n");
        (said.contains("DuplicateIdentity") && said.contains(NODE)).then_some(())
    });
    device.publish_acked("second", b"x", false).unwrap();
    assert_eq!(up.next(SOON).unwrap().subject, "octobus.up.edge-1.second", "the holder was disturbed");
    assert!(up.next(SILENCE).is_err(), "the copy was let in");
    clone.stop();
    node.stop();
    hub.stop();
}

/// As a disk image would be taken: the files with their modes, without the socket.
fn copy_while_running(from: &Path, to: &Path) {
    let copied = Command::new("cp").args(["-r", "--preserve=mode"]).arg(from).arg(to).status();
    assert!(copied.unwrap().success());
    drop(std::fs::remove_file(to.join("admin.sock")));
}

fn hello(logs: Vec<proto::LogOffer>) -> proto::Hello {
    proto::Hello {
        protocol_min: 1,
        protocol_max: 1,
        instance: Bytes::from_static(&[7; 16]),
        logs,
        software: "intruder".to_owned(),
        ..Default::default()
    }
}

fn offer(origin: &str) -> proto::LogOffer {
    let stream = "default".to_owned();
    proto::LogOffer { origin: origin.to_owned(), stream, epoch: EPOCH, first: 1, next: 2 }
}

#[derive(Clone, Copy)]
enum SourceKind {
    Live = 1,
    Log = 2,
    State = 3,
}

fn declare(source: u32, origin: &str, kind: SourceKind, name: &str) -> Record {
    let body = proto::Declare {
        origin: origin.to_owned(),
        kind: kind as u32,
        name: name.to_owned(),
        class: Class::Telemetry as u32,
    };
    Record { header: header(Kind::DECLARE, source, 0, 0), body: codec::encode(&body) }
}

fn record(kind: Kind, source: u32, epoch: u64, seq: u64, topic: &str) -> Record {
    let frame = FrameParts { topic, payload: b"by the intruder", time_us: 1, ..Default::default() };
    Record { header: header(kind, source, epoch, seq), body: frame.encode() }
}

fn header(kind: Kind, source: u32, epoch: u64, seq: u64) -> RecordHeader {
    RecordHeader { kind, class: Class::Telemetry as u8, flags: Flags::default(), source, epoch, seq, aux: 0 }
}

fn log_records(origin: &str, stream: &str) -> Vec<Record> {
    vec![declare(2, origin, SourceKind::Log, stream), record(Kind::LOG, 2, EPOCH, 1, "stolen")]
}

/// One Live message and one of the default Log.
fn exported(origin: &str, topic: &str) -> Vec<Record> {
    vec![
        declare(1, origin, SourceKind::Live, ""),
        record(Kind::LIVE, 1, 0, 0, topic),
        declare(2, origin, SourceKind::Log, "default"),
        record(Kind::LOG, 2, EPOCH, 1, topic),
    ]
}

fn of_topic(records: &[Record], topic: &str) -> usize {
    let is = |record: &&Record| {
        record.header.kind != Kind::CONTROL
            && FrameView::parse(&record.body).is_ok_and(|frame| frame.topic() == topic)
    };
    records.iter().filter(is).count()
}

/// The node's end of a link, in a stranger's hands.
struct Intruder {
    _endpoint: quinn::Endpoint,
    connection: quinn::Connection,
    control: quinn::SendStream,
    batches: mpsc::Receiver<Vec<Record>>,
    /// Everything taken from any stream.
    received: Vec<Record>,
    _readers: JoinSet<()>,
}

impl Intruder {
    async fn connect(identity: &serde_json::Value, hub: SocketAddr) -> Self {
        Self::try_connect(identity, hub).await.expect("a certificate of the tier is let in")
    }

    async fn try_connect(identity: &serde_json::Value, hub: SocketAddr) -> Result<Self, String> {
        let text = |name: &str| identity[name].as_str().unwrap_or_else(|| panic!("identity.json has {name}"));
        let certificate = CertificateDer::from_pem_slice(text("certificate").as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(text("key").as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyHub))
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        tls.alpn_protocols = vec![b"octobus/1".to_vec()];
        let config = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
        let connection = endpoint.connect(hub, "hub").unwrap().await.map_err(|error| error.to_string())?;
        let (control, answers) = connection.open_bi().await.map_err(|error| error.to_string())?;
        let (send, batches) = mpsc::channel(1024);
        let mut readers = JoinSet::new();
        readers.spawn(read_all(answers, send.clone()));
        let accepting = connection.clone();
        readers.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok(stream) = accepting.accept_uni().await {
                streams.spawn(read_all(stream, send.clone()));
            }
        });
        Ok(Self {
            _endpoint: endpoint,
            connection,
            control,
            batches,
            received: Vec::new(),
            _readers: readers,
        })
    }

    async fn control(&mut self, message: proto::control::Message) {
        assert!(self.try_control(message).await, "the hub closed before it heard anything");
    }

    async fn try_control(&mut self, message: proto::control::Message) -> bool {
        let body = codec::encode(&proto::Control { message: Some(message) });
        let mut header = header(Kind::CONTROL, 0, 0, 0);
        header.class = Class::Control as u8;
        write(&mut self.control, &[Record { header, body }]).await
    }

    /// Sends on the stream of telemetry. A hub that closes meanwhile is no failure.
    async fn send(&mut self, records: &[Record]) {
        if records.is_empty() {
            return;
        }
        if let Ok(mut stream) = self.connection.open_uni().await {
            write(&mut stream, records).await;
            drop(stream.finish());
        }
    }

    /// The first control message, if one comes in time.
    async fn read_control(&mut self, limit: Duration) -> Option<proto::control::Message> {
        let reading = async {
            while let Some(records) = self.batches.recv().await {
                let control = records.iter().find(|record| record.header.kind == Kind::CONTROL);
                let message = control.map(|record| codec::decode::<proto::Control>(record.body.clone()));
                self.received.extend(records);
                if let Some(message) = message {
                    return message.expect("the hub sends control messages").message;
                }
            }
            None
        };
        tokio::time::timeout(limit, reading).await.ok().flatten()
    }

    /// Takes what comes on every stream; true if the hub closed within the time.
    async fn listen(&mut self, time: Duration) -> bool {
        let taking = async {
            while let Some(records) = self.batches.recv().await {
                self.received.extend(records);
            }
        };
        drop(tokio::time::timeout(time, taking).await);
        self.connection.close_reason().is_some()
    }
}

/// Reads batches until the stream ends or breaks.
async fn read_all(mut stream: quinn::RecvStream, to: mpsc::Sender<Vec<Record>>) {
    while let Some(records) = read(&mut stream).await {
        if to.send(records).await.is_err() {
            return;
        }
    }
}

async fn write(stream: &mut quinn::SendStream, records: &[Record]) -> bool {
    let encoded = batch::Encoder::new().encode(records).expect("records of one class");
    for buffer in encoded.buffers() {
        if stream.write_all(buffer).await.is_err() {
            return false;
        }
    }
    true
}

/// The records of the next batch; `None` when the stream ends or breaks.
async fn read(stream: &mut quinn::RecvStream) -> Option<Vec<Record>> {
    let mut prefix = [0; batch::Prefix::LEN];
    stream.read_exact(&mut prefix).await.ok()?;
    let prefix = batch::Prefix::decode(&prefix).expect("the hub sends batches");
    let mut wire = vec![0; prefix.wire_len()];
    stream.read_exact(&mut wire).await.ok()?;
    Some(batch::decode(&prefix, wire.into()).expect("the hub sends batches"))
}

/// Believes any hub: whom a node believes is tested elsewhere.
#[derive(Debug)]
struct AnyHub;

impl rustls::client::danger::ServerCertVerifier for AnyHub {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
