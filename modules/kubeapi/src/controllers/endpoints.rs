//! Endpoints and EndpointSlices: which pods are behind a service.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::{Value, json as value};

use super::{Controller, World, is_ending, place_of};
use crate::{json, kinds, registry::built_in_resource, selector::Labels, status::Status};

/// Endpoints of one slice.
const SLICE_MAX: usize = 1000;
const SERVICE: &str = "kubernetes.io/service-name";
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

#[derive(Debug)]
pub(super) struct Endpoints;

impl Controller for Endpoints {
    const NAME: &'static str = "endpointslice-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let services = built_in_resource("", "services");
        if key.starts_with(&services.prefix()) {
            return vec![key.to_owned()];
        }
        if key.starts_with(&built_in_resource("", "pods").prefix()) {
            let (namespace, _) = place_of(key);
            let matters = |pod: Option<&Value>| {
                pod.map(|pod| {
                    let meta = &pod["metadata"];
                    (
                        meta["labels"].clone(),
                        meta["deletionTimestamp"].clone(),
                        pod["status"]["podIP"].clone(),
                        kinds::is_ready(pod),
                        json::text(pod, "status.phase").to_owned(),
                    )
                })
            };
            if matters(old) != matters(new) {
                return vec![format!("{namespace}/*")];
            }
        }
        let slices = built_in_resource("discovery.k8s.io", "endpointslices");
        if key.starts_with(&slices.prefix()) && new.is_none() {
            let labels = old.and_then(|old| json::map(old, "metadata.labels"));
            let service = labels.and_then(|labels| labels.get(SERVICE)?.as_str());
            return service.map(|service| services.key(place_of(key).0, service)).into_iter().collect();
        }
        Vec::new()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let services = built_in_resource("", "services");
        let (namespace, name) = place_of(key);
        if name == "*" {
            for service in world.api.cache.list(services, namespace) {
                sync(world, &service).await?;
            }
            return Ok(None);
        }
        if let Some(service) = world.api.cache.get(services, namespace, name) {
            sync(world, &service).await?;
        }
        Ok(None)
    }
}

async fn sync(world: &World, service: &Value) -> Result<(), Status> {
    let selector = json::map(service, "spec.selector").filter(|selector| !selector.is_empty());
    // Without a selector somebody else writes them.
    let Some(selector) = selector.map(Labels::exactly).filter(|_| !is_ending(service)) else { return Ok(()) };
    let namespace = json::text(service, "metadata.namespace");
    let pods = world.api.cache.list(built_in_resource("", "pods"), namespace).into_iter();
    let pods: Vec<Arc<Value>> = pods
        .filter(|pod| selector.select(pod) && !json::text(pod, "status.podIP").is_empty())
        .filter(|pod| !["Succeeded", "Failed"].contains(&json::text(pod, "status.phase")))
        .collect();
    write_slices(world, service, &pods).await?;
    write_endpoints(world, service, &pods).await
}

fn target(pod: &Value) -> Value {
    value!({
        "kind": "Pod",
        "namespace": json::text(pod, "metadata.namespace"),
        "name": json::text(pod, "metadata.name"),
        "uid": json::text(pod, "metadata.uid"),
    })
}

/// The port of a pod that a port of the service leads to.
fn port_of(pod: &Value, port: &Value) -> Option<i64> {
    match port.get("targetPort") {
        Some(Value::String(name)) => {
            let containers = json::list(pod, "spec.containers").iter();
            let mut ports = containers.flat_map(|container| json::list(container, "ports"));
            ports.find(|held| json::text(held, "name") == name).map(|held| json::int(held, "containerPort"))
        }
        Some(number) => number.as_i64(),
        None => Some(json::int(port, "port")),
    }
}

fn ports_of(service: &Value, pod: Option<&Value>) -> Vec<Value> {
    let ports = json::list(service, "spec.ports").iter().filter_map(|port| {
        let number = match pod {
            Some(pod) => port_of(pod, port)?,
            None => port.get("targetPort").and_then(Value::as_i64)?,
        };
        let mut shown = value!({"port": number, "protocol": json::text(port, "protocol")});
        shown["name"] = value!(json::text(port, "name"));
        if let Some(protocol) = port.get("appProtocol") {
            shown["appProtocol"] = protocol.clone();
        }
        Some(shown)
    });
    ports.collect()
}

fn serves_unready(service: &Value) -> bool {
    json::truth(service, "spec.publishNotReadyAddresses")
}

