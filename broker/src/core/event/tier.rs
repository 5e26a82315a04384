//! What the core of a tier's replica and what the replicas share say to each other.
//!
//! In a tier State and Logs of nodes do not belong to one process: a core **adopts** a node when it links, is
//! told what is durable of it, and lets it go again. Its groups are written to what all replicas share, each
//! node's in their order and no node's behind another's.

use std::sync::Arc;

use codec::{Class, Record, proto};

use super::{Lsn, Origin, SessionId};

/// The core asks what the replicas share. Asks are taken in their order.
#[derive(Debug)]
pub enum Ask {
    /// A node has linked: claim it for this replica, and say what is durable of it. What an earlier adoption of
    /// it has left unwritten here is dropped. Answered by [`News::Adopted`], unless the node is released before.
    Adopt(Box<Adopt>),
    /// The node's link has ended, and nothing of it waits for durability: it is another replica's to take.
    Release { node: Origin },
}

impl Ask {
    /// Whom it is about.
    #[must_use]
    pub fn node(&self) -> &Origin {
        match self {
            Self::Adopt(adopt) => &adopt.node,
            Self::Release { node } => node,
        }
    }
}

/// A node that links.
#[derive(Debug, Clone)]
pub struct Adopt {
    /// Comes back in the answer.
    pub session: SessionId,
    /// Its name.
    pub node: Origin,
    /// Enrolment generation of its certificate.
    pub generation: u32,
    /// 128 random bits of its store.
    pub instance: [u8; 16],
    /// Of its Hello: a greater one is a newer dial of the instance.
    pub stamp: u64,
    /// Its Logs that have ever had a record.
    pub logs: Vec<OfferedLog>,
    /// Its spaces, by name.
    pub spaces: Vec<Arc<str>>,
}

/// A Log that a node has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedLog {
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Oldest seq that the node still holds.
    pub first: u64,
    /// Seq after its last.
    pub next: u64,
}

/// What is durable of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Adoption {
    /// Of those of its Logs of which anything is durable.
    pub logs: Vec<AdoptedLog>,
    /// Of those of its spaces of which anything is durable.
    pub spaces: Vec<AdoptedSpace>,
    /// The tier's Log `down/<node>`, if it holds anything.
    pub down: Option<DownLog>,
}

/// Where a Log of a node stands in the tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptedLog {
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Class of the stream.
    pub class: Class,
    /// Epoch of the last record.
    pub epoch: u64,
    /// A seq from which on this epoch is known to be durable.
    pub from: u64,
    /// Seq of the last record, or end of the last gap.
    pub mark: u64,
    /// crc32c of the frame at the mark; 0 if it is a gap or not known.
    pub crc: u32,
}

/// Where a space of a node stands in the tier.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdoptedSpace {
    /// Its name.
    pub space: Arc<str>,
    /// Everything up to this incarnation ...
    pub incarnation: u64,
    /// ... and revision is durable.
    pub revision: u64,
    /// The owner's run that brought it; 0 = unknown.
    pub run: u64,
    /// The incarnation whose barrier came last.
    pub listed: u64,
}

/// The Log of what the tier sends to a node. Its seqs are those of a Log that all nodes share: one node's have
/// holes, which are not gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownLog {
    /// Its epoch.
    pub epoch: u64,
    /// Seq of the last message to this node.
    pub last: u64,
}

/// What happened to what the replicas share.
#[derive(Debug)]
pub enum News {
    /// A node is this replica's, or why it is not. A refusal says when to come again.
    Adopted { session: SessionId, outcome: Result<Box<Adoption>, proto::Refusal> },
    /// Every group of this node (or, with an empty name, of none) up to this lsn is durable.
    Written { node: Origin, lsn: Lsn },
    /// A node is not this replica's any more, or its writes met what they do not fit to: its link ends with this
    /// refusal, what it sent and is not yet durable is not acknowledged. With an empty name: every node.
    Fenced { node: Origin, refusal: proto::Refusal },
    /// Something was appended to a node's `down` Log; its records are read as any Log's are.
    Arrived { node: Origin, down: DownLog },
    /// A space of the tier (`fleet`, `sys`) has changed.
    Mirrored(Mirrored),
}

/// A change of a space that the tier owns, as this replica's mirror has it.
#[derive(Debug, Clone, Default)]
pub struct Mirrored {
    /// Name of the space.
    pub space: Arc<str>,
    /// The incarnation that all of it belongs to. A greater one takes the place of everything before it: a new
    /// bucket begins empty, which deletes nothing at the nodes.
    pub incarnation: u64,
    /// `put` and `tombstone` records, as on a link: epoch and seq are the pair, the body is a frame whose topic is
    /// the key.
    pub records: Vec<Record>,
    /// All that exists up to this revision has been said. `None`: the mirror is still reading.
    pub complete: Option<u64>,
}

/// A refusal of a node that this replica cannot keep or take now: it is to come again, here or elsewhere.
#[must_use]
pub fn come_again(message: &str, retry_after_ms: u32) -> proto::Refusal {
    proto::Refusal {
        reason: proto::RefusalReason::Overloaded as i32,
        message: message.to_owned(),
        retry_after_ms,
    }
}
