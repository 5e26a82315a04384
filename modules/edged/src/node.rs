//! The node as a cluster sees it: what it has, how it is, which images it holds.
//!
//! [`Machine`] is what the machine is; [`Load`] what it has left; [`Report`] puts them together with what the
//! runtime says, and gives a new value of the key `node` of space `status` only when something changed: heartbeats
//! are the link's affair.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use k8s_openapi::{
    api::core::v1::{ContainerImage, NodeCondition, NodeStatus, NodeSystemInfo},
    apimachinery::pkg::{api::resource::Quantity, apis::meta::v1::Time},
    jiff::Timestamp,
};
use serde_json::json;

use crate::{
    quantity::{Milli, Resources},
    runtime::cri,
};

mod machine;

pub use machine::{Disk, Load, Machine};

/// Most images that are told of, and most names of each.
const IMAGES_MAX: usize = 50;
const NAMES_MAX: usize = 5;
/// What must stay free of memory; below it is pressure.
const MEMORY_KEPT: u64 = 100 << 20;
/// Shares of a disk that must stay free, in thousandths: of bytes where pods write, of its inodes, of bytes where
/// images are.
const DISK_KEPT: u64 = 100;
const INODES_KEPT: u64 = 50;
const IMAGES_KEPT: u64 = 150;
/// Share of process ids that must stay free, in thousandths.
const PIDS_KEPT: u64 = 100;
/// How long pressure is told of after it was last seen, so that what pods come for does not flap.
const PRESSURE_KEPT: Duration = Duration::from_secs(300);

/// What the configuration says of the node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Most pods that it runs.
    pub max_pods: u32,
    /// What is kept from pods, besides what must stay free.
    pub reserved: Resources,
    /// Labels that the configuration gives it.
    pub labels: BTreeMap<String, String>,
    /// Version of this agent.
    pub version: String,
}

/// What is seen of the node now.
#[derive(Debug, Clone)]
pub struct Observed {
    /// Name, version and conditions of the runtime, or why there is none.
    pub runtime: Result<(cri::VersionResponse, cri::RuntimeStatus), String>,
    /// All images.
    pub images: Vec<cri::Image>,
    /// What is left of the machine.
    pub load: Load,
    /// Whether the clock was set by somebody; none: not known.
    pub clock_trusted: Option<bool>,
    /// The node's own addresses.
    pub addresses: Vec<IpAddr>,
}

/// What a node with this machine has in all.
#[must_use]
pub fn capacity(machine: &Machine, disk: Disk, node: &Node) -> Resources {
    let amounts = [
        ("cpu", machine.cpus.to_string()),
        ("memory", format!("{}Ki", machine.memory / 1024)),
        ("ephemeral-storage", format!("{}Ki", disk.bytes / 1024)),
        ("pods", node.max_pods.to_string()),
    ];
    let mut all: Resources =
        amounts.into_iter().map(|(name, amount)| (name.to_owned(), Quantity(amount))).collect();
    for (size, bytes) in &machine.huge_pages {
        all.insert(format!("hugepages-{size}"), Quantity(format!("{}Ki", bytes / 1024)));
    }
    all
}

/// What pods may have of it.
#[must_use]
pub fn allocatable(capacity: &Resources, node: &Node) -> Resources {
    let left = |name: &String, all: &Quantity| {
        let whole = Milli::parse(&all.0).unwrap_or_default();
        let reserved = Milli::of(Some(&node.reserved), name).0;
        let kept = match name.as_str() {
            "memory" => Milli::whole(MEMORY_KEPT).0 + huge_pages(capacity),
            "ephemeral-storage" => whole.0 / 1000 * i128::from(DISK_KEPT),
            _ => 0,
        };
        let left = Milli((whole.0 - reserved - kept).max(0));
        Quantity(match name.as_str() {
            "cpu" if left.0 % 1000 != 0 => format!("{}m", left.milli()),
            "memory" => format!("{}Ki", left.units() / 1024),
            _ => left.units().to_string(),
        })
    };
    capacity.iter().map(|(name, all)| (name.clone(), left(name, all))).collect()
}

