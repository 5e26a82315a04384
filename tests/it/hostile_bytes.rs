//! Pins that no byte from outside harms anybody but its sender: every port gets noise, truncations, huge
//! claims, the wrong protocol and a trickle; each is closed in bounded time, memory stays flat, and clients
//! that behave notice nothing.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use octobus_tests::{
    clock, mqtt, nats,
    octobus::{Octobus, Role, Running, folder},
    process::run_command,
    procfs, seed,
    stock::{Place, python},
};
use rand::{Rng, RngCore};

/// A connection that made no sense is closed within this.
const CLOSED: Duration = Duration::from_secs(5);
/// A connection that never gets anywhere is closed within this: the connect timeout is 10 s by default.
const GIVEN_UP: Duration = Duration::from_secs(40);
/// Longest that a well-behaved client waits for an answer, on a busy machine, in a debug build.
const UNDISTURBED: Duration = Duration::from_secs(3);
/// Growth of memory over everything below; one claim of 1 GiB believed would exceed it.
const GROWTH: u64 = 96 << 20;

const TCP_PORTS: [&str; 4] = ["mqtt", "nats", "bootstrap", "metrics"];

#[test]
fn bytes_that_make_no_sense_close_their_connection_and_nothing_else() {
    let seed = seed::seed();
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let before = warmed_up(&dev);
    let peace = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let stop = Stop(&peace);
        let watchers = [scope.spawn(|| watch_mqtt(&dev, &peace)), scope.spawn(|| watch_nats(&dev, &peace))];
        for port in TCP_PORTS {
            for (name, bytes, half_close) in attacks(port, seed) {
                let mut stream = TcpStream::connect(dev.endpoint(port)).unwrap();
                let ended = ends(&mut stream, &bytes, half_close, CLOSED);
                assert!(ended, "{port} still open {CLOSED:?} after: {name}");
            }
        }
        for (name, bytes, half_close) in attacks("admin", seed) {
            let mut stream = UnixStream::connect(dev.admin()).unwrap();
            let ended = ends(&mut stream, &bytes, half_close, CLOSED);
            assert!(ended, "admin still open {CLOSED:?} after: {name}");
        }
        datagrams(dev.endpoint("quic"), seed);
        drop(stop);
        for watcher in watchers {
            let worst = watcher.join().expect("a client that behaves is served");
            assert!(worst < UNDISTURBED, "a client that behaves waited {worst:?}");
        }
    });
    assert_flat(&dev, before);
    dev.stop();
}

#[test]
fn whoever_says_nothing_or_too_little_is_closed_in_bounded_time() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let before = warmed_up(&dev);
    let peace = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let stop = Stop(&peace);
        let watcher = scope.spawn(|| watch_mqtt(&dev, &peace));
        let mut victims = Vec::new();
        for port in TCP_PORTS {
            for trickle in [&b""[..], b"\x10\xff", b"GET / HTTP/1.1\r\nX: "] {
                let address = dev.endpoint(port);
                victims.push(scope.spawn(move || (port, trickle, outlives(address, trickle, GIVEN_UP))));
            }
        }
        for victim in victims {
            let (port, trickle, alive) = victim.join().unwrap();
            assert!(!alive, "{port} keeps a connection that says {trickle:?} and then a byte a second");
        }
        drop(stop);
        assert!(watcher.join().unwrap() < UNDISTURBED);
    });
    assert_flat(&dev, before);
}

#[test]
fn three_bytes_that_break_readers_close_one_client_only() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let address = dev.endpoint("mqtt");
    let mut other = mqtt::Client::connect(address, &mqtt::Options::new("other")).unwrap();
    for bytes in [[0x20, 1, 0], [0xb0, 1, 0]] {
        for version in [4, 5] {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&connect(version)).unwrap();
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer[0], 0x20, "CONNACK");
            assert!(ends(&mut stream, &bytes, false, CLOSED), "MQTT {version} survived {bytes:02x?}");
            other.ping().unwrap();
        }
    }
}

#[test]
fn a_large_claim_on_the_enrolment_port_is_refused_behind_tls_too() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let before = warmed_up(&dev);
    let mut command = python(Place::Here, "hostile_https.py");
    let address = dev.endpoint("bootstrap");
    command.args([address.ip().to_string(), address.port().to_string()]);
    let said = run_command(Duration::from_secs(60), &mut command).ok();
    assert_eq!(said.last().map(String::as_str), Some("all refused"), "{said:?}");
    assert_flat(&dev, before);
}

