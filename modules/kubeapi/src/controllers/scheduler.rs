//! The scheduler: each pod that is placed nowhere gets the node that fits best.
//!
//! A node fits if the pod may run there (selector, required affinity, taints, name), if what the pod asks for
//! is left, and if its ports are free. Of those that fit, preferences count, then the node with the least
//! asked of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, place_of, pods};
use crate::{
    api::Ask, clock, json, kinds, quantity::Milli, registry::built_in_resource, selector::Labels,
    status::Status,
};

const NAME: &str = "default-scheduler";
/// A pod for which there is no room is looked at again when something changes, and this often.
const AGAIN: Duration = Duration::from_secs(30);
/// Stands for all pods that wait.
const ALL: &str = "*";

#[derive(Debug)]
pub(super) struct Scheduler;

impl Controller for Scheduler {
    const NAME: &'static str = NAME;
    const MANAGER: &'static str = "kube-scheduler";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        if key.starts_with(&built_in_resource("", "pods").prefix()) {
            let waits = new.is_some_and(is_waiting);
            // One that ends leaves room.
            let leaves = old.is_some_and(|old| !json::text(old, "spec.nodeName").is_empty())
                && new.is_none_or(|new| !pods::is_active(new));
            return match (waits, leaves) {
                (true, _)
                    if old
                        .is_none_or(|old| !is_waiting(old) || old["spec"] != new.unwrap_or(old)["spec"]) =>
                {
                    vec![key.to_owned()]
                }
                (_, true) => vec![ALL.to_owned()],
                _ => Vec::new(),
            };
        }
        if key.starts_with(&built_in_resource("", "nodes").prefix()) {
            let matters = |node: Option<&Value>| {
                node.map(|node| {
                    (
                        node["metadata"]["labels"].clone(),
                        node["spec"].clone(),
                        node["status"]["allocatable"].clone(),
                    )
                })
            };
            if matters(old) != matters(new) {
                return vec![ALL.to_owned()];
            }
        }
        Vec::new()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("", "pods");
        if key == ALL {
            let waiting = world.api.cache.under(&resource.prefix());
            for (key, pod) in waiting.iter().filter(|(_, pod)| is_waiting(pod)) {
                place(world, key, pod).await?;
                world.api.cache.reaches(world.written.load(std::sync::atomic::Ordering::Relaxed)).await;
            }
            return Ok(None);
        }
        match world.api.cache.at(key) {
            Some(pod) if is_waiting(&pod) => place(world, key, &pod).await,
            _ => Ok(None),
        }
    }
}

fn is_waiting(pod: &Value) -> bool {
    json::text(pod, "spec.nodeName").is_empty()
        && json::text(pod, "spec.schedulerName") == NAME
        && json::list(pod, "spec.schedulingGates").is_empty()
        && pods::is_active(pod)
        && !is_ending(pod)
}

