//! The hub: accepts nodes, says who they are, and offers their messages to NATS clients.

pub mod admin;
pub mod authorizer;
pub mod bootstrap;
pub mod bridge;
pub mod ca;
pub mod enrol;
pub mod fabric;
pub mod hub;
pub mod kubelet;
pub mod nodes;
pub mod registry;
pub mod renew;
pub mod token;
