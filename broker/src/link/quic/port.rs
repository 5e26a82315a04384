//! One UDP socket, all connections on it, and the one worker that serves them.
//!
//! The worker is a future: on a node it runs beside everything else, on a hub each has a thread
//! ([`Tasks::spawn_thread`](crate::Tasks::spawn_thread)). A turn of it is: receive what has come, look at the connections whose
//! time has come, send what those and all that were queued have to send. A turn is bounded in datagrams and in
//! connections, and a connection in what it sends in one turn; who has more waits behind the others.
//!
//! # Invariants
//! - Locks are taken in this order: port, connection, list of queued connections. None is held while a waiter is
//!   woken, and none over an await.
//! - A connection is in the table from its first packet to its last; handles keep what users may ask for.
//! - There is one buffer for what is sent and one for what is received, for all connections. What the socket
//!   did not take stays in the buffer and nothing is sent before it.
//! - When the worker ends, all its connections have ended.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    ConnectError, ConnectionError, ConnectionHandle, DatagramEvent, EcnCodepoint, Endpoint, EndpointConfig,
    Incoming, ServerConfig, Transmit, VarInt,
};
use tokio::{
    sync::Notify,
    time::{Sleep, sleep_until},
};

use super::{
    connection::{Cell, Connection},
    socket::{Datagram, ReceiveBuffer, Socket},
    steer::Place,
    timers::{Armed, Tick, Timers},
};

/// What a port's users and its worker share.
pub(super) struct Shared {
    socket: Socket,
    state: Mutex<State>,
    queued: Mutex<Queued>,
    /// Users of the port itself.
    users: AtomicUsize,
    /// Somebody dials.
    incoming: Notify,
    /// The last connection has gone.
    idle: Notify,
    /// Among the ports of its address.
    place: Option<Place>,
}

/// Connections that the worker shall look at.
#[derive(Default)]
struct Queued {
    keys: Vec<u32>,
    /// What came to another port of the group.
    datagrams: Vec<Forwarded>,
    forwarded_bytes: usize,
    /// Present while the worker has not been told.
    worker: Option<Waker>,
}

/// A datagram from another port of the group.
struct Forwarded {
    from: SocketAddr,
    to: Option<IpAddr>,
    ecn: Option<EcnCodepoint>,
    bytes: BytesMut,
}

/// Under the port's lock.
struct State {
    endpoint: Endpoint,
    slots: Vec<Option<Slot>>,
    connections: usize,
    incoming: VecDeque<Incoming>,
    timers: Timers,
    /// To look at in this turn.
    due: VecDeque<u32>,
    began: Instant,
    closing: Option<(VarInt, Bytes)>,
    /// The worker has gone.
    lost: bool,
    response: Vec<u8>,
}

/// A connection and its deadlines.
struct Slot {
    cell: Arc<Cell>,
    armed: Armed,
}

/// A port. When the last handle is dropped and its connections have ended, its worker ends.
pub(super) struct Port(Arc<Shared>);

/// Calls of the kernel for datagrams in one turn.
const RECEIVES_MAX: usize = 4;
/// A turn receives no more after this long: handshakes are dear.
const RECEIVING_MAX: Duration = Duration::from_millis(1);
/// Deadlines looked at in one turn.
const EXPIRED_MAX: usize = 256;
/// Connections that send in one turn.
const SENDERS_MAX: usize = 512;
/// Datagrams of one connection in one turn.
const SENDS_MAX: usize = 20;
/// Bytes of datagrams that wait for a port after another has taken them: more are lost, as by a full socket.
const FORWARDED_MAX: usize = 2 << 20;

