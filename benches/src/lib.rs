//! How Octobus is measured against others. The figures stand in `PERF.md`, with the command of each.
//!
//! Two kinds of programs use this crate:
//!
//! | what | where | for |
//! |---|---|---|
//! | comparisons `p1_core`, `p10_live`, `p11_route`, `p12_log`, `p13_mqtt`, `p14_edge` | `src/bin` | ours and the peers in one run, one JSON line on standard output, a table on standard error |
//! | layers `codec`, `route`, `store` | `codec.rs`, `route.rs`, `store.rs` (criterion) | one layer now against the same layer before a change |
//!
//! Rules of the comparisons:
//! - Ours and the peers run **interleaved** (A B C A B C ...), five rounds or more; a figure is the median, and
//!   the spread (lowest and highest round) stands beside it.
//! - The first figure is **CPU time per operation**, user and system, of all threads of the side that is
//!   measured. Wall clock comes second: the machine is small and shared.
//! - Same work, same acknowledgement, same durability on both sides, or the difference is said in the row.
//! - Every run records its [normalizers](normalizer), so that runs on other days and machines can be compared.
//! - Nothing here asserts a time, and `cargo test` runs none of it.

pub mod alloc;
pub mod kubeedge;
pub mod measure;
pub mod mqtt;
pub mod normalizer;
pub mod procfs;
pub mod report;
pub mod routing;
pub mod server;
