//! The node's one link to its tier: dialled with the identity of the moment.
//!
//! A renewed certificate means a new dialler: the link is ended in an orderly way and made again, once in
//! two months. Until the node has joined there is nothing to dial with, and nothing else waits for it.

use std::{sync::Arc, time::Duration};

use broker::{
    Handle, Tasks,
    link::{
        Counters, Links, Params,
        dial::{Backoff, Dialler, Status},
        quic::{QuicDialler, Shape},
        tls::{self, Credentials, TlsError},
    },
};
use tokio::sync::{Notify, watch};

use crate::identity::Identity;

/// What is the same for every link of this process.
#[derive(Debug, Clone)]
pub(crate) struct Uplink {
    /// `host:port`s to dial; empty: those that were stored at join.
    pub(crate) hubs: Vec<String>,
    /// The relay that may answer there beside the hubs.
    pub(crate) relay: Option<Arc<str>>,
    /// The node's broker.
    pub(crate) broker: Handle,
    /// Times and bounds.
    pub(crate) params: Arc<Params>,
    /// Counters.
    pub(crate) counters: Arc<Counters>,
}

/// Beyond what a link itself takes to end.
const END_GRACE: Duration = Duration::from_secs(1);

impl Uplink {
    /// Keeps a link with the current identity until `tasks` are asked to stop.
    pub(crate) async fn run(
        self,
        mut identity: watch::Receiver<Option<Arc<Identity>>>,
        status: watch::Sender<Status>,
        tasks: Tasks,
    ) {
        let stopped = tasks.stopped();
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

    fn dialler(&self, identity: &Identity, tasks: &Tasks) -> Result<Dialler, TlsError> {
        let credentials = Credentials {
            ca: vec![identity.ca().clone()],
            chain: vec![identity.certificate().clone()],
            key: identity.key(),
        };
        let tls = tls::dialler_through(credentials, identity.tier(), self.relay.as_deref())?;
        let hubs = if self.hubs.is_empty() { identity.quic().to_vec() } else { self.hubs.clone() };
        Ok(Dialler {
            hubs,
            quic: QuicDialler::new(Arc::new(tls), Shape::NODE.with_heartbeat(self.params.heartbeat))?,
            broker: self.broker.clone(),
            params: Arc::clone(&self.params),
            backoff: Backoff::default(),
            counters: Arc::clone(&self.counters),
            links: Arc::<Links>::default(),
            tasks: tasks.clone(),
            network_changed: Arc::<Notify>::default(),
        })
    }
}
