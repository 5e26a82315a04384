//! The lanes of a multiplexed connection: who may send what, in which order, and what was received.
//! Synchronous, without socket or clock, so that a fuzzer can drive it.
//!
//! Lane 0 is control, in both directions from the start. Lanes 1 to 5 are the classes, each direction for
//! itself. Lanes from [`STREAMS_FROM`] are Streams, both ways at once; the dialler opens the even ones, the
//! acceptor the odd ones. A direction of a lane begins with its first bytes and is over when the receiver
//! has said `ENDED`; then the number may be used again.
//!
//! # Invariants
//! - A lane holds at most [`WINDOW`] unread bytes: a peer that sends more is at fault. So the connection is
//!   always read, and no lane stops another.
//! - What is owed to the peer (credit, ends) is kept as a mark on the lane, not as a message, so that a peer
//!   which makes us owe much makes us keep nothing.
//! - Of what waits, the highest rank goes first; lanes of one rank take turns. All but control stay within
//!   the bound of [`DelayBound`], so that control never waits behind a queue that the line cannot empty.

use std::{
    collections::{BTreeMap, VecDeque},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use codec::Class;
use tokio::time::Instant;

use super::{
    super::{Closed, delay::DelayBound},
    fragment::{BODY_MAX, Fragment, HEADER, Says},
};

/// Unread bytes of one direction of a lane.
pub(in crate::link) const WINDOW: usize = 128 << 10;
/// Credit is given back in steps of this.
const CREDIT_STEP: usize = WINDOW / 4;
/// Bytes of a lane that wait to be sent before its writer has to; a batch more may.
const QUEUE_MAX: usize = 16 << 10;
/// Streams that each side may have opened at a time.
pub(in crate::link) const STREAMS_MAX: usize = 32;
const STREAMS_FROM: u8 = 16;
const CONTROL: u8 = Class::Control as u8;
/// Classes, and Streams of each class behind it.
const RANKS: usize = 2 * Class::ALL.len();
/// An idle lane keeps no larger buffer.
const BUFFER_KEPT: usize = 4 << 10;
/// Time on the line that one fragment may take: control waits for it.
const FRAGMENT_TIME: Duration = Duration::from_millis(25);
const FRAGMENT_MIN: usize = 1 << 10;
/// A ping goes out behind this many bytes.
const PING_EVERY: u64 = 4 << 10;

/// One direction of one use of a lane number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LaneId {
    pub(super) lane: u8,
    serial: u64,
}

/// Why a lane gives or takes no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The peer reset it, or asks for no more.
    Reset(u32),
    /// The connection is gone.
    Broken,
}

/// The sending direction.
#[derive(Debug)]
struct Out {
    serial: u64,
    rank: usize,
    queue: VecDeque<(Bytes, bool)>,
    queued: usize,
    credit: usize,
    ready: bool,
    /// The peer has seen it.
    announced: bool,
    end: OutEnd,
    /// The peer asked for no more.
    stopped: Option<u32>,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OutEnd {
    Open,
    FinQueued,
    FinSent,
    ResetQueued(u32),
    ResetSent,
}

/// The receiving direction.
#[derive(Debug)]
struct In {
    serial: u64,
    buffer: BytesMut,
    /// What the peer may still send.
    granted: usize,
    /// Credit not yet given back.
    consumed: usize,
    end: Option<InEnd>,
    /// Nobody reads: what comes is dropped.
    discarding: bool,
    stop_owed: Option<u32>,
    ended_owed: bool,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InEnd {
    Fin,
    Reset(u32),
}

/// All lanes of one connection.
#[derive(Debug)]
pub(super) struct State {
    dialler: bool,
    outs: BTreeMap<u8, Out>,
    ins: BTreeMap<u8, In>,
    serial: u64,
    owing: VecDeque<u8>,
    ready: [VecDeque<u8>; RANKS],
    accepted_lanes: VecDeque<LaneId>,
    accepted_streams: VecDeque<(LaneId, LaneId)>,
    next_stream: u8,
    flight: Flight,
    /// Waits for accepted lanes, Streams, control, or room for a Stream.
    waiting: Vec<Waker>,
    closed: Option<Closed>,
    /// There may be something to send that was not there before.
    kick: bool,
}

/// What is on its way.
#[derive(Debug)]
struct Flight {
    bound: DelayBound,
    sent: u64,
    acked: u64,
    pinged: u64,
    pings: VecDeque<(u64, Instant)>,
    /// Something waited for the bound since the last answer.
    limited: bool,
    rtt: Duration,
}

/// Pings on their way; a peer that answers none gets no more.
const PINGS_MAX: usize = 256;

impl State {
    pub(super) fn new(dialler: bool, now: Instant) -> Self {
        let mut state = Self {
            dialler,
            outs: BTreeMap::new(),
            ins: BTreeMap::new(),
            serial: 0,
            owing: VecDeque::new(),
            ready: Default::default(),
            accepted_lanes: VecDeque::new(),
            accepted_streams: VecDeque::new(),
            next_stream: STREAMS_FROM + u8::from(!dialler),
            flight: Flight {
                bound: DelayBound::new(now),
                sent: 0,
                acked: 0,
                pinged: 0,
                pings: VecDeque::new(),
                limited: false,
                rtt: Duration::ZERO,
            },
            waiting: Vec::new(),
            closed: None,
            kick: false,
        };
        state.add_out(CONTROL, 0);
        state.add_in(CONTROL);
        state
    }

