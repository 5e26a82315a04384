//! What has to be installed on a machine that runs containers, and where it is.

use std::{
    env, fmt, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Folders of programs that a service's own search path may lack.
const MORE_FOLDERS: [&str; 5] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin"];
/// Where distributions, and Kubernetes' own packages, put network plugins.
const PLUGIN_FOLDERS: [&str; 4] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni", "/usr/local/lib/cni"];
/// The network plugins without which no pod has a network.
const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// Something that is not installed, and which package has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    pub program: &'static str,
    /// The package's name in Debian and Ubuntu.
    pub package: &'static str,
}

/// Why there is no private containerd. The operator has to do what it says.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Programs are missing; the text names the packages to install.
    #[error("containers cannot run here: {} not installed; install: {}", Programs(.0), Packages(.0))]
    Missing(Vec<Missing>),
    /// Containers need root.
    #[error("containers cannot run here: the agent is not root; run it as root, or set edged.runtime")]
    NotRoot,
    /// Files or folders that it needs cannot be made.
    #[error("cannot {doing} {}: {error}", path.display())]
    Files { doing: &'static str, path: PathBuf, error: io::Error },
    /// It was started and does not serve.
    #[error("containerd does not serve: {why}; its log is {}", log.display())]
    NotServing { why: String, log: PathBuf },
    /// No sandbox can be made: there is no image for it.
    #[error("the image of sandboxes cannot be imported: {0}")]
    Pause(String),
}

impl StartError {
    /// For `map_err`: what was done, and to what.
    pub(super) fn files(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Files { doing, path, error }
    }

    /// A word for conditions and events.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Missing(_) => "RuntimeNotInstalled",
            Self::NotRoot => "NotRoot",
            Self::Files { .. } => "RuntimeFilesFailed",
            Self::NotServing { .. } => "RuntimeNotServing",
            Self::Pause(_) => "SandboxImageFailed",
        }
    }
}

struct Programs<'a>(&'a [Missing]);
struct Packages<'a>(&'a [Missing]);

impl fmt::Display for Programs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let programs: Vec<_> = self.0.iter().map(|missing| missing.program).collect();
        let verb = if programs.len() == 1 { "is" } else { "are" };
        write!(f, "{} {verb}", programs.join(", "))
    }
}

impl fmt::Display for Packages<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut packages: Vec<_> = self.0.iter().map(|missing| missing.package).collect();
        packages.sort_unstable();
        packages.dedup();
        write!(f, "{} (as Debian and Ubuntu name them)", packages.join(" "))
    }
}

/// What is installed.
#[derive(Debug, Clone)]
pub(super) struct Installed {
    pub(super) containerd: PathBuf,
    pub(super) ctr: PathBuf,
    pub(super) runc: PathBuf,
    /// The folder of network plugins.
    pub(super) plugins: PathBuf,
    /// Whether the plugin `firewall` is there: it opens machines that forward nothing by default.
    pub(super) firewall: bool,
    /// A search path that containerd finds its own helpers in.
    pub(super) path: String,
}

/// Looks for all that is needed, so that everything that is missing is said at once.
pub(super) fn find() -> Result<Installed, StartError> {
    let path = search_path(env::var("PATH").unwrap_or_default());
    find_in(&path, &PLUGIN_FOLDERS.map(PathBuf::from))
}

fn search_path(mut path: String) -> String {
    for folder in MORE_FOLDERS {
        if !path.split(':').any(|known| known == folder) {
            if !path.is_empty() {
                path.push(':');
            }
            path.push_str(folder);
        }
    }
    path
}

fn find_in(path: &str, plugin_folders: &[PathBuf]) -> Result<Installed, StartError> {
    let mut missing = Vec::new();
    let mut program = |program: &'static str, package: &'static str| {
        let found =
            path.split(':').map(|folder| Path::new(folder).join(program)).find(|path| is_program(path));
        found.unwrap_or_else(|| {
            missing.push(Missing { program, package });
            PathBuf::new()
        })
    };
    let containerd = program("containerd", "containerd");
    let ctr = program("ctr", "containerd");
    program("containerd-shim-runc-v2", "containerd");
    let runc = program("runc", "runc");
    // Network plugins call it.
    program("iptables", "iptables");
    let has_all = |folder: &&PathBuf| PLUGINS.iter().all(|plugin| is_program(&folder.join(plugin)));
    let plugins = plugin_folders.iter().find(has_all).cloned();
    if plugins.is_none() {
        let package = "containernetworking-plugins";
        missing.push(Missing { program: "the network plugin bridge", package });
    }
    match plugins {
        Some(plugins) if missing.is_empty() => Ok(Installed {
            containerd,
            ctr,
            runc,
            firewall: is_program(&plugins.join("firewall")),
            plugins,
            path: path.to_owned(),
        }),
        _ => Err(StartError::Missing(missing)),
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn put(folder: &Path, program: &str) {
        fs::write(folder.join(program), "").expect("written");
        fs::set_permissions(folder.join(program), fs::Permissions::from_mode(0o755)).expect("set");
    }

    #[test]
    fn everything_that_is_missing_is_named_at_once_with_its_package() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_str().expect("a path");
        let error = find_in(path, &[]).expect_err("nothing is there");
        assert_eq!(
            error.to_string(),
            "containers cannot run here: containerd, ctr, containerd-shim-runc-v2, runc, iptables, the network \
             plugin bridge are not installed; install: containerd containernetworking-plugins iptables runc (as \
             Debian and Ubuntu name them)"
        );
        for program in ["containerd", "ctr", "containerd-shim-runc-v2", "iptables"] {
            put(folder.path(), program);
        }
        for plugin in PLUGINS {
            put(folder.path(), plugin);
        }
        let error = find_in(path, &[folder.path().to_owned()]).expect_err("runc is missing");
        assert_eq!(
            error.to_string(),
            "containers cannot run here: runc is not installed; install: runc (as Debian and Ubuntu name them)"
        );
        put(folder.path(), "runc");
        let found = find_in(path, &[folder.path().to_owned()]).expect("all is there");
        assert!(!found.firewall);
        assert_eq!(found.runc, folder.path().join("runc"));
    }

    #[test]
    fn a_service_with_a_short_path_finds_administrators_programs() {
        assert!(search_path("/usr/bin".to_owned()).split(':').any(|folder| folder == "/usr/sbin"));
        assert!(!search_path(String::new()).starts_with(':'));
    }
}
