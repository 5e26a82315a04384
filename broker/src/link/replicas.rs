//! Streams between the replicas of a tier: connections that carry them and nothing else.
//!
//! ```text
//!   asked replica ──(dials as a hub)──▶ replica that has the node ──(its link)──▶ node
//!      Replicas::open   StreamOpen + header `octobus-node`   serve: opens it anew, joins the two
//! ```
//!
//! # Invariants
//! - One hop: what comes from a replica is opened over a link of this process, or refused. There are no loops.
//! - Such a connection never enters the core: no control lane, no session, no records. Its dialler's heartbeat is an
//!   echo on a Stream of its own; whoever hears nothing for long enough gives the connection up, and with it
//!   every Stream on it.
//! - Only certificates with role `hub` of the tier are at either end, and the dialler asks for the replica by name.
//! - An end, and a reset with its code, goes on to the other side; a direction that breaks takes the other with it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use codec::proto::{Header, StreamOpen};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::lookup_host,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    CloseCode, Link, Links, Params, Transport,
    quic::{QuicDialler, QuicTransport},
    stream::{
        self, ByteStream, ECHO, IncomingStream, LinkHandle, OpenError, StreamCode, StreamReader, StreamWriter,
    },
};
use crate::{core::event::Role, tasks::Tasks};

/// Header of a `StreamOpen` that a replica passes on: the node it is for.
const NODE: &str = "octobus-node";
/// Streams on one connection, besides its heartbeat: what the acceptor of a hub permits.
const STREAMS_EACH: usize = 8;
/// Connections to one replica at a time.
const CONNECTIONS_MAX: usize = 16;
/// A connection without Streams is closed after this long.
const IDLE: Duration = Duration::from_secs(60);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;
/// What is read at a time of a Stream that is passed on.
const CHUNK: usize = 16 << 10;

/// Connections of this replica to others, made when they are needed. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Replicas {
    dialler: QuicDialler,
    params: Arc<Params>,
    tasks: Tasks,
    connections: Arc<Mutex<HashMap<String, Pool>>>,
}

/// Connections to one replica. Locked while one is dialled: whoever else needs that replica waits.
type Pool = Arc<tokio::sync::Mutex<Vec<Connection>>>;

#[derive(Debug, Clone)]
struct Connection {
    handle: LinkHandle,
    /// Closed when the connection is.
    places: Arc<Semaphore>,
}

impl Replicas {
    /// `dialler` has the certificate of this replica. Connections live in `tasks`.
    #[must_use]
    pub fn new(dialler: QuicDialler, params: Arc<Params>, tasks: Tasks) -> Self {
        Self { dialler, params, tasks, connections: Arc::default() }
    }

