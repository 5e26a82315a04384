//! Bytes on wires and disks: frames, records, batches, control messages, names.
//!
//! This crate knows no tokio, no clock and no I/O. Every decoder here is bounds-checked, bounded before it
//! allocates, and fuzzed.

pub mod batch;
pub mod frame;
pub mod name;
pub mod record;
pub mod topic;
mod wire;

/// The prost types of `proto/octobus.proto`.
#[allow(missing_debug_implementations, unreachable_pub, clippy::use_self, clippy::doc_markdown)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/octobus.v1.rs"));
}

pub use frame::{FrameError, FrameParts, FrameView, Trace};
pub use record::{Class, Flags, Kind, Record, RecordHeader};
pub use topic::{Filter, TopicError};
pub use wire::WireError;
