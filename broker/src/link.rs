//! Links: the replication session between two brokers, and what carries it.
//!
//! ```text
//!            Output::Send            batches               Event::LinkReceived
//!  core ──▶ outbox ──▶ writer per ──▶ Transport ──▶ reader per ──▶ handle ──▶ core
//!                      open class      (lanes)       open lane
//! ```
//!
//! The protocol (hello, resume, acknowledgements, fencing) is the core's. A link carries records, in order
//! within a class; answers heartbeats, which never enter the core; and closes on anything malformed.
//!
//! # Invariants
//! - An idle link has one stream, control, and one task: the stream of any other class is opened by its first
//!   batch and finished after [`Params::lane_idle`], and has a task of its own for as long.
//! - Classes share nothing but the connection: each has its own queue, writer, reader and flow-control
//!   window, and the windows of all streams together are less than the connection's. So a peer that does not
//!   read one class holds back that class alone.
//! - Queues here hold only what the core was not yet told is [`Event::Sent`](crate::event::Event::Sent),
//!   so the core's bound on a session's queue is theirs.
//! - A reader waits for the broker's byte budget before it reads on; QUIC carries that to the peer.
//! - A link ends when its control stream ends, so what was sent before an orderly close is still read.

pub mod accept;
mod classes;
mod control;
pub mod counters;
mod delay;
pub mod dial;
mod heartbeat;
pub mod identity;
pub mod mem;
mod mux;
pub mod quic;
mod reader;
pub mod replicas;
mod session;
pub mod stream;
pub mod tls;
pub mod websocket;
mod writer;

#[cfg(test)]
mod tests;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, proto};
use tokio::{io::AsyncRead, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    core::event::{CloseReason, Peer},
    handle::Handle,
};
pub use counters::Counters;
pub use mux::fuzz as fuzz_fragments;
pub use session::run;
pub use stream::{ByteStream, LinkHandle, Links};

/// A verified connection between two processes: what a link needs of QUIC, a WebSocket, or memory.
///
/// An implementation gives ordered, reliable, flow-controlled lanes that do not wait for each other, and
/// sends bytes of higher classes first. Cloning shares the connection; it is closed by [`close`](Self::close)
/// or when the last clone is dropped.
pub trait Transport: Clone + Send + Sync + 'static {
    /// Sends on one lane.
    type Sender: LaneSender;
    /// Receives on one lane. Reads are cancel safe.
    type Receiver: AsyncRead + Unpin + Send + 'static;
    /// What people call it.
    const NAME: &'static str;

    /// The control lane, the one that goes both ways: opened by the dialler, accepted by the other, whose
    /// future completes only when the dialler has written something.
    fn control(
        &self,
        dialler: bool,
    ) -> impl Future<Output = Result<(Self::Sender, Self::Receiver), Broken>> + Send;

    /// Opens the lane of a class. The peer learns of it with the first bytes.
    fn open(&self, class: Class) -> impl Future<Output = Result<Self::Sender, Broken>> + Send;

    /// The next lane the peer opened; the peer may have few open at a time. Cancel safe.
    fn accept(&self) -> impl Future<Output = Result<Self::Receiver, Broken>> + Send;

    /// Opens a raw two-way byte pipe, as urgent as this class's records but behind them. The peer learns of it
    /// with the first bytes. Waits while as many as the peer permits are open.
    fn open_stream(&self, class: Class) -> impl Future<Output = Result<ByteStream, Broken>> + Send;

    /// The next pipe the peer opened. Cancel safe.
    fn accept_stream(&self) -> impl Future<Output = Result<ByteStream, Broken>> + Send;

    /// Ends the connection at once; the peer sees code and reason.
    fn close(&self, code: CloseCode, reason: &str);

    /// Why the connection ended, once it has. Cancel safe.
    fn closed(&self) -> impl Future<Output = Closed> + Send;

    /// What is known of the path.
    fn path(&self) -> Path;
}

/// The sending half of a lane. Dropped without [`finish`](Self::finish), the lane is reset, so that a half
/// batch never looks like a whole lane.
pub trait LaneSender: Send + 'static {
    /// Hands these bytes to the transport, in order. Waits for flow control. Not cancel safe.
    fn write(&mut self, buffers: Vec<Bytes>) -> impl Future<Output = Result<(), Broken>> + Send;

    /// Says that nothing follows, and waits until the peer's transport has everything.
    fn finish(self) -> impl Future<Output = Result<(), Broken>> + Send;
}

/// The connection or lane is gone. [`Transport::closed`] says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection is gone")]
pub struct Broken;

/// What a transport knows of its path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Path {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Datagrams received: any change is a sign of life.
    pub received: u64,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// By the peer, with its code and reason.
    ByPeer { code: CloseCode, reason: String },
    /// By this side.
    ByUs,
    /// By this side, because what the peer sent is no link's protocol.
    Protocol(String),
    /// By the network: timeout, reset, no route.
    Lost(String),
}

/// Application error codes of a connection. Stable: they stand on wires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u32);

impl CloseCode {
    /// An orderly end: shutdown, drain.
    pub const DONE: Self = Self(0);
    /// The peer broke the protocol; the reason says how.
    pub const PROTOCOL: Self = Self(1);
    /// A `Refusal` was sent before this.
    pub const REFUSED: Self = Self(2);
    /// Nothing was heard of the peer for too long.
    pub const SILENT: Self = Self(3);
    /// A newer session of the same instance exists.
    pub const TAKEN_OVER: Self = Self(4);
    /// The peer does not read.
    pub const SLOW: Self = Self(5);
    /// The identity was revoked or replaced.
    pub const REVOKED: Self = Self(6);
    /// Something failed on this side.
    pub const INTERNAL: Self = Self(7);
}

