//! [`Maker`] of a node: pods' folders, volumes and control groups on its disk, configurations as a kubelet's.

use std::{fs, io};

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
        // The folder comes first and goes last: it says that there is something of this pod.
        self.volumes.set_up(pod, objects).map_err(|error| error.to_string())?;
        self.settings.cgroups.create(pod).map_err(|error| format!("control group: {error}"))
    }

    fn refresh(&self, pod: &Pod, objects: &Objects) -> Result<(), String> {
        self.volumes.refresh(pod, objects).map(drop).map_err(|error| error.to_string())
    }

    fn tear_down(&self, uid: &str) -> Result<(), String> {
        self.settings.cgroups.remove(uid).map_err(|error| format!("control group: {error}"))?;
        self.volumes.tear_down(uid).map_err(|error| error.to_string())
    }

    /// By their folders alone: control groups are the machine's, and those of others stand beside ours.
    fn uids(&self) -> Vec<String> {
        self.volumes.uids().unwrap_or_default()
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
        // Those of the start before this one are still told of.
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        if let Err(error) = self.volumes.forget_messages(uid, &container.name, attempt.saturating_sub(1)) {
            tracing::debug!(uid, container = container.name, %error, "last words of earlier starts stay");
        }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{cgroups::Layout, make::fixture};

    /// An agent ends what is left of pods that nobody wants. Another agent's, or a kubelet's, look the same to the
    /// kernel.
    #[test]
    fn control_groups_that_another_made_are_none_of_ours() {
        let folders = [tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder")];
        let [ours, theirs] = folders.each_ref().map(|folder| {
            let cgroups = Layout::find(crate::cgroups::Driver::Cgroupfs);
            Workshop::new(Settings { cgroups, ..fixture::settings(folder.path()) })
        });
        let mut pod = fixture::pod(json!({"containers": [{"name": "c"}]}));
        let name = folders[1].path().file_name().expect("a name").to_string_lossy().replace('.', "");
        let uid = format!("test-{name}");
        pod.metadata.uid = Some(uid.clone());
        theirs.set_up(&pod, &Objects::default()).expect("set up");
        assert_eq!(theirs.uids(), [uid.as_str()]);
        assert_eq!(ours.uids(), [""; 0]);
        theirs.tear_down(&uid).expect("torn down");
        theirs.tear_down(&uid).expect("torn down again");
        assert_eq!(theirs.uids(), [""; 0]);
        assert!(!theirs.settings.cgroups.pods().contains(&uid), "a control group is left");
    }
}
