//! ReplicaSets: as many pods as are wanted.

use std::time::Duration;

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, owner_key, place_of, pods};
use crate::{json, kinds, registry::built_in_resource, selector::Labels, status::Status};

/// Pods made or deleted in one look: the next look follows at once.
const BURST: usize = 500;

#[derive(Debug)]
pub(super) struct ReplicaSets;

impl Controller for ReplicaSets {
    const NAME: &'static str = "replicaset-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let own = built_in_resource("apps", "replicasets");
        if key.starts_with(&own.prefix()) {
            return vec![key.to_owned()];
        }
        if !key.starts_with(&built_in_resource("", "pods").prefix()) {
            return Vec::new();
        }
        [old, new].into_iter().flatten().filter_map(|pod| owner_key(own, pod)).collect()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("apps", "replicasets");
        let (namespace, name) = place_of(key);
        let Some(set) = world.api.cache.get(resource, namespace, name) else { return Ok(None) };
        if !is_ending(&set) {
            pods::adopt(world, resource, &set).await?;
        }
        let mut active = pods::managed(world, &set);
        let ending = active.iter().filter(|pod| is_ending(pod)).count();
        active.retain(|pod| pods::is_active(pod));
        let wanted = usize::try_from(json::int(&set, "spec.replicas")).unwrap_or(0);
        let mut again = None;
        if !is_ending(&set) {
            let pod_resource = built_in_resource("", "pods");
            if active.len() < wanted {
                for _ in 0..(wanted - active.len()).min(BURST) {
                    let pod = pods::from_template(resource, &set);
                    match world.create(pod_resource, namespace, pod).await {
                        Ok(pod) => {
                            let message = format!("Created pod: {}", json::text(&pod, "metadata.name"));
                            pods::tell(world, resource, &set, false, "SuccessfulCreate", &message).await;
                        }
                        Err(status) => {
                            let message = format!("Error creating: {}", status.message);
                            pods::tell(world, resource, &set, true, "FailedCreate", &message).await;
                            return Err(status);
                        }
                    }
                }
            } else if active.len() > wanted {
                pods::expendable_first(&mut active);
                for pod in &active[..(active.len() - wanted).min(BURST)] {
                    world.delete(pod_resource, pod).await?;
                    let message = format!("Deleted pod: {}", json::text(pod, "metadata.name"));
                    pods::tell(world, resource, &set, false, "SuccessfulDelete", &message).await;
                }
            }
            if active.len() != wanted {
                again = Some(Duration::ZERO);
            }
        }
        let seconds = json::int(&set, "spec.minReadySeconds");
        let labels =
            Labels::of(Some(&value!({"matchLabels": json::at(&set, "spec.template.metadata.labels")})));
        let count = |fits: &dyn Fn(&Value) -> bool| active.iter().filter(|pod| fits(pod)).count();
        let ready = count(&kinds::is_ready);
        let available = count(&|pod| pods::is_available(pod, seconds));
        let status = value!({
            "replicas": active.len(),
            "fullyLabeledReplicas": count(&|pod| labels.as_ref().is_some_and(|labels| labels.select(pod))),
            "readyReplicas": ready,
            "availableReplicas": available,
            "terminatingReplicas": ending,
            "observedGeneration": json::int(&set, "metadata.generation"),
        });
        if available < ready && again.is_none() {
            again = Some(Duration::from_secs(1));
        }
        super::write_status(world, resource, &set, &status).await?;
        Ok(again)
    }
}
