//! Control groups of pods: `kubepods[/<class>]/pod<uid>`, as kubelet names them, so that tools find them.
//!
//! Where the runtime makes groups itself through the file system, the group of a pod is ours: its limits hold for
//! all of its containers together. Where systemd makes them, slices come into being with the first container, and
//! go with the last.
//!
//! Everything here blocks on the kernel's file systems, and may be repeated.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use k8s_openapi::api::core::v1::Pod;

use crate::{
    make::{
        names,
        qos::{Qos, qos},
        resources::{Declared, PERIOD, SHARES_MAX, SHARES_MIN, pod_requests, quota, shares},
    },
    quantity::Milli,
};

/// The group of all pods.
const ROOT: &str = "kubepods";

/// Who makes groups; the runtime must be configured alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Driver {
    /// The runtime and we, in the file system.
    #[default]
    Cgroupfs,
    /// systemd, by slices.
    Systemd,
}

/// Where the machine's control groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    driver: Driver,
    mounts: Mounts,
    swap: bool,
    huge_pages: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Mounts {
    None,
    /// Controllers and where each is mounted, version 1. A named hierarchy has no controller.
    Split(Vec<(Vec<String>, PathBuf)>),
    /// Version 2.
    Unified(PathBuf),
}

impl Layout {
    /// What this machine has.
    #[must_use]
    pub fn find(driver: Driver) -> Self {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut found = Self::of_mounts(driver, &text);
        let has = |path: &str| Path::new(path).exists();
        found.swap = match &found.mounts {
            Mounts::Split(_) => found
                .of_controller("memory")
                .is_some_and(|at| at.join("memory.memsw.limit_in_bytes").exists()),
            // Only groups below the root have the file; the kernel has it where it can swap at all.
            Mounts::Unified(_) => has("/proc/swaps"),
            Mounts::None => false,
        };
        // Without the controller a limit would be refused, even one of nothing.
        if found.of_controller("hugetlb").is_some() {
            let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
            let sizes = sizes.filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()
            });
            found.huge_pages = sizes.map(|kib| kib * 1024).collect();
            found.huge_pages.sort_unstable();
        }
        found
    }

    /// No groups: the runtime does as it likes.
    #[must_use]
    pub fn none() -> Self {
        Self { driver: Driver::Cgroupfs, mounts: Mounts::None, swap: false, huge_pages: Vec::new() }
    }

    fn of_mounts(driver: Driver, mountinfo: &str) -> Self {
        let mut split: Vec<(Vec<String>, PathBuf)> = Vec::new();
        let mut unified = None;
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let Some(at) = before.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut after = after.split(' ');
            match after.next() {
                Some("cgroup") => {
                    let options = after.nth(1).unwrap_or_default().split(',');
                    let known = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr" | "clone_children");
                    let names = options.filter(known).filter(|option| !option.contains('='));
                    split.push((names.map(str::to_owned).collect(), at));
                }
                Some("cgroup2") => unified = unified.or(Some(at)),
                _ => {}
            }
        }
        let mounts = match unified {
            Some(at) if split.is_empty() => Mounts::Unified(at),
            // Mounted beside version 1 it has no controllers, but runtimes make their groups there too.
            Some(at) => {
                split.push((Vec::new(), at));
                Mounts::Split(split)
            }
            None if split.is_empty() => Mounts::None,
            None => Mounts::Split(split),
        };
        Self { driver, mounts, swap: false, huge_pages: Vec::new() }
    }

    /// Whether all controllers stand in one tree: version 2.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        matches!(self.mounts, Mounts::Unified(_))
    }

    /// Whether a group's swap can be limited.
    #[must_use]
    pub fn accounts_swap(&self) -> bool {
        self.swap
    }

    /// Sizes of huge pages that the machine has and can limit, bytes.
    #[must_use]
    pub fn huge_pages(&self) -> &[u64] {
        &self.huge_pages
    }

    /// The group of a pod, as its sandbox's configuration names it; empty where there are none.
    #[must_use]
    pub fn parent(&self, pod: &Pod) -> String {
        if self.mounts == Mounts::None {
            return String::new();
        }
        let uid = names::text(&pod.metadata.uid);
        let class = match qos(pod) {
            Qos::Guaranteed => "",
            Qos::Burstable => "burstable",
            Qos::BestEffort => "besteffort",
        };
        match self.driver {
            Driver::Cgroupfs if class.is_empty() => format!("/{ROOT}/pod{uid}"),
            Driver::Cgroupfs => format!("/{ROOT}/{class}/pod{uid}"),
            // A dash is a step down in names of slices.
            Driver::Systemd => {
                let uid = uid.replace('-', "_");
                if class.is_empty() {
                    format!("/{ROOT}.slice/{ROOT}-pod{uid}.slice")
                } else {
                    format!("/{ROOT}.slice/{ROOT}-{class}.slice/{ROOT}-{class}-pod{uid}.slice")
                }
            }
        }
    }

    /// Makes the group of a pod with the limits that hold for all of it.
    pub fn create(&self, pod: &Pod) -> io::Result<()> {
        if self.driver == Driver::Systemd || self.mounts == Mounts::None {
            return Ok(());
        }
        let parent = self.parent(pod);
        let group = parent.trim_start_matches('/');
        let requests = pod_requests(pod);
        let limits = Declared::of(pod);
        let weight = match qos(pod) {
            Qos::BestEffort => SHARES_MIN,
            Qos::Guaranteed | Qos::Burstable => shares(requests.get("cpu").copied().unwrap_or_default()),
        };
        match &self.mounts {
            Mounts::None => {}
            Mounts::Split(_) => {
                if let Some(root) = self.of_controller("cpu") {
                    let at = root.join(group);
                    fs::create_dir_all(&at)?;
                    fs::write(at.join("cpu.shares"), weight.to_string())?;
                    if let Some(limit) = limits.cpu {
                        fs::write(at.join("cpu.cfs_period_us"), PERIOD.to_string())?;
                        fs::write(at.join("cpu.cfs_quota_us"), quota(limit).to_string())?;
                    }
                }
                if let Some(root) = self.of_controller("memory") {
                    let at = root.join(group);
                    fs::create_dir_all(&at)?;
                    if let Some(limit) = limits.memory {
                        fs::write(at.join("memory.limit_in_bytes"), limit.units().to_string())?;
                    }
                }
            }
            Mounts::Unified(root) => {
                let at = root.join(group);
                fs::create_dir_all(&at)?;
                let above: Vec<&Path> =
                    at.ancestors().skip(1).take_while(|above| above.starts_with(root)).collect();
                for above in above.into_iter().rev() {
                    enable_controllers(above)?;
                }
                fs::write(at.join("cpu.weight"), unified_weight(weight).to_string())?;
                if let Some(limit) = limits.cpu {
                    fs::write(at.join("cpu.max"), format!("{} {PERIOD}", quota(limit)))?;
                }
                if let Some(limit) = limits.memory {
                    fs::write(at.join("memory.max"), limit.units().to_string())?;
                }
            }
        }
        self.balance()
    }

    /// Gives the class of pods that ask for something the weight of all of them together, and all pods that of the
    /// machine's processors. Read from what stands there, so that it is right whoever made the groups, and when.
    fn balance(&self) -> io::Result<()> {
        let (root, file) = match &self.mounts {
            Mounts::None => return Ok(()),
            Mounts::Split(_) => match self.of_controller("cpu") {
                Some(root) => (root.join(ROOT), "cpu.shares"),
                None => return Ok(()),
            },
            Mounts::Unified(root) => (root.join(ROOT), "cpu.weight"),
        };
        let is_unified = self.is_unified();
        let write = |folder: &Path, shares: i64| {
            let value = if is_unified { unified_weight(shares) } else { shares };
            match fs::write(folder.join(file), value.to_string()) {
                // No such pod was ever here.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                done => done,
            }
        };
        let class = root.join("burstable");
        let pods = fs::read_dir(&class).into_iter().flatten().flatten();
        let pods = pods.filter(|entry| entry.file_name().to_string_lossy().starts_with("pod"));
        // One may go while this is read.
        let weights =
            pods.filter_map(|pod| fs::read_to_string(pod.path().join(file)).ok()?.trim().parse().ok());
        let together: i64 =
            weights.map(|weight| if is_unified { shares_of_weight(weight) } else { weight }).sum();
        write(&class, together.clamp(SHARES_MIN, SHARES_MAX))?;
        write(&root.join("besteffort"), SHARES_MIN)?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        write(&root, shares(Milli::whole(processors as u64)))
    }

    /// Removes every group of this pod. Fails while something runs in one.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        if self.driver == Driver::Systemd || !is_one_name(uid) {
            return Ok(());
        }
        for folder in self.classes() {
            remove_groups(&folder.join(format!("pod{uid}")))?;
        }
        self.balance()
    }

    /// Uids of pods that have groups here.
    #[must_use]
    pub fn pods(&self) -> BTreeSet<String> {
        if self.driver == Driver::Systemd {
            return BTreeSet::new();
        }
        let entries =
            self.classes().into_iter().flat_map(|folder| fs::read_dir(folder).into_iter().flatten());
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| name.strip_prefix("pod").map(str::to_owned)).collect()
    }

    fn of_controller(&self, name: &str) -> Option<PathBuf> {
        match &self.mounts {
            Mounts::None => None,
            Mounts::Split(all) => {
                let found = all.iter().find(|(controllers, _)| controllers.iter().any(|known| known == name));
                found.map(|(_, at)| at.clone())
            }
            Mounts::Unified(root) => {
                let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
                controllers.split_whitespace().any(|known| known == name).then(|| root.clone())
            }
        }
    }

    /// Folders in which groups of pods stand, in every hierarchy.
    fn classes(&self) -> Vec<PathBuf> {
        let roots: Vec<&PathBuf> = match &self.mounts {
            Mounts::None => Vec::new(),
            Mounts::Split(all) => all.iter().map(|(_, at)| at).collect(),
            Mounts::Unified(root) => vec![root],
        };
        let roots = roots.into_iter().map(|root| root.join(ROOT));
        roots.flat_map(|root| [root.join("besteffort"), root.join("burstable"), root]).collect()
    }
}

