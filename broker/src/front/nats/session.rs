//! One client's session: operations in, events for the core and bytes for the client out. No I/O.
//!
//! ```text
//! Greeting --CONNECT, or anything else, where everybody is welcome--> Open
//! Greeting --CONNECT--> Admitting --credentials are right--> Open
//! any --Fatal, told to close--> Closing
//! ```
//!
//! Invariants:
//! - Events leave in the order of the operations that caused them.
//! - A `PONG` is sent after the core has applied every earlier operation of this client, so whatever
//!   those made the core deliver to this client was delivered before: clients flush by `PING`.
//! - After the `max` of an `UNSUB` not one more message is written, whatever the core still sends.
//! - Nothing is read while [`EGRESS_HIGH`] bytes wait to be written: a client that does not listen to
//!   its answers is not listened to.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use codec::FrameView;
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Config,
    egress::Egress,
    message::{self, Recipient, Scratch},
    parser::{self, Op, ParseError, Parsed},
    reply::{self, Complaint, Fatal, Info},
    subject::{self, SubjectError},
    subscriptions::{Entry, Subscriptions},
};
use crate::{
    core::event::{
        CloseReason, Delivery, Event, Front, OriginFilter, Output, Reply, RetainedOnSubscribe, SessionId,
        SessionOpen, SubId, Subscription, Unsubscribe,
    },
    front::auth::{Auth, Permissions, Principal},
};

use self::costs::Costs;

mod costs;
mod publish;
#[cfg(test)]
mod tests;

/// Bytes waiting for the client above which nothing more is read from it.
pub(super) const EGRESS_HIGH: usize = 256 << 10;
/// Bytes gathered from the core's outputs before they are written.
const EGRESS_BATCH: usize = 64 << 10;
/// Bytes of messages in one event.
const EVENT_BYTES: usize = 64 << 10;
/// Operations handled before the connection turns to writing.
const TURN_OPS: usize = 512;
/// Pings without a sign of life after which the connection is stale.
const PINGS_MAX: u8 = 2;

/// What the client said in `CONNECT`. An absent option has nats-server's default; `pedantic` and others are
/// accepted and change nothing, since subjects are always checked.
#[derive(Debug, Default, Deserialize)]
struct Options {
    verbose: Option<bool>,
    echo: Option<bool>,
    headers: Option<bool>,
    no_responders: Option<bool>,
    protocol: Option<i64>,
    user: Option<String>,
    pass: Option<String>,
    name: Option<String>,
    lang: Option<String>,
    version: Option<String>,
}

impl Options {
    fn verbose(&self) -> bool {
        self.verbose.unwrap_or(true)
    }

    fn headers(&self) -> bool {
        self.headers.unwrap_or(false)
    }

    fn no_responders(&self) -> bool {
        self.no_responders.unwrap_or(false)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    /// The password is being checked; nothing is read.
    Admitting,
    Open,
    /// What is in the egress is written, then the connection is closed.
    Closing,
}

/// What a client says to prove who it is. Not `Debug`: it holds a password.
pub(super) struct Login {
    /// User name.
    pub user: Option<String>,
    /// Password.
    pub password: Option<String>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Session {
    config: Arc<Config>,
    id: SessionId,
    peer: SocketAddr,
    phase: Phase,
    options: Options,
    permissions: Option<Arc<Permissions>>,
    subscriptions: Subscriptions,
    events: Vec<(Event, usize)>,
    events_bytes: usize,
    egress: Egress,
    scratch: Scratch,
    /// Bytes that the read buffer must hold before parsing again makes sense.
    needed: usize,
    /// Something was handed to the core that a later `PONG` has to follow.
    unconfirmed: bool,
    /// Barriers on their way through the core, and how many `PONG`s each owes.
    pongs: VecDeque<(u32, usize)>,
    barriers: u32,
    costs: Costs,
    deadline: Instant,
    pings_out: u8,
    heard: bool,
}

impl Session {
    /// A session that has greeted its client.
    pub(super) fn new(config: Arc<Config>, id: SessionId, peer: SocketAddr, now: Instant) -> Self {
        let mut egress = Egress::default();
        let info = Info {
            max_payload: config.payload_max(),
            client_id: id.0,
            auth_required: !is_open(&config.auth),
            ..Info::new(&config.server_id, &config.server_name)
        };
        egress.text(info.to_string().as_bytes());
        let deadline = now + config.connect_timeout;
        Self {
            config,
            id,
            peer,
            phase: Phase::Greeting,
            options: Options::default(),
            permissions: None,
            subscriptions: Subscriptions::default(),
            events: Vec::new(),
            events_bytes: 0,
            egress,
            scratch: Scratch::default(),
            needed: 1,
            unconfirmed: false,
            pongs: VecDeque::new(),
            barriers: 0,
            costs: Costs::default(),
            deadline,
            pings_out: 0,
            heard: false,
        }
    }

