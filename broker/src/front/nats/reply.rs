//! What the server says besides messages: `INFO`, `+OK`, `-ERR`, in nats-server's words.
//!
//! Client libraries compare these texts. An error that they do not know makes several of them give up
//! the connection for good, so a condition of ours that is transient is dressed as a permissions
//! violation, which all of them treat as news and not as an end.

use std::fmt::{self, Display};

use serde::Serialize;

/// The nats-server whose client protocol this front speaks; clients parse it and choose features by it.
const PROTOCOL_VERSION: &str = "2.9.10";

pub(super) const OK: &[u8] = b"+OK\r\n";
pub(super) const PING: &[u8] = b"PING\r\n";
pub(super) const PONG: &[u8] = b"PONG\r\n";

/// The server's greeting.
#[derive(Debug, Serialize)]
pub(super) struct Info<'a> {
    pub server_id: &'a str,
    pub server_name: &'a str,
    pub version: &'static str,
    pub proto: u8,
    pub headers: bool,
    pub max_payload: usize,
    pub client_id: u64,
    pub auth_required: bool,
}

impl<'a> Info<'a> {
    pub(super) fn new(server_id: &'a str, server_name: &'a str) -> Self {
        Self {
            server_id,
            server_name,
            version: PROTOCOL_VERSION,
            proto: 1,
            headers: true,
            max_payload: 0,
            client_id: 0,
            auth_required: false,
        }
    }
}

impl Display for Info<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::to_string(self).map_err(|_| fmt::Error)?;
        write!(out, "INFO {json}\r\n")
    }
}

/// An error after which the connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fatal {
    #[error("Unknown Protocol Operation")]
    UnknownOperation,
    #[error("maximum control line exceeded")]
    ControlLine,
    #[error("Maximum Payload Violation")]
    Payload,
    #[error("Authorization Violation")]
    Authorization,
    #[error("Authentication Timeout")]
    ConnectTimeout,
    #[error("User Authentication Revoked")]
    Revoked,
    #[error("no responders requires headers support")]
    NoRespondersNeedHeaders,
    #[error("invalid client protocol")]
    ClientProtocol,
    #[error("message headers not supported")]
    HeadersNotSupported,
    #[error("maximum connections exceeded")]
    Connections,
    #[error("Stale Connection")]
    Stale,
    #[error("Slow Consumer")]
    SlowConsumer,
}

/// An error after which the connection goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Complaint<'a> {
    #[error("Invalid Publish Subject")]
    PublishSubject,
    #[error("Invalid Subject")]
    Subject,
    #[error("maximum subscriptions exceeded")]
    Subscriptions,
    #[error("Permissions Violation for Publish to \"{0}\"")]
    Publish(&'a str),
    #[error("Permissions Violation for Publish with Reply of \"{0}\"")]
    Reply(&'a str),
    #[error("Permissions Violation for Subscription to \"{0}\"")]
    Subscribe(&'a str),
    #[error("Permissions Violation for Subscription to \"{0}\" using queue \"{1}\"")]
    SubscribeQueue(&'a str, &'a str),
    #[error("Permissions Violation for Publish: {0}")]
    Refused(crate::core::event::PublishRefusal),
}

/// The line that carries an error.
pub(super) fn error_line(error: &impl Display) -> String {
    format!("-ERR '{error}'\r\n")
}
