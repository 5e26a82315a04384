//! One simulated node: dials like the agent, and lives on the agent's link and core.
//!
//! What is the agent's own: the core (`broker::fleet`), the link (`broker::link::run`: hello, resume, records,
//! heartbeats, silence), TLS, certificates and tickets, the back-off with full jitter, retry-after, the second
//! dial from another port while a path is silent. What is not: the store on disk, fronts, the race with
//! WebSocket, and a socket of its own.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::Duration,
};

use broker::{
    Handle,
    link::{self, Ended, Link, LinkEnd, Progress, dial::Backoff},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{crew::Crew, gate::Pass, pki::NodeTls};

/// What others may do to a node.
#[derive(Debug, Default)]
pub struct Leash {
    /// Ends the link that it has.
    link: Mutex<Option<CancellationToken>>,
}

impl Leash {
    /// Has the node end its link in an orderly way; false if it has none. It comes back by itself.
    pub fn pull(&self) -> bool {
        match self.link.lock().expect("no panic under this lock").take() {
            Some(link) => {
                link.cancel();
                true
            }
            None => false,
        }
    }
}

/// A link that was welcomed.
struct Live {
    running: Pin<Box<dyn Future<Output = Ended> + Send>>,
    progress: watch::Receiver<Progress>,
    stop: CancellationToken,
}

/// Why there is no link.
struct NoLink {
    what: String,
    retry_after: Option<Duration>,
}

/// Longest wait that a hub may ask for, as in the agent.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Keeps a node linked until the crew stops. `place` is its number among the worker's nodes.
pub async fn run(crew: Arc<Crew>, place: u32) {
    let mut node = Node {
        tls: crew.identities.node(crew.plan.first + place),
        handle: crew.fleet.member(place),
        dials: crew.plan.first + place,
        crew,
        place,
    };
    let (base, cap) = node.crew.plan.scenario.backoff;
    let mut backoff = Backoff::new(base, cap);
    let stopped = node.crew.stop.clone();
    while !stopped.is_cancelled() {
        let pass = tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            pass = node.crew.gate.enter() => pass,
        };
        let delay = match Box::pin(node.establish(pass)).await {
            Ok(live) => {
                backoff.reset();
                node.crew.tally.connected.fetch_add(1, Relaxed);
                let ended = node.live(live).await;
                node.crew.tally.connected.fetch_sub(1, Relaxed);
                match ended.end {
                    LinkEnd::Stopped => node.crew.tally.left(),
                    ref end => node.crew.tally.lost(&end.to_string()),
                }
                ended.retry_after.unwrap_or_default().min(RETRY_AFTER_MAX) + backoff.delay()
            }
            Err(no_link) => {
                node.crew.tally.failed(&no_link.what);
                no_link.retry_after.unwrap_or_default().min(RETRY_AFTER_MAX) + backoff.delay()
            }
        };
        tokio::select! {
            biased;
            () = stopped.cancelled() => return,
            () = sleep(delay) => {}
        }
    }
}

struct Node {
    crew: Arc<Crew>,
    tls: Arc<NodeTls>,
    handle: Handle,
    place: u32,
    /// Dials so far: which hub and which socket are next.
    dials: u32,
}

impl Node {
    /// Dials the hub whose turn it is, up to Welcome.
    async fn establish(&mut self, pass: Pass) -> Result<Live, NoLink> {
        let began = Instant::now();
        let crew = &self.crew;
        let (hub, socket) = crew.way(self.dials);
        self.dials = self.dials.wrapping_add(1);
        let tls = crew.identities.config(&self.tls);
        let had_ticket = self.tls.has_ticket();
        let unlinked = |what: String| NoLink { what, retry_after: None };
        let (transport, certificate) = match timeout(crew.params.handshake, socket.dial(tls, hub)).await {
            Ok(Ok(connected)) => connected,
            Ok(Err(error)) => return Err(unlinked(error.to_string())),
            Err(_elapsed) => return Err(unlinked("no answer to the handshake".to_owned())),
        };
        let stop = crew.stop.child_token();
        let sender = watch::Sender::new(Progress::default());
        let mut progress = sender.subscribe();
        let link = Link {
            peer: certificate.identity.peer(),
            dialler: true,
            broker: self.handle.clone(),
            params: Arc::clone(&crew.params),
            counters: Arc::clone(&crew.counters),
            stop: stop.clone(),
            progress: Some(sender),
            links: Arc::clone(&crew.links),
        };
        let mut running: Pin<Box<dyn Future<Output = Ended> + Send>> = Box::pin(link::run(transport, link));
        loop {
            tokio::select! {
                biased;
                ended = &mut running => {
                    let what = match &ended.refusal {
                        Some(refusal) => format!("refused: {}", refusal.message),
                        None => ended.end.to_string(),
                    };
                    return Err(NoLink { what, retry_after: ended.retry_after });
                }
                Ok(()) = progress.changed() => if progress.borrow_and_update().welcomed { break }
            }
        }
        drop(pass);
        crew.tally.welcomed(began.elapsed(), had_ticket);
        *crew.leashes[self.place as usize].link.lock().expect("no panic under this lock") =
            Some(stop.clone());
        Ok(Live { running, progress, stop })
    }

    /// Until the link ends. While its path is silent another is dialled; the newer one that is welcomed stays.
    async fn live(&mut self, mut live: Live) -> Ended {
        let mut noticed = false;
        let tally = Arc::clone(&self.crew.tally);
        let notice = |ended: Ended, noticed: bool| {
            if !noticed && ended.end != LinkEnd::Stopped {
                tally.noticed();
            }
            ended
        };
        loop {
            let suspect = tokio::select! {
                biased;
                ended = &mut live.running => return notice(ended, noticed),
                Ok(()) = live.progress.changed() => live.progress.borrow_and_update().suspect,
            };
            if !suspect {
                continue;
            }
            if !std::mem::replace(&mut noticed, true) {
                tally.noticed();
            }
            let other = async {
                let pass = self.crew.gate.enter().await;
                self.establish(pass).await
            };
            let replaced = tokio::select! {
                biased;
                ended = &mut live.running => return notice(ended, noticed),
                other = Box::pin(other) => other,
            };
            if let Ok(newer) = replaced {
                noticed = false;
                let older = std::mem::replace(&mut live, newer);
                older.stop.cancel();
                // It has to end by itself, or the core would keep its session.
                self.crew.tasks.spawn("older link", async { drop(older.running.await) });
            }
        }
    }
}
