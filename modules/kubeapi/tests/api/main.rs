//! The API server over a real broker and real TLS.
#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod client;
mod kubectl;
mod nodes;
mod replay;
mod semantics;
mod workloads;