    // What the connection's task asks.

    /// Takes a message of the peer.
    pub(super) fn receive(&mut self, message: Bytes) -> Result<(), &'static str> {
        let Fragment { lane, says } = Fragment::parse(message)?;
        match says {
            Says::Data { body, last, fin } => self.on_data(lane, &body, last, fin),
            Says::Reset(code) => self.on_reset(lane, code),
            Says::Stop(code) => {
                let out = self.outs.get_mut(&lane).ok_or("STOP of a lane that is not open")?;
                if matches!(out.end, OutEnd::Open | OutEnd::FinQueued) {
                    out.stopped = Some(code);
                    out.give_up(code);
                    self.note_owing(lane);
                }
                Ok(())
            }
            Says::Credit(bytes) => {
                let out = self.outs.get_mut(&lane).ok_or("credit for a lane that is not open")?;
                out.credit = out.credit.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
                if out.credit > WINDOW {
                    return Err("more credit than a window");
                }
                self.note_ready(lane);
                Ok(())
            }
            Says::Ended => {
                let out = self.outs.get_mut(&lane).ok_or("the end of a lane that is not open")?;
                if !matches!(out.end, OutEnd::FinSent | OutEnd::ResetSent) {
                    return Err("the end of a lane that has not ended");
                }
                out.wake();
                self.outs.remove(&lane);
                self.wake_waiting();
                Ok(())
            }
        }
    }

    fn on_data(&mut self, lane: u8, body: &Bytes, last: bool, fin: bool) -> Result<(), &'static str> {
        self.expect_in(lane)?;
        let incoming = self.ins.get_mut(&lane).expect("just made sure");
        if incoming.end.is_some() {
            return Err("data behind the end of its lane");
        }
        incoming.granted = incoming.granted.checked_sub(body.len()).ok_or("more than the window allows")?;
        if !incoming.discarding {
            incoming.buffer.extend_from_slice(body);
        }
        if fin {
            incoming.end = Some(InEnd::Fin);
            incoming.ended_owed = incoming.discarding;
        }
        // One wake for a batch, unless it is longer than what may wait.
        if last || fin || incoming.buffer.len() >= WINDOW / 2 {
            incoming.wake();
        }
        let owes = incoming.ended_owed;
        if owes {
            self.note_owing(lane);
        }
        if lane == CONTROL {
            self.wake_waiting();
        }
        Ok(())
    }

