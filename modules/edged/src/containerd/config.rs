//! What containerd and its network plugins are told: text from settings, nothing else.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::install::Installed;

/// The kernel allows 107 bytes for the path of a socket, so what is short-lived is not below the data folder.
const RUN: &str = "/run/octobus";
/// Where operators put mirrors and certificates of registries.
const REGISTRIES: &str = "/etc/containerd/certs.d";
/// Bit of CAP_SYS_RESOURCE.
const CAP_SYS_RESOURCE: u32 = 24;

/// Where everything of one private containerd is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// Short and of this data folder alone: it names the bridge and the folder below `/run`.
    pub(super) id: String,
    /// What outlives a reboot: `DATA/edged/containerd`.
    pub(super) folder: PathBuf,
    /// What does not.
    pub(super) run: PathBuf,
}

impl Layout {
    /// For the data folder of a node, which has to be there.
    pub(super) fn new(data: &Path) -> std::io::Result<Self> {
        let data = data.canonicalize()?;
        let hash = Sha256::digest(data.as_os_str().as_encoded_bytes());
        let id = hash[..5].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let run = Path::new(RUN).join(&id);
        Ok(Self { id, folder: data.join("edged/containerd"), run })
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.run.join("containerd.sock")
    }

    pub(super) fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    pub(super) fn config(&self) -> PathBuf {
        self.folder.join("config.toml")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.folder.join("containerd.log")
    }

    /// Which process it is.
    pub(super) fn process(&self) -> PathBuf {
        self.run.join("process")
    }

    pub(super) fn networks(&self) -> PathBuf {
        self.folder.join("cni")
    }

    pub(super) fn network(&self) -> PathBuf {
        self.networks().join("10-octobus.conflist")
    }

    /// 15 bytes at most, as for every network interface.
    pub(super) fn bridge(&self) -> String {
        format!("octo{}", self.id)
    }
}

/// What of the machine decides about the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    /// overlayfs works on the disk of the data folder.
    pub(super) overlayfs: bool,
    /// Scores of the OOM killer may be lowered.
    pub(super) may_lower_scores: bool,
    /// Operators put something for registries in its usual place.
    pub(super) registries: bool,
}

impl Machine {
    pub(super) fn of(overlayfs: bool) -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self {
            overlayfs,
            may_lower_scores: has_capability(&status, CAP_SYS_RESOURCE),
            registries: Path::new(REGISTRIES).is_dir(),
        }
    }

    pub(super) const fn snapshotter(self) -> &'static str {
        if self.overlayfs { "overlayfs" } else { "native" }
    }
}

fn has_capability(status: &str, bit: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> bit & 1 == 1)
}

/// containerd's configuration. Control groups are made by runc itself and not by systemd, because the agent names
/// pods' parents by path.
pub(super) fn containerd(
    layout: &Layout,
    installed: &Installed,
    machine: Machine,
    sandbox_image: &str,
) -> String {
    let registries = if machine.registries {
        format!("[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = {}\n", text(REGISTRIES))
    } else {
        String::new()
    };
    format!(
        r#"# Written by octobus at every start: changes are lost.
version = 2
root = {root}
state = {state}
# What there is no disk for here, and what only writes warnings.
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[debug]
level = "info"

[grpc]
address = {socket}

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = {sandbox_image}
stream_server_address = "127.0.0.1"
stream_server_port = "0"
restrict_oom_score_adj = {restrict}

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = {plugins}
conf_dir = {networks}

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
BinaryName = {runc}
SystemdCgroup = false
{registries}"#,
        root = path(&layout.root()),
        state = path(&layout.run.join("state")),
        socket = path(&layout.socket()),
        sandbox_image = text(sandbox_image),
        restrict = !machine.may_lower_scores,
        plugins = path(&installed.plugins),
        networks = path(&layout.networks()),
        snapshotter = machine.snapshotter(),
        runc = path(&installed.runc),
    )
}

/// The network of pods: a bridge of this data folder's own, addresses out of `subnet`, ports of the machine that lead
/// to pods, and addresses translated on the way out.
pub(super) fn network(layout: &Layout, installed: &Installed, subnet: Subnet) -> String {
    let mut plugins = vec![
        json!({
            "type": "bridge",
            "bridge": layout.bridge(),
            "isGateway": true,
            "ipMasq": true,
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                // Reservations are as short-lived as what they are for.
                "dataDir": layout.run.join("addresses"),
                "ranges": [[{ "subnet": subnet.to_string() }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }),
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
    ];
    if installed.firewall {
        plugins.push(json!({ "type": "firewall" }));
    }
    let list = json!({ "cniVersion": "0.4.0", "name": "octobus", "plugins": plugins });
    format!("{list:#}\n")
}

/// A network of 254 addresses within 10.128.0.0/9.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Subnet(u32);

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/24", Ipv4Addr::from_bits(self.0))
    }
}

