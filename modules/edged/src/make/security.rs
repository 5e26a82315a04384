//! Security contexts: what a pod says, what a container says over it, and what the image says where neither does.

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, PodSpec, SELinuxOptions, SeccompProfile,
};

use super::{ConfigError, Settings, names, spec};
use crate::runtime::cri;

/// Hidden from containers, unless they ask for the whole of `/proc`.
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

pub(super) fn namespaces(spec: &PodSpec) -> cri::NamespaceOption {
    let mode = |on_host: Option<bool>| match on_host {
        Some(true) => cri::NamespaceMode::Node,
        _ => cri::NamespaceMode::Pod,
    };
    let pid = if spec.host_pid == Some(true) {
        cri::NamespaceMode::Node
    } else if spec.share_process_namespace == Some(true) {
        cri::NamespaceMode::Pod
    } else {
        cri::NamespaceMode::Container
    };
    cri::NamespaceOption {
        network: mode(spec.host_network).into(),
        pid: pid.into(),
        ipc: mode(spec.host_ipc).into(),
        target_id: String::new(),
        userns_options: None,
    }
}

/// Groups of the pod's processes besides their own.
fn groups(context: Option<&PodSecurityContext>) -> Vec<i64> {
    let of_files = context.and_then(|context| context.fs_group);
    let more = context.and_then(|context| context.supplemental_groups.clone()).unwrap_or_default();
    of_files.into_iter().chain(more).collect()
}

/// The sandbox's own process needs nothing, so it gets the tighter profile of system calls whatever the pod says.
pub(super) fn sandbox(spec: &PodSpec) -> cri::LinuxSandboxSecurityContext {
    let context = spec.security_context.as_ref();
    let privileged = spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|container| {
        container.security_context.as_ref().is_some_and(|context| context.privileged == Some(true))
    });
    cri::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(spec)),
        selinux_options: context.and_then(|context| context.se_linux_options.as_ref()).map(selinux),
        run_as_user: context.and_then(|context| context.run_as_user).map(int),
        run_as_group: context.and_then(|context| context.run_as_group).map(int),
        readonly_rootfs: false,
        supplemental_groups: groups(context),
        privileged,
        seccomp: Some(profile(cri::security_profile::ProfileType::RuntimeDefault, "")),
        ..cri::LinuxSandboxSecurityContext::default()
    }
}

pub(super) fn container(
    pod: &Pod,
    container: &Container,
    settings: &Settings,
    image: &cri::Image,
) -> Result<cri::LinuxContainerSecurityContext, ConfigError> {
    let spec = spec(pod).map_err(ConfigError::container)?;
    let of_pod = spec.security_context.as_ref();
    let own = container.security_context.as_ref();
    let user = own.and_then(|own| own.run_as_user).or_else(|| of_pod.and_then(|pod| pod.run_as_user));
    let group = own.and_then(|own| own.run_as_group).or_else(|| of_pod.and_then(|pod| pod.run_as_group));
    let not_root =
        own.and_then(|own| own.run_as_non_root).or_else(|| of_pod.and_then(|pod| pod.run_as_non_root));
    let image_user = image.uid.as_ref().map(|uid| uid.value);
    if not_root == Some(true) {
        verify_not_root(pod, container, user, image_user, &image.username)?;
    }
    let options = own.and_then(|own| own.se_linux_options.as_ref());
    let options = options.or_else(|| of_pod.and_then(|pod| pod.se_linux_options.as_ref()));
    let unmasked = own.is_some_and(|own| own.proc_mount.as_deref() == Some("Unmasked"));
    let paths = |paths: &[&str]| -> Vec<String> {
        if unmasked { Vec::new() } else { paths.iter().map(|path| (*path).to_owned()).collect() }
    };
    let seccomp = own.and_then(|own| own.seccomp_profile.as_ref());
    let seccomp = seccomp.or_else(|| of_pod.and_then(|pod| pod.seccomp_profile.as_ref()));
    let apparmor = apparmor(pod, container, of_pod)?;
    Ok(cri::LinuxContainerSecurityContext {
        capabilities: own.and_then(|own| own.capabilities.as_ref()).map(|asked| cri::Capability {
            add_capabilities: asked.add.clone().unwrap_or_default(),
            drop_capabilities: asked.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        }),
        privileged: own.is_some_and(|own| own.privileged == Some(true)),
        namespace_options: Some(namespaces(spec)),
        selinux_options: options.map(selinux),
        run_as_user: user.or(image_user).map(int),
        run_as_username: if user.is_some() { String::new() } else { image.username.clone() },
        run_as_group: group.map(int),
        readonly_rootfs: own.is_some_and(|own| own.read_only_root_filesystem == Some(true)),
        supplemental_groups: groups(of_pod),
        no_new_privs: own.and_then(|own| own.allow_privilege_escalation) == Some(false),
        masked_paths: paths(&MASKED),
        readonly_paths: paths(&READ_ONLY),
        seccomp: Some(seccomp_profile(seccomp, settings)?),
        apparmor_profile: apparmor.as_ref().map(apparmor_in_words).unwrap_or_default(),
        apparmor,
        ..cri::LinuxContainerSecurityContext::default()
    })
}

