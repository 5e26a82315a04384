//! Stream, the fourth primitive: a reliable, flow-controlled two-way byte pipe to the peer of a link.
//!
//! It is never stored and never outlives its link; whoever needs more resumes by its own means. Each is a
//! further bidirectional lane of the transport. It starts with `u32 length | StreamOpen` one way and
//! `u32 length | StreamAnswer` the other, each at most [`OPEN_MAX`] bytes; what follows is the two ends' own
//! business. Either end may close its direction and go on reading (half-close), or give the Stream up with a
//! [`StreamCode`], which the other end gets as an error: what was cut off never looks complete.
//!
//! A process says what it takes with [`Links::accept`] and opens with [`Links::open`]. Kind [`ECHO`] is
//! answered by every link itself: the peer's bytes come back, which is how `octobus ping` measures one.
//!
//! Memory is bounded: a Stream holds at most its flow-control window in each direction, a link a fixed number
//! of Streams, a taker the queue that it asked for.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use codec::{
    Class,
    proto::{StreamAnswer, StreamOpen, StreamRefusal},
};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, ReadHalf,
        WriteHalf,
    },
    sync::{Notify, OwnedSemaphorePermit, mpsc},
    time::timeout,
};

use super::{Broken, Transport};
use crate::core::event::{Peer, SessionId};

/// Largest encoded `StreamOpen` or `StreamAnswer`.
pub const OPEN_MAX: usize = 16 << 10;
/// The kind of Stream that sends back what it gets.
pub const ECHO: &str = "echo";
/// Longest that an opener waits for the peer's answer.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// Why a Stream was refused or given up. Stable: they stand on wires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("the stream was reset by the peer: {}", self.as_str())]
pub struct StreamCode(pub u32);

impl StreamCode {
    /// An end went away without finishing.
    pub const CANCELLED: Self = Self(0);
    /// Nobody there takes this kind.
    pub const UNKNOWN_KIND: Self = Self(1);
    /// Who takes it has no room now.
    pub const BUSY: Self = Self(2);
    /// There is no such target.
    pub const NOT_FOUND: Self = Self(3);
    /// The peer may not.
    pub const FORBIDDEN: Self = Self(4);
    /// Something failed at the other side.
    pub const FAILED: Self = Self(5);
    /// It took too long.
    pub const TIMEOUT: Self = Self(6);
    /// The opening made no sense.
    pub const MALFORMED: Self = Self(7);
    /// The replica that was asked has no link to the node.
    pub const NO_LINK: Self = Self(8);

    /// The code with which the peer ended a Stream, if that is what this error says.
    #[must_use]
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }

    /// A word for logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CANCELLED => "cancelled",
            Self::UNKNOWN_KIND => "nobody takes this kind",
            Self::BUSY => "busy",
            Self::NOT_FOUND => "not found",
            Self::FORBIDDEN => "forbidden",
            Self::FAILED => "failed",
            Self::TIMEOUT => "timed out",
            Self::MALFORMED => "malformed",
            Self::NO_LINK => "no link to the node",
            Self(_) => "for a reason this version does not know",
        }
    }
}

impl From<StreamCode> for io::Error {
    fn from(code: StreamCode) -> Self {
        Self::new(io::ErrorKind::ConnectionReset, code)
    }
}

/// What a transport gives for the receiving direction. Dropped before the end, it is stopped.
pub trait ReadSide: AsyncRead + Send + Sync + Unpin {
    /// Reads no more; the peer's writes fail with the code.
    fn stop(&mut self, code: StreamCode);
}

/// What a transport gives for the sending direction. Dropped before it was shut down, it is reset.
pub trait WriteSide: AsyncWrite + Send + Sync + Unpin {
    /// Gives up; the peer's reads fail with the code, also for what it has not yet read.
    fn reset(&mut self, code: StreamCode);
    /// Urgency of what is sent from now on.
    fn set_class(&mut self, class: Class);
}

