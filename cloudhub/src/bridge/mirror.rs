//! What stands in `fleet`: objects and wants, written where they differ and only there.
//!
//! Every write is a compare-and-set on the revision that was seen last, so that two bridges that both believe
//! to be the one never undo each other unseen. The resourceVersion of a uid never goes down. An object of
//! another uid under a name is another object: the old one is deleted first.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use broker::{
    event::{Expect, StateChange, StateOp},
    seal::{self, SealKey},
};
use bytes::Bytes;
use codec::proto::Want;
use serde_json::Value;

use super::json;
use crate::fabric::{Entry, Fabric, FabricError};

const SPACE: &str = "fleet";
const OBJECTS: &str = "obj/";
const WANTS: &str = "want/";
/// Entries of one page of the list at the start.
const PAGE: usize = 500;
/// Of one write; the broker's bounds are above.
const OPS_MAX: usize = 500;
const BYTES_MAX: usize = 2 << 20;
/// How often a write is tried again when somebody else was faster.
const TRIES: usize = 8;

/// An object that stands in `fleet`, or is about to.
#[derive(Debug, Clone)]
struct Held {
    /// What a compare-and-set expects; 0: it is not there yet.
    revision: u64,
    uid: Arc<str>,
    version: u64,
    content: u64,
}

/// The bridge's side of `fleet`.
#[derive(Debug)]
pub(super) struct Mirror {
    fabric: Arc<dyn Fabric>,
    seal: Option<SealKey>,
    held: HashMap<Arc<str>, Held>,
    /// Revision and what is listed, as a digest.
    wants: BTreeMap<Arc<str>, (u64, u64)>,
    /// Not written yet, with its uid if that is new.
    puts: BTreeMap<Arc<str>, Bytes>,
    bytes: usize,
    /// Whose objects of another uid are to go first.
    replaced: BTreeSet<Arc<str>>,
}

impl Mirror {
    /// Reads what stands there. `each` is shown every object.
    ///
    /// # Errors
    /// The fabric does not answer.
    pub(super) async fn open(
        fabric: Arc<dyn Fabric>,
        seal: Option<SealKey>,
        mut each: impl FnMut(&str, &Value) + Send,
    ) -> Result<Self, FabricError> {
        let mut mirror = Self {
            fabric,
            seal,
            held: HashMap::new(),
            wants: BTreeMap::new(),
            puts: BTreeMap::new(),
            bytes: 0,
            replaced: BTreeSet::new(),
        };
        for prefix in [OBJECTS, WANTS] {
            let mut after: Option<String> = None;
            loop {
                let page = mirror.fabric.list(SPACE, prefix, after.as_deref(), PAGE).await?;
                after = page.last().map(|last| last.key.clone());
                for entry in &page {
                    if let Some(node) = entry.key.strip_prefix(WANTS) {
                        let listed = codec::decode::<Want>(entry.value.clone()).unwrap_or_default();
                        let listed = listed.keys.iter().map(String::as_str).collect();
                        mirror.wants.insert(node.into(), (entry.revision, digest_of(&listed)));
                    } else {
                        let (held, object) = mirror.read(entry);
                        each(&entry.key, &object);
                        mirror.held.insert(entry.key.as_str().into(), held);
                    }
                }
                if page.is_empty() {
                    break;
                }
            }
        }
        Ok(mirror)
    }

    /// What an entry says. One that cannot be read is as one of no uid: anything replaces it.
    fn read(&self, entry: &Entry) -> (Held, Value) {
        let plain = match &self.seal {
            Some(key) if seal::is_sealed(&entry.value) => seal::open(key, &entry.key, &entry.value),
            _ => Some(entry.value.to_vec()),
        };
        let object = plain.and_then(|plain| serde_json::from_slice(&plain).ok()).unwrap_or(Value::Null);
        let held = Held {
            revision: entry.revision,
            uid: json::text(&object, "metadata.uid").into(),
            version: json::version(&object),
            content: content_of(&object),
        };
        (held, object)
    }

