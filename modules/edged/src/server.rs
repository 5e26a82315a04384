//! The HTTP server behind Streams of kind `kubelet`: logs, commands, ports and figures of the node's pods, at the
//! paths and in the words of a kubelet, so that an API server forwards its clients' requests unchanged.

use std::{fmt, path::PathBuf};

/// The node's pods as this server needs them. Asked anew for every request.
pub trait Pods: fmt::Debug + Send + Sync {
    /// The pod of this name that the node has now, if any.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView>;
    /// All pods that the node has.
    fn pods(&self) -> Vec<PodView>;
    /// The same pods as objects of the Kubernetes API, with their statuses.
    fn objects(&self) -> Vec<serde_json::Value>;
}

/// A pod at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// Nanoseconds since 1970 at which the node accepted it.
    pub started_at: i64,
    /// The sandbox that is ready, by the runtime's id.
    pub sandbox: Option<String>,
    /// Those of its specification, started or not: init containers too.
    pub containers: Vec<ContainerView>,
}

/// A container of a pod at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerView {
    pub name: String,
    /// The newest instance by the runtime's id, whether it runs or not.
    pub id: Option<String>,
    /// It runs.
    pub running: bool,
    /// Why it does not run yet: `ContainerCreating`, `ImagePullBackOff`, ...
    pub waiting: Option<String>,
    /// The log of the newest instance.
    pub log: Option<PathBuf>,
    /// The log of the instance before, if it is kept.
    pub previous_log: Option<PathBuf>,
}
