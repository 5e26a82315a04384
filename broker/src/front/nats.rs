//! The NATS client protocol: any NATS client works, with nothing installed.
//!
//! What a subject means depends on where the front stands ([`Side`]): on a node subjects are the node's own
//! topics, the same that MQTT clients use; on a hub `octobus.up.<n>.>` is what nodes send, `octobus.down.<n>.>`
//! what they are sent, and everything else is the tier's own Live topics (`nats/subject.rs` has the table).
//!
//! ```text
//! socket -> parser -> session -> events to the core
//! socket <- egress <- session <- outputs of the core
//! ```
//!
//! One task serves one connection (`connection`); everything that can be wrong with a peer is decided in
//! `session`, which does no I/O.
//!
//! # Durability
//! NATS publishes are Live, with two exceptions. A publish to `octobus.down.<n>.` without a reply subject enters
//! the Log towards the node, with one it is a Live request. On a node, the header `Octobus-QoS: 1` appends the
//! message to the node's Log; its reply subject, if any, is not forwarded, since what is durable is no request.
//! A refused publish is told as `-ERR 'Permissions Violation for Publish: <reason>'`: the only error that client
//! libraries take as news about one message instead of the end of the connection.
//!
//! # Not as in nats-server
//! - A wildcard in the first token does not match `_INBOX.`, and a user cannot subscribe to inboxes of others.
//! - A token that contains `*` or `>` besides other characters is not a literal: it is refused.
//! - Subjects are spelled in one way each; a needless `%41` is refused.
//! - There is no JetStream: a request to `$JS.API.` has no responders.

use std::{
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{Handle, Tasks, clock, front::auth::Auth, limits};

use self::{
    connection::Connection,
    reply::{Fatal, Info},
};

mod connection;
mod egress;
mod header;
mod message;
mod parser;
mod reply;
mod session;
mod subject;
mod subscriptions;

/// Where a front stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// At an edge node's broker.
    Node,
    /// At a hub's.
    Hub,
}

/// How a front behaves.
#[derive(Debug)]
pub struct Config {
    /// Where it stands.
    pub side: Side,
    /// What it calls itself to clients.
    pub server_name: String,
    /// Tells clients one start of a server from another.
    pub server_id: String,
    /// Largest message, headers included, in bytes. What a frame cannot hold is not offered.
    pub max_payload: usize,
    /// Clients at a time; one more is told so and closed.
    pub max_connections: usize,
    /// Who may connect, and what they may do then.
    pub auth: Auth,
    /// Time to say who it is.
    pub connect_timeout: Duration,
    /// A client that says nothing for so long is pinged; after two pings without an answer it is closed.
    pub ping_interval: Duration,
    /// A client that takes no byte of what waits for it for so long is closed.
    pub write_timeout: Duration,
    /// Whether the wall clock is known to be right; messages carry it.
    pub time_trusted: Arc<AtomicBool>,
    /// What happened so far.
    pub counters: Arc<Counters>,
}

impl Config {
    /// The defaults: payloads of 1 MiB, 65 536 clients, nats-server's times.
    #[must_use]
    pub fn new(side: Side, server_name: impl Into<String>, auth: Auth) -> Self {
        Self {
            side,
            server_name: server_name.into(),
            server_id: format!("OCTOBUS{:014X}P{:X}", clock::wall_us(), std::process::id()),
            max_payload: limits::MQTT_PACKET_MAX,
            max_connections: 65_536,
            auth,
            connect_timeout: Duration::from_secs(10),
            ping_interval: Duration::from_secs(120),
            write_timeout: Duration::from_secs(10),
            time_trusted: Arc::default(),
            counters: Arc::default(),
        }
    }

    /// A frame holds a topic and the encoding of headers besides the payload.
    fn payload_max(&self) -> usize {
        const BESIDES: usize = 32 << 10;
        self.max_payload.min(limits::FRAME_MAX - BESIDES)
    }
}

