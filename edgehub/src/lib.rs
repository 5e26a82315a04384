//! The node: serves its devices with or without a hub, and links to one once it has joined.

mod downlink;
pub mod edge;
pub mod https;
pub mod identity;
pub mod join;
mod local;
mod uplink;
