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

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::lookup_host,
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Counters, Ended, Link, Links, Params, Progress,
    quic::{QuicDialler, QuicTransport},
};
use crate::{clock, core::event::Peer, handle::Handle, tasks::Tasks};

/// What a dialler needs.
#[derive(Debug, Clone)]
pub struct Dialler {
    /// `host:port` of the hubs, tried in turn.
    pub hubs: Vec<String>,
    /// Connects.
    pub quic: QuicDialler,
    /// The node's broker.
    pub broker: Handle,
    /// Times and bounds of a link.
    pub params: Arc<Params>,
    /// Delays between attempts.
    pub backoff: Backoff,
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

    fn next(&mut self) -> Duration {
        let bound = self.base.saturating_mul(1 << self.attempts.min(16)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        // Without randomness the middle is as good as any point.
        let random = getrandom::u64().unwrap_or(u64::MAX / 2);
        bound.mul_f64(random as f64 / u64::MAX as f64)
    }

    fn reset(&mut self) {
        self.attempts = 0;
    }
}

/// Where a node's dialling stands, for `doctor`, readiness and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// The phase.
    pub state: State,
    /// Wall time of the last change of phase, microseconds.
    pub since_us: u64,
    /// The hub's address that is dialled or linked.
    pub hub: String,
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
    Connected,
    Progress(Progress),
    Failed(String),
    Ended(Box<Ended>),
}

/// An attempt and the link it becomes.
#[derive(Debug)]
struct Attempt {
    number: u64,
    hub: String,
    welcomed: bool,
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
    started: u64,
    news: mpsc::Sender<(u64, News)>,
}

/// News that wait; attempts are at most two.
const NEWS_WAITING: usize = 8;
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
            started: 0,
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
    /// Starts an attempt, at the next hub in turn.
    fn dial(&mut self) {
        self.next_at = None;
        let Some(at) = self.started.checked_rem(self.dialler.hubs.len() as u64) else { return };
        let hub = self.dialler.hubs[usize::try_from(at).expect("less than the number of hubs")].clone();
        self.started += 1;
        let attempt = Attempt {
            number: self.started,
            hub: hub.clone(),
            welcomed: false,
            stop: self.dialler.tasks.stopped().child_token(),
        };
        let work =
            attempt_link(self.dialler.clone(), hub, attempt.number, attempt.stop.clone(), self.news.clone());
        self.attempts.push(attempt);
        self.dialler.tasks.spawn("dial", work);
        if self.attempts.len() == 1 {
            self.show(State::Dialing, None);
        }
    }

    fn on_news(&mut self, number: u64, news: News) {
        let Some(at) = self.attempts.iter().position(|attempt| attempt.number == number) else { return };
        match news {
            News::Connected if self.attempts.len() == 1 => self.show(State::Handshaking, None),
            News::Connected => {}
            News::Progress(progress) => self.on_progress(at, progress),
            News::Failed(error) => {
                let hub = self.attempts.remove(at).hub;
                tracing::warn!(%hub, %error, "dial failed");
                self.on_end(error, None);
            }
            News::Ended(ended) => {
                self.attempts.remove(at);
                let error = match &ended.refusal {
                    Some(refusal) => format!("refused by the hub: {}", refusal.message),
                    None => ended.end.to_string(),
                };
                // A refusal that names no time: trying soon is of no use, trying never is worse.
                let later = ended.refusal.as_ref().map(|_| self.dialler.backoff.cap / 2);
                self.on_end(error, ended.retry_after.or(later));
            }
        }
    }

    fn on_progress(&mut self, at: usize, progress: Progress) {
        if progress.welcomed && !self.attempts[at].welcomed {
            self.attempts[at].welcomed = true;
            self.dialler.backoff.reset();
            // The newest is the one that lives.
            for older in self.attempts.drain(..at) {
                older.stop.cancel();
            }
            self.next_at = None;
            self.show(State::Live, None);
        }
        let alone = self.attempts.len() == 1;
        if progress.suspect && alone && self.next_at.is_none() {
            tracing::warn!(hub = %self.attempts[0].hub, "no answer on this path, dialling another");
            self.next_at = Some(Instant::now());
        }
        if alone {
            self.status.send_if_modified(|status| {
                std::mem::replace(&mut status.suspect, progress.suspect) != progress.suspect
            });
        }
    }

    fn on_end(&mut self, error: String, retry_after: Option<Duration>) {
        if self.attempts.iter().any(|attempt| attempt.welcomed) {
            // The replacement failed, the suspect link still stands; try again later.
            self.next_at = Some(Instant::now() + self.dialler.backoff.next());
            return;
        }
        if !self.attempts.is_empty() {
            self.status.send_modify(|status| status.last_error = Some(error));
            return;
        }
        // A hub's wish is a floor, jittered upward: it gives the same to many.
        let delay = retry_after.unwrap_or_default().min(RETRY_AFTER_MAX) + self.dialler.backoff.next();
        self.next_at = Some(Instant::now() + delay);
        self.show(State::Backoff, Some(error));
    }

    fn show(&self, state: State, error: Option<String>) {
        let hub = self.attempts.last().map(|attempt| attempt.hub.clone());
        self.status.send_modify(|status| {
            if status.state != state {
                status.since_us = clock::wall_us();
            }
            status.state = state;
            status.suspect = false;
            status.hub = hub.unwrap_or_else(|| std::mem::take(&mut status.hub));
            if error.is_some() {
                status.last_error = error;
            }
        });
    }
}

