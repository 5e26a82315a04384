//! From a pod to what the runtime is told: configurations of sandboxes and containers, as kubelet makes them.
//!
//! Everything here is a pure function of the pod, what it uses, and [`Settings`], which say what of the node goes
//! into its pods.
//!
//! | file | what |
//! |---|---|
//! | `dns.rs` | the pod's resolver: policy, `dnsConfig`, limits |
//! | `image.rs` | names, pull policies, credentials of registries |
//! | `names.rs` | labels, annotations, paths of logs, host names |
//! | `qos.rs` | classes of service |
//! | `resources.rs` | shares, quotas, limits, scores; what a pod asks for |
//! | `security.rs` | security contexts of both levels, namespaces |

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use crate::{cgroups::Layout, env, quantity::Resources, runtime::cri};

pub mod dns;
pub mod image;
pub mod names;
pub mod qos;
pub mod resources;
mod security;

#[cfg(test)]
pub(crate) mod fixture;

pub use names::{annotations, hostname, labels, log_folder, log_path, spec_hash};

/// What of a node goes into what its pods are told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// The agent's own folder: `<data>/edged`.
    pub folder: PathBuf,
    /// The node's addresses, the one that pods are told first.
    pub addresses: Vec<IpAddr>,
    /// Name servers of the cluster; empty: there are none, and pods get the node's.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster; empty: none.
    pub cluster_domain: String,
    /// The node's own resolver; see [`dns::of_host`].
    pub host_dns: cri::DnsConfig,
    /// Host and port of the API that pods are told of; none: they are told of none.
    pub api: Option<(String, u16)>,
    /// Where control groups are, and who makes them.
    pub cgroups: Layout,
    /// Memory of the machine, bytes: what scores for the OOM killer are relative to.
    pub memory: u64,
    /// What pods may use of the node: the limit of whoever has none.
    pub allocatable: Resources,
}

/// Why a pod cannot be made, with the reason that its status shows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ConfigError {
    /// Reason of the waiting container.
    pub reason: &'static str,
    /// In kubelet's words.
    pub message: String,
}

impl ConfigError {
    /// Something that a container is made of is missing or wrong.
    pub(crate) fn container(message: String) -> Self {
        Self { reason: "CreateContainerConfigError", message }
    }

    /// The sandbox cannot be described.
    pub(crate) fn sandbox(message: String) -> Self {
        Self { reason: "FailedCreatePodSandBox", message }
    }
}

/// What the runtime is told of a pod's sandbox. `attempt` counts the sandboxes of this pod.
pub fn sandbox(pod: &Pod, settings: &Settings, attempt: u32) -> Result<cri::PodSandboxConfig, ConfigError> {
    let spec = spec(pod).map_err(ConfigError::sandbox)?;
    refuse_what_is_not_here(spec).map_err(ConfigError::sandbox)?;
    let on_host = spec.host_network == Some(true);
    let metadata = &pod.metadata;
    let mut labels = metadata.labels.clone().unwrap_or_default();
    labels.extend(labels::of_pod(pod));
    let sysctls = spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
    let config = cri::LinuxPodSandboxConfig {
        cgroup_parent: settings.cgroups.parent(pod),
        security_context: Some(security::sandbox(spec)),
        sysctls: sysctls.map(|sysctl| (sysctl.name.replace('/', "."), sysctl.value.clone())).collect(),
        overhead: spec.overhead.as_ref().map(resources::of_overhead),
        resources: Some(resources::of_pod(pod)),
    };
    Ok(cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            namespace: metadata.namespace.clone().unwrap_or_default(),
            attempt,
        }),
        hostname: if on_host { String::new() } else { hostname(pod, &settings.cluster_domain)? },
        log_directory: log_folder(settings, pod).to_string_lossy().into_owned(),
        dns_config: Some(dns::of_pod(pod, settings)),
        port_mappings: ports(pod),
        labels: labels.into_iter().collect(),
        annotations: metadata.annotations.clone().unwrap_or_default().into_iter().collect(),
        linux: Some(config),
    })
}

