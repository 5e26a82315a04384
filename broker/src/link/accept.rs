//! The side that is dialled, a hub's or a relay's: from a listener's port to running links.
//!
//! Per connection: handshake, identity, authorizer, link; each in its own task. The number of handshakes in
//! flight is bounded, and each has one deadline for everything before its link runs: a slow peer holds a
//! slot for [`Params::handshake`] at most. When half of the slots are taken, an address has to be proved
//! (QUIC Retry) before it gets one, and the deadline is shorter.

use std::{
    fmt,
    future::Future,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use codec::proto::{self, control::Message};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{
    CloseCode, Counters, LaneSender as _, Link, Links, Params, Transport, control_record,
    identity::PeerCertificate,
};
use crate::{core::event::Role, handle::Handle, tasks::Tasks};

/// A bound port at which peers dial.
pub trait Listener: Send + Sync + 'static {
    /// What it gives.
    type Attempt: Attempt;

    /// The next attempt of a peer; `None` once closed. Cancel safe.
    fn accept(&self) -> impl Future<Output = Option<Self::Attempt>> + Send;

    /// Refuses new peers and waits, until the deadline, for the others to have learned of their end.
    fn close(&self, deadline: Duration) -> impl Future<Output = ()> + Send;
}

/// A peer of whom nothing is known yet.
pub trait Attempt: Sized + Send + 'static {
    /// What it becomes.
    type Transport: Transport;
    /// Why it becomes nothing.
    type Error: fmt::Display + Send;

    /// From where.
    fn remote(&self) -> SocketAddr;

    /// Asks the peer to prove its address where that may be made up. `None`: it has to come again.
    fn prove(self) -> Option<Self> {
        Some(self)
    }

    /// Tells the peer to go.
    fn refuse(self);

    /// Runs the handshake. Dropping the future gives the peer up.
    fn handshake(
        self,
    ) -> impl Future<Output = Result<(Self::Transport, PeerCertificate), Self::Error>> + Send;
}

/// How much a listener takes at a time.
///
/// Clones share the places for connections, so that several ports have one bound.
#[derive(Debug, Clone)]
pub struct Admission {
    handshakes_max: usize,
    connections: Arc<Semaphore>,
}

impl Admission {
    /// At most this many handshakes in flight at a port: later peers wait in the listener's own bounded
    /// queue. At most this many connections: later peers are refused.
    #[must_use]
    pub fn new(handshakes_max: usize, connections_max: usize) -> Self {
        Self { handshakes_max, connections: Arc::new(Semaphore::new(connections_max)) }
    }

    /// With as many handshakes as by default.
    #[must_use]
    pub fn with_connections(connections_max: usize) -> Self {
        Self::new(HANDSHAKES_MAX, connections_max)
    }
}

impl Admission {
    /// For one of several ports that share its handshakes.
    #[must_use]
    pub fn of_ports(&self, ports: usize) -> Self {
        Self {
            handshakes_max: self.handshakes_max.div_ceil(ports.max(1)),
            connections: Arc::clone(&self.connections),
        }
    }
}

impl Default for Admission {
    fn default() -> Self {
        Self::with_connections(65_536)
    }
}

/// Handshakes in flight at one port by default.
const HANDSHAKES_MAX: usize = 256;

/// What accepted links have in common.
#[derive(Debug, Clone)]
pub struct Acceptor {
    /// The broker that gets the nodes' records.
    pub broker: Handle,
    /// Times and bounds of a link.
    pub params: Arc<Params>,
    /// Bounds of the listener.
    pub admission: Admission,
    /// Counters of the process.
    pub counters: Arc<Counters>,
    /// The links of the process, and who takes their Streams.
    pub links: Arc<Links>,
    /// Where the links' tasks live; its stop ends accepting and every link.
    pub tasks: Tasks,
}