/// As the protocol takes it.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Port {
    /// A port, and its worker, which has to run. `messages`: how much the worker receives at once.
    pub(super) fn new(
        socket: std::net::UdpSocket,
        config: EndpointConfig,
        server: Option<ServerConfig>,
        messages: usize,
    ) -> io::Result<(Self, Worker)> {
        Self::in_group(socket, config, server, messages, None)
    }

    /// As [`new`](Self::new), of several at one address.
    pub(super) fn in_group(
        socket: std::net::UdpSocket,
        config: EndpointConfig,
        server: Option<ServerConfig>,
        messages: usize,
        place: Option<Place>,
    ) -> io::Result<(Self, Worker)> {
        let socket = Socket::new(socket)?;
        let (server, may_probe) = (server.map(Arc::new), !socket.may_fragment());
        let state = State {
            endpoint: Endpoint::new(Arc::new(config), server, may_probe, None),
            slots: Vec::new(),
            connections: 0,
            incoming: VecDeque::new(),
            timers: Timers::default(),
            due: VecDeque::new(),
            began: now(),
            closing: None,
            lost: false,
            response: Vec::new(),
        };
        let shared = Arc::new(Shared {
            socket,
            state: Mutex::new(state),
            queued: Mutex::default(),
            users: AtomicUsize::new(1),
            incoming: Notify::new(),
            idle: Notify::new(),
            place,
        });
        if let Some(place) = &shared.place {
            place.take(&shared);
        }
        let worker = Worker {
            port: Arc::clone(&shared),
            received: ReceiveBuffer::new(messages),
            sending: Vec::new(),
            unsent: None,
            woken: Vec::new(),
            forwarded: Vec::new(),
            timer: None,
        };
        Ok((Self(shared), worker))
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.socket.local_addr()
    }

    /// Begins a connection.
    pub(super) fn connect(
        &self,
        config: quinn_proto::ClientConfig,
        to: SocketAddr,
        name: &str,
    ) -> Result<Connection, ConnectError> {
        let mut state = self.0.lock();
        if state.lost || state.closing.is_some() {
            return Err(ConnectError::EndpointStopping);
        }
        let (key, proto) = state.endpoint.connect(now(), config, to, name)?;
        Ok(state.insert(&self.0, key, proto))
    }

    /// The next peer that dials; `None` when the port has closed. Cancel safe.
    pub(super) async fn incoming(&self) -> Option<Dialled> {
        loop {
            let mut changed = std::pin::pin!(self.0.incoming.notified());
            changed.as_mut().enable();
            {
                let mut state = self.0.lock();
                if state.lost || state.closing.is_some() {
                    return None;
                }
                if let Some(incoming) = state.incoming.pop_front() {
                    return Some(Dialled { port: self.clone(), incoming: Some(incoming) });
                }
            }
            changed.await;
        }
    }

    /// Closes all connections, and those that come.
    pub(super) fn close(&self, code: VarInt, reason: &'static [u8]) {
        let mut woken = Vec::new();
        {
            let mut guard = self.0.lock();
            let state = &mut *guard;
            state.closing = Some((code, Bytes::from_static(reason)));
            for (key, slot) in state.slots.iter().enumerate() {
                let Some(slot) = slot else { continue };
                slot.cell.lock().close(code, Bytes::from_static(reason), &mut woken);
                state.due.push_back(u32::try_from(key).expect("few"));
            }
            while let Some(incoming) = state.incoming.pop_front() {
                state.refuse(&self.0.socket, incoming);
            }
        }
        woken.into_iter().for_each(Waker::wake);
        self.0.incoming.notify_waiters();
        self.0.wake();
    }

    /// Waits until no connection is left.
    pub(super) async fn idle(&self) {
        loop {
            let mut idle = std::pin::pin!(self.0.idle.notified());
            idle.as_mut().enable();
            {
                let state = self.0.lock();
                if state.connections == 0 || state.lost {
                    return;
                }
            }
            idle.await;
        }
    }
}

impl Clone for Port {
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.wake();
        }
    }
}

/// First packets of a peer; nothing was spent on it yet. Dropped, it is refused.
pub(super) struct Dialled {
    port: Port,
    incoming: Option<Incoming>,
}

impl Dialled {
    pub(super) fn remote(&self) -> SocketAddr {
        self.incoming.as_ref().expect("taken at its end only").remote_address()
    }

    /// The peer has shown that it is where it says.
    pub(super) fn is_proved(&self) -> bool {
        self.incoming.as_ref().expect("taken at its end only").remote_address_validated()
    }

