//! State of the tier, read and written on its buckets.

use std::time::Duration;

use broker::{
    Handle,
    event::{Expect, StateChange, StateOp},
    limits,
};
use bytes::Bytes;
use codec::proto;

use super::{
    Tier,
    claims::Owner,
    connection::{KvEntry, NatsError},
    mirror::BARRIER,
    names::Bucket,
};
use crate::fabric::{self, Answer, Conflict, Entry, Fabric, FabricError, local::list_core};

/// A write whose answer was lost is looked for and tried again so many times.
const TRIES: usize = 4;
const RETRY: Duration = Duration::from_millis(200);
/// How long a write waits for this replica's own mirror to have it.
const SEEN_WITHIN: Duration = Duration::from_secs(5);

/// What a write expects, in terms of the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// Whatever is there.
    Any,
    /// The last entry, deleted or not, has this revision; 0: there never was one.
    Last(u64),
}

impl Tier {
    fn core(&self) -> Result<&Handle, FabricError> {
        self.broker.get().ok_or(FabricError::Stopped(broker::Stopped))
    }

    async fn read(&self, space: &str, key: &str) -> Result<Option<Entry>, FabricError> {
        let found = self.connection.get(bucket(space)?, key).await?;
        Ok(found.and_then(|found| {
            Some(Entry { key: key.to_owned(), value: found.value?, revision: found.revision })
        }))
    }

    async fn peek_mirror(&self, space: &str, key: &str) -> Result<Option<Entry>, FabricError> {
        if bucket(space)? == Bucket::Sys {
            let found = self.mirror.sys_entry(key);
            return Ok(found.map(|(value, revision)| Entry { key: key.to_owned(), value, revision }));
        }
        let mut found = list_core(self.core()?, space, key, None, 1).await?;
        Ok(found.pop().filter(|entry| entry.key == key))
    }

    async fn list_mirror(
        &self,
        space: &str,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Entry>, FabricError> {
        if bucket(space)? == Bucket::Sys {
            return Ok(self.mirror.sys_list(prefix, after, limit));
        }
        list_core(self.core()?, space, prefix, after, limit).await
    }

    async fn write_all(&self, ops: Vec<StateOp>) -> Result<Result<Vec<u64>, Conflict>, FabricError> {
        check(&ops).map_err(FabricError::Refused)?;
        let mut revisions = Vec::with_capacity(ops.len());
        for (index, op) in ops.iter().enumerate() {
            match self.write_one(op).await? {
                Ok(revision) => revisions.push(revision),
                Err(found) => {
                    // Whoever reads again must not read what it read before.
                    self.seen(&op.space, found).await;
                    return Ok(Err(Conflict { index, found }));
                }
            }
        }
        for (op, revision) in ops.iter().zip(&revisions) {
            self.seen(&op.space, *revision).await;
        }
        Ok(Ok(revisions))
    }

    /// The new revision, 0 if nothing changed; or the one that was found instead of the expected.
    async fn write_one(&self, op: &StateOp) -> Result<Result<u64, u64>, FabricError> {
        let bucket = bucket(&op.space)?;
        let mut expected = match op.expect {
            Expect::Revision(revision) => Some(Expected::Last(revision)),
            Expect::Any if matches!(op.change, StateChange::Put(_)) => Some(Expected::Any),
            // Most keys never were there.
            Expect::Absent if matches!(op.change, StateChange::Put(_)) => Some(Expected::Last(0)),
            _ => None,
        };
        for attempt in 0..TRIES {
            let expect = match expected.take().filter(|_| op.change != StateChange::Check) {
                Some(expected) => expected,
                None => {
                    let found = self.connection.get(bucket, &op.key).await?;
                    let live = found.as_ref().filter(|found| found.value.is_some());
                    let there = live.map_or(0, |live| live.revision);
                    let met = match op.expect {
                        Expect::Any => true,
                        Expect::Absent => there == 0,
                        Expect::Revision(revision) => there == revision,
                    };
                    if !met {
                        // What was written by an attempt whose answer was lost.
                        return Ok(if attempt > 0 && is_result(op, live) { Ok(there) } else { Err(there) });
                    }
                    if op.change == StateChange::Check || (op.change == StateChange::Delete && live.is_none())
                    {
                        return Ok(Ok(0));
                    }
                    Expected::Last(found.map_or(0, |found| found.revision))
                }
            };
            let value = match &op.change {
                StateChange::Put(value) => Some(value.clone()),
                _ => None,
            };
            let revision = match expect {
                Expected::Any => None,
                Expected::Last(revision) => Some(revision),
            };
            match self.connection.put(bucket, &op.key, value, revision).await {
                Ok(revision) => return Ok(Ok(revision)),
                Err(NatsError::Conflict) => {}
                Err(NatsError::Unavailable | NatsError::Unknown(_)) if attempt + 1 < TRIES => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(FabricError::Unavailable(format!("{} keeps changing; try again", op.key)))
    }

    async fn seen(&self, space: &str, revision: u64) {
        let reached = self.mirror.reach(space, revision);
        if revision > 0 && tokio::time::timeout(SEEN_WITHIN, reached).await.is_err() {
            tracing::debug!(space, revision, "the own mirror is behind a write");
        }
    }
}

impl Fabric for Tier {
    fn get<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>> {
        Box::pin(self.read(space, key))
    }

    fn peek<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>> {
        Box::pin(self.peek_mirror(space, key))
    }

    fn list<'a>(
        &'a self,
        space: &'a str,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> Answer<'a, Vec<Entry>> {
        Box::pin(self.list_mirror(space, prefix, after, limit))
    }

    fn write(&self, ops: Vec<StateOp>) -> Answer<'_, Result<Vec<u64>, Conflict>> {
        Box::pin(self.write_all(ops))
    }

    fn barrier(&self) -> Answer<'_, u64> {
        Box::pin(async {
            let revision = self.connection.put(Bucket::Fleet, BARRIER, Some(Bytes::new()), None).await?;
            self.seen("fleet", revision).await;
            Ok(revision)
        })
    }

    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> Answer<'a, ()> {
        Box::pin(async move {
            if self.mirror.sys_entry(&format!("identity/{node}")).is_none() {
                return Err(FabricError::Refused("no node of that name is enrolled".to_owned()));
            }
            super::live::append_down(&self.connection, node, frame).await?;
            Ok(())
        })
    }

