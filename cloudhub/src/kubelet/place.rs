//! Which node a request is for.
//!
//! By `/nodes/NODE/...`; by the pod in its path; or, for what a node is asked itself, by the host name that the client
//! used: `NODE`, or `NODE.` and whatever follows.

use std::sync::Arc;

use serde_json::Value;

use crate::{fabric::Fabric, registry::Registry};

/// Labels of a host name that are tried.
const LABELS_MAX: usize = 8;
/// What stands before `namespace/pod` in a path.
const OF_PODS: [&str; 5] = ["containerLogs", "exec", "attach", "portForward", "run"];

/// Where nodes and pods are looked up.
#[derive(Debug)]
pub(crate) struct Places {
    /// Which has the pods that were brought to nodes.
    pub(crate) fabric: Arc<dyn Fabric>,
    /// Which nodes there are.
    pub(crate) registry: Registry,
}

impl Places {
    /// The node, and the path that it is asked for.
    pub(super) async fn find(&self, asked: &str, host: &str) -> Option<(String, String)> {
        if let Some(rest) = asked.strip_prefix("/nodes/") {
            let end = rest.find(['/', '?']).unwrap_or(rest.len());
            let (node, path) = rest.split_at(end);
            let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
            return (!node.is_empty()).then(|| (node.to_owned(), path));
        }
        let path = asked.split('?').next().unwrap_or_default();
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        let node = match (parts.next(), parts.next(), parts.next()) {
            (Some(what), Some(namespace), Some(pod)) if OF_PODS.contains(&what) => {
                self.of_pod(namespace, pod).await?
            }
            _ => self.of_host(host).await?,
        };
        Some((node, asked.to_owned()))
    }

    async fn of_pod(&self, namespace: &str, pod: &str) -> Option<String> {
        let key = format!("obj/core/pods/{namespace}/{pod}");
        let entry = self.fabric.peek("fleet", &key).await.ok()??;
        let pod: Value = serde_json::from_slice(&entry.value).ok()?;
        pod.pointer("/spec/nodeName")?.as_str().map(str::to_owned)
    }

    async fn of_host(&self, host: &str) -> Option<String> {
        for name in names(host) {
            if let Ok(Some(_)) = self.registry.enrolment_seen(name).await {
                return Some(name.to_owned());
            }
        }
        None
    }
}

/// What may be the node's name in a host, longest first: names of nodes have dots too.
fn names(host: &str) -> impl Iterator<Item = &str> {
    let host = host
        .rsplit_once(':')
        .map_or(host, |(host, port)| if port.bytes().all(|byte| byte.is_ascii_digit()) { host } else { "" });
    let ends = host.match_indices('.').map(|(at, _)| at).take(LABELS_MAX).chain([host.len()]);
    let mut ends: Vec<usize> = ends.filter(|end| *end > 0).collect();
    ends.reverse();
    ends.into_iter().map(move |end| &host[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_names_a_node_by_how_it_begins() {
        let of = |host: &'static str| names(host).collect::<Vec<_>>();
        assert_eq!(
            of("edge.1.nodes.example:10250"),
            ["edge.1.nodes.example", "edge.1.nodes", "edge.1", "edge"]
        );
        assert_eq!(of("edge-1"), ["edge-1"]);
        assert!(of("").is_empty() && of("[::1]").is_empty());
    }
}
