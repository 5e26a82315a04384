//! The node's side: one link to one of its hubs, always.
//!
//! ```text
//!  Dialing ──connected──▶ Handshaking ──Welcome──▶ Live
//!     ▲                        │                     │ ended
//!     └──── Backoff ◀──────────┴─────────────────────┘
//! ```
//!
//! A live link whose path goes silent stays while another is dialled from a fresh port; the one that
//! is welcomed last stays, the other is dropped (the hub fences the older session of one instance). The
//! delay grows with every attempt and starts over only after Welcome: a handshake that dies at once is no
//! proof of life.
//!
//! A hub is dialled by QUIC, and by WebSocket too if QUIC has not answered soon ([`mod@connect`]). A link by
//! WebSocket stays, and QUIC is probed beside it, ever more rarely; a probe that is welcomed replaces it. A
//! QUIC link that dies young has proved that its handshake alone passes: then WebSocket goes first.

mod connect;
mod hub;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    Counters, Ended, Link, LinkEnd, Links, Params, Progress, quic::QuicDialler, websocket::WebSocketDialler,
};
use crate::{clock, handle::Handle, tasks::Tasks};
use connect::{Connected, Order, connect};
pub use hub::{Hub, Way};

/// What a dialler needs.
#[derive(Debug, Clone)]
pub struct Dialler {
    /// The hubs, tried in turn.
    pub hubs: Vec<Hub>,
    /// Connects by QUIC.
    pub quic: QuicDialler,
    /// Connects by WebSocket.
    pub websocket: WebSocketDialler,
    /// By what the last link came: the next one tries it first.
    pub prefer: Way,
    /// The node's broker.
    pub broker: Handle,
    /// Times and bounds of a link.
    pub params: Arc<Params>,
    /// Delays between attempts.
    pub backoff: Backoff,
    /// Delays between probes of QUIC while a link is by WebSocket.
    pub probes: Backoff,
    /// Counters of the process.
    pub counters: Arc<Counters>,
    /// The links of the process, and who takes their Streams.
    pub links: Arc<Links>,
    /// Where the links' tasks live; its stop ends dialling and the link.
    pub tasks: Tasks,
    /// Notified when the machine's network has changed: a back-off ends at once.
    pub network_changed: Arc<Notify>,
}

/// Full jitter: each delay is uniform between 0 and a bound that doubles from `base` to `cap`.
#[derive(Debug, Clone)]
pub struct Backoff {
    /// First bound.
    pub base: Duration,
    /// Last bound.
    pub cap: Duration,
    attempts: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(60))
    }
}

impl Backoff {
    /// Starts at `base`.
    #[must_use]
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempts: 0 }
    }

    /// The delay before the next attempt.
    pub fn delay(&mut self) -> Duration {
        let bound = self.base.saturating_mul(1 << self.attempts.min(16)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        // Without randomness the middle is as good as any point.
        let random = getrandom::u64().unwrap_or(u64::MAX / 2);
        bound.mul_f64(random as f64 / u64::MAX as f64)
    }

    /// Not sooner than half of the bound: for what nobody waits for.
    fn next_late(&mut self) -> Duration {
        let bound = self.base.saturating_mul(1 << self.attempts.min(16)).min(self.cap);
        (bound + self.delay()) / 2
    }

    /// Starts over: there was proof of life.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Of probes: the first soon enough to be noticed, the later ones cost nearly nothing.
    #[must_use]
    pub fn of_probes() -> Self {
        Self::new(Duration::from_secs(20), Duration::from_secs(600))
    }
}

/// Where a node's dialling stands, for `doctor`, readiness and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The phase.
    pub state: State,
    /// Wall time of the last change of phase, microseconds.
    pub since_us: u64,
    /// The hub that is dialled or linked.
    pub hub: String,
    /// By what the link is, or the last one was.
    pub way: Way,
    /// QUIC to this hub does not work, the link is by WebSocket.
    pub fallback: bool,
    /// What ended the last attempt or link.
    pub last_error: Option<String>,
    /// The path is silent, another is being tried.
    pub suspect: bool,
}

/// Phases of a dialler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Resolving and connecting.
    Dialing,
    /// Connected; Hello is sent, Welcome awaited.
    Handshaking,
    /// Welcome was received.
    Live,
    /// Waiting for the next attempt.
    Backoff,
}

impl State {
    /// The word for metrics and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Dialing => "dialing",
            Self::Handshaking => "handshaking",
            Self::Live => "live",
            Self::Backoff => "backoff",
        }
    }
}

/// What became of an attempt.
#[derive(Debug)]
enum News {
    Connected(Way),
    Progress(Progress),
    Failed(String),
    Ended(Box<Ended>),
}

/// An attempt and the link it becomes.
#[derive(Debug)]
struct Attempt {
    number: u64,
    hub: Hub,
    way: Way,
    welcomed: Option<Instant>,
    /// Only looks whether QUIC works again.
    is_probe: bool,
    /// Its path is silent.
    suspect: bool,
    stop: CancellationToken,
}