fn verify_not_root(
    pod: &Pod,
    container: &Container,
    user: Option<i64>,
    image_user: Option<i64>,
    image_name: &str,
) -> Result<(), ConfigError> {
    let whose = format!("(pod: \"{}\", container: {})", names::in_words(pod), container.name);
    let wrong = match (user, image_user) {
        (Some(0), _) => format!("container's runAsUser breaks non-root policy {whose}"),
        (Some(_), _) => return Ok(()),
        (None, Some(0)) => format!("container has runAsNonRoot and image will run as root {whose}"),
        (None, None) if !image_name.is_empty() => format!(
            "container has runAsNonRoot and image has non-numeric user ({image_name}), cannot verify user is \
             non-root {whose}"
        ),
        (None, _) => return Ok(()),
    };
    Err(ConfigError::container(wrong))
}

fn seccomp_profile(
    asked: Option<&SeccompProfile>,
    settings: &Settings,
) -> Result<cri::SecurityProfile, ConfigError> {
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    match asked.map(|asked| asked.type_.as_str()) {
        Some("RuntimeDefault") => Ok(profile(RuntimeDefault, "")),
        Some("Localhost") => {
            let named =
                asked.and_then(|asked| asked.localhost_profile.as_deref()).filter(|name| !name.is_empty());
            let Some(named) = named else {
                return Err(ConfigError::container(
                    "localhostProfile must be set if seccompProfile type is Localhost.".to_owned(),
                ));
            };
            let path = settings.folder.join("seccomp").join(named);
            Ok(profile(Localhost, &path.to_string_lossy()))
        }
        _ => Ok(profile(Unconfined, "")),
    }
}

fn apparmor(
    pod: &Pod,
    container: &Container,
    of_pod: Option<&PodSecurityContext>,
) -> Result<Option<cri::SecurityProfile>, ConfigError> {
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    let own = container.security_context.as_ref().and_then(|own| own.app_armor_profile.as_ref());
    let asked: Option<AppArmorProfile> = own
        .or_else(|| of_pod.and_then(|pod| pod.app_armor_profile.as_ref()))
        .cloned()
        .or_else(|| apparmor_annotation(pod, &container.name));
    let Some(asked) = asked else { return Ok(None) };
    match (asked.type_.as_str(), asked.localhost_profile.as_deref()) {
        ("RuntimeDefault", _) => Ok(Some(profile(RuntimeDefault, ""))),
        ("Unconfined", _) => Ok(Some(profile(Unconfined, ""))),
        ("Localhost", Some(name)) if !name.is_empty() => Ok(Some(profile(Localhost, name))),
        ("Localhost", _) => Err(ConfigError::container(
            "missing localhost profile name for AppArmor profile with type Localhost".to_owned(),
        )),
        (other, _) => Err(ConfigError::container(format!("unknown AppArmor profile type {other}"))),
    }
}

/// As pods said it before there was a field.
fn apparmor_annotation(pod: &Pod, container: &str) -> Option<AppArmorProfile> {
    let annotations = pod.metadata.annotations.as_ref()?;
    let text = annotations.get(&format!("{APPARMOR_ANNOTATION}{container}"))?;
    let (type_, name) = match text.as_str() {
        "runtime/default" => ("RuntimeDefault", None),
        "unconfined" => ("Unconfined", None),
        other => ("Localhost", other.strip_prefix("localhost/").map(str::to_owned)),
    };
    Some(AppArmorProfile { type_: type_.to_owned(), localhost_profile: name })
}

/// As runtimes before the field took it.
fn apparmor_in_words(profile: &cri::SecurityProfile) -> String {
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    match profile.profile_type() {
        RuntimeDefault => "runtime/default".to_owned(),
        Unconfined => "unconfined".to_owned(),
        Localhost => format!("localhost/{}", profile.localhost_ref),
    }
}

fn profile(kind: cri::security_profile::ProfileType, name: &str) -> cri::SecurityProfile {
    cri::SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() }
}

fn selinux(options: &SELinuxOptions) -> cri::SeLinuxOption {
    cri::SeLinuxOption {
        user: names::text(&options.user),
        role: names::text(&options.role),
        r#type: names::text(&options.type_),
        level: names::text(&options.level),
    }
}

fn int(value: i64) -> cri::Int64Value {
    cri::Int64Value { value }
}
