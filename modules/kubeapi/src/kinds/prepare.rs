//! What a create and an update set before the object is checked.

use std::collections::BTreeSet;

use serde_json::{Value, json as value};

use super::pods;
use crate::{
    api::{Api, Ask},
    json,
    registry::built_in_resource,
    status::Status,
};

/// Sets what a new object of a kind begins with.
pub(crate) async fn prepare_create(api: &Api, ask: &Ask, object: &mut Value) -> Result<(), Status> {
    match (ask.resource.group.as_str(), ask.resource.plural.as_str()) {
        ("", "namespaces") => {
            let name = json::text(object, "metadata.name").to_owned();
            json::map_mut(object, "metadata.labels")
                .insert("kubernetes.io/metadata.name".to_owned(), value!(name));
            json::set(object, "spec.finalizers", value!(["kubernetes"]));
            json::set(object, "status", value!({"phase": "Active"}));
        }
        ("", "pods") => {
            let class = json::at(object, "spec").map_or("BestEffort", pods::qos_class);
            json::set(object, "status", value!({"phase": "Pending", "qosClass": class}));
        }
        ("", "persistentvolumeclaims") => json::set(object, "status", value!({"phase": "Pending"})),
        ("", "services") => allocate(api, object).await?,
        ("batch", "jobs") => own_selector(object),
        ("apiextensions.k8s.io", _) => {
            let names = value!({"plural": "", "kind": ""});
            json::set(object, "status.acceptedNames", names);
            json::set(object, "status.conditions", Value::Null);
            super::default(&ask.resource, object);
        }
        _ => {}
    }
    Ok(())
}

/// Sets what an update may not change and what follows from it.
pub(crate) fn prepare_update(ask: &Ask, old: &Value, new: &mut Value) {
    match (ask.resource.group.as_str(), ask.resource.plural.as_str(), ask.subresource.as_str()) {
        ("", "namespaces", "") => match json::at(old, "spec") {
            Some(spec) => json::set(new, "spec", spec.clone()),
            None => drop(json::remove(new, "spec")),
        },
        ("", "pods", "status") => {
            // The class follows from what was asked for and is never said by a node.
            if let Some(class) = json::at(old, "status.qosClass") {
                json::set(new, "status.qosClass", class.clone());
            }
        }
        ("", "services", "") => {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                let path = format!("spec.{field}");
                if json::at(new, &path).is_none()
                    && json::text(new, "spec.type") != "ExternalName"
                    && let Some(held) = json::at(old, &path)
                {
                    json::set(new, &path, held.clone());
                }
            }
        }
        ("", "secrets", "") if json::text(new, "type").is_empty() => {
            json::set(new, "type", json::text(old, "type"));
        }
        _ => {}
    }
}

/// Services have addresses of 10.96.0.0/16. The first is the server's own.
async fn allocate(api: &Api, object: &mut Value) -> Result<(), Status> {
    if json::text(object, "spec.type") == "ExternalName" {
        return Ok(());
    }
    json::default(object, "spec.ipFamilies", value!(["IPv4"]));
    json::default(object, "spec.ipFamilyPolicy", "SingleStack");
    if json::text(object, "spec.clusterIP").is_empty() {
        let (all, _) = api.store.all(&built_in_resource("", "services").prefix()).await?;
        let taken: BTreeSet<&str> =
            all.iter().map(|service| json::text(&service.object, "spec.clusterIP")).collect();
        let mut random = [0; 2];
        getrandom::fill(&mut random).map_err(Status::internal)?;
        let start = u32::from(u16::from_le_bytes(random));
        let address = |n: u32| format!("10.96.{}.{}", (n >> 8) & 0xff, n & 0xff);
        let free = (0..1 << 16).map(|n| (start + n) & 0xffff).filter(|n| (256..0xff00).contains(n));
        let free = free.map(address).find(|address| !taken.contains(address.as_str()));
        let free = free.ok_or_else(|| Status::internal("no address is left for services"))?;
        json::set(object, "spec.clusterIP", free);
    }
    let address = json::text(object, "spec.clusterIP").to_owned();
    json::default(object, "spec.clusterIPs", value!([address]));
    Ok(())
}

/// A job selects its own pods by its uid.
fn own_selector(object: &mut Value) {
    if json::truth(object, "spec.manualSelector") {
        return;
    }
    let uid = json::text(object, "metadata.uid").to_owned();
    let name = json::text(object, "metadata.name").to_owned();
    let labels = json::map_mut(object, "spec.template.metadata.labels");
    for (key, label) in [
        ("batch.kubernetes.io/controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("controller-uid", &uid),
        ("job-name", &name),
    ] {
        labels.insert(key.to_owned(), value!(label));
    }
    let selector = value!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
    json::set(object, "spec.selector", selector);
}