/// Memory that nobody gets as ordinary memory.
fn huge_pages(capacity: &Resources) -> i128 {
    let sizes = capacity.keys().filter(|name| name.starts_with("hugepages-"));
    sizes.map(|name| Milli::of(Some(capacity), name).0).sum()
}

/// What was told of the node last.
#[derive(Debug)]
pub struct Report {
    node: Node,
    machine: Machine,
    /// By type: status and since when.
    since: BTreeMap<&'static str, (bool, Timestamp)>,
    /// When pressure was last seen, by type.
    pressed: BTreeMap<&'static str, Timestamp>,
    told: Option<Bytes>,
}

impl Report {
    /// Nothing was told yet.
    #[must_use]
    pub fn new(node: Node, machine: Machine) -> Self {
        Self { node, machine, since: BTreeMap::new(), pressed: BTreeMap::new(), told: None }
    }

    /// The value of key `node`, if it is another than last time.
    pub fn changed(&mut self, now: Timestamp, observed: &Observed) -> Option<Bytes> {
        let value = self.value(now, observed);
        if self.told.as_ref() == Some(&value) {
            return None;
        }
        self.told = Some(value.clone());
        Some(value)
    }

    fn value(&mut self, now: Timestamp, observed: &Observed) -> Bytes {
        let capacity = capacity(&self.machine, observed.load.disk, &self.node);
        let status = NodeStatus {
            allocatable: Some(allocatable(&capacity, &self.node)),
            capacity: Some(capacity),
            conditions: Some(self.conditions(now, observed)),
            node_info: Some(self.info(observed)),
            images: Some(images(&observed.images)),
            ..NodeStatus::default()
        };
        let machine = &self.machine;
        let mut labels = self.node.labels.clone();
        let own = [
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", machine.architecture.as_str()),
            ("kubernetes.io/hostname", self.node.name.as_str()),
        ];
        labels.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let addresses: Vec<String> = observed.addresses.iter().map(ToString::to_string).collect();
        let value = json!({"status": status, "labels": labels, "addresses": addresses});
        Bytes::from(value.to_string())
    }

    fn info(&self, observed: &Observed) -> NodeSystemInfo {
        let machine = &self.machine;
        let runtime = observed.runtime.as_ref().map_or_else(
            |_| "unknown://".to_owned(),
            |(version, _)| format!("{}://{}", version.runtime_name, version.runtime_version),
        );
        NodeSystemInfo {
            architecture: machine.architecture.clone(),
            boot_id: machine.boot_id.clone(),
            container_runtime_version: runtime,
            kernel_version: machine.kernel.clone(),
            kube_proxy_version: String::new(),
            kubelet_version: format!("v1.33.0-octobus-{}", self.node.version),
            machine_id: machine.machine_id.clone(),
            operating_system: "linux".to_owned(),
            os_image: machine.os_image.clone(),
            swap: None,
            system_uuid: machine.system_uuid.clone(),
        }
    }

    fn conditions(&mut self, now: Timestamp, observed: &Observed) -> Vec<NodeCondition> {
        let load = &observed.load;
        let memory = load.memory_available < MEMORY_KEPT;
        let images = load.images.is_some_and(|disk| disk.bytes_free < disk.bytes / 1000 * IMAGES_KEPT);
        let disk = load.disk.bytes_free < load.disk.bytes / 1000 * DISK_KEPT
            || load.disk.inodes_free < load.disk.inodes / 1000 * INODES_KEPT
            || images;
        let pids = load.pids_max.saturating_sub(load.pids) < load.pids_max / 1000 * PIDS_KEPT;
        let mut all = Vec::new();
        for (kind, pressed, [calm, pressing], [calm_said, pressing_said]) in [
            (
                "MemoryPressure",
                memory,
                ["KubeletHasSufficientMemory", "KubeletHasInsufficientMemory"],
                ["kubelet has sufficient memory available", "kubelet has insufficient memory available"],
            ),
            (
                "DiskPressure",
                disk,
                ["KubeletHasNoDiskPressure", "KubeletHasDiskPressure"],
                ["kubelet has no disk pressure", "kubelet has disk pressure"],
            ),
            (
                "PIDPressure",
                pids,
                ["KubeletHasSufficientPID", "KubeletHasInsufficientPID"],
                ["kubelet has sufficient PID available", "kubelet has insufficient PID available"],
            ),
        ] {
            let is = self.is_pressed(kind, pressed, now);
            let (reason, message) = if is { (pressing, pressing_said) } else { (calm, calm_said) };
            all.push(self.condition(now, kind, is, reason, message));
        }
        if let Some(trusted) = observed.clock_trusted {
            let (reason, message) = if trusted {
                ("ClockSet", "the clock was set by a source that is trusted")
            } else {
                ("ClockNotSet", "the clock was never set: nothing is removed for its age")
            };
            all.push(self.condition(now, "ClockTrusted", trusted, reason, message));
        }
        let (runtime, reason, message) = runtime_state(&observed.runtime);
        all.push(self.condition(now, "RuntimeReady", runtime, reason, &message));
        let (reason, message) = if runtime {
            ("KubeletReady", "kubelet is posting ready status")
        } else {
            ("KubeletNotReady", message.as_str())
        };
        all.push(self.condition(now, "Ready", runtime, reason, message));
        all
    }

