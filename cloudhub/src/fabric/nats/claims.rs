//! Which replica has which node: `claims/<n>`, written by compare-and-set once per connect, never renewed.
//!
//! ```text
//! claims/<n>       {replica, epoch, session, instance, generation, stamp, away}
//! lease/<replica>  {epoch, beat, address}   rewritten every 3 s
//! ```
//!
//! A claim holds as long as its replica does: one whose lease has not changed for [`DEAD_AFTER`], by the clock
//! of whoever asks, counted from the last change that it saw, is dead, and so are the claims that its epoch
//! made. A replica that could not renew for [`GIVE_UP_AFTER`] closes its sessions itself, so that nobody else
//! has a node before it is let go here.
//!
//! The newest session of an instance wins, wherever it is, and the older is fenced ([`News::Fenced`]). Another
//! instance of the same generation is refused while the first has a session, and for [`DUPLICATE_HOLD`] after.
//! Every replica follows the bucket, so a claim is one compare-and-set on the revision that it knows; only when
//! that is old does it read and try again.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use broker::event::tier::{News, come_again};
use bytes::Bytes;
use codec::proto::{Refusal, RefusalReason};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until, timeout, timeout_at},
};

use super::{
    connection::{Connection, NatsError},
    names::Bucket,
};

/// How often a replica rewrites its lease.
pub const RENEW_EVERY: Duration = Duration::from_secs(3);
/// A lease that was not seen to change for this long is a dead replica's.
pub const DEAD_AFTER: Duration = Duration::from_secs(10);
/// A replica that could not renew for this long lets go of its nodes.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(8);
/// How long another instance of a generation waits for the first to be really gone.
pub const DUPLICATE_HOLD: Duration = Duration::from_secs(60);
/// A replica that stops says so, if it can within this.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);
/// Others claim the same node in between so many times at most.
const ATTEMPTS: usize = 4;
/// After a failure that passes, a node comes again after this long.
const RETRY_MS: u32 = 1_000;

/// Value of `claims/<n>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Who has the node.
    pub replica: String,
    /// Which life of that replica.
    pub epoch: u64,
    /// Counts the claims of this node.
    pub session: u64,
    /// The node's instance, in hex.
    pub instance: String,
    /// Generation in its certificate.
    pub generation: u32,
    /// Of its Hello: a greater one of the same instance is newer. 0: it has none.
    #[serde(default)]
    pub stamp: u64,
    /// The session has ended.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub away: bool,
}

/// Value of `lease/<replica>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Which life of the replica: greater in each.
    pub epoch: u64,
    /// Counts renewals.
    pub beat: u64,
    /// It has stopped by itself: what it claimed is free at once.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
    /// Where other replicas dial it by QUIC, `host:port`, for Streams to its nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// Who asks for a node.
#[derive(Debug, Clone, Copy)]
pub struct Claimant<'a> {
    /// The node.
    pub node: &'a str,
    /// Its instance.
    pub instance: &'a [u8],
    /// Generation in its certificate.
    pub generation: u32,
    /// Of its Hello (`claim`); 0 if it has none.
    pub stamp: u64,
}

/// A node is this replica's, until it is fenced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Counts the claims of this node: what is written under a smaller one is late.
    pub session: u64,
}

/// Who has a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This replica.
    Here,
    /// Another one.
    Replica(String),
    /// Nobody: it is offline.
    Nobody,
}

/// Counted for the metrics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Claims that were granted.
    pub granted: AtomicU64,
    /// Refused: another instance has the name.
    pub refused: AtomicU64,
    /// Sessions here that lost their node to a newer one.
    pub fenced: AtomicU64,
    /// NATS operations that claims took.
    pub operations: AtomicU64,
    /// Times that this replica let go of all its nodes because it could not renew.
    pub given_up: AtomicU64,
}

/// Claims of this replica, and what it knows of the others'. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Claims {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    connection: Connection,
    replica: String,
    /// Of this life.
    epoch: u64,
    /// Not bounded by itself: one for each node that this replica has, at most.
    fenced: mpsc::UnboundedSender<News>,
    known: Mutex<Known>,
    counters: Counters,
    /// Where others may dial this replica: known once its ports are.
    address: OnceLock<String>,
}

/// What was followed of the bucket, and what this replica has.
#[derive(Debug, Default)]
struct Known {
    claims: HashMap<Arc<str>, Seen<Claim>>,
    leases: HashMap<String, Seen<Lease>>,
    mine: HashMap<Arc<str>, Claim>,
    /// When this replica's lease was last certainly written; `None` before the first time, and after it let go.
    renewed: Option<Instant>,
    /// Another process began later under this replica's name.
    superseded: bool,
}

