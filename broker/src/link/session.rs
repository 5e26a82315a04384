//! One link from its control stream's opening to its end.
//!
//! A link at rest is one task and one timer: its control lane is part of it ([`control`](super::control)), and what
//! other classes need ([`super::classes`]) is made when the first of them opens and goes with the last.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Poll, ready},
    time::Duration,
};

use codec::{
    Class, Record,
    proto::{self, control::Message},
};
use tokio::{
    task::JoinError,
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    Broken, CloseCode, Closed, Counters, Ended, Link, LinkEnd, Progress, Transport,
    classes::{self, Classes, Done},
    control::{ControlLane, News},
    control_record,
    heartbeat::{Activity, Beat, Pulse},
    reader::ReadEnd,
    stream::ByteStream,
};
use crate::{
    clock,
    core::event::{Event, LinkOpen, Output, SessionId},
    handle::{Handle, Outbox},
};

/// Runs a link on an authenticated connection until it ends, and closes the connection.
///
/// Opens the control stream, then a session of the broker ([`Event::LinkOpened`]), carries records both ways,
/// and says [`Event::LinkClosed`]. Not cancel safe: a dropped call leaves the broker's session open. To end
/// a link early, use [`Link::stop`].
pub async fn run<T: Transport>(transport: T, link: Link) -> Ended {
    // Boxed, here and below, what is no part of a link at rest: all links would be as large as their rarest state.
    let opened = Box::pin(timeout(link.params.handshake, transport.control(link.dialler))).await;
    let Ok(Ok(control)) = opened else {
        let end = match opened {
            Err(_elapsed) => LinkEnd::Lost("the control stream was not opened in time".into()),
            Ok(_) => lost(Box::pin(transport.closed()).await),
        };
        return finish(&transport, &link, end, None);
    };
    let (session, outbox) = link.broker.open_session();
    let open = LinkOpen { session, peer: link.peer.clone(), dialler: link.dialler };
    if Box::pin(link.broker.send(Event::LinkOpened(open), 0)).await.is_err() {
        return finish(&transport, &link, LinkEnd::Internal, None);
    }
    let _listed = link.links.enter(session, link.peer.clone(), transport.clone());
    link.counters.up.fetch_add(1, Relaxed);
    let mut running = Running::new(&transport, &link, session, control);
    let end = running.until_end(outbox).await;
    let shared = Arc::clone(&running.shared);
    drop(running);
    link.counters.up.fetch_sub(1, Relaxed);
    // The broker has stopped: then it needs no telling.
    drop(Box::pin(link.broker.send(Event::LinkClosed { session }, 0)).await);
    finish(&transport, &link, end, Some(&shared))
}

fn finish<T: Transport>(transport: &T, link: &Link, end: LinkEnd, shared: Option<&Shared>) -> Ended {
    transport.close(end.code(), &end.to_string());
    link.counters.count_end(end.as_str());
    if link.counters.may_say() {
        tracing::info!(peer = %link.peer.name, dialler = link.dialler, %end, "link closed");
    }
    let farewell = shared.and_then(|shared| shared.farewell.lock().expect("no panic under this lock").take());
    let Farewell { refusal, retry_after } = farewell.map(|farewell| *farewell).unwrap_or_default();
    let welcomed = shared.is_some_and(|shared| shared.welcomed.load(Relaxed));
    Ended { end, refusal, retry_after, welcomed }
}

/// What a link and the tasks of its classes share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) broker: Handle,
    pub(super) session: SessionId,
    pub(super) counters: Arc<Counters>,
    progress: Option<tokio::sync::watch::Sender<Progress>>,
    /// The peer has said Hello.
    pub(super) greeted: AtomicBool,
    /// The control lane waits for the broker: silence is ours, not the peer's.
    pub(super) handing: AtomicBool,
    /// The peer has said Welcome.
    welcomed: AtomicBool,
    started: Instant,
    /// Milliseconds after `started`.
    sent_ms: AtomicU64,
    received_ms: AtomicU64,
    farewell: Mutex<Option<Box<Farewell>>>,
}

/// A heartbeat record that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pulsed {
    Asked { nonce: u64 },
    Answered { nonce: u64, peer_time_us: u64 },
}

