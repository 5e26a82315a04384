//! Nodes: what is not ready takes no new pods, and pods of a node that is gone go too.

use std::{collections::BTreeMap, sync::Mutex, time::Duration};

use serde_json::{Value, json as value};
use tokio::time::Instant;

use super::{Controller, World, is_ending, place_of};
use crate::{
    admission::NOT_READY, api::delete::Options, crd::condition, json, registry::built_in_resource,
    status::Status,
};

/// A node that is gone may come back under its name; its pods wait so long for it.
const QUARANTINE: Duration = Duration::from_secs(40);

#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// Since when a node that pods are bound to is missing.
    missing: Mutex<BTreeMap<String, Instant>>,
}

impl Controller for Nodes {
    const NAME: &'static str = "node-controller";

    fn keys(&self, key: &str, _old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let nodes = built_in_resource("", "nodes");
        if key.starts_with(&nodes.prefix()) {
            return vec![key.to_owned()];
        }
        // A pod may have been bound to a node that is gone by now.
        let bound = new.filter(|_| key.starts_with(&built_in_resource("", "pods").prefix()));
        let bound = bound.map(|pod| json::text(pod, "spec.nodeName")).filter(|node| !node.is_empty());
        bound.map(|node| nodes.key("", node)).into_iter().collect()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let nodes = built_in_resource("", "nodes");
        let (_, name) = place_of(key);
        let Some(node) = world.api.cache.get(nodes, "", name) else {
            return self.collect(world, name).await;
        };
        self.missing.lock().expect("no panic under this lock").remove(name);
        let ready = condition(&node, "Ready");
        let tainted =
            json::list(&node, "spec.taints").iter().any(|taint| json::text(taint, "key") == NOT_READY);
        if ready != tainted || is_ending(&node) {
            return Ok(None);
        }
        let change = |node: &mut Value| {
            let held = json::list(node, "spec.taints").iter();
            let mut taints: Vec<Value> =
                held.filter(|taint| json::text(taint, "key") != NOT_READY).cloned().collect();
            if !ready {
                taints.push(value!({"key": NOT_READY, "effect": "NoSchedule"}));
            }
            json::set(node, "spec.taints", taints);
        };
        world.amend(nodes, &node, "", &change).await?;
        Ok(None)
    }
}

impl Nodes {
    /// Nobody will ever end the pods of a node that is gone.
    async fn collect(&self, world: &World, name: &str) -> Result<Option<Duration>, Status> {
        let pods = built_in_resource("", "pods");
        let bound = world.api.cache.list(pods, "").into_iter();
        let bound: Vec<_> = bound.filter(|pod| json::text(pod, "spec.nodeName") == name).collect();
        let since = {
            let mut missing = self.missing.lock().expect("no panic under this lock");
            if bound.is_empty() {
                missing.remove(name);
                return Ok(None);
            }
            *missing.entry(name.to_owned()).or_insert_with(Instant::now)
        };
        let left = QUARANTINE.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Some(left));
        }
        for pod in bound {
            let ask =
                world.ask(pods, json::text(&pod, "metadata.namespace"), json::text(&pod, "metadata.name"));
            let uid = Some(json::text(&pod, "metadata.uid").to_owned());
            match world.api.delete(&ask, &Options { grace: Some(0), uid, ..Options::default() }).await {
                Err(status) if status.code != 404 && status.code != 409 => return Err(status),
                _ => {}
            }
        }
        Ok(None)
    }
}
