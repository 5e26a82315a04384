//! Static pods of nodes, and the mirror pods that show them: read only, and made again by whoever deletes them.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{
    Bridge, CallError, Outcome,
    json::{digest, remove, text},
    pod,
    up::report_of,
    work::Task,
};

/// Keys of static pods among what a node says.
pub(super) const STATIC: &str = "static/";

impl Bridge {
    /// A node's static pod came, changed or went.
    pub(super) fn on_static(&mut self, node: &Arc<str>, place: &str, there: bool) {
        let Some((namespace, name)) = place.split_once('/') else { return };
        let key = pod::key_of("pods", namespace, name);
        match self.statics.get(&key) {
            // The first who has a pod of this name.
            Some(holder) if holder != node => return,
            _ => {}
        }
        if there {
            self.statics.insert(Arc::clone(&key), Arc::clone(node));
        }
        self.work.put(Task::Static(key));
    }

    /// All that a node has said is known: mirrors of what it does not have go.
    pub(super) fn on_all_said(&mut self, node: &Arc<str>) {
        let pods = self.pods_of.get(node).into_iter().flatten();
        let mirrors: Vec<Arc<str>> = pods.filter(|key| self.pods[*key].mirror.is_some()).cloned().collect();
        for key in mirrors {
            self.statics.entry(Arc::clone(&key)).or_insert_with(|| Arc::clone(node));
            self.work.put(Task::Static(key));
        }
    }

    pub(super) fn begin_static(&mut self, task: Task, key: &Arc<str>) {
        let Some(holder) = self.statics.get(key).cloned() else { return };
        let Some(object) = self.nodes.get(&holder).and_then(|node| node.object.as_ref()) else { return };
        let (cluster, broker, owner) = (self.cluster.clone(), self.broker.clone(), Arc::clone(&object.uid));
        let held = self.pods.get(key).map(|pod| (Arc::clone(&pod.uid), pod.mirror.clone()));
        let key = Arc::clone(key);
        self.work.start(task, async move {
            let place = key.strip_prefix("obj/core/pods/").unwrap_or_default();
            let (namespace, name) = place.split_once('/').unwrap_or_default();
            let said = report_of(&broker, Arc::clone(&holder), format!("{STATIC}{place}")).await;
            let is_pod = |said: &Value| said["metadata"].is_object() && said["spec"].is_object();
            let said = said.filter(is_pod);
            let mirror = said.map(|said| mirror_of(said, namespace, name, &holder, &owner));
            let all = format!("/api/v1/namespaces/{namespace}/pods");
            let wanted = mirror.as_ref().map(|mirror| hash_of(mirror).to_owned());
            let done = match (mirror, held) {
                (Some(mirror), None) => match cluster.create("pods", &all, &mirror).await {
                    Err(error) if error.is(409) => Ok(None),
                    other => other.map(Some),
                },
                (_, Some((_, None))) => Err(CallError::Refused {
                    code: 400,
                    message: format!("{place}: a pod of this name is there, and no mirror"),
                }),
                (_, Some((_, Some(hash)))) if wanted.as_deref() == Some(&*hash) => Ok(None),
                // Another one, or none any more: what is made instead follows when it is gone.
                (_, Some((uid, Some(_)))) => {
                    let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0,
                        "preconditions": {"uid": &*uid}});
                    cluster.delete("pods", &format!("{all}/{name}"), &options).await.map(|()| None)
                }
                (None, None) => Ok(None),
            };
            Outcome::Object(done)
        });
    }
}

/// The mirror of a static pod, of which metadata and spec are objects.
fn mirror_of(mut pod: Value, namespace: &str, name: &str, node: &str, owner: &str) -> Value {
    let hash = match text(&pod, "metadata.uid") {
        "" => format!("{:016x}", digest(&pod)),
        uid => uid.to_owned(),
    };
    for field in ["uid", "resourceVersion", "creationTimestamp", "managedFields", "ownerReferences"] {
        remove(&mut pod, "metadata", field);
    }
    remove(&mut pod, "", "status");
    for field in ["serviceAccountName", "serviceAccount"] {
        remove(&mut pod, "spec", field);
    }
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = name.into();
    pod["metadata"]["namespace"] = namespace.into();
    pod["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Node", "name": node, "uid": owner, "controller": true}]);
    if !pod["metadata"]["annotations"].is_object() {
        pod["metadata"]["annotations"] = json!({});
    }
    let notes = &mut pod["metadata"]["annotations"];
    notes["kubernetes.io/config.mirror"] = hash.as_str().into();
    notes["kubernetes.io/config.hash"] = hash.as_str().into();
    notes["kubernetes.io/config.source"] = "file".into();
    pod["spec"]["nodeName"] = node.into();
    pod["spec"]["tolerations"] = json!([{"operator": "Exists", "effect": "NoExecute"}]);
    pod
}

fn hash_of(mirror: &Value) -> &str {
    mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"].as_str().unwrap_or_default()
}