/// The dialler's state between events.
#[derive(Debug)]
struct Dialling {
    dialler: Dialler,
    status: watch::Sender<Status>,
    /// One, or two while a suspect link is being replaced; the newer is last.
    attempts: Vec<Attempt>,
    next_at: Option<Instant>,
    /// What is due at `next_at` is a probe.
    next_is_probe: bool,
    started: u64,
    /// The hub whose turn it is.
    turn: usize,
    news: mpsc::Sender<(u64, News)>,
}

/// News that wait; attempts are at most two.
const NEWS_WAITING: usize = 8;
/// A QUIC link that lives this long has proved that more than handshakes pass.
const PROVEN: Duration = Duration::from_secs(60);
/// Longest wait that a hub may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

impl Dialler {
    /// A place to watch the dialler from, and the sender for [`run`](Self::run).
    #[must_use]
    pub fn status() -> (watch::Sender<Status>, watch::Receiver<Status>) {
        watch::channel(Status {
            state: State::Dialing,
            since_us: clock::wall_us(),
            hub: String::new(),
            way: Way::Quic,
            fallback: false,
            last_error: None,
            suspect: false,
        })
    }

    /// Keeps a link to one of the hubs until stopped; then ends it in an orderly way.
    pub async fn run(self, status: watch::Sender<Status>) {
        let (news_sender, mut news) = mpsc::channel(NEWS_WAITING);
        let (stop, network_changed) = (self.tasks.stopped(), Arc::clone(&self.network_changed));
        let mut dialling = Dialling {
            dialler: self,
            status,
            attempts: Vec::with_capacity(2),
            next_at: Some(Instant::now()),
            next_is_probe: false,
            started: 0,
            turn: 0,
            news: news_sender,
        };
        loop {
            let next_at = dialling.next_at;
            tokio::select! {
                biased; // stop, then what attempts say, then what starts a new one
                () = stop.cancelled() => break,
                Some((number, news)) = news.recv() => dialling.on_news(number, news),
                () = network_changed.notified(), if next_at.is_some() => dialling.dial(),
                () = sleep_until(next_at.unwrap_or_else(Instant::now)), if next_at.is_some() => dialling.dial(),
            }
        }
        // The attempts stop by the same token; wait for their ends.
        while !dialling.attempts.is_empty() {
            let Some((number, news)) = news.recv().await else { break };
            if matches!(news, News::Failed(_) | News::Ended(_)) {
                dialling.attempts.retain(|attempt| attempt.number != number);
            }
        }
    }
}

impl Dialling {
    /// Starts what is due: an attempt at the next hub in turn, or a probe of the hub that is linked.
    fn dial(&mut self) {
        self.next_at = None;
        let is_probe = std::mem::take(&mut self.next_is_probe);
        let linked = self.attempts.first().map(|attempt| attempt.hub.clone());
        let Some(hub) = linked.filter(|_| is_probe).or_else(|| self.next_hub()) else { return };
        let order = if is_probe { Order::QuicOnly } else { Order::First(self.dialler.prefer) };
        self.started += 1;
        let attempt = Attempt {
            number: self.started,
            hub: hub.clone(),
            way: Way::Quic,
            welcomed: None,
            is_probe,
            suspect: false,
            stop: self.dialler.tasks.stopped().child_token(),
        };
        let work = attempt_link(
            self.dialler.clone(),
            hub,
            order,
            attempt.number,
            attempt.stop.clone(),
            self.news.clone(),
        );
        self.attempts.push(attempt);
        self.dialler.tasks.spawn("dial", work);
        if self.attempts.len() == 1 {
            self.show(State::Dialing, None);
        }
    }

    fn next_hub(&mut self) -> Option<Hub> {
        let at = self.turn.checked_rem(self.dialler.hubs.len())?;
        self.turn += 1;
        Some(self.dialler.hubs[at].clone())
    }

    fn on_news(&mut self, number: u64, news: News) {
        let Some(at) = self.attempts.iter().position(|attempt| attempt.number == number) else { return };
        match news {
            News::Connected(way) => {
                self.attempts[at].way = way;
                if self.attempts.len() == 1 {
                    self.show(State::Handshaking, None);
                }
            }
            News::Progress(progress) => self.on_progress(at, progress),
            News::Failed(error) => {
                let attempt = self.attempts.remove(at);
                if attempt.is_probe {
                    tracing::debug!(hub = %attempt.hub, %error, "QUIC does not work yet");
                } else {
                    tracing::warn!(hub = %attempt.hub, %error, "dial failed");
                }
                self.on_end(&attempt, error, None);
            }
            News::Ended(ended) => {
                let attempt = self.attempts.remove(at);
                let error = match &ended.refusal {
                    Some(refusal) => format!("refused by the hub: {}", refusal.message),
                    None => ended.end.to_string(),
                };
                let died = matches!(ended.end, LinkEnd::PeerSilent | LinkEnd::Lost(_));
                let young = attempt.welcomed.is_none_or(|welcomed| welcomed.elapsed() < PROVEN);
                match attempt.way {
                    Way::Quic if died && young && attempt.hub.websocket.is_some() => {
                        self.dialler.prefer = Way::WebSocket;
                    }
                    Way::Quic if !young => self.dialler.probes.reset(),
                    Way::Quic | Way::WebSocket => {}
                }
                // A refusal that names no time: trying soon is of no use, trying never is worse.
                let later = ended.refusal.as_ref().map(|_| self.dialler.backoff.cap / 2);
                self.on_end(&attempt, error, ended.retry_after.or(later));
            }
        }
    }