async fn place(world: &World, key: &str, pod: &Arc<Value>) -> Result<Option<Duration>, Status> {
    let resource = built_in_resource("", "pods");
    let nodes = world.api.cache.list(built_in_resource("", "nodes"), "");
    let mut on: BTreeMap<String, Vec<Arc<Value>>> = BTreeMap::new();
    let all = world.api.cache.list(resource, "");
    for other in all.into_iter().filter(|pod| pods::is_active(pod)) {
        let node = json::text(&other, "spec.nodeName").to_owned();
        if !node.is_empty() {
            on.entry(node).or_default().push(other);
        }
    }
    let mut refusals: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut best: Option<(i64, &Arc<Value>)> = None;
    let none = Vec::new();
    for node in &nodes {
        let there = on.get(json::text(node, "metadata.name")).unwrap_or(&none);
        let refusal = refusal(pod, node, there).or_else(|| apart(pod, node, &nodes, &on));
        match refusal {
            Some(why) => *refusals.entry(why).or_default() += 1,
            None => {
                let score = score(pod, node, there);
                if best.is_none_or(|(held, _)| score > held) {
                    best = Some((score, node));
                }
            }
        }
    }
    let (namespace, name) = place_of(key);
    if let Some((_, node)) = best {
        let target = json::text(node, "metadata.name");
        let binding = value!({"target": {"kind": "Node", "name": target}});
        let ask = Ask::internal(&format!("system:{NAME}"), resource, namespace, name).of("binding");
        world.api.bind(&ask, &binding).await?;
        let revision = world.api.store.revision().await?;
        world.written.fetch_max(revision, std::sync::atomic::Ordering::Relaxed);
        let message = format!("Successfully assigned {namespace}/{name} to {target}");
        pods::tell(world, resource, pod, false, "Scheduled", &message).await;
        return Ok(None);
    }
    let message = if nodes.is_empty() {
        "no nodes available to schedule pods".to_owned()
    } else {
        let why: Vec<String> = refusals.iter().map(|(why, count)| format!("{count} {why}")).collect();
        format!("0/{} nodes are available: {}.", nodes.len(), why.join(", "))
    };
    let held =
        json::list(pod, "status.conditions").iter().find(|held| json::text(held, "type") == "PodScheduled");
    if held.is_none_or(|held| json::text(held, "message") != message) {
        let generation = json::int(pod, "metadata.generation");
        let told = message.clone();
        let change = move |pod: &mut Value| {
            let condition = value!({
                "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": told,
                "observedGeneration": generation, "lastProbeTime": null, "lastTransitionTime": clock::now(),
            });
            kinds::set_condition(pod, condition);
        };
        world.amend(resource, pod, "status", &change).await?;
        pods::tell(world, resource, pod, true, "FailedScheduling", &message).await;
    }
    Ok(Some(AGAIN))
}

/// Whether a pod may run on a node, whatever else runs there.
pub(super) fn may_run(pod: &Value, node: &Value) -> bool {
    unfit(pod, node).is_none()
}

fn unfit(pod: &Value, node: &Value) -> Option<&'static str> {
    let labels = json::map(node, "metadata.labels");
    let selector = json::map(pod, "spec.nodeSelector");
    if selector.is_some_and(|selector| !Labels::exactly(selector).matches(labels)) {
        return Some("node(s) didn't match Pod's node affinity/selector");
    }
    let required = json::at(pod, "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution");
    if let Some(required) = required {
        let terms = json::list(required, "nodeSelectorTerms");
        if !terms.iter().any(|term| fits_term(term, node)) {
            return Some("node(s) didn't match Pod's node affinity/selector");
        }
    }
    let cordoned = json::truth(node, "spec.unschedulable")
        .then(|| value!({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}));
    let taints = json::list(node, "spec.taints").iter().chain(&cordoned);
    let untolerated = taints
        .filter(|taint| ["NoSchedule", "NoExecute"].contains(&json::text(taint, "effect")))
        .any(|taint| !tolerates(pod, taint));
    untolerated.then_some("node(s) had untolerated taint(s)")
}

fn fits_term(term: &Value, node: &Value) -> bool {
    let expressions = json::list(term, "matchExpressions");
    let fields = json::list(term, "matchFields");
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_labels = Labels::of(Some(&value!({"matchExpressions": expressions})));
    let name = value!({"metadata.name": json::text(node, "metadata.name")});
    let by_fields = Labels::of(Some(&value!({"matchExpressions": fields})));
    by_labels.is_some_and(|labels| labels.matches(json::map(node, "metadata.labels")))
        && by_fields.is_some_and(|labels| labels.matches(name.as_object()))
}

fn tolerates(pod: &Value, taint: &Value) -> bool {
    json::list(pod, "spec.tolerations").iter().any(|toleration| {
        let (key, effect) = (json::text(toleration, "key"), json::text(toleration, "effect"));
        let exists = json::text(toleration, "operator") == "Exists";
        let same_key = key == json::text(taint, "key") || key.is_empty() && exists;
        let same_effect = effect.is_empty() || effect == json::text(taint, "effect");
        let same_value = exists || json::text(toleration, "value") == json::text(taint, "value");
        same_key && same_effect && same_value
    })
}

