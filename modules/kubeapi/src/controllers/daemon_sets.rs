//! DaemonSets: one pod on every node that fits. The pod names its node in its affinity, and the scheduler
//! places it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, owner_key, place_of, pods, scheduler};
use crate::{json, kinds, registry::built_in_resource, status::Status};

/// Changes with the template: a pod of another generation is replaced.
const GENERATION: &str = "pod-template-generation";

#[derive(Debug)]
pub(super) struct DaemonSets;

impl Controller for DaemonSets {
    const NAME: &'static str = "daemonset-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let own = built_in_resource("apps", "daemonsets");
        if key.starts_with(&own.prefix()) {
            return vec![key.to_owned()];
        }
        if key.starts_with(&built_in_resource("", "nodes").prefix()) {
            // What a node reports of itself does not move pods; what it is does.
            let matters = |node: Option<&Value>| {
                node.map(|node| (node["metadata"]["labels"].clone(), node["spec"].clone()))
            };
            return if matters(old) == matters(new) { Vec::new() } else { vec![ALL.to_owned()] };
        }
        if key.starts_with(&built_in_resource("", "pods").prefix()) {
            return [old, new].into_iter().flatten().filter_map(|pod| owner_key(own, pod)).collect();
        }
        Vec::new()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("apps", "daemonsets");
        if key == ALL {
            for set in world.api.cache.list(resource, "") {
                sync(world, &set).await?;
            }
            return Ok(None);
        }
        let (namespace, name) = place_of(key);
        match world.api.cache.get(resource, namespace, name) {
            Some(set) if !is_ending(&set) => sync(world, &set).await,
            _ => Ok(None),
        }
    }
}

/// Stands for all sets: a node changed.
const ALL: &str = "*";

/// The node that a pod is made for.
fn node_of(pod: &Value) -> String {
    let bound = json::text(pod, "spec.nodeName");
    if !bound.is_empty() {
        return bound.to_owned();
    }
    let path = "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    let terms = json::list(pod, path).iter();
    let fields = terms.flat_map(|term| json::list(term, "matchFields"));
    let named = fields.flat_map(|field| json::list(field, "values")).filter_map(Value::as_str).next();
    named.unwrap_or_default().to_owned()
}

async fn sync(world: &World, set: &Value) -> Result<Option<Duration>, Status> {
    let resource = built_in_resource("apps", "daemonsets");
    let pod_resource = built_in_resource("", "pods");
    let namespace = json::text(set, "metadata.namespace");
    let generation = template_generation(set);
    let mut by_node: BTreeMap<String, Vec<Arc<Value>>> = BTreeMap::new();
    for pod in pods::managed(world, set) {
        by_node.entry(node_of(&pod)).or_default().push(pod);
    }
    let nodes = world.api.cache.list(built_in_resource("", "nodes"), "");
    let (mut desired, mut scheduled, mut misplaced, mut ready, mut available, mut updated) =
        (0, 0, 0, 0, 0, 0);
    let mut stale = Vec::new();
    let seconds = json::int(set, "spec.minReadySeconds");
    for node in &nodes {
        let name = json::text(node, "metadata.name");
        let own = by_node.remove(name).unwrap_or_default();
        let mut sample = pod_for(set, name, &generation);
        json::set(&mut sample, "metadata.namespace", namespace);
        let fits = scheduler::may_run(&sample, node);
        let active: Vec<&Arc<Value>> = own.iter().filter(|pod| !is_ending(pod)).collect();
        for pod in own.iter().filter(|pod| json::text(pod, "status.phase") == "Failed" && !is_ending(pod)) {
            world.delete(pod_resource, pod).await?;
        }
        if !fits {
            misplaced += usize::from(!active.is_empty());
            for pod in active {
                world.delete(pod_resource, pod).await?;
            }
            continue;
        }
        desired += 1;
        if own.is_empty() {
            world.create(pod_resource, namespace, pod_for(set, name, &generation)).await?;
            continue;
        }
        let Some(first) = active.first() else { continue };
        scheduled += 1;
        ready += usize::from(kinds::is_ready(first));
        available += usize::from(pods::is_available(first, seconds));
        if json::map(first, "metadata.labels").and_then(|labels| labels.get(GENERATION))
            == Some(&value!(generation))
        {
            updated += 1;
        } else {
            stale.push(Arc::clone(first));
        }
        for pod in &active[1..] {
            world.delete(pod_resource, pod).await?;
        }
    }
    // Pods of nodes that are gone.
    for pod in by_node.values().flatten().filter(|pod| !is_ending(pod)) {
        world.delete(pod_resource, pod).await?;
    }
    if json::text(set, "spec.updateStrategy.type") == "RollingUpdate" {
        let most = match json::at(set, "spec.updateStrategy.rollingUpdate.maxUnavailable") {
            Some(Value::String(text)) => {
                let percent: usize = text.trim_end_matches('%').parse().unwrap_or(0);
                (desired * percent).div_ceil(100)
            }
            Some(number) => usize::try_from(number.as_i64().unwrap_or(1)).unwrap_or(1),
            None => 1,
        };
        let (dead, serving): (Vec<_>, Vec<_>) = stale.into_iter().partition(|pod| !kinds::is_ready(pod));
        let room = most.max(1).saturating_sub(desired - available.min(desired));
        for pod in dead.iter().chain(serving.iter().take(room)) {
            world.delete(pod_resource, pod).await?;
        }
    }
    let status = value!({
        "currentNumberScheduled": scheduled,
        "numberMisscheduled": misplaced,
        "desiredNumberScheduled": desired,
        "numberReady": ready,
        "observedGeneration": json::int(set, "metadata.generation"),
        "updatedNumberScheduled": updated,
        "numberAvailable": available,
        "numberUnavailable": desired - available.min(desired),
    });
    super::write_status(world, resource, set, &status).await?;
    Ok((available < ready).then_some(Duration::from_secs(1)))
}

/// A number that changes with the template and with nothing else.
fn template_generation(set: &Value) -> String {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    let mut hasher = DefaultHasher::new();
    json::at(set, "spec.template").map(Value::to_string).hash(&mut hasher);
    format!("{:010}", hasher.finish() % 10_000_000_000)
}

fn pod_for(set: &Value, node: &str, generation: &str) -> Value {
    let mut pod = pods::from_template(built_in_resource("apps", "daemonsets"), set);
    json::map_mut(&mut pod, "metadata.labels").insert(GENERATION.to_owned(), value!(generation));
    let field = value!([{"key": "metadata.name", "operator": "In", "values": [node]}]);
    let path = "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms";
    let mut terms = json::list(&pod, path).to_vec();
    if terms.is_empty() {
        terms.push(value!({}));
    }
    for term in &mut terms {
        json::set(term, "matchFields", field.clone());
    }
    json::set(&mut pod, path, terms);
    let mut tolerations = json::list(&pod, "spec.tolerations").to_vec();
    for (key, effect) in [
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ] {
        tolerations.push(value!({"key": key, "operator": "Exists", "effect": effect}));
    }
    json::set(&mut pod, "spec.tolerations", tolerations);
    pod
}
