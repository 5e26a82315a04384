//! Namespaces: when one is deleted, everything in it goes first.

use std::time::Duration;

use serde_json::Value;

use super::{Controller, World, is_ending, place_of};
use crate::{json, registry::built_in_resource, status::Status};

#[derive(Debug)]
pub(super) struct Namespaces;

impl Controller for Namespaces {
    const NAME: &'static str = "namespace-controller";

    fn keys(&self, key: &str, _old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let namespaces = built_in_resource("", "namespaces");
        match (place_of(key), new) {
            // Something in it is gone: perhaps it was the last.
            ((namespace, _), None) if namespace != "-" => vec![namespaces.key("", namespace)],
            _ if key.starts_with(&namespaces.prefix()) => vec![key.to_owned()],
            _ => Vec::new(),
        }
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let namespaces = built_in_resource("", "namespaces");
        let (_, name) = place_of(key);
        let Some(namespace) = world.api.cache.get(namespaces, "", name) else { return Ok(None) };
        if !is_ending(&namespace) || json::list(&namespace, "spec.finalizers").is_empty() {
            return Ok(None);
        }
        let resources = world.api.registry.now();
        let mut left = 0;
        for resource in resources.stored().filter(|resource| resource.namespaced) {
            let (objects, _) = world.api.store.all(&resource.prefix_of(name)).await?;
            for stored in objects.iter().filter(|stored| !is_ending(&stored.object)) {
                world.delete(resource, &stored.object).await?;
            }
            left += world.api.store.page(&resource.prefix_of(name), None, 1, None).await?.objects.len();
        }
        if left > 0 {
            return Ok(Some(Duration::from_millis(500)));
        }
        let release = |object: &mut Value| drop(json::remove(object, "spec.finalizers"));
        world.amend(namespaces, &namespace, "finalize", &release).await?;
        Ok(None)
    }
}
