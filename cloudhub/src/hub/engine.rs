//! A hub's broker, and what it runs over: its own store, or what the replicas of its tier share.

use std::{sync::Arc, time::Duration};

use broker::{
    Handle, Tasks,
    core::{self, Config as CoreConfig},
    driver,
    instance::Instance,
    store::{
        self,
        lmdb::{backup::Copier, written::Written},
    },
};
use ops::{
    config::{Config, fabric::Durability},
    metrics::{Exporter, Readiness},
};

use super::StartError;
use crate::{
    ca::Authority,
    fabric::{
        Fabric, Local,
        nats::{
            self, Identity, Tier,
            store::{NatsStore, Told},
        },
    },
};

/// Name of a hub that is alone.
const ALONE: &str = "hub";
/// How often a replica looks whether it may serve.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A broker that runs.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) handle: Handle,
    pub(super) fabric: Arc<dyn Fabric>,
    /// Of a hub that is alone.
    pub(super) own: Option<OwnStore>,
    /// Of a replica, and what its store counts.
    tier: Option<(Tier, Told)>,
}

/// A store that is this process's own.
#[derive(Debug)]
pub(super) struct OwnStore {
    pub(super) copier: Copier,
    pub(super) written: Arc<Written>,
    pub(super) instance: Instance,
}

/// Name of this replica, in certificates and claims.
pub(super) fn replica(config: &Config) -> &str {
    config.fabric.as_ref().map_or(ALONE, |fabric| &fabric.replica)
}

/// What an acknowledgement of this hub survives.
pub(super) fn durability(config: &Config) -> Durability {
    config.fabric.as_ref().map_or(Durability::PowerLoss, ops::config::fabric::Fabric::durability)
}

impl Engine {
    /// Opens the store and starts the broker over it. Nothing is served yet.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(super) async fn start(
        config: &Config,
        authority: &Authority,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        match &config.fabric {
            None => Self::alone(config, authority, tasks),
            Some(fabric) => Box::pin(Self::replica(config, fabric, authority, tasks)).await,
        }
    }

    fn alone(config: &Config, authority: &Authority, tasks: &Tasks) -> Result<Self, StartError> {
        let (store, recovered) = store::lmdb::open(&config.data, store::lmdb::Options::hub())?;
        let instance = Instance::open(&config.data)?;
        let own = OwnStore { copier: store.copier(), written: store.written(), instance };
        let mut core = CoreConfig::hub(ALONE, authority.tier(), own.instance.id, getrandom::u64()?);
        core.mint = own.instance.minted;
        let handle = driver::start(configured(core, config), store, recovered, tasks);
        let fabric = Arc::new(Local::new(handle.clone()));
        Ok(Self { handle, fabric, own: Some(own), tier: None })
    }

    async fn replica(
        config: &Config,
        fabric: &ops::config::fabric::Fabric,
        authority: &Authority,
        tasks: &Tasks,
    ) -> Result<Self, StartError> {
        let identity =
            Identity { tier: authority.tier().to_owned(), ca_sha256: authority.certificate_sha256() };
        let (tier, feed) = Tier::open(fabric, &identity).await?;
        let opened = NatsStore::open(tier.connection().clone(), tier.claims().clone(), feed).await;
        let (store, recovered) = opened.map_err(nats::OpenError::from)?;
        // Nothing of this process outlives it: what it has is the tier's.
        let mut instance = [0; 16];
        getrandom::fill(&mut instance)?;
        let core = CoreConfig::replica(&fabric.replica, authority.tier(), instance, getrandom::u64()?);
        let told = store.told();
        let handle = driver::start(configured(core, config), store, recovered, tasks);
        Ok(Self { handle, fabric: Arc::new(tier.clone()), own: None, tier: Some((tier, told)) })
    }

    /// Of a replica: where others may dial it. Said with its lease.
    pub(super) fn advertise(&self, address: String) {
        if let Some((tier, _told)) = &self.tier {
            tier.claims().advertise(address);
        }
    }

    /// Of a replica: knows the tier's State when this returns, and may serve nodes from then on.
    ///
    /// # Errors
    /// See [`StartError`].
    pub(super) async fn join(
        &self,
        tasks: &Tasks,
        exporter: &Exporter,
        readiness: &Readiness,
    ) -> Result<(), StartError> {
        let Some((tier, told)) = &self.tier else { return Ok(()) };
        tier.start(&self.handle, tasks).await?;
        exporter.register(tier.metrics());
        exporter.register(nats::metrics::store(told.clone()));
        let (tier, readiness, stopped) = (tier.clone(), readiness.clone(), tasks.stopped());
        tasks.spawn("readiness of the tier", async move {
            let mut not_ready = None;
            while !stopped.is_cancelled() {
                let serves = tier.claims().may_serve();
                not_ready =
                    if serves { None } else { not_ready.or_else(|| Some(readiness.register("nats"))) };
                tokio::select! {
                    () = stopped.cancelled() => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                }
            }
        });
        Ok(())
    }
}

fn configured(mut core: core::Config, config: &Config) -> core::Config {
    let (streams, default) = ops::config::streams::for_core(&config.streams);
    core.streams = streams;
    if let Some(default) = default {
        core.default_stream = default;
    }
    core.exports = config.export.policy();
    core.imports = config.import.policy();
    core
}