/// Times and bounds of links.
#[derive(Debug, Clone)]
pub struct Params {
    /// A heartbeat is sent after this long without sending or without receiving; two of them without
    /// receiving end the link.
    pub heartbeat: Duration,
    /// A class's lane is finished after this long without records.
    pub lane_idle: Duration,
    /// What is queued has this long to reach the peer when a link closes.
    pub drain: Duration,
    /// TLS handshake, authorization and the opening of the control lane.
    pub handshake: Duration,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(10),
            lane_idle: Duration::from_secs(30),
            drain: Duration::from_secs(3),
            handshake: Duration::from_secs(10),
        }
    }
}

/// Everything about a link but its transport.
#[derive(Debug, Clone)]
pub struct Link {
    /// Who the verified certificate says the peer is.
    pub peer: Peer,
    /// This side dialled.
    pub dialler: bool,
    /// The broker that gets the peer's records.
    pub broker: Handle,
    /// Times and bounds.
    pub params: Arc<Params>,
    /// Counters, shared by all links of a process.
    pub counters: Arc<Counters>,
    /// Ends the link in an orderly way.
    pub stop: CancellationToken,
    /// Who wants to know how far the link is; see [`Progress`]. An acceptor's links are watched by nobody.
    pub progress: Option<watch::Sender<Progress>>,
    /// Lists the link while it is up, and takes the peer's Streams.
    pub links: Arc<Links>,
}

/// How far a link is, as its dialler wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// The peer has sent Welcome: proof of life.
    pub welcomed: bool,
    /// A heartbeat is overdue and the path is silent: time to try another.
    pub suspect: bool,
}

/// How a link ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Why.
    pub end: LinkEnd,
    /// The peer's refusal, if it sent one.
    pub refusal: Option<proto::Refusal>,
    /// When the peer asked to be tried again (from its refusal or drain).
    pub retry_after: Option<Duration>,
    /// Whether Welcome was received.
    pub welcomed: bool,
}

/// Why a link ended.
#[derive(Debug, Clone, PartialEq)]
pub enum LinkEnd {
    /// This side's broker closed it.
    Closed(CloseReason),
    /// This side was asked to stop.
    Stopped,
    /// The peer closed it.
    PeerClosed { code: CloseCode, reason: String },
    /// Nothing was heard for two heartbeats.
    PeerSilent,
    /// The network failed.
    Lost(String),
    /// The peer broke the protocol.
    Protocol(String),
    /// This side's broker has stopped, or a task of the link panicked.
    Internal,
}

impl LinkEnd {
    /// A stable word for counters.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Closed(_) => "closed",
            Self::Stopped => "stopped",
            Self::PeerClosed { .. } => "peer-closed",
            Self::PeerSilent => "peer-silent",
            Self::Lost(_) => "lost",
            Self::Protocol(_) => "protocol",
            Self::Internal => "internal",
        }
    }

    /// What the peer is told.
    fn code(&self) -> CloseCode {
        match self {
            Self::Closed(CloseReason::TakenOver) => CloseCode::TAKEN_OVER,
            Self::Closed(CloseReason::SlowConsumer) => CloseCode::SLOW,
            Self::Closed(CloseReason::Protocol(_)) | Self::Protocol(_) => CloseCode::PROTOCOL,
            Self::Closed(CloseReason::Refused(_)) => CloseCode::REFUSED,
            Self::Closed(CloseReason::Revoked) => CloseCode::REVOKED,
            Self::PeerSilent => CloseCode::SILENT,
            Self::Internal => CloseCode::INTERNAL,
            Self::Closed(CloseReason::Shutdown) | Self::Stopped | Self::PeerClosed { .. } | Self::Lost(_) => {
                CloseCode::DONE
            }
        }
    }
}

impl fmt::Display for LinkEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(CloseReason::Protocol(what)) | Self::Protocol(what) => {
                write!(f, "protocol error: {what}")
            }
            Self::Closed(CloseReason::Refused(refusal)) => write!(f, "refused: {}", refusal.message),
            Self::Closed(CloseReason::TakenOver) => f.write_str("a newer session took over"),
            Self::Closed(CloseReason::SlowConsumer) => f.write_str("the peer does not read"),
            Self::Closed(CloseReason::Revoked) => f.write_str("the identity was revoked or replaced"),
            Self::Closed(CloseReason::Shutdown) | Self::Stopped => f.write_str("shutdown"),
            Self::PeerClosed { reason, .. } => write!(f, "closed by the peer: {reason}"),
            Self::PeerSilent => f.write_str("nothing heard from the peer"),
            Self::Lost(what) => write!(f, "connection lost: {what}"),
            Self::Internal => f.write_str("internal failure"),
        }
    }
}

/// A control record.
pub(crate) fn control_record(message: proto::control::Message) -> codec::Record {
    let body = codec::encode(&proto::Control { message: Some(message) });
    let header = codec::RecordHeader {
        kind: codec::Kind::CONTROL,
        class: Class::Control as u8,
        flags: codec::Flags::default(),
        source: 0,
        epoch: 0,
        seq: 0,
        aux: 0,
    };
    codec::Record { header, body }
}
