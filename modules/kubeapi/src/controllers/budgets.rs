//! PodDisruptionBudgets: how many pods may be missing now.

use std::time::Duration;

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, place_of, pods};
use crate::{json, kinds, registry::built_in_resource, selector::Labels, status::Status};

#[derive(Debug)]
pub(super) struct Budgets;

impl Controller for Budgets {
    const NAME: &'static str = "disruption-controller";

    fn keys(&self, key: &str, _old: Option<&Value>, _new: Option<&Value>) -> Vec<String> {
        if key.starts_with(&built_in_resource("policy", "poddisruptionbudgets").prefix()) {
            return vec![key.to_owned()];
        }
        if key.starts_with(&built_in_resource("", "pods").prefix()) {
            return vec![format!("{}/*", place_of(key).0)];
        }
        Vec::new()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("policy", "poddisruptionbudgets");
        let (namespace, name) = place_of(key);
        for budget in world.api.cache.list(resource, namespace) {
            if name == "*" || json::text(&budget, "metadata.name") == name {
                sync(world, &budget).await?;
            }
        }
        Ok(None)
    }
}

async fn sync(world: &World, budget: &Value) -> Result<(), Status> {
    let resource = built_in_resource("policy", "poddisruptionbudgets");
    let Some(selector) = Labels::of(json::at(budget, "spec.selector")).filter(|_| !is_ending(budget)) else {
        return Ok(());
    };
    let all = world.api.cache.list(built_in_resource("", "pods"), json::text(budget, "metadata.namespace"));
    let selected: Vec<_> =
        all.into_iter().filter(|pod| selector.select(pod) && pods::is_active(pod)).collect();
    let expected = i64::try_from(selected.len()).unwrap_or(i64::MAX);
    let healthy = i64::try_from(selected.iter().filter(|pod| kinds::is_ready(pod)).count()).unwrap_or(0);
    let share = |field: &str| match json::at(budget, &format!("spec.{field}")) {
        Some(Value::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            Some((expected * percent + 99) / 100)
        }
        Some(number) => number.as_i64(),
        None => None,
    };
    let desired = match (share("minAvailable"), share("maxUnavailable")) {
        (Some(least), _) => least,
        (None, Some(most)) => (expected - most).max(0),
        (None, None) => expected,
    };
    let status = value!({
        "observedGeneration": json::int(budget, "metadata.generation"),
        "disruptionsAllowed": (healthy - desired).max(0),
        "currentHealthy": healthy,
        "desiredHealthy": desired,
        "expectedPods": expected,
    });
    super::write_status(world, resource, budget, &status).await
}
