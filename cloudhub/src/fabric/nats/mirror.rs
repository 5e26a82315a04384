//! What this replica knows of the tier's State: one consumer on `sys`, one on `fleet`, one on the stream of what
//! the tier sends nodes.
//!
//! Everything is told to the store ([`super::Feed`]), which shows it to the core; claims and leases are kept by
//! [`Claims`]. No session is served before both buckets have been read once
//! ([`Mirror::caught_up`]).
//!
//! A bucket that is deleted under running hubs removes nothing: no tombstone is told, nodes keep what they have,
//! a condition says so. It is made anew with a greater incarnation, what this replica holds of it is put where
//! nobody was faster, and a barrier says when that is complete. Any replica may do so: each puts only what is not
//! there, and the barrier comes last. One that lost its end (a server with an older disk) first gets again what stood
//! there, over what is older, and begins a new incarnation then.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use broker::{
    Handle,
    event::{
        Command, Response,
        tier::{DownLog, Mirrored, News},
    },
};
use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader, frame::FrameParts};
use tokio::sync::{mpsc, watch};

use super::{
    TIER,
    claims::{Claims, parse},
    connection::{Connection, NatsError},
    follow::{Entry, Follow, Followed, Start},
    names::{self, Bucket},
    setup::{self, Layout},
};
use crate::{fabric, registry::Enrolment};

/// Entries of one page when a bucket is put back.
const PAGE: usize = 256;
/// Key of `fleet`: its owner has listed its source completely.
pub const BARRIER: &str = "barrier";

/// What the mirror shows of itself. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Mirror {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connection: Connection,
    layout: Layout,
    claims: Claims,
    told: mpsc::Sender<News>,
    /// Where `sys` and `fleet` have been read up to: (incarnation, revision).
    reached: BTreeMap<&'static str, watch::Sender<Reached>>,
    /// Entries of `sys` with their revisions, claims and leases apart.
    sys: Mutex<BTreeMap<String, (Bytes, u64)>>,
    repairs: AtomicU64,
}

/// How far a bucket has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// Incarnation of the bucket; 0: not looked at yet.
    pub incarnation: u64,
    /// Everything up to this revision has been told to the store.
    pub revision: u64,
    /// All that stood there at first has been told.
    pub complete: bool,
}