    /// False: reading more would only queue more.
    pub(super) fn wants_input(&self) -> bool {
        matches!(self.phase, Phase::Greeting | Phase::Open) && self.egress.pending() < EGRESS_HIGH
    }

    /// Bytes that the read buffer must hold for the next operation to be complete, as far as known.
    pub(super) fn needed(&self) -> usize {
        self.needed
    }

    /// True once the connection is to be closed as soon as everything is written.
    pub(super) fn is_closing(&self) -> bool {
        self.phase == Phase::Closing
    }

    /// Handles the operations at the front of `input`, as many as one turn allows; returns how many
    /// bytes they took.
    pub(super) fn receive(&mut self, input: &[u8]) -> usize {
        let mut used = 0;
        for _ in 0..TURN_OPS {
            let rest = &input[used..];
            if !self.wants_input() || rest.len() < self.needed || self.events_bytes >= EVENT_BYTES {
                break;
            }
            match parser::parse(rest, self.payload_max()) {
                Ok(Parsed::Op { op, used: taken }) => {
                    used += taken;
                    self.needed = 1;
                    self.heard = true;
                    self.operate(op);
                }
                Ok(Parsed::Incomplete { needed }) => self.needed = needed,
                Err(error) => self.fail(self.fatal(error)),
            }
        }
        used
    }

    /// What the core is to be told, each with the bytes it counts for. In order.
    pub(super) fn take_events(&mut self) -> Vec<(Event, usize)> {
        self.events_bytes = 0;
        std::mem::take(&mut self.events)
    }

    /// What the client claims to be, once: [`Self::admit`] is to be told whether it is true.
    pub(super) fn take_login(&mut self) -> Option<Login> {
        if self.phase != Phase::Admitting {
            return None;
        }
        // Not kept any longer than it takes to check them.
        let Options { user, pass, .. } = &mut self.options;
        Some(Login { user: user.take(), password: pass.take() })
    }

