//! The receiving side of a link: bytes of a lane to events of the broker.
//!
//! Everything a peer may get wrong is judged here: the batch by codec, then the lane's class, the place of
//! control records, and every Frame, so that the core never sees a malformed one. A buffer grows with the
//! bytes that have arrived, never with the bytes that were announced.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{BufMut as _, BytesMut};
use codec::{
    Class, FrameView, Kind, Record,
    batch::{self, Prefix},
    proto::{self, control::Message},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, ReadBuf},
    sync::Notify,
};

use super::session::{Pulsed, Shared};
use crate::core::event::Event;

/// Why a reader ended before its lane did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ReadEnd {
    /// The connection or lane is gone.
    Broken,
    /// The peer is at fault.
    Protocol(String),
    /// Our broker takes no more.
    Stopped,
}

/// First allocation for a batch; it doubles while bytes arrive.
const CHUNK: usize = 16 << 10;
/// Largest control record: a decoded message may be some times its wire size.
const CONTROL_MAX: usize = 256 << 10;

/// What a batch of the control lane holds.
#[derive(Debug)]
pub(super) struct Control {
    /// Heartbeats, at most [`PULSES_MAX`]: a peer that floods loses the rest.
    pub(super) pulses: Vec<Pulsed>,
    /// What the core gets.
    pub(super) records: Vec<Record>,
    /// For the broker's budget.
    pub(super) bytes: usize,
}

/// Heartbeats of one batch that are looked at.
const PULSES_MAX: usize = 8;

/// Reads the batch that has begun on the control lane, and takes out what is the link's own.
pub(super) async fn read_control<R>(lane: &mut R, begun: Begun, shared: &Shared) -> Result<Control, ReadEnd>
where
    R: AsyncRead + Unpin,
{
    let batch = rest_of_batch(lane, begun).await?;
    let class = count_and_check(&batch, shared)?;
    if class.is_some_and(|class| class != Class::Control) {
        return Err(ReadEnd::Protocol("a batch of another class on the control stream".into()));
    }
    let bytes = batch.prefix.raw_len();
    let mut control = Control { pulses: Vec::new(), records: Vec::new(), bytes };
    for record in batch.records {
        match intercept(&record, shared)? {
            Some(pulse) if control.pulses.len() < PULSES_MAX => control.pulses.push(pulse),
            Some(_) => {}
            None => control.records.push(record),
        }
    }
    Ok(control)
}

/// Reads the lane of one class until the peer finishes it.
pub(super) async fn read_class<R>(mut lane: R, shared: Arc<Shared>, turn: Turn) -> Result<(), ReadEnd>
where
    R: AsyncRead + Unpin,
{
    let mut lane_class = None;
    while let Some(batch) = next_batch(&mut lane).await? {
        let Some(class) = count_and_check(&batch, &shared)? else {
            turn.step_aside();
            continue;
        };
        if class == Class::Control {
            return Err(ReadEnd::Protocol("control belongs on the control stream".into()));
        }
        if batch.records.iter().any(|record| record.header.kind == Kind::CONTROL) {
            return Err(ReadEnd::Protocol("a control record in another class".into()));
        }
        if *lane_class.get_or_insert(class) != class {
            return Err(ReadEnd::Protocol("two classes on one stream".into()));
        }
        turn.wait(class).await;
        hand(batch.records, batch.prefix.raw_len(), &shared).await?;
    }
    Ok(())
}

/// A batch as received.
#[derive(Debug)]
struct Batch {
    prefix: Prefix,
    records: Vec<Record>,
}

/// The first bytes of a batch.
#[derive(Debug)]
pub(super) struct Begun {
    raw: [u8; Prefix::LEN],
    have: usize,
}