/// Why a pod does not fit on a node with what runs there.
fn refusal(pod: &Value, node: &Value, there: &[Arc<Value>]) -> Option<&'static str> {
    if let Some(why) = unfit(pod, node) {
        return Some(why);
    }
    let allocatable = json::map(node, "status.allocatable");
    let has = |resource: &str| Milli::of(allocatable.and_then(|all| all.get(resource)));
    if allocatable.is_some_and(|all| all.contains_key("pods")) {
        let count = i128::try_from(there.len() + 1).unwrap_or(i128::MAX);
        if count.saturating_mul(1000) > has("pods").0 {
            return Some("Too many pods");
        }
    }
    let mut asked = requests(pod);
    for other in there {
        for (resource, amount) in requests(other) {
            if let Some(sum) = asked.get_mut(&resource) {
                sum.0 = sum.0.saturating_add(amount.0);
            }
        }
    }
    let own = requests(pod);
    if asked.iter().any(|(resource, sum)| own[resource].0 > 0 && *sum > has(resource)) {
        return Some("Insufficient resources");
    }
    let ports = host_ports(pod);
    let taken = there.iter().any(|other| host_ports(other).iter().any(|port| ports.contains(port)));
    taken.then_some("node(s) didn't have free ports for the requested pod ports")
}

/// What a pod asks for: its containers together, or the greediest of those that run before.
fn requests(pod: &Value) -> BTreeMap<String, Milli> {
    let of = |container: &Value| -> Vec<(String, Milli)> {
        let map = json::map(container, "resources.requests").into_iter().flatten();
        map.map(|(resource, amount)| (resource.clone(), Milli::of(Some(amount)))).collect()
    };
    let mut sum: BTreeMap<String, Milli> = BTreeMap::new();
    for container in json::list(pod, "spec.containers") {
        for (resource, amount) in of(container) {
            let held = sum.entry(resource).or_default();
            held.0 = held.0.saturating_add(amount.0);
        }
    }
    for container in json::list(pod, "spec.initContainers") {
        for (resource, amount) in of(container) {
            let held = sum.entry(resource).or_default();
            *held = (*held).max(amount);
        }
    }
    sum
}

fn host_ports(pod: &Value) -> Vec<(i64, String)> {
    let containers = json::list(pod, "spec.containers").iter();
    let ports = containers.flat_map(|container| json::list(container, "ports"));
    let ports = ports.map(|port| (json::int(port, "hostPort"), json::text(port, "protocol").to_owned()));
    ports.filter(|(port, _)| *port != 0).collect()
}

/// Whether required affinity to or from other pods forbids a node.
fn apart(
    pod: &Value,
    node: &Value,
    nodes: &[Arc<Value>],
    on: &BTreeMap<String, Vec<Arc<Value>>>,
) -> Option<&'static str> {
    let terms = |pod: &Value, which: &str| -> Vec<Value> {
        json::list(pod, &format!("spec.affinity.{which}.requiredDuringSchedulingIgnoredDuringExecution"))
            .to_vec()
    };
    let zone = |node: &Value, key: &str| {
        json::map(node, "metadata.labels").and_then(|labels| labels.get(key)).cloned()
    };
    let meant = |term: &Value, of: &Value, other: &Value| {
        let own = json::text(of, "metadata.namespace");
        let theirs = json::text(other, "metadata.namespace");
        let named = json::list(term, "namespaces");
        let fits = if named.is_empty() { own == theirs } else { named.iter().any(|name| name == theirs) };
        fits && Labels::of(json::at(term, "labelSelector")).is_some_and(|labels| labels.select(other))
    };
    // Pods in the same zone as the node, by a topology key.
    let neighbours = |key: &str| -> Vec<&Arc<Value>> {
        let Some(own) = zone(node, key) else { return Vec::new() };
        let same = nodes.iter().filter(|other| zone(other, key).as_ref() == Some(&own));
        same.filter_map(|other| on.get(json::text(other, "metadata.name"))).flatten().collect()
    };
    for term in terms(pod, "podAntiAffinity") {
        if neighbours(json::text(&term, "topologyKey")).iter().any(|other| meant(&term, pod, other)) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
    }
    for other in on.values().flatten() {
        for term in terms(other, "podAntiAffinity") {
            let close =
                neighbours(json::text(&term, "topologyKey")).iter().any(|held| Arc::ptr_eq(held, other));
            if close && meant(&term, other, pod) {
                return Some("node(s) didn't satisfy existing pods anti-affinity rules");
            }
        }
    }
    for term in terms(pod, "podAffinity") {
        let near = neighbours(json::text(&term, "topologyKey")).iter().any(|other| meant(&term, pod, other));
        // The first of a group that wants to be together may begin anywhere.
        let anywhere = on.values().flatten().any(|other| meant(&term, pod, other));
        if !near && (anywhere || !meant(&term, pod, pod)) {
            return Some("node(s) didn't match pod affinity rules");
        }
    }
    None
}

