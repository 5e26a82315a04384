//! The primitives across a tier of hubs, whatever it is made of.
//!
//! A hub is alone, or one replica of several. What differs is who holds what the *tier* owns: its State (`sys`,
//! `fleet`), what it sends to nodes, and who has which node. This trait is that difference, with two
//! implementations:
//!
//! | | [`Local`]: one hub | [`Tier`](nats::Tier): replicas on NATS servers |
//! |---|---|---|
//! | State | spaces of the broker's own store | KV buckets of the same keys, mirrored into every replica's core |
//! | several keys at once | one journal group: all or none | in order, each by compare-and-set: see [`Fabric::write`] |
//! | Log to a node | `down/<n>` in the broker's store | JetStream, read by the replica that has the node |
//! | Live | the broker's own NATS front | published and answered on the servers |
//! | claim | the core's table of links | `claims/<n>`, by compare-and-set |
//!
//! Watching State needs no method: every core has it, or its mirror, and is watched itself. What nodes own
//! (their Logs, `status`, `twin`, `retained`) is below the core, in its `Store`.

pub mod local;
pub mod nats;

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use broker::{
    Stopped,
    event::{Command, Response, StateOp},
};
use bytes::Bytes;
use codec::proto::StreamOpen;
use ops::admin::tier;

pub use self::local::Local;
use crate::nodes::NodeLinks;

/// An answer that takes a while. Dropping it leaves open whether it happened.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, FabricError>> + Send + 'a>>;

/// An entry of a space that the tier owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// What a compare-and-set expects.
    pub revision: u64,
}

/// One of the operations of a write found another revision than it expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conflict {
    /// Which operation.
    pub index: usize,
    /// The revision that it found; 0: no entry.
    pub found: u64,
}

/// Who has a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This replica.
    Here,
    /// Another one, and where others may dial it (`host:port` of QUIC) if it says so.
    Elsewhere { replica: String, address: Option<String> },
    /// Nobody: it is offline.
    Nobody,
}

/// Why the fabric has no answer.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// This process stops.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// It cannot be done, and could not later.
    #[error("{0}")]
    Refused(String),
    /// It cannot be done now. It may have been done all the same: read before trying again.
    #[error("{0}")]
    Unavailable(String),
}

/// See the module's documentation.
pub trait Fabric: fmt::Debug + Send + Sync {
    /// An entry as it is now.
    fn get<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>>;

    /// An entry as this replica saw it last, a moment ago. Costs no request.
    fn peek<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>>;

    /// At most `limit` entries behind `after` whose keys begin with `prefix`, in order, as this replica saw them
    /// last.
    fn list<'a>(
        &'a self,
        space: &'a str,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> Answer<'a, Vec<Entry>>;

    /// Writes keys of spaces that the tier owns; their revisions, 0 for what changed nothing. Durable when
    /// this returns, and seen by this replica's core.
    ///
    /// One hub writes all or none. JetStream has no write of several keys, so a tier writes them **in order**,
    /// each by its own compare-and-set: the first that fails ends it, and those before it stay. Hence order
    /// operations so that after any number of them the rest can be completed by doing it all again: first the one
    /// that decides (a token is used by one key), then what follows from it (that key's enrolment).
    fn write(&self, ops: Vec<StateOp>) -> Answer<'_, Result<Vec<u64>, Conflict>>;

    /// Says that the source of `fleet` has been listed completely; the barrier's revision.
    fn barrier(&self) -> Answer<'_, u64>;

    /// Appends a frame to what the tier sends a node. Durable when this returns.
    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> Answer<'a, ()>;

    /// Who has a node, as this replica saw it last.
    fn owner<'a>(&'a self, node: &'a str) -> Answer<'a, Owner>;
}

/// The administration of a hub writes through the fabric.
#[derive(Debug)]
pub struct Administered {
    /// Of the tier.
    pub fabric: Arc<dyn Fabric>,
    /// Wherever its nodes are.
    pub nodes: NodeLinks,
}

impl tier::Tier for Administered {
    fn write(&self, command: Command) -> tier::Answer<'_, Response> {
        Box::pin(async move {
            let written = match command {
                Command::StateWrite(ops) => self.fabric.write(ops).await,
                Command::StateBarrier { .. } => {
                    self.fabric.barrier().await.map(|revision| Ok(vec![revision]))
                }
                _ => Ok(Err(Conflict { index: 0, found: 0 })),
            };
            Ok(match written {
                Ok(Ok(revisions)) => Response::Written(revisions),
                Ok(Err(Conflict { index, found })) => Response::Conflict { index, found },
                Err(FabricError::Stopped(stopped)) => return Err(stopped),
                Err(error) => Response::Refused(error.to_string()),
            })
        })
    }

    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> tier::Answer<'a, Response> {
        Box::pin(async move {
            Ok(match self.fabric.append_down(node, frame).await {
                Ok(()) => Response::Done,
                Err(FabricError::Stopped(stopped)) => return Err(stopped),
                Err(error) => Response::Refused(error.to_string()),
            })
        })
    }

    fn open_stream<'a>(&'a self, node: &'a str, open: &'a StreamOpen) -> tier::Opening<'a> {
        Box::pin(self.nodes.open(node, open))
    }
}
