//! What the node and its containers use: CRI's figures, and the kernel's for the node.
//!
//! A rate needs two readings. The last one is kept, so that whoever asks now and then gets the rate since; who asks
//! first gets it over half a second.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, sleep},
};

use crate::{
    runtime::{Runtime, cri},
    server::{PodView, Pods},
};

/// What was read earlier says nothing about now.
const STALE: Duration = Duration::from_secs(120);
/// The shortest time that a rate is taken over; who asks sooner gets the one before.
const RATE_OVER: Duration = Duration::from_millis(500);
/// Ticks of `/proc/stat` in a second, on every architecture that Linux has.
const TICKS: u64 = 100;

/// Processor time used by now, and the rate of late.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cpu {
    /// Nanoseconds of one processor.
    pub core_nanos: u64,
    /// Billionths of a processor.
    pub nano_cores: Option<u64>,
}

/// Bytes of memory. What is not known is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// What cannot be taken back at once: usage without files that were not read of late.
    pub working_set: Option<u64>,
    pub usage: Option<u64>,
    pub rss: Option<u64>,
    pub available: Option<u64>,
}

/// Bytes and inodes of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    pub capacity: u64,
    pub available: u64,
    pub used: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

/// A container that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUse {
    pub name: String,
    /// Nanoseconds since 1970 of its figures.
    pub at: i64,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// What it wrote beside its image, bytes.
    pub written: Option<u64>,
}

/// A pod with the containers of it that run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodUse {
    pub pod: PodView,
    pub containers: Vec<ContainerUse>,
}

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    pub node: String,
    /// Nanoseconds since 1970.
    pub at: i64,
    /// Nanoseconds since 1970 at which the machine was started.
    pub booted: Option<i64>,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    pub disk: Option<Disk>,
    pub pods: Vec<PodUse>,
    /// The runtime did not answer: figures of containers are missing.
    pub incomplete: bool,
}

/// Reads figures. One reading at a time, whoever asks.
#[derive(Debug)]
pub struct Stats {
    node: String,
    data: PathBuf,
    runtime: Arc<dyn Runtime>,
    pods: Arc<dyn Pods>,
    rates: Mutex<Rates>,
}

impl Stats {
    /// For the node of this name, with this data folder.
    #[must_use]
    pub fn new(node: &str, data: PathBuf, runtime: Arc<dyn Runtime>, pods: Arc<dyn Pods>) -> Self {
        Self { node: node.to_owned(), data, runtime, pods, rates: Mutex::default() }
    }

    /// What is used now. Takes half a second where nothing was read of late.
    pub async fn read(&self) -> Use {
        let mut rates = self.rates.lock().await;
        if rates.are_stale(Instant::now()) {
            let first = self.runtime.container_stats().await.unwrap_or_default();
            rates.enter(Instant::now(), node_cpu(), &first);
            sleep(RATE_OVER).await;
        }
        let (stats, incomplete) = match self.runtime.container_stats().await {
            Ok(stats) => (stats, false),
            Err(error) => {
                tracing::debug!(%error, "no figures of containers");
                (Vec::new(), true)
            }
        };
        let node_nanos = node_cpu();
        rates.enter(Instant::now(), node_nanos, &stats);
        let now = crate::logs::now().unix_timestamp_nanos();
        Use {
            node: self.node.clone(),
            at: i64::try_from(now).unwrap_or(i64::MAX),
            booted: fs::read_to_string("/proc/stat").ok().and_then(|stat| booted(&stat)),
            cpu: node_nanos.map(|core_nanos| Cpu { core_nanos, nano_cores: rates.node.rate }),
            memory: fs::read_to_string("/proc/meminfo").ok().map(|info| node_memory(&info)),
            disk: rustix::fs::statvfs(&self.data).ok().map(|disk| disk_of(&disk)),
            pods: self.pods.pods().into_iter().map(|pod| pod_use(pod, &stats, &rates)).collect(),
            incomplete,
        }
    }
}

/// The last readings, by container; a container that has gone is forgotten with the next.
#[derive(Debug, Default)]
struct Rates {
    /// The first reading, from which times are counted, and the last.
    began: Option<Instant>,
    read: Option<Instant>,
    node: Rate,
    containers: BTreeMap<String, Rate>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    /// Nanoseconds of some clock, and nanoseconds of a processor by then.
    last: Option<(i64, u64)>,
    rate: Option<u64>,
}

impl Rate {
    /// A reading that is too young, or of another life, leaves the rate as it was.
    fn enter(&mut self, at: i64, used: u64) {
        let Some((then, before)) = self.last else {
            self.last = Some((at, used));
            return;
        };
        let passed = u128::from(at.saturating_sub(then).max(0).unsigned_abs());
        if used < before {
            *self = Self { last: Some((at, used)), rate: None };
        } else if passed >= RATE_OVER.as_nanos() / 2 {
            let rate = u128::from(used - before) * 1_000_000_000 / passed;
            *self = Self { last: Some((at, used)), rate: u64::try_from(rate).ok() };
        }
    }
}

impl Rates {
    fn are_stale(&self, now: Instant) -> bool {
        self.read.is_none_or(|read| now.duration_since(read) > STALE)
    }

