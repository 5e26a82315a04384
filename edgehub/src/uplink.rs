//! The node's one link to its tier: dialled with the identity of the moment.
//!
//! A renewed certificate means a new dialler: the link is ended in an orderly way and made again, once in
//! two months. Until the node has joined there is nothing to dial with, and nothing else waits for it.
//!
//! By what the last link came is kept in `DATA/link-way`, so that a restart where UDP is blocked does not
//! wait to find out again. A link that had to fall back is a standing condition, `LinkFallback`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use broker::{
    Handle, Tasks,
    event::Command,
    link::{
        Counters, Links, Params,
        dial::{Backoff, Dialler, Hub, State, Status, Way},
        quic::{QuicDialler, Shape},
        tls::{self, Credentials, TlsError},
        websocket::{Proxy, WebSocketDialler},
    },
    private,
};
use tokio::sync::{Notify, watch};

use crate::identity::Identity;

/// What is the same for every link of this process.
#[derive(Debug, Clone)]
pub(crate) struct Uplink {
    /// The data folder.
    pub(crate) data: PathBuf,
    /// Where to dial; empty: what was stored at join.
    pub(crate) hubs: Vec<Hub>,
    /// The relay that may answer there beside the hubs.
    pub(crate) relay: Option<Arc<str>>,
    /// Proxy for WebSocket.
    pub(crate) proxy: Option<Proxy>,
    /// The node's broker.
    pub(crate) broker: Handle,
    /// Times and bounds.
    pub(crate) params: Arc<Params>,
    /// Counters.
    pub(crate) counters: Arc<Counters>,
    /// The link, and its Streams.
    pub(crate) links: Arc<Links>,
}

/// Beyond what a link itself takes to end.
const END_GRACE: Duration = Duration::from_secs(1);
/// Of the file that remembers the way.
const WAY_FILE: &str = "link-way";
const WAY_MAX: usize = 64;

impl Uplink {
    /// Keeps a link with the current identity until `tasks` are asked to stop.
    pub(crate) async fn run(
        self,
        mut identity: watch::Receiver<Option<Arc<Identity>>>,
        status: watch::Sender<Status>,
        tasks: Tasks,
    ) {
        let stopped = tasks.stopped();
        tasks.spawn("link status", self.clone().tell(status.subscribe(), tasks.clone()));
        loop {
            let current = identity.borrow_and_update().clone();
            let dialling = Tasks::new();
            match current.as_deref().map(|identity| self.dialler(identity, &dialling)) {
                None => {}
                Some(Ok(dialler)) => dialling.spawn("dialler", dialler.run(status.clone())),
                Some(Err(error)) => tracing::error!(%error, "cannot dial with this identity"),
            }
            let ended = tokio::select! {
                biased;
                () = stopped.cancelled() => true,
                changed = identity.changed() => changed.is_err(),
            };
            dialling.drain(self.params.drain + END_GRACE).await;
            if ended {
                return;
            }
        }
    }

    /// Says and remembers by what the link is.
    async fn tell(self, mut status: watch::Receiver<Status>, tasks: Tasks) {
        let stopped = tasks.stopped();
        let mut remembered = self.remembered();
        let mut fallen_back = false;
        loop {
            let now = status.borrow_and_update().clone();
            if now.state == State::Live {
                if now.way != remembered {
                    self.remember(now.way);
                    remembered = now.way;
                }
                if now.fallback != fallen_back {
                    self.say(&now).await;
                    fallen_back = now.fallback;
                }
            }
            tokio::select! {
                biased;
                () = stopped.cancelled() => return,
                changed = status.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn say(&self, status: &Status) {
        let message = status.fallback.then(|| {
            tracing::warn!(hub = %status.hub, "UDP is blocked, the link is by WebSocket");
            format!(
                "UDP blocked towards {}, using WebSocket; open UDP for a faster link (it is tried again from \
                 time to time)",
                status.hub
            )
        });
        if message.is_none() {
            tracing::info!(hub = %status.hub, "QUIC works, the link has left WebSocket");
        }
        let command = Command::SetCondition { kind: "LinkFallback", subject: "hub".to_owned(), message };
        // A broker that has stopped needs no conditions.
        drop(self.broker.call(command).await);
    }

    fn remembered(&self) -> Way {
        let stored = private::read(&self.data.join(WAY_FILE), WAY_MAX).ok().flatten();
        match stored.as_deref() {
            Some(text) if text == Way::WebSocket.as_str().as_bytes() => Way::WebSocket,
            Some(_) | None => Way::Quic,
        }
    }

    /// A hint: losing it costs one wait.
    fn remember(&self, way: Way) {
        if let Err(error) = private::write(&self.data.join(WAY_FILE), way.as_str().as_bytes()) {
            tracing::debug!(%error, "the way of the link is not remembered");
        }
    }

    fn dialler(&self, identity: &Identity, tasks: &Tasks) -> Result<Dialler, TlsError> {
        let credentials = Credentials {
            ca: vec![identity.ca().clone()],
            chain: vec![identity.certificate().clone()],
            key: identity.key(),
        };
        let tls = Arc::new(tls::dialler_through(credentials, identity.tier(), self.relay.as_deref())?);
        let hubs = if self.hubs.is_empty() { identity.hubs() } else { self.hubs.clone() };
        Ok(Dialler {
            hubs,
            websocket: WebSocketDialler::new(&tls, self.proxy.clone(), tasks.clone()),
            quic: QuicDialler::new(tls, Shape::NODE.with_heartbeat(self.params.heartbeat))?,
            prefer: self.remembered(),
            broker: self.broker.clone(),
            params: Arc::clone(&self.params),
            backoff: Backoff::default(),
            probes: Backoff::of_probes(),
            counters: Arc::clone(&self.counters),
            links: Arc::clone(&self.links),
            tasks: tasks.clone(),
            network_changed: Arc::<Notify>::default(),
        })
    }
}