/// What happened at a front, for metrics. All but `connections` only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Clients connected now.
    pub connections: AtomicU64,
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections refused because there were too many.
    pub refused: AtomicU64,
    /// Accepting failed: no file descriptors, for example.
    pub accept_errors: AtomicU64,
    /// Clients with wrong or missing credentials.
    pub auth_failures: AtomicU64,
    /// Messages published by clients, refused ones included.
    pub messages_in: AtomicU64,
    /// Their headers and payloads, in bytes.
    pub bytes_in: AtomicU64,
    /// Messages written to clients.
    pub messages_out: AtomicU64,
    /// Their headers and payloads, in bytes.
    pub bytes_out: AtomicU64,
    /// Errors told to clients that stayed connected: permissions, invalid subjects.
    pub complaints: AtomicU64,
    /// Connections that this side closed with an error.
    pub closed_for_cause: AtomicU64,
    /// Connections closed because the client did not read.
    pub slow_consumers: AtomicU64,
}

/// Accepts clients until the tasks are asked to stop. Failures to accept are waited out, never fatal.
pub async fn serve(listener: TcpListener, config: Arc<Config>, broker: Handle, tasks: Tasks) {
    let slots = Arc::new(Semaphore::new(config.max_connections.min(Semaphore::MAX_PERMITS)));
    let stop = tasks.stopped();
    let mut failing = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                failing = false;
                config.counters.accepted.fetch_add(1, Ordering::Relaxed);
                match Arc::clone(&slots).try_acquire_owned() {
                    Ok(permit) => {
                        let slot = Slot::new(permit, Arc::clone(&config.counters));
                        start(stream, peer, &config, &broker, &tasks, slot);
                    }
                    Err(_) => refuse(stream, &config),
                }
            }
            // Of this connection, not of the listener.
            Err(error) if is_transient(error.kind()) => {}
            Err(error) => {
                config.counters.accept_errors.fetch_add(1, Ordering::Relaxed);
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept NATS clients; trying on");
                }
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
}

/// Waited after a failure to accept: the cause, mostly a lack of file descriptors, does not end at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

fn is_transient(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(kind, ConnectionAborted | ConnectionReset | Interrupted)
}

fn start(
    stream: TcpStream,
    peer: SocketAddr,
    config: &Arc<Config>,
    broker: &Handle,
    tasks: &Tasks,
    slot: Slot,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "client gone before it was served");
        return;
    }
    let connection = Connection::new(stream, peer, Arc::clone(config), broker.clone());
    let stop = tasks.stopped();
    tasks.spawn("nats-client", async move {
        connection.run(stop).await;
        drop(slot);
    });
}

/// Tells a client that there are too many. It is not waited for: a socket that was just accepted has room
/// for this much, and who refuses should not hold on.
fn refuse(stream: TcpStream, config: &Config) {
    config.counters.refused.fetch_add(1, Ordering::Relaxed);
    let info =
        Info { max_payload: config.payload_max(), ..Info::new(&config.server_id, &config.server_name) };
    let text = format!("{info}{}", reply::error_line(&Fatal::Connections));
    if let Ok(mut stream) = stream.into_std()
        && let Err(error) = stream.write_all(text.as_bytes())
    {
        tracing::debug!(%error, "client gone before it was refused");
    }
}

/// A place among the connections, counted while it is held.
#[derive(Debug)]
struct Slot {
    counters: Arc<Counters>,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    fn new(permit: OwnedSemaphorePermit, counters: Arc<Counters>) -> Self {
        counters.connections.fetch_add(1, Ordering::Relaxed);
        Self { counters, _permit: permit }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.counters.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Gives a session these bytes of a client, in pieces of this size: what a fuzzer drives.
#[doc(hidden)]
pub fn fuzz(side: Side, bytes: &[u8], piece: usize) {
    let config = Arc::new(Config::new(side, "fuzz", Auth::Anonymous));
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    let now = tokio::time::Instant::now();
    let mut session = session::Session::new(config, crate::core::event::SessionId(1), peer, now);
    let mut held = Vec::new();
    for piece in bytes.chunks(piece.max(1)) {
        held.extend_from_slice(piece);
        loop {
            let used = session.receive(&held);
            drop(session.take_events());
            session.written(session.egress().pending());
            if used == 0 {
                break;
            }
            held.drain(..used);
        }
    }
}

#[cfg(test)]
mod tests;