/// What a port gets, with a name for the failure message, and whether we end our side after it: what may be
/// the beginning of something is cut off, what is wrong in itself must be closed without that.
fn attacks(port: &str, seed: u64) -> Vec<(String, Vec<u8>, bool)> {
    let mut rng = seed::rng(seed, u64::from(port.as_bytes()[0]));
    let mut all: Vec<(String, Vec<u8>, bool)> = Vec::new();
    for n in 0..40 {
        let mut noise = vec![0; rng.random_range(16..4096)];
        rng.fill_bytes(&mut noise);
        // A first byte that could begin a packet of each protocol, so that not all end at the door.
        match n % 4 {
            0 => noise[0] = 0x10,
            1 => noise[..4].copy_from_slice(b"PUB "),
            2 => noise[..4].copy_from_slice(b"GET "),
            _ => {}
        }
        all.push((format!("noise {n}"), noise, true));
    }
    let foreign: [(&str, &[u8]); 6] = [
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"),
        ("a TLS hello cut short", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n"),
        ("MQTT", &[0x10, 12, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, 0]),
        ("NATS", b"CONNECT {}\r\nPING\r\n"),
        ("zeros", &[0; 4096]),
    ];
    let own = match port {
        "mqtt" => "MQTT",
        "nats" => "NATS",
        _ => "",
    };
    all.extend(
        foreign
            .iter()
            .filter(|(name, _)| *name != own)
            .map(|(n, bytes)| ((*n).to_owned(), bytes.to_vec(), true)),
    );
    all.extend(claims(port).into_iter().map(|(name, bytes)| (name.to_owned(), bytes, false)));
    all
}

/// Valid beginnings that announce more than anybody may send, and some of it.
fn claims(port: &str) -> Vec<(&'static str, Vec<u8>)> {
    let filler = vec![b'x'; 2 << 20];
    match port {
        "mqtt" => {
            let largest = [0xff, 0xff, 0xff, 0x7f];
            vec![
                ("a CONNECT of 256 MiB", [&[0x10][..], &largest, &filler].concat()),
                ("a PUBLISH of 256 MiB", [&connect(4)[..], &[0x30], &largest, &filler].concat()),
                ("a SUBSCRIBE of 256 MiB", [&connect(5)[..], &[0x82], &largest, &filler].concat()),
                ("a length without end", [&connect(4)[..], &[0x30, 0xff, 0xff, 0xff, 0xff, 0xff]].concat()),
                ("a topic longer than its packet", [&connect(4)[..], &[0x30, 4, 0xff, 0xff, b'a', b'b']].concat()),
                ("a second CONNECT", [connect(4), connect(4)].concat()),
                ("QoS 3", [&connect(4)[..], &[0x36, 5, 0, 1, b'a', 0, 1]].concat()),
                ("a topic that is not UTF-8", [&connect(4)[..], &[0x30, 4, 0, 2, 0xc3, 0x28]].concat()),
                ("PUBLISH before CONNECT", mqtt::publish("a", b"x", 1, 1, false, false)),
                ("an empty SUBSCRIBE", [&connect(4)[..], &[0x82, 2, 0, 1]].concat()),
            ]
        }
        "nats" => {
            let hello = b"CONNECT {\"verbose\":false}\r\n";
            vec![
                ("a PUB of 1 GiB", [&hello[..], b"PUB a 1073741824\r\n", &filler].concat()),
                ("an HPUB of 1 GiB", [&hello[..], b"HPUB a 12 1073741824\r\n", &filler].concat()),
                ("an HPUB with more header than message", [&hello[..], b"HPUB a 100 10\r\n", &filler].concat()),
                ("a length that is no number", [&hello[..], b"PUB a 99999999999999999999999\r\n"].concat()),
                ("a negative length", [&hello[..], b"PUB a -1\r\n\r\n"].concat()),
                ("a line without end", [&hello[..], b"PUB ", &filler].concat()),
                ("a CONNECT without end", [&b"CONNECT {\"a\":\""[..], &filler].concat()),
                ("a payload without its end", [&hello[..], b"PUB a 2\r\nabcdef\r\n"].concat()),
            ]
        }
        "metrics" | "admin" => vec![
            ("a head without end", [&b"GET / HTTP/1.1\r\nX: "[..], &filler].concat()),
            ("headers without end", [&b"GET / HTTP/1.1\r\n"[..], &b"X: y\r\n".repeat(100_000)].concat()),
            (
                "a body of 1 GiB",
                [
                    &b"POST /v1/pub HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1073741824\r\n\r\n"[..],
                    &filler,
                ]
                .concat(),
            ),
        ],
        _ => vec![("a TLS record of 64 KiB", [&b"\x16\x03\x01\xff\xff"[..], &filler[..65_535]].concat())],
    }
}

/// CONNECT of a clean session, with a client id that the server chooses.
fn connect(version: u8) -> Vec<u8> {
    let mut bytes = vec![0x10, 12, 0, 4, b'M', b'Q', b'T', b'T', version, 2, 0, 0, 0, 0];
    if version == 5 {
        bytes.insert(12, 0);
        bytes[1] += 1;
    }
    bytes
}

trait Socket: Read + Write {
    fn prepare(&self, limit: Duration);
    fn end_of_ours(&self);
}

impl Socket for TcpStream {
    fn prepare(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).unwrap();
        self.set_write_timeout(Some(limit)).unwrap();
    }
    fn end_of_ours(&self) {
        drop(self.shutdown(std::net::Shutdown::Write));
    }
}

