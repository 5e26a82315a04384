//! What controllers of pods have in common.

use std::sync::Arc;

use serde_json::{Value, json as value};

use super::{World, controller_of, is_ending};
use crate::{clock, json, kinds, registry::Resource, selector::Labels, status::Status};

/// The pods that an object manages.
pub(super) fn managed(world: &World, owner: &Value) -> Vec<Arc<Value>> {
    let pods = crate::registry::built_in_resource("", "pods");
    let uid = json::text(owner, "metadata.uid");
    let all = world.api.cache.list(pods, json::text(owner, "metadata.namespace"));
    let own = all
        .into_iter()
        .filter(|pod| controller_of(pod).is_some_and(|controller| json::text(controller, "uid") == uid));
    own.collect()
}

/// Pods that nobody manages and that an object selects become its own.
pub(super) async fn adopt(world: &World, resource: &Arc<Resource>, owner: &Value) -> Result<(), Status> {
    let pods = crate::registry::built_in_resource("", "pods");
    let Some(selector) = Labels::of(json::at(owner, "spec.selector")).filter(|labels| !labels.is_empty())
    else {
        return Ok(());
    };
    for pod in world.api.cache.list(pods, json::text(owner, "metadata.namespace")) {
        if controller_of(&pod).is_some() || is_ending(&pod) || !is_active(&pod) || !selector.select(&pod) {
            continue;
        }
        let reference = reference(resource, owner);
        let take = |pod: &mut Value| {
            let mut owners = json::list(pod, "metadata.ownerReferences").to_vec();
            owners.push(reference.clone());
            json::set(pod, "metadata.ownerReferences", owners);
        };
        world.amend(pods, &pod, "", &take).await?;
    }
    Ok(())
}

/// Whether a pod has not ended and is not to end.
pub(super) fn is_active(pod: &Value) -> bool {
    !is_ending(pod) && !["Succeeded", "Failed"].contains(&json::text(pod, "status.phase"))
}

/// Whether a pod has been ready for so many seconds.
pub(super) fn is_available(pod: &Value, seconds: i64) -> bool {
    if !kinds::is_ready(pod) {
        return false;
    }
    let conditions = json::list(pod, "status.conditions").iter();
    let since = conditions.filter(|held| json::text(held, "type") == "Ready");
    let since = since.filter_map(|held| clock::parse(json::text(held, "lastTransitionTime"))).next();
    seconds == 0 || since.is_some_and(|since| clock::unix() - since >= seconds)
}

/// A reference to the managing owner.
pub(super) fn reference(resource: &Resource, owner: &Value) -> Value {
    value!({
        "apiVersion": resource.api_version(),
        "kind": resource.kind,
        "name": json::text(owner, "metadata.name"),
        "uid": json::text(owner, "metadata.uid"),
        "controller": true,
        "blockOwnerDeletion": true,
    })
}

/// A pod of an object's template.
pub(super) fn from_template(resource: &Resource, owner: &Value) -> Value {
    let mut pod = json::at(owner, "spec.template").cloned().unwrap_or_else(|| value!({}));
    let name = json::text(owner, "metadata.name");
    json::set(&mut pod, "metadata.generateName", format!("{name}-"));
    json::set(&mut pod, "metadata.ownerReferences", value!([reference(resource, owner)]));
    pod
}

/// Which pods to delete first: those that serve least.
pub(super) fn expendable_first(pods: &mut [Arc<Value>]) {
    pods.sort_by_cached_key(|pod| {
        let phase = match json::text(pod, "status.phase") {
            "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let cost = json::map(pod, "metadata.annotations")
            .and_then(|notes| notes.get("controller.kubernetes.io/pod-deletion-cost"))
            .and_then(Value::as_str)
            .and_then(|cost| cost.parse::<i64>().ok());
        (
            !json::text(pod, "spec.nodeName").is_empty(),
            phase,
            kinds::is_ready(pod),
            cost.unwrap_or(0),
            // The youngest first.
            std::cmp::Reverse(json::text(pod, "metadata.creationTimestamp").to_owned()),
        )
    });
}

/// Writes an event about an object.
pub(super) async fn tell(
    world: &World,
    resource: &Resource,
    about: &Value,
    warning: bool,
    reason: &str,
    message: &str,
) {
    let namespace = match json::text(about, "metadata.namespace") {
        "" => "default",
        namespace => namespace,
    };
    let (name, uid) = (json::text(about, "metadata.name"), json::text(about, "metadata.uid"));
    let now = clock::now();
    let event = value!({
        "metadata": {"generateName": format!("{name}."), "namespace": namespace},
        "involvedObject": {
            "kind": resource.kind, "apiVersion": resource.api_version(), "namespace": json::text(about, "metadata.namespace"),
            "name": name, "uid": uid, "resourceVersion": json::text(about, "metadata.resourceVersion"),
        },
        "reason": reason,
        "message": message,
        "source": {"component": world.name},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "type": if warning { "Warning" } else { "Normal" },
        "reportingComponent": world.name,
    });
    let events = crate::registry::built_in_resource("", "events");
    if let Err(status) = world.create(events, namespace, event).await {
        tracing::debug!(%name, error = %status.message, "an event could not be written");
    }
}