impl Acceptor {
    /// Accepts links until stopped. `authorize` is asked at every session start, resumed ones included; its
    /// refusal is what the peer gets.
    pub async fn run<L, A, F>(self, listener: L, authorize: A)
    where
        L: Listener,
        A: Fn(PeerCertificate) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<(), proto::Refusal>> + Send + 'static,
    {
        let stop = self.tasks.stopped();
        let handshakes = Arc::new(Semaphore::new(self.admission.handshakes_max));
        loop {
            let slot = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                slot = Arc::clone(&handshakes).acquire_owned() => slot.expect("never closed"),
            };
            let attempt = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                attempt = listener.accept() => attempt,
            };
            let Some(attempt) = attempt else { break };
            let loaded = handshakes.available_permits() < self.admission.handshakes_max / 2;
            let attempt = if loaded { attempt.prove() } else { Some(attempt) };
            let Some(attempt) = attempt else { continue };
            let patience = if loaded { self.params.handshake / LOADED_SHARE } else { self.params.handshake };
            let Ok(place) = Arc::clone(&self.admission.connections).try_acquire_owned() else {
                self.counters.handshakes_failed.fetch_add(1, Relaxed);
                attempt.refuse();
                continue;
            };
            let (acceptor, authorize, tasks) = (self.clone(), authorize.clone(), self.tasks.clone());
            // Tasks of their own: the handshake's state would otherwise live as long as the link.
            self.tasks.spawn("handshake", async move {
                if let Some((transport, link)) = acceptor.admit(attempt, slot, patience, authorize).await {
                    tasks.spawn("link", async move {
                        match link.peer.role {
                            Role::Node => drop(super::run(transport, link).await),
                            // Streams of another replica; it has no session.
                            Role::Hub => super::replicas::serve(&transport, &link).await,
                        }
                        drop(place);
                    });
                }
            });
        }
        // The links' own orderly ends come first: they share the port.
        self.links.emptied(self.params.drain).await;
        listener.close(self.params.drain).await;
    }

    async fn admit<T, A, F>(
        self,
        attempt: T,
        _slot: OwnedSemaphorePermit,
        patience: Duration,
        authorize: A,
    ) -> Option<(T::Transport, Link)>
    where
        T: Attempt,
        A: Fn(PeerCertificate) -> F,
        F: Future<Output = Result<(), proto::Refusal>>,
    {
        let remote = attempt.remote();
        let admitted = timeout(patience, async {
            let handshake = attempt.handshake().await;
            let (transport, certificate) = handshake.map_err(|error| Denied::Handshake(error.to_string()))?;
            let peer = certificate.identity.peer();
            match authorize(certificate).await {
                Ok(()) => Ok((transport, peer)),
                Err(refusal) => {
                    let denied = Denied::Refused { peer: peer.name.to_string(), refusal: refusal.clone() };
                    refuse(&transport, refusal).await;
                    Err(denied)
                }
            }
        });
        let (transport, peer) = match admitted.await.unwrap_or(Err(Denied::Slow)) {
            Ok(admitted) => admitted,
            Err(denied) => {
                self.counters.handshakes_failed.fetch_add(1, Relaxed);
                if self.counters.may_say() {
                    tracing::warn!(%remote, %denied, "link not accepted");
                }
                return None;
            }
        };
        if self.counters.may_say() {
            tracing::info!(%remote, peer = %peer.name, role = ?peer.role, "link accepted");
        }
        let link = Link {
            peer,
            dialler: false,
            broker: self.broker,
            params: self.params,
            counters: self.counters,
            stop: self.tasks.stopped(),
            progress: None,
            links: self.links,
        };
        Some((transport, link))
    }
}

/// When half of the slots are taken, a handshake has this part of the time: few of those who hold a slot then
/// have anything to say.
const LOADED_SHARE: u32 = 4;

/// Why a peer did not get a link.
#[derive(Debug)]
enum Denied {
    Handshake(String),
    Refused { peer: String, refusal: proto::Refusal },
    Slow,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handshake(error) => error.fmt(f),
            Self::Refused { peer, refusal } => write!(f, "{peer} refused: {}", refusal.message),
            Self::Slow => f.write_str("too slow"),
        }
    }
}

/// Tells a peer why, on the control stream, then closes. A peer that does not open one in time just sees
/// the close.
async fn refuse(transport: &impl Transport, refusal: proto::Refusal) {
    let message = refusal.message.clone();
    if let Ok((mut sender, _receiver)) = transport.control(false).await {
        let record = control_record(Message::Refusal(refusal));
        let told = match codec::batch::Encoder::encode_uncompressed(&[record]) {
            Ok(encoded) => match sender.write(encoded.into_buffers()).await {
                Ok(()) => sender.finish().await.is_ok(),
                Err(_lost) => false,
            },
            Err(error) => {
                tracing::error!(%error, "a refusal that does not fit a batch");
                false
            }
        };
        tracing::debug!(told, "refusal sent");
    }
    transport.close(CloseCode::REFUSED, &message);
}