    /// Whether an object stands there, or will once [`flush`](Self::flush) is done.
    pub(super) fn has(&self, key: &str) -> bool {
        self.held.contains_key(key)
    }

    /// Whether this is what was seen last of an object.
    pub(super) fn is_current(&self, key: &str, uid: &str, version: u64) -> bool {
        self.held.get(key).is_some_and(|held| &*held.uid == uid && held.version == version)
    }

    /// Keys of all objects.
    pub(super) fn keys(&self) -> impl Iterator<Item = &Arc<str>> {
        self.held.keys()
    }

    /// Nodes that have a want.
    pub(super) fn wanting(&self) -> impl Iterator<Item = &Arc<str>> {
        self.wants.keys()
    }

    /// An object is this now. True once so much waits that it should be flushed.
    pub(super) fn put(&mut self, key: &Arc<str>, object: &Value) -> bool {
        let uid = json::text(object, "metadata.uid");
        let (version, content) = (json::version(object), content_of(object));
        if let Some(held) = self.held.get_mut(key) {
            let same = &*held.uid == uid;
            if same && version > 0 && version < held.version {
                return false;
            }
            if same && content == held.content {
                held.version = version;
                return false;
            }
            if !same && held.revision > 0 && !held.uid.is_empty() {
                self.replaced.insert(Arc::clone(key));
            }
        }
        let plain = object.to_string();
        let value = match &self.seal {
            Some(sealing) if is_secret(key) => seal::seal(sealing, key, plain.as_bytes()),
            _ => Bytes::from(plain),
        };
        let revision = self.held.get(key).map_or(0, |held| held.revision);
        self.held.insert(Arc::clone(key), Held { revision, uid: uid.into(), version, content });
        self.bytes += value.len();
        self.puts.insert(Arc::clone(key), value);
        self.bytes > BYTES_MAX || self.puts.len() >= OPS_MAX
    }

