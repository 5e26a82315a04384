//! [`Maker`] of a node: pods' folders, volumes and control groups on its disk, configurations as a kubelet's.

use std::{collections::BTreeSet, fs, io};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::maker::Maker;
use crate::{
    env,
    make::{self, ConfigError, Inputs, Settings},
    objects::Objects,
    runtime::cri,
    volumes::Volumes,
};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Workshop {
    settings: Settings,
    volumes: Volumes,
}

impl Workshop {
    pub(crate) fn new(settings: Settings) -> Self {
        Self { volumes: Volumes::new(settings.clone()), settings }
    }
}

impl Maker for Workshop {
    fn set_up(&self, pod: &Pod, objects: &Objects) -> Result<(), String> {
        self.settings.cgroups.create(pod).map_err(|error| format!("control group: {error}"))?;
        self.volumes.set_up(pod, objects).map_err(|error| error.to_string())
    }

    fn refresh(&self, pod: &Pod, objects: &Objects) -> Result<(), String> {
        self.volumes.refresh(pod, objects).map(drop).map_err(|error| error.to_string())
    }

    fn tear_down(&self, uid: &str) -> Result<(), String> {
        self.volumes.tear_down(uid).map_err(|error| error.to_string())?;
        self.settings.cgroups.remove(uid).map_err(|error| format!("control group: {error}"))
    }

    fn uids(&self) -> Vec<String> {
        let folders = self.volumes.uids().unwrap_or_default();
        let all: BTreeSet<String> = folders.into_iter().chain(self.settings.cgroups.pods()).collect();
        all.into_iter().collect()
    }

    fn forget(&self, namespace: &str, name: &str, uid: &str) {
        let plain = |text: &str| !text.is_empty() && !text.contains('/') && !text.starts_with('.');
        if !plain(namespace) || !plain(name) || !plain(uid) {
            return;
        }
        let folder = self.settings.folder.join("logs").join(format!("{namespace}_{name}_{uid}"));
        if let Err(error) = fs::remove_dir_all(&folder)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %folder.display(), %error, "the logs of a pod that is gone stay");
        }
    }

    fn sandbox(&self, pod: &Pod, attempt: u32) -> Result<cri::PodSandboxConfig, ConfigError> {
        make::sandbox(pod, &self.settings, attempt)
    }

    fn container(
        &self,
        pod: &Pod,
        container: &Container,
        objects: &Objects,
        image: &cri::Image,
        attempt: u32,
        pod_ips: &[String],
    ) -> Result<cri::ContainerConfig, ConfigError> {
        let envs = env::environment(pod, container, objects, &self.settings, pod_ips)?;
        let mounts = self.volumes.mounts(pod, container, &envs, attempt, pod_ips)?;
        make::container(pod, container, &self.settings, Inputs { attempt, image, envs, mounts })
    }

    fn release(&self, uid: &str, container: &str) {
        if let Err(error) = self.volumes.release(uid, container) {
            tracing::warn!(uid, container, %error, "mounts of a container that ended stay until its pod ends");
        }
    }

    fn termination_message(&self, uid: &str, container: &str, attempt: u32) -> Option<String> {
        self.volumes.termination_message(uid, container, attempt)
    }
}
