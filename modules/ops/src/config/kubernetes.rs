//! `[kubernetes]`: the API server whose pods the tier's nodes run.

use std::path::PathBuf;

use super::{
    Role,
    layers::{Key, Layers},
    units,
};

/// What a hub's bridge to Kubernetes is configured with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubernetes {
    /// The API server; `None`: the hub's own, if it serves one, else no bridge.
    pub cluster: Option<Cluster>,
    /// Addresses or names at which the hub answers for its nodes, published as theirs.
    pub addresses: Vec<String>,
    /// CA of clients of `listen.kubelet` that show a certificate, as the API server does.
    pub client_ca: Option<PathBuf>,
    /// Writes to the API server per second, Leases not counted.
    pub writes_per_second: u32,
}

/// How a hub reaches a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cluster {
    /// By a kubeconfig.
    Kubeconfig(PathBuf),
    /// It runs in it, and uses its service account.
    Within,
}

const KUBECONFIG: Key =
    Key { path: "kubernetes.kubeconfig", env: "OCTOBUS_KUBECONFIG", flag: "--kubeconfig" };
const ADDRESSES: Key = Key { path: "kubernetes.addresses", env: "OCTOBUS_KUBERNETES_ADDRESSES", flag: "" };
const CLIENT_CA: Key = Key { path: "kubernetes.client_ca", env: "OCTOBUS_KUBERNETES_CLIENT_CA", flag: "" };
const WRITES: Key =
    Key { path: "kubernetes.writes_per_second", env: "OCTOBUS_KUBERNETES_WRITES_PER_SECOND", flag: "" };

/// What says that this process runs in a cluster.
const IN_CLUSTER: &str = "in-cluster";

/// Flags that a node does not know.
pub(super) const FLAGS: [Key; 1] = [KUBECONFIG];

/// Reads the section. Only a hub has a cluster.
pub(super) fn read(role: Role, layers: &mut Layers) -> Kubernetes {
    let cluster = layers.take(KUBECONFIG, |text| match text {
        "" => Err("is empty; name a file, or write \"in-cluster\"".to_owned()),
        IN_CLUSTER => Ok(Cluster::Within),
        path => Ok(Cluster::Kubeconfig(PathBuf::from(path))),
    });
    let rate = |text: &str| units::count(text, 1, 10_000).map(|rate| u32::try_from(rate).unwrap_or(10_000));
    Kubernetes {
        cluster: cluster.filter(|_| role != Role::Edge),
        addresses: layers.take_list(ADDRESSES, address).unwrap_or_default(),
        client_ca: layers.take(CLIENT_CA, super::path),
        writes_per_second: layers.take(WRITES, rate).unwrap_or(50),
    }
}

/// Refuses a cluster where it cannot be used.
pub(super) fn check(kubernetes: &Kubernetes, serves: bool, in_tier: bool, layers: &mut Layers) {
    if kubernetes.cluster.is_none() {
        return;
    }
    let mut mistake = |what: &str| {
        let place = layers.name(KUBECONFIG);
        layers.mistake(place, what.to_owned());
    };
    if serves {
        mistake(
            "names a cluster, but listen.kubernetes makes this hub serve an API of its own: set that to \"off\", or \
             leave this out",
        );
    }
    if in_tier {
        mistake(
            "is of a single hub: a replica of a tier (fabric.servers) has no bridge to Kubernetes yet; leave it out",
        );
    }
}

fn address(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-:".contains(c);
    if (1..=253).contains(&text.len()) && text.chars().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("not an address; write an IP address or a DNS name, without a port".to_owned())
    }
}

/// As it stands in the file.
pub(super) fn show(kubernetes: &Kubernetes) -> toml::Table {
    let text = |text: &str| toml::Value::String(text.to_owned());
    let mut table = toml::Table::new();
    match &kubernetes.cluster {
        Some(Cluster::Kubeconfig(path)) => {
            table.insert("kubeconfig".to_owned(), text(&path.display().to_string()));
        }
        Some(Cluster::Within) => drop(table.insert("kubeconfig".to_owned(), text(IN_CLUSTER))),
        None => {}
    }
    if let Some(path) = &kubernetes.client_ca {
        table.insert("client_ca".to_owned(), text(&path.display().to_string()));
    }
    let addresses = kubernetes.addresses.iter().map(|address| text(address)).collect();
    table.insert("addresses".to_owned(), toml::Value::Array(addresses));
    table.insert("writes_per_second".to_owned(), toml::Value::Integer(kubernetes.writes_per_second.into()));
    table
}
