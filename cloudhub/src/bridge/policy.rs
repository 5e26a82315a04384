//! What becomes of a pod while its node is away: it stays, unless its owner said otherwise.
//!
//! | annotation `octobus.io/on-disconnect` | |
//! |---|---|
//! | `keep`, none, anything else | the pod stays bound, and goes on at the node |
//! | `replace` | after the pod's toleration of `node.kubernetes.io/unreachable` (300 s unless it says otherwise) it is deleted, so that its controller makes another elsewhere; the node ends it when it is back |
//!
//! A cluster's own controllers evict whatever tolerates a node that cannot be reached for a while only. There a
//! pod that stays is given a toleration without end, once; one that is to be replaced is left to them. With the
//! embedded API nobody evicts, and the bridge deletes what is to be replaced.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Bridge, Outcome,
    cluster::MERGE,
    json::{at, list, text},
    node::Link,
    up::path_of,
    work::Task,
};

const ANNOTATION: &str = "octobus.io/on-disconnect";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// What every pod tolerates unless it says otherwise.
const TOLERATED: u64 = 300;

/// What a pod says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDisconnect {
    /// It stays, and tolerates that for ever.
    Keep,
    /// It stays, and has yet to be made to tolerate that.
    KeepNotYet,
    /// After so long it is made anew elsewhere.
    Replace(Duration),
}

impl OnDisconnect {
    pub(super) fn read(pod: &Value) -> Self {
        let said = at(pod, "metadata.annotations").and_then(|notes| notes.get(ANNOTATION));
        let tolerations = list(pod, "spec.tolerations");
        let matching = tolerations.iter().find(|toleration| {
            let (key, effect) = (text(toleration, "key"), text(toleration, "effect"));
            (key == UNREACHABLE || key.is_empty()) && ["", "NoExecute"].contains(&effect)
        });
        let seconds = matching.map(|toleration| toleration.get("tolerationSeconds").and_then(Value::as_u64));
        if said.and_then(Value::as_str) == Some("replace") {
            return Self::Replace(Duration::from_secs(seconds.flatten().unwrap_or(TOLERATED)));
        }
        match seconds {
            Some(None) => Self::Keep,
            _ => Self::KeepNotYet,
        }
    }
}

/// A pod's tolerations with one of this taint that does not end. What a pod tolerates may be added to, and for
/// how long may be changed; nothing else.
fn tolerating(tolerations: &[Value]) -> Vec<Value> {
    let mut tolerations = tolerations.to_vec();
    let mut found = false;
    for toleration in &mut tolerations {
        if text(toleration, "key") == UNREACHABLE && ["", "NoExecute"].contains(&text(toleration, "effect")) {
            super::json::remove(toleration, "", "tolerationSeconds");
            found = true;
        }
    }
    if !found {
        tolerations.push(json!({"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute"}));
    }
    tolerations
}

impl Bridge {
    /// A pod was seen as it is now.
    pub(super) fn apply_policy(&mut self, key: &Arc<str>, object: &Value) {
        let Some(pod) = self.pods.get(key).filter(|pod| !pod.ending && pod.mirror.is_none()) else { return };
        match pod.on_disconnect {
            OnDisconnect::KeepNotYet if self.hub.leases && !self.tolerations.contains_key(key) => {
                let wanted = (pod.version, tolerating(list(object, "spec.tolerations")));
                self.tolerations.insert(Arc::clone(key), Some(wanted));
                self.work.put(Task::Tolerate(Arc::clone(key)));
            }
            OnDisconnect::Replace(after) if !self.hub.leases => {
                let node = self.nodes.get(&pod.node).filter(|node| node.link == Link::Down);
                if let Some(node) = node {
                    self.work.put_at(Task::Evict(Arc::clone(key)), node.down_since + after);
                }
            }
            _ => {}
        }
    }

    /// A node's link came or went.
    pub(super) fn apply_policies_of(&mut self, node: &Arc<str>) {
        if self.hub.leases {
            return;
        }
        let Some((link, since)) = self.nodes.get(node).map(|node| (node.link.clone(), node.down_since))
        else {
            return;
        };
        for key in self.pods_of.get(node).into_iter().flatten() {
            let OnDisconnect::Replace(after) = self.pods[key].on_disconnect else { continue };
            let task = Task::Evict(Arc::clone(key));
            match link {
                Link::Up(_) => self.work.drop_due(&task),
                Link::Down => self.work.put_at(task, since + after),
            }
        }
    }

    pub(super) fn begin_tolerate(&mut self, task: Task, key: &Arc<str>) {
        let Some(Some((version, tolerations))) = self.tolerations.get(key).cloned() else { return };
        let Some(pod) = self.pods.get(key) else { return };
        let patch = json!({
            "metadata": {"uid": &*pod.uid, "resourceVersion": version.to_string()},
            "spec": {"tolerations": tolerations},
        });
        let (cluster, path) = (self.cluster.clone(), path_of(key));
        self.work.start(task, async move {
            Outcome::Object(cluster.patch("pods", &path, MERGE, &patch).await.map(|_| None))
        });
    }

    /// The pod was given its tolerations, or may not have them: that is tried once. What has changed meanwhile
    /// is looked at again when it is seen.
    pub(super) fn on_tolerated(&mut self, key: &Arc<str>, changed: bool) {
        if changed {
            self.tolerations.remove(key);
        } else if let Some(wanted) = self.tolerations.get_mut(key) {
            *wanted = None;
        }
    }

    pub(super) fn begin_evict(&mut self, task: Task, key: &Arc<str>) {
        let Some(pod) = self.pods.get(key).filter(|pod| !pod.ending) else { return };
        let OnDisconnect::Replace(after) = pod.on_disconnect else { return };
        let Some(node) = self.nodes.get(&pod.node).filter(|node| node.link == Link::Down) else { return };
        let at = node.down_since + after;
        if at > Instant::now() {
            return self.work.put_at(task, at);
        }
        let options =
            json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": &*pod.uid}});
        let (cluster, path) = (self.cluster.clone(), path_of(key));
        self.work.start(task, async move {
            Outcome::Object(cluster.delete("pods", &path, &options).await.map(|()| None))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotation: &str, tolerations: Value) -> Value {
        json!({"metadata": {"annotations": {ANNOTATION: annotation}}, "spec": {"tolerations": tolerations}})
    }

    #[test]
    fn a_pod_stays_unless_it_says_otherwise_and_is_made_to_tolerate_that_once() {
        let defaults = json!([{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
            {"key": UNREACHABLE, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]);
        assert_eq!(OnDisconnect::read(&pod("keep", defaults.clone())), OnDisconnect::KeepNotYet);
        let tolerating = tolerating(list(&pod("", defaults.clone()), "spec.tolerations"));
        assert_eq!(tolerating[0], defaults[0], "what is not ready is another matter");
        assert_eq!(OnDisconnect::read(&pod("", json!(tolerating))), OnDisconnect::Keep);
        assert_eq!(OnDisconnect::read(&pod("", json!([{"operator": "Exists"}]))), OnDisconnect::Keep);
    }

    #[test]
    fn what_is_to_be_replaced_is_so_after_its_own_toleration() {
        let short = json!([{"key": UNREACHABLE, "effect": "NoExecute", "tolerationSeconds": 20}]);
        assert_eq!(
            OnDisconnect::read(&pod("replace", short)),
            OnDisconnect::Replace(Duration::from_secs(20))
        );
        assert_eq!(
            OnDisconnect::read(&pod("replace", json!([]))),
            OnDisconnect::Replace(Duration::from_secs(300))
        );
    }
}