/// What the peer said about coming back.
#[derive(Debug, Clone, Default)]
struct Farewell {
    refusal: Option<proto::Refusal>,
    retry_after: Option<Duration>,
}

impl Shared {
    pub(super) fn note_sent(&self) {
        self.sent_ms.store(self.elapsed_ms(), Relaxed);
    }

    pub(super) fn note_received(&self) {
        self.received_ms.store(self.elapsed_ms(), Relaxed);
    }

    pub(super) fn note_welcome(&self) {
        self.welcomed.store(true, Relaxed);
        if let Some(progress) = &self.progress {
            progress.send_modify(|progress| progress.welcomed = true);
        }
    }

    fn note_suspect(&self, suspect: bool) {
        if let Some(progress) = &self.progress {
            progress
                .send_if_modified(|progress| std::mem::replace(&mut progress.suspect, suspect) != suspect);
        }
    }

    pub(super) fn note_refusal(&self, refusal: proto::Refusal) {
        let mut farewell = self.farewell.lock().expect("no panic under this lock");
        let farewell = farewell.get_or_insert_default();
        if refusal.retry_after_ms > 0 {
            farewell.retry_after = Some(Duration::from_millis(u64::from(refusal.retry_after_ms)));
        }
        farewell.refusal = Some(refusal);
    }

    pub(super) fn note_retry_after(&self, after: Duration) {
        let mut farewell = self.farewell.lock().expect("no panic under this lock");
        farewell.get_or_insert_default().retry_after = Some(after);
    }

    fn activity(&self) -> Activity {
        if self.handing.load(Relaxed) {
            self.note_received();
        }
        let at = |ms: &AtomicU64| self.started + Duration::from_millis(ms.load(Relaxed));
        Activity { sent: at(&self.sent_ms), received: at(&self.received_ms) }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A link that is up.
struct Running<'a, T: Transport> {
    transport: &'a T,
    link: &'a Link,
    shared: Arc<Shared>,
    control: ControlLane<T>,
    /// While a class has a lane, or a Stream is open.
    classes: Option<Box<Classes>>,
    pulse: Pulse,
    accepting: bool,
}

impl<'a, T: Transport> Running<'a, T> {
    fn new(transport: &'a T, link: &'a Link, session: SessionId, control: (T::Sender, T::Receiver)) -> Self {
        let shared = Arc::new(Shared {
            broker: link.broker.clone(),
            session,
            counters: Arc::clone(&link.counters),
            progress: link.progress.clone(),
            greeted: AtomicBool::new(false),
            handing: AtomicBool::new(false),
            welcomed: AtomicBool::new(false),
            started: Instant::now(),
            sent_ms: AtomicU64::new(0),
            received_ms: AtomicU64::new(0),
            farewell: Mutex::default(),
        });
        Self {
            transport,
            link,
            shared,
            control: ControlLane::new(control),
            classes: None,
            pulse: Pulse::new(link.params.heartbeat, link.dialler),
            accepting: true,
        }
    }