/// A value, where it stands, and when it was seen to change.
#[derive(Debug, Clone)]
struct Seen<T> {
    /// `None`: deleted.
    value: Option<T>,
    revision: u64,
    at: Instant,
}

impl Claims {
    /// Of this replica, in this life of it. Whoever loses its node is told to `fenced`.
    pub fn new(
        connection: Connection,
        replica: &str,
        epoch: u64,
        fenced: mpsc::UnboundedSender<News>,
    ) -> Self {
        let shared = Shared {
            connection,
            replica: replica.to_owned(),
            epoch,
            fenced,
            known: Mutex::default(),
            counters: Counters::default(),
            address: OnceLock::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// What is counted.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Takes a node for a session here. One compare-and-set, unless others claimed it of late.
    ///
    /// An older session of the instance elsewhere is fenced by this. Dropping the future may leave the node
    /// claimed by a session that is not there: the next claim of the instance succeeds all the same.
    ///
    /// # Errors
    /// What the node is told.
    pub async fn claim(&self, claimant: Claimant<'_>) -> Result<Held, Refusal> {
        if !self.may_serve() {
            return Err(overloaded("this replica has lost the tier's NATS servers"));
        }
        for attempt in 0..ATTEMPTS {
            // What is followed may be behind: after a conflict the truth is read.
            if attempt > 0 {
                self.read(claimant.node).await.map_err(|error| unreachable(&error))?;
            }
            let (claim, expected) = self.decide(&claimant)?;
            match self.write(claimant.node, &claim, expected).await {
                Ok(revision) => return Ok(self.granted(claimant.node, claim, revision)),
                Err(NatsError::Conflict) => {}
                Err(error) => return Err(unreachable(&error)),
            }
        }
        Err(overloaded("other sessions of this node keep claiming it"))
    }

    /// The session of a node here has ended and all of it is durable. The claim stays, marked: another
    /// instance has to wait a while. Best effort: a claim that was never released is found out by its lease.
    pub async fn release(&self, node: &str, held: Held) {
        let (away, revision) = {
            let mut known = self.known();
            if known.mine.get(node).is_none_or(|mine| mine.session != held.session) {
                return;
            }
            let Some(claim) = known.mine.remove(node) else { return };
            let revision = known.claims.get(node).map_or(0, |seen| seen.revision);
            (Claim { away: true, ..claim }, revision)
        };
        match self.write(node, &away, revision).await {
            Ok(revision) => self.saw_claim(node, Some(away), revision),
            Err(error) => tracing::debug!(node, %error, "a claim was not released"),
        }
    }

    /// Whether a node is still this replica's under this claim, as far as is known here.
    pub fn holds(&self, node: &str, held: Held) -> bool {
        self.known().mine.get(node).is_some_and(|mine| mine.session == held.session)
    }

    /// Who has a node, as far as is known here.
    pub fn owner(&self, node: &str) -> Owner {
        let known = self.known();
        if known.mine.contains_key(node) {
            return Owner::Here;
        }
        let Some(claim) = known.claims.get(node).and_then(|seen| seen.value.as_ref()) else {
            return Owner::Nobody;
        };
        let here = claim.replica == self.shared.replica;
        if claim.away || here || !known.is_alive(claim, Instant::now()) {
            return Owner::Nobody;
        }
        Owner::Replica(claim.replica.clone())
    }

    /// Says where other replicas may dial this one. The first time counts, and from the next renewal on.
    pub fn advertise(&self, address: String) {
        let _first = self.shared.address.set(address);
    }

    /// Where a replica that lives may be dialled, if it says so.
    pub fn address_of(&self, replica: &str) -> Option<String> {
        self.known().leases.get(replica)?.value.as_ref()?.address.clone()
    }

    /// How many nodes this replica has.
    pub fn count(&self) -> usize {
        self.known().mine.len()
    }

    /// Whether this replica's lease is good: it may take nodes.
    pub fn may_serve(&self) -> bool {
        let renewed = self.known().renewed;
        renewed.is_some_and(|at| at.elapsed() < GIVE_UP_AFTER)
    }

    /// What was followed so far is of another life of the bucket: revisions begin again. What this replica has
    /// it keeps; its claims are to be written again.
    pub fn begin_again(&self) {
        let mut known = self.known();
        known.claims.clear();
        known.leases.clear();
    }

    /// Writes this replica's claims again, where the bucket has none.
    pub async fn write_again(&self) {
        let mine: Vec<(Arc<str>, Claim)> = {
            let known = self.known();
            let lacking = known.mine.iter().filter(|(node, _)| !known.claims.contains_key(*node));
            lacking.map(|(node, claim)| (Arc::clone(node), claim.clone())).collect()
        };
        for (node, claim) in mine {
            match self.write(&node, &claim, 0).await {
                Ok(revision) => self.saw_claim(&node, Some(claim), revision),
                Err(error) => tracing::warn!(%node, %error, "a claim was not written again"),
            }
        }
    }

    /// The bucket says so.
    pub fn saw_claim(&self, node: &str, claim: Option<Claim>, revision: u64) {
        let node: Arc<str> = node.into();
        let lost = {
            let mut known = self.known();
            if !known.saw(&node, claim, revision) {
                return;
            }
            let now = known.claims.get(&node).and_then(|seen| seen.value.as_ref());
            let same = |mine: &Claim| now.is_some_and(|now| *now == *mine);
            // Of a claim of this replica that is just being granted, `mine` knows nothing yet.
            let lost = known.mine.get(&node).is_some_and(|mine| !same(mine));
            if lost {
                known.mine.remove(&node);
            }
            lost
        };
        if lost {
            self.fence(node, fenced());
        }
    }

    /// The bucket says so.
    pub fn saw_lease(&self, replica: &str, lease: Option<Lease>, revision: u64) {
        let mut known = self.known();
        if known.leases.get(replica).is_some_and(|seen| seen.revision >= revision) {
            return;
        }
        if replica == self.shared.replica
            && lease.as_ref().is_some_and(|lease| lease.epoch > self.shared.epoch)
        {
            known.superseded = true;
        }
        known.leases.insert(replica.to_owned(), Seen { value: lease, revision, at: Instant::now() });
    }

    /// Whether another process runs under this replica's name, and began later.
    pub fn is_superseded(&self) -> bool {
        self.known().superseded
    }

    /// Renews the lease until `stopped`, and lets go of every node if that fails for too long.
    pub async fn keep_lease(&self, stopped: tokio_util::sync::CancellationToken) {
        let mut beat = 0;
        let mut next = Instant::now();
        loop {
            let last_chance = self.known().renewed.map(|at| at + GIVE_UP_AFTER);
            tokio::select! {
                biased;
                () = stopped.cancelled() => break,
                () = until(last_chance) => self.give_up("its lease could not be renewed"),
                () = sleep_until(next) => {
                    if self.is_superseded() {
                        self.give_up("another process runs under this replica's name");
                        next = Instant::now() + RENEW_EVERY;
                        continue;
                    }
                    beat += 1;
                    let began = Instant::now();
                    next = began + RENEW_EVERY;
                    // Never beyond the last chance, so that giving up is never late.
                    let limit = last_chance.map_or(next, |at| at.min(next));
                    match timeout_at(limit, self.renew(beat, false)).await {
                        Ok(Ok(())) => self.known().renewed = Some(began),
                        Ok(Err(error)) => tracing::warn!(%error, "the lease was not renewed"),
                        Err(_elapsed) => tracing::warn!("the lease was not renewed in time"),
                    }
                }
            }
        }
        self.known().renewed = None;
        if let Ok(Err(error)) = timeout(CLOSE_WITHIN, self.renew(beat + 1, true)).await {
            tracing::debug!(%error, "the lease was not closed");
        }
    }

    /// Writes the lease for the first time.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn begin(&self) -> Result<(), NatsError> {
        let began = Instant::now();
        self.renew(0, false).await?;
        self.known().renewed = Some(began);
        Ok(())
    }

    async fn renew(&self, beat: u64, closed: bool) -> Result<(), NatsError> {
        let address = self.shared.address.get().cloned();
        let lease = Lease { epoch: self.shared.epoch, beat, closed, address };
        let value = Bytes::from(serde_json::to_vec(&lease).expect("numbers"));
        let key = format!("lease/{}", self.shared.replica);
        self.shared.connection.put(Bucket::Sys, &key, Some(value), None).await?;
        Ok(())
    }

    /// Lets go of every node.
    fn give_up(&self, why: &str) {
        let nodes: Vec<Arc<str>> = {
            let mut known = self.known();
            known.renewed = None;
            known.mine.drain().map(|(node, _)| node).collect()
        };
        tracing::error!(nodes = nodes.len(), why, "this replica lets go of its nodes");
        self.shared.counters.given_up.fetch_add(1, Ordering::Relaxed);
        for node in nodes {
            self.fence(node, overloaded("this replica has lost the tier's NATS servers"));
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.shared.known.lock().expect("no panic under this lock")
    }

    async fn read(&self, node: &str) -> Result<(), NatsError> {
        self.shared.counters.operations.fetch_add(1, Ordering::Relaxed);
        let key = claim_key(node);
        match self.shared.connection.get(Bucket::Sys, &key).await? {
            Some(entry) => {
                let claim = entry.value.as_deref().and_then(|value| parse(&key, value));
                self.saw_claim(node, claim, entry.revision);
            }
            None => drop(self.known().claims.remove(node)),
        }
        Ok(())
    }

    async fn write(&self, node: &str, claim: &Claim, expected: u64) -> Result<u64, NatsError> {
        self.shared.counters.operations.fetch_add(1, Ordering::Relaxed);
        let value = Bytes::from(serde_json::to_vec(claim).expect("texts and numbers"));
        self.shared.connection.put(Bucket::Sys, &claim_key(node), Some(value), Some(expected)).await
    }

    /// The claim to write, and the revision that it must meet.
    fn decide(&self, claimant: &Claimant<'_>) -> Result<(Claim, u64), Refusal> {
        let known = self.known();
        let seen = known.claims.get(claimant.node);
        let instance = broker::enroll::hex(claimant.instance);
        let held = seen.and_then(|seen| seen.value.as_ref());
        match seen.map_or(Verdict::Free, |seen| known.judge(seen, claimant, &instance, Instant::now())) {
            Verdict::Free => {}
            Verdict::Fenced => return Err(fenced()),
            Verdict::Duplicate => {
                self.shared.counters.refused.fetch_add(1, Ordering::Relaxed);
                return Err(duplicate(claimant.node));
            }
        }
        let claim = Claim {
            replica: self.shared.replica.clone(),
            epoch: self.shared.epoch,
            session: held.map_or(0, |held| held.session) + 1,
            instance,
            generation: claimant.generation,
            stamp: claimant.stamp,
            away: false,
        };
        Ok((claim, seen.map_or(0, |seen| seen.revision)))
    }

    fn granted(&self, node: &str, claim: Claim, revision: u64) -> Held {
        self.shared.counters.granted.fetch_add(1, Ordering::Relaxed);
        let held = Held { session: claim.session };
        let node: Arc<str> = node.into();
        let mut known = self.known();
        known.saw(&node, Some(claim.clone()), revision);
        // A newer claim may have been seen already, before this one's acknowledgement came.
        let newest = known.claims.get(&node).is_some_and(|seen| seen.revision == revision);
        if newest {
            known.mine.insert(node, claim);
        } else {
            drop(known);
            self.fence(node, fenced());
        }
        held
    }

    fn fence(&self, node: Arc<str>, refusal: Refusal) {
        self.shared.counters.fenced.fetch_add(1, Ordering::Relaxed);
        // Nobody listens any more: the store has ended.
        let _ended = self.shared.fenced.send(News::Fenced { node, refusal });
    }
}

impl Known {
    /// Takes what stands at this revision; false if something newer is known, or the same.
    fn saw(&mut self, node: &Arc<str>, claim: Option<Claim>, revision: u64) -> bool {
        if self.claims.get(node).is_some_and(|seen| seen.revision >= revision) {
            return false;
        }
        self.claims.insert(Arc::clone(node), Seen { value: claim, revision, at: Instant::now() });
        true
    }

    /// Whether the replica that made this claim lives, in the same life.
    fn is_alive(&self, claim: &Claim, now: Instant) -> bool {
        self.leases.get(&claim.replica).is_some_and(|seen| {
            let lives = |lease: &Lease| lease.epoch == claim.epoch && !lease.closed;
            seen.value.as_ref().is_some_and(lives) && now < seen.at + DEAD_AFTER
        })
    }

    fn judge(&self, seen: &Seen<Claim>, claimant: &Claimant<'_>, instance: &str, now: Instant) -> Verdict {
        let Some(held) = &seen.value else { return Verdict::Free };
        let has_session = !held.away && self.is_alive(held, now);
        if held.instance == instance {
            let older = claimant.stamp > 0 && claimant.stamp < held.stamp;
            return if older && has_session { Verdict::Fenced } else { Verdict::Free };
        }
        if held.generation < claimant.generation {
            return Verdict::Free;
        }
        let lease = self.leases.get(&held.replica).filter(|_| !held.away);
        let gone = lease.map_or(seen.at, |lease| lease.at.max(seen.at));
        if has_session || now < gone + DUPLICATE_HOLD { Verdict::Duplicate } else { Verdict::Free }
    }
}

/// What is to become of somebody who asks for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It may have it.
    Free,
    /// A newer session of the same instance has it.
    Fenced,
    /// Another instance has it, or had it a moment ago.
    Duplicate,
}

/// Reads a value of the bucket; what cannot be read is as if it were not there.
pub fn parse<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::error!(key, %error, "a value in space sys cannot be read"))
        .ok()
}