/// A raw byte pipe. Dropping it gives up what is not finished, in both directions.
///
/// Reads are cancel safe. Of a cancelled `write_all` an unknown part was sent: reset the Stream then.
/// `shutdown` closes the own direction only.
pub struct ByteStream {
    reader: StreamReader,
    writer: StreamWriter,
}

/// The receiving direction of a Stream.
pub struct StreamReader(Box<dyn ReadSide>);

/// The sending direction of a Stream.
pub struct StreamWriter(Box<dyn WriteSide>);

impl ByteStream {
    pub(super) fn new(reader: impl ReadSide + 'static, writer: impl WriteSide + 'static) -> Self {
        Self { reader: StreamReader(Box::new(reader)), writer: StreamWriter(Box::new(writer)) }
    }

    /// The same, and what it keeps for as long as either direction lives.
    pub(super) fn holding(self, place: OwnedSemaphorePermit) -> Self {
        let place = Arc::new(place);
        let (reader, writer) = self.into_split();
        Self::new(Held { side: reader.0, _place: Arc::clone(&place) }, Held { side: writer.0, _place: place })
    }

    /// Both directions, each for its own task.
    #[must_use]
    pub fn into_split(self) -> (StreamReader, StreamWriter) {
        (self.reader, self.writer)
    }

    /// Gives up both directions and says why.
    pub fn reset(mut self, code: StreamCode) {
        self.reader.0.stop(code);
        self.writer.0.reset(code);
    }
}

impl StreamReader {
    /// Reads no more; the peer's writes fail with the code.
    pub fn stop(mut self, code: StreamCode) {
        self.0.stop(code);
    }
}

impl StreamWriter {
    /// Gives up; the peer's reads fail with the code.
    pub fn reset(mut self, code: StreamCode) {
        self.0.reset(code);
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for StreamWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
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

/// One direction of a Stream, and what it keeps from others.
struct Held<S> {
    side: S,
    _place: Arc<OwnedSemaphorePermit>,
}

impl AsyncRead for Held<Box<dyn ReadSide>> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.side).poll_read(cx, buf)
    }
}

impl ReadSide for Held<Box<dyn ReadSide>> {
    fn stop(&mut self, code: StreamCode) {
        self.side.stop(code);
    }
}

impl AsyncWrite for Held<Box<dyn WriteSide>> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.side).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.side).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.side).poll_shutdown(cx)
    }
}

impl WriteSide for Held<Box<dyn WriteSide>> {
    fn reset(&mut self, code: StreamCode) {
        self.side.reset(code);
    }

    fn set_class(&mut self, class: Class) {
        self.side.set_class(class);
    }
}

impl fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByteStream")
    }
}

impl fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamReader")
    }
}

impl fmt::Debug for StreamWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamWriter")
    }
}

/// A Stream that the peer opened and that waits for an answer. Dropping it refuses.
#[derive(Debug)]
pub struct IncomingStream {
    /// Who opened it.
    pub peer: Peer,
    /// What it is for.
    pub open: StreamOpen,
    stream: ByteStream,
}

impl IncomingStream {
    /// Takes it. Not cancel safe: a dropped call gives the Stream up.
    ///
    /// # Errors
    /// It is gone.
    pub async fn accept(mut self) -> io::Result<ByteStream> {
        self.stream.writer.0.set_class(class_of(&self.open));
        write_message(&mut self.stream, &codec::encode(&StreamAnswer { refusal: None })).await?;
        Ok(self.stream)
    }

    /// Refuses it; the opener gets code and message. Not cancel safe: a dropped call gives the Stream up.
    pub async fn refuse(mut self, code: StreamCode, message: impl Into<String>) {
        let mut message: String = message.into();
        if message.len() > MESSAGE_MAX {
            message = message.chars().take(MESSAGE_MAX / 4).collect();
        }
        let refusal = Some(StreamRefusal { code: code.0, message });
        let answer = codec::encode(&StreamAnswer { refusal });
        // Who has gone needs no answer.
        if write_message(&mut self.stream, &answer).await.is_ok() {
            drop(self.stream.shutdown().await);
            self.stream.reader.stop(code);
        }
    }
}