/// What would isolate a pod better than this node can: it is refused and not left out, since who asks for it would
/// take it for given.
fn refuse_what_is_not_here(spec: &PodSpec) -> Result<(), String> {
    let class = spec.runtime_class_name.as_deref().unwrap_or_default();
    if !class.is_empty() {
        return Err(format!(
            "failed to get sandbox runtime: RuntimeClass \"{class}\" is not known to this node"
        ));
    }
    if spec.host_users == Some(false) {
        return Err("user namespaces are not supported by this node".to_owned());
    }
    let policy = spec.security_context.as_ref().and_then(|own| own.supplemental_groups_policy.as_deref());
    if policy == Some("Strict") {
        return Err("SupplementalGroupsPolicy=Strict is not supported by this node".to_owned());
    }
    Ok(())
}

/// What a container is made of besides its own words.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// How often this container was made before.
    pub attempt: u32,
    /// The image as the runtime has it: who it runs as.
    pub image: &'a cri::Image,
    /// See [`env::environment`].
    pub envs: Vec<cri::KeyValue>,
    /// See [`crate::volumes::Volumes::mounts`].
    pub mounts: Vec<cri::Mount>,
}

/// What the runtime is told of one container.
pub fn container(
    pod: &Pod,
    container: &Container,
    settings: &Settings,
    inputs: Inputs<'_>,
) -> Result<cri::ContainerConfig, ConfigError> {
    let Inputs { attempt, image, envs, mounts } = inputs;
    if container
        .resources
        .as_ref()
        .and_then(|all| all.claims.as_ref())
        .is_some_and(|claims| !claims.is_empty())
    {
        return Err(ConfigError::container("resource claims are not supported by this node".to_owned()));
    }
    let linux = cri::LinuxContainerConfig {
        resources: Some(resources::of_container(pod, container, settings)),
        security_context: Some(security::container(pod, container, settings, image)?),
    };
    let values: BTreeMap<&str, &str> =
        envs.iter().map(|env| (env.key.as_str(), env.value.as_str())).collect();
    let expanded = |words: &Option<Vec<String>>| -> Vec<String> {
        let words = words.iter().flatten();
        words.map(|word| env::expand(word, |name| values.get(name).copied())).collect()
    };
    let (command, args) = (expanded(&container.command), expanded(&container.args));
    Ok(cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: container.name.clone(), attempt }),
        image: Some(cri::ImageSpec {
            image: image.id.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..cri::ImageSpec::default()
        }),
        command,
        args,
        working_dir: container.working_dir.clone().unwrap_or_default(),
        mounts,
        devices: Vec::new(),
        labels: labels::of_container(pod, &container.name).into_iter().collect(),
        annotations: annotations::of_container(pod, container, attempt).into_iter().collect(),
        log_path: log_path(&container.name, attempt),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        linux: Some(linux),
        envs,
        cdi_devices: Vec::new(),
    })
}

/// Every port that a container which lives as long as the pod names; the runtime forwards those of the host.
fn ports(pod: &Pod) -> Vec<cri::PortMapping> {
    let mut found: Vec<cri::PortMapping> = Vec::new();
    for port in lasting(pod).flat_map(|container| container.ports.iter().flatten()) {
        let protocol = match port.protocol.as_deref() {
            Some("UDP") => cri::Protocol::Udp,
            Some("SCTP") => cri::Protocol::Sctp,
            _ => cri::Protocol::Tcp,
        };
        let mapping = cri::PortMapping {
            protocol: protocol.into(),
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or_default(),
            host_ip: port.host_ip.clone().unwrap_or_default(),
        };
        if !found.contains(&mapping) {
            found.push(mapping);
        }
    }
    found
}

/// The sidecars and the containers proper.
pub(crate) fn lasting(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = pod.spec.iter();
    spec.flat_map(|spec| {
        spec.init_containers.iter().flatten().filter(|c| is_sidecar(c)).chain(&spec.containers)
    })
}

/// Whether this init container lives as long as the pod.
#[must_use]
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

fn spec(pod: &Pod) -> Result<&PodSpec, String> {
    pod.spec.as_ref().ok_or_else(|| format!("pod {} has no spec", names::in_words(pod)))
}

#[cfg(test)]
mod tests;
