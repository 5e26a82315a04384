//! One link from its control stream's opening to its end.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use codec::{
    Class, Record,
    proto::{self, control::Message},
};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    Broken, CloseCode, Closed, Counters, Ended, Link, LinkEnd, Progress, Transport, control_record,
    heartbeat::{Activity, Beat, Pulse},
    reader::{self, ReadEnd, Turns},
    stream::{self, StreamCode},
    writer::{self, Queue},
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
    let opened = timeout(link.params.handshake, transport.control(link.dialler)).await;
    let Ok(Ok(control)) = opened else {
        let end = match opened {
            Err(_elapsed) => LinkEnd::Lost("the control stream was not opened in time".into()),
            Ok(_) => lost(transport.closed().await),
        };
        return finish(&transport, &link, end, &Farewell::default());
    };
    let (session, outbox) = link.broker.open_session();
    let open = LinkOpen { session, peer: link.peer.clone(), dialler: link.dialler };
    if link.broker.send(Event::LinkOpened(open), 0).await.is_err() {
        return finish(&transport, &link, LinkEnd::Internal, &Farewell::default());
    }
    let _listed = link.links.enter(session, link.peer.clone(), transport.clone());
    link.counters.up.fetch_add(1, Relaxed);
    let mut running = Running::start(&transport, &link, session, control);
    let end = running.until_end(outbox).await;
    let farewell = running.shared.farewell.lock().expect("no panic under this lock").clone();
    link.counters.up.fetch_sub(1, Relaxed);
    // The broker has stopped: then it needs no telling.
    drop(link.broker.send(Event::LinkClosed { session }, 0).await);
    finish(&transport, &link, end, &farewell)
}

fn finish<T: Transport>(transport: &T, link: &Link, end: LinkEnd, farewell: &Farewell) -> Ended {
    transport.close(end.code(), &end.to_string());
    link.counters.count_end(end.as_str());
    tracing::info!(peer = %link.peer.name, dialler = link.dialler, %end, "link closed");
    Ended {
        end,
        refusal: farewell.refusal.clone(),
        retry_after: farewell.retry_after,
        welcomed: link.progress.borrow().welcomed,
    }
}

/// What a link's tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) broker: Handle,
    pub(super) session: SessionId,
    pub(super) counters: Arc<Counters>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) pulses: mpsc::Sender<Pulsed>,
    /// The peer has said Hello.
    pub(super) greeted: AtomicBool,
    /// The control reader waits for the broker: silence is ours, not the peer's.
    pub(super) handing: AtomicBool,
    started: Instant,
    /// Milliseconds after `started`.
    sent_ms: AtomicU64,
    received_ms: AtomicU64,
    farewell: Mutex<Farewell>,
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

    pub(super) fn note_refusal(&self, refusal: proto::Refusal) {
        let mut farewell = self.farewell.lock().expect("no panic under this lock");
        if refusal.retry_after_ms > 0 {
            farewell.retry_after = Some(Duration::from_millis(u64::from(refusal.retry_after_ms)));
        }
        farewell.refusal = Some(refusal);
    }

    pub(super) fn note_retry_after(&self, after: Duration) {
        self.farewell.lock().expect("no panic under this lock").retry_after = Some(after);
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

/// How one of the link's tasks ended.
#[derive(Debug)]
enum Done {
    Control(Result<(), ReadEnd>),
    Class(Result<(), ReadEnd>),
    Writer(Class, Result<(), Broken>),
    Stream,
}

/// A link that is up.
struct Running<'a, T> {
    transport: &'a T,
    link: &'a Link,
    shared: Arc<Shared>,
    /// Readers, writers and echoes. Dropped with the link, which aborts them.
    tasks: JoinSet<Done>,
    lanes: [Lane; Class::ALL.len()],
    turns: Arc<Turns>,
    pulse: Pulse,
    pulses: mpsc::Receiver<Pulsed>,
    readers: usize,
    streams: usize,
    accepting: bool,
}

#[derive(Debug, Default)]
struct Lane {
    queue: Arc<Queue>,
    open: bool,
}

