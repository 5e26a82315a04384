//! A TCP relay that can be cut and stalled.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

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
}

impl TcpRelay {
    /// Listens on a free port of the loopback interface.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn new(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared::default());
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
        let Ok(server) = TcpStream::connect_timeout(&target, Duration::from_secs(2)) else { continue };
        let (Ok(client_reader), Ok(server_reader)) = (client.try_clone(), server.try_clone()) else {
            continue;
        };
        let mut open = shared.open.lock().expect("no panic under this lock");
        open.extend([client.try_clone(), server.try_clone()].into_iter().flatten());
        drop(open);
        for (from, to) in [(client_reader, server), (server_reader, client)] {
            let shared = Arc::clone(shared);
            std::thread::spawn(move || drop(pump(from, to, &shared)));
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
