//! The tier on NATS: everything in cloudhub that names NATS is here and below.
//!
//! | file | |
//! |---|---|
//! | `names` | what everything is called |
//! | `connection` | one connection, and requests whose answers say exactly what happened |
//! | `claims` | which replica has which node, leases |
//!
//! What the tier tells a replica's store comes by a [`Feed`].

pub mod claims;
pub mod connection;
pub mod names;

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use codec::Record;
use tokio::sync::mpsc;

/// What the tier tells the store of this replica.
#[derive(Debug)]
pub enum Told {
    /// A newer claim on a node that this replica has, or this replica cannot hold its claims any more: its
    /// session is to be closed, nothing more is to be written for it.
    Fenced { node: Arc<str> },
    /// Entries of a space that the tier owns, or records of the Log `down/<n>`, in the order of the fabric and
    /// durable.
    Mirrored(Mirrored),
}

/// What was read of the fabric.
#[derive(Debug)]
pub struct Mirrored {
    /// Which space or Log.
    pub of: MirrorOf,
    /// Of State: kind PUT or TOMBSTONE, `epoch` = incarnation of the bucket, `seq` = revision, a Frame whose
    /// topic is the key. Of a Log: kind LOG, `epoch` = incarnation of the stream, `seq` = its sequence number
    /// there, with holes that are not gaps. `source` is 0.
    pub records: Vec<Record>,
    /// (incarnation, revision) up to which everything is in what was told so far.
    pub upto: (u64, u64),
}

/// What is mirrored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorOf {
    /// A space of the tier: `fleet`, and of `sys` the keys `identity/<n>`.
    Space(&'static str),
    /// The Log `down/<n>` of the tier: what came for this node since this replica follows the stream. Of any
    /// node, whether it is here or not.
    Down(Arc<str>),
}

/// Where the store hears of the tier. One task reads it.
#[derive(Debug)]
pub struct Feed {
    fenced: mpsc::UnboundedReceiver<Arc<str>>,
    mirrored: mpsc::Receiver<Mirrored>,
}

/// The other end of a [`Feed`].
#[derive(Debug, Clone)]
pub struct Teller {
    /// Not bounded by itself: one for each node that this replica has, at most.
    pub fenced: mpsc::UnboundedSender<Arc<str>>,
    /// What waits is bounded in number here and in bytes by who fills it.
    pub mirrored: mpsc::Sender<Mirrored>,
}

/// Batches that wait for the store.
const MIRRORED_MAX: usize = 16;

impl Feed {
    /// Both ends.
    #[allow(clippy::disallowed_methods)] // bounded by who sends: one fence for each node that this replica has
    pub fn new() -> (Teller, Self) {
        let (fenced, fences) = mpsc::unbounded_channel();
        let (mirrored, mirror) = mpsc::channel(MIRRORED_MAX);
        (Teller { fenced, mirrored }, Self { fenced: fences, mirrored: mirror })
    }

    /// The next that the tier tells; pending for ever once it has ended. Fences come first. Cancel safe.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Told> {
        if let Poll::Ready(Some(node)) = self.fenced.poll_recv(cx) {
            return Poll::Ready(Told::Fenced { node });
        }
        match self.mirrored.poll_recv(cx) {
            Poll::Ready(Some(mirrored)) => Poll::Ready(Told::Mirrored(mirrored)),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}