    /// Pressure lasts for a while after it was seen.
    fn is_pressed(&mut self, kind: &'static str, is: bool, now: Timestamp) -> bool {
        if is {
            self.pressed.insert(kind, now);
            return true;
        }
        let kept = self.pressed.get(kind).is_some_and(|last| {
            let passed = now.duration_since(*last);
            // A clock that was put back says nothing about how long it is.
            !passed.is_negative() && passed.unsigned_abs() < PRESSURE_KEPT
        });
        if !kept {
            self.pressed.remove(kind);
        }
        kept
    }

    fn condition(
        &mut self,
        now: Timestamp,
        kind: &'static str,
        is: bool,
        reason: &str,
        message: &str,
    ) -> NodeCondition {
        let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let since = self.since.entry(kind).or_insert((is, now));
        if since.0 != is {
            *since = (is, now);
        }
        NodeCondition {
            type_: kind.to_owned(),
            status: if is { "True" } else { "False" }.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_transition_time: Some(Time(since.1)),
            last_heartbeat_time: None,
        }
    }
}

/// Whether it can run pods, and what to say.
fn runtime_state(
    runtime: &Result<(cri::VersionResponse, cri::RuntimeStatus), String>,
) -> (bool, &'static str, String) {
    let status = match runtime {
        Ok((_, status)) => status,
        Err(why) => return (false, "RuntimeUnavailable", format!("container runtime is down: {why}")),
    };
    for (kind, what, reason) in [
        ("RuntimeReady", "container runtime status check", "RuntimeNotReady"),
        ("NetworkReady", "container runtime network", "NetworkNotReady"),
    ] {
        match status.conditions.iter().find(|condition| condition.r#type == kind) {
            Some(found) if found.status => {}
            Some(found) => {
                let said = format!(
                    "{what} not ready: {kind}=false reason:{} message:{}",
                    found.reason, found.message
                );
                return (false, reason, said);
            }
            None => return (false, reason, format!("{what} not ready: {kind} is not told")),
        }
    }
    (true, "RuntimeReady", "the container runtime and its network are ready".to_owned())
}

/// The largest, with a few names of each.
fn images(all: &[cri::Image]) -> Vec<ContainerImage> {
    let mut all: Vec<&cri::Image> = all.iter().collect();
    all.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    let told = all.into_iter().take(IMAGES_MAX).map(|image| {
        let names = image.repo_digests.iter().chain(&image.repo_tags).filter(|name| *name != "<none>");
        ContainerImage {
            names: Some(names.take(NAMES_MAX).cloned().collect()),
            size_bytes: i64::try_from(image.size).ok(),
        }
    });
    told.collect()
}

/// The folder whose disk pods write to, as it is or as it will be.
#[must_use]
pub fn existing(folder: &Path) -> PathBuf {
    let found = folder.ancestors().find(|folder| folder.exists());
    found.unwrap_or_else(|| Path::new("/")).to_owned()
}

#[cfg(test)]
mod tests;