/// Connects to a hub and runs the link; says how it goes.
async fn attempt_link(
    dialler: Dialler,
    hub: String,
    number: u64,
    stop: CancellationToken,
    news: mpsc::Sender<(u64, News)>,
) {
    let connected = tokio::select! {
        biased;
        () = stop.cancelled() => Err("stopped".to_owned()),
        connected = Box::pin(connect(&dialler.quic, &hub, dialler.params.handshake)) => connected,
    };
    // The dialler outlives its attempts; if it is gone, nobody asks.
    let (transport, peer) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            dialler.counters.handshakes_failed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            drop(news.send((number, News::Failed(error))).await);
            return;
        }
    };
    drop(news.send((number, News::Connected)).await);
    let progress = watch::Sender::new(Progress::default());
    let mut watching = progress.subscribe();
    let link = Link {
        peer,
        dialler: true,
        broker: dialler.broker,
        params: dialler.params,
        counters: dialler.counters,
        stop,
        progress,
        links: dialler.links,
    };
    let telling = async {
        // Ends with the link, which holds the sender.
        while watching.changed().await.is_ok() {
            let progress = *watching.borrow_and_update();
            drop(news.send((number, News::Progress(progress))).await);
        }
    };
    let (ended, ()) = tokio::join!(Box::pin(super::run(transport, link)), telling);
    drop(news.send((number, News::Ended(Box::new(ended)))).await);
}

/// Tries the addresses of a hub one after the other, all within `patience`.
async fn connect(quic: &QuicDialler, hub: &str, patience: Duration) -> Result<(QuicTransport, Peer), String> {
    let resolved = timeout(patience, lookup_host(hub)).await;
    let addresses: Vec<SocketAddr> = match resolved {
        Ok(Ok(addresses)) => addresses.take(ADDRESSES_MAX).collect(),
        Ok(Err(error)) => return Err(format!("cannot resolve {hub}: {error}")),
        Err(_elapsed) => return Err(format!("cannot resolve {hub}: no answer")),
    };
    let each = patience / u32::try_from(addresses.len().max(1)).expect("few");
    let mut last = format!("{hub} has no address");
    for address in addresses {
        last = match timeout(each, quic.dial(address)).await {
            Ok(Ok((transport, certificate))) => return Ok((transport, certificate.identity.peer())),
            Ok(Err(error)) => format!("{address}: {error}"),
            Err(_elapsed) => format!("{address}: no answer (is UDP blocked?)"),
        };
    }
    Err(last)
}

