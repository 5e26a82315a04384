//! Links: the replication session between two brokers, and what carries it.

pub mod identity;
pub mod mem;
pub mod quic;
pub mod tls;