async fn write_slices(world: &World, service: &Value, pods: &[Arc<Value>]) -> Result<(), Status> {
    let slices = built_in_resource("discovery.k8s.io", "endpointslices");
    let (namespace, name) = (json::text(service, "metadata.namespace"), json::text(service, "metadata.name"));
    let endpoints: Vec<Value> = pods
        .iter()
        .map(|pod| {
            let (ready, ending) = (kinds::is_ready(pod), is_ending(pod));
            let mut endpoint = value!({
                "addresses": [json::text(pod, "status.podIP")],
                "conditions": {"ready": serves_unready(service) || ready && !ending, "serving": ready, "terminating": ending},
                "targetRef": target(pod),
            });
            if !json::text(pod, "spec.nodeName").is_empty() {
                endpoint["nodeName"] = value!(json::text(pod, "spec.nodeName"));
            }
            endpoint
        })
        .collect();
    let ports = ports_of(service, pods.first().map(|pod| &**pod));
    let mut held: Vec<Arc<Value>> = world.api.cache.list(slices, namespace);
    held.retain(|slice| {
        let labels = json::map(slice, "metadata.labels");
        let is = |key: &str, wanted: &str| {
            labels.and_then(|labels| labels.get(key)).is_some_and(|label| label == wanted)
        };
        is(SERVICE, name) && is(MANAGED_BY, "endpointslice-controller.k8s.io") && !is_ending(slice)
    });
    let mut chunks: Vec<&[Value]> = endpoints.chunks(SLICE_MAX).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    for (index, chunk) in chunks.iter().enumerate() {
        match held.get(index) {
            Some(slice)
                if slice["endpoints"].as_array().map_or(&[][..], Vec::as_slice) == *chunk
                    && json::list(slice, "ports") == ports => {}
            Some(slice) => {
                let change = |slice: &mut Value| {
                    json::set(slice, "endpoints", chunk.to_vec());
                    json::set(slice, "ports", ports.clone());
                };
                world.amend(slices, slice, "", &change).await?;
            }
            None => {
                let labels = value!({SERVICE: name, MANAGED_BY: "endpointslice-controller.k8s.io"});
                let owner = super::pods::reference(built_in_resource("", "services"), service);
                let slice = value!({
                    "metadata": {"generateName": format!("{name}-"), "labels": labels, "ownerReferences": [owner]},
                    "addressType": "IPv4", "endpoints": chunk, "ports": ports,
                });
                world.create(slices, namespace, slice).await?;
            }
        }
    }
    for slice in held.iter().skip(chunks.len()) {
        world.delete(slices, slice).await?;
    }
    Ok(())
}

async fn write_endpoints(world: &World, service: &Value, pods: &[Arc<Value>]) -> Result<(), Status> {
    let resource = built_in_resource("", "endpoints");
    let (namespace, name) = (json::text(service, "metadata.namespace"), json::text(service, "metadata.name"));
    // Pods whose ports are the same share a subset.
    let mut shared: BTreeMap<String, Vec<&Arc<Value>>> = BTreeMap::new();
    for pod in pods {
        shared.entry(value!(ports_of(service, Some(pod))).to_string()).or_default().push(pod);
    }
    let mut subsets = Vec::new();
    for (ports, pods) in shared {
        let mut subset = value!({});
        for pod in pods {
            let mut address = value!({"ip": json::text(pod, "status.podIP"), "targetRef": target(pod)});
            if !json::text(pod, "spec.nodeName").is_empty() {
                address["nodeName"] = value!(json::text(pod, "spec.nodeName"));
            }
            let serves = (kinds::is_ready(pod) && !is_ending(pod)) || serves_unready(service);
            let field = if serves { "addresses" } else { "notReadyAddresses" };
            let list = json::map_mut(&mut subset, "").entry(field).or_insert_with(|| value!([]));
            if let Some(list) = list.as_array_mut() {
                list.push(address);
            }
        }
        let mut ports: Vec<Value> = serde_json::from_str(&ports).unwrap_or_default();
        ports
            .iter_mut()
            .filter(|port| json::text(port, "name").is_empty())
            .for_each(|port| drop(json::remove(port, "name")));
        if !ports.is_empty() {
            subset["ports"] = value!(ports);
        }
        subsets.push(subset);
    }
    match world.api.cache.get(resource, namespace, name) {
        Some(held) if json::list(&held, "subsets") == subsets => Ok(()),
        Some(held) => {
            let change = |endpoints: &mut Value| json::set(endpoints, "subsets", subsets.clone());
            world.amend(resource, &held, "", &change).await.map(drop)
        }
        None => {
            let labels = json::at(service, "metadata.labels").cloned().unwrap_or_else(|| value!({}));
            let owner = super::pods::reference(built_in_resource("", "services"), service);
            let endpoints = value!({
                "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]}, "subsets": subsets,
            });
            world.create(resource, namespace, endpoints).await.map(drop)
        }
    }
}