    async fn until_end(&mut self, mut outbox: Outbox) -> LinkEnd {
        let (transport, link) = (self.transport, self.link);
        let hello_by = self.shared.started + link.params.handshake;
        let mut outputs = VecDeque::new();
        let mut stopped = pin!(link.stop.cancelled());
        let mut lane = pin!(transport.accept());
        let mut stream = pin!(transport.accept_stream());
        let mut timer = pin!(sleep_until(self.shared.started));
        loop {
            tokio::select! {
                biased; // stop, then what ends or delays the link, then data, then time
                () = &mut stopped => {
                    if outbox.try_recv(&mut outputs) {
                        outputs.drain(..).for_each(|output| self.send(output));
                    }
                    Box::pin(self.drain()).await;
                    return LinkEnd::Stopped;
                }
                done = poll_fn(|cx| classes::poll_next_done(&mut self.classes, cx)) => {
                    if let Some(end) = self.on_done(done) { return end }
                }
                news = poll_fn(|cx| self.control.poll(&self.shared, cx)) => match news {
                    News::Pulses(pulses) => pulses.into_iter().for_each(|pulsed| self.on_pulsed(pulsed)),
                    News::ReadEnded(how) => return Box::pin(self.on_control_ended(how)).await,
                },
                () = outbox.recv(&mut outputs) => {
                    while let Some(output) = outputs.pop_front() {
                        if let Output::Close(reason) = output {
                            Box::pin(self.drain()).await;
                            return LinkEnd::Closed(reason);
                        }
                        self.send(output);
                    }
                    // A burst must not leave its high-water mark with an idle link.
                    outputs = VecDeque::new();
                }
                accepted = &mut lane, if self.accepting => {
                    lane.set(transport.accept());
                    self.on_lane(accepted);
                }
                accepted = &mut stream, if self.accepting => {
                    stream.set(transport.accept_stream());
                    self.on_stream(accepted);
                }
                () = &mut timer => {
                    let now = Instant::now();
                    if !link.dialler && now >= hello_by && !self.shared.greeted.load(Relaxed) {
                        return LinkEnd::Protocol("no hello in time".into());
                    }
                }
            }
            let Some(mut wake_at) = self.beat_or_silent() else { return LinkEnd::PeerSilent };
            if !link.dialler && !self.shared.greeted.load(Relaxed) {
                wake_at = wake_at.min(hello_by.max(Instant::now() + TICK));
            }
            // Mostly it moves away: then it is set when it has gone off.
            if timer.is_elapsed() || wake_at < timer.deadline() {
                timer.as_mut().reset(wake_at);
            }
        }
    }

    fn send(&mut self, output: Output) {
        let cost = output.cost();
        let (class, records) = match output {
            Output::Send { class, records } => (class, records),
            Output::Close(_) => return,
            Output::Deliver(_) | Output::Reply(_) | Output::State(_) => {
                tracing::error!(?output, "a link cannot carry this");
                return;
            }
        };
        if records.is_empty() {
            return;
        }
        if class == Class::Control {
            self.control.push(records, cost);
        } else {
            let (transport, shared, idle) = (self.transport, &self.shared, self.link.params.lane_idle);
            self.classes.get_or_insert_default().send(class, records, cost, transport, shared, idle);
        }
    }

    fn on_lane(&mut self, lane: Result<T::Receiver, Broken>) {
        let Ok(lane) = lane else {
            // The control lane will see it too, after the last byte that arrived.
            self.accepting = false;
            return;
        };
        self.classes.get_or_insert_default().read(lane, &self.shared);
    }

    fn on_stream(&mut self, accepted: Result<ByteStream, Broken>) {
        let Ok(accepted) = accepted else {
            self.accepting = false;
            return;
        };
        self.classes.get_or_insert_default().serve(accepted, self.link);
    }