fn score(pod: &Value, node: &Value, there: &[Arc<Value>]) -> i64 {
    let preferred =
        json::list(pod, "spec.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution");
    let mut score: i64 = preferred
        .iter()
        .filter(|term| json::at(term, "preference").is_some_and(|term| fits_term(term, node)))
        .map(|term| json::int(term, "weight") * 1_000)
        .sum();
    let unwelcome = json::list(node, "spec.taints")
        .iter()
        .filter(|taint| json::text(taint, "effect") == "PreferNoSchedule" && !tolerates(pod, taint));
    score -= i64::try_from(unwelcome.count()).unwrap_or(i64::MAX) * 100_000;
    // Pods of one owner spread first, everything else after.
    let owner = super::controller_of(pod).map(|owner| json::text(owner, "uid"));
    let siblings = there.iter().filter(|other| {
        owner.is_some() && super::controller_of(other).map(|owner| json::text(owner, "uid")) == owner
    });
    score -= i64::try_from(siblings.count()).unwrap_or(0) * 100;
    let used = |resource: &str| {
        let has = Milli::of(json::map(node, "status.allocatable").and_then(|all| all.get(resource)));
        let sum: i128 = there
            .iter()
            .filter_map(|other| requests(other).get(resource).copied())
            .map(|amount| amount.0)
            .sum();
        if has.0 > 0 { i64::try_from(sum.saturating_mul(40) / has.0).unwrap_or(40) } else { 0 }
    };
    score - used("cpu") - used("memory") - i64::try_from(there.len()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, taints: Value) -> Value {
        value!({"metadata": {"name": name, "labels": {"zone": name}}, "spec": {"taints": taints},
                "status": {"allocatable": {"cpu": "1", "memory": "1Gi", "pods": "2"}}})
    }

    fn pod(cpu: &str) -> Value {
        value!({"metadata": {"namespace": "n", "labels": {"app": "a"}},
                "spec": {"containers": [{"resources": {"requests": {"cpu": cpu}}, "ports": [{"hostPort": 80, "protocol": "TCP"}]}]}})
    }

    #[test]
    fn a_node_is_refused_for_selector_taint_room_and_ports() {
        let free = node("a", value!([]));
        assert_eq!(refusal(&pod("1"), &free, &[]), None);
        assert_eq!(refusal(&pod("1001m"), &free, &[]), Some("Insufficient resources"));
        let there = [Arc::new(pod("100m"))];
        assert!(refusal(&pod("100m"), &free, &there).is_some_and(|why| why.contains("ports")));
        let mut picky = pod("1");
        json::set(&mut picky, "spec.nodeSelector.zone", "b");
        assert!(unfit(&picky, &free).is_some());
        let tainted = node("a", value!([{"key": "k", "value": "v", "effect": "NoSchedule"}]));
        let mut tolerant = pod("1");
        assert!(!may_run(&tolerant, &tainted));
        json::set(
            &mut tolerant,
            "spec.tolerations",
            value!([{"key": "k", "operator": "Equal", "value": "v"}]),
        );
        assert!(may_run(&tolerant, &tainted));
    }

    #[test]
    fn pods_that_want_to_be_apart_are() {
        let nodes = [Arc::new(node("a", value!([]))), Arc::new(node("b", value!([])))];
        let mut lonely = pod("1");
        json::set(
            &mut lonely,
            "spec.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution",
            value!([{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "a"}}}]),
        );
        let on = BTreeMap::from([("a".to_owned(), vec![Arc::new(lonely.clone())])]);
        assert!(apart(&lonely, &nodes[0], &nodes, &on).is_some());
        assert_eq!(apart(&lonely, &nodes[1], &nodes, &on), None);
        assert!(apart(&pod("1"), &nodes[0], &nodes, &on).is_some(), "the one that is there wants it too");
    }
}
