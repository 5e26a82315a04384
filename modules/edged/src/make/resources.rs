//! Resources in the kernel's terms, as kubelet computes them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

use super::{
    Settings, is_sidecar,
    qos::{Qos, qos},
};
use crate::{
    quantity::{Milli, Resources},
    runtime::cri,
};

/// Microseconds in which a quota is spent.
pub(crate) const PERIOD: i64 = 100_000;
/// The least that the kernel takes.
pub(crate) const SHARES_MIN: i64 = 2;
/// The most.
pub(crate) const SHARES_MAX: i64 = 262_144;
const QUOTA_MIN: i64 = 1_000;
/// Score of what must be killed last, and of what goes first.
const SCORE_GUARANTEED: i64 = -997;
const SCORE_BEST_EFFORT: i64 = 1_000;
/// Pods of this priority and above keep a node alive.
const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// Weight of so much processor.
#[must_use]
pub fn shares(cpu: Milli) -> i64 {
    (cpu.milli().saturating_mul(1024) / 1000).clamp(SHARES_MIN, SHARES_MAX)
}

/// What may be used of a processor in [`PERIOD`]; 0: as much as there is.
#[must_use]
pub fn quota(cpu: Milli) -> i64 {
    if cpu.0 <= 0 { 0 } else { (cpu.milli().saturating_mul(PERIOD) / 1000).max(QUOTA_MIN) }
}

/// What the runtime gives to a container.
pub(super) fn of_container(
    pod: &Pod,
    container: &Container,
    settings: &Settings,
) -> cri::LinuxContainerResources {
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|all| all.limits.as_ref());
    let requests = resources.and_then(|all| all.requests.as_ref());
    let cpu = Milli::of(limits, "cpu");
    let memory = Milli::of(limits, "memory").units();
    cri::LinuxContainerResources {
        cpu_period: PERIOD,
        cpu_quota: quota(cpu),
        cpu_shares: shares(Milli::find(requests, "cpu").unwrap_or(cpu)),
        memory_limit_in_bytes: memory,
        // As much as memory: none of it is swapped.
        memory_swap_limit_in_bytes: if settings.cgroups.accounts_swap() { memory } else { 0 },
        oom_score_adj: oom_score(pod, container, settings.memory),
        hugepage_limits: huge_pages(limits, settings.cgroups.huge_pages()),
        unified: if settings.cgroups.is_unified() {
            [("memory.oom.group".to_owned(), "1".to_owned())].into_iter().collect()
        } else {
            BTreeMap::new().into_iter().collect()
        },
        ..cri::LinuxContainerResources::default()
    }
}

/// What the sandbox is told of all containers together; runtimes of virtual machines size themselves by it.
pub(super) fn of_pod(pod: &Pod) -> cri::LinuxContainerResources {
    let requests = pod_requests(pod);
    let limits = Declared::of(pod);
    cri::LinuxContainerResources {
        cpu_period: PERIOD,
        cpu_quota: limits.cpu.map_or(0, quota),
        cpu_shares: shares(requests.get("cpu").copied().unwrap_or_default()),
        memory_limit_in_bytes: limits.memory.map_or(0, Milli::units),
        ..cri::LinuxContainerResources::default()
    }
}

pub(super) fn of_overhead(overhead: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_shares: shares(Milli::of(Some(overhead), "cpu")),
        memory_limit_in_bytes: Milli::of(Some(overhead), "memory").units(),
        ..cri::LinuxContainerResources::default()
    }
}

/// How soon the kernel kills it when memory ends: -997 last, 1000 first.
#[must_use]
pub fn oom_score(pod: &Pod, container: &Container, memory: u64) -> i64 {
    let spec = pod.spec.as_ref();
    if spec.and_then(|spec| spec.priority).is_some_and(|priority| priority >= CRITICAL_PRIORITY) {
        return SCORE_GUARANTEED;
    }
    match qos(pod) {
        Qos::Guaranteed => return SCORE_GUARANTEED,
        Qos::BestEffort => return SCORE_BEST_EFFORT,
        Qos::Burstable => {}
    }
    let score = |container: &Container| {
        let requests = container.resources.as_ref().and_then(|all| all.requests.as_ref());
        let asked = i128::from(Milli::of(requests, "memory").units());
        1000 - i64::try_from(1000 * asked / i128::from(memory.max(1))).unwrap_or(1000)
    };
    let mut own = score(container);
    // A sidecar outlives the containers that it serves.
    if is_sidecar(container) {
        own = own.min(spec.iter().flat_map(|spec| &spec.containers).map(score).max().unwrap_or(own));
    }
    own.clamp(1000 + SCORE_GUARANTEED, SCORE_BEST_EFFORT - 1)
}

