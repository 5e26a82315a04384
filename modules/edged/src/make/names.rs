//! What things of a pod are called: labels and annotations at the runtime, files of logs, host names.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Container, Pod};
use sha2::{Digest, Sha256};

use super::{ConfigError, Settings};

/// Labels by which sandboxes and containers are found again. They are kubelet's, as tools know them.
pub mod labels {
    use super::{Pod, text};

    /// Name of the pod.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Its namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Its uid.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Name of the container.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

    pub(crate) fn of_pod(pod: &Pod) -> Vec<(String, String)> {
        let metadata = &pod.metadata;
        vec![
            (POD_NAME.to_owned(), text(&metadata.name)),
            (POD_NAMESPACE.to_owned(), text(&metadata.namespace)),
            (POD_UID.to_owned(), text(&metadata.uid)),
        ]
    }

    pub(crate) fn of_container(pod: &Pod, name: &str) -> Vec<(String, String)> {
        let mut all = of_pod(pod);
        all.push((CONTAINER_NAME.to_owned(), name.to_owned()));
        all
    }
}

/// Annotations of containers: what an agent that starts anew must know of them.
pub mod annotations {
    use super::{Container, Pod, spec_hash};

    /// Of the container's part of the spec; see [`spec_hash`].
    pub const HASH: &str = "io.kubernetes.container.hash";
    /// How often it was made before.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Where it leaves its last words, in the container.
    pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// `File` or `FallbackToLogsOnError`.
    pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Seconds that it gets for ending.
    pub const GRACE_PERIOD: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// The hook that runs before it is stopped, as JSON.
    pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// Its ports, as JSON: the hook may name one.
    pub const PORTS: &str = "io.kubernetes.container.ports";

    pub(crate) fn of_container(pod: &Pod, container: &Container, attempt: u32) -> Vec<(String, String)> {
        let path = container.termination_message_path.clone();
        let policy = container.termination_message_policy.clone();
        let mut all = vec![
            (HASH.to_owned(), spec_hash(container)),
            (RESTART_COUNT.to_owned(), attempt.to_string()),
            (MESSAGE_PATH.to_owned(), path.unwrap_or_else(|| "/dev/termination-log".to_owned())),
            (MESSAGE_POLICY.to_owned(), policy.unwrap_or_else(|| "File".to_owned())),
        ];
        let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        all.extend(grace.map(|seconds| (GRACE_PERIOD.to_owned(), seconds.to_string())));
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let hook = hook.and_then(|hook| serde_json::to_string(hook).ok());
        all.extend(hook.map(|hook| (PRE_STOP.to_owned(), hook)));
        let ports = container.ports.as_ref().and_then(|ports| serde_json::to_string(ports).ok());
        all.extend(ports.map(|ports| (PORTS.to_owned(), ports)));
        all
    }
}

/// Tells whether a container is still what its pod says. Of a running pod only the image may change.
#[must_use]
pub fn spec_hash(container: &Container) -> String {
    let parts = [container.name.as_str(), container.image.as_deref().unwrap_or_default()];
    let digest = Sha256::digest(parts.join("\0"));
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Folder of the logs of a pod's containers.
#[must_use]
pub fn log_folder(settings: &Settings, pod: &Pod) -> PathBuf {
    let metadata = &pod.metadata;
    let name = format!("{}_{}_{}", text(&metadata.namespace), text(&metadata.name), text(&metadata.uid));
    settings.folder.join("logs").join(name)
}

/// A container's log in that folder.
#[must_use]
pub fn log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// The name that a pod's processes see: the spec's, else the pod's own, with the domain where it asks for it.
pub fn hostname(pod: &Pod, cluster_domain: &str) -> Result<String, ConfigError> {
    const MAX: usize = 64;
    let name = short_hostname(pod)?;
    let asks = pod.spec.as_ref().is_some_and(|spec| spec.set_hostname_as_fqdn == Some(true));
    match domain(pod, cluster_domain) {
        Some(domain) if asks => {
            let full = format!("{name}.{domain}");
            if full.len() > MAX {
                return Err(ConfigError::sandbox(format!(
                    "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long ({MAX} \
                     characters is the max, {} characters requested)",
                    full.len()
                )));
            }
            Ok(full)
        }
        _ => Ok(name),
    }
}

/// Without domain, and no longer than a label of a domain name may be.
pub(crate) fn short_hostname(pod: &Pod) -> Result<String, ConfigError> {
    const MAX: usize = 63;
    let spec = pod.spec.as_ref().and_then(|spec| spec.hostname.clone()).filter(|name| !name.is_empty());
    let name = spec.unwrap_or_else(|| text(&pod.metadata.name));
    if name.len() <= MAX {
        return Ok(name);
    }
    let cut: String = name.chars().take(MAX).collect();
    let cut = cut.trim_end_matches(['-', '.']);
    if cut.is_empty() {
        return Err(ConfigError::sandbox(format!("hostname for pod was invalid: {name:?}")));
    }
    Ok(cut.to_owned())
}

/// The domain of a pod that belongs to a subdomain.
pub(crate) fn domain(pod: &Pod, cluster_domain: &str) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_ref().filter(|name| !name.is_empty())?;
    Some(format!("{subdomain}.{}.svc.{cluster_domain}", text(&pod.metadata.namespace)))
}

/// As kubelet names a pod in messages.
pub(crate) fn in_words(pod: &Pod) -> String {
    let metadata = &pod.metadata;
    format!("{}_{}({})", text(&metadata.name), text(&metadata.namespace), text(&metadata.uid))
}

pub(crate) fn text(text: &Option<String>) -> String {
    text.clone().unwrap_or_default()
}
