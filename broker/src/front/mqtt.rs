//! The MQTT front: MQTT 3.1.1 and 5 over any byte stream.
//!
//! ```text
//! socket -> input -> gate -> packet, publish -> session -> Event   -> core
//! socket <- writer <-        encode          <- session <- Output  <- core
//! ```
//!
//! The front knows packets; the core knows sessions. A durable subscription, a packet id in flight, the memory
//! of a QoS 2 publish, a will: all of that is the core's, so that it survives this process. The front never
//! acknowledges a publish by itself: PUBACK and PUBREC are sent when the core says that the message is durable.
//!
//! Rules that hold here:
//! - **No byte from outside panics.** The [gate] passes only complete packets of types that a client
//!   may send; all readers behind it are bounds-checked and written here. (The readers of `rumqttd` reach
//!   `unreachable!()` on three bytes and let pass what the specification forbids, such as reserved connect flags,
//!   repeated properties and trailing bytes; the tests use that crate as an independent peer.)
//! - **No peer chooses how much is allocated.** Buffers grow with the bytes that came, not with those that are
//!   announced; an idle client costs less than 4 KiB.
//! - **A malformed packet closes its client only**, with a reason code in MQTT 5, a log line and a counter.
//! - Frames are encoded once, from the read buffer. A delivery shares its payload with all others of the frame.

mod connect;
mod connection;
mod counters;
mod encode;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod gate;
mod input;
mod packet;
mod publish;
mod session;
mod wire;
mod writer;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

pub use self::{connection::serve_connection, counters::Counters, error::Cause};
use crate::{Handle, Tasks, front::auth::Auth, limits};

/// How a front serves.
#[derive(Debug)]
pub struct Config {
    /// Who may do what.
    pub auth: Auth,
    /// Largest packet that a client may send, in bytes.
    pub packet_max: usize,
    /// Connections at a time; further ones are closed at once.
    pub connections_max: usize,
    /// QoS 1 and 2 publishes that a client of MQTT 5 may have unanswered.
    pub receive_max: u16,
    /// QoS 1 and 2 deliveries in flight to a client that allows as many.
    pub inflight_max: u16,
    /// Topic aliases that a client may use.
    pub topic_alias_max: u16,
    /// Longest time, in seconds, that a session outlives its connection, whatever its client asks for.
    pub session_expiry_max: u32,
    /// How long a stranger has to say CONNECT and to be let in.
    pub connect_timeout: Duration,
    /// Whether the wall clock is known to be right; goes into frames.
    pub time_trusted: Arc<AtomicBool>,
    /// Shared with metrics.
    pub counters: Arc<Counters>,
}

impl Config {
    /// The default for everything but who may come in.
    #[must_use]
    pub fn new(auth: Auth) -> Self {
        Self {
            auth,
            packet_max: limits::MQTT_PACKET_MAX,
            connections_max: 65_536,
            receive_max: 1024,
            inflight_max: 1024,
            topic_alias_max: 16,
            session_expiry_max: u32::MAX,
            connect_timeout: Duration::from_secs(10),
            time_trusted: Arc::default(),
            counters: Arc::default(),
        }
    }
}

/// Accepts clients until `tasks` is asked to stop. Each connection is a task of its own.
pub async fn serve(listener: TcpListener, config: Arc<Config>, broker: Handle, tasks: Tasks) {
    let stop = tasks.stopped();
    let slots = Arc::new(Semaphore::new(config.connections_max));
    let mut backoff = Backoff::default();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                backoff = Backoff::default();
                admit(stream, peer, &slots, &config, &broker, &tasks);
            }
            Err(error) => {
                // Out of descriptors or memory: connections that end will make room.
                Counters::add(&config.counters.accept_errors, 1);
                let pause = backoff.next();
                tracing::warn!(%error, pause_ms = pause.as_millis() as u64, "cannot accept mqtt clients");
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
            }
        }
    }
}

/// Silence after which the kernel asks whether the peer still exists.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(60);

fn admit(
    stream: TcpStream,
    peer: SocketAddr,
    slots: &Arc<Semaphore>,
    config: &Arc<Config>,
    broker: &Handle,
    tasks: &Tasks,
) {
    let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
        config.counters.count_closed(Cause::TooManyConnections);
        tracing::warn!(%peer, max = config.connections_max, "mqtt client refused: too many connections");
        return;
    };
    // Small packets must not wait for acknowledgements of others, and a client without keep-alive that has
    // vanished must be noticed. Without these options the connection still works.
    let keep_alive = socket2::TcpKeepalive::new().with_time(TCP_KEEP_ALIVE);
    let set = stream
        .set_nodelay(true)
        .and_then(|()| socket2::SockRef::from(&stream).set_tcp_keepalive(&keep_alive));
    if let Err(error) = set {
        tracing::debug!(%peer, %error, "cannot set TCP options");
    }
    let connection = serve_in_slot(stream, peer, Arc::clone(config), broker.clone(), tasks.stopped(), slot);
    tasks.spawn("mqtt connection", connection);
}

async fn serve_in_slot(
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<Config>,
    broker: Handle,
    stop: tokio_util::sync::CancellationToken,
    _slot: OwnedSemaphorePermit,
) {
    serve_connection(stream, peer, config, broker, stop).await;
}

/// Pauses between failures to accept, doubling.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_secs(1);

    fn next(&mut self) -> Duration {
        let pause = Self::FIRST.saturating_mul(1 << self.failures.min(10)).min(Self::MAX);
        self.failures += 1;
        pause
    }
}

#[cfg(test)]
mod tests;
