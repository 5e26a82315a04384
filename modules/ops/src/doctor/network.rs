//! Checks of ports and of the way to the hub.

use std::{
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use tokio::net::{TcpStream, lookup_host};

use super::{Finding, Subject};
use crate::config::HostPort;

/// Long enough for a satellite link and a lost packet.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 2;

/// What a hub's UDP port said to a QUIC packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// A QUIC server is there.
    Quic,
    /// The host said that nobody listens.
    Refused,
    /// Nothing came back: a firewall, or another kind of server.
    Silent,
}

pub(super) fn ports(subject: &Subject) -> Vec<Finding> {
    let tcp = subject.tcp.iter().map(|(flag, addr)| port("tcp", flag, *addr, TcpListener::bind(addr).err()));
    let udp = subject.udp.iter().map(|(flag, addr)| port("udp", flag, *addr, UdpSocket::bind(addr).err()));
    tcp.chain(udp).collect()
}

fn port(protocol: &str, flag: &str, addr: SocketAddr, error: Option<io::Error>) -> Finding {
    const CHECK: &str = "port";
    match error {
        None => Finding::ok(CHECK, format!("{protocol} {addr} is free")),
        Some(error) if error.kind() == io::ErrorKind::AddrInUse => Finding::fail(
            CHECK,
            format!("{protocol} {addr} is in use"),
            format!("stop who has it (ss -lnp | grep {}), or choose another with {flag}", addr.port()),
        ),
        Some(error) => {
            Finding::fail(CHECK, format!("{protocol} {addr}: {error}"), format!("choose another with {flag}"))
        }
    }
}

pub(super) async fn hubs(subject: &Subject) -> Vec<Finding> {
    let mut findings = Vec::new();
    if subject.hubs.is_empty() {
        findings.push(Finding::skip("hub", "none is configured"));
    }
    let enrols = match &subject.bootstrap {
        Some(bootstrap) => {
            let (finding, reachable) = tcp("hub tcp", bootstrap, "renewal of the certificate").await;
            findings.push(finding);
            Some(reachable)
        }
        None => None,
    };
    for hub in &subject.hubs {
        let at = |port| HostPort { host: hub.host.clone(), port };
        let mut fallback = None;
        if let Some(port) = hub.websocket {
            let (finding, reachable) = tcp("hub wss", &at(port), "the link where UDP is blocked").await;
            findings.push(finding);
            fallback = Some(reachable);
        }
        if let Some(port) = hub.quic {
            findings.push(udp(&at(port), enrols, fallback == Some(true)).await);
        }
    }
    findings
}

async fn tcp(check: &'static str, hub: &HostPort, needed_for: &str) -> (Finding, bool) {
    let connect = async {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for addr in lookup_host((&*hub.host, hub.port)).await? {
            match TcpStream::connect(addr).await {
                Ok(_stream) => return Ok(addr),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    let remedy = format!("open TCP {} towards the hub; {needed_for} needs it", hub.port);
    match tokio::time::timeout(ANSWER_WITHIN, connect).await {
        Ok(Ok(addr)) => (Finding::ok(check, format!("{hub} ({addr}) answers")), true),
        Ok(Err(error)) => (Finding::fail(check, format!("{hub}: {error}"), remedy), false),
        Err(_elapsed) => {
            (Finding::fail(check, format!("{hub}: no answer within {ANSWER_WITHIN:?}"), remedy), false)
        }
    }
}

async fn udp(hub: &HostPort, tcp_works: Option<bool>, has_fallback: bool) -> Finding {
    const CHECK: &str = "hub udp";
    let addr = match lookup_host((&*hub.host, hub.port)).await {
        Ok(mut addrs) => addrs.next(),
        Err(error) => {
            let remedy = "check the name and this machine's DNS (resolvectl query), or give an address";
            return Finding::fail(CHECK, format!("{hub} does not resolve: {error}"), remedy);
        }
    };
    let Some(addr) = addr else {
        return Finding::fail(CHECK, format!("{hub} has no address"), "check the name");
    };
    match probe_quic(addr).await {
        Probe::Quic => Finding::ok(CHECK, format!("{hub} ({addr}) speaks QUIC")),
        Probe::Refused => Finding::fail(
            CHECK,
            format!("{hub} ({addr}): nobody listens there"),
            "start the hub, or correct the port (default 10001)",
        ),
        Probe::Silent if has_fallback => Finding::warn(
            CHECK,
            format!("{hub} ({addr}): UDP does not come through; links go by WebSocket instead"),
            format!(
                "a firewall drops UDP: open UDP {} towards the hub, with answers: it is faster",
                hub.port
            ),
        ),
        Probe::Silent if tcp_works == Some(true) => Finding::fail(
            CHECK,
            format!("{hub} ({addr}): TCP to the hub works, UDP does not come through"),
            format!("a firewall drops UDP: open UDP {} towards the hub, with answers", hub.port),
        ),
        Probe::Silent => Finding::fail(
            CHECK,
            format!("{hub} ({addr}): no answer within {ANSWER_WITHIN:?}"),
            format!("is the hub up and the address right? Then open UDP {} towards it", hub.port),
        ),
    }
}

/// Asks a server for the QUIC versions it speaks (RFC 9000, 6.1): needs no key, and costs it no state.
pub(super) async fn probe_quic(addr: SocketAddr) -> Probe {
    let any: SocketAddr = if addr.is_ipv6() { ([0u16; 8], 0).into() } else { ([0u8; 4], 0).into() };
    let Ok(socket) = tokio::net::UdpSocket::bind(any).await else {
        return Probe::Silent;
    };
    if socket.connect(addr).await.is_err() {
        return Probe::Silent;
    }
    let mut answer = [0u8; 1500];
    for _ in 0..ATTEMPTS {
        if let Err(error) = socket.send(&version_question()).await {
            return refused_or_silent(&error);
        }
        match tokio::time::timeout(ANSWER_WITHIN / 2, socket.recv(&mut answer)).await {
            Ok(Ok(length)) if is_version_answer(&answer[..length]) => return Probe::Quic,
            Ok(Err(error)) => return refused_or_silent(&error),
            _ => {}
        }
    }
    Probe::Silent
}

fn refused_or_silent(error: &io::Error) -> Probe {
    if error.kind() == io::ErrorKind::ConnectionRefused { Probe::Refused } else { Probe::Silent }
}

const CONNECTION_ID: [u8; 8] = *b"octodoct";

/// A long header with a version reserved to force negotiation, padded as every first packet.
fn version_question() -> [u8; 1200] {
    let mut packet = [0u8; 1200];
    packet[0] = 0xc0;
    packet[1..5].copy_from_slice(&0x1a2a_3a4a_u32.to_be_bytes());
    packet[5] = 8;
    packet[6..14].copy_from_slice(&CONNECTION_ID);
    packet[14] = 8;
    packet[15..23].copy_from_slice(&CONNECTION_ID);
    packet
}

/// Version 0, and our connection id comes back as the destination.
fn is_version_answer(packet: &[u8]) -> bool {
    packet.len() >= 14
        && packet[0] & 0x80 != 0
        && packet[1..5] == [0; 4]
        && packet[5] == 8
        && packet[6..14] == CONNECTION_ID
}