    fn enter(&mut self, now: Instant, node: Option<u64>, stats: &[cri::ContainerStats]) {
        if self.are_stale(now) {
            *self = Self::default();
        }
        self.read = Some(now);
        let began = *self.began.get_or_insert(now);
        if let Some(used) = node {
            let at = i64::try_from(now.duration_since(began).as_nanos()).unwrap_or(i64::MAX);
            self.node.enter(at, used);
        }
        let mut old = std::mem::take(&mut self.containers);
        for stat in stats {
            let (Some(attributes), Some(cpu)) = (&stat.attributes, &stat.cpu) else { continue };
            let Some(used) = &cpu.usage_core_nano_seconds else { continue };
            let mut rate = old.remove(&attributes.id).unwrap_or_default();
            rate.enter(cpu.timestamp, used.value);
            self.containers.insert(attributes.id.clone(), rate);
        }
    }
}

fn pod_use(pod: PodView, stats: &[cri::ContainerStats], rates: &Rates) -> PodUse {
    let running = pod.containers.iter().filter(|container| container.running);
    let containers = running.filter_map(|container| {
        let id = container.id.as_ref()?;
        let stat = stats.iter().find(|s| s.attributes.as_ref().is_some_and(|a| a.id == *id))?;
        let value = |amount: &Option<cri::UInt64Value>| amount.as_ref().map(|amount| amount.value);
        let nano_cores = rates.containers.get(id).and_then(|rate| rate.rate);
        Some(ContainerUse {
            name: container.name.clone(),
            at: stat.cpu.as_ref().map_or(0, |cpu| cpu.timestamp),
            cpu: stat.cpu.as_ref().and_then(|cpu| {
                let core_nanos = value(&cpu.usage_core_nano_seconds)?;
                Some(Cpu { core_nanos, nano_cores: nano_cores.or_else(|| value(&cpu.usage_nano_cores)) })
            }),
            memory: stat.memory.as_ref().map(|memory| Memory {
                working_set: value(&memory.working_set_bytes),
                usage: value(&memory.usage_bytes),
                rss: value(&memory.rss_bytes),
                available: value(&memory.available_bytes),
            }),
            written: stat.writable_layer.as_ref().and_then(|layer| value(&layer.used_bytes)),
        })
    });
    let containers = containers.collect();
    PodUse { pod, containers }
}

/// Nanoseconds of all processors that were not idle.
fn node_cpu() -> Option<u64> {
    cpu_nanos(&fs::read_to_string("/proc/stat").ok()?)
}

fn cpu_nanos(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // user, nice, system; then idle and waiting for disks; then interrupts and what was stolen. Guests count as users.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum();
    busy.checked_mul(1_000_000_000 / TICKS)
}

fn booted(stat: &str) -> Option<i64> {
    let seconds: i64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    seconds.checked_mul(1_000_000_000)
}

fn node_memory(info: &str) -> Memory {
    let bytes = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let (total, free) = (bytes("MemTotal"), bytes("MemFree"));
    let usage = total.zip(free).and_then(|(total, free)| total.checked_sub(free));
    let working_set = usage.map(|usage| usage.saturating_sub(bytes("Inactive(file)").unwrap_or(0)));
    Memory {
        working_set,
        usage,
        rss: bytes("AnonPages"),
        available: total.zip(working_set).map(|(total, used)| total.saturating_sub(used)),
    }
}

fn disk_of(disk: &rustix::fs::StatVfs) -> Disk {
    let capacity = disk.f_blocks.saturating_mul(disk.f_frsize);
    Disk {
        capacity,
        available: disk.f_bavail.saturating_mul(disk.f_frsize),
        used: capacity.saturating_sub(disk.f_bfree.saturating_mul(disk.f_frsize)),
        inodes: disk.f_files,
        inodes_free: disk.f_ffree,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_figures_are_read_as_kubelet_does() {
        let stat = "cpu  100 20 30 4000 50 6 7 8 9 10\ncpu0 1 2 3\nbtime 1700000000\n";
        assert_eq!(cpu_nanos(stat), Some(171 * 10_000_000));
        assert_eq!(booted(stat), Some(1_700_000_000_000_000_000));
        let info =
            "MemTotal:       1000 kB\nMemFree:         200 kB\nInactive(file):  300 kB\nAnonPages: 50 kB\n";
        let memory = node_memory(info);
        assert_eq!(memory.usage, Some(800 << 10));
        assert_eq!(memory.working_set, Some(500 << 10));
        assert_eq!((memory.available, memory.rss), (Some(500 << 10), Some(50 << 10)));
        assert_eq!(node_memory(""), Memory::default());
        assert_eq!(cpu_nanos("cpu"), None);
    }

    #[test]
    fn a_rate_is_of_what_was_used_between_two_readings() {
        let mut rate = Rate::default();
        rate.enter(1_000_000_000, 500);
        assert_eq!(rate.rate, None);
        rate.enter(3_000_000_000, 500 + 1_000_000_000);
        assert_eq!(rate.rate, Some(500_000_000), "half a processor");
        rate.enter(3_000_000_001, 501 + 1_000_000_000);
        assert_eq!(rate.rate, Some(500_000_000), "too soon to say");
        rate.enter(9_000_000_000, 7);
        assert_eq!(rate.rate, None, "it was started anew");
    }
}
