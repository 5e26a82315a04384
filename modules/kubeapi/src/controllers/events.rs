//! Events go after an hour.

use std::time::Duration;

use serde_json::Value;

use super::{Controller, World};
use crate::{clock, json, limits, registry::built_in_resource, status::Status};

#[derive(Debug)]
pub(super) struct Events;

impl Controller for Events {
    const NAME: &'static str = "event-ttl-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let own = key.starts_with(&built_in_resource("", "events").prefix());
        if own && old.is_none() && new.is_some() { vec![key.to_owned()] } else { Vec::new() }
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let Some(event) = world.api.cache.at(key) else { return Ok(None) };
        let times = ["lastTimestamp", "eventTime", "series.lastObservedTime", "metadata.creationTimestamp"];
        let last = times.iter().filter_map(|path| clock::parse(json::text(&event, path))).max();
        let age = clock::unix() - last.unwrap_or_default();
        match limits::EVENT_TTL.checked_sub(Duration::from_secs(u64::try_from(age).unwrap_or(0))) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => {
                world.delete(built_in_resource("", "events"), &event).await?;
                Ok(None)
            }
        }
    }
}