/// Longest text of a refusal, bytes.
const MESSAGE_MAX: usize = 4 << 10;

/// Where a process takes its peers' Streams of one kind. A full one refuses.
type StreamSink = mpsc::Sender<IncomingStream>;

/// A way to a link that is up. Outliving the link is harmless.
#[derive(Clone)]
pub struct LinkHandle {
    peer: Peer,
    transport: Arc<dyn OpenStream>,
}

impl LinkHandle {
    pub(super) fn new<T: Transport>(peer: Peer, transport: T) -> Self {
        Self { peer, transport: Arc::new(transport) }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The name of its transport.
    #[must_use]
    pub fn transport(&self) -> &'static str {
        self.transport.name()
    }

    /// Opens a Stream and waits for the peer's answer, at most [`ANSWER_PATIENCE`]: also while as many as
    /// are allowed are open. Not cancel safe: a dropped call may leave the peer with a Stream that ends at
    /// once.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open_stream(&self, open: &StreamOpen) -> Result<ByteStream, OpenError> {
        let body = codec::encode(open);
        if body.len() > OPEN_MAX {
            return Err(OpenError::TooLong(body.len()));
        }
        let opening = async {
            let mut stream =
                self.transport.open(class_of(open)).await.map_err(|Broken| OpenError::LinkGone)?;
            write_message(&mut stream, &body).await.map_err(not_opened)?;
            taken_up(stream).await
        };
        timeout(ANSWER_PATIENCE, opening).await.unwrap_or(Err(OpenError::NoAnswer))
    }
}

/// The Stream, if the other end takes it.
async fn taken_up(mut stream: ByteStream) -> Result<ByteStream, OpenError> {
    let answer = read_message(&mut stream).await.map_err(not_opened)?;
    let answer: StreamAnswer = codec::decode(answer.into()).map_err(|_decode| OpenError::Malformed)?;
    match answer.refusal {
        None => Ok(stream),
        Some(refusal) => Err(OpenError::Refused { code: StreamCode(refusal.code), message: refusal.message }),
    }
}

fn not_opened(error: io::Error) -> OpenError {
    match StreamCode::of(&error) {
        Some(code) => OpenError::Refused { code, message: code.as_str().to_owned() },
        None if error.kind() == io::ErrorKind::InvalidData => OpenError::Malformed,
        None => OpenError::LinkGone,
    }
}

impl fmt::Debug for LinkHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkHandle").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Why a Stream cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No link to this peer is up. Try again once it is.
    #[error("no link to {0} is up")]
    NoLink(String),
    /// Another replica has the node, and it cannot be reached.
    #[error("{node} is linked to replica {replica}, which cannot be reached: {why}")]
    Replica { node: String, replica: String, why: String },
    /// The link has ended meanwhile. Try again once another is up.
    #[error("the link is gone")]
    LinkGone,
    /// Names and headers are bounded: the caller's mistake.
    #[error("a StreamOpen of {0} bytes; at most {OPEN_MAX} are allowed")]
    TooLong(usize),
    /// The peer said no.
    #[error("refused by the peer: {message}")]
    Refused { code: StreamCode, message: String },
    /// The peer did not answer in time, or too many Streams are open.
    #[error("the peer did not answer in time, or too many streams are open")]
    NoAnswer,
    /// The peer's answer makes no sense.
    #[error("the peer's answer makes no sense")]
    Malformed,
}

/// The links of a process that are up, and their Streams.
#[derive(Debug, Default)]
pub struct Links {
    up: Mutex<Up>,
    changed: Notify,
    takers: Mutex<BTreeMap<String, StreamSink>>,
}

#[derive(Debug, Default)]
struct Up {
    /// The newest is the last.
    links: BTreeMap<SessionId, LinkHandle>,
    /// The newest link of each name, and how many there are: more than one while one takes over from another.
    names: HashMap<Arc<str>, (SessionId, usize)>,
}

impl Links {
    /// Opens a Stream over the newest link to this peer. See [`LinkHandle::open_stream`].
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(&self, peer: &str, open: &StreamOpen) -> Result<ByteStream, OpenError> {
        let link = self.find(peer).ok_or_else(|| OpenError::NoLink(peer.to_owned()))?;
        link.open_stream(open).await
    }

