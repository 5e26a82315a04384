//! What the machine is, and what it has left: from `/proc`, `/sys` and `/etc`.

use std::{collections::BTreeMap, fs, io, path::Path};

use rustix::{fs::statvfs, system::uname};

/// What does not change while the machine runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory: u64,
    /// Memory that is set aside as huge pages, bytes, by size (`2Mi`).
    pub huge_pages: BTreeMap<String, u64>,
    /// As Go names it: `amd64`.
    pub architecture: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Name and version of the distribution.
    pub os_image: String,
    /// Of the installation.
    pub machine_id: String,
    /// Of this boot.
    pub boot_id: String,
    /// Of the hardware, where it has one.
    pub system_uuid: String,
}

/// How full a disk is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    /// All of it.
    pub bytes: u64,
    /// What whoever is not root can still write.
    pub bytes_free: u64,
    /// Files that it can hold; 0: any number.
    pub inodes: u64,
    /// Files that it can still hold.
    pub inodes_free: u64,
}

/// What the machine has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes that can be had without swapping.
    pub memory_available: u64,
    /// Where pods write.
    pub disk: Disk,
    /// Where images are, if it is elsewhere.
    pub images: Option<Disk>,
    /// Processes and threads.
    pub pids: u64,
    /// Most that there can be.
    pub pids_max: u64,
}

impl Machine {
    /// Reads it. What cannot be read is empty.
    #[must_use]
    pub fn read() -> Self {
        let system = uname();
        let text =
            |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
        let machine_id = Some(text("/etc/machine-id")).filter(|id| !id.is_empty());
        let machine_id = machine_id.unwrap_or_else(|| text("/var/lib/dbus/machine-id"));
        let uuid = Some(text("/sys/class/dmi/id/product_uuid")).filter(|id| !id.is_empty());
        Self {
            cpus: count_range(&text("/sys/devices/system/cpu/online")).max(1),
            memory: meminfo(&text("/proc/meminfo"), "MemTotal"),
            huge_pages: huge_pages(Path::new("/sys/kernel/mm/hugepages")),
            architecture: architecture(&system.machine().to_string_lossy()),
            kernel: system.release().to_string_lossy().into_owned(),
            os_image: os_image(&text("/etc/os-release")),
            boot_id: text("/proc/sys/kernel/random/boot_id"),
            system_uuid: uuid.unwrap_or_else(|| machine_id.clone()),
            machine_id,
        }
    }
}

impl Load {
    /// Reads it. `folder` is where pods write, `images` where the runtime says that images are. Blocking.
    pub fn read(folder: &Path, images: Option<&Path>) -> io::Result<Self> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let threads = text("/proc/loadavg").split([' ', '/']).nth(4).and_then(|count| count.parse().ok());
        let most = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"];
        let most = most.iter().filter_map(|path| text(path).trim().parse().ok()).min();
        Ok(Self {
            memory_available: meminfo(&text("/proc/meminfo"), "MemAvailable"),
            disk: Disk::read(folder)?,
            images: images.and_then(|images| Disk::read(images).ok()),
            pids: threads.unwrap_or(0),
            pids_max: most.unwrap_or(0),
        })
    }
}

impl Disk {
    /// The disk on which this is.
    pub fn read(path: &Path) -> io::Result<Self> {
        let found = statvfs(path)?;
        Ok(Self {
            bytes: found.f_blocks.saturating_mul(found.f_frsize),
            bytes_free: found.f_bavail.saturating_mul(found.f_frsize),
            inodes: found.f_files,
            inodes_free: found.f_favail,
        })
    }
}

/// A line of `/proc/meminfo`, bytes.
fn meminfo(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib =
        line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// How many `0-3,5` are.
fn count_range(text: &str) -> u32 {
    let count = |part: &str| -> Option<u32> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    text.split(',').filter_map(count).sum()
}

fn huge_pages(folder: &Path) -> BTreeMap<String, u64> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let pages = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?;
        let bytes = kib.checked_mul(1024)?.checked_mul(pages.trim().parse().ok()?)?;
        let size = match kib {
            kib if kib % (1 << 20) == 0 => format!("{}Gi", kib >> 20),
            kib if kib % (1 << 10) == 0 => format!("{}Mi", kib >> 10),
            kib => format!("{kib}Ki"),
        };
        Some((size, bytes))
    });
    found.collect()
}

fn architecture(machine: &str) -> String {
    let known = match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "i386" | "i586" | "i686" => "386",
        arm if arm.starts_with("armv") => "arm",
        "ppc64le" | "riscv64" | "s390x" => machine,
        other => other,
    };
    known.to_owned()
}

fn os_image(release: &str) -> String {
    let line = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.map(|name| name.trim_matches(['"', '\'']).to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read_as_it_writes_them() {
        let table = "MemTotal:       16384256 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(meminfo(table, "MemTotal"), 16_384_256 * 1024);
        assert_eq!(meminfo(table, "MemAvailable"), 8192 * 1024);
        assert_eq!(meminfo(table, "Mem"), 0);
        assert_eq!(["0", "0-3", "0-1,4,6-7", "", "3-1"].map(count_range), [1, 4, 5, 0, 0]);
        assert_eq!(os_image("ID=debian\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert_eq!(
            ["x86_64", "aarch64", "armv7l", "riscv64"].map(architecture),
            ["amd64", "arm64", "arm", "riscv64"]
        );
    }

    #[test]
    fn huge_pages_are_named_by_size() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, pages) in [("hugepages-2048kB", "3\n"), ("hugepages-1048576kB", "1\n"), ("other", "1\n")] {
            fs::create_dir(folder.path().join(name)).expect("made");
            fs::write(folder.path().join(name).join("nr_hugepages"), pages).expect("written");
        }
        let found: Vec<_> = huge_pages(folder.path()).into_iter().collect();
        assert_eq!(found, [("1Gi".to_owned(), 1 << 30), ("2Mi".to_owned(), 6 << 20)]);
    }

    #[test]
    fn this_machine_is_one() {
        let machine = Machine::read();
        assert!(machine.cpus > 0 && machine.memory > 0, "{machine:?}");
        assert!(
            !machine.kernel.is_empty() && !machine.architecture.is_empty() && !machine.boot_id.is_empty()
        );
        let load = Load::read(Path::new("/"), None).expect("read");
        assert!(load.memory_available > 0 && load.memory_available <= machine.memory);
        assert!(
            load.disk.bytes >= load.disk.bytes_free && load.pids > 0 && load.pids_max >= load.pids,
            "{load:?}"
        );
    }
}
