//! What a new server has: namespaces, the default roles and their bindings.

use serde_json::{Value, json as value};

use crate::{
    api::{Api, Ask},
    registry::built_in_resource,
    status::Status,
};

/// Namespaces that are always there.
const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Makes what is missing. What is there stays as somebody may have changed it.
pub(crate) async fn ensure(api: &Api) -> Result<(), Status> {
    for name in NAMESPACES {
        let object = value!({"metadata": {"name": name}});
        create(api, ("", "namespaces"), "", object).await?;
    }
    for (name, rules, label) in roles() {
        let mut metadata = value!({
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
        });
        if let Some(label) = label {
            metadata["labels"][label] = value!("true");
        }
        let mut object = value!({"metadata": metadata, "rules": rules});
        if let Some(from) = aggregated(name) {
            object["aggregationRule"] = value!({"clusterRoleSelectors": [{"matchLabels": {from: "true"}}]});
        }
        create(api, ("rbac.authorization.k8s.io", "clusterroles"), "", object).await?;
    }
    for (name, groups) in [
        ("cluster-admin", &["system:masters"][..]),
        ("system:basic-user", &["system:authenticated"]),
        ("system:discovery", &["system:authenticated"]),
        ("system:public-info-viewer", &["system:authenticated", "system:unauthenticated"]),
    ] {
        let subjects: Vec<Value> = groups.iter().map(|group| subject(group)).collect();
        let object = value!({
            "metadata": {"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": subjects,
        });
        create(api, ("rbac.authorization.k8s.io", "clusterrolebindings"), "", object).await?;
    }
    // The server itself, by the first address that services have.
    let service = value!({
        "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443, "targetPort": 6443}]},
    });
    create(api, ("", "services"), "default", service).await
}

fn subject(group: &str) -> Value {
    value!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": group})
}

async fn create(
    api: &Api,
    (group, plural): (&str, &str),
    namespace: &str,
    object: Value,
) -> Result<(), Status> {
    let resource = built_in_resource(group, plural);
    let ask = Ask::internal("system:apiserver", resource, namespace, "");
    match api.create(&ask, object).await {
        Ok(_) => Ok(()),
        Err(status) if status.reason == "AlreadyExists" => Ok(()),
        Err(status) => Err(status),
    }
}

/// From which roles a role takes its rules besides its own.
fn aggregated(name: &str) -> Option<&'static str> {
    match name {
        "admin" => Some("rbac.authorization.k8s.io/aggregate-to-admin"),
        "edit" => Some("rbac.authorization.k8s.io/aggregate-to-edit"),
        "view" => Some("rbac.authorization.k8s.io/aggregate-to-view"),
        _ => None,
    }
}

/// Name, rules, and the label by which another role takes them in.
fn roles() -> Vec<(&'static str, Value, Option<&'static str>)> {
    const READ: [&str; 3] = ["get", "list", "watch"];
    const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];
    let workloads = [
        "daemonsets",
        "daemonsets/status",
        "deployments",
        "deployments/scale",
        "deployments/status",
        "replicasets",
        "replicasets/scale",
        "replicasets/status",
        "statefulsets",
        "statefulsets/scale",
        "statefulsets/status",
        "controllerrevisions",
    ];
    let core = [
        "configmaps",
        "endpoints",
        "persistentvolumeclaims",
        "persistentvolumeclaims/status",
        "pods",
        "pods/log",
        "pods/status",
        "serviceaccounts",
        "services",
        "services/status",
        "events",
        "limitranges",
        "namespaces",
        "namespaces/status",
        "resourcequotas",
        "resourcequotas/status",
    ];
    let core_writes = [
        "configmaps",
        "endpoints",
        "persistentvolumeclaims",
        "pods",
        "pods/attach",
        "pods/exec",
        "pods/portforward",
        "pods/proxy",
        "serviceaccounts",
        "services",
        "services/proxy",
        "events",
    ];
    let batch = ["cronjobs", "cronjobs/status", "jobs", "jobs/status"];
    let other_reads = value!([
        {"apiGroups": ["policy"], "resources": ["poddisruptionbudgets", "poddisruptionbudgets/status"], "verbs": READ},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": READ},
        {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses", "ingresses/status", "networkpolicies"], "verbs": READ},
    ]);
    let mut view = vec![
        value!({"apiGroups": [""], "resources": core, "verbs": READ}),
        value!({"apiGroups": ["apps"], "resources": workloads, "verbs": READ}),
        value!({"apiGroups": ["batch"], "resources": batch, "verbs": READ}),
        value!({"apiGroups": ["metrics.k8s.io"], "resources": ["nodes", "pods"], "verbs": READ}),
    ];
    view.extend(other_reads.as_array().cloned().unwrap_or_default());
    let mut edit = view.clone();
    edit.extend([
        value!({"apiGroups": [""], "resources": core_writes, "verbs": WRITE}),
        value!({"apiGroups": [""], "resources": ["secrets"], "verbs": READ}),
        value!({"apiGroups": [""], "resources": ["secrets"], "verbs": WRITE}),
        value!({"apiGroups": [""], "resources": ["serviceaccounts/token", "pods/eviction"], "verbs": ["create"]}),
        value!({"apiGroups": ["apps"], "resources": workloads, "verbs": WRITE}),
        value!({"apiGroups": ["batch"], "resources": ["cronjobs", "jobs"], "verbs": WRITE}),
        value!({"apiGroups": ["policy"], "resources": ["poddisruptionbudgets"], "verbs": WRITE}),
        value!({"apiGroups": ["networking.k8s.io"], "resources": ["ingresses", "networkpolicies"], "verbs": WRITE}),
        value!({"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "watch", "create", "delete", "deletecollection", "patch", "update"]}),
    ]);
    let mut admin = edit.clone();
    admin.extend([
        value!({"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["rolebindings", "roles"], "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]}),
        value!({"apiGroups": ["authorization.k8s.io"], "resources": ["localsubjectaccessreviews"], "verbs": ["create"]}),
    ]);
    let info = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
    let discovery = [
        "/api",
        "/api/*",
        "/apis",
        "/apis/*",
        "/healthz",
        "/livez",
        "/openapi",
        "/openapi/*",
        "/readyz",
        "/version",
        "/version/",
    ];
    vec![
        (
            "cluster-admin",
            value!([{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}, {"nonResourceURLs": ["*"], "verbs": ["*"]}]),
            None,
        ),
        ("admin", value!(admin), None),
        ("edit", value!(edit), Some("rbac.authorization.k8s.io/aggregate-to-admin")),
        ("view", value!(view), Some("rbac.authorization.k8s.io/aggregate-to-edit")),
        ("system:public-info-viewer", value!([{"nonResourceURLs": info, "verbs": ["get"]}]), None),
        ("system:discovery", value!([{"nonResourceURLs": discovery, "verbs": ["get"]}]), None),
        (
            "system:basic-user",
            value!([
                {"apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"], "verbs": ["create"]},
                {"apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"]},
            ]),
            None,
        ),
    ]
}