impl<'a, T: Transport> Running<'a, T> {
    fn start(
        transport: &'a T,
        link: &'a Link,
        session: SessionId,
        (sender, receiver): (T::Sender, T::Receiver),
    ) -> Self {
        let (pulse_sender, pulses) = mpsc::channel(PULSES_WAITING);
        let shared = Arc::new(Shared {
            broker: link.broker.clone(),
            session,
            counters: Arc::clone(&link.counters),
            progress: link.progress.clone(),
            pulses: pulse_sender,
            greeted: AtomicBool::new(false),
            handing: AtomicBool::new(false),
            started: Instant::now(),
            sent_ms: AtomicU64::new(0),
            received_ms: AtomicU64::new(0),
            farewell: Mutex::default(),
        });
        let mut running = Self {
            transport,
            link,
            shared: Arc::clone(&shared),
            tasks: JoinSet::new(),
            lanes: Default::default(),
            turns: Arc::default(),
            pulse: Pulse::new(link.params.heartbeat, link.dialler),
            pulses,
            readers: 0,
            streams: 0,
            accepting: true,
        };
        running.lanes[Class::Control as usize].open = true;
        let queue = Arc::clone(&running.lanes[Class::Control as usize].queue);
        let writing = writer::write_lane(sender, Class::Control, queue, Arc::clone(&shared), None);
        running.tasks.spawn(async move { Done::Writer(Class::Control, writing.await) });
        running.tasks.spawn(async move { Done::Control(reader::read_control(receiver, shared).await) });
        running
    }