impl Socket for UnixStream {
    fn prepare(&self, limit: Duration) {
        self.set_read_timeout(Some(limit)).unwrap();
        self.set_write_timeout(Some(limit)).unwrap();
    }
    fn end_of_ours(&self) {
        drop(self.shutdown(std::net::Shutdown::Write));
    }
}

/// Sends, may end our side, and tells whether the other side ends within `limit`.
fn ends(stream: &mut impl Socket, bytes: &[u8], half_close: bool, limit: Duration) -> bool {
    stream.prepare(limit);
    let refused = stream.write_all(bytes).err();
    if let Some(error) = refused {
        let in_time = !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut);
        return in_time; // closed while we were still talking
    }
    if half_close {
        stream.end_of_ours();
    }
    let began = clock::now();
    let mut answer = [0; 16 << 10];
    while began.elapsed() < limit {
        match stream.read(&mut answer) {
            Ok(0) => return true,
            Ok(_said) => {}
            Err(error) => {
                return !matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                );
            }
        }
    }
    false
}

/// Sends `bytes`, then one byte a second; true if the connection is still open after `limit`.
fn outlives(address: SocketAddr, bytes: &[u8], limit: Duration) -> bool {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.prepare(Duration::from_secs(1));
    let began = clock::now();
    if stream.write_all(bytes).is_err() {
        return false;
    }
    let mut answer = [0; 4096];
    while began.elapsed() < limit {
        match stream.read(&mut answer) {
            Ok(0) => return false,
            Ok(_said) => {}
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                if !bytes.is_empty() && stream.write_all(b"x").is_err() {
                    return false;
                }
            }
            Err(_closed) => return false,
        }
    }
    true
}

/// Datagrams that are no QUIC, or almost.
fn datagrams(address: SocketAddr, seed: u64) {
    let mut rng = seed::rng(seed, 99);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for n in 0..4000 {
        let mut datagram = vec![0; rng.random_range(0..1500)];
        rng.fill_bytes(&mut datagram);
        if n % 2 == 0 && datagram.len() >= 1200 {
            // A long header of version 1, an Initial with connection ids of 8 bytes: noise from there on.
            datagram[..7].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8, 0xaa]);
            datagram[14] = 8;
        }
        drop(socket.send_to(&datagram, address));
    }
}

/// Memory once everything has been used a little.
fn warmed_up(dev: &Running) -> u64 {
    let mut client = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("warm")).unwrap();
    let payload = vec![b'x'; 1000];
    for n in 0..500 {
        client.publish_acked(&format!("warm/{n}"), &payload, false).unwrap();
    }
    procfs::resident_bytes(dev.process.pid())
}

fn assert_flat(dev: &Running, before: u64) {
    let after = procfs::resident_bytes(dev.process.pid());
    let grown = after.saturating_sub(before);
    assert!(grown < GROWTH, "resident memory grew by {} MiB from {} MiB", grown >> 20, before >> 20);
}

/// Ends the watchers, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Publishes and receives all the time on one connection; the longest wait.
fn watch_mqtt(dev: &Running, go_on: &AtomicBool) -> Duration {
    let mut client = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("watcher")).unwrap();
    client.subscribe("watch/mqtt", 1).unwrap();
    watch(go_on, |n| {
        client.write(&mqtt::publish("watch/mqtt", &n.to_be_bytes(), 1, 1, false, false)).unwrap();
        loop {
            match client.next_publish(Duration::from_secs(30)).unwrap() {
                mqtt::Packet::Publish { payload, .. } if payload == n.to_be_bytes() => return,
                _ => {}
            }
        }
    })
}

/// The same over NATS.
fn watch_nats(dev: &Running, go_on: &AtomicBool) -> Duration {
    let mut client = nats::Client::connect(dev.endpoint("nats")).unwrap();
    client.subscribe("watch.nats").unwrap();
    watch(go_on, |n| {
        client.publish("watch.nats", &n.to_be_bytes()).unwrap();
        assert_eq!(client.next(Duration::from_secs(30)).unwrap().payload, n.to_be_bytes());
    })
}

fn watch(go_on: &AtomicBool, mut exchange: impl FnMut(u32)) -> Duration {
    let mut worst = Duration::ZERO;
    let mut n = 0;
    while go_on.load(Ordering::Relaxed) {
        let began = clock::now();
        exchange(n);
        worst = worst.max(began.elapsed());
        n += 1;
        clock::pause(Duration::from_millis(20));
    }
    worst
}

#[test]
fn the_admin_socket_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dev.admin()), 0o600);
    assert_eq!(mode(&folder.path().join("data/hub")) & 0o077, 0, "the data folder holds keys");
    assert_eq!(mode(&folder.path().join("data/node")) & 0o077, 0, "the data folder holds keys");
}