impl Subnet {
    /// The one that an earlier start wrote: pods that still run have its addresses.
    pub(super) fn written(network: &str) -> Option<Self> {
        let list: serde_json::Value = serde_json::from_str(network).ok()?;
        let subnet = list["plugins"][0]["ipam"]["ranges"][0][0]["subnet"].as_str()?;
        let address: Ipv4Addr = subnet.strip_suffix("/24")?.parse().ok()?;
        Some(Self(address.to_bits()))
    }

    /// The first one, in an order that the layout decides, that no route of the machine meets. `routes` is what
    /// `/proc/net/route` says.
    pub(super) fn free(layout: &Layout, routes: &str) -> Self {
        let taken: Vec<(u32, u32)> = routes.lines().filter_map(route).collect();
        let seed = u32::from_str_radix(&layout.id[..6], 16).unwrap_or(0);
        let candidate = |n: u32| Self(0x0a80_0000 | ((seed.wrapping_add(n) & 0x7fff) << 8));
        // Two networks meet if they are the same in the bits that both fix.
        let meets = |subnet: Self| taken.iter().any(|(net, mask)| (subnet.0 ^ net) & mask & !0xff == 0);
        (0..0x8000).map(candidate).find(|subnet| !meets(*subnet)).unwrap_or_else(|| candidate(0))
    }
}

/// Network and mask of a line; none for the default route, which meets everything and takes nothing.
fn route(line: &str) -> Option<(u32, u32)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok().map(u32::from_be);
    let (net, mask) = (number(1)?, number(7)?);
    (mask != 0).then_some((net, mask))
}

/// A string of TOML: JSON's escapes are also TOML's.
fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

fn path(value: &Path) -> String {
    text(&value.to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(data: &Path) -> Layout {
        Layout::new(data).expect("a layout")
    }

    fn installed() -> Installed {
        Installed {
            containerd: "/usr/bin/containerd".into(),
            ctr: "/usr/bin/ctr".into(),
            runc: "/usr/sbin/runc".into(),
            plugins: "/usr/lib/cni".into(),
            firewall: true,
            path: "/usr/bin".to_owned(),
        }
    }

    #[test]
    fn sockets_stay_short_however_deep_the_data_folder_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).expect("made");
        let layout = layout(&deep);
        let ttrpc = format!("{}.ttrpc", layout.socket().display());
        assert!(ttrpc.len() <= 107, "{ttrpc}");
        assert!(layout.bridge().len() <= 15);
    }

    #[test]
    fn scores_are_restricted_where_they_cannot_be_lowered() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_SYS_RESOURCE));
        assert!(!has_capability("CapEff:\t000001fffeffffff\n", CAP_SYS_RESOURCE));
        assert!(!has_capability("", CAP_SYS_RESOURCE));
        let folder = tempfile::tempdir().expect("a folder");
        let layout = layout(folder.path());
        let machine = Machine { overlayfs: false, may_lower_scores: false, registries: false };
        let config = containerd(&layout, &installed(), machine, "octobus.local/pause:1");
        assert!(config.contains("restrict_oom_score_adj = true"), "{config}");
        assert!(config.contains("snapshotter = \"native\""), "{config}");
        assert!(!config.contains("config_path"), "{config}");
    }

    #[test]
    fn paths_are_quoted() {
        assert_eq!(path(Path::new("/a \"b\"\\c")), r#""/a \"b\"\\c""#);
    }

    #[test]
    fn two_data_folders_get_two_bridges_and_no_network_that_is_in_use() {
        let (one, two) = (tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two"));
        let (one, two) = (layout(one.path()), layout(two.path()));
        assert_ne!(one.bridge(), two.bridge());
        let header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let default = "eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        let alone = Subnet::free(&one, &format!("{header}{default}"));
        // The kernel writes addresses in the order of the machine's bytes.
        let used = format!("octo\t{:08X}\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n", alone.0.to_be());
        let other = Subnet::free(&one, &format!("{header}{default}{used}"));
        assert_ne!(alone, other);
        assert_eq!(other, Subnet::free(&one, &used), "the choice is the same at every start");
        let wide = "vpn\t0000800A\t00000000\t0001\t0\t0\t0\t0000C0FF\t0\t0\t0\n";
        let beyond = Subnet::free(&one, wide);
        assert!(Ipv4Addr::from_bits(beyond.0).octets()[1] >= 192, "{beyond}");
    }

    #[test]
    fn the_network_that_was_written_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let layout = layout(folder.path());
        let subnet = Subnet(0x0a81_0200);
        let written = network(&layout, &installed(), subnet);
        assert_eq!(Subnet::written(&written), Some(subnet));
        assert_eq!(subnet.to_string(), "10.129.2.0/24");
        assert_eq!(Subnet::written("{}"), None);
        assert!(written.contains("\"firewall\""), "{written}");
    }
}