/// Limits of huge pages: what the container has of each size, and none of the other sizes that the machine has.
fn huge_pages(limits: Option<&Resources>, sizes: &[u64]) -> Vec<cri::HugepageLimit> {
    let named = limits.into_iter().flatten().filter_map(|(name, quantity)| {
        let size = Milli::parse(name.strip_prefix("hugepages-")?)?.units();
        Some((u64::try_from(size).ok()?, Milli::parse(&quantity.0)?.units().try_into().ok()?))
    });
    let mut all: BTreeMap<u64, u64> = sizes.iter().map(|size| (*size, 0)).collect();
    all.extend(named);
    all.into_iter().map(|(size, limit)| cri::HugepageLimit { page_size: page_size(size), limit }).collect()
}

/// As the kernel names sizes: `2MB`.
fn page_size(bytes: u64) -> String {
    let mut size = bytes;
    for unit in ["B", "KB", "MB"] {
        if size < 1024 || !size.is_multiple_of(1024) {
            return format!("{size}{unit}");
        }
        size /= 1024;
    }
    format!("{size}GB")
}

/// What a pod as a whole is limited to, where all of its containers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) cpu: Option<Milli>,
    pub(crate) memory: Option<Milli>,
}

impl Declared {
    pub(crate) fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self { cpu: None, memory: None } };
        let whole = |name: &str| {
            let limits = spec.resources.as_ref().and_then(|all| all.limits.as_ref());
            Milli::find(limits, name).filter(|limit| limit.0 > 0)
        };
        let all = |name: &str| {
            let mut containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
            let limited = containers.all(|container| of_list(container, Which::Limits, name).0 > 0);
            limited.then(|| sum(spec, Which::Limits, name))
        };
        let found = |name: &str| whole(name).or_else(|| all(name));
        Self { cpu: found("cpu"), memory: found("memory") }
    }
}

/// What a pod needs of the node: what its containers ask for together, or more where an init container asks for
/// more while it runs, and its overhead. This is what the scheduler counts and what admission checks.
#[must_use]
pub fn pod_requests(pod: &Pod) -> BTreeMap<String, Milli> {
    let Some(spec) = &pod.spec else { return BTreeMap::new() };
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut named: Vec<&String> = containers
        .flat_map(|container| container.resources.iter())
        .chain(&spec.resources)
        .flat_map(|all| all.requests.iter().chain(&all.limits))
        .flatten()
        .chain(spec.overhead.iter().flatten())
        .map(|(name, _)| name)
        .collect();
    named.sort();
    named.dedup();
    let of = |name: &String| {
        let requests = spec.resources.as_ref().and_then(|all| all.requests.as_ref());
        Milli::find(requests, name).unwrap_or_else(|| sum(spec, Which::Requests, name))
    };
    named.into_iter().map(|name| (name.clone(), of(name))).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Requests,
    Limits,
}

/// A request that is not given is the limit.
fn of_list(container: &Container, which: Which, name: &str) -> Milli {
    let resources = container.resources.as_ref();
    let limit = Milli::of(resources.and_then(|all| all.limits.as_ref()), name);
    match which {
        Which::Limits => limit,
        Which::Requests => {
            Milli::find(resources.and_then(|all| all.requests.as_ref()), name).unwrap_or(limit)
        }
    }
}

/// Sidecars run beside everything that comes after them; each other init container runs alone with those before.
fn sum(spec: &PodSpec, which: Which, name: &str) -> Milli {
    let mut sidecars = 0_i128;
    let mut peak = 0_i128;
    for init in spec.init_containers.iter().flatten() {
        let asks = of_list(init, which, name).0;
        if is_sidecar(init) {
            sidecars = sidecars.saturating_add(asks);
            peak = peak.max(sidecars);
        } else {
            peak = peak.max(sidecars.saturating_add(asks));
        }
    }
    let proper = spec.containers.iter().map(|container| of_list(container, which, name).0);
    let together = proper.fold(sidecars, i128::saturating_add);
    Milli(together.max(peak).saturating_add(Milli::of(spec.overhead.as_ref(), name).0))
}