    /// Has the peer come again with proof. Keeps nothing of it.
    pub(super) fn retry(mut self) {
        let incoming = self.incoming.take().expect("taken at its end only");
        let shared = &self.port.0;
        let mut guard = shared.lock();
        let state = &mut *guard;
        state.response.clear();
        match state.endpoint.retry(incoming, &mut state.response) {
            Ok(transmit) => state.respond(&shared.socket, &transmit),
            Err(again) => state.refuse(&shared.socket, again.into_incoming()),
        }
    }

    /// Begins the handshake.
    pub(super) fn accept(mut self) -> Result<Connection, ConnectionError> {
        let incoming = self.incoming.take().expect("taken at its end only");
        let shared = &self.port.0;
        let mut guard = shared.lock();
        let state = &mut *guard;
        state.response.clear();
        match state.endpoint.accept(incoming, now(), &mut state.response, None) {
            Ok((key, proto)) => Ok(state.insert(shared, key, proto)),
            Err(error) => {
                if let Some(transmit) = error.response {
                    state.respond(&shared.socket, &transmit);
                }
                Err(error.cause)
            }
        }
    }
}

impl Drop for Dialled {
    fn drop(&mut self) {
        if let Some(incoming) = self.incoming.take() {
            self.port.0.lock().refuse(&self.port.0.socket, incoming);
        }
    }
}

impl Shared {
    /// Also after a panic: then the worker has gone, and all that is asked is how things ended.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection has something to send. Called under its lock, once until the worker has looked at it.
    pub(super) fn queue(&self, key: ConnectionHandle) {
        let worker = {
            let mut queued = self.queued.lock().expect("no panic under this lock");
            queued.keys.push(u32::try_from(key.0).expect("few"));
            queued.worker.take()
        };
        if let Some(worker) = worker {
            worker.wake();
        }
    }

    /// Takes a datagram that came to another port.
    fn take_over(&self, datagram: Datagram<'_>) {
        let Datagram { from, to, ecn, bytes } = datagram;
        let worker = {
            let mut queued = self.queued.lock().expect("no panic under this lock");
            if queued.forwarded_bytes + bytes.len() > FORWARDED_MAX {
                return;
            }
            queued.forwarded_bytes += bytes.len();
            queued.datagrams.push(Forwarded { from, to, ecn, bytes: bytes.into() });
            queued.worker.take()
        };
        if let Some(worker) = worker {
            worker.wake();
        }
    }

    fn wake(&self) {
        let worker = self.queued.lock().expect("no panic under this lock").worker.take();
        if let Some(worker) = worker {
            worker.wake();
        }
    }
}

impl State {
    fn insert(
        &mut self,
        shared: &Arc<Shared>,
        key: ConnectionHandle,
        proto: quinn_proto::Connection,
    ) -> Connection {
        let (cell, connection) = Cell::new(Arc::clone(shared), key, proto);
        cell.lock().queued = true;
        if self.slots.len() <= key.0 {
            self.slots.resize_with(key.0 + 1, || None);
        }
        self.slots[key.0] = Some(Slot { cell, armed: Armed::default() });
        self.connections += 1;
        shared.queue(key);
        connection
    }

    fn refuse(&mut self, socket: &Socket, incoming: Incoming) {
        self.response.clear();
        let transmit = self.endpoint.refuse(incoming, &mut self.response);
        self.respond(socket, &transmit);
    }

    /// Sends what is in `response`. A full socket loses it: the peer will ask again.
    fn respond(&self, socket: &Socket, transmit: &Transmit) {
        if let Err(error) = socket.try_send(transmit, &self.response) {
            tracing::debug!(%error, "an answer without a connection was not sent");
        }
    }

    fn tick(&self, at: Instant) -> Tick {
        let since = at.saturating_duration_since(self.began);
        // Rounded up: not before its time.
        Tick::try_from(since.as_nanos().div_ceil(1000)).unwrap_or(Tick::MAX)
    }

    fn receive(&mut self, shared: &Shared, now: Instant, datagram: Datagram<'_>) {
        if let Some(owner) = shared.place.as_ref().and_then(|place| place.other_owner(datagram.bytes)) {
            return owner.take_over(datagram);
        }
        let Datagram { from, to, ecn, bytes } = datagram;
        self.handle(shared, now, Forwarded { from, to, ecn, bytes: bytes.into() });
    }

