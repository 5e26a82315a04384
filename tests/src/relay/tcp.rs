//! A TCP relay that can be cut, stalled and slow.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use socket2::{Domain, SockRef, Socket, Type};

use super::Line;
use crate::clock;

/// Forwards connections to one target. Dropping it closes them.
#[derive(Debug)]
pub struct TcpRelay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    refusing: AtomicBool,
    stalled: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    line: Option<(Line, Duration)>,
}

impl TcpRelay {
    /// Listens on a free port of the loopback interface.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        Self::over(target, None)
    }

    /// With a slow line in each direction, and this delay one way. What waits before the line waits in the
    /// receive buffer of the relay's socket.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn slow(target: SocketAddr, line: Line, delay: Duration) -> Self {
        Self::over(target, Some((line, delay)))
    }

    fn over(target: SocketAddr, line: Option<(Line, Duration)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        if let Some((line, _)) = line {
            before(&listener, line).expect("a listener's options");
        }
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared { line, ..Shared::default() });
        let relay = Self { address, shared: Arc::clone(&shared) };
        std::thread::spawn(move || accept(&listener, target, &shared));
        relay
    }

    /// Where clients connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes every connection; new ones are accepted unless [`refuse`](Self::refuse) says otherwise.
    ///
    /// # Panics
    /// If a thread of the relay panicked.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().expect("no panic under this lock").drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }

    /// From now on closes new connections at once, or no longer.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, Ordering::Relaxed);
    }

    /// From now on forwards nothing while connections stay open, or forwards again.
    pub fn stall(&self, stall: bool) {
        self.shared.stalled.store(stall, Ordering::Relaxed);
    }
}

impl Drop for TcpRelay {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.cut();
        drop(TcpStream::connect(self.address)); // wakes the accepting thread
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    while let Ok((client, _from)) = listener.accept() {
        if shared.stopped.load(Ordering::Relaxed) {
            return;
        }
        if shared.refusing.load(Ordering::Relaxed) {
            continue;
        }
        let Ok(server) = connect(target, shared.line) else { continue };
        let (Ok(client_reader), Ok(server_reader)) = (client.try_clone(), server.try_clone()) else {
            continue;
        };
        let mut open = shared.open.lock().expect("no panic under this lock");
        open.extend([client.try_clone(), server.try_clone()].into_iter().flatten());
        drop(open);
        for (from, to) in [(client_reader, server), (server_reader, client)] {
            let shared = Arc::clone(shared);
            std::thread::spawn(move || match shared.line {
                None => drop(pump(from, to, &shared)),
                Some((line, delay)) => drop(pump_slowly(from, to, line, delay, &shared)),
            });
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    to.set_nodelay(true)?;
    loop {
        let n = from.read(&mut buffer)?;
        while shared.stalled.load(Ordering::Relaxed) && !shared.stopped.load(Ordering::Relaxed) {
            clock::pause(Duration::from_millis(5));
        }
        if n == 0 {
            return to.shutdown(Shutdown::Write);
        }
        to.write_all(&buffer[..n])?;
    }
}

/// Ethernet's; loopback's own would let a segment be a second long.
const SEGMENT: u32 = 1448;

/// What has to be said of a socket before it has a connection.
fn before(socket: &impl std::os::fd::AsFd, line: Line) -> io::Result<()> {
    let socket = SockRef::from(socket);
    // The kernel doubles it for its own bookkeeping and gives half of that as window.
    socket.set_recv_buffer_size(line.queue)?;
    socket.set_tcp_mss(SEGMENT)
}

fn connect(target: SocketAddr, line: Option<(Line, Duration)>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    if let Some((line, _)) = line {
        before(&socket, line)?;
    }
    socket.connect_timeout(&target.into(), Duration::from_secs(2))?;
    Ok(socket.into())
}

/// Takes what the line carries, when it carries it, and gives it on after the delay.
fn pump_slowly(
    mut from: TcpStream,
    mut to: TcpStream,
    line: Line,
    delay: Duration,
    shared: &Shared,
) -> io::Result<()> {
    // What is on its way: the line's rate times the delay.
    let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
    to.set_nodelay(true)?;
    std::thread::spawn(move || {
        for (at, bytes) in receiver {
            clock::pause(at.saturating_duration_since(clock::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        drop(to.shutdown(Shutdown::Write));
    });
    let mut buffer = [0; SEGMENT as usize];
    let mut free_at = clock::now();
    while !shared.stopped.load(Ordering::Relaxed) {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        free_at = free_at.max(clock::now()) + line.time(n);
        clock::pause(free_at.saturating_duration_since(clock::now()));
        if sender.send((free_at + delay, buffer[..n].to_vec())).is_err() {
            break;
        }
    }
    Ok(())
}