    /// Writes what waits.
    ///
    /// # Errors
    /// The fabric does not answer; what waits still waits.
    pub(super) async fn flush(&mut self) -> Result<(), FabricError> {
        let replaced: Vec<Arc<str>> = self.replaced.iter().cloned().collect();
        for key in replaced {
            let revision = self.held.get(&key).map_or(0, |held| held.revision);
            let deleted = self.write(vec![(Arc::clone(&key), StateChange::Delete, revision)]).await?;
            debug_assert_eq!(deleted.len(), 1);
            if let Some(held) = self.held.get_mut(&key) {
                held.revision = 0;
            }
            self.replaced.remove(&key);
        }
        while !self.puts.is_empty() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            for (key, value) in self.puts.iter().take(OPS_MAX) {
                bytes += key.len() + value.len();
                if bytes > BYTES_MAX && !batch.is_empty() {
                    break;
                }
                let revision = self.held.get(key).map_or(0, |held| held.revision);
                batch.push((Arc::clone(key), StateChange::Put(value.clone()), revision));
            }
            let keys: Vec<Arc<str>> = batch.iter().map(|(key, ..)| Arc::clone(key)).collect();
            let revisions = self.write(batch).await?;
            for (key, revision) in keys.iter().zip(revisions) {
                self.puts.remove(key);
                if let Some(held) = self.held.get_mut(key) {
                    held.revision = revision;
                }
            }
        }
        self.bytes = 0;
        Ok(())
    }

    /// What a node must have is this now. What is listed and not there yet is left out.
    ///
    /// # Errors
    /// The fabric does not answer.
    pub(super) async fn want(&mut self, node: &Arc<str>, listed: &BTreeSet<&str>) -> Result<(), FabricError> {
        let digest = digest_of(listed);
        let (revision, held) = self.wants.get(node).copied().unwrap_or_default();
        if revision > 0 && held == digest {
            return Ok(());
        }
        let want = Want { keys: listed.iter().map(|key| (*key).to_owned()).collect() };
        let key = format!("{WANTS}{node}").into();
        let written = self.write(vec![(key, StateChange::Put(codec::encode(&want)), revision)]).await?;
        self.wants.insert(Arc::clone(node), (written.first().copied().unwrap_or_default(), digest));
        Ok(())
    }

    /// A node is none any more.
    ///
    /// # Errors
    /// The fabric does not answer.
    pub(super) async fn forget_want(&mut self, node: &str) -> Result<(), FabricError> {
        let Some((revision, _)) = self.wants.get(node).copied() else { return Ok(()) };
        self.write(vec![(format!("{WANTS}{node}").into(), StateChange::Delete, revision)]).await?;
        self.wants.remove(node);
        Ok(())
    }

    /// These objects are gone, or nobody needs them.
    ///
    /// # Errors
    /// The fabric does not answer.
    pub(super) async fn delete(&mut self, keys: &[Arc<str>]) -> Result<(), FabricError> {
        for keys in keys.chunks(OPS_MAX) {
            let known = |key: &Arc<str>| Some((Arc::clone(key), self.held.get(key)?.revision));
            let known: Vec<_> = keys.iter().filter_map(known).collect();
            let there = known.iter().filter(|(_, revision)| *revision > 0);
            let batch: Vec<_> =
                there.map(|(key, revision)| (Arc::clone(key), StateChange::Delete, *revision)).collect();
            if !batch.is_empty() {
                self.write(batch).await?;
            }
            for (key, _) in known {
                self.held.remove(&key);
                self.replaced.remove(&key);
                self.puts.remove(&key);
            }
        }
        Ok(())
    }

    /// Everything of the source stands there.
    ///
    /// # Errors
    /// The fabric does not answer.
    pub(super) async fn barrier(&self) -> Result<(), FabricError> {
        self.fabric.barrier().await.map(drop)
    }

    /// Writes each key over the revision that is known, or over the one that is found instead, unless a newer
    /// version of the same object stands there already.
    async fn write(&mut self, batch: Vec<(Arc<str>, StateChange, u64)>) -> Result<Vec<u64>, FabricError> {
        let mut batch = batch;
        for _ in 0..TRIES {
            let ops = batch.iter().map(|(key, change, revision)| StateOp {
                space: SPACE.into(),
                key: key.to_string(),
                change: change.clone(),
                expect: if *revision == 0 { Expect::Absent } else { Expect::Revision(*revision) },
            });
            match self.fabric.write(ops.collect()).await? {
                Ok(revisions) => return Ok(revisions),
                Err(conflict) => self.concede(&mut batch, conflict.index).await?,
            }
        }
        Err(FabricError::Unavailable("somebody else writes the same keys of fleet".to_owned()))
    }

    /// Looks at what stands where something else was expected.
    async fn concede(
        &self,
        batch: &mut [(Arc<str>, StateChange, u64)],
        index: usize,
    ) -> Result<(), FabricError> {
        // In a tier those before it have been written: all are looked at again.
        for (at, (key, change, revision)) in batch.iter_mut().enumerate() {
            let found = self.fabric.get(SPACE, key).await?;
            *revision = found.as_ref().map_or(0, |entry| entry.revision);
            let (Some(entry), true) = (&found, at == index) else {
                if found.is_none() && *change == StateChange::Delete {
                    *change = StateChange::Check;
                }
                continue;
            };
            let (there, _) = self.read(entry);
            let newer = self.held.get(key).is_some_and(|held| {
                held.uid == there.uid && held.version > 0 && there.version > held.version
            });
            if newer && matches!(change, StateChange::Put(_)) {
                *change = StateChange::Check;
            }
        }
        Ok(())
    }
}

/// Values that stand sealed.
fn is_secret(key: &str) -> bool {
    ["obj/core/secrets/", "obj/octobus.io/tokens/"].iter().any(|prefix| key.starts_with(prefix))
}

/// To see whether anything but the resourceVersion is different.
fn content_of(object: &Value) -> u64 {
    let mut object = object.clone();
    json::remove(&mut object, "metadata", "resourceVersion");
    let mut hasher = DefaultHasher::new();
    object.to_string().hash(&mut hasher);
    hasher.finish()
}

fn digest_of(listed: &BTreeSet<&str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    listed.hash(&mut hasher);
    hasher.finish()
}
