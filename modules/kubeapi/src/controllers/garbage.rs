//! What belongs to nobody any more is collected; what waits for what it owns, or for letting it go, is
//! released.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending};
use crate::{
    api::delete::{FOREGROUND, ORPHAN},
    json,
    registry::{Registry, Resource},
    status::Status,
};

pub(super) struct Garbage {
    registry: Arc<Registry>,
    /// Keys of objects by the uid of each owner.
    owned: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Garbage {
    pub(super) fn new(registry: Arc<Registry>) -> Self {
        Self { registry, owned: Mutex::default() }
    }

    fn dependents(&self, uid: &str) -> Vec<String> {
        let owned = self.owned.lock().expect("no panic under this lock");
        owned.get(uid).into_iter().flatten().cloned().collect()
    }

    /// The resource under whose prefix a key stands.
    fn resource_of(&self, key: &str) -> Option<Arc<Resource>> {
        let resources = self.registry.now();
        resources.stored().find(|resource| key.starts_with(&resource.prefix())).map(Arc::clone)
    }

    /// Where an owner stands; `None` if its kind is not known.
    fn owner_key(&self, object: &Value, owner: &Value) -> Option<String> {
        let resources = self.registry.now();
        let resource = resources.of_kind(json::text(owner, "apiVersion"), json::text(owner, "kind"))?;
        Some(resource.key(json::text(object, "metadata.namespace"), json::text(owner, "name")))
    }

    async fn owner_is_there(&self, world: &World, object: &Value, owner: &Value) -> Result<bool, Status> {
        // Of a kind that is not served nothing is known: nothing is collected for it.
        let Some(key) = self.owner_key(object, owner) else { return Ok(true) };
        let found = world.api.store.get(&key).await?;
        let uid = json::text(owner, "uid");
        Ok(found.is_some_and(|found| json::text(&found.object, "metadata.uid") == uid))
    }

    /// An object that waits until what it owns is gone.
    async fn foreground(
        &self,
        world: &World,
        resource: &Arc<Resource>,
        object: &Value,
    ) -> Result<(), Status> {
        let uid = json::text(object, "metadata.uid");
        let mut waits = false;
        for key in self.dependents(uid) {
            let Some(stored) = world.api.store.get(&key).await? else { continue };
            let Some(of) = self.resource_of(&key) else { continue };
            let blocks = json::list(&stored.object, "metadata.ownerReferences")
                .iter()
                .any(|owner| json::text(owner, "uid") == uid && json::truth(owner, "blockOwnerDeletion"));
            waits |= blocks;
            if !is_ending(&stored.object) {
                world.delete(&of, &stored.object).await?;
            }
        }
        if !waits {
            release(world, resource, object, FOREGROUND).await?;
        }
        Ok(())
    }

    /// An object that lets go of what it owns.
    async fn orphan(&self, world: &World, resource: &Arc<Resource>, object: &Value) -> Result<(), Status> {
        let uid = json::text(object, "metadata.uid").to_owned();
        for key in self.dependents(&uid) {
            let Some(stored) = world.api.store.get(&key).await? else { continue };
            let Some(of) = self.resource_of(&key) else { continue };
            let let_go = |object: &mut Value| {
                let owners = json::list(object, "metadata.ownerReferences").iter();
                let rest: Vec<Value> =
                    owners.filter(|owner| json::text(owner, "uid") != uid).cloned().collect();
                json::set(object, "metadata.ownerReferences", rest);
            };
            world.amend(&of, &stored.object, "", &let_go).await?;
        }
        release(world, resource, object, ORPHAN).await
    }
}

impl Controller for Garbage {
    const NAME: &'static str = "generic-garbage-collector";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let owners = |object: Option<&Value>| -> Vec<Value> {
            object.map(|object| json::list(object, "metadata.ownerReferences").to_vec()).unwrap_or_default()
        };
        let mut keys = Vec::new();
        let mut owned = self.owned.lock().expect("no panic under this lock");
        for owner in owners(old) {
            let uid = json::text(&owner, "uid");
            if let Some(held) = owned.get_mut(uid) {
                held.remove(key);
                if held.is_empty() {
                    owned.remove(uid);
                }
            }
        }
        for owner in owners(new) {
            owned.entry(json::text(&owner, "uid").to_owned()).or_default().insert(key.to_owned());
        }
        match (old, new) {
            (Some(old), None) => {
                let gone = json::text(old, "metadata.uid");
                keys.extend(owned.get(gone).into_iter().flatten().cloned());
                // Its owner may have waited for it.
                keys.extend(owners(Some(old)).iter().filter_map(|owner| self.owner_key(old, owner)));
            }
            (_, Some(new)) => {
                let waits = is_ending(new) && !json::list(new, "metadata.finalizers").is_empty();
                if waits || !json::list(new, "metadata.ownerReferences").is_empty() {
                    keys.push(key.to_owned());
                }
            }
            (None, None) => {}
        }
        keys
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let Some(object) = world.api.cache.at(key) else { return Ok(None) };
        let Some(resource) = self.resource_of(key) else { return Ok(None) };
        let holds = |name: &str| json::list(&object, "metadata.finalizers").contains(&value!(name));
        if is_ending(&object) {
            if holds(ORPHAN) {
                self.orphan(world, &resource, &object).await?;
            } else if holds(FOREGROUND) {
                self.foreground(world, &resource, &object).await?;
            }
            return Ok(None);
        }
        let owners = json::list(&object, "metadata.ownerReferences");
        let mut there = 0;
        for owner in owners {
            there += usize::from(self.owner_is_there(world, &object, owner).await?);
        }
        if !owners.is_empty() && there == 0 {
            world.delete(&resource, &object).await?;
        }
        Ok(None)
    }
}

async fn release(
    world: &World,
    resource: &Arc<Resource>,
    object: &Value,
    finalizer: &str,
) -> Result<(), Status> {
    let release = |object: &mut Value| {
        let held = json::list(object, "metadata.finalizers").iter();
        let rest: Vec<Value> = held.filter(|name| *name != finalizer).cloned().collect();
        json::set(object, "metadata.finalizers", rest);
    };
    match world.amend(resource, object, "", &release).await {
        Err(status) if status.code != 404 => Err(status),
        _ => Ok(()),
    }
}