    /// Some: the link ends.
    fn on_done(&mut self, done: Result<Done, JoinError>) -> Option<LinkEnd> {
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "a task of the link panicked");
                return Some(LinkEnd::Internal);
            }
        };
        let classes = self.classes.as_mut().expect("its task has ended");
        match done {
            Done::Reader(how) => {
                classes.reader_ended();
                match how {
                    Ok(()) | Err(ReadEnd::Broken) => {}
                    Err(ReadEnd::Protocol(what)) => return Some(LinkEnd::Protocol(what)),
                    Err(ReadEnd::Stopped) => return Some(LinkEnd::Internal),
                }
            }
            Done::Writer(class, wrote) => {
                let idle = self.link.params.lane_idle;
                classes.writer_ended(class, wrote, self.transport, &self.shared, idle);
            }
            Done::Stream => classes.stream_ended(),
        }
        if classes.are_at_rest() {
            self.classes = None;
        }
        None
    }

    async fn on_control_ended(&mut self, how: Result<(), ReadEnd>) -> LinkEnd {
        match how {
            Ok(()) => {
                self.read_rest().await;
                let closed = timeout(self.link.params.drain, self.transport.closed()).await;
                let unsaid =
                    || LinkEnd::PeerClosed { code: CloseCode::DONE, reason: "no reason given".into() };
                closed.map_or_else(|_elapsed| unsaid(), lost)
            }
            Err(ReadEnd::Broken) => {
                let closed = timeout(self.link.params.drain, self.transport.closed()).await;
                self.read_rest().await;
                closed.map_or_else(|_reset| LinkEnd::Protocol("control stream reset".into()), lost)
            }
            Err(ReadEnd::Protocol(what)) => LinkEnd::Protocol(what),
            Err(ReadEnd::Stopped) => LinkEnd::Internal,
        }
    }

    fn on_pulsed(&mut self, pulsed: Pulsed) {
        match pulsed {
            Pulsed::Asked { nonce } => {
                self.send_pulse(|time_us| Message::HeartbeatAck(proto::Heartbeat { nonce, time_us }));
            }
            Pulsed::Answered { nonce, peer_time_us } => {
                let Some(rtt) = self.pulse.on_ack(Instant::now(), nonce) else { return };
                let half_us = i128::try_from(rtt.as_micros() / 2).unwrap_or(0);
                let offset = i128::from(peer_time_us) + half_us - i128::from(clock::wall_us());
                let offset = i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX });
                self.shared.counters.measured(rtt, offset);
            }
        }
    }

    fn send_pulse(&mut self, message: impl FnOnce(u64) -> Message) {
        let record: Record = control_record(message(clock::wall_us()));
        self.control.push_pulse(record);
    }

    /// Sends a heartbeat if one is due; when to look again, `None` if the peer is silent.
    fn beat_or_silent(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let activity = self.shared.activity();
        let transport = self.transport;
        let mut beat = self.pulse.poll(now, activity, || transport.path());
        if let Beat::Send(nonce) = beat {
            self.send_pulse(|time_us| Message::Heartbeat(proto::Heartbeat { nonce, time_us }));
            beat = self.pulse.poll(now, activity, || transport.path());
        }
        self.shared.note_suspect(matches!(beat, Beat::Suspect(_)));
        match beat {
            Beat::Wait(until) | Beat::Suspect(until) => Some(until.max(now + TICK)),
            Beat::Send(_) => Some(now + TICK),
            Beat::Silent => None,
        }
    }

    /// Sends what is queued, classes first and control last: when the peer sees control's end, it has
    /// everything.
    async fn drain(&mut self) {
        let deadline = Instant::now() + self.link.params.drain;
        if let Some(classes) = &mut self.classes {
            classes.close();
        }
        if self.goes_on(deadline, |link| link.classes.as_ref().is_none_or(|classes| !classes.write())).await {
            self.control.close();
            self.goes_on(deadline, |link| link.control.has_written()).await;
        }
    }

    /// Goes on in all lanes until it is done, at most until the deadline. True: it is done.
    async fn goes_on(&mut self, deadline: Instant, is_done: impl Fn(&Self) -> bool) -> bool {
        let going_on = poll_fn(|cx| {
            loop {
                // The peer's heartbeats go unanswered now, and its end is ours.
                while self.control.poll(&self.shared, cx).is_ready() {}
                if is_done(self) {
                    return Poll::Ready(());
                }
                let done = ready!(classes::poll_next_done(&mut self.classes, cx));
                // So do its mistakes.
                drop(self.on_done(done));
            }
        });
        timeout_at(deadline, going_on).await.is_ok()
    }

    /// The peer has finished: what it sent in other classes before is in the transport or was lost.
    async fn read_rest(&mut self) {
        let deadline = Instant::now() + self.link.params.drain;
        while self.accepting {
            match timeout_at(deadline.min(Instant::now() + TICK), self.transport.accept()).await {
                Ok(lane) => self.on_lane(lane),
                Err(_none) => break,
            }
        }
        let is_read = |link: &Self| link.classes.as_ref().is_none_or(|classes| !classes.read_on());
        self.goes_on(deadline, is_read).await;
    }
}

fn lost(closed: Closed) -> LinkEnd {
    match closed {
        Closed::ByPeer { code, reason } => LinkEnd::PeerClosed { code, reason },
        Closed::ByUs => LinkEnd::Stopped,
        Closed::Protocol(what) => LinkEnd::Protocol(what),
        Closed::Lost(what) => LinkEnd::Lost(what),
    }
}

/// Shortest sleep of the link's loop.
const TICK: Duration = Duration::from_millis(5);
