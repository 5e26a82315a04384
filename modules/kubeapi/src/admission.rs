//! What the server itself adds to new objects, and what nodes may not write.

use serde_json::{Value, json as value};

use crate::{
    api::{Api, Ask},
    authz::{self, Attributes},
    json, names,
    registry::built_in_resource,
    status::Status,
};

/// Where containers find their account's token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Adds what new objects get, and refuses what a node may not create.
pub(crate) async fn mutate_create(api: &Api, ask: &Ask, object: &mut Value) -> Result<(), Status> {
    restrict_node(ask, None, object)?;
    check_rights(api, ask, object)?;
    if ask.resource.is("", "pods") {
        give_account(api, ask, object).await?;
        tolerate(object, "node.kubernetes.io/not-ready");
        tolerate(object, "node.kubernetes.io/unreachable");
        give_priority(api, ask, object)?;
    }
    if ask.resource.is("", "nodes") && !crate::crd::condition(object, "Ready") {
        taint(object);
    }
    Ok(())
}

/// Refuses what a node may not change.
pub(crate) fn check_update(api: &Api, ask: &Ask, old: &Value, new: &Value) -> Result<(), Status> {
    let given = |object: &Value| {
        ["rules", "aggregationRule", "roleRef", "subjects"].map(|field| object.get(field).cloned())
    };
    if given(old) != given(new) {
        check_rights(api, ask, new)?;
    }
    restrict_node(ask, Some(old), new)
}

