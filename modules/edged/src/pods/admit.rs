//! Whether a pod may run here: what a kubelet checks once more, in its words.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod};

use super::spec;
use crate::{
    make::resources,
    quantity::{Milli, Resources},
};

/// What there is for pods.
#[derive(Debug, Clone, Default)]
pub(crate) struct Limits {
    /// Pods at a time.
    pub(crate) pods: usize,
    pub(crate) allocatable: Resources,
}

/// Why not: a reason and a message.
pub(crate) type Rejection = (&'static str, String);

/// Checks a pod against those that are here already.
pub(crate) fn check<'a>(
    pod: &Pod,
    others: impl Iterator<Item = &'a Pod>,
    node: Option<&Node>,
    limits: &Limits,
) -> Result<(), Rejection> {
    if let Some(node) = node
        && !selects(pod, node)
    {
        let message = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
        return Err(("NodeAffinity", message.to_owned()));
    }
    let others: Vec<&Pod> = others.collect();
    if others.len() >= limits.pods {
        let message = format!(
            "Node didn't have enough resource: pods, requested: 1, used: {}, capacity: {}",
            others.len(),
            limits.pods
        );
        return Err(("OutOfpods", message));
    }
    let ports = host_ports(pod);
    if others.iter().any(|other| host_ports(other).intersection(&ports).next().is_some()) {
        let message =
            "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        return Err(("NodePorts", message.to_owned()));
    }
    let mut used: BTreeMap<String, i128> = BTreeMap::new();
    for other in &others {
        for (name, amount) in resources::pod_requests(other) {
            *used.entry(name).or_default() += amount.0;
        }
    }
    for (name, reason) in [("cpu", "OutOfcpu"), ("memory", "OutOfmemory")] {
        let requested = resources::pod_requests(pod).get(name).map_or(0, |amount| amount.0);
        let capacity = Milli::of(Some(&limits.allocatable), name).0;
        let used = used.get(name).copied().unwrap_or(0);
        if requested > 0 && capacity > 0 && used + requested > capacity {
            let shown = |amount: i128| if name == "cpu" { amount } else { amount / 1_000 };
            let message = format!(
                "Node didn't have enough resource: {name}, requested: {}, used: {}, capacity: {}",
                shown(requested),
                shown(used),
                shown(capacity)
            );
            return Err((reason, message));
        }
    }
    Ok(())
}

fn host_ports(pod: &Pod) -> BTreeSet<(String, i32)> {
    let ports = spec::containers(pod).flat_map(|container| container.ports.iter().flatten());
    let on_host = ports.filter_map(|port| {
        let number = port.host_port.filter(|number| *number > 0)?;
        Some((port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()), number))
    });
    on_host.collect()
}

/// Whether the node is one that the pod's selector and required affinity allow.
fn selects(pod: &Pod, node: &Node) -> bool {
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let Some(pod) = &pod.spec else { return true };
    let selector = pod.node_selector.iter().flatten();
    if selector.clone().any(|(key, value)| labels.get(key) != Some(value)) {
        return false;
    }
    let required = pod
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let name = node.metadata.name.as_deref().unwrap_or_default();
    required
        .is_none_or(|required| required.node_selector_terms.iter().any(|term| matches(term, labels, name)))
}

fn matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, name: &str) -> bool {
    let expressions = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    let any = term.match_expressions.as_ref().is_some_and(|all| !all.is_empty())
        || term.match_fields.as_ref().is_some_and(|all| !all.is_empty());
    any && expressions.into_iter().all(|one| holds(one, labels.get(&one.key).map(String::as_str)))
        && fields.into_iter().all(|one| holds(one, (one.key == "metadata.name").then_some(name)))
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = value.is_some_and(|value| values.iter().any(|one| one == value));
    let compared = || {
        let bound: i64 = values.first()?.parse().ok()?;
        Some(value?.parse::<i64>().ok()?.cmp(&bound))
    };
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared() == Some(std::cmp::Ordering::Greater),
        "Lt" => compared() == Some(std::cmp::Ordering::Less),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(
            json!({ "metadata": { "name": "p", "namespace": "d", "uid": "u" }, "spec": spec }),
        )
        .unwrap()
    }

    fn node() -> Node {
        serde_json::from_value(
            json!({ "metadata": { "name": "edge-1", "labels": { "zone": "a", "size": "5" } } }),
        )
        .unwrap()
    }

    fn limits() -> Limits {
        Limits {
            pods: 2,
            allocatable: serde_json::from_value(json!({ "cpu": "1", "memory": "1Gi" })).unwrap(),
        }
    }

    fn of(spec: Value, others: &[Pod]) -> Option<&'static str> {
        check(&pod(spec), others.iter(), Some(&node()), &limits()).err().map(|(reason, _)| reason)
    }

    #[test]
    fn a_pod_that_does_not_fit_is_rejected_with_the_reason_of_a_kubelet() {
        let cpu = |cpu: &str| json!({ "containers": [{ "name": "c", "resources": { "requests": { "cpu": cpu } } }] });
        assert_eq!(of(cpu("600m"), &[pod(cpu("300m"))]), None);
        assert_eq!(of(cpu("800m"), &[pod(cpu("300m"))]), Some("OutOfcpu"));
        let memory =
            json!({ "containers": [{ "name": "c", "resources": { "requests": { "memory": "2Gi" } } }] });
        assert_eq!(of(memory, &[]), Some("OutOfmemory"));
        assert_eq!(of(cpu("1m"), &[pod(cpu("1m")), pod(cpu("1m"))]), Some("OutOfpods"));
        let port =
            json!({ "containers": [{ "name": "c", "ports": [{ "containerPort": 80, "hostPort": 80 }] }] });
        assert_eq!(of(port.clone(), &[pod(port)]), Some("NodePorts"));
    }

    #[test]
    fn a_pod_that_selects_another_node_is_rejected() {
        let affine = |operator: &str, key: &str, values: Value| {
            json!({ "containers": [], "affinity": { "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] }]
            } } } })
        };
        assert_eq!(of(json!({ "containers": [], "nodeSelector": { "zone": "a" } }), &[]), None);
        assert_eq!(
            of(json!({ "containers": [], "nodeSelector": { "zone": "b" } }), &[]),
            Some("NodeAffinity")
        );
        assert_eq!(of(affine("In", "zone", json!(["a"])), &[]), None);
        assert_eq!(of(affine("NotIn", "zone", json!(["a"])), &[]), Some("NodeAffinity"));
        assert_eq!(of(affine("Gt", "size", json!(["4"])), &[]), None);
        assert_eq!(of(affine("Lt", "size", json!(["4"])), &[]), Some("NodeAffinity"));
        assert_eq!(of(affine("DoesNotExist", "rack", json!([])), &[]), None);
    }
}