    fn on_progress(&mut self, at: usize, progress: Progress) {
        if progress.welcomed && self.attempts[at].welcomed.is_none() {
            self.attempts[at].welcomed = Some(Instant::now());
            self.dialler.backoff.reset();
            // The newest is the one that lives.
            for older in self.attempts.drain(..at) {
                older.stop.cancel();
            }
            self.next_at = None;
            self.dialler.prefer = self.attempts[0].way;
            self.show(State::Live, None);
            self.plan_probe();
        }
        let at = at.min(self.attempts.len() - 1);
        self.attempts[at].suspect = progress.suspect;
        let alone = self.attempts.len() == 1;
        if progress.suspect && alone && (self.next_at.is_none() || self.next_is_probe) {
            tracing::warn!(hub = %self.attempts[0].hub, "no answer on this path, dialling another");
            (self.next_at, self.next_is_probe) = (Some(Instant::now()), false);
        }
        if alone {
            self.status.send_if_modified(|status| {
                std::mem::replace(&mut status.suspect, progress.suspect) != progress.suspect
            });
        }
    }

    fn on_end(&mut self, attempt: &Attempt, error: String, retry_after: Option<Duration>) {
        if attempt.is_probe && attempt.welcomed.is_none() && !self.attempts.is_empty() {
            // While it ran, nothing else was dialled.
            if self.attempts[0].suspect {
                self.next_at = Some(Instant::now());
            }
            self.plan_probe();
            return;
        }
        if self.attempts.iter().any(|attempt| attempt.welcomed.is_some()) {
            // The replacement failed, the suspect link still stands; try again later.
            self.next_at = Some(Instant::now() + self.dialler.backoff.delay());
            return;
        }
        if !self.attempts.is_empty() {
            self.status.send_modify(|status| status.last_error = Some(error));
            return;
        }
        // A hub's wish is a floor, jittered upward: it gives the same to many.
        let delay = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX) + self.dialler.backoff.delay();
        (self.next_at, self.next_is_probe) = (Some(Instant::now() + delay), false);
        self.show(State::Backoff, Some(error));
    }

    /// A link by WebSocket looks from time to time whether QUIC works again.
    fn plan_probe(&mut self) {
        let is_fallback = |attempt: &Attempt| attempt.welcomed.is_some() && attempt.is_fallback();
        if self.next_at.is_none() && self.attempts.iter().any(is_fallback) {
            (self.next_at, self.next_is_probe) =
                (Some(Instant::now() + self.dialler.probes.next_late()), true);
        }
    }

    fn show(&self, state: State, error: Option<String>) {
        let newest = self.attempts.last();
        self.status.send_modify(|status| {
            if status.state != state {
                status.since_us = clock::wall_us();
            }
            status.state = state;
            status.suspect = false;
            if let Some(attempt) = newest {
                status.hub = attempt.hub.to_string();
                status.way = attempt.way;
            }
            status.fallback = state == State::Live && newest.is_some_and(Attempt::is_fallback);
            if error.is_some() {
                status.last_error = error;
            }
        });
    }
}

impl Attempt {
    fn is_fallback(&self) -> bool {
        self.way == Way::WebSocket && self.hub.quic.is_some()
    }
}

/// Connects to a hub and runs the link; says how it goes.
async fn attempt_link(
    dialler: Dialler,
    hub: Hub,
    order: Order,
    number: u64,
    stop: CancellationToken,
    news: mpsc::Sender<(u64, News)>,
) {
    let connected = tokio::select! {
        biased;
        () = stop.cancelled() => Err("stopped".to_owned()),
        connected = Box::pin(connect(&dialler, &hub, order)) => connected,
    };
    // The dialler outlives its attempts; if it is gone, nobody asks.
    let (connected, peer) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            dialler.counters.handshakes_failed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            drop(news.send((number, News::Failed(error))).await);
            return;
        }
    };
    drop(news.send((number, News::Connected(connected.way()))).await);
    let progress = watch::Sender::new(Progress::default());
    let mut watching = progress.subscribe();
    let link = Link {
        peer,
        dialler: true,
        broker: dialler.broker,
        params: dialler.params,
        counters: dialler.counters,
        stop,
        progress: Some(progress),
        links: dialler.links,
    };
    let telling = async {
        // Ends with the link, which holds the sender.
        while watching.changed().await.is_ok() {
            let progress = *watching.borrow_and_update();
            drop(news.send((number, News::Progress(progress))).await);
        }
    };
    let running = async {
        match connected {
            Connected::Quic(transport) => Box::pin(super::run(transport, link)).await,
            Connected::WebSocket(transport) => Box::pin(super::run(transport, link)).await,
        }
    };
    let (ended, ()) = tokio::join!(running, telling);
    drop(news.send((number, News::Ended(Box::new(ended)))).await);
}