    /// Opens a Stream to whoever takes its kind in this process, as if the peer of this name had opened it: over no
    /// link, so also where none is up. Waits at most [`ANSWER_PATIENCE`].
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open_here(&self, peer: Peer, open: StreamOpen) -> Result<ByteStream, OpenError> {
        let (near, far) = tokio::io::duplex(HERE_BYTES);
        self.hand(IncomingStream { peer, open, stream: here(far) }).await;
        timeout(ANSWER_PATIENCE, taken_up(here(near))).await.unwrap_or(Err(OpenError::NoAnswer))
    }

    /// Takes the Streams of this kind that peers open, over every link of this process. At most `waiting`
    /// wait to be received, more are refused as busy. Dropping the receiver ends it; a later call takes over
    /// from an earlier one.
    #[must_use]
    pub fn accept(&self, kind: &str, waiting: usize) -> mpsc::Receiver<IncomingStream> {
        let (sink, receiver) = mpsc::channel(waiting.max(1));
        self.takers.lock().expect("no panic under this lock").insert(kind.to_owned(), sink);
        receiver
    }

    /// The newest link to the peer of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<LinkHandle> {
        let up = self.up();
        up.links.get(&up.names.get(name)?.0).cloned()
    }

    /// Any link, the newest first: a node has one hub.
    #[must_use]
    pub fn newest(&self) -> Option<LinkHandle> {
        self.up().links.last_key_value().map(|(_, link)| link.clone())
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
        let handle = LinkHandle::new(peer, transport);
        let mut up = self.up();
        let of_name = up.names.entry(Arc::clone(&handle.peer.name)).or_insert((session, 0));
        *of_name = (session, of_name.1 + 1);
        up.links.insert(session, handle);
        drop(up);
        Entry { session, links: Arc::clone(self) }
    }

    fn up(&self) -> MutexGuard<'_, Up> {
        self.up.lock().expect("no panic under this lock")
    }

    /// Hands a Stream that a peer opened to whoever takes its kind.
    async fn hand(&self, incoming: IncomingStream) {
        let taker = {
            let mut takers = self.takers.lock().expect("no panic under this lock");
            let taker = takers.get(&incoming.open.kind).filter(|sink| !sink.is_closed()).cloned();
            if taker.is_none() {
                takers.remove(&incoming.open.kind);
            }
            taker
        };
        let Some(taker) = taker else {
            let message = format!("nobody here takes streams of kind {:?}", incoming.open.kind);
            return incoming.refuse(StreamCode::UNKNOWN_KIND, message).await;
        };
        if let Err(error) = taker.try_send(incoming) {
            let (mpsc::error::TrySendError::Full(incoming) | mpsc::error::TrySendError::Closed(incoming)) =
                error;
            incoming.refuse(StreamCode::BUSY, "too many streams of this kind wait already").await;
        }
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
        {
            let mut guard = self.links.up();
            let Up { links, names } = &mut *guard;
            let Some(link) = links.remove(&self.session) else { return };
            let name = &link.peer.name;
            match names.get_mut(name) {
                Some((newest, others)) if *others > 1 => {
                    *others -= 1;
                    let older = links.iter().rev().find(|(_, link)| link.peer.name == *name);
                    *newest = older.map_or(*newest, |(session, _)| *session);
                }
                Some(_) | None => drop(names.remove(name)),
            }
            if !links.is_empty() {
                return;
            }
        }
        self.links.changed.notify_waiters();
    }
}

/// Serves a Stream that a peer has just opened: an echo to its end, another until somebody has it. The peer
/// has `patience` to say what it is for.
pub(super) async fn serve(stream: ByteStream, peer: Peer, links: &Links, patience: Duration) {
    if let Some(incoming) = received(stream, peer, patience).await {
        answered(incoming, links).await;
    }
}