    fn handle(&mut self, shared: &Shared, now: Instant, datagram: Forwarded) {
        let Forwarded { from, to, ecn, bytes } = datagram;
        self.response.clear();
        let event = self.endpoint.handle(now, from, to, ecn, bytes, &mut self.response);
        match event {
            Some(DatagramEvent::ConnectionEvent(key, event)) => {
                let Some(Some(slot)) = self.slots.get(key.0) else { return };
                let mut connection = slot.cell.lock();
                connection.proto.handle_event(event);
                if !std::mem::replace(&mut connection.queued, true) {
                    self.due.push_back(u32::try_from(key.0).expect("few"));
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) if self.closing.is_some() => {
                self.refuse(&shared.socket, incoming);
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                self.incoming.push_back(incoming);
                shared.incoming.notify_one();
            }
            Some(DatagramEvent::Response(transmit)) => self.respond(&shared.socket, &transmit),
            None => {}
        }
    }

    /// Queues the connections whose time has come.
    fn expire(&mut self, now: Tick) {
        for _ in 0..EXPIRED_MAX {
            let Some((at, key)) = self.timers.pop(now) else { return };
            let Some(Some(slot)) = self.slots.get_mut(key as usize) else { continue };
            if slot.armed.is_due(at) && !std::mem::replace(&mut slot.cell.lock().queued, true) {
                self.due.push_back(key);
            }
        }
    }

    /// Forgets a connection whose last packet was sent.
    fn remove(&mut self, shared: &Shared, key: u32) {
        if self.slots.get_mut(key as usize).and_then(Option::take).is_some() {
            self.connections -= 1;
            if self.connections == 0 {
                shared.idle.notify_waiters();
            }
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        while let Some(incoming) = self.incoming.pop_front() {
            self.endpoint.ignore(incoming);
        }
    }
}

/// Serves a port until nobody uses it and its connections have ended. Dropping it ends them.
#[must_use = "without its worker a port does nothing"]
pub(super) struct Worker {
    port: Arc<Shared>,
    received: ReceiveBuffer,
    sending: Vec<u8>,
    /// What is in `sending` and was not taken by the socket.
    unsent: Option<Transmit>,
    woken: Vec<Waker>,
    forwarded: Vec<Forwarded>,
    /// When to look at the timers next.
    timer: Option<(Tick, Pin<Box<Sleep>>)>,
}

impl Future for Worker {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let port = Arc::clone(&this.port);
        let mut guard = port.lock();
        let state = &mut *guard;
        let more = this.receive(cx, state)?;
        state.expire(state.tick(now()));
        {
            let mut queued = port.queued.lock().expect("no panic under this lock");
            if !queued.worker.as_ref().is_some_and(|worker| worker.will_wake(cx.waker())) {
                queued.worker = Some(cx.waker().clone());
            }
            state.due.extend(queued.keys.drain(..));
            queued.forwarded_bytes = 0;
            std::mem::swap(&mut this.forwarded, &mut queued.datagrams);
        }
        let at = now();
        this.forwarded.drain(..).for_each(|datagram| state.handle(&port, at, datagram));
        this.send(cx, state)?;
        let more = more || (this.unsent.is_none() && !state.due.is_empty());
        let done =
            state.connections == 0 && state.incoming.is_empty() && port.users.load(Ordering::Acquire) == 0;
        let next = state.timers.next().filter(|_| !done);
        let began = state.began;
        drop(guard);
        this.woken.drain(..).for_each(Waker::wake);
        if done {
            return Poll::Ready(Ok(()));
        }
        if more || this.is_time(cx, began, next) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Worker {
    /// True if there may be more.
    fn receive(&mut self, cx: &mut Context<'_>, state: &mut State) -> io::Result<bool> {
        let (port, mut at) = (&*self.port, now());
        let until = at + RECEIVING_MAX;
        for _ in 0..RECEIVES_MAX {
            let received =
                port.socket.poll_recv(cx, &mut self.received, |datagram| state.receive(port, at, datagram));
            match received {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(false),
            }
            at = now();
            if at >= until {
                break;
            }
        }
        Ok(true)
    }

    /// Lets every connection that is due send, as far as the socket takes it.
    fn send(&mut self, cx: &mut Context<'_>, state: &mut State) -> io::Result<()> {
        if let Some(transmit) = self.unsent.take()
            && !self.try_send(cx, transmit)?
        {
            return Ok(());
        }
        for _ in 0..SENDERS_MAX.min(state.due.len()) {
            let Some(key) = state.due.pop_front() else { break };
            if !self.serve(cx, state, key)? {
                break;
            }
        }
        Ok(())
    }

    /// False: the socket is full.
    fn try_send(&mut self, cx: &mut Context<'_>, transmit: Transmit) -> io::Result<bool> {
        loop {
            match self.port.socket.try_send(&transmit, &self.sending) {
                Ok(()) => return Ok(true),
                Err(_would_block) => match self.port.socket.poll_writable(cx) {
                    Poll::Ready(writable) => writable?,
                    Poll::Pending => {
                        self.unsent = Some(transmit);
                        return Ok(false);
                    }
                },
            }
        }
    }

    /// Everything that one connection has: packets, deadlines, news for the table and for its users. False: the
    /// socket is full.
    fn serve(&mut self, cx: &mut Context<'_>, state: &mut State, key: u32) -> io::Result<bool> {
        let Some(Some(slot)) = state.slots.get(key as usize) else { return Ok(true) };
        let cell = Arc::clone(&slot.cell);
        let handle = ConnectionHandle(key as usize);
        let segments = self.port.socket.segments_max();
        let mut connection = cell.lock();
        connection.queued = false;
        let (mut room, mut sent, mut drained) = (true, 0, false);
        loop {
            let at = now();
            while room && sent < SENDS_MAX {
                self.sending.clear();
                let Some(transmit) = connection.proto.poll_transmit(at, segments, &mut self.sending) else {
                    break;
                };
                sent += transmit.segment_size.map_or(1, |segment| transmit.size.div_ceil(segment));
                room = self.try_send(cx, transmit)?;
            }
            let deadline = connection.proto.poll_timeout();
            let expired = deadline.is_some_and(|deadline| deadline <= at);
            if expired {
                connection.proto.handle_timeout(at);
            }
            let mut again = expired && room;
            while let Some(event) = connection.proto.poll_endpoint_events() {
                drained |= event.is_drained();
                if let Some(event) = state.endpoint.handle_event(handle, event) {
                    connection.proto.handle_event(event);
                    again = room;
                }
            }
            connection.forward(&mut self.woken);
            if again && sent < SENDS_MAX {
                continue;
            }
            if (again || expired || sent >= SENDS_MAX || !room) && !drained {
                connection.queued = true;
                state.due.push_back(key);
            } else if let Some(deadline) = deadline {
                let deadline = state.tick(deadline);
                if let Some(Some(slot)) = state.slots.get_mut(key as usize) {
                    state.timers.arm(key, &mut slot.armed, deadline);
                }
            }
            break;
        }
        if drained {
            connection.detach(&mut self.woken);
            drop(connection);
            state.remove(&self.port, key);
        }
        Ok(room)
    }

    /// Sleeps until `next`; true if that is now.
    fn is_time(&mut self, cx: &mut Context<'_>, began: Instant, next: Option<Tick>) -> bool {
        let Some(next) = next else { return false };
        let at = tokio::time::Instant::from_std(began + Duration::from_micros(next));
        match &mut self.timer {
            // An earlier look finds nothing and costs little; moving the timer costs more.
            Some((armed, _)) if *armed <= next => {}
            Some((armed, sleep)) => {
                *armed = next;
                sleep.as_mut().reset(at);
            }
            None => self.timer = Some((next, Box::pin(sleep_until(at)))),
        }
        let Some((armed, sleep)) = &mut self.timer else { return false };
        if sleep.as_mut().poll(cx).is_pending() {
            return false;
        }
        *armed = Tick::MAX;
        true
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let port = Arc::clone(&self.port);
        let mut state = port.lock();
        state.lost = true;
        for slot in std::mem::take(&mut state.slots).into_iter().flatten() {
            slot.cell.lock().abandon(&mut self.woken);
        }
        state.connections = 0;
        drop(state);
        self.woken.drain(..).for_each(Waker::wake);
        port.incoming.notify_waiters();
        port.incoming.notify_one();
        port.idle.notify_waiters();
    }
}
