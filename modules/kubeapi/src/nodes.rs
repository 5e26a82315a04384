//! What nodes have and the API shows: logs, exec, attach, port-forward, and paths of a node itself.
//!
//! The hub opens a Stream to the node, over which the node is an HTTP/1.1 server with the paths of a kubelet.
//! A request becomes one of these paths ([`parts`]) and its answer is passed on as it comes ([`forward`]):
//! exec, attach and port-forward are two byte pipes once both ends have upgraded, whatever they speak then.
//!
//! **Invariants.** One Stream is one request. A client that hangs up ends its Stream, a Stream that breaks ends its
//! client's connection: what was cut off never looks complete. Nothing waits here but what is on its way: who
//! does not read holds back the node, through the Stream's window.

pub mod forward;
pub(crate) mod parts;
pub(crate) mod upgrade;

use std::{fmt, future::Future, pin::Pin};

use tokio::io::{AsyncRead, AsyncWrite};

/// The kind of Stream on which a node is an HTTP server.
pub const KUBELET: &str = "kubelet";

/// A byte pipe to a node. Dropped before it was shut down, the node sees it cut off.
pub trait NodeStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> NodeStream for T {}

/// A Stream that is being opened. Dropping it gives up.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn NodeStream>, Unreachable>> + Send + 'a>>;

/// A way to nodes, wherever their links are.
pub trait NodeStreams: fmt::Debug + Send + Sync {
    /// Opens a Stream of kind [`KUBELET`]. Answers at once if the node is offline, and in bounded time if it does
    /// not answer.
    fn open<'a>(&'a self, node: &'a str) -> Opening<'a>;
}

/// Why a node does not answer a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// No link to it is up. Nothing was sent.
    #[error("node {0} is offline: no link to it is up")]
    Offline(String),
    /// It said no. Nothing was sent.
    #[error("node {node} refuses: {why}")]
    Refused { node: String, why: String },
    /// It did not answer in time, or too much is asked of it. It may have had the request.
    #[error("node {0} does not answer in time")]
    Slow(String),
    /// The Stream ended before the answer began. It may have had the request.
    #[error("the connection to node {node} ended: {why}")]
    Broken { node: String, why: String },
    /// As many requests as may be are on their way to nodes.
    #[error("too many requests are on their way to nodes")]
    TooMany,
}
