//! What the bridge keeps of a pod: where it is, what it names, and enough to see a change.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Value, json};

use super::{
    json::{at, digest, list, text, version},
    policy::OnDisconnect,
};

/// The config map with the cluster's CA, in every namespace.
const ROOT_CA: &str = "kube-root-ca.crt";

/// A pod that is bound to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) uid: Arc<str>,
    pub(super) version: u64,
    pub(super) node: Arc<str>,
    pub(super) namespace: Arc<str>,
    pub(super) account: Arc<str>,
    /// Keys in `fleet` of what it names.
    pub(super) references: BTreeSet<Arc<str>>,
    pub(super) tokens: Vec<Token>,
    /// It is to end.
    pub(super) ending: bool,
    /// It mirrors a static pod of its node, which has it already under this uid.
    pub(super) mirror: Option<Arc<str>>,
    /// Of its status, what its node says.
    pub(super) status: u64,
    /// What becomes of it while its node is away.
    pub(super) on_disconnect: OnDisconnect,
}

/// A token that a volume of a pod projects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    /// Key in `fleet`.
    pub(super) key: Arc<str>,
    pub(super) audience: String,
    pub(super) seconds: u64,
}

/// Key in `fleet` of an object of the core group.
pub(super) fn key_of(resource: &str, namespace: &str, name: &str) -> Arc<str> {
    let namespace = if namespace.is_empty() { "-" } else { namespace };
    format!("obj/core/{resource}/{namespace}/{name}").into()
}

/// The same of an object.
pub(super) fn key(resource: &str, object: &Value) -> Arc<str> {
    key_of(resource, text(object, "metadata.namespace"), text(object, "metadata.name"))
}

impl Pod {
    /// Whether a node that speaks of this uid speaks of this pod: of a static pod it knows no other.
    pub(super) fn is(&self, uid: &str) -> bool {
        *self.uid == *uid || self.mirror.as_deref() == Some(uid)
    }

    /// Reads a pod; `None` if it is bound to no node.
    pub(super) fn read(object: &Value) -> Option<Self> {
        let node = text(object, "spec.nodeName");
        if node.is_empty() {
            return None;
        }
        let (namespace, name) = (text(object, "metadata.namespace"), text(object, "metadata.name"));
        let annotation = |name: &str| at(object, "metadata.annotations").and_then(|notes| notes.get(name));
        let mut pod = Self {
            uid: text(object, "metadata.uid").into(),
            version: version(object),
            node: node.into(),
            namespace: namespace.into(),
            account: text(object, "spec.serviceAccountName").into(),
            references: BTreeSet::new(),
            tokens: Vec::new(),
            ending: at(object, "metadata.deletionTimestamp").is_some(),
            mirror: annotation("kubernetes.io/config.mirror").and_then(Value::as_str).map(Arc::from),
            status: digest(&said_by_node(at(object, "status").unwrap_or(&Value::Null))),
            on_disconnect: OnDisconnect::read(object),
        };
        let mut refer = |resource: &str, name: &str| {
            if !name.is_empty() {
                pod.references.insert(key_of(resource, namespace, name));
            }
        };
        refer("configmaps", ROOT_CA);
        refer("serviceaccounts", text(object, "spec.serviceAccountName"));
        for secret in list(object, "spec.imagePullSecrets") {
            refer("secrets", text(secret, "name"));
        }
        let groups = ["spec.containers", "spec.initContainers", "spec.ephemeralContainers"];
        for container in groups.into_iter().flat_map(|group| list(object, group)) {
            for source in list(container, "envFrom") {
                refer("configmaps", text(source, "configMapRef.name"));
                refer("secrets", text(source, "secretRef.name"));
            }
            for variable in list(container, "env") {
                refer("configmaps", text(variable, "valueFrom.configMapKeyRef.name"));
                refer("secrets", text(variable, "valueFrom.secretKeyRef.name"));
            }
        }
        let mut tokens = Vec::new();
        for volume in list(object, "spec.volumes") {
            refer("configmaps", text(volume, "configMap.name"));
            refer("secrets", text(volume, "secret.secretName"));
            let projected = list(volume, "projected.sources");
            for source in projected {
                refer("configmaps", text(source, "configMap.name"));
                refer("secrets", text(source, "secret.name"));
                if let Some(wanted) = source.get("serviceAccountToken") {
                    let (volume, path) = (text(volume, "name"), text(wanted, "path"));
                    tokens.push((volume, path, wanted));
                }
            }
        }
        let mut named = BTreeSet::new();
        for (volume, path, wanted) in tokens {
            // A volume mostly projects one token, which has the volume's name.
            let token = match named.insert(volume) {
                true => volume.to_owned(),
                false => format!("{volume}.{}", path.replace('/', ".")),
            };
            pod.tokens.push(Token {
                key: format!("obj/octobus.io/tokens/{namespace}/{name}.{token}").into(),
                audience: text(wanted, "audience").to_owned(),
                seconds: at(wanted, "expirationSeconds").and_then(Value::as_u64).unwrap_or(3_600),
            });
        }
        Some(pod)
    }
}

