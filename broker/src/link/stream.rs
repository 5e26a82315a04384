//! Stream, the fourth primitive: a reliable, flow-controlled two-way byte pipe to the peer of a link.
//!
//! Each is a further bidirectional stream of the transport. It starts with `u32 length | StreamOpen`, at
//! most [`OPEN_MAX`] bytes; what follows is the two ends' own business. Kind [`ECHO`] is answered by every
//! link itself: the peer's bytes come back, which is how `doctor` tests a link.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use codec::proto::StreamOpen;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{Broken, Transport};
use crate::core::event::{Peer, SessionId};

/// Largest encoded `StreamOpen`.
pub const OPEN_MAX: usize = 16 << 10;
/// The kind of Stream that sends back what it gets.
pub const ECHO: &str = "echo";

/// A raw byte pipe. Dropping it resets what is not finished.
pub struct ByteStream {
    reader: Box<dyn AsyncRead + Send + Sync + Unpin>,
    writer: Box<dyn AsyncWrite + Send + Sync + Unpin>,
}

impl ByteStream {
    pub(super) fn new(
        reader: impl AsyncRead + Send + Sync + Unpin + 'static,
        writer: impl AsyncWrite + Send + Sync + Unpin + 'static,
    ) -> Self {
        Self { reader: Box::new(reader), writer: Box::new(writer) }
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

impl fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByteStream")
    }
}

/// A Stream that the peer opened.
#[derive(Debug)]
pub struct IncomingStream {
    /// Who opened it.
    pub peer: Peer,
    /// What it is for.
    pub open: StreamOpen,
    /// The pipe.
    pub stream: ByteStream,
}

/// Where a process takes its peers' Streams. A full one refuses.
pub type StreamSink = mpsc::Sender<IncomingStream>;

/// A way to a link that is up. Outliving the link is harmless.
#[derive(Clone)]
pub struct LinkHandle {
    peer: Peer,
    transport: Arc<dyn OpenStream>,
}

impl LinkHandle {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Opens a Stream. Not cancel safe: a dropped call may leave the peer with a Stream that ends at once.
    ///
    /// # Errors
    /// The link is gone, or `open` is too long.
    pub async fn open_stream(&self, open: &StreamOpen) -> Result<ByteStream, OpenError> {
        let body = codec::encode(open);
        let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= OPEN_MAX);
        let len = len.ok_or(OpenError::TooLong(body.len()))?;
        let mut stream = self.transport.open().await.map_err(|Broken| OpenError::LinkGone)?;
        let head = [&len.to_le_bytes()[..], &body].concat();
        stream.write_all(&head).await.map_err(|_lost| OpenError::LinkGone)?;
        Ok(stream)
    }
}

impl fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkHandle").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Why a Stream cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The link has ended.
    #[error("the link is gone")]
    LinkGone,
    /// Names and headers are bounded.
    #[error("a StreamOpen of {0} bytes; at most {OPEN_MAX} are allowed")]
    TooLong(usize),
}

/// The links of a process that are up.
#[derive(Debug, Default)]
pub struct Links {
    up: Mutex<Vec<(SessionId, LinkHandle)>>,
    changed: Notify,
}

impl Links {
    /// The newest link to the peer of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<LinkHandle> {
        let links = self.up.lock().expect("no panic under this lock");
        links.iter().rev().find(|(_, link)| &*link.peer.name == name).map(|(_, link)| link.clone())
    }

    /// Any link, the newest first: a node has one hub.
    #[must_use]
    pub fn newest(&self) -> Option<LinkHandle> {
        self.up.lock().expect("no panic under this lock").last().map(|(_, link)| link.clone())
    }

    /// Waits until no link is up, at most this long.
    pub(super) async fn emptied(&self, deadline: Duration) {
        let emptied = async {
            loop {
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if self.newest().is_none() {
                    return;
                }
                changed.await;
            }
        };
        // Whoever is left is closed with the port.
        drop(timeout(deadline, emptied).await);
    }

    /// Lists a link for as long as the entry lives.
    pub(super) fn enter<T: Transport>(
        self: &Arc<Self>,
        session: SessionId,
        peer: Peer,
        transport: T,
    ) -> Entry {
        let handle = LinkHandle { peer, transport: Arc::new(transport) };
        self.up.lock().expect("no panic under this lock").push((session, handle));
        Entry { session, links: Arc::clone(self) }
    }
}

/// A link's place in [`Links`].
#[derive(Debug)]
pub(super) struct Entry {
    session: SessionId,
    links: Arc<Links>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut links = self.links.up.lock().expect("no panic under this lock");
        links.retain(|(session, _)| *session != self.session);
        self.links.changed.notify_waiters();
    }
}

/// Reads what a Stream is for; bounded before allocation.
pub(super) async fn read_open(stream: &mut ByteStream) -> io::Result<StreamOpen> {
    let len = stream.read_u32_le().await? as usize;
    if len > OPEN_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    codec::decode(body.into()).map_err(io::Error::other)
}

/// Serves a Stream of kind [`ECHO`].
pub(super) async fn echo(stream: ByteStream) -> io::Result<()> {
    let ByteStream { mut reader, mut writer } = stream;
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, Broken>> + Send + 'a>>;

/// What a [`LinkHandle`] needs of a transport, without its type.
trait OpenStream: Send + Sync {
    fn open(&self) -> Opening<'_>;
}

impl<T: Transport> OpenStream for T {
    fn open(&self) -> Opening<'_> {
        Box::pin(self.open_stream())
    }
}
