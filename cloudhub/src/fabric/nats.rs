//! The tier on NATS: everything in cloudhub that names NATS is here and below.
//!
//! | file | |
//! |---|---|
//! | `names` | what everything is called |
//! | `connection` | one connection, and requests whose answers say exactly what happened |
//! | `setup` | what the servers must offer; buckets and streams are made |
//! | `claims` | which replica has which node, leases |
//! | `follow` | everything that stands in a bucket or stream, then everything that comes |
//! | `state` | the tier's State, read and written |
//! | `live` | messages between nodes and users |
//! | `store` | what nodes own: their Logs and State, written and read for this replica's broker |
//! | `mirror` | what the tier's State is, told to the store; buckets that were deleted |
//!
//! What the tier tells a replica's store comes by a [`Feed`]; what nodes own is written by that store.

pub mod claims;
pub mod connection;
pub mod follow;
pub mod live;
pub mod metrics;
pub mod mirror;
pub mod names;
pub mod setup;
mod state;
pub mod store;

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use broker::{Handle, Stopped, Tasks, clock, event::tier::News};
use bytes::Bytes;
use ops::config::fabric as config;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use self::{
    claims::Claims,
    connection::{Access, Connection, NatsError, Tls},
    live::Live,
    mirror::Mirror,
    names::Bucket,
    setup::{Layout, SetupError},
};

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No server lets it in.
    #[error(
        "cannot connect to {servers}: {source}; check fabric.servers, fabric.user and that nats-server.conf has \
         account OCTOBUS"
    )]
    Connect { servers: String, source: async_nats::ConnectError },
    /// A file of the configuration.
    #[error("cannot read {path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    /// The servers do not offer what is needed.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A request failed.
    #[error("the tier's NATS servers: {0}")]
    Nats(#[from] NatsError),
    /// The tier was begun by a hub with another authority.
    #[error(
        "these NATS servers hold tier {theirs}, this replica has the CA of tier {ours}: mount the same files as the \
         other replicas (fabric.authority), or name servers of this tier"
    )]
    OtherTier { theirs: String, ours: String },
    /// The number of shards is fixed.
    #[error("this tier was begun with fabric.shards = {theirs}: write that, it cannot be changed")]
    Shards { theirs: u32 },
    /// The broker stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// Key of `sys` that says whose these buckets are: written by the first replica that ever started.
const TIER: &str = "tier";

/// Its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TierRecord {
    tier: String,
    ca_sha256: String,
    shards: u32,
}

/// Who this replica is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The tier's id.
    pub tier: String,
    /// SHA-256 of its CA's certificate.
    pub ca_sha256: [u8; 32],
}

/// One replica's part of a tier.
#[derive(Debug, Clone)]
pub struct Tier {
    connection: Connection,
    claims: Claims,
    mirror: Mirror,
    replica: Arc<str>,
    broker: Arc<OnceLock<Handle>>,
    live: Arc<OnceLock<Live>>,
}

impl Tier {
    /// Connects, checks what the servers offer, and makes what is not there. What the tier tells this replica's
    /// store comes by the feed, once it is [started](Self::start).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(config: &config::Fabric, identity: &Identity) -> Result<(Self, Feed), OpenError> {
        let access = access(config)?;
        let connection = match Connection::open(&access, config.shards).await {
            Ok(connection) => connection,
            Err(source) => {
                return Err(OpenError::Connect { servers: config.servers.join(", "), source });
            }
        };
        let layout = Layout {
            copies: config.copies,
            shards: config.shards,
            log_bytes: config.log_bytes,
            log_age: config.log_age,
            downlog_bytes: config.downlog_bytes,
        };
        setup::prepare(&connection, &layout, config.sync_always).await?;
        same_tier(&connection, identity, config.shards).await?;
        let (teller, feed) = Feed::new();
        // Greater in each life of the replica, as long as clocks go forward; equal in none.
        let epoch = clock::wall_us();
        let claims = Claims::new(connection.clone(), &config.replica, epoch, teller.fenced);
        let mirror = Mirror::new(connection.clone(), layout, claims.clone(), teller.told);
        let replica = Arc::clone(&config.replica);
        let (broker, live) = (Arc::default(), Arc::default());
        Ok((Self { connection, claims, mirror, replica, broker, live }, feed))
    }

    /// The connection.
    #[must_use]
    pub const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Who has which node.
    #[must_use]
    pub const fn claims(&self) -> &Claims {
        &self.claims
    }

    /// What this replica knows of the tier's State.
    #[must_use]
    pub const fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// Begins to follow the tier and to publish for its users, over a broker whose store reads the feed. When this
    /// returns, this replica knows the tier's State and may serve nodes.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn start(&self, broker: &Handle, tasks: &Tasks) -> Result<(), OpenError> {
        let stopped = tasks.stopped();
        let spawn = |name: &'static str, work: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let stopped = stopped.clone();
            tasks.spawn(name, async move {
                tokio::select! {
                    biased;
                    () = stopped.cancelled() => {}
                    () = work => {}
                }
            });
        };
        let _first = self.broker.set(broker.clone());
        for (name, bucket) in [("mirror of sys", Bucket::Sys), ("mirror of fleet", Bucket::Fleet)] {
            spawn(name, Box::pin(self.mirror.clone().run(bucket, broker.clone())));
        }
        spawn("watch of streams", Box::pin(self.mirror.clone().run_watch(broker.clone())));
        spawn("mirror of the down log", Box::pin(self.mirror.clone().run_downlog()));
        self.mirror.caught_up().await;
        patiently(async || self.claims.begin().await).await?;
        let claims = self.claims.clone();
        let until = stopped.clone();
        tasks.spawn("lease", async move { claims.keep_lease(until).await });
        let opened =
            Live::open(self.connection.clone(), self.claims.clone(), broker.clone(), &self.replica).await?;
        let (live, outbox) = opened;
        spawn("live up", Box::pin(live.clone().run_up(outbox)));
        spawn("live down", Box::pin(live.clone().run_down()));
        spawn("live passed on", Box::pin(live.clone().run_passed()));
        let _first = self.live.set(live);
        Ok(())
    }
}