/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn dialling() -> (Dialling, mpsc::Receiver<(u64, News)>) {
        let (handle, _inputs, _outboxes) = Handle::new();
        let (news, receiver) = mpsc::channel(NEWS_WAITING);
        let dialler = Dialler {
            // Nobody answers there.
            hubs: vec!["192.0.2.1:10001".into(), "192.0.2.2:10001".into()],
            quic: crate::link::tests::quic::some_dialler(),
            broker: handle,
            params: Arc::default(),
            backoff: Backoff::default(),
            counters: Arc::default(),
            links: Arc::default(),
            tasks: Tasks::new(),
            network_changed: Arc::default(),
        };
        let (status, _watching) = Dialler::status();
        let dialling = Dialling { dialler, status, attempts: Vec::new(), next_at: None, started: 0, news };
        (dialling, receiver)
    }

    const WELCOMED: News = News::Progress(Progress { welcomed: true, suspect: false });
    const SUSPECT: News = News::Progress(Progress { welcomed: true, suspect: true });

    /// A link that was live and is suspect, and the attempt that shall replace it.
    fn suspect() -> (Dialling, mpsc::Receiver<(u64, News)>) {
        let (mut dialling, receiver) = dialling();
        dialling.dial();
        dialling.on_news(1, News::Connected);
        dialling.on_news(1, WELCOMED);
        assert_eq!(dialling.status.borrow().state, State::Live);
        assert_eq!(dialling.next_at, None);
        dialling.on_news(1, SUSPECT);
        assert!(dialling.status.borrow().suspect);
        assert!(dialling.next_at.is_some_and(|at| at <= Instant::now()), "at once");
        dialling.dial();
        (dialling, receiver)
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_link_stays_until_its_replacement_is_welcomed() {
        let (mut dialling, _news) = suspect();
        let old = dialling.attempts[0].stop.clone();
        dialling.on_news(2, News::Connected);
        assert!(!old.is_cancelled());
        assert_eq!(dialling.status.borrow().state, State::Live);
        dialling.on_news(2, WELCOMED);
        assert!(old.is_cancelled());
        assert_eq!(dialling.attempts.len(), 1);
        let status = dialling.status.borrow().clone();
        assert_eq!((status.state, &*status.hub, status.suspect), (State::Live, "192.0.2.2:10001", false));
        assert_eq!(dialling.next_at, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_link_outlives_a_replacement_that_fails() {
        let (mut dialling, _news) = suspect();
        dialling.on_news(2, News::Failed("no answer".into()));
        assert!(!dialling.attempts[0].stop.is_cancelled());
        assert_eq!(dialling.status.borrow().state, State::Live);
        assert!(dialling.next_at.is_some(), "tried again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_dies_at_once_does_not_reset_the_back_off() {
        let (mut dialling, _news) = dialling();
        for number in 1..=5 {
            dialling.dial();
            dialling.on_news(number, News::Connected);
            dialling.on_news(number, News::Failed("closed".into()));
            assert_eq!(dialling.status.borrow().state, State::Backoff);
        }
        assert_eq!(dialling.dialler.backoff.attempts, 5);
        dialling.dial();
        dialling.on_news(6, WELCOMED);
        assert_eq!(dialling.dialler.backoff.attempts, 0);
    }

    #[test]
    fn delays_are_spread_below_a_bound_that_doubles_to_its_cap() {
        let mut backoff = Backoff::default();
        let bounds_ms = [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000];
        for bound_ms in bounds_ms {
            assert!(backoff.next() <= Duration::from_millis(bound_ms));
        }
        let late: Vec<_> = (0..100).map(|_| backoff.next()).collect();
        assert!(late.iter().max() > late.iter().min().map(|least| *least + Duration::from_secs(10)).as_ref());
    }
}
