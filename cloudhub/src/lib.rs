//! The hub: accepts nodes, says who they are, and offers their messages to NATS clients.

pub mod ca;
pub mod registry;
pub mod token;