/// Writes whose tier this is, or finds that it is another's.
async fn same_tier(connection: &Connection, identity: &Identity, shards: u32) -> Result<(), OpenError> {
    let ours = TierRecord {
        tier: identity.tier.clone(),
        ca_sha256: broker::enroll::hex(&identity.ca_sha256),
        shards,
    };
    loop {
        let found = patiently(async || connection.get(Bucket::Sys, TIER).await).await?;
        let Some(value) = found.as_ref().and_then(|found| found.value.clone()) else {
            let value = Bytes::from(serde_json::to_vec(&ours).expect("texts and numbers"));
            let revision = found.map_or(0, |found| found.revision);
            match connection.put(Bucket::Sys, TIER, Some(value), Some(revision)).await {
                // Whatever became of it is read.
                Ok(_) | Err(NatsError::Conflict | NatsError::Unknown(_)) => {}
                Err(NatsError::Unavailable) => tokio::time::sleep(RETRY).await,
                Err(error) => return Err(error.into()),
            }
            continue;
        };
        let theirs = serde_json::from_slice::<TierRecord>(&value).map_err(|error| NatsError::Refused {
            code: 0,
            reason: format!(
                "key {TIER} of bucket {} is not what this program wrote: {error}",
                Bucket::Sys.name()
            ),
        })?;
        if (&theirs.tier, &theirs.ca_sha256) != (&ours.tier, &ours.ca_sha256) {
            return Err(OpenError::OtherTier { theirs: theirs.tier, ours: ours.tier });
        }
        if theirs.shards != shards {
            return Err(OpenError::Shards { theirs: theirs.shards });
        }
        return Ok(());
    }
}

/// How long servers may take to elect who leads, at start.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(200);

/// Asks until there is an answer, of what may be asked twice.
async fn patiently<T>(ask: impl AsyncFn() -> Result<T, NatsError>) -> Result<T, NatsError> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Err(NatsError::Unavailable | NatsError::Unknown(_)) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(RETRY).await;
            }
            answer => return answer,
        }
    }
}

fn access(config: &config::Fabric) -> Result<Access, OpenError> {
    let login = match (&config.user, &config.password_file) {
        (Some(user), Some(path)) => {
            let password = std::fs::read_to_string(path)
                .map_err(|source| OpenError::File { path: path.clone(), source })?;
            Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned()))
        }
        _ => None,
    };
    Ok(Access {
        servers: config.servers.clone(),
        name: format!("octobus hub {}", config.replica),
        login,
        tls: Tls { ca: config.ca.clone(), identity: config.certificate.clone().zip(config.key.clone()) },
    })
}

/// Where this replica's store hears of the tier: who is fenced, what was read of the tier's spaces, what was
/// appended for a node (any node, here or not). One task reads it.
#[derive(Debug)]
pub struct Feed {
    fenced: mpsc::UnboundedReceiver<News>,
    told: mpsc::Receiver<News>,
}

/// The other end of a [`Feed`].
#[derive(Debug, Clone)]
pub struct Teller {
    /// Not bounded by itself: one for each node that this replica has, at most.
    pub fenced: mpsc::UnboundedSender<News>,
    /// What waits is bounded in number here and in bytes by who fills it.
    pub told: mpsc::Sender<News>,
}

/// Batches that wait for the store: 4 MiB.
const TOLD_MAX: usize = 16;

impl Feed {
    /// Both ends.
    #[allow(clippy::disallowed_methods)] // bounded by who sends: one fence for each node that this replica has
    pub fn new() -> (Teller, Self) {
        let (fenced, fences) = mpsc::unbounded_channel();
        let (told, tells) = mpsc::channel(TOLD_MAX);
        (Teller { fenced, told }, Self { fenced: fences, told: tells })
    }

    /// The next that the tier tells; pending for ever once it has ended. Fences come first. Cancel safe.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<News> {
        if let Poll::Ready(Some(fenced)) = self.fenced.poll_recv(cx) {
            return Poll::Ready(fenced);
        }
        match self.told.poll_recv(cx) {
            Poll::Ready(Some(news)) => Poll::Ready(news),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}