impl Begun {
    /// Waits for a batch to begin; `None` at the end of the lane. Keeps nothing while it waits.
    pub(super) fn poll<R: AsyncRead + Unpin>(
        lane: &mut R,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Self>, ReadEnd>> {
        let mut raw = [0; Prefix::LEN];
        let mut buffer = ReadBuf::new(&mut raw);
        let read = ready!(Pin::new(lane).poll_read(cx, &mut buffer));
        let have = buffer.filled().len();
        Poll::Ready(match read {
            Ok(()) if have == 0 => Ok(None),
            Ok(()) => Ok(Some(Self { raw, have })),
            Err(_lost) => Err(ReadEnd::Broken),
        })
    }
}

/// The next batch of a lane, `None` at its end.
async fn next_batch<R: AsyncRead + Unpin>(lane: &mut R) -> Result<Option<Batch>, ReadEnd> {
    match poll_fn(|cx| Begun::poll(lane, cx)).await? {
        Some(begun) => rest_of_batch(lane, begun).await.map(Some),
        None => Ok(None),
    }
}

async fn rest_of_batch<R: AsyncRead + Unpin>(lane: &mut R, begun: Begun) -> Result<Batch, ReadEnd> {
    let Begun { mut raw, mut have } = begun;
    while have < raw.len() {
        match lane.read(&mut raw[have..]).await {
            Ok(0) => return Err(ReadEnd::Protocol("a stream ended inside a batch".into())),
            Ok(n) => have += n,
            Err(_lost) => return Err(ReadEnd::Broken),
        }
    }
    let malformed = |error: batch::BatchError| ReadEnd::Protocol(error.to_string());
    let prefix = Prefix::decode(&raw).map_err(malformed)?;
    let wire = read_wire(lane, prefix.wire_len()).await?;
    let records = batch::decode(&prefix, wire.freeze()).map_err(malformed)?;
    Ok(Batch { prefix, records })
}

async fn read_wire<R: AsyncRead + Unpin>(lane: &mut R, len: usize) -> Result<BytesMut, ReadEnd> {
    let mut wire = BytesMut::with_capacity(len.min(CHUNK));
    while wire.len() < len {
        let missing = len - wire.len();
        if wire.len() == wire.capacity() {
            wire.reserve(missing.min(wire.len()));
        }
        match lane.read_buf(&mut (&mut wire).limit(missing)).await {
            Ok(0) => return Err(ReadEnd::Protocol("a stream ended inside a batch".into())),
            Ok(_) => {}
            Err(_lost) => return Err(ReadEnd::Broken),
        }
    }
    Ok(wire)
}

/// The class of a batch; `None` if nothing in it is known to this version.
fn count_and_check(batch: &Batch, shared: &Shared) -> Result<Option<Class>, ReadEnd> {
    shared.note_received();
    let Some(first) = batch.records.first() else { return Ok(None) };
    let class = Class::from_u8(first.header.class)
        .ok_or_else(|| ReadEnd::Protocol(format!("class {} is unknown", first.header.class)))?;
    shared.counters.received[class as usize].count(
        batch.records.len(),
        batch.prefix.raw_len(),
        Prefix::LEN + batch.prefix.wire_len(),
    );
    for record in &batch.records {
        if matches!(record.header.kind, Kind::LIVE | Kind::LOG | Kind::PUT | Kind::TOMBSTONE) {
            FrameView::parse(&record.body).map_err(|error| ReadEnd::Protocol(error.to_string()))?;
        }
    }
    Ok(Some(class))
}

/// Gives records to the core, which may make the peer wait.
pub(super) async fn hand(records: Vec<Record>, bytes: usize, shared: &Shared) -> Result<(), ReadEnd> {
    let event = Event::LinkReceived { session: shared.session, records };
    shared.broker.send(event, bytes).await.map_err(|_stopped| ReadEnd::Stopped)
}

/// Looks at what is the link's own. Some: a heartbeat, which the core does not get.
fn intercept(record: &Record, shared: &Shared) -> Result<Option<Pulsed>, ReadEnd> {
    if record.header.kind != Kind::CONTROL {
        return Ok(None);
    }
    if record.body.len() > CONTROL_MAX {
        return Err(ReadEnd::Protocol(format!("a control record of {} bytes", record.body.len())));
    }
    let control: proto::Control = codec::decode(record.body.clone())
        .map_err(|error| ReadEnd::Protocol(format!("control record: {error}")))?;
    match control.message {
        Some(Message::Heartbeat(heartbeat)) => return Ok(Some(Pulsed::Asked { nonce: heartbeat.nonce })),
        Some(Message::HeartbeatAck(ack)) => {
            return Ok(Some(Pulsed::Answered { nonce: ack.nonce, peer_time_us: ack.time_us }));
        }
        Some(Message::Welcome(_)) => shared.note_welcome(),
        Some(Message::Refusal(refusal)) => shared.note_refusal(refusal),
        Some(Message::Drain(drain)) => {
            shared.note_retry_after(Duration::from_millis(u64::from(drain.retry_after_ms)));
        }
        Some(Message::Hello(_)) => shared.greeted.store(true, Relaxed),
        Some(Message::Ack(_) | Message::Presence(_) | Message::Fence(_) | Message::Forwards(_)) | None => {}
    }
    Ok(None)
}

/// Keeps the order of a class over two lanes: a lane that succeeds another of its class may be read while
/// the rest of its predecessor still waits for the broker. A lane has its turn when every older one has
/// ended or is known to be of another class.
#[derive(Debug, Default)]
pub(super) struct Turns {
    lanes: Mutex<BTreeMap<u64, Option<Class>>>,
    changed: Notify,
}

/// A lane's place in the order. Dropped when the lane has ended.
#[derive(Debug)]
pub(super) struct Turn {
    number: u64,
    turns: Arc<Turns>,
}

impl Turns {
    /// The place of the next lane; called in the order in which lanes were opened.
    pub(super) fn enter(self: &Arc<Self>) -> Turn {
        let mut lanes = self.lanes.lock().expect("no panic under this lock");
        let number = lanes.last_key_value().map_or(0, |(last, _)| last + 1);
        lanes.insert(number, None);
        Turn { number, turns: Arc::clone(self) }
    }
}

impl Turn {
    pub(super) async fn wait(&self, class: Class) {
        let mut changed = std::pin::pin!(self.turns.changed.notified());
        loop {
            changed.as_mut().enable();
            if self.is_next(class) {
                return;
            }
            changed.as_mut().await;
            changed.set(self.turns.changed.notified());
        }
    }

    /// Only records of unknown kinds so far: nobody has to wait for this lane.
    fn step_aside(&self) {
        let nobodys = Some(Class::Control);
        self.turns.lanes.lock().expect("no panic under this lock").insert(self.number, nobodys);
        self.turns.changed.notify_waiters();
    }

    fn is_next(&self, class: Class) -> bool {
        let mut lanes = self.turns.lanes.lock().expect("no panic under this lock");
        if lanes.insert(self.number, Some(class)) != Some(Some(class)) {
            self.turns.changed.notify_waiters();
        }
        !lanes.range(..self.number).any(|(_, older)| older.is_none_or(|older| older == class))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.lanes.lock().expect("no panic under this lock").remove(&self.number);
        self.turns.changed.notify_waiters();
    }
}
