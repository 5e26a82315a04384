//! Everything an operator meets: configuration, the admin socket, metrics, logs, `doctor`.
//!
//! Used by both hubs and by the command line; knows the broker only through its [`broker::Handle`].

pub mod config;
pub mod endpoints;
pub mod logging;
