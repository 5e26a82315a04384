//! Every namespace has a default account and the certificate by which pods know the server.

use std::time::Duration;

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, place_of};
use crate::{json, registry::built_in_resource, status::Status};

const ROOT_CA: &str = "kube-root-ca.crt";
const ABOUT: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal \
    endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
    distributions of Kubernetes clusters.";

#[derive(Debug)]
pub(super) struct Accounts;

impl Controller for Accounts {
    const NAME: &'static str = "serviceaccount-controller";

    fn keys(&self, key: &str, _old: Option<&Value>, _new: Option<&Value>) -> Vec<String> {
        let namespaces = built_in_resource("", "namespaces");
        if key.starts_with(&namespaces.prefix()) {
            return vec![key.to_owned()];
        }
        let own = [("serviceaccounts", "default"), ("configmaps", ROOT_CA)];
        let (namespace, name) = place_of(key);
        let is_own = own
            .iter()
            .any(|(plural, own)| name == *own && key.starts_with(&built_in_resource("", plural).prefix()));
        if is_own { vec![namespaces.key("", namespace)] } else { Vec::new() }
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let (_, name) = place_of(key);
        let namespace = world.api.cache.get(built_in_resource("", "namespaces"), "", name);
        if namespace.is_none_or(|namespace| is_ending(&namespace)) {
            return Ok(None);
        }
        let accounts = built_in_resource("", "serviceaccounts");
        if world.api.cache.get(accounts, name, "default").is_none() {
            made(world.create(accounts, name, value!({"metadata": {"name": "default"}})).await)?;
        }
        let maps = built_in_resource("", "configmaps");
        let data = value!({"ca.crt": world.api.ca_pem});
        match world.api.cache.get(maps, name, ROOT_CA) {
            None => {
                let notes = value!({"kubernetes.io/description": ABOUT});
                let map = value!({"metadata": {"name": ROOT_CA, "annotations": notes}, "data": data});
                made(world.create(maps, name, map).await)?;
            }
            Some(held) if held.get("data") != Some(&data) => {
                let right = |object: &mut Value| json::set(object, "data", data.clone());
                world.amend(maps, &held, "", &right).await?;
            }
            Some(_) => {}
        }
        Ok(None)
    }
}

/// Somebody else was faster, or the namespace ends: both are well.
fn made(done: Result<Value, Status>) -> Result<(), Status> {
    match done {
        Err(status) if status.reason != "AlreadyExists" && status.code != 403 => Err(status),
        _ => Ok(()),
    }
}