/// Nobody gives rights that they do not have, unless they may escalate or bind.
fn check_rights(api: &Api, ask: &Ask, object: &Value) -> Result<(), Status> {
    if ask.resource.group != "rbac.authorization.k8s.io" {
        return Ok(());
    }
    let name = json::text(object, "metadata.name").to_owned();
    let (verb, resource, name, rules) = match ask.resource.plural.as_str() {
        "roles" | "clusterroles" => {
            let mut rules = json::list(object, "rules").to_vec();
            if json::at(object, "aggregationRule").is_some() {
                // What it will take together is not known.
                rules.push(value!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
            }
            ("escalate", ask.resource.plural.clone(), name, rules)
        }
        _ => {
            let kind = json::text(object, "roleRef.kind").to_ascii_lowercase();
            let role = json::text(object, "roleRef.name").to_owned();
            ("bind", format!("{kind}s"), role, authz::rules_bound(&api.cache, object))
        }
    };
    let Some(rule) = authz::beyond(&api.cache, &ask.user, &ask.namespace, &rules) else { return Ok(()) };
    let wanted = Attributes {
        verb: verb.to_owned(),
        group: ask.resource.group.clone(),
        resource,
        namespace: ask.namespace.clone(),
        name,
        ..Attributes::default()
    };
    if authz::allows(&api.cache, &ask.user, &wanted) {
        return Ok(());
    }
    let why = format!(
        "user \"{}\" is attempting to grant RBAC permissions not currently held: {rule}",
        ask.user.name
    );
    Err(Ask { name: json::text(object, "metadata.name").to_owned(), ..ask.clone() }.forbidden(&why))
}

/// A node writes itself, its lease, the status of its pods, and mirrors of its static pods.
fn restrict_node(ask: &Ask, old: Option<&Value>, new: &Value) -> Result<(), Status> {
    let Some(node) = ask.user.node() else { return Ok(()) };
    let refuse = |why: &str| Err(ask.forbidden(why));
    match (ask.resource.group.as_str(), ask.resource.plural.as_str()) {
        ("", "nodes") => {
            let name = if ask.name.is_empty() { json::text(new, "metadata.name") } else { &ask.name };
            if name != node {
                return refuse(&format!("node \"{node}\" is not allowed to modify node \"{name}\""));
            }
            let before = old.and_then(|old| json::at(old, "spec.taints"));
            if old.is_some() && before != json::at(new, "spec.taints") {
                return refuse(&format!("node \"{node}\" is not allowed to modify taints"));
            }
            let labels = |object: Option<&Value>| {
                object.and_then(|object| json::map(object, "metadata.labels")).cloned().unwrap_or_default()
            };
            let (before, after) = (labels(old), labels(Some(new)));
            let own = ["node-role.kubernetes.io/edge"];
            let changed = before.keys().chain(after.keys()).find(|key| {
                let theirs = key.contains("node-restriction.kubernetes.io/")
                    || key.contains("node-role.kubernetes.io/") && !own.contains(&key.as_str());
                theirs && before.get(*key) != after.get(*key)
            });
            if let Some(key) = changed {
                return refuse(&format!("is not allowed to modify labels: {key}"));
            }
        }
        ("", "pods") if old.is_none() => {
            let mirror = json::map(new, "metadata.annotations")
                .is_some_and(|notes| notes.contains_key("kubernetes.io/config.mirror"));
            if !mirror || json::text(new, "spec.nodeName") != node {
                return refuse(&format!(
                    "pod does not have \"kubernetes.io/config.mirror\" annotation, node \"{node}\" can only create mirror pods"
                ));
            }
            if !json::text(new, "spec.serviceAccountName").is_empty() {
                return refuse("can not create pods that reference a service account");
            }
        }
        ("", "pods") => {
            let bound = old.map(|old| json::text(old, "spec.nodeName")).unwrap_or_default();
            if bound != node {
                return refuse(&format!(
                    "node \"{node}\" can only update pod status for pods with spec.nodeName set to itself"
                ));
            }
            if ask.subresource != "status" {
                return refuse(&format!("node \"{node}\" can only update the status of pods"));
            }
        }
        ("coordination.k8s.io", "leases") => {
            let name = if ask.name.is_empty() { json::text(new, "metadata.name") } else { &ask.name };
            if ask.namespace != "kube-node-lease" || name != node {
                return refuse("can only access node lease with the same name as the requesting node");
            }
        }
        // Whatever else a role permits it is not restricted here.
        _ => {}
    }
    Ok(())
}

async fn give_account(api: &Api, ask: &Ask, pod: &mut Value) -> Result<(), Status> {
    let notes = json::map(pod, "metadata.annotations");
    if notes.is_some_and(|notes| notes.contains_key("kubernetes.io/config.mirror")) {
        return Ok(());
    }
    if json::text(pod, "spec.serviceAccountName").is_empty() {
        json::set(pod, "spec.serviceAccountName", "default");
    }
    let name = json::text(pod, "spec.serviceAccountName").to_owned();
    json::set(pod, "spec.serviceAccount", name.clone());
    let accounts = built_in_resource("", "serviceaccounts");
    let Some(account) = api.store.get(&accounts.key(&ask.namespace, &name)).await? else {
        let pod = Ask { name: json::text(pod, "metadata.name").to_owned(), ..ask.clone() };
        let why = format!(
            "error looking up service account {}/{name}: serviceaccount \"{name}\" not found",
            ask.namespace
        );
        return Err(pod.forbidden(&why));
    };
    let secrets = json::list(&account.object, "imagePullSecrets");
    if json::list(pod, "spec.imagePullSecrets").is_empty() && !secrets.is_empty() {
        json::set(pod, "spec.imagePullSecrets", secrets.to_vec());
    }
    let wanted = json::at(pod, "spec.automountServiceAccountToken").and_then(Value::as_bool);
    let by_account = json::at(&account.object, "automountServiceAccountToken").and_then(Value::as_bool);
    if wanted.or(by_account).unwrap_or(true) {
        mount_token(pod);
    }
    Ok(())
}

fn mount_token(pod: &mut Value) {
    let mounted = |container: &Value| {
        json::list(container, "volumeMounts").iter().any(|mount| json::text(mount, "mountPath") == TOKEN_PATH)
    };
    let name = names::generated("kube-api-access-");
    let mut used = false;
    for group in ["initContainers", "containers"] {
        let containers =
            pod.get_mut("spec").and_then(|spec| spec.get_mut(group)).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten().filter(|container| !mounted(container)) {
            let mounts = json::map_mut(container, "").entry("volumeMounts").or_insert_with(|| value!([]));
            if let Some(mounts) = mounts.as_array_mut() {
                mounts.push(value!({"name": name, "readOnly": true, "mountPath": TOKEN_PATH}));
                used = true;
            }
        }
    }
    if !used {
        return;
    }
    let volume = value!({"name": name, "projected": {"defaultMode": 420, "sources": [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [
            {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]}});
    let volumes = json::map_mut(pod, "spec").entry("volumes").or_insert_with(|| value!([]));
    if let Some(volumes) = volumes.as_array_mut() {
        volumes.push(volume);
    }
}

/// A pod stays for five minutes on a node that is not well, unless it says otherwise.
fn tolerate(pod: &mut Value, key: &str) {
    let covers = |toleration: &Value| {
        let (held, effect) = (json::text(toleration, "key"), json::text(toleration, "effect"));
        (held == key || held.is_empty()) && ["", "NoExecute"].contains(&effect)
    };
    if json::list(pod, "spec.tolerations").iter().any(covers) {
        return;
    }
    let toleration =
        value!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300});
    let tolerations = json::map_mut(pod, "spec").entry("tolerations").or_insert_with(|| value!([]));
    if let Some(tolerations) = tolerations.as_array_mut() {
        tolerations.push(toleration);
    }
}

fn give_priority(api: &Api, ask: &Ask, pod: &mut Value) -> Result<(), Status> {
    let class = json::text(pod, "spec.priorityClassName").to_owned();
    let (value, policy) = match class.as_str() {
        "" => (0, "PreemptLowerPriority".to_owned()),
        "system-node-critical" => (2_000_001_000, "PreemptLowerPriority".to_owned()),
        "system-cluster-critical" => (2_000_000_000, "PreemptLowerPriority".to_owned()),
        name => match api.cache.get(built_in_resource("scheduling.k8s.io", "priorityclasses"), "", name) {
            Some(class) => (json::int(&class, "value"), json::text(&class, "preemptionPolicy").to_owned()),
            None => return Err(ask.forbidden(&format!("no PriorityClass with name {name} was found"))),
        },
    };
    json::set(pod, "spec.priority", value);
    json::default(pod, "spec.preemptionPolicy", policy);
    Ok(())
}

/// Until a node says that it is ready, nothing is placed on it.
fn taint(node: &mut Value) {
    let taints = json::map_mut(node, "spec").entry("taints").or_insert_with(|| value!([]));
    if !taints.is_array() {
        *taints = value!([]);
    }
    let Some(taints) = taints.as_array_mut() else { return };
    if !taints.iter().any(|taint| json::text(taint, "key") == NOT_READY) {
        taints.push(value!({"key": NOT_READY, "effect": "NoSchedule"}));
    }
}

/// The taint of a node that is not ready.
pub(crate) const NOT_READY: &str = "node.kubernetes.io/not-ready";