    /// Opens a Stream to a node that another replica has, at the address (`host:port` of QUIC) that this replica
    /// told. In bounded time; not cancel safe, as [`LinkHandle::open_stream`].
    ///
    /// # Errors
    /// See [`OpenError`]; `NoLink` if the replica does not have the node any more.
    pub async fn open(
        &self,
        replica: &str,
        address: &str,
        node: &str,
        open: &StreamOpen,
    ) -> Result<ByteStream, OpenError> {
        let mut open = open.clone();
        open.headers.push(Header { name: NODE.to_owned(), value: node.to_owned().into() });
        let mut first = true;
        loop {
            let (connection, place, fresh) = self.connection(replica, address).await.map_err(|why| {
                OpenError::Replica { node: node.to_owned(), replica: replica.to_owned(), why }
            })?;
            match connection.handle.open_stream(&open).await {
                Ok(stream) => return Ok(stream.holding(place)),
                Err(OpenError::LinkGone) => {
                    connection.places.close();
                    // It had ended unnoticed: nothing of the Stream has begun.
                    if fresh || !std::mem::take(&mut first) {
                        return Err(OpenError::LinkGone);
                    }
                }
                Err(OpenError::Refused { code: StreamCode::NO_LINK, .. }) => {
                    return Err(OpenError::NoLink(node.to_owned()));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A connection with a place on it; whether it was dialled for this.
    async fn connection(
        &self,
        replica: &str,
        address: &str,
    ) -> Result<(Connection, OwnedSemaphorePermit, bool), String> {
        let pool = {
            let mut pools = self.connections.lock().expect("no panic under this lock");
            // Replicas come and go under new names: what nobody uses and holds nothing is forgotten.
            pools.retain(|name, pool| {
                name == replica
                    || Arc::strong_count(pool) > 1
                    || pool.try_lock().is_ok_and(|held| held.iter().any(|one| !one.places.is_closed()))
            });
            Arc::clone(pools.entry(replica.to_owned()).or_default())
        };
        let mut pool = pool.lock().await;
        pool.retain(|connection| !connection.places.is_closed());
        for connection in &*pool {
            if let Ok(place) = Arc::clone(&connection.places).try_acquire_owned() {
                return Ok((connection.clone(), place, false));
            }
        }
        if pool.len() >= CONNECTIONS_MAX {
            return Err("too many streams to it are open".to_owned());
        }
        let transport = self.dial(replica, address).await?;
        let connection = self.keep(replica, transport);
        let place = Arc::clone(&connection.places).try_acquire_owned();
        let place = place.map_err(|_closed| "the connection ended at once".to_owned())?;
        pool.push(connection.clone());
        Ok((connection, place, true))
    }

    async fn dial(&self, replica: &str, address: &str) -> Result<QuicTransport, String> {
        let patience = self.params.handshake;
        let found: Vec<SocketAddr> = match timeout(patience, lookup_host(address)).await {
            Ok(Ok(found)) => found.take(ADDRESSES_MAX).collect(),
            Ok(Err(error)) => return Err(format!("cannot resolve {address}: {error}")),
            Err(_elapsed) => return Err(format!("cannot resolve {address}: no answer")),
        };
        let each = patience / u32::try_from(found.len().max(1)).expect("few");
        let mut last = format!("{address} has no address");
        for to in found {
            last = match timeout(each, self.dialler.dial(to)).await {
                Ok(Ok((transport, certificate))) => {
                    let peer = certificate.identity.peer();
                    if peer.role == Role::Hub && *peer.name == *replica {
                        return Ok(transport);
                    }
                    transport.close(CloseCode::DONE, "another replica was meant");
                    format!("{to} is replica {}", peer.name)
                }
                Ok(Err(error)) => format!("quic://{to}: {error}"),
                Err(_elapsed) => format!("quic://{to}: no answer"),
            };
        }
        Err(last)
    }

    /// Keeps a connection until it is idle, silent or gone.
    fn keep(&self, replica: &str, transport: QuicTransport) -> Connection {
        let peer = crate::core::event::Peer { name: replica.into(), role: Role::Hub, generation: 0 };
        let connection = Connection {
            handle: LinkHandle::new(peer, transport.clone()),
            places: Arc::new(Semaphore::new(STREAMS_EACH)),
        };
        let (kept, heartbeat, stop) = (connection.clone(), self.params.heartbeat, self.tasks.stopped());
        self.tasks.spawn("connection to a replica", async move {
            let (code, why) = tokio::select! {
                biased;
                () = stop.cancelled() => (CloseCode::DONE, "shutdown"),
                closed = transport.closed() => {
                    tracing::debug!(?closed, "a connection to another replica ended");
                    (CloseCode::DONE, "")
                }
                why = beat(&kept, heartbeat) => why,
            };
            kept.places.close();
            transport.close(code, why);
        });
        connection
    }
}

/// Asks again and again for a sign of life; returns when there is none, or nothing to live for.
async fn beat(connection: &Connection, heartbeat: Duration) -> (CloseCode, &'static str) {
    let silent = (CloseCode::SILENT, "nothing heard");
    let open = StreamOpen { kind: ECHO.to_owned(), ..StreamOpen::default() };
    let Ok(mut echo) = connection.handle.open_stream(&open).await else { return silent };
    let mut idle = Duration::ZERO;
    loop {
        sleep(heartbeat).await;
        let beat = async {
            echo.write_all(&[0]).await?;
            echo.read_u8().await
        };
        if !matches!(timeout(heartbeat, beat).await, Ok(Ok(_))) {
            return silent;
        }
        // All places at once: none is taken between the look and the close.
        match connection.places.try_acquire_many(STREAMS_EACH as u32) {
            Ok(_all) if idle >= IDLE => {
                connection.places.close();
                return (CloseCode::DONE, "idle");
            }
            Ok(_all) => idle += heartbeat,
            Err(_in_use) => idle = Duration::ZERO,
        }
    }
}

/// Serves the connection of another replica until it ends or this process stops.
pub(super) async fn serve<T: Transport>(transport: &T, link: &Link) {
    let mut streams = JoinSet::new();
    let end = loop {
        tokio::select! {
            biased;
            () = link.stop.cancelled() => break "shutdown",
            ended = streams.join_next(), if !streams.is_empty() => {
                if let Some(Err(error)) = ended {
                    tracing::error!(%error, "a stream of another replica panicked");
                }
            }
            accepted = transport.accept_stream() => match accepted {
                // Its transport permits no more either.
                Ok(stream) if streams.len() > STREAMS_EACH => stream.reset(StreamCode::BUSY),
                Ok(stream) => {
                    let (peer, links) = (link.peer.clone(), Arc::clone(&link.links));
                    let patience = link.params.handshake;
                    streams.spawn(async move {
                        if let Some(incoming) = stream::received(stream, peer, patience).await {
                            answer(incoming, &links).await;
                        }
                    });
                }
                Err(_gone) => break "",
            },
        }
    };
    transport.close(CloseCode::DONE, end);
}

async fn answer(mut incoming: IncomingStream, links: &Links) {
    let headers = &mut incoming.open.headers;
    let Some(at) = headers.iter().position(|header| header.name == NODE) else {
        if incoming.open.kind != ECHO {
            let message = "between replicas, streams are for nodes";
            return incoming.refuse(StreamCode::FORBIDDEN, message).await;
        }
        return stream::answered(incoming, links).await;
    };
    let node = headers.remove(at).value;
    // What is no UTF-8 is nobody's name.
    let node = String::from_utf8_lossy(&node);
    let link = links.find(&node).filter(|link| link.peer().role == Role::Node);
    let Some(link) = link else {
        let message = format!("{node} is not linked to this replica");
        return incoming.refuse(StreamCode::NO_LINK, message).await;
    };
    match link.open_stream(&incoming.open).await {
        Ok(theirs) => {
            if let Ok(ours) = incoming.accept().await {
                join(ours, theirs).await;
            }
        }
        Err(OpenError::Refused { code, message }) => incoming.refuse(code, message).await,
        Err(error) => {
            let code = match error {
                OpenError::NoLink(_) | OpenError::LinkGone => StreamCode::NO_LINK,
                OpenError::NoAnswer => StreamCode::TIMEOUT,
                _ => StreamCode::FAILED,
            };
            incoming.refuse(code, error.to_string()).await;
        }
    }
}

/// Both directions, until both have ended or one breaks.
async fn join(ours: ByteStream, theirs: ByteStream) {
    let (our_reader, our_writer) = ours.into_split();
    let (their_reader, their_writer) = theirs.into_split();
    let joined = tokio::try_join!(pass(our_reader, their_writer), pass(their_reader, our_writer));
    if let Err(code) = joined {
        tracing::debug!(%code, "a stream between replicas broke");
    }
}

/// One direction. Whichever end breaks, the other is told with the same code.
async fn pass(mut from: StreamReader, mut to: StreamWriter) -> Result<(), StreamCode> {
    let code = |error: &io::Error| StreamCode::of(error).unwrap_or(StreamCode::FAILED);
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) => return to.shutdown().await.map_err(|error| code(&error)),
            Ok(read) => {
                if let Err(error) = to.write_all(&chunk[..read]).await {
                    let code = code(&error);
                    from.stop(code);
                    return Err(code);
                }
            }
            Err(error) => {
                let code = code(&error);
                to.reset(code);
                return Err(code);
            }
        }
    }
}
