//! `[edged]`: the pods of a node.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use super::{
    Role, as_usize,
    layers::{Key, Layers},
    units,
};

/// What a node's agent for pods is configured with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edged {
    /// Which container runtime.
    pub runtime: Runtime,
    /// Where there is no socket, start a containerd of the node's own, which ends with it: in dev.
    pub private: bool,
    /// Folder of archives of images, which such a containerd imports when it starts.
    pub images: PathBuf,
    /// Folder of static pods; `None`: there are none.
    pub static_pods: Option<PathBuf>,
    /// Pods at a time.
    pub max_pods: usize,
    /// Image of sandboxes of a containerd of the node's own; `None`: one that is built in.
    pub sandbox_image: Option<String>,
    /// Name servers that pods ask; empty: the node's.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain that pods look names up in.
    pub cluster_domain: String,
}

/// Which container runtime a node uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runtime {
    /// A socket where packages put it; in dev else a containerd of the node's own.
    Auto,
    /// None: the node runs no pods.
    Off,
    /// This socket.
    Socket(PathBuf),
}

const RUNTIME: Key = Key { path: "edged.runtime", env: "OCTOBUS_EDGED_RUNTIME", flag: "" };
const STATIC_PODS: Key = Key { path: "edged.static_pods", env: "OCTOBUS_EDGED_STATIC_PODS", flag: "" };
const MAX_PODS: Key = Key { path: "edged.max_pods", env: "OCTOBUS_EDGED_MAX_PODS", flag: "" };
const SANDBOX_IMAGE: Key = Key { path: "edged.sandbox_image", env: "OCTOBUS_EDGED_SANDBOX_IMAGE", flag: "" };
const CLUSTER_DNS: Key = Key { path: "edged.cluster_dns", env: "OCTOBUS_EDGED_CLUSTER_DNS", flag: "" };
const CLUSTER_DOMAIN: Key =
    Key { path: "edged.cluster_domain", env: "OCTOBUS_EDGED_CLUSTER_DOMAIN", flag: "" };

/// As many as a kubelet runs, unless told otherwise.
const PODS: usize = 110;
const DOMAIN: &str = "cluster.local";

/// Reads the section. A hub has no use for it, but one file may serve all roles.
pub(super) fn read(role: Role, data: &Path, layers: &mut Layers) -> Edged {
    let image = |text: &str| match text {
        "" => Err("is empty; name an image, or leave it out".to_owned()),
        image => Ok(image.to_owned()),
    };
    let address = |text: &str| {
        text.parse().map_err(|_| "not an IP address; name servers are named by address".to_owned())
    };
    Edged {
        runtime: layers.take(RUNTIME, runtime).unwrap_or(Runtime::Auto),
        private: role == Role::Dev,
        images: data.join("images"),
        static_pods: layers.take(STATIC_PODS, super::folder),
        max_pods: layers
            .take(MAX_PODS, |text| units::count(text, 1, 1_000).and_then(as_usize))
            .unwrap_or(PODS),
        sandbox_image: layers.take(SANDBOX_IMAGE, image),
        cluster_dns: layers.take_list(CLUSTER_DNS, address).unwrap_or_default(),
        cluster_domain: layers.take(CLUSTER_DOMAIN, domain).unwrap_or_else(|| DOMAIN.to_owned()),
    }
}

fn runtime(text: &str) -> Result<Runtime, String> {
    match text {
        "auto" => Ok(Runtime::Auto),
        "off" => Ok(Runtime::Off),
        socket => match socket.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') => Ok(Runtime::Socket(PathBuf::from(path))),
            _ => Err("not a runtime; write \"auto\", \"off\" or \"unix:///path/of/its.sock\"".to_owned()),
        },
    }
}

fn domain(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if text.len() <= 253 && text.chars().all(plain) {
        Ok(text.to_owned())
    } else {
        Err("not a domain; write a-z, 0-9, - and ., or nothing for none".to_owned())
    }
}

/// As it stands in the file.
pub(super) fn show(edged: &Edged) -> toml::Table {
    let text = |text: &str| toml::Value::String(text.to_owned());
    let runtime = match &edged.runtime {
        Runtime::Auto => "auto".to_owned(),
        Runtime::Off => "off".to_owned(),
        Runtime::Socket(path) => format!("unix://{}", path.display()),
    };
    let mut table = toml::Table::new();
    table.insert("runtime".to_owned(), text(&runtime));
    if let Some(folder) = &edged.static_pods {
        table.insert("static_pods".to_owned(), text(&folder.display().to_string()));
    }
    let pods = i64::try_from(edged.max_pods).unwrap_or(i64::MAX);
    table.insert("max_pods".to_owned(), toml::Value::Integer(pods));
    if let Some(image) = &edged.sandbox_image {
        table.insert("sandbox_image".to_owned(), text(image));
    }
    let servers = edged.cluster_dns.iter().map(|address| text(&address.to_string())).collect();
    table.insert("cluster_dns".to_owned(), toml::Value::Array(servers));
    table.insert("cluster_domain".to_owned(), text(&edged.cluster_domain));
    table
}
