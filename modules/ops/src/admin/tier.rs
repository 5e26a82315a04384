//! What a hub's administration asks of the tier instead of its broker.

use std::{fmt, future::Future, pin::Pin};

use broker::{
    Stopped,
    event::{Command, Response},
};
use bytes::Bytes;

/// An answer that takes a while.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Stopped>> + Send + 'a>>;

/// Who owns what a hub's operator changes: the hub's own broker, or what the replicas of a tier share.
pub trait Tier: fmt::Debug + Send + Sync {
    /// Runs a [`Command::StateWrite`] or [`Command::StateBarrier`].
    fn write(&self, command: Command) -> Answer<'_, Response>;

    /// Appends a frame to what is sent to a node; [`Response::Done`] once it is durable.
    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> Answer<'a, Response>;
}