fn claim_key(node: &str) -> String {
    format!("claims/{node}")
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn fenced() -> Refusal {
    let message = "a newer session of this instance exists".to_owned();
    Refusal { reason: RefusalReason::Fenced.into(), message, retry_after_ms: 0 }
}

fn duplicate(node: &str) -> Refusal {
    let hold = DUPLICATE_HOLD;
    let message = format!(
        "another instance of node {node} is linked (or was within {} s): two machines hold the same certificate; \
         stop one, or enrol it under its own name",
        hold.as_secs()
    );
    let retry_after_ms = u32::try_from(hold.as_millis()).unwrap_or(u32::MAX);
    Refusal { reason: RefusalReason::DuplicateIdentity.into(), message, retry_after_ms }
}

fn overloaded(message: &str) -> Refusal {
    come_again(&format!("{message}; come again"), RETRY_MS)
}

fn unreachable(error: &NatsError) -> Refusal {
    overloaded(&format!("the tier cannot say who has this node ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn claim(replica: &str, epoch: u64, instance: &str, stamp: u64) -> Claim {
        Claim {
            replica: replica.to_owned(),
            epoch,
            session: 1,
            instance: instance.to_owned(),
            generation: 1,
            stamp,
            away: false,
        }
    }

    fn seen<T>(value: T, at: Instant) -> Seen<T> {
        Seen { value: Some(value), revision: 1, at }
    }

    fn with_lease(lease: &Lease, at: Instant) -> Known {
        let mut known = Known::default();
        known.leases.insert("a".to_owned(), seen(lease.clone(), at));
        known
    }

    fn asks(generation: u32, stamp: u64) -> Claimant<'static> {
        Claimant { node: "edge-1", instance: &[1; 16], generation, stamp }
    }

    const LEASE: Lease = Lease { epoch: 5, beat: 1, closed: false, address: None };

    #[test]
    fn a_lease_that_was_not_seen_to_change_for_ten_seconds_is_a_dead_replicas() {
        let now = Instant::now();
        let known = with_lease(&LEASE, now);
        let held = claim("a", 5, "x", 0);
        assert!(known.is_alive(&held, now + 9 * S));
        assert!(!known.is_alive(&held, now + 10 * S));
        assert!(!known.is_alive(&claim("a", 4, "x", 0), now), "of an earlier life");
        assert!(!known.is_alive(&claim("b", 5, "x", 0), now), "of nobody");
        let closed = with_lease(&Lease { closed: true, ..LEASE }, now);
        assert!(!closed.is_alive(&held, now), "it has stopped by itself");
    }

    #[test]
    fn another_instance_waits_a_minute_after_the_last_sign_of_the_first() {
        let now = Instant::now();
        let known = with_lease(&LEASE, now);
        let held = seen(claim("a", 5, "x", 0), now);
        let judged = |held: &Seen<Claim>, asks: Claimant<'_>, at| known.judge(held, &asks, "y", at);
        assert_eq!(judged(&held, asks(1, 0), now), Verdict::Duplicate);
        assert_eq!(judged(&held, asks(1, 0), now + 59 * S), Verdict::Duplicate, "its replica died meanwhile");
        assert_eq!(judged(&held, asks(1, 0), now + 61 * S), Verdict::Free);
        assert_eq!(judged(&held, asks(2, 0), now), Verdict::Free, "a newer enrolment need not wait");
        let away = seen(Claim { away: true, ..claim("a", 5, "x", 0) }, now - 30 * S);
        assert_eq!(judged(&away, asks(1, 0), now + 29 * S), Verdict::Duplicate);
        assert_eq!(judged(&away, asks(1, 0), now + 31 * S), Verdict::Free);
    }

    #[test]
    fn within_an_instance_the_newest_dial_wins() {
        let now = Instant::now();
        let known = with_lease(&LEASE, now);
        let held = seen(claim("a", 5, "x", 7), now);
        let judged = |asks: Claimant<'_>, at| known.judge(&held, &asks, "x", at);
        assert_eq!(judged(asks(1, 8), now), Verdict::Free);
        assert_eq!(judged(asks(1, 7), now), Verdict::Free, "the same dial, asked again");
        assert_eq!(judged(asks(1, 6), now), Verdict::Fenced);
        assert_eq!(judged(asks(1, 0), now), Verdict::Free, "of a build that counts no dials");
        assert_eq!(judged(asks(1, 6), now + 11 * S), Verdict::Free, "whoever had it is dead");
    }
}
