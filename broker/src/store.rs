//! Durability: the [`Store`] that a driver gives its core's groups to.
//!
//! Two implementations: [`lmdb`] (journal and checkpoint on disk) and [`mem`] (for simulation and
//! simulated fleets; it can lose what was not yet synced). The journal is the only thing on the
//! acknowledgement path; the checkpoint follows it.

pub mod backup;
mod facts;
mod files;
pub mod journal;
pub mod lmdb;
pub mod mem;
mod stretches;

use std::task::{Context, Poll};

use bytes::Bytes;
use codec::{Class, Kind, Record};

pub use self::stretches::{Extent, Stretches};
use crate::core::event::{Group, Lsn, Origin, ReadId, ReadRequest, tier};

/// Where groups become durable.
///
/// A driver calls `submit` and `read` from its own task and polls for what came of them. Neither may
/// block. Groups become durable in lsn order, each whole or not at all.
pub trait Store: Send + 'static {
    /// Takes a group. [`StoreEvent::Persisted`] or [`StoreEvent::Refused`] follows.
    fn submit(&mut self, group: Group);

    /// Starts a read of a Log. Sees everything persisted before. [`StoreEvent::Read`] follows.
    ///
    /// A Log is ordered by seq. What is appended takes the place of what it covers: a gap of the records
    /// `from..=to`, a record of an earlier one of the same seq; a gap itself is replaced only by
    /// one that covers it whole. A `table` record drops what is below its
    /// `first`, except the gap that ends right below it. A gap that covers nothing (a change of epoch)
    /// stands right before the record that follows it; a read never ends on one unless the Log does.
    ///
    /// Returned is everything in `from..next`, except what the request allows to leave out: records that match none
    /// of what is wanted. How many of those are left out is the store's choice, and it may end a read on one, even
    /// with nothing to return. A gap that covers nothing and stands at `next` may be told twice. Only where the Log
    /// has nothing from `from` on is `next` not above it.
    fn read(&mut self, request: ReadRequest);

    /// What a tier's core asks beside: whose node is whose. A store of one process is never asked.
    fn ask(&mut self, ask: tier::Ask) {
        unreachable!("this store is one process's own: {ask:?}");
    }

    /// The next completion. Cancel safe: a completion is taken only when `Ready` is returned.
    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<StoreEvent>;
}

/// What became of a `submit` or a `read`.
#[derive(Debug)]
pub enum StoreEvent {
    /// Every group up to this lsn is durable.
    Persisted(Lsn),
    /// A read is done; it goes on at `next`, see [`Store::read`].
    Read { read: ReadId, records: Vec<Record>, next: u64 },
    /// The store's space comes to an end: what adds data should be refused from now on. Groups are still
    /// taken, on what is held back for those that free space or move positions: deletions, trims, cursors.
    Low { reason: String },
    /// There is room again.
    Ample,
    /// Something on disk was found damaged. What was in it is lost, everything else goes on.
    Damaged(Damage),
    /// This group and every later one submitted so far were not written: no space, or an I/O error.
    /// Nothing of them will be there after a restart. The next `submit` is tried again, with the
    /// refused lsn.
    Refused { lsn: Lsn, reason: String },
    /// Of what the replicas of a tier share: its groups are durable by [`tier::News::Written`] alone, and
    /// none is refused.
    Tier(tier::News),
}

/// Something on disk that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Name of the file, within the store's folder.
    pub file: String,
    /// Where in it, in bytes.
    pub offset: u64,
    /// What is wrong and what was lost by it.
    pub what: String,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at byte {}: {}", self.file, self.offset, self.what)
    }
}

/// What a store held when it was opened: the checkpoint with the journal replayed over it.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Lsn of the last group; 0 in a new store.
    pub last_lsn: Lsn,
    /// Every declared source.
    pub sources: Vec<Source>,
    /// Every Log that has records or a table.
    pub logs: Vec<LogRecovery>,
    /// Every State record, tombstones included, in the order (source, key).
    pub state: Vec<Record>,
    /// Every fact of kind 16 and above that has a value.
    pub locals: Vec<LocalFact>,
    /// What was found damaged. The files are kept in the store's folder `quarantine`.
    pub damage: Vec<Damage>,
    /// Effects that were acknowledged are lost, and nobody knows which: positions that others hold may be
    /// ahead of this store, as after a backup was restored.
    pub uncertain: bool,
}

/// A declared source of this store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its number in record headers.
    pub number: u32,
    /// Whose.
    pub origin: Origin,
    /// Live, Log or State.
    pub kind: SourceKind,
    /// Stream or space; empty for Live.
    pub name: Origin,
    /// Class of all its records.
    pub class: Class,
}

/// What a source carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum SourceKind {
    /// Live messages of one (origin, class).
    Live = 1,
    /// A Log.
    Log = 2,
    /// A space of State.
    State = 3,
}

/// What recovery knows of a Log.
#[derive(Debug, Clone, Default)]
pub struct LogRecovery {
    /// The store's number of it.
    pub source: u32,
    /// Nothing readable is below this seq: the seq of the oldest record, or where the oldest gap starts.
    /// 0 when nothing is readable.
    pub first: u64,
    /// Seq of the last record or the end of the last gap, even if it is no longer readable; 0 if there
    /// never was one.
    pub last: u64,
    /// Epoch in the last record's header.
    pub last_epoch: u64,
    /// crc32c of the last record's frame; 0 if it is a gap.
    pub last_crc: u32,
    /// What is there, for retention. A store may know bytes as estimates where the middle of a Log was cut.
    pub kept: Stretches,
}

/// A keyed fact of this store: a cursor, a client session, a mark, a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalFact {
    /// Kind 16 and above.
    pub kind: Kind,
    /// Key within the kind.
    pub key: Bytes,
    /// Encoded prost message, see [`Kind`].
    pub value: Bytes,
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("{0} is in use by another process; with a running octobus use --admin {0}/admin.sock")]
    Locked(std::path::PathBuf),
    /// The folder holds a format this version does not know.
    #[error("{path} has store format {found}; this version reads {known}: use the version that wrote it")]
    Format { path: std::path::PathBuf, found: u32, known: u32 },
    /// Files of several stores are mixed.
    #[error("journal segment {segment} cannot be used (byte {offset}): {what}; it was left untouched")]
    Corrupt { segment: u64, offset: u64, what: String },
    /// The file system says no.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: std::path::PathBuf, source: std::io::Error },
    /// LMDB says no.
    #[error("checkpoint {path}: {what}")]
    Checkpoint { path: std::path::PathBuf, what: String },
}

#[cfg(test)]
mod tests;