/// Weight of version 2 for shares of version 1, as runtimes convert it.
fn unified_weight(shares: i64) -> i64 {
    1 + ((shares - SHARES_MIN) * 9_999) / 262_142
}

/// The other way round.
fn shares_of_weight(weight: i64) -> i64 {
    SHARES_MIN + ((weight - 1) * 262_142) / 9_999
}

fn enable_controllers(group: &Path) -> io::Result<()> {
    let known = fs::read_to_string(group.join("cgroup.controllers"))?;
    let wanted = known
        .split_whitespace()
        .filter(|name| ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"].contains(name));
    let text: Vec<String> = wanted.map(|name| format!("+{name}")).collect();
    fs::write(group.join("cgroup.subtree_control"), text.join(" "))
}

/// A uid comes from an object: it must not lead anywhere else.
pub(crate) fn is_one_name(uid: &str) -> bool {
    !uid.is_empty() && uid != "." && uid != ".." && !uid.contains(['/', '\0'])
}

/// Groups have no files that could be removed: only folders, from below.
fn remove_groups(group: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    match fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::make::fixture::pod;

    const SPLIT: &str = "\
30 23 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const UNIFIED: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";

    fn burstable() -> Pod {
        pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "100m"}}}]}))
    }

    #[test]
    fn both_versions_of_control_groups_are_found_in_the_mounts() {
        let split = Layout::of_mounts(Driver::Cgroupfs, SPLIT);
        assert!(!split.is_unified());
        assert_eq!(split.of_controller("cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(split.of_controller("name=systemd"), None);
        assert_eq!(split.classes().len(), 4 * 3, "named and empty hierarchies too");
        assert!(Layout::of_mounts(Driver::Cgroupfs, UNIFIED).is_unified());
        assert_eq!(Layout::of_mounts(Driver::Cgroupfs, "").parent(&burstable()), "");
    }

    #[test]
    fn a_group_is_named_for_class_and_uid_as_the_driver_has_it() {
        let exact = json!({"cpu": "1", "memory": "1Gi"});
        let guaranteed =
            pod(json!({"containers": [{"name": "c", "resources": {"limits": exact, "requests": exact}}]}));
        let nothing = pod(json!({"containers": [{"name": "c"}]}));
        let files = Layout::of_mounts(Driver::Cgroupfs, UNIFIED);
        assert_eq!(files.parent(&guaranteed), "/kubepods/pod1-2-3");
        assert_eq!(files.parent(&burstable()), "/kubepods/burstable/pod1-2-3");
        assert_eq!(files.parent(&nothing), "/kubepods/besteffort/pod1-2-3");
        let slices = Layout::of_mounts(Driver::Systemd, UNIFIED);
        assert_eq!(slices.parent(&guaranteed), "/kubepods.slice/kubepods-pod1_2_3.slice");
        assert_eq!(
            slices.parent(&burstable()),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2_3.slice"
        );
    }

    /// In a folder instead of the kernel's file system: what is written where.
    #[test]
    fn limits_of_a_pod_are_written_to_its_group_and_the_group_can_be_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let mounts = vec![
            (vec!["cpu".to_owned()], folder.path().join("cpu")),
            (vec!["memory".to_owned()], folder.path().join("memory")),
            (Vec::new(), folder.path().join("systemd")),
        ];
        let layout = Layout { mounts: Mounts::Split(mounts), ..Layout::none() };
        let pod = pod(json!({"containers": [{"name": "c", "resources": {
            "limits": {"cpu": "250m", "memory": "64Mi"}, "requests": {"cpu": "100m", "memory": "32Mi"},
        }}]}));
        layout.create(&pod).expect("made");
        layout.create(&pod).expect("made again");
        let read = |path: &str| fs::read_to_string(folder.path().join(path)).expect("written");
        let at = "kubepods/burstable/pod1-2-3";
        assert_eq!(read(&format!("cpu/{at}/cpu.shares")), "102");
        assert_eq!(read(&format!("cpu/{at}/cpu.cfs_quota_us")), "25000");
        assert_eq!(read(&format!("cpu/{at}/cpu.cfs_period_us")), "100000");
        assert_eq!(read(&format!("memory/{at}/memory.limit_in_bytes")), "67108864");
        assert_eq!(read("cpu/kubepods/burstable/cpu.shares"), "102", "of all its pods together");

        fs::create_dir_all(folder.path().join("systemd").join(at).join("container")).expect("a group");
        assert_eq!(layout.pods(), ["1-2-3".to_owned()].into());
        for file in ["cpu/X/cpu.shares", "cpu/X/cpu.cfs_quota_us", "cpu/X/cpu.cfs_period_us"] {
            fs::remove_file(folder.path().join(file.replace('X', at)))
                .expect("the kernel's files go by themselves");
        }
        fs::remove_file(folder.path().join(format!("memory/{at}/memory.limit_in_bytes"))).expect("removed");
        layout.remove("1-2-3").expect("removed");
        layout.remove("1-2-3").expect("removed again");
        assert_eq!(layout.pods(), BTreeSet::new());
    }

    #[test]
    fn weights_convert_as_runtimes_convert_them() {
        assert_eq!([2, 1024, 262_144].map(unified_weight), [1, 39, 10_000]);
        assert_eq!([1, 39, 10_000].map(shares_of_weight), [2, 998, 262_144]);
    }
}
