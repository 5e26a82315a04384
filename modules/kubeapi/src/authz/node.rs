//! What a node's agent may read and write: itself, its pods, and what its pods name.

use serde_json::Value;

use super::Attributes;
use crate::{cache::Cache, json, registry::built_in_resource};

/// Whether the agent of a node may do something by being that.
pub(super) fn allows(cache: &Cache, node: &str, wanted: &Attributes) -> bool {
    let verb = wanted.verb.as_str();
    let reads = ["get", "list", "watch"].contains(&verb);
    match (wanted.group.as_str(), wanted.resource.as_str(), wanted.subresource.as_str()) {
        ("", "secrets" | "configmaps" | "persistentvolumeclaims", "") => {
            // A list or a watch of one name is a read of it; of all it is refused.
            reads && !wanted.name.is_empty() && is_named(cache, node, wanted)
        }
        ("", "serviceaccounts", "token") => verb == "create" && is_account(cache, node, wanted),
        ("", "serviceaccounts", "") => verb == "get" && is_account(cache, node, wanted),
        ("", "nodes", "" | "status") => reads || ["create", "update", "patch"].contains(&verb),
        ("", "pods", "") => reads || ["create", "delete"].contains(&verb),
        ("", "pods", "status") => ["update", "patch"].contains(&verb),
        ("", "pods", "eviction") => verb == "create",
        ("", "services" | "persistentvolumes", "") => reads,
        ("" | "events.k8s.io", "events", "") => ["create", "update", "patch"].contains(&verb),
        ("coordination.k8s.io", "leases", "") => {
            wanted.namespace == "kube-node-lease"
                && ["get", "create", "update", "patch", "delete"].contains(&verb)
        }
        ("authentication.k8s.io", "tokenreviews", "")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews", "") => {
            verb == "create"
        }
        ("storage.k8s.io" | "node.k8s.io", ..) => reads,
        _ => false,
    }
}

fn pods_of<'a>(
    cache: &Cache,
    node: &'a str,
    namespace: &str,
) -> impl Iterator<Item = std::sync::Arc<Value>> + 'a {
    let pods = cache.list(built_in_resource("", "pods"), namespace).into_iter();
    pods.filter(move |pod| json::text(pod, "spec.nodeName") == node)
}

fn is_account(cache: &Cache, node: &str, wanted: &Attributes) -> bool {
    pods_of(cache, node, &wanted.namespace)
        .any(|pod| json::text(&pod, "spec.serviceAccountName") == wanted.name)
}

fn is_named(cache: &Cache, node: &str, wanted: &Attributes) -> bool {
    !wanted.namespace.is_empty()
        && pods_of(cache, node, &wanted.namespace).any(|pod| {
            let spec = json::at(&pod, "spec").unwrap_or(&Value::Null);
            names(spec, &wanted.resource, &wanted.name)
        })
}

/// Whether a pod names a secret, a config map or a claim.
fn names(spec: &Value, resource: &str, name: &str) -> bool {
    let says = |value: &Value, path: &str| json::text(value, path) == name;
    let containers = ["containers", "initContainers", "ephemeralContainers"].into_iter();
    let mut containers = containers.flat_map(|group| json::list(spec, group));
    let in_volumes = |source: &str, field: &str| {
        json::list(spec, "volumes").iter().any(|volume| {
            says(volume, &format!("{source}.{field}"))
                || json::list(volume, "projected.sources")
                    .iter()
                    .any(|projected| says(projected, &format!("{source}.name")))
        })
    };
    let mut in_env = |from: &str, key: &str| {
        containers.any(|container| {
            json::list(container, "envFrom").iter().any(|source| says(source, &format!("{from}.name")))
                || json::list(container, "env")
                    .iter()
                    .any(|variable| says(variable, &format!("valueFrom.{key}.name")))
        })
    };
    match resource {
        "secrets" => {
            in_volumes("secret", "secretName")
                || json::list(spec, "imagePullSecrets").iter().any(|secret| says(secret, "name"))
                || in_env("secretRef", "secretKeyRef")
        }
        "configmaps" => in_volumes("configMap", "name") || in_env("configMapRef", "configMapKeyRef"),
        _ => in_volumes("persistentVolumeClaim", "claimName"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_names_secrets_in_volumes_variables_and_pulls() {
        let spec = json!({
            "containers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "a"}}}], "envFrom": [{"secretRef": {"name": "b"}}]}],
            "volumes": [{"secret": {"secretName": "c"}}, {"projected": {"sources": [{"secret": {"name": "d"}}]}}],
            "imagePullSecrets": [{"name": "e"}]});
        for name in ["a", "b", "c", "d", "e"] {
            assert!(names(&spec, "secrets", name), "{name}");
            assert!(!names(&spec, "configmaps", name), "{name}");
        }
        assert!(!names(&spec, "secrets", "f"));
    }
}
