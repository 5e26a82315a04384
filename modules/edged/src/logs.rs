//! What containers print: files in CRI's format, written by the runtime, read and rotated here.
//!
//! A line is `2026-11-20T20:00:00.123456789Z stdout F text`. The third field says whether the text is a full line (`F`)
//! or a part of a longer one (`P`), which goes on with the next of its kind.
//!
//! | file | what |
//! |---|---|
//! | `line.rs` | from that format to what a client is sent: pure |
//! | `read.rs` | files from some place on, followed across rotation |
//! | `rotate.rs` | files that grew too large are put aside, old ones removed |

mod line;
mod read;
pub mod rotate;

use std::num::NonZeroU64;

use broker::clock::wall_us;
use time::OffsetDateTime;

pub(crate) use read::{Reader, Step};

/// What of a log a client wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// What is written later too, for as long as the container runs.
    pub follow: bool,
    /// No more than the last lines.
    pub tail: Option<u64>,
    /// Nothing that is older.
    pub since: Option<OffsetDateTime>,
    /// The time before each line.
    pub timestamps: bool,
    /// No more bytes than this.
    pub limit: Option<NonZeroU64>,
}

/// The wall clock.
pub(crate) fn now() -> OffsetDateTime {
    let nanos = i128::from(wall_us()) * 1000;
    OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}
