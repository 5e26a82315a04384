//! P1, P2 (the connection's part), P3, P5: what a connected node costs a hub and the other end: bytes at rest, CPU
//! per mutual handshake, CPU per heartbeat.
//!
//! `p1_links [side] [links] [sockets] [heartbeats]`. The server is a process of its own, and so are the nodes (this
//! one). Sides:
//!
//! | side | the server holds |
//! |---|---|
//! | `quinn` | connections of stock quinn with its default settings, each with one stream |
//! | `transport` | our connections, each with its control stream |
//! | `hub` | links: sessions of a hub's core (over `MemStore`), heartbeats answered |
//!
//! The nodes are connections that say Hello and, with `hub`, ask for a heartbeat every period; they have no broker.

use std::{
    io::{BufRead, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use broker::{
    Tasks,
    core::Config,
    driver,
    link::{
        Counters, LaneSender as _, Links, Params, Transport as _,
        accept::{Acceptor, Admission, Attempt as _, Listener as _},
        identity::PeerCertificate,
        quic::{QuicAddress, QuicListener, QuicSocket, Shape},
        tls::{self, Credentials, TierSecret},
    },
    store::mem::MemStore,
};
use codec::{Class, Flags, Kind, Record, RecordHeader, batch::Encoder, proto, proto::control::Message};
use octobus_benches::{
    procfs,
    report::{self, say},
    server,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::{io::AsyncReadExt as _, sync::Semaphore, task::JoinSet, time::Instant};

const TIER: &str = "tier-1";
/// As the agent's.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Handshakes that the nodes have in flight.
const AT_ONCE: usize = 128;
/// Name of the thread of the server's links.
const LINKS: &str = "links";
/// Rest before memory is read.
const REST: Duration = Duration::from_secs(4);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize, or: &str| arguments.get(at).cloned().unwrap_or_else(|| or.to_owned());
    if argument(0, "") == "serve" {
        return serve(&argument(1, "hub"), Path::new(&argument(2, ".")));
    }
    let side = argument(0, "hub");
    let links: usize = argument(1, "5000").parse().context("how many links")?;
    let sockets: usize = argument(2, "64").parse().context("how many sockets")?;
    let periods: u32 = argument(3, "2").parse().context("how many heartbeats")?;
    server::take_processor(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let case = runtime.block_on(Box::pin(run(&side, links, sockets, periods)))?;
    report::print("P1", &[case])
}

/// A server in a process of its own, on processor 0.
struct Server {
    child: Child,
    commands: ChildStdin,
    answers: std::io::BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Server {
    fn start(side: &str, folder: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg(side)
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = child.stdin.take().context("piped")?;
        let answers = std::io::BufReader::new(child.stdout.take().context("piped")?);
        let mut server = Self { child, commands, answers, address: (Ipv4Addr::LOCALHOST, 0).into() };
        server.address = server.line()?.parse()?;
        Ok(server)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the server is gone");
        Ok(line.trim().to_owned())
    }

    /// Links that are up.
    fn up(&mut self) -> anyhow::Result<usize> {
        writeln!(self.commands, "up")?;
        Ok(self.line()?.parse()?)
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        procfs::cpu_time(self.child.id())
    }

    /// Of the links' thread alone.
    fn cpu_of_links(&self) -> anyhow::Result<Duration> {
        procfs::cpu_time_of(self.child.id(), LINKS)
    }

    fn memory(&self) -> anyhow::Result<u64> {
        procfs::pss(self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

async fn run(side: &str, links: usize, sockets: usize, periods: u32) -> anyhow::Result<serde_json::Value> {
    let folder = tempfile::tempdir()?;
    let ca = Ca::new()?;
    ca.write(folder.path())?;
    let mut server = Server::start(side, folder.path())?;
    let address = server.address;
    let (before, own_before) = (server.memory()?, procfs::own_rss()?);
    let names: Vec<Arc<rustls::ClientConfig>> = if side == "hub" {
        (0..links).map(|n| ca.node(n)).collect::<Result<_, _>>()?
    } else {
        vec![ca.node(0)?; links]
    };
    let configs = procfs::own_rss()?;
    let (cpu, own_cpu, began) = (server.cpu()?, procfs::cpu_time(std::process::id())?, Instant::now());
    let mut nodes = Nodes::dial(side, address, names, sockets).await?;
    while server.up()? < links {
        tokio::time::sleep(Duration::from_millis(20)).await;
        ensure!(began.elapsed() < Duration::from_secs(600), "{} of {links} links are up", server.up()?);
    }
    let took = began.elapsed();
    let handshake = (server.cpu()? - cpu) / u32::try_from(links)?;
    let own_handshake = (procfs::cpu_time(std::process::id())? - own_cpu) / u32::try_from(links)?;
    tokio::time::sleep(REST).await;
    let each = |bytes: u64, base: u64| bytes.saturating_sub(base) / links as u64;
    let (bytes, own) = (each(server.memory()?, before), each(procfs::own_rss()?, configs));
    say(format_args!(
        "{side:10} {links} links: {bytes} B at the server, {own} B here ({} B of it TLS configuration before); \
         {:.0} handshakes/s, CPU {handshake:?} at the server, {own_handshake:?} here",
        each(configs, own_before),
        links as f64 / took.as_secs_f64(),
    ));
    let mut case = json!({
        "case": side, "links": links, "sockets": sockets,
        "server_bytes": bytes, "node_bytes": own, "connected_s": took.as_secs_f64(),
        "handshake_us": handshake.as_micros(), "node_handshake_us": own_handshake.as_micros(),
    });
    if side == "hub" && periods > 0 {
        // The first period spreads them.
        nodes.beat();
        tokio::time::sleep(HEARTBEAT).await;
        let (cpu, own_cpu, beats) =
            (server.cpu()?, procfs::cpu_time(std::process::id())?, nodes.beats.load(Relaxed));
        let links_cpu = server.cpu_of_links()?;
        tokio::time::sleep(HEARTBEAT * periods).await;
        let beats = u32::try_from(nodes.beats.load(Relaxed) - beats)?;
        ensure!(beats > 0, "no heartbeat was answered");
        let links_cpu = (server.cpu_of_links()? - links_cpu) / beats;
        let (cpu, own_cpu) =
            ((server.cpu()? - cpu) / beats, (procfs::cpu_time(std::process::id())? - own_cpu) / beats);
        let (bytes, own) = (each(server.memory()?, before), each(procfs::own_rss()?, configs));
        say(format_args!(
            "{:10} {beats} heartbeats: CPU {cpu:?} at the server, {links_cpu:?} of it in the thread of links, {own_cpu:?} here; then {bytes} B and {own} B a link",
            ""
        ));
        case["heartbeats"] = json!(beats);
        case["heartbeat_ns"] = json!(cpu.as_nanos());
        case["heartbeat_links_ns"] = json!(links_cpu.as_nanos());
        case["node_heartbeat_ns"] = json!(own_cpu.as_nanos());
        case["server_bytes_later"] = json!(bytes);
        ensure!(server.up()? == links, "{} of {links} links are left", server.up()?);
    }
    Ok(case)
}

/// The other ends.
struct Nodes {
    beats: Arc<AtomicU64>,
    beating: tokio::sync::watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Nodes {
    async fn dial(
        side: &str,
        address: SocketAddr,
        names: Vec<Arc<rustls::ClientConfig>>,
        sockets: usize,
    ) -> anyhow::Result<Self> {
        let (beating, _) = tokio::sync::watch::channel(false);
        let beats = Arc::<AtomicU64>::default();
        let mut tasks = JoinSet::new();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        if side == "quinn" {
            let mut endpoints = Vec::new();
            for _ in 0..sockets {
                endpoints.push(quinn::Endpoint::client(any)?);
            }
            let slots = Arc::new(Semaphore::new(AT_ONCE));
            for (n, tls) in names.into_iter().enumerate() {
                let slot = Arc::clone(&slots).acquire_owned().await?;
                let endpoint = endpoints[n % sockets].clone();
                tasks.spawn(async move {
                    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).expect("TLS 1.3");
                    let config = quinn::ClientConfig::new(Arc::new(crypto));
                    let connecting = endpoint.connect_with(config, address, "octobus").expect("an address");
                    let connection = connecting.await.expect("a handshake");
                    let (mut sender, _receiver) = connection.open_bi().await.expect("a stream");
                    sender.write_all(b"hello").await.expect("it is up");
                    drop(slot);
                    connection.closed().await;
                });
            }
            return Ok(Self { beats, beating, _tasks: tasks });
        }
        let mut ports = Vec::new();
        for _ in 0..sockets {
            ports.push(QuicSocket::bind(any, Shape::NODE)?);
        }
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        for (n, tls) in names.into_iter().enumerate() {
            let slot = Arc::clone(&slots).acquire_owned().await?;
            let port = ports[n % sockets].clone();
            let (beats, mut watching, links) = (Arc::clone(&beats), beating.subscribe(), side == "hub");
            tasks.spawn(async move {
                let (transport, _hub) = Box::pin(port.dial(tls, address)).await.expect("a handshake");
                drop(port);
                let (mut sender, mut receiver) = transport.control(true).await.expect("a stream");
                sender.write(batch(hello(n))).await.expect("it is up");
                let mut buffer = vec![0; 4096];
                if links {
                    let read = receiver.read(&mut buffer).await.expect("it is up");
                    assert!(read > 0, "welcome");
                }
                drop(slot);
                if watching.wait_for(|beating| *beating).await.is_err() {
                    return;
                }
                let spread = HEARTBEAT.mul_f64((n % 1000) as f64 / 1000.0);
                let mut beat = tokio::time::interval_at(Instant::now() + spread, HEARTBEAT);
                for nonce in 1.. {
                    beat.tick().await;
                    let beat = Message::Heartbeat(proto::Heartbeat { nonce, time_us: 0 });
                    if sender.write(batch(control(beat))).await.is_err() {
                        return;
                    }
                    if !receiver.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                        return;
                    }
                    beats.fetch_add(1, Relaxed);
                }
            });
        }
        // All of them have said Hello.
        let _all = slots.acquire_many(u32::try_from(AT_ONCE)?).await?;
        Ok(Self { beats, beating, _tasks: tasks })
    }

    fn beat(&mut self) {
        self.beating.send_replace(true);
    }
}

fn hello(n: usize) -> Record {
    let mut instance = [0; 16];
    instance[..8].copy_from_slice(&(n as u64).to_le_bytes());
    control(Message::Hello(proto::Hello {
        protocol_min: 1,
        protocol_max: 1,
        instance: instance.to_vec().into(),
        claim: 1,
        ..proto::Hello::default()
    }))
}

fn control(message: Message) -> Record {
    let body = codec::encode(&proto::Control { message: Some(message) });
    let class = Class::Control as u8;
    let header = RecordHeader {
        kind: Kind::CONTROL,
        class,
        flags: Flags::default(),
        source: 0,
        epoch: 0,
        seq: 0,
        aux: 0,
    };
    Record { header, body }
}

fn batch(record: Record) -> Vec<bytes::Bytes> {
    Encoder::encode_uncompressed(&[record]).expect("it is small").into_buffers()
}

/// The tier's CA, as one process shows it to the other.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    fn issue(&self, uri: &str, usages: &[ExtendedKeyUsagePurpose]) -> anyhow::Result<Credentials> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names.push(SanType::URI(uri.try_into()?));
        params.extended_key_usages = usages.to_vec();
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        Ok(Credentials { ca: vec![self.0.der().clone()], chain: vec![certificate.der().clone()], key })
    }

    fn node(&self, n: usize) -> anyhow::Result<Arc<rustls::ClientConfig>> {
        let uri = format!("octobus://{TIER}/node/n{n}/1");
        let credentials = self.issue(&uri, &[ExtendedKeyUsagePurpose::ClientAuth])?;
        Ok(Arc::new(tls::dialler(credentials, TIER)?))
    }

    fn write(&self, folder: &Path) -> anyhow::Result<()> {
        let both = [ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let hub = self.issue(&format!("octobus://{TIER}/hub/r0"), &both)?;
        std::fs::write(folder.join("ca"), self.0.der())?;
        std::fs::write(folder.join("certificate"), &hub.chain[0])?;
        Ok(std::fs::write(folder.join("key"), hub.key.secret_der())?)
    }
}

fn read_credentials(folder: &Path) -> anyhow::Result<Credentials> {
    let certificate = |name: &str| std::fs::read(folder.join(name)).map(CertificateDer::from);
    let key = PrivateKeyDer::try_from(std::fs::read(folder.join("key"))?).map_err(anyhow::Error::msg)?;
    Ok(Credentials { ca: vec![certificate("ca")?], chain: vec![certificate("certificate")?], key })
}

fn serve(side: &str, folder: &Path) -> anyhow::Result<()> {
    server::take_processor(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let up = Arc::<AtomicUsize>::default();
        let counters = Arc::<Counters>::default();
        let secret = TierSecret::new(&[7; 32]);
        let tls = Arc::new(tls::acceptor(read_credentials(folder)?, &secret)?);
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let tasks = Tasks::new();
        let address = match side {
            "quinn" => serve_quinn(tls, any, &tasks, &up)?,
            "transport" => serve_transport(QuicListener::bind(any, tls, &secret, Shape::HUB)?, &tasks, &up)?,
            "hub" => {
                let bound = QuicAddress::bind(any, tls, &secret, Shape::HUB, 1)?;
                let address = bound.local_addr()?;
                let (store, recovered) = (MemStore::auto(), broker::store::Recovered::default());
                let config = Config::hub("r0", TIER, [9; 16], 1);
                let acceptor = Acceptor {
                    broker: driver::start(config, store, recovered, &tasks),
                    params: Arc::new(Params { heartbeat: HEARTBEAT * 6, ..Params::default() }),
                    admission: Admission::with_connections(1 << 20),
                    counters: Arc::clone(&counters),
                    links: Arc::<Links>::default(),
                    tasks: tasks.clone(),
                };
                // As a hub does it: links on a thread of their own, the core on another.
                let port = bound.into_ports().pop().context("one port")?;
                tasks.spawn_thread(LINKS, move || async move {
                    let listener = port.listen().expect("a socket of this process");
                    acceptor.run(listener, |_certificate: PeerCertificate| async { Ok(()) }).await;
                })?;
                address
            }
            other => bail!("no side {other}"),
        };
        answer(address, move || up.load(Relaxed) + usize::try_from(counters.up.load(Relaxed)).unwrap_or(0))
            .await
    })
}

/// Says where, then how many links are up whenever it is asked.
async fn answer(address: SocketAddr, up: impl Fn() -> usize) -> anyhow::Result<()> {
    let (asked, mut asking) = tokio::sync::mpsc::channel(1);
    std::thread::spawn(move || {
        for _line in std::io::stdin().lines() {
            if asked.blocking_send(()).is_err() {
                return;
            }
        }
    });
    let mut out = std::io::stdout();
    writeln!(out, "{address}")?;
    while asking.recv().await.is_some() {
        writeln!(out, "{}", up())?;
    }
    Ok(())
}

fn serve_transport(
    listener: QuicListener,
    tasks: &Tasks,
    up: &Arc<AtomicUsize>,
) -> anyhow::Result<SocketAddr> {
    let address = listener.local_addr()?;
    let (spawner, up) = (tasks.clone(), Arc::clone(up));
    tasks.spawn("accept", async move {
        while let Some(attempt) = listener.accept().await {
            let up = Arc::clone(&up);
            spawner.spawn("connection", async move {
                let Ok((transport, _who)) = Box::pin(attempt.handshake()).await else { return };
                let Ok(control) = transport.control(false).await else { return };
                up.fetch_add(1, Relaxed);
                transport.closed().await;
                drop(control);
                up.fetch_sub(1, Relaxed);
            });
        }
    });
    Ok(address)
}

fn serve_quinn(
    tls: Arc<rustls::ServerConfig>,
    any: SocketAddr,
    tasks: &Tasks,
    up: &Arc<AtomicUsize>,
) -> anyhow::Result<SocketAddr> {
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let endpoint = quinn::Endpoint::server(quinn::ServerConfig::with_crypto(Arc::new(crypto)), any)?;
    let address = endpoint.local_addr()?;
    let (spawner, up) = (tasks.clone(), Arc::clone(up));
    tasks.spawn("accept", async move {
        while let Some(incoming) = endpoint.accept().await {
            let up = Arc::clone(&up);
            spawner.spawn("connection", async move {
                let Ok(connection) = Box::pin(async { incoming.await }).await else { return };
                let Ok(_stream) = connection.accept_bi().await else { return };
                up.fetch_add(1, Relaxed);
                connection.closed().await;
                up.fetch_sub(1, Relaxed);
            });
        }
    });
    Ok(address)
}