    fn on_reset(&mut self, lane: u8, code: u32) -> Result<(), &'static str> {
        let incoming = self.ins.get_mut(&lane).ok_or("the reset of a lane that is not open")?;
        if incoming.end.is_some() {
            return Err("a reset behind the end of its lane");
        }
        incoming.end = Some(InEnd::Reset(code));
        incoming.buffer = BytesMut::new();
        // Otherwise once the reader knows why.
        incoming.ended_owed = incoming.discarding;
        incoming.wake();
        self.note_owing(lane);
        Ok(())
    }

    /// Makes sure that the lane is known, or one that the peer may open now.
    fn expect_in(&mut self, lane: u8) -> Result<(), &'static str> {
        if self.ins.contains_key(&lane) {
            return Ok(());
        }
        let is_class = Class::from_u8(lane).is_some_and(|class| class != Class::Control);
        if is_class {
            let id = self.add_in(lane);
            self.accepted_lanes.push_back(id);
        } else if lane >= STREAMS_FROM && !self.is_ours(lane) && !self.outs.contains_key(&lane) {
            if self.open_streams(false) >= STREAMS_MAX {
                return Err("more Streams than allowed");
            }
            let reading = self.add_in(lane);
            let writing = self.add_out(lane, stream_rank(Class::Event));
            self.outs.get_mut(&lane).expect("just added").announced = true;
            self.accepted_streams.push_back((reading, writing));
        } else {
            return Err("a lane that may not be opened");
        }
        self.wake_waiting();
        Ok(())
    }

    /// The next message, by urgency. `None`: nothing may be sent now.
    pub(super) fn next_fragment(&mut self) -> Option<Bytes> {
        while let Some(&lane) = self.owing.front() {
            if let Some(says) = self.owed(lane) {
                return Some(Fragment { lane, says }.encode());
            }
            self.owing.pop_front();
        }
        for rank in 0..RANKS {
            while let Some(&lane) = self.ready[rank].front() {
                let max = if rank == 0 { BODY_MAX } else { self.fragment_max() };
                let held = rank > 0 && !self.flight.has_room();
                let Some(out) = self.outs.get_mut(&lane).filter(|out| out.ready && out.rank == rank) else {
                    self.ready[rank].pop_front();
                    continue;
                };
                if held {
                    self.flight.limited = true;
                    return None;
                }
                self.ready[rank].pop_front();
                out.ready = false;
                let Some(says) = out.take(max) else { continue };
                let announced = std::mem::replace(&mut out.announced, true);
                if !announced {
                    self.note_owing(lane);
                }
                self.note_ready(lane);
                let message = Fragment { lane, says }.encode();
                self.flight.sent += message.len() as u64;
                return Some(message);
            }
        }
        None
    }

    /// Bytes that may wait in the socket's buffers, where priority is over.
    pub(super) fn fragment_max(&self) -> usize {
        let rate = self.flight.bound.rate();
        if rate == 0 {
            return BODY_MAX;
        }
        let bytes = u128::from(rate) * FRAGMENT_TIME.as_micros() / 1_000_000;
        usize::try_from(bytes).unwrap_or(BODY_MAX).clamp(FRAGMENT_MIN, BODY_MAX - HEADER)
    }

    /// A ping that is due behind what was sent: its payload.
    pub(super) fn ping_due(&mut self, now: Instant) -> Option<[u8; 8]> {
        let flight = &mut self.flight;
        let due = flight.sent - flight.pinged >= PING_EVERY
            || (flight.sent > flight.pinged && flight.pings.is_empty());
        if !due || flight.pings.len() >= PINGS_MAX {
            return None;
        }
        flight.pinged = flight.sent;
        flight.pings.push_back((flight.sent, now));
        Some(flight.sent.to_le_bytes())
    }

    /// The answer to a ping. One answer may stand for several.
    pub(super) fn on_pong(&mut self, now: Instant, payload: &[u8]) {
        let Ok(sent) = payload.try_into().map(u64::from_le_bytes) else { return };
        let flight = &mut self.flight;
        let Some(at) = flight.pings.iter().position(|(number, _)| *number == sent) else { return };
        let (_, asked) = flight.pings[at];
        flight.pings.drain(..=at);
        let rtt = now.saturating_duration_since(asked);
        flight.rtt = if flight.rtt.is_zero() { rtt } else { (7 * flight.rtt + rtt) / 8 };
        let acked = sent - flight.acked;
        flight.acked = sent;
        let limited = std::mem::take(&mut flight.limited);
        flight.bound.on_ack(now, rtt, acked, limited);
        self.kick = true;
    }

    /// Whether the connection's task has to look again.
    pub(super) fn take_kick(&mut self) -> bool {
        std::mem::take(&mut self.kick)
    }

    pub(super) fn rtt(&self) -> Duration {
        self.flight.rtt
    }

    /// Nothing is sent or received any more; what was received can still be read.
    pub(super) fn close(&mut self, why: Closed) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some(why);
        self.kick = true;
        self.outs.values_mut().for_each(Out::wake);
        self.ins.values_mut().for_each(In::wake);
        self.wake_waiting();
    }

    pub(super) fn closed(&self) -> Option<&Closed> {
        self.closed.as_ref()
    }

    // What the ends of lanes ask.

    /// Both directions of control, for the acceptor once the peer has written.
    pub(super) fn poll_control(&mut self, cx: &Context<'_>) -> Poll<Result<(LaneId, LaneId), Ended>> {
        let (Some(incoming), Some(out)) = (self.ins.get(&CONTROL), self.outs.get(&CONTROL)) else {
            return Poll::Ready(Err(Ended::Broken));
        };
        let begun = !incoming.buffer.is_empty() || incoming.end.is_some();
        if self.dialler || begun {
            let id = |serial| LaneId { lane: CONTROL, serial };
            return Poll::Ready(Ok((id(out.serial), id(incoming.serial))));
        }
        self.park(cx)
    }

    /// The sending direction of a class; waits for the end of the one before.
    pub(super) fn poll_open(&mut self, cx: &Context<'_>, class: Class) -> Poll<Result<LaneId, Ended>> {
        let lane = class as u8;
        if self.closed.is_none() && !self.outs.contains_key(&lane) {
            return Poll::Ready(Ok(self.add_out(lane, 2 * class as usize)));
        }
        self.park(cx)
    }

    pub(super) fn poll_accept(&mut self, cx: &Context<'_>) -> Poll<Result<LaneId, Ended>> {
        match self.accepted_lanes.pop_front() {
            Some(id) => Poll::Ready(Ok(id)),
            None => self.park(cx),
        }
    }

    /// A new Stream: reading and writing direction. Waits while this side has [`STREAMS_MAX`].
    pub(super) fn poll_open_stream(
        &mut self,
        cx: &Context<'_>,
        class: Class,
    ) -> Poll<Result<(LaneId, LaneId), Ended>> {
        if self.closed.is_some() || self.open_streams(true) >= STREAMS_MAX {
            return self.park(cx);
        }
        let mut lane = self.next_stream;
        while self.outs.contains_key(&lane) || self.ins.contains_key(&lane) {
            lane = following(lane);
        }
        self.next_stream = following(lane);
        Poll::Ready(Ok((self.add_in(lane), self.add_out(lane, stream_rank(class)))))
    }

    pub(super) fn poll_accept_stream(&mut self, cx: &Context<'_>) -> Poll<Result<(LaneId, LaneId), Ended>> {
        match self.accepted_streams.pop_front() {
            Some(ids) => Poll::Ready(Ok(ids)),
            None => self.park(cx),
        }
    }

    /// Room for more of this lane.
    pub(super) fn poll_room(&mut self, cx: &Context<'_>, id: LaneId) -> Poll<Result<(), Ended>> {
        let closed = self.closed.is_some();
        let Some(out) = self.out(id).filter(|_| !closed) else { return Poll::Ready(Err(Ended::Broken)) };
        if let Some(code) = out.stopped {
            return Poll::Ready(Err(Ended::Reset(code)));
        }
        if out.end != OutEnd::Open {
            return Poll::Ready(Err(Ended::Broken));
        }
        if out.queued < QUEUE_MAX {
            return Poll::Ready(Ok(()));
        }
        out.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Queues bytes; `last`: they end a batch. Ask [`poll_room`](Self::poll_room) first.
    pub(super) fn push(&mut self, id: LaneId, bytes: Bytes, last: bool) {
        if bytes.is_empty() {
            return;
        }
        let Some(out) = self.out(id) else { return };
        out.queued += bytes.len();
        out.queue.push_back((bytes, last));
        self.note_ready(id.lane);
    }

    /// Nothing follows on this lane.
    pub(super) fn fin(&mut self, id: LaneId) {
        if let Some(out) = self.out(id).filter(|out| out.end == OutEnd::Open) {
            out.end = OutEnd::FinQueued;
            self.note_ready(id.lane);
        }
    }

    /// Waits until the peer has the end of this lane.
    pub(super) fn poll_ended(&mut self, cx: &Context<'_>, id: LaneId) -> Poll<Result<(), Ended>> {
        let closed = self.closed.is_some();
        match self.out(id) {
            None => Poll::Ready(Ok(())),
            Some(out) if out.stopped.is_some() || closed => Poll::Ready(Err(Ended::Broken)),
            Some(out) => {
                out.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Gives a sending direction up.
    pub(super) fn reset(&mut self, id: LaneId, code: u32) {
        let Some(out) = self.out(id) else { return };
        if !matches!(out.end, OutEnd::Open | OutEnd::FinQueued) {
            return;
        }
        if out.announced {
            out.give_up(code);
            self.note_owing(id.lane);
        } else {
            // The peer has never heard of it.
            self.outs.remove(&id.lane);
            if id.lane >= STREAMS_FROM
                && let Some(mut incoming) = self.ins.remove(&id.lane)
            {
                incoming.wake();
            }
            self.wake_waiting();
        }
    }

    /// Another urgency for a Stream.
    pub(super) fn set_class(&mut self, id: LaneId, class: Class) {
        if let Some(out) = self.out(id) {
            out.rank = stream_rank(class);
            out.ready = false;
            self.note_ready(id.lane);
        }
    }

    /// Bytes that were received, at most as many as `into` takes; 0 at the end.
    pub(super) fn poll_read(
        &mut self,
        cx: &Context<'_>,
        id: LaneId,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<Result<(), Ended>> {
        let closed = self.closed.is_some();
        let Some(incoming) = self.incoming(id) else { return Poll::Ready(Err(Ended::Broken)) };
        if !incoming.buffer.is_empty() {
            let n = incoming.buffer.len().min(into.remaining());
            into.put_slice(&incoming.buffer[..n]);
            incoming.buffer.advance(n);
            if incoming.buffer.is_empty() && incoming.buffer.capacity() > BUFFER_KEPT {
                incoming.buffer = BytesMut::new();
            }
            incoming.consumed += n;
            if incoming.consumed >= CREDIT_STEP && incoming.end.is_none() {
                self.note_owing(id.lane);
            }
            return Poll::Ready(Ok(()));
        }
        match incoming.end {
            Some(InEnd::Fin) => {
                incoming.ended_owed = true;
                self.note_owing(id.lane);
                Poll::Ready(Ok(()))
            }
            Some(InEnd::Reset(code)) => {
                incoming.ended_owed = true;
                self.note_owing(id.lane);
                Poll::Ready(Err(Ended::Reset(code)))
            }
            None if closed => Poll::Ready(Err(Ended::Broken)),
            None => {
                incoming.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Nobody reads this direction any more.
    pub(super) fn stop(&mut self, id: LaneId, code: u32) {
        let Some(incoming) = self.incoming(id) else { return };
        if incoming.discarding {
            return;
        }
        incoming.discarding = true;
        incoming.buffer = BytesMut::new();
        match incoming.end {
            Some(_) => incoming.ended_owed = true,
            None => incoming.stop_owed = Some(code),
        }
        self.note_owing(id.lane);
    }

    // Parts of the above.

    /// What is owed to the peer about this lane.
    fn owed(&mut self, lane: u8) -> Option<Says> {
        let known = lane < STREAMS_FROM || self.outs.get(&lane).is_none_or(|out| out.announced);
        if let Some(incoming) = self.ins.get_mut(&lane).filter(|_| known) {
            if let Some(code) = incoming.stop_owed.take().filter(|_| incoming.end.is_none()) {
                return Some(Says::Stop(code));
            }
            if incoming.consumed >= CREDIT_STEP && incoming.end.is_none() && !incoming.discarding {
                let bytes = std::mem::take(&mut incoming.consumed);
                incoming.granted += bytes;
                return Some(Says::Credit(u32::try_from(bytes).expect("at most a window")));
            }
            if incoming.ended_owed {
                self.ins.remove(&lane);
                self.wake_waiting();
                return Some(Says::Ended);
            }
        }
        let out = self.outs.get_mut(&lane)?;
        let OutEnd::ResetQueued(code) = out.end else { return None };
        out.end = OutEnd::ResetSent;
        Some(Says::Reset(code))
    }

    fn note_owing(&mut self, lane: u8) {
        self.kick = true;
        if !self.owing.contains(&lane) {
            self.owing.push_back(lane);
        }
    }

    fn note_ready(&mut self, lane: u8) {
        let Some(out) = self.outs.get_mut(&lane).filter(|out| !out.ready && out.is_sendable()) else {
            return;
        };
        out.ready = true;
        self.ready[out.rank].push_back(lane);
        self.kick = true;
    }

    fn add_out(&mut self, lane: u8, rank: usize) -> LaneId {
        self.serial += 1;
        let serial = self.serial;
        let out = Out {
            serial,
            rank,
            queue: VecDeque::new(),
            queued: 0,
            credit: WINDOW,
            ready: false,
            announced: lane < STREAMS_FROM && lane == CONTROL,
            end: OutEnd::Open,
            stopped: None,
            waker: None,
        };
        self.outs.insert(lane, out);
        LaneId { lane, serial }
    }

    fn add_in(&mut self, lane: u8) -> LaneId {
        self.serial += 1;
        let serial = self.serial;
        let incoming = In {
            serial,
            buffer: BytesMut::new(),
            granted: WINDOW,
            consumed: 0,
            end: None,
            discarding: false,
            stop_owed: None,
            ended_owed: false,
            waker: None,
        };
        self.ins.insert(lane, incoming);
        LaneId { lane, serial }
    }

    fn out(&mut self, id: LaneId) -> Option<&mut Out> {
        self.outs.get_mut(&id.lane).filter(|out| out.serial == id.serial)
    }

    fn incoming(&mut self, id: LaneId) -> Option<&mut In> {
        self.ins.get_mut(&id.lane).filter(|incoming| incoming.serial == id.serial)
    }

    fn is_ours(&self, lane: u8) -> bool {
        lane.is_multiple_of(2) == self.dialler
    }

    /// Streams that one side opened and that have not ended both ways.
    fn open_streams(&self, ours: bool) -> usize {
        let lanes = self.outs.range(STREAMS_FROM..).map(|(lane, _)| *lane);
        let reading = self.ins.range(STREAMS_FROM..).map(|(lane, _)| *lane);
        let only_reading = reading.filter(|lane| !self.outs.contains_key(lane));
        lanes.chain(only_reading).filter(|lane| self.is_ours(*lane) == ours).count()
    }

    fn park<T>(&mut self, cx: &Context<'_>) -> Poll<Result<T, Ended>> {
        if self.closed.is_some() {
            return Poll::Ready(Err(Ended::Broken));
        }
        if !self.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn wake_waiting(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }
}

fn stream_rank(class: Class) -> usize {
    2 * class as usize + 1
}

fn following(lane: u8) -> u8 {
    lane.checked_add(2).unwrap_or(STREAMS_FROM + lane % 2)
}

impl Out {
    fn is_sendable(&self) -> bool {
        match self.end {
            OutEnd::Open => !self.queue.is_empty() && self.credit > 0,
            OutEnd::FinQueued => self.queue.is_empty() || self.credit > 0,
            OutEnd::FinSent | OutEnd::ResetQueued(_) | OutEnd::ResetSent => false,
        }
    }

    /// At most `max` bytes of one batch; the end of the lane with its last.
    fn take(&mut self, max: usize) -> Option<Says> {
        if !self.is_sendable() {
            return None;
        }
        let mut room = max.min(self.credit);
        let mut body = BytesMut::with_capacity(room.min(self.queued));
        let mut last = false;
        while room > 0 && !last {
            let Some((bytes, ends_batch)) = self.queue.front_mut() else { break };
            let part = bytes.split_to(bytes.len().min(room));
            room -= part.len();
            body.extend_from_slice(&part);
            if bytes.is_empty() {
                last = *ends_batch;
                self.queue.pop_front();
            }
        }
        self.queued -= body.len();
        self.credit -= body.len();
        if self.queued < QUEUE_MAX {
            self.wake();
        }
        let fin = self.end == OutEnd::FinQueued && self.queue.is_empty();
        if fin {
            self.end = OutEnd::FinSent;
        }
        Some(Says::Data { body: body.freeze(), last, fin })
    }

    fn give_up(&mut self, code: u32) {
        self.queue.clear();
        self.queued = 0;
        self.end = OutEnd::ResetQueued(code);
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl In {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Flight {
    fn has_room(&self) -> bool {
        self.sent - self.acked < self.bound.bytes()
    }
}