impl Mirror {
    /// A mirror that tells the store by `told`. Nothing is read before it is run.
    pub fn new(connection: Connection, layout: Layout, claims: Claims, told: mpsc::Sender<News>) -> Self {
        let spaces = [Bucket::Sys, Bucket::Fleet].into_iter().filter_map(Bucket::space);
        let shared = Shared {
            connection,
            layout,
            claims,
            told,
            reached: spaces.map(|space| (space, watch::Sender::new(Reached::default()))).collect(),
            sys: Mutex::default(),
            repairs: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Waits until every space has been read once.
    pub async fn caught_up(&self) {
        for reached in self.shared.reached.values() {
            let mut reached = reached.subscribe();
            // The sender lives as long as this does.
            drop(reached.wait_for(|reached| reached.complete).await);
        }
    }

    /// Waits until a space has been read up to a revision of its incarnation of now.
    pub async fn reach(&self, space: &str, revision: u64) {
        if let Some(reached) = self.shared.reached.get(space) {
            drop(reached.subscribe().wait_for(|reached| reached.revision >= revision).await);
        }
    }

    /// How far a space has been read.
    pub fn reached(&self, space: &str) -> Reached {
        self.shared.reached.get(space).map_or_else(Reached::default, |reached| *reached.borrow())
    }

    /// Buckets that were made anew by this replica.
    pub fn repairs(&self) -> u64 {
        self.shared.repairs.load(Ordering::Relaxed)
    }

    /// An entry of `sys` and its revision, as far as it has been read.
    pub fn sys_entry(&self, key: &str) -> Option<(Bytes, u64)> {
        self.shared.sys().get(key).cloned()
    }

    /// Entries of `sys` in order, as far as it has been read.
    pub fn sys_list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<fabric::Entry> {
        let sys = self.shared.sys();
        let from = after.map_or(Bound::Included(prefix), |after| Bound::Excluded(after.max(prefix)));
        let found = sys.range::<str, _>((from, Bound::Unbounded));
        let found = found.take_while(|(key, _)| key.starts_with(prefix)).take(limit);
        found
            .map(|(key, (value, revision))| fabric::Entry {
                key: key.clone(),
                value: value.clone(),
                revision: *revision,
            })
            .collect()
    }

    /// Follows one bucket for ever.
    pub async fn run(self, bucket: Bucket, broker: Handle) {
        let Some(space) = bucket.space() else { return };
        let shared = &*self.shared;
        let mut follow =
            Follow::new(shared.connection.clone(), bucket.stream().to_owned(), Start::Everything);
        let mut incarnation = 0;
        let mut whole = false;
        // What a bucket held that is no more, to be put into the one that takes its place.
        let mut lost: Option<Held> = None;
        loop {
            match follow.next().await {
                Followed::Began { incarnation: begun } => {
                    let before = std::mem::replace(&mut incarnation, begun);
                    if before != 0 {
                        tracing::warn!(space, before, now = begun, "the tier's bucket is a new one");
                        if lost.is_none() && whole {
                            lost = Some(shared.held(bucket, &broker).await);
                        }
                    }
                    whole = false;
                    if bucket == Bucket::Sys {
                        shared.claims.begin_again();
                    }
                    shared.move_to(space, |reached| {
                        *reached = Reached { incarnation: begun, ..Reached::default() }
                    });
                }
                Followed::Entries { entries, upto } => {
                    let records = match bucket {
                        Bucket::Sys => shared.take_sys(incarnation, &entries, &broker).await,
                        _ => records(bucket, incarnation, &entries),
                    };
                    let complete = whole.then_some(upto);
                    if !shared.tell(space, incarnation, records, complete).await {
                        return;
                    }
                    shared.move_to(space, |reached| reached.revision = upto);
                }
                Followed::CaughtUp { upto } => {
                    whole = true;
                    if !shared.tell(space, incarnation, Vec::new(), Some(upto)).await {
                        return;
                    }
                    shared.move_to(space, |reached| {
                        reached.revision = upto;
                        reached.complete = true;
                    });
                    if let Some(held) = lost.take() {
                        shared.put_back(bucket, held, &broker).await;
                    }
                }
                Followed::Gone => {
                    if lost.is_none() && whole {
                        lost = Some(shared.held(bucket, &broker).await);
                    }
                    shared.make_anew(bucket, incarnation, &broker).await;
                }
                Followed::WentBack { read, holds } => {
                    tracing::error!(space, read, holds, "NATS lost acknowledged writes of this space");
                    if lost.is_none() && whole {
                        let held = shared.held(bucket, &broker).await;
                        shared.restore(bucket, &held, holds).await;
                        lost = Some(held);
                    }
                    shared.begin_anew(bucket, incarnation, &broker).await;
                }
            }
        }
    }

    /// Looks for ever whether the streams that are not followed are still there: those of nodes' Logs and State. One
    /// that was deleted is made anew; nodes send again what they keep, and a condition says it until this replica
    /// ends.
    pub async fn run_watch(self, broker: Handle) {
        let shared = &*self.shared;
        let followed = [Bucket::Sys.stream(), Bucket::Fleet.stream(), names::DOWNLOG];
        loop {
            tokio::time::sleep(WATCH_EVERY).await;
            for config in setup::configs(&shared.layout) {
                let name = config.name.clone();
                let is_gone = !followed.contains(&&*name)
                    && matches!(shared.connection.info(&name).await, Err(NatsError::Missing));
                if !is_gone {
                    continue;
                }
                tracing::error!(stream = %name, "a stream of the tier was deleted");
                let message = format!(
                    "stream {name} was deleted in NATS: it is made anew, and nodes send again what they keep; what \
                     they do not is lost. Find out who deletes streams of account OCTOBUS"
                );
                condition(&broker, &name, Some(message)).await;
                if let Err(error) = setup::ensure(&shared.connection, config).await {
                    tracing::error!(stream = %name, %error, "the stream cannot be made anew; it is tried again");
                }
            }
        }
    }

    /// Follows what the tier sends nodes, for ever: what comes from now on. What stood there before is read for
    /// each node when it is adopted.
    pub async fn run_downlog(self) {
        let shared = &*self.shared;
        let mut follow = Follow::new(shared.connection.clone(), names::DOWNLOG.to_owned(), Start::Now);
        let mut incarnation = 0;
        loop {
            match follow.next().await {
                Followed::Began { incarnation: begun } => incarnation = begun,
                Followed::Entries { entries, .. } => {
                    // Of several for one node, the last says all.
                    let mut last = BTreeMap::new();
                    for entry in &entries {
                        if let Ok(node) = names::node_of_downlog(&entry.subject) {
                            last.insert(node, entry.revision);
                        }
                    }
                    for (node, last) in last {
                        let down = DownLog { epoch: incarnation, last };
                        if shared.told.send(News::Arrived { node: node.into(), down }).await.is_err() {
                            return;
                        }
                    }
                }
                Followed::CaughtUp { .. } => {}
                Followed::Gone => {
                    tracing::error!(
                        "the stream {} was deleted: what waited for nodes is lost",
                        names::DOWNLOG
                    );
                    if let Err(error) = setup::prepare(&shared.connection, &shared.layout, false).await {
                        tracing::error!(%error, "it cannot be made anew");
                    }
                }
                Followed::WentBack { read, holds } => {
                    tracing::error!(read, holds, "NATS lost acknowledged writes of {}", names::DOWNLOG);
                }
            }
        }
    }
}

impl Shared {
    fn sys(&self) -> MutexGuard<'_, BTreeMap<String, (Bytes, u64)>> {
        self.sys.lock().expect("no panic under this lock")
    }

    fn move_to(&self, space: &str, change: impl FnOnce(&mut Reached)) {
        if let Some(reached) = self.reached.get(space) {
            reached.send_modify(change);
        }
    }

    /// False: the store has ended.
    async fn tell(&self, space: &str, incarnation: u64, records: Vec<Record>, complete: Option<u64>) -> bool {
        let mirrored = Mirrored { space: space.into(), incarnation, records, complete };
        self.told.send(News::Mirrored(mirrored)).await.is_ok()
    }

    /// Takes what was read of `sys`; what of it the core is to know.
    async fn take_sys(&self, incarnation: u64, entries: &[Entry], broker: &Handle) -> Vec<Record> {
        let mut identities = Vec::new();
        for entry in entries {
            let Ok(key) = Bucket::Sys.key(&entry.subject) else { continue };
            let value = entry.value.as_deref();
            if let Some(node) = key.strip_prefix("claims/") {
                let claim = value.and_then(|value| parse(&key, value));
                self.claims.saw_claim(node, claim, entry.revision);
            } else if let Some(replica) = key.strip_prefix("lease/") {
                let lease = value.and_then(|value| parse(&key, value));
                self.claims.saw_lease(replica, lease, entry.revision);
            } else if key.starts_with("token/") || key.starts_with("identity/") || key == TIER {
                let before = match &entry.value {
                    Some(value) => self.sys().insert(key.clone(), (value.clone(), entry.revision)),
                    None => self.sys().remove(&key),
                };
                if let Some(node) = key.strip_prefix("identity/") {
                    identities.push(record(incarnation, &key, entry));
                    let generation = |value: &[u8]| {
                        parse::<Enrolment>(&key, value).map_or(0, |enrolment| enrolment.generation)
                    };
                    let was = before.map_or(0, |(value, _)| generation(&value));
                    let now = value.map_or(0, generation);
                    if was > 0 && now > was {
                        let node = Arc::from(node);
                        drop(broker.call(Command::CloseNode { node, generation: now }).await);
                    }
                }
            }
        }
        identities
    }

    /// What this replica holds of a bucket.
    async fn held(&self, bucket: Bucket, broker: &Handle) -> Held {
        if bucket == Bucket::Sys {
            return self.sys().clone();
        }
        let mut held = BTreeMap::new();
        let mut after = None;
        loop {
            let (origin, space) = (Arc::from(""), Arc::from("fleet"));
            let prefix = String::new();
            let list = Command::StateList { origin, space, prefix, after, limit: PAGE, at: None };
            let Ok(Response::Entries { entries, more, .. }) = broker.call(list).await else { return held };
            after = entries.last().map(|entry| entry.key.clone());
            held.extend(entries.iter().map(|entry| (entry.key.clone(), (entry.value(), entry.revision))));
            if !more {
                return held;
            }
        }
    }

    /// The bucket was deleted: makes it anew.
    async fn make_anew(&self, bucket: Bucket, incarnation: u64, broker: &Handle) {
        let name = bucket.name();
        tracing::error!(bucket = name, "the tier's bucket was deleted; nodes keep what they have");
        let message = format!(
            "bucket {name} was deleted in NATS: nodes keep what they have; it is made anew, and what this replica \
             holds of it is put back. Find out who deletes buckets of account OCTOBUS"
        );
        condition(broker, name, Some(message)).await;
        let mut config = setup::of_bucket(bucket, &self.layout);
        config.description = Some(setup::description(setup::mint(incarnation)));
        if let Err(error) = setup::ensure(&self.connection, config).await {
            tracing::error!(bucket = name, %error, "the bucket cannot be made anew; create it by hand");
        }
    }

    /// The bucket ends at `holds`: writes again what this replica knows to have stood behind that, where nothing
    /// newer is. Before the new incarnation begins, so that nobody is told older values in it; the barrier last, so
    /// that nothing is missing in front of it. What was deleted behind it is there again.
    async fn restore(&self, bucket: Bucket, held: &Held, holds: u64) {
        let newer = held.iter().filter(|(key, (_, revision))| *key != BARRIER && *revision > holds);
        let barrier = held.get_key_value(BARRIER);
        let mut count = 0_usize;
        for (key, (value, _)) in newer.chain(barrier) {
            match self.put_over(bucket, key, value, holds).await {
                Ok(put) => count += usize::from(put),
                Err(error) => {
                    tracing::error!(bucket = bucket.name(), key, %error, "what NATS lost could not be written again");
                    break;
                }
            }
        }
        tracing::warn!(bucket = bucket.name(), count, "wrote again what NATS had lost");
    }

    /// The bucket holds less than was read of it: what is written now would take revisions that others know with
    /// other values. A new incarnation makes them greater.
    async fn begin_anew(&self, bucket: Bucket, incarnation: u64, broker: &Handle) {
        let name = bucket.name();
        let message = format!(
            "NATS lost acknowledged writes of bucket {name}: a server came back without its last seconds. A new \
             incarnation begins with what is left of it and what this replica holds"
        );
        condition(broker, name, Some(message)).await;
        let info = match self.connection.info(bucket.stream()).await {
            Ok(info) => info,
            Err(error) => return tracing::error!(bucket = name, %error, "the bucket cannot be looked at"),
        };
        if setup::incarnation(&info) != incarnation {
            return; // another replica was faster
        }
        let mut config = info.config;
        config.description = Some(setup::description(setup::mint(incarnation)));
        let request = serde_json::to_value(&config).expect("a stream's configuration is JSON");
        let path = format!("STREAM.UPDATE.{}", bucket.stream());
        if let Err(error) = self.connection.ask::<serde_json::Value>(&path, &request).await {
            tracing::error!(bucket = name, %error, "the bucket cannot begin a new incarnation");
        }
    }

    /// Puts back what was held and a new bucket lacks, then says that it is complete.
    async fn put_back(&self, bucket: Bucket, mut held: Held, broker: &Handle) {
        let name = bucket.name();
        let had_barrier = held.remove(BARRIER).is_some();
        let mut count = 0_usize;
        for (key, (value, _)) in held {
            match self.put_absent(bucket, &key, value).await {
                Ok(true) => count += 1,
                Ok(false) => {}
                Err(error) => {
                    let message = format!("bucket {name} is new, and {key} could not be put back: {error}");
                    tracing::error!(bucket = name, key, %error, "could not be put back");
                    return condition(broker, name, Some(message)).await;
                }
            }
        }
        if bucket == Bucket::Sys {
            self.claims.write_again().await;
        }
        if had_barrier && let Err(error) = self.put_absent(bucket, BARRIER, Bytes::new()).await {
            tracing::error!(bucket = name, %error, "the barrier could not be put back: `octobus barrier` writes it");
        }
        self.repairs.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(bucket = name, count, "put back what this replica held");
        condition(broker, name, None).await;
    }

    /// False: it is there, or was.
    async fn put_absent(&self, bucket: Bucket, key: &str, value: Bytes) -> Result<bool, NatsError> {
        self.put_over(bucket, key, &value, 0).await
    }

    /// Puts a value where there never was one, or over one of a revision up to this; false: a newer one is there.
    /// Tried again for as long as the servers are electing.
    async fn put_over(&self, bucket: Bucket, key: &str, value: &Bytes, upto: u64) -> Result<bool, NatsError> {
        let mut tries = 0;
        loop {
            match self.try_put_over(bucket, key, value, upto).await {
                Err(NatsError::Conflict) => return Ok(false),
                Err(NatsError::Unavailable | NatsError::Unknown(_)) if tries < PUT_TRIES => {
                    tries += 1;
                    tokio::time::sleep(PUT_RETRY).await;
                }
                done => return done,
            }
        }
    }

    async fn try_put_over(
        &self,
        bucket: Bucket,
        key: &str,
        value: &Bytes,
        upto: u64,
    ) -> Result<bool, NatsError> {
        let mut there = 0;
        if upto > 0 {
            there = self.connection.get(bucket, key).await?.map_or(0, |entry| entry.revision);
        }
        if there > upto {
            return Ok(false);
        }
        self.connection.put(bucket, key, Some(value.clone()), Some(there)).await.map(|_revision| true)
    }
}

/// What a replica holds of a bucket: value and revision of each key.
type Held = BTreeMap<String, (Bytes, u64)>;

/// How often streams that are not followed are looked at.
const WATCH_EVERY: Duration = Duration::from_secs(5);
/// Before a key is given up: a minute.
const PUT_TRIES: usize = 120;
const PUT_RETRY: Duration = Duration::from_millis(500);

async fn condition(broker: &Handle, bucket: &str, message: Option<String>) {
    let command = Command::SetCondition { kind: "TierBucket", subject: bucket.to_owned(), message };
    drop(broker.call(command).await);
}

fn records(bucket: Bucket, incarnation: u64, entries: &[Entry]) -> Vec<Record> {
    let record = |entry: &Entry| match bucket.key(&entry.subject) {
        Ok(key) => Some(record(incarnation, &key, entry)),
        Err(error) => {
            tracing::warn!(subject = entry.subject, %error, "not a key of this program: left out");
            None
        }
    };
    entries.iter().filter_map(record).collect()
}

fn record(incarnation: u64, key: &str, entry: &Entry) -> Record {
    let parts = FrameParts {
        topic: key,
        time_us: entry.time_us,
        time_trusted: true,
        payload: entry.value.as_deref().unwrap_or_default(),
        ..FrameParts::default()
    };
    let header = RecordHeader {
        kind: if entry.value.is_some() { Kind::PUT } else { Kind::TOMBSTONE },
        class: Class::State as u8,
        flags: Flags::default(),
        source: 0,
        epoch: incarnation,
        seq: entry.revision,
        aux: 0,
    };
    Record { header, body: parts.encode() }
}
