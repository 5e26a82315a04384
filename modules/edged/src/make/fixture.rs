//! A pod and a node for tests.

use std::path::Path;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{Settings, dns};
use crate::cgroups::Layout;

/// Pod `web` of namespace `shop` with this spec.
pub(crate) fn pod(spec: Value) -> Pod {
    let metadata = json!({
        "name": "web", "namespace": "shop", "uid": "1-2-3",
        "labels": {"app": "web"}, "annotations": {"note": "a \"b\"\nc"},
    });
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).expect("a pod")
}

/// A node with 4 processors and 8 GiB.
pub(crate) fn settings(folder: &Path) -> Settings {
    Settings {
        node: "edge-1".to_owned(),
        folder: folder.to_owned(),
        addresses: vec!["192.0.2.7".parse().expect("an address")],
        cluster_dns: vec!["10.96.0.10".parse().expect("an address")],
        cluster_domain: "cluster.local".to_owned(),
        host_dns: dns::read("nameserver 192.0.2.1\nsearch plant.example\noptions timeout:1\n"),
        api: Some(("127.0.0.1".to_owned(), 10_550)),
        cgroups: Layout::none(),
        memory: 8 << 30,
        allocatable: serde_json::from_value(json!({"cpu": "4", "memory": "8Gi"})).expect("resources"),
    }
}