    /// Lets the client in, or not.
    pub(super) fn admit(&mut self, principal: Option<Principal>) {
        let Some(principal) = principal else {
            self.config.counters.auth_failures.fetch_add(1, Ordering::Relaxed);
            return self.fail(Fatal::Authorization);
        };
        let Options { name, lang, version, .. } = &self.options;
        tracing::debug!(peer = %self.peer, user = ?principal.name, ?name, ?lang, ?version, "client connected");
        self.permissions = Some(principal.permissions);
        let was_asked = std::mem::replace(&mut self.phase, Phase::Open) == Phase::Admitting;
        let open = SessionOpen {
            session: self.id,
            front: Front::Nats,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        self.push_event(Event::SessionOpened(open), 0);
        if was_asked {
            self.okay();
        }
    }

    /// What is to be written.
    pub(super) fn egress(&self) -> &Egress {
        &self.egress
    }

    /// So much was written.
    pub(super) fn written(&mut self, bytes: usize) {
        self.egress.advance(bytes);
        let sent = self.costs.written(bytes);
        if sent > 0 {
            self.push_event(Event::Sent { session: self.id, bytes: sent }, 0);
        }
    }

    /// Turns outputs of the core into bytes until there is enough for a write.
    pub(super) fn send(&mut self, outputs: &mut VecDeque<Output>) {
        let mut refused = None;
        while self.phase != Phase::Closing && self.egress.pending() < EGRESS_BATCH {
            let Some(output) = outputs.pop_front() else { break };
            let cost = output.cost();
            match output {
                Output::Deliver(delivery) => self.deliver(&delivery),
                Output::Reply(Reply::Subscribed { token, .. }) => self.confirm(token),
                Output::Reply(Reply::Unsubscribed { token, .. }) => {
                    self.subscriptions.forget(token.wrapping_sub(1));
                }
                Output::Reply(Reply::Refused { reason, .. }) if refused != Some(reason) => {
                    refused = Some(reason);
                    self.complain(&Complaint::Refused(reason));
                }
                Output::Close(reason) => self.close(&reason),
                // Answers that only MQTT clients, links and watchers get or care for.
                Output::Reply(_) | Output::Send { .. } | Output::State(_) => {}
            }
            self.costs.queued(self.egress.pending(), cost);
        }
    }

    /// When [`Self::tick`] wants to be called.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Looks whether the client is alive. Does nothing before the deadline.
    pub(super) fn tick(&mut self, now: Instant) {
        if now < self.deadline || self.phase == Phase::Closing {
            return;
        }
        if self.phase != Phase::Open {
            return self.fail(Fatal::ConnectTimeout);
        }
        self.deadline = now + self.config.ping_interval;
        if std::mem::take(&mut self.heard) {
            self.pings_out = 0;
        } else if self.pings_out >= PINGS_MAX {
            self.fail(Fatal::Stale);
        } else {
            self.pings_out += 1;
            self.egress.text(reply::PING);
        }
    }

    /// Gives back memory; for a connection that is about to wait.
    pub(super) fn shrink(&mut self) {
        self.egress.shrink();
        self.scratch.shrink();
    }

    /// The event that ends the session, if the core knows it.
    pub(super) fn closed(&self) -> Option<Event> {
        self.permissions.is_some().then_some(Event::SessionClosed { session: self.id, clean: true })
    }

    fn payload_max(&self) -> usize {
        // Who has not said who it is cannot make us hold a message.
        if self.is_stranger() { 0 } else { self.config.payload_max() }
    }

    fn is_stranger(&self) -> bool {
        self.phase == Phase::Greeting && !is_open(&self.config.auth)
    }

    fn push_event(&mut self, event: Event, bytes: usize) {
        self.events_bytes += bytes;
        self.events.push((event, bytes));
    }

    fn operate(&mut self, op: Op<'_>) {
        if self.phase == Phase::Greeting && !matches!(op, Op::Connect(_)) {
            // As on nats-server, who needs no credentials need not introduce itself.
            if !is_open(&self.config.auth) {
                self.config.counters.auth_failures.fetch_add(1, Ordering::Relaxed);
                return self.fail(Fatal::Authorization);
            }
            self.admit(Some(everybody()));
        }
        match op {
            Op::Connect(options) => self.connect(options),
            Op::Publish(publish) => self.publish(publish),
            Op::Subscribe { subject, queue, sid } => self.subscribe(subject, queue, sid),
            Op::Unsubscribe { sid, max } => self.unsubscribe(sid, max),
            Op::Ping => self.ping(),
            Op::Pong => self.pings_out = 0,
        }
    }

    fn connect(&mut self, options: &[u8]) {
        let Ok(options) = serde_json::from_slice::<Options>(options) else {
            return self.fail(Fatal::UnknownOperation);
        };
        if options.protocol.is_some_and(|protocol| !(0..=1).contains(&protocol)) {
            return self.fail(Fatal::ClientProtocol);
        }
        if options.no_responders() && !options.headers() {
            return self.fail(Fatal::NoRespondersNeedHeaders);
        }
        // A later one changes options, never who the client is.
        self.options = options;
        if self.phase == Phase::Greeting {
            if !is_open(&self.config.auth) {
                self.phase = Phase::Admitting;
                return;
            }
            self.admit(Some(everybody()));
        }
        self.okay();
    }

    fn subscribe(&mut self, subject: &[u8], queue: Option<&[u8]>, sid: &[u8]) {
        let queue = queue.map(str::from_utf8).transpose();
        let (Ok(pattern), Ok(queue)) = (str::from_utf8(subject), queue) else {
            return self.complain(&Complaint::Subject);
        };
        let violation = match queue {
            None => Complaint::Subscribe(pattern),
            Some(queue) => Complaint::SubscribeQueue(pattern, queue),
        };
        let interest = match subject::interest(self.config.side, pattern) {
            Ok(interest) => interest,
            Err(SubjectError::Invalid) => return self.complain(&Complaint::Subject),
            Err(SubjectError::Forbidden) => return self.complain(&violation),
        };
        let permissions = self.permissions.as_ref();
        let may = |filter| permissions.is_some_and(|permissions| permissions.may_subscribe(&filter));
        if !interest.permissions().all(may) {
            return self.complain(&violation);
        }
        if self.subscriptions.contains(sid) {
            return self.okay(); // as nats-server: the first one stays
        }
        let bytes = pattern.len() + queue.map_or(0, str::len);
        let Ok(entry) = self.subscriptions.add(sid, interest, bytes) else {
            return self.complain(&Complaint::Subscriptions);
        };
        let no_local = self.options.echo == Some(false);
        let subscriptions = to_core(entry, queue, no_local);
        if !subscriptions.is_empty() {
            self.unconfirmed = true;
            self.push_event(Event::Subscribed { session: self.id, token: 0, subscriptions }, bytes);
        }
        self.okay();
    }

    fn unsubscribe(&mut self, sid: &[u8], max: Option<u64>) {
        if let Some(entry) = self.subscriptions.by_sid(sid) {
            entry.max = max.filter(|&max| max > 0);
            if entry.max.is_none() || entry.is_done() {
                self.end_subscription(sid);
            }
        }
        self.okay();
    }

    /// The entry stays until the core confirms, since what earlier operations caused may be on its way.
    fn end_subscription(&mut self, sid: &[u8]) {
        let Some(entry) = self.subscriptions.retire(sid) else { return };
        let number = entry.number;
        let which: Vec<_> =
            [entry.own_id(), entry.up_id()].into_iter().flatten().map(Unsubscribe::Id).collect();
        if which.is_empty() {
            return self.subscriptions.forget(number);
        }
        self.unconfirmed = true;
        self.push_event(Event::Unsubscribed { session: self.id, token: number + 1, which }, 0);
    }

    fn ping(&mut self) {
        if std::mem::take(&mut self.unconfirmed) {
            // A subscription to nothing: the core answers it after all that came before.
            self.barriers = self.barriers.wrapping_add(1).max(1);
            let token = self.barriers;
            self.pongs.push_back((token, 1));
            self.push_event(Event::Subscribed { session: self.id, token, subscriptions: Vec::new() }, 0);
        } else if let Some((_, owed)) = self.pongs.back_mut() {
            *owed += 1;
        } else {
            self.egress.text(reply::PONG);
        }
    }

    fn confirm(&mut self, token: u32) {
        if self.pongs.front().is_some_and(|&(first, _)| first == token)
            && let Some((_, owed)) = self.pongs.pop_front()
        {
            for _ in 0..owed {
                self.egress.text(reply::PONG);
            }
        }
    }

    fn deliver(&mut self, delivery: &Delivery) {
        let counters = &self.config.counters;
        let Ok(frame) = FrameView::parse(&delivery.frame) else {
            tracing::error!(session = self.id.0, "the core delivered what is no frame");
            return;
        };
        if delivery.no_responders {
            return self.tell_no_responders(delivery.sub, &frame);
        }
        let Some((entry, up)) = self.subscriptions.by_id(delivery.sub) else { return };
        if entry.is_done() {
            return;
        }
        let to = Recipient { sid: &entry.sid, up, headers: self.options.headers.unwrap_or(false) };
        let bytes = message::write(to, delivery, &frame, &mut self.scratch, &mut self.egress);
        counters.messages_out.fetch_add(1, Ordering::Relaxed);
        counters.bytes_out.fetch_add(bytes as u64, Ordering::Relaxed);
        entry.delivered += 1;
        if entry.is_done() {
            let sid = entry.sid.clone();
            self.end_subscription(&sid);
        }
    }

    fn tell_no_responders(&mut self, sub: SubId, frame: &FrameView<'_>) {
        if !self.options.no_responders() {
            return;
        }
        let named = self.subscriptions.by_id(sub).map(|(entry, _)| entry.sid.clone());
        let sid = named.or_else(|| self.subscriptions.by_topic(frame.topic()).map(|entry| entry.sid.clone()));
        if let Some(sid) = sid {
            message::write_no_responders(
                &sid,
                frame.topic(),
                Some(frame),
                &mut self.scratch,
                &mut self.egress,
            );
        }
    }

    /// Answers a request to a service that does not exist here.
    fn nobody_responds(&mut self, reply: &str) {
        if self.options.no_responders()
            && let Some(entry) = self.subscriptions.by_topic(reply)
        {
            message::write_no_responders(&entry.sid, reply, None, &mut self.scratch, &mut self.egress);
        }
    }

    fn okay(&mut self) {
        if self.options.verbose() && self.phase == Phase::Open {
            self.egress.text(reply::OK);
        }
    }

    fn complain(&mut self, complaint: &Complaint<'_>) {
        self.config.counters.complaints.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(peer = %self.peer, session = self.id.0, %complaint, "client told off");
        self.egress.text(reply::error_line(complaint).as_bytes());
    }

    fn fatal(&self, error: ParseError) -> Fatal {
        match error {
            // A stranger's payload is refused for being a stranger's.
            ParseError::Payload(_) if self.is_stranger() => Fatal::Authorization,
            ParseError::Payload(_) => Fatal::Payload,
            ParseError::UnknownOperation => Fatal::UnknownOperation,
            ParseError::ControlLine => Fatal::ControlLine,
        }
    }

    fn fail(&mut self, fatal: Fatal) {
        if self.phase == Phase::Closing {
            return;
        }
        self.config.counters.closed_for_cause.fetch_add(1, Ordering::Relaxed);
        tracing::info!(peer = %self.peer, session = self.id.0, reason = %fatal, "closing client connection");
        self.egress.text(reply::error_line(&fatal).as_bytes());
        self.phase = Phase::Closing;
    }

    fn close(&mut self, reason: &CloseReason) {
        match reason {
            CloseReason::SlowConsumer => {
                self.config.counters.slow_consumers.fetch_add(1, Ordering::Relaxed);
                self.fail(Fatal::SlowConsumer);
            }
            CloseReason::Revoked => self.fail(Fatal::Revoked),
            CloseReason::Protocol(_) => self.fail(Fatal::UnknownOperation),
            // Without an error, so that clients connect again.
            CloseReason::TakenOver | CloseReason::Shutdown | CloseReason::Refused(_) => {
                self.phase = Phase::Closing;
            }
        }
    }
}

/// True if everybody may connect.
fn is_open(auth: &Auth) -> bool {
    matches!(auth, Auth::Anonymous)
}

fn everybody() -> Principal {
    Principal { name: None, permissions: Arc::new(Permissions::all()) }
}

fn to_core(entry: &Entry, queue: Option<&str>, no_local: bool) -> Vec<Subscription> {
    let one = |id: SubId, origin: &OriginFilter, filter: &codec::Filter| Subscription {
        id,
        origin: origin.clone(),
        filter: filter.clone(),
        qos: 0,
        group: queue.map(Into::into),
        no_local,
        retain_as_published: false,
        retained: RetainedOnSubscribe::DoNotSend,
        wildcard_matches_dollar: true,
        identifier: 0,
    };
    let own = entry.own_id().zip(entry.interest.own.as_ref());
    let up = entry.up_id().zip(entry.interest.up.as_ref());
    let own = own.map(|(id, filter)| one(id, &OriginFilter::Own, filter));
    own.into_iter().chain(up.map(|(id, (origin, filter))| one(id, origin, filter))).collect()
}
