//! What a pod's specification says, in the agent's words.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};

/// When ended containers are started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

/// Of the pod.
pub(crate) fn restart_policy(pod: &Pod) -> RestartPolicy {
    match pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) {
        Some("Never") => RestartPolicy::Never,
        Some("OnFailure") => RestartPolicy::OnFailure,
        _ => RestartPolicy::Always,
    }
}

/// Init containers and sidecars, in order.
pub(crate) fn inits(pod: &Pod) -> impl DoubleEndedIterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten())
}

/// The containers that the pod is about.
pub(crate) fn regulars(pod: &Pod) -> impl DoubleEndedIterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.containers.iter())
}

/// All of them.
pub(crate) fn containers(pod: &Pod) -> impl DoubleEndedIterator<Item = &Container> {
    inits(pod).chain(regulars(pod))
}

pub(crate) fn container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    containers(pod).find(|container| container.name == name)
}

/// An init container that goes on running beside the others.
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// True of the name of a sidecar.
pub(crate) fn is_sidecar_name(pod: &Pod, name: &str) -> bool {
    inits(pod).any(|init| init.name == name && is_sidecar(init))
}

/// The grace period of the specification.
pub(crate) fn grace(pod: &Pod) -> Duration {
    seconds(pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30))
}

/// The grace period of a pod that is being deleted: at least a second, as everywhere.
pub(crate) fn deletion_grace(pod: &Pod) -> Duration {
    pod.metadata.deletion_grace_period_seconds.map_or_else(|| grace(pod), seconds).max(Duration::from_secs(1))
}

pub(crate) fn is_deleted(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

pub(crate) fn active_deadline(pod: &Pod) -> Option<Duration> {
    pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds).map(seconds)
}

pub(crate) fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub(crate) fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub(crate) fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// What makes another container of it when changed: of a pod's containers only the image may change.
pub(crate) fn mark(container: &Container) -> String {
    container.image.clone().unwrap_or_default()
}

pub(crate) fn on_host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(seconds.max(0).unsigned_abs())
}
