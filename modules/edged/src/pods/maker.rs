//! What actions need besides the runtime: folders, volumes, configurations.
//!
//! Two implementations: the node's own ([`Workshop`](super::workshop::Workshop)), and one for tests that mounts
//! nothing.

use std::fmt;

use k8s_openapi::api::core::v1::{Container, Pod};

use crate::{make::ConfigError, objects::Objects, runtime::cri};

/// See the module's documentation. What is called blocking runs on a thread for it.
pub(crate) trait Maker: fmt::Debug + Send + Sync {
    /// Folders and volumes, before the sandbox; again whenever an object changed. Blocking, idempotent.
    fn set_up(&self, pod: &Pod, objects: &Objects) -> Result<(), String>;
    /// Takes changed objects over into volumes of a running pod. Blocking.
    fn refresh(&self, pod: &Pod, objects: &Objects) -> Result<(), String>;
    /// Unmounts and removes the volumes of a pod. Blocking, idempotent.
    fn tear_down(&self, uid: &str) -> Result<(), String>;
    /// Uids of the pods of which there are folders. Blocking.
    fn uids(&self) -> Vec<String>;
    /// Removes the logs of a pod. Blocking, idempotent.
    fn forget(&self, namespace: &str, name: &str, uid: &str);

    /// What the runtime is told of a sandbox.
    fn sandbox(&self, pod: &Pod, attempt: u32) -> Result<cri::PodSandboxConfig, ConfigError>;
    /// What the runtime is told of a container. Blocking: mounts are prepared.
    fn container(
        &self,
        pod: &Pod,
        container: &Container,
        objects: &Objects,
        image: &cri::Image,
        attempt: u32,
        pod_ips: &[String],
    ) -> Result<cri::ContainerConfig, ConfigError>;
    /// Undoes what was prepared for a container that has ended. Blocking, idempotent.
    fn release(&self, uid: &str, container: &str);
    /// What a container left as its termination message. Blocking.
    fn termination_message(&self, uid: &str, container: &str, attempt: u32) -> Option<String>;
}
