//! All objects in memory, kept up to date by one watch: what controllers and the authorizer read.
//!
//! Invariant: what is shown is the space as it was at [`Cache::revision`], which never goes back. Objects
//! are kept without their managed fields; who changes one reads it from the store first.

use std::{
    collections::BTreeMap,
    sync::{Arc, RwLock},
};

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    json,
    registry::Resource,
    store::{Change, Store, StoreError, Stored, Watch},
};

/// What everybody who follows the cache is told: the key, what was, what is.
pub(crate) type Follower = Box<dyn Fn(&str, Option<&Value>, Option<&Value>) + Send + Sync>;

/// See the module's documentation.
pub(crate) struct Cache {
    objects: RwLock<BTreeMap<String, Arc<Value>>>,
    revision: watch::Sender<u64>,
    followers: RwLock<Vec<Follower>>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("revision", &self.revision()).finish_non_exhaustive()
    }
}

impl Cache {
    pub(crate) fn new() -> Self {
        Self {
            objects: RwLock::new(BTreeMap::new()),
            revision: watch::Sender::new(0),
            followers: RwLock::new(Vec::new()),
        }
    }

    /// One object.
    pub(crate) fn get(&self, resource: &Resource, namespace: &str, name: &str) -> Option<Arc<Value>> {
        self.at(&resource.key(namespace, name))
    }

    /// The object at a key.
    pub(crate) fn at(&self, key: &str) -> Option<Arc<Value>> {
        self.objects.read().expect("no panic under this lock").get(key).cloned()
    }

    /// The objects of a resource, in one namespace or all.
    pub(crate) fn list(&self, resource: &Resource, namespace: &str) -> Vec<Arc<Value>> {
        self.under(&resource.prefix_of(namespace)).into_iter().map(|(_, object)| object).collect()
    }

    /// Keys and objects under a prefix.
    pub(crate) fn under(&self, prefix: &str) -> Vec<(String, Arc<Value>)> {
        let objects = self.objects.read().expect("no panic under this lock");
        let found = objects.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        found.map(|(key, object)| (key.clone(), Arc::clone(object))).collect()
    }

    /// The revision that is shown; 0 before the first list.
    pub(crate) fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    /// Waits until a revision is shown. Cancel safe.
    pub(crate) async fn reaches(&self, revision: u64) {
        let mut shown = self.revision.subscribe();
        // The sender is this cache: it cannot end while this waits.
        drop(shown.wait_for(|shown| *shown >= revision).await);
    }

    /// Tells `follower` of every change from now on, and of everything that is there.
    pub(crate) fn follow(&self, follower: Follower) {
        let mut followers = self.followers.write().expect("no panic under this lock");
        for (key, object) in &*self.objects.read().expect("no panic under this lock") {
            follower(key, None, Some(object));
        }
        followers.push(follower);
    }

    /// Keeps the cache up to date until it is told to stop, or the broker stops.
    pub(crate) async fn run(&self, store: Store, stop: CancellationToken) {
        loop {
            let followed = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                followed = self.list_and_follow(&store) => followed,
            };
            match followed {
                StoreError::TooOld { oldest } => {
                    tracing::warn!(oldest, "the cache of API objects fell behind and lists anew");
                }
                StoreError::Stopped(_) => return,
                error => {
                    tracing::warn!(%error, "the cache of API objects begins anew");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
            }
        }
    }

    async fn list_and_follow(&self, store: &Store) -> StoreError {
        let (objects, revision) = match store.all("").await {
            Ok(listed) => listed,
            Err(error) => return error,
        };
        self.replace(objects, revision);
        match store.watch(vec![String::new()], revision).await {
            Ok(mut watch) => {
                let error = self.follow_watch(&mut watch).await;
                watch.close().await;
                error
            }
            Err(error) => error,
        }
    }

    async fn follow_watch(&self, watch: &mut Watch) -> StoreError {
        loop {
            match watch.next().await {
                Ok(change) => self.change(change),
                Err(error) => return error,
            }
        }
    }

    fn replace(&self, objects: Vec<Stored>, revision: u64) {
        let new: BTreeMap<String, Arc<Value>> =
            objects.into_iter().map(|stored| (stored.key, Arc::new(slim(stored.object)))).collect();
        let followers = self.followers.read().expect("no panic under this lock");
        let old = std::mem::replace(&mut *self.objects.write().expect("no panic under this lock"), new);
        let new = self.objects.read().expect("no panic under this lock").clone();
        for (key, was) in &old {
            let is = new.get(key);
            if is != Some(was) {
                followers.iter().for_each(|tell| tell(key, Some(was), is.map(|is| &**is)));
            }
        }
        for (key, is) in new.iter().filter(|(key, _)| !old.contains_key(*key)) {
            followers.iter().for_each(|tell| tell(key, None, Some(is)));
        }
        self.revision.send_replace(revision);
    }

    fn change(&self, change: Change) {
        let followers = self.followers.read().expect("no panic under this lock");
        let Some(key) = change.new.as_ref().or(change.previous.as_ref()).map(|stored| stored.key.clone())
        else {
            self.revision.send_replace(change.revision);
            return;
        };
        let is = change.new.map(|stored| Arc::new(slim(stored.object)));
        let was = {
            let mut objects = self.objects.write().expect("no panic under this lock");
            match &is {
                Some(is) => objects.insert(key.clone(), Arc::clone(is)),
                None => objects.remove(&key),
            }
        };
        followers.iter().for_each(|tell| tell(&key, was.as_deref(), is.as_deref()));
        self.revision.send_replace(change.revision);
    }
}

fn slim(mut object: Value) -> Value {
    json::remove(&mut object, "metadata.managedFields");
    object
}
