//! CustomResourceDefinitions: names are accepted, resources are served, and what was made by one that is
//! deleted goes before it does.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, place_of};
use crate::{
    api::{Api, delete::CLEANUP},
    clock, crd, json, kinds,
    registry::built_in_resource,
    status::Status,
};

#[derive(Debug)]
pub(super) struct Definitions;

impl Controller for Definitions {
    const NAME: &'static str = "crd-controller";
    const MANAGER: &'static str = "kube-apiserver";

    fn keys(&self, key: &str, _old: Option<&Value>, _new: Option<&Value>) -> Vec<String> {
        let own = built_in_resource("apiextensions.k8s.io", "customresourcedefinitions").prefix();
        if key.starts_with(&own) { vec![key.to_owned()] } else { Vec::new() }
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("apiextensions.k8s.io", "customresourcedefinitions");
        let all = serve(&world.api);
        let (_, name) = place_of(key);
        let Some(definition) = world.api.cache.get(resource, "", name) else { return Ok(None) };
        if is_ending(&definition) {
            return end(world, &definition).await;
        }
        if crd::condition(&definition, "Established")
            && json::at(&definition, "status.acceptedNames") == json::at(&definition, "spec.names")
        {
            return Ok(None);
        }
        if let Some(other) = all.iter().find(|other| takes_names_of(other, &definition)) {
            let message = format!("names are in use by {}", json::text(other, "metadata.name"));
            let refuse = move |object: &mut Value| {
                let now = clock::now();
                kinds::set_condition(
                    object,
                    value!({"type": "NamesAccepted", "status": "False", "lastTransitionTime": now, "reason": "NameConflict", "message": message}),
                );
                kinds::set_condition(
                    object,
                    value!({"type": "Established", "status": "False", "lastTransitionTime": now, "reason": "NotAccepted", "message": "not all names are accepted"}),
                );
            };
            world.amend(resource, &definition, "status", &refuse).await?;
            return Ok(None);
        }
        let accept = |object: &mut Value| {
            let names = json::at(object, "spec.names").cloned().unwrap_or_default();
            json::set(object, "status.acceptedNames", names);
            let now = clock::now();
            kinds::set_condition(
                object,
                value!({"type": "NamesAccepted", "status": "True", "lastTransitionTime": now, "reason": "NoConflicts", "message": "no conflicts found"}),
            );
            kinds::set_condition(
                object,
                value!({"type": "Established", "status": "True", "lastTransitionTime": now, "reason": "InitialNamesAccepted", "message": "the initial names have been accepted"}),
            );
        };
        world.amend(resource, &definition, "status", &accept).await?;
        Ok(None)
    }
}

/// Serves what the definitions of the cache say, and returns them.
pub(super) fn serve(api: &Api) -> Vec<Arc<Value>> {
    let all = api.cache.list(built_in_resource("apiextensions.k8s.io", "customresourcedefinitions"), "");
    api.registry.set_custom(all.iter().flat_map(|definition| crd::resources(definition)).collect());
    all
}

/// Whether another definition that is established has a name that this one wants.
fn takes_names_of(other: &Value, definition: &Value) -> bool {
    let same = |path: &str| json::text(other, path) == json::text(definition, path);
    crd::condition(other, "Established")
        && same("spec.group")
        && !same("metadata.name")
        && (same("spec.names.kind") || same("spec.names.singular") || same("spec.names.plural"))
}

async fn end(world: &World, definition: &Value) -> Result<Option<Duration>, Status> {
    let resource = built_in_resource("apiextensions.k8s.io", "customresourcedefinitions");
    if !json::list(definition, "metadata.finalizers").contains(&value!(CLEANUP)) {
        return Ok(None);
    }
    if let Some(custom) = crd::resources(definition).first() {
        let (objects, _) = world.api.store.all(&custom.prefix()).await?;
        for stored in &objects {
            world.delete(custom, &stored.object).await?;
        }
        if !objects.is_empty() {
            return Ok(Some(Duration::from_millis(100)));
        }
    }
    let release = |object: &mut Value| {
        let finalizers = json::list(object, "metadata.finalizers").iter();
        let rest: Vec<Value> = finalizers.filter(|name| *name != CLEANUP).cloned().collect();
        json::set(object, "metadata.finalizers", rest);
    };
    world.amend(resource, definition, "", &release).await?;
    Ok(None)
}
