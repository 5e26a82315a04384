//! The dialler's decisions, with the test as its attempts.

use super::*;

fn hub(host: &str) -> Hub {
    Hub { host: host.into(), quic: Some(10001), websocket: Some(10000) }
}

fn dialling() -> (Dialling, mpsc::Receiver<(u64, News)>) {
    let (handle, _inputs, _outboxes) = Handle::new();
    let (news, receiver) = mpsc::channel(NEWS_WAITING);
    let dialler = Dialler {
        // Nobody answers there.
        hubs: ["192.0.2.1", "192.0.2.2"].map(hub).to_vec(),
        quic: crate::link::tests::quic::some_dialler(),
        websocket: crate::link::tests::websocket::some_dialler(),
        prefer: Way::Quic,
        broker: handle,
        params: Arc::default(),
        backoff: Backoff::default(),
        probes: Backoff::of_probes(),
        counters: Arc::default(),
        links: Arc::default(),
        tasks: Tasks::new(),
        network_changed: Arc::default(),
    };
    let (status, _watching) = Dialler::status();
    let dialling = Dialling {
        dialler,
        status,
        attempts: Vec::new(),
        next_at: None,
        next_is_probe: false,
        started: 0,
        turn: 0,
        news,
    };
    (dialling, receiver)
}

const WELCOMED: News = News::Progress(Progress { welcomed: true, suspect: false });
const SUSPECT: News = News::Progress(Progress { welcomed: true, suspect: true });

/// A link that was live and is suspect, and the attempt that shall replace it.
fn suspect() -> (Dialling, mpsc::Receiver<(u64, News)>) {
    let (mut dialling, receiver) = dialling();
    dialling.dial();
    dialling.on_news(1, News::Connected(Way::Quic));
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
    dialling.on_news(2, News::Connected(Way::Quic));
    assert!(!old.is_cancelled());
    assert_eq!(dialling.status.borrow().state, State::Live);
    dialling.on_news(2, WELCOMED);
    assert!(old.is_cancelled());
    assert_eq!(dialling.attempts.len(), 1);
    let status = dialling.status.borrow().clone();
    assert_eq!(
        (status.state, &*status.hub, status.suspect),
        (State::Live, "quic://192.0.2.2:10001, wss://192.0.2.2:10000", false)
    );
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
        dialling.on_news(number, News::Connected(Way::Quic));
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
        assert!(backoff.delay() <= Duration::from_millis(bound_ms));
    }
    let late: Vec<_> = (0..100).map(|_| backoff.delay()).collect();
    assert!(late.iter().max() > late.iter().min().map(|least| *least + Duration::from_secs(10)).as_ref());
}

/// A link that fell back to WebSocket, with a probe planned.
fn fallen_back() -> (Dialling, mpsc::Receiver<(u64, News)>) {
    let (mut dialling, receiver) = dialling();
    dialling.dial();
    dialling.on_news(1, News::Connected(Way::WebSocket));
    dialling.on_news(1, WELCOMED);
    let status = dialling.status.borrow().clone();
    assert_eq!((status.state, status.way, status.fallback), (State::Live, Way::WebSocket, true));
    assert_eq!(dialling.dialler.prefer, Way::WebSocket, "a new dial does not wait for QUIC");
    assert!(dialling.next_at.is_some() && dialling.next_is_probe);
    dialling.dial();
    assert!(dialling.attempts[1].is_probe);
    (dialling, receiver)
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_leaves_the_link_and_comes_ever_more_rarely() {
    let (mut dialling, _news) = fallen_back();
    let mut least = Duration::ZERO;
    for number in 2..10 {
        dialling.on_news(number, News::Failed("no answer".into()));
        assert!(dialling.status.borrow().fallback);
        assert!(dialling.next_is_probe);
        let wait = dialling.next_at.unwrap() - Instant::now();
        assert!(wait >= least && wait <= Duration::from_secs(600), "{wait:?}");
        least = (Duration::from_secs(10) * (1 << number)).min(Duration::from_secs(300));
        least /= 2;
        dialling.dial();
        assert_eq!(dialling.attempts[1].hub, dialling.attempts[0].hub, "the hub that is linked");
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_is_welcomed_replaces_the_fallback() {
    let (mut dialling, _news) = fallen_back();
    let old = dialling.attempts[0].stop.clone();
    dialling.on_news(2, News::Connected(Way::Quic));
    assert!(!old.is_cancelled());
    dialling.on_news(2, WELCOMED);
    assert!(old.is_cancelled());
    let status = dialling.status.borrow().clone();
    assert_eq!((status.state, status.way, status.fallback), (State::Live, Way::Quic, false));
    assert_eq!((dialling.next_at, dialling.dialler.prefer), (None, Way::Quic));
}

fn lost() -> News {
    News::Ended(Box::new(Ended {
        end: LinkEnd::PeerSilent,
        refusal: None,
        retry_after: None,
        welcomed: true,
    }))
}

#[tokio::test(start_paused = true)]
async fn a_quic_link_that_dies_young_lets_websocket_go_first_and_an_old_one_does_not() {
    for (lived, next) in [(1, Way::WebSocket), (3600, Way::Quic)] {
        let (mut dialling, _news) = dialling();
        dialling.dial();
        dialling.on_news(1, News::Connected(Way::Quic));
        dialling.on_news(1, WELCOMED);
        tokio::time::advance(Duration::from_secs(lived)).await;
        dialling.on_news(1, lost());
        assert_eq!(dialling.dialler.prefer, next, "after {lived} s");
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspect_fallback_is_replaced_although_a_probe_was_under_way() {
    let (mut dialling, _news) = fallen_back();
    dialling.on_news(1, SUSPECT);
    dialling.on_news(2, News::Failed("no answer".into()));
    assert!(!dialling.next_is_probe && dialling.next_at.is_some_and(|at| at <= Instant::now()));
}