/// What a Stream that a peer has just opened is for; `None`: it did not say so properly, and is gone.
pub(super) async fn received(
    mut stream: ByteStream,
    peer: Peer,
    patience: Duration,
) -> Option<IncomingStream> {
    let opened = timeout(patience, async {
        let body = read_message(&mut stream).await?;
        codec::decode::<StreamOpen>(body.into())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    });
    let code = match opened.await {
        Ok(Ok(open)) => return Some(IncomingStream { peer, open, stream }),
        Ok(Err(_)) => StreamCode::MALFORMED,
        Err(_elapsed) => StreamCode::TIMEOUT,
    };
    stream.reset(code);
    None
}

/// An echo to its end, another until somebody has it.
pub(super) async fn answered(incoming: IncomingStream, links: &Links) {
    if incoming.open.kind != ECHO {
        return links.hand(incoming).await;
    }
    // An end that goes away ends the echo, whichever it is.
    if let Ok(stream) = incoming.accept().await {
        let (mut reader, mut writer) = stream.into_split();
        if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
            drop(writer.shutdown().await);
        }
    }
}

/// Urgency of a Stream. What says none is as urgent as an event; control is not for Streams.
fn class_of(open: &StreamOpen) -> Class {
    let class = u8::try_from(open.class).ok().and_then(Class::from_u8);
    class.filter(|class| *class != Class::Control).unwrap_or(Class::Event)
}

async fn write_message(stream: &mut ByteStream, body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(body.len()).expect("messages are short");
    stream.write_all(&[&len.to_le_bytes()[..], body].concat()).await?;
    stream.flush().await
}

/// Bounded before allocation.
async fn read_message(stream: &mut ByteStream) -> io::Result<Vec<u8>> {
    let len = stream.read_u32_le().await? as usize;
    if len > OPEN_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

/// What a Stream within the process holds in each direction: a refusal fits.
const HERE_BYTES: usize = 64 << 10;

fn here(pipe: DuplexStream) -> ByteStream {
    let (reader, writer) = tokio::io::split(pipe);
    ByteStream::new(HereReader(reader), HereWriter(writer))
}

/// One end of a Stream within the process. Given up, it ends: there are no codes.
struct HereReader(ReadHalf<DuplexStream>);
struct HereWriter(WriteHalf<DuplexStream>);

impl ReadSide for HereReader {
    fn stop(&mut self, _code: StreamCode) {}
}

impl WriteSide for HereWriter {
    fn reset(&mut self, _code: StreamCode) {}
    fn set_class(&mut self, _class: Class) {}
}

impl AsyncRead for HereReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for HereWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

type Opening<'a> = Pin<Box<dyn Future<Output = Result<ByteStream, Broken>> + Send + 'a>>;

/// What a [`LinkHandle`] needs of a transport, without its type.
trait OpenStream: Send + Sync {
    fn name(&self) -> &'static str;
    fn open(&self, class: Class) -> Opening<'_>;
}

impl<T: Transport> OpenStream for T {
    fn name(&self) -> &'static str {
        T::NAME
    }

    fn open(&self, class: Class) -> Opening<'_> {
        Box::pin(self.open_stream(class))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer() -> Peer {
        Peer { name: "edge-1".into(), role: crate::core::event::Role::Node, generation: 0 }
    }

    #[tokio::test]
    async fn a_stream_within_the_process_needs_no_link_and_is_refused_where_nobody_takes_it() {
        let links = Links::default();
        let open = StreamOpen { kind: "pipe".to_owned(), ..StreamOpen::default() };
        let refused = links.open_here(peer(), open.clone()).await;
        assert!(matches!(refused, Err(OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. })));
        let mut taken = links.accept("pipe", 1);
        let taking = async {
            let mut stream = taken.recv().await.unwrap().accept().await.unwrap();
            let mut text = [0; 4];
            stream.read_exact(&mut text).await.unwrap();
            stream.write_all(&text).await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let asking = async {
            let mut stream = links.open_here(peer(), open).await.unwrap();
            stream.write_all(b"ping").await.unwrap();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).await.unwrap();
            assert_eq!(text, b"ping");
        };
        tokio::join!(taking, asking);
    }
}
