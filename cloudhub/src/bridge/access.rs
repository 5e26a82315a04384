//! What the bridge asks of an API server, and the rights that let it: one table, from which the manifest in
//! `deploy/bridge/rights.yaml` and `octobus init` are made, and against which every request is held in
//! builds that check (tests).

use serde_json::{Value, json};

/// Verbs on a resource of a group.
pub(super) type Right = (&'static str, &'static str, &'static [&'static str]);

/// Everything that the bridge does, and the kubelet endpoint beside it.
pub(super) const RIGHTS: [Right; 12] = [
    ("", "pods", &["list", "watch", "create", "patch", "delete"]),
    ("", "pods/status", &["patch"]),
    ("", "nodes", &["list", "watch", "create", "patch", "delete"]),
    ("", "nodes/status", &["patch"]),
    ("", "secrets", &["get", "list", "watch"]),
    ("", "configmaps", &["get", "list", "watch"]),
    ("", "serviceaccounts", &["get", "list", "watch"]),
    ("", "serviceaccounts/token", &["create"]),
    ("", "events", &["create", "patch"]),
    // Who asks at the kubelet endpoint, and whether it may.
    ("authentication.k8s.io", "tokenreviews", &["create"]),
    ("authorization.k8s.io", "subjectaccessreviews", &["create"]),
    ("coordination.k8s.io", "leases", &["create", "patch"]),
];

/// Where everything of Octobus is in a cluster.
pub const NAMESPACE: &str = "octobus";
/// The account that a hub uses.
pub const ACCOUNT: &str = "octobus-hub";
/// Name of the role and its binding.
const ROLE: &str = "octobus-bridge";

/// Whether the bridge may do this. Leases are in one namespace, everything else in all.
pub(super) fn is_listed(verb: &str, resource: &str) -> bool {
    RIGHTS.iter().any(|(_, listed, verbs)| *listed == resource && verbs.contains(&verb))
}

/// The objects that give a hub its rights, in the order in which they are to be applied, each with where.
#[must_use]
pub fn objects() -> Vec<(String, Value)> {
    let meta = |name: &str| json!({"name": name, "labels": {"app.kubernetes.io/part-of": "octobus"}});
    let within = |name: &str, namespace: &str| {
        let mut meta = meta(name);
        meta["namespace"] = namespace.into();
        meta
    };
    let rule = |(group, resource, verbs): &Right| json!({"apiGroups": [group], "resources": [resource], "verbs": verbs});
    let (leases, all): (Vec<&Right>, Vec<&Right>) =
        RIGHTS.iter().partition(|(_, resource, _)| *resource == "leases");
    let rules = |rights: Vec<&Right>| rights.into_iter().map(rule).collect::<Value>();
    let subjects = json!([{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}]);
    let (core, rbac) = ("/api/v1", "/apis/rbac.authorization.k8s.io/v1");
    let version = "rbac.authorization.k8s.io/v1";
    let refer = |kind: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": ROLE});
    vec![
        (
            format!("{core}/namespaces/{NAMESPACE}"),
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": meta(NAMESPACE)}),
        ),
        (
            format!("{core}/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}"),
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": within(ACCOUNT, NAMESPACE)}),
        ),
        (
            format!("{rbac}/clusterroles/{ROLE}"),
            json!({"apiVersion": version, "kind": "ClusterRole", "metadata": meta(ROLE), "rules": rules(all)}),
        ),
        (
            format!("{rbac}/clusterrolebindings/{ROLE}"),
            json!({"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": meta(ROLE),
                "roleRef": refer("ClusterRole"), "subjects": subjects}),
        ),
        (
            format!("{rbac}/namespaces/kube-node-lease/roles/{ROLE}"),
            json!({"apiVersion": version, "kind": "Role", "metadata": within(ROLE, "kube-node-lease"),
                "rules": rules(leases)}),
        ),
        (
            format!("{rbac}/namespaces/kube-node-lease/rolebindings/{ROLE}"),
            json!({"apiVersion": version, "kind": "RoleBinding", "metadata": within(ROLE, "kube-node-lease"),
                "roleRef": refer("Role"), "subjects": subjects}),
        ),
    ]
}

/// The same as a manifest. JSON is YAML: each object is a document of its own.
#[must_use]
pub fn manifest() -> String {
    let mut text = String::from(
        "# What a hub's bridge needs in a cluster, and no more. Made by `octobus init --print`; a test holds it to\n\
         # what the code asks for.\n",
    );
    for (_, object) in objects() {
        text.push_str("---\n");
        write_yaml(&object, 0, &mut text);
    }
    text
}

/// Plain YAML of what has neither empty nor odd texts but those it quotes.
fn write_yaml(value: &Value, depth: usize, text: &mut String) {
    let Some(map) = value.as_object() else { return };
    // As people write them: what it is, then what it says.
    let order = ["apiVersion", "kind", "metadata", "name", "namespace"];
    let rank = |name: &str| order.iter().position(|known| *known == name).unwrap_or(order.len());
    let mut fields: Vec<_> = map.iter().collect();
    fields.sort_by_key(|(name, _)| rank(name));
    for (name, value) in fields {
        let pad = "  ".repeat(depth);
        match value {
            Value::Object(_) => {
                text.push_str(&format!("{pad}{name}:\n"));
                write_yaml(value, depth + 1, text);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                text.push_str(&format!("{pad}{name}:\n"));
                for item in items {
                    let mut inner = String::new();
                    write_yaml(item, depth + 2, &mut inner);
                    let first = "  ".repeat(depth + 2);
                    text.push_str(&format!("{pad}  - {}", inner.strip_prefix(&first).unwrap_or(&inner)));
                }
            }
            Value::Array(items) => {
                let items: Vec<String> = items.iter().map(Value::to_string).collect();
                text.push_str(&format!("{pad}{name}: [{}]\n", items.join(", ")));
            }
            Value::String(said) => text.push_str(&format!("{pad}{name}: {said}\n")),
            other => text.push_str(&format!("{pad}{name}: {other}\n")),
        }
    }
}
