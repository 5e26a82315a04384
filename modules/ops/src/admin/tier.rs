//! What a hub's administration asks of the tier instead of its broker.

use std::{fmt, future::Future, pin::Pin};

use broker::{
    Stopped,
    event::{Command, Response},
    link::stream::{ByteStream, OpenError},
};
use bytes::Bytes;
use codec::proto::StreamOpen;

/// An answer that takes a while.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Stopped>> + Send + 'a>>;

/// A Stream that is being opened.
pub type Opening<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, OpenError>> + Send + 'a>>;

/// Who owns what a hub's operator changes: the hub's own broker, or what the replicas of a tier share.
pub trait Tier: fmt::Debug + Send + Sync {
    /// Runs a [`Command::StateWrite`] or [`Command::StateBarrier`].
    fn write(&self, command: Command) -> Answer<'_, Response>;

    /// Appends a frame to what is sent to a node; [`Response::Done`] once it is durable.
    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> Answer<'a, Response>;

    /// Opens a Stream to a node, whichever replica has it.
    fn open_stream<'a>(&'a self, node: &'a str, open: &'a StreamOpen) -> Opening<'a>;
}