/// What of a pod goes to its node: everything but what changes by the node's own word. That it has ended
/// stays: a node that lost what it had must not run it again.
pub(super) fn for_node(mut object: Value) -> Value {
    let phase = text(&object, "status.phase").to_owned();
    let ended = ["Succeeded", "Failed"].contains(&phase.as_str());
    super::json::remove(&mut object, "metadata", "managedFields");
    if let Some(object) = object.as_object_mut().filter(|_| !ended) {
        object.remove("status");
    }
    object
}

/// Conditions of a pod that its node sets. Others are of the scheduler and of who ever else cares.
const CONDITIONS: [&str; 4] = ["Ready", "Initialized", "ContainersReady", "PodReadyToStartContainers"];
/// Fields of a pod's status that its node sets; what it leaves out is not so any more.
const FIELDS: [&str; 11] = [
    "phase",
    "message",
    "reason",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
];
/// Those of them whose lists are merged by a key unless they are replaced on purpose.
const KEYED: [&str; 2] = ["hostIPs", "podIPs"];

/// Of a pod's status, what its node says: to compare what it says with what is held.
pub(super) fn said_by_node(status: &Value) -> Value {
    let mut said = json!({});
    for field in FIELDS {
        if let Some(value) = status.get(field) {
            said[field] = value.clone();
        }
    }
    let conditions = list(status, "conditions").iter();
    let mut conditions: Vec<Value> =
        conditions.filter(|held| CONDITIONS.contains(&text(held, "type"))).cloned().collect();
    for condition in &mut conditions {
        super::json::remove(condition, "", "lastProbeTime");
        super::json::remove(condition, "", "observedGeneration");
    }
    conditions.sort_by(|a, b| text(a, "type").cmp(text(b, "type")));
    said["conditions"] = conditions.into();
    said
}

/// The strategic merge patch that makes a pod's status what its node says.
pub(super) fn status_patch(uid: &str, said: &Value) -> Value {
    let said = said_by_node(said);
    let mut status = json!({});
    for field in FIELDS {
        status[field] = match said.get(field) {
            Some(Value::Array(items)) if KEYED.contains(&field) => {
                let replace = [json!({"$patch": "replace"})].into_iter();
                replace.chain(items.iter().cloned()).collect()
            }
            Some(value) => value.clone(),
            None => Value::Null,
        };
    }
    status["conditions"] = said["conditions"].clone();
    json!({"metadata": {"uid": uid}, "status": status})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Value {
        json!({
            "metadata": {"namespace": "shop", "name": "web-1", "uid": "u1", "resourceVersion": "7", "managedFields": []},
            "spec": {"nodeName": "edge-1", "serviceAccountName": "web", "imagePullSecrets": [{"name": "pull"}],
                "containers": [{"env": [{"valueFrom": {"secretKeyRef": {"name": "a"}}}], "envFrom": [{"configMapRef": {"name": "b"}}]}],
                "initContainers": [{"envFrom": [{"secretRef": {"name": "c"}}]}],
                "volumes": [{"secret": {"secretName": "d"}}, {"configMap": {"name": "e"}},
                    {"name": "api", "projected": {"sources": [{"secret": {"name": "f"}}, {"configMap": {"name": "g"}},
                        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}}]},
            "status": {"phase": "Running"}})
    }

    #[test]
    fn a_pod_refers_to_all_that_its_containers_and_volumes_name() {
        let pod = Pod::read(&example()).unwrap();
        let expected = [
            ("configmaps", vec!["b", "e", "g", "kube-root-ca.crt"]),
            ("secrets", vec!["a", "c", "d", "f", "pull"]),
            ("serviceaccounts", vec!["web"]),
        ];
        let expected: BTreeSet<Arc<str>> = expected
            .into_iter()
            .flat_map(|(resource, names)| names.into_iter().map(move |name| key_of(resource, "shop", name)))
            .collect();
        assert_eq!(pod.references, expected);
        assert_eq!(&*pod.tokens[0].key, "obj/octobus.io/tokens/shop/web-1.api");
        assert_eq!(pod.tokens[0].seconds, 3_607);
        let mut unbound = example();
        super::super::json::remove(&mut unbound, "spec", "nodeName");
        assert_eq!(Pod::read(&unbound), None);
    }

    #[test]
    fn what_a_node_says_does_not_come_back_to_it_until_the_pod_has_ended() {
        let running = for_node(example());
        assert!(running.get("status").is_none() && running["metadata"].get("managedFields").is_none());
        let mut ended = example();
        ended["status"]["phase"] = "Succeeded".into();
        assert_eq!(for_node(ended)["status"]["phase"], "Succeeded");
    }

    #[test]
    fn a_status_says_the_same_whoever_else_set_a_condition() {
        let ready = json!({"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let scheduled = json!({"type": "PodScheduled", "status": "True"});
        let held = json!({"phase": "Running", "qosClass": "BestEffort", "conditions": [scheduled, ready]});
        let said = json!({"phase": "Running", "conditions": [ready], "podIPs": []});
        assert_eq!(digest(&said_by_node(&held)), digest(&said_by_node(&said)));
        let patch = status_patch("u1", &json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}));
        assert_eq!(patch["status"]["podIPs"], json!([{"$patch": "replace"}, {"ip": "10.0.0.1"}]));
        assert_eq!(patch["status"]["reason"], Value::Null, "what is not so any more goes");
        assert_eq!(patch["metadata"]["uid"], "u1");
    }
}