    async fn until_end(&mut self, mut outbox: Outbox) -> LinkEnd {
        let mut outputs = VecDeque::new();
        let mut wake_at = self.beat();
        let hello_by = self.shared.started + self.link.params.handshake;
        loop {
            let stranger = !self.link.dialler && !self.shared.greeted.load(Relaxed);
            tokio::select! {
                biased; // stop, then what ends or delays the link, then data, then time
                () = self.link.stop.cancelled() => {
                    if outbox.try_recv(&mut outputs) {
                        outputs.drain(..).for_each(|output| self.send(output));
                    }
                    self.drain().await;
                    return LinkEnd::Stopped;
                }
                Some(done) = self.tasks.join_next() => {
                    if let Some(end) = self.on_done(done).await { return end }
                }
                Some(pulsed) = self.pulses.recv() => self.on_pulsed(pulsed),
                () = outbox.recv(&mut outputs) => {
                    for output in outputs.drain(..) {
                        if let Output::Close(reason) = output {
                            self.drain().await;
                            return LinkEnd::Closed(reason);
                        }
                        self.send(output);
                    }
                }
                lane = self.transport.accept(), if self.accepting => self.on_lane(lane),
                stream = self.transport.accept_stream(), if self.accepting => self.on_stream(stream),
                () = sleep_until(hello_by), if stranger => {
                    // The reader may have seen it since this wait began.
                    if !self.shared.greeted.load(Relaxed) {
                        return LinkEnd::Protocol("no hello in time".into());
                    }
                }
                () = sleep_until(wake_at) => {}
            }
            wake_at = match self.beat_or_silent() {
                Some(wake_at) => wake_at,
                None => return LinkEnd::PeerSilent,
            };
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
        self.lanes[class as usize].queue.push(records, cost);
        self.open_lane(class);
    }

    fn open_lane(&mut self, class: Class) {
        let lane = &mut self.lanes[class as usize];
        if lane.open {
            return;
        }
        lane.open = true;
        let (queue, shared) = (Arc::clone(&lane.queue), Arc::clone(&self.shared));
        let (transport, idle) = (self.transport.clone(), self.link.params.lane_idle);
        self.tasks.spawn(async move {
            let wrote = match transport.open(class).await {
                Ok(sender) => writer::write_lane(sender, class, queue, shared, Some(idle)).await,
                Err(Broken) => Err(Broken),
            };
            Done::Writer(class, wrote)
        });
    }

    fn on_lane(&mut self, lane: Result<T::Receiver, Broken>) {
        let Ok(lane) = lane else {
            // The control reader will see it too, after the last byte that arrived.
            self.accepting = false;
            return;
        };
        self.readers += 1;
        let (shared, turn) = (Arc::clone(&self.shared), self.turns.enter());
        self.tasks.spawn(async move { Done::Class(reader::read_class(lane, shared, turn).await) });
    }

    fn on_stream(&mut self, accepted: Result<stream::ByteStream, Broken>) {
        let Ok(accepted) = accepted else {
            self.accepting = false;
            return;
        };
        if self.streams >= STREAMS_SERVED_MAX {
            return accepted.reset(StreamCode::BUSY);
        }
        self.streams += 1;
        let (peer, links) = (self.link.peer.clone(), Arc::clone(&self.link.links));
        let patience = self.link.params.handshake;
        self.tasks.spawn(async move {
            stream::serve(accepted, peer, &links, patience).await;
            Done::Stream
        });
    }

    /// Some: the link ends.
    async fn on_done(&mut self, done: Result<Done, JoinError>) -> Option<LinkEnd> {
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "a task of the link panicked");
                return Some(LinkEnd::Internal);
            }
        };
        match done {
            Done::Control(Ok(())) => {
                self.read_rest().await;
                let closed = timeout(self.link.params.drain, self.transport.closed()).await;
                let unsaid =
                    || LinkEnd::PeerClosed { code: CloseCode::DONE, reason: "no reason given".into() };
                Some(closed.map_or_else(|_elapsed| unsaid(), lost))
            }
            Done::Control(Err(ReadEnd::Broken)) => {
                let closed = timeout(self.link.params.drain, self.transport.closed()).await;
                self.read_rest().await;
                Some(closed.map_or_else(|_reset| LinkEnd::Protocol("control stream reset".into()), lost))
            }
            Done::Control(Err(ReadEnd::Protocol(what))) | Done::Class(Err(ReadEnd::Protocol(what))) => {
                Some(LinkEnd::Protocol(what))
            }
            Done::Control(Err(ReadEnd::Stopped)) | Done::Class(Err(ReadEnd::Stopped)) => {
                Some(LinkEnd::Internal)
            }
            Done::Class(Ok(()) | Err(ReadEnd::Broken)) => {
                self.readers -= 1;
                None
            }
            Done::Writer(class, Ok(())) => {
                self.lanes[class as usize].open = false;
                if !self.lanes[class as usize].queue.is_empty() {
                    self.open_lane(class);
                }
                None
            }
            // The lane stays "open": what its queue holds can no longer be sent in order. A lost connection
            // shows at the control reader; a peer that refuses one class fills the core's bound for it.
            Done::Writer(_, Err(Broken)) => None,
            Done::Stream => {
                self.streams -= 1;
                None
            }
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

    fn send_pulse(&self, message: impl FnOnce(u64) -> Message) {
        let record: Record = control_record(message(clock::wall_us()));
        self.lanes[Class::Control as usize].queue.push_pulse(record);
    }

    fn beat(&mut self) -> Instant {
        self.beat_or_silent().unwrap_or_else(Instant::now)
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
        let suspect = matches!(beat, Beat::Suspect(_));
        self.shared
            .progress
            .send_if_modified(|progress| std::mem::replace(&mut progress.suspect, suspect) != suspect);
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
        for class in Class::ALL.into_iter().skip(1) {
            self.lanes[class as usize].queue.close();
        }
        let classes = |lanes: &[Lane]| lanes[1..].iter().any(|lane| lane.open);
        if !self.wait_writers(deadline, classes).await {
            return;
        }
        self.lanes[Class::Control as usize].queue.close();
        self.wait_writers(deadline, |lanes| lanes[0].open).await;
    }

    /// True if the condition ended before the deadline.
    async fn wait_writers(&mut self, deadline: Instant, busy: impl Fn(&[Lane]) -> bool) -> bool {
        while busy(&self.lanes) {
            match timeout_at(deadline, self.tasks.join_next()).await {
                Ok(Some(Ok(Done::Writer(class, wrote)))) => {
                    self.lanes[class as usize].open = false;
                    // It was finishing an idle lane when more was queued.
                    if wrote.is_ok() && !self.lanes[class as usize].queue.is_empty() {
                        self.open_lane(class);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return false,
            }
        }
        true
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
        while self.readers > 0 {
            match timeout_at(deadline, self.tasks.join_next()).await {
                Ok(Some(Ok(Done::Class(_)))) => self.readers -= 1,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
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

/// Heartbeat records between the control reader and the link; a peer that floods waits.
const PULSES_WAITING: usize = 4;
/// Streams that the peer may have opening or echoing; transports permit no more either.
const STREAMS_SERVED_MAX: usize = 32;
/// Shortest sleep of the link's loop.
const TICK: Duration = Duration::from_millis(5);