    fn owner<'a>(&'a self, node: &'a str) -> Answer<'a, fabric::Owner> {
        Box::pin(async move {
            Ok(match self.claims.owner(node) {
                Owner::Here => fabric::Owner::Here,
                Owner::Replica(replica) => {
                    let address = self.claims.address_of(&replica);
                    fabric::Owner::Elsewhere { replica, address }
                }
                Owner::Nobody => fabric::Owner::Nobody,
            })
        })
    }
}

impl From<NatsError> for FabricError {
    fn from(error: NatsError) -> Self {
        match error {
            NatsError::Refused { .. } => Self::Refused(error.to_string()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

/// Whether this is what the operation would have left.
fn is_result(op: &StateOp, live: Option<&KvEntry>) -> bool {
    match (&op.change, live) {
        (StateChange::Put(value), Some(live)) => live.value.as_ref() == Some(value),
        (StateChange::Delete, None) => true,
        _ => false,
    }
}

fn bucket(space: &str) -> Result<Bucket, FabricError> {
    Bucket::of_space(space)
        .ok_or_else(|| FabricError::Refused(format!("the tier has no space {space}: only sys and fleet")))
}

/// What a write must be, whatever is stored: as a single hub's core checks it.
fn check(ops: &[StateOp]) -> Result<(), String> {
    if ops.len() > limits::STATE_OPS_MAX {
        return Err(format!("more than {} operations in one write", limits::STATE_OPS_MAX));
    }
    for op in ops {
        codec::topic::validate_topic(&op.key).map_err(|error| format!("key {:?}: {error}", op.key))?;
        let StateChange::Put(value) = &op.change else { continue };
        if value.len() > limits::STATE_VALUE_MAX {
            return Err(format!("key {:?}: more than {} bytes", op.key, limits::STATE_VALUE_MAX));
        }
        if &*op.space == "fleet" && op.key.starts_with("want/") {
            let want: proto::Want =
                codec::decode(value.clone()).map_err(|error| format!("not a want: {error}"))?;
            if want.keys.len() > limits::WANT_KEYS_MAX {
                return Err(format!("a want of more than {} keys", limits::WANT_KEYS_MAX));
            }
        }
    }
    Ok(())
}
