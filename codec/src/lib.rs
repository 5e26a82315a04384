//! Bytes on wires and disks. This crate is the definition of every format of the bus.
//!
//! From the inside out:
//!
//! | what | where | in short |
//! |---|---|---|
//! | messages | `proto/octobus.proto`, [`proto`] | prost; unknown fields are skipped, numbers never reused |
//! | [topics and filters](topic) | [`Filter`] | MQTT's, 1 024 bytes, 32 levels; exact covering |
//! | [`frame`] | [`FrameView`], [`FrameParts`] | one immutable message, encoded once, read without copying |
//! | [`record`] | [`Record`] | 40 bytes of what changes per hop, and a body; journal, link and queue alike |
//! | [`batch`] | [`batch::Prefix`], [`batch::Encoder`] | 24 bytes and records, checksummed, LZ4; what a link carries |
//! | [names](name) | | topics as NATS subjects, levels as KV keys, one to one |
//!
//! The journal's segments and groups, which hold records, are the broker's store alone and stand there.
//!
//! # Rules of every decoder
//! - It knows no tokio, no clock and no I/O: bytes in, values or a typed error out.
//! - Every size that a peer chose is checked before anything is allocated for it.
//! - No input panics. `tests/fuzz_smoke.rs` mutates valid inputs in every test run; `fuzz/` goes on for longer.
//! - What has two spellings is refused in all but one, wherever a permission or a key depends on it.
//! - What a newer peer may add (fields, record kinds below 16, flags of records) is skipped or carried; what
//!   would change the meaning of the rest (versions, flags of batches) is refused.

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

use bytes::{Bytes, BytesMut};
use prost::Message;

/// Encodes a message of the schema.
#[must_use]
pub fn encode(message: &impl Message) -> Bytes {
    let mut out = BytesMut::with_capacity(message.encoded_len());
    message.encode(&mut out).expect("a BytesMut grows");
    out.freeze()
}

/// Decodes a message of the schema. Unknown fields are skipped.
///
/// # Errors
/// The bytes are no such message.
pub fn decode<M: Message + Default>(raw: Bytes) -> Result<M, prost::DecodeError> {
    M::decode(raw)
}

pub use frame::{FrameError, FrameParts, FrameView, Trace};
pub use record::{Class, Flags, Kind, Record, RecordHeader};
pub use topic::{Filter, TopicError};
pub use wire::WireError;
