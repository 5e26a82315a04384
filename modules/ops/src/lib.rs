//! Everything an operator meets: configuration, the admin socket, metrics, logs, `doctor`.
//!
//! Used by both hubs and by the command line; knows the broker only through its [`broker::Handle`].

pub mod admin;
pub mod api;
pub mod client;
pub mod config;
pub mod doctor;
pub mod endpoints;
mod http;
pub mod logging;
pub mod metrics;
pub mod parts;
