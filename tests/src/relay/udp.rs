//! A UDP relay: one bad path between clients and a server, every choice from a seed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{Rng, rngs::SmallRng};

use super::Line;
use crate::{clock, seed};

/// How bad the path is. Probabilities are per datagram and direction.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Nothing passes.
    pub cut: bool,
    /// Probability of a loss.
    pub loss: f64,
    /// Probability of a second copy.
    pub duplicate: f64,
    /// Probability of up to 30 ms more, so that later datagrams overtake.
    pub reorder: f64,
    /// One way.
    pub delay: Duration,
    /// How much passes in each direction.
    pub line: Option<Line>,
}

/// Forwards datagrams to one target. Dropping it closes its sockets.
#[derive(Debug)]
pub struct UdpRelay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    front: UdpSocket,
    target: SocketAddr,
    stopped: AtomicBool,
    passed: AtomicU64,
    path: Mutex<Path>,
    due: Condvar,
}

#[derive(Debug)]
struct Path {
    faults: Faults,
    rng: SmallRng,
    /// Sockets towards the target, one for each client.
    upstream: BTreeMap<SocketAddr, Arc<UdpSocket>>,
    /// Raised by a rebind: threads of older sockets end.
    generation: u64,
    waiting: BinaryHeap<Reverse<Datagram>>,
    number: u64,
    /// When each direction's line is free again: to the target, to the client.
    free_at: [Instant; 2],
}

#[derive(Debug)]
struct Datagram {
    at: Instant,
    number: u64,
    /// `None`: to the target, through the socket of `client`.
    to_client: bool,
    client: SocketAddr,
    bytes: Vec<u8>,
}

const POLL: Duration = Duration::from_millis(50);

impl UdpRelay {
    /// Listens on a free port of the loopback interface.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(target: SocketAddr, seed: u64) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        front.set_read_timeout(Some(POLL)).expect("not zero");
        let address = front.local_addr().expect("bound");
        let path = Path {
            faults: Faults::default(),
            rng: seed::rng(seed, 0x0de1a7),
            upstream: BTreeMap::new(),
            generation: 0,
            waiting: BinaryHeap::new(),
            number: 0,
            free_at: [clock::now(); 2],
        };
        let shared = Arc::new(Shared {
            front,
            target,
            stopped: AtomicBool::new(false),
            passed: AtomicU64::new(0),
            path: Mutex::new(path),
            due: Condvar::new(),
        });
        let (receiver, sender) = (Arc::clone(&shared), Arc::clone(&shared));
        std::thread::spawn(move || receiver.receive());
        std::thread::spawn(move || sender.send_waiting());
        Self { address, shared }
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the path.
    pub fn set(&self, faults: Faults) {
        self.shared.path().faults = faults;
    }

    /// As a NAT that forgot: the target sees every client come from a new port.
    pub fn rebind(&self) {
        let mut path = self.shared.path();
        path.upstream.clear();
        path.generation += 1;
    }

    /// Datagrams let through so far, both ways.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Relaxed)
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.shared.due.notify_all();
    }
}

impl Shared {
    fn path(&self) -> MutexGuard<'_, Path> {
        self.path.lock().expect("no panic under this lock")
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn receive(self: &Arc<Self>) {
        let mut buffer = vec![0; 65_536];
        while !self.stopped() {
            let Ok((n, client)) = self.front.recv_from(&mut buffer) else { continue };
            self.connect(client);
            self.take(false, client, &buffer[..n]);
        }
    }

    /// Makes sure that there is a socket towards the target for this client.
    fn connect(self: &Arc<Self>, client: SocketAddr) {
        let mut path = self.path();
        if path.upstream.contains_key(&client) {
            return;
        }
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").expect("a free port"));
        socket.connect(self.target).expect("connecting a datagram socket does nothing");
        socket.set_read_timeout(Some(POLL)).expect("not zero");
        path.upstream.insert(client, Arc::clone(&socket));
        let generation = path.generation;
        drop(path);
        let shared = Arc::clone(self);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !shared.stopped() && shared.path().generation == generation {
                // Refused: the target is not there at the moment.
                if let Ok(n) = socket.recv(&mut buffer) {
                    shared.take(true, client, &buffer[..n]);
                }
            }
        });
    }

    /// Decides what becomes of a datagram.
    fn take(&self, to_client: bool, client: SocketAddr, bytes: &[u8]) {
        let mut path = self.path();
        let Faults { cut, loss, duplicate, reorder, delay, line } = path.faults;
        if cut || path.rng.random_bool(loss) {
            return;
        }
        let copies = 1 + u32::from(path.rng.random_bool(duplicate));
        for _copy in 0..copies {
            let extra = if path.rng.random_bool(reorder) { path.rng.random_range(0..30) } else { 0 };
            let now = clock::now();
            let mut sent = now;
            if let Some(line) = line {
                let free_at = &mut path.free_at[usize::from(to_client)];
                let Some(last_byte) = line.carry(now, *free_at, bytes.len()) else { continue };
                (*free_at, sent) = (last_byte, last_byte);
            }
            let at = sent + delay + Duration::from_millis(extra);
            path.number += 1;
            let datagram = Datagram { at, number: path.number, to_client, client, bytes: bytes.to_vec() };
            if at <= now {
                self.send(&path, &datagram);
            } else {
                path.waiting.push(Reverse(datagram));
                self.due.notify_one();
            }
        }
    }

    fn send_waiting(&self) {
        let mut path = self.path();
        while !self.stopped() {
            let now = clock::now();
            let wait = match path.waiting.peek() {
                Some(Reverse(first)) if first.at <= now => {
                    let Reverse(datagram) = path.waiting.pop().expect("just seen");
                    if !path.faults.cut {
                        self.send(&path, &datagram);
                    }
                    continue;
                }
                Some(Reverse(first)) => first.at - now,
                None => POLL,
            };
            path = self.due.wait_timeout(path, wait).expect("no panic under this lock").0;
        }
    }

    fn send(&self, path: &Path, datagram: &Datagram) {
        self.passed.fetch_add(1, Ordering::Relaxed);
        // A datagram that cannot be sent is a lost datagram.
        let _lost = if datagram.to_client {
            self.front.send_to(&datagram.bytes, datagram.client).ok()
        } else {
            path.upstream.get(&datagram.client).and_then(|socket| socket.send(&datagram.bytes).ok())
        };
    }
}

impl PartialEq for Datagram {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Datagram {}

impl PartialOrd for Datagram {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Datagram {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}
