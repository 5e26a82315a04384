//! Volumes of pods, on disk: what stands below `pods/<uid>` of the agent's folder, and what of it a container sees.
//!
//! ```text
//! pods/<uid>/volumes/<kind>/<name>                   a volume of ours; secrets and tokens are in memory
//! pods/<uid>/volume-subpaths/<volume>/<container>/N  bind mounts of parts of volumes
//! pods/<uid>/etc-hosts                               the file of that name
//! pods/<uid>/containers/<name>/<attempt>             last words
//! ```
//!
//! Everything here blocks, and may be repeated: setting up what is set up changes nothing, and removing what is
//! gone succeeds. One caller at a time for each pod.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume, VolumeMount,
};

use crate::{
    cgroups::is_one_name,
    env,
    make::{ConfigError, Settings, names, resources::Declared},
    objects::Objects,
    quantity::Milli,
    runtime::cri,
};

mod atomic;
mod beneath;
mod hosts;
mod mounted;
mod payload;

use payload::Payload;

/// What is kept of a container's last words, bytes.
pub const MESSAGE_MAX: usize = 4_096;
const HOSTS: &str = "/etc/hosts";

/// Why a volume is not there for its pod, in kubelet's words.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {why}")]
pub struct VolumeError {
    /// Name of the volume in the pod.
    pub volume: String,
    /// What is wrong, or missing.
    pub why: String,
}

/// The volumes of all pods of this node.
#[derive(Debug)]
pub struct Volumes {
    settings: Settings,
    /// Uid and name of volumes that show an object which says that it never changes.
    settled: Mutex<BTreeSet<(String, String)>>,
}

impl Volumes {
    /// In the agent's folder. Touches nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, settled: Mutex::default() }
    }

    /// Makes the folder of a pod and every volume that is not there. Before its sandbox, and before anything else
    /// is made for it: as long as the folder stands, there is something to tear down.
    pub fn set_up(&self, pod: &Pod, objects: &Objects) -> Result<(), VolumeError> {
        let folder = self.folder(pod).and_then(|folder| {
            fs::create_dir_all(&folder).map_err(said)?;
            // Who has an account on the machine does not see what pods are shown.
            fs::set_permissions(&folder, fs::Permissions::from_mode(0o750)).map_err(said)
        });
        folder.map_err(|why| VolumeError { volume: String::new(), why })?;
        self.each(pod, |volume| self.set_up_one(pod, volume, objects)).map(|_| ())
    }

    /// Shows a running pod what became of the objects that its volumes show. Whether anything changed.
    pub fn refresh(&self, pod: &Pod, objects: &Objects) -> Result<bool, VolumeError> {
        self.each(pod, |volume| match payload::of(pod, volume, objects, &self.settings) {
            None => Ok(false),
            Some(payload) => self.write(pod, volume, objects, &payload?),
        })
    }

    fn each(
        &self,
        pod: &Pod,
        mut act: impl FnMut(&Volume) -> Result<bool, String>,
    ) -> Result<bool, VolumeError> {
        let mut changed = false;
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            match act(volume) {
                Ok(this) => changed |= this,
                Err(why) => return Err(VolumeError { volume: volume.name.clone(), why }),
            }
        }
        Ok(changed)
    }

    fn set_up_one(&self, pod: &Pod, volume: &Volume, objects: &Objects) -> Result<bool, String> {
        if let Some(source) = &volume.host_path {
            return check_host_path(source).map(|()| false);
        }
        if let Some(source) = &volume.empty_dir {
            let at = self.place(pod, volume)?;
            return self.set_up_empty(pod, source, &at).map(|()| false);
        }
        match payload::of(pod, volume, objects, &self.settings) {
            Some(payload) => self.write(pod, volume, objects, &payload?),
            None => Err("no volume plugin matched".to_owned()),
        }
    }

    fn set_up_empty(&self, pod: &Pod, source: &EmptyDirVolumeSource, at: &Path) -> Result<(), String> {
        let group = fs_group(pod);
        match source.medium.as_deref().unwrap_or_default() {
            "" if at.is_dir() => Ok(()),
            "" => {
                // Under another name until it is as it must be: what has its name is never touched again.
                let parent = at.parent().unwrap_or(at);
                let fresh =
                    parent.join(format!("..{}", at.file_name().unwrap_or_default().to_string_lossy()));
                let made = fs::create_dir_all(&fresh).and_then(|()| {
                    let mode = if group.is_some() { 0o2777 } else { 0o777 };
                    std::os::unix::fs::chown(&fresh, None, group)?;
                    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
                    fs::rename(&fresh, at)
                });
                made.map_err(said)
            }
            "Memory" => {
                let limits = [
                    Milli::parse(self.settings.allocatable.get("memory").map_or("0", |all| &all.0)),
                    Declared::of(pod).memory,
                    source.size_limit.as_ref().and_then(|limit| Milli::parse(&limit.0)),
                ];
                let size = limits.into_iter().flatten().map(Milli::units).filter(|size| *size > 0).min();
                fs::create_dir_all(at).map_err(said)?;
                mounted::memory(at, if group.is_some() { 0o2777 } else { 0o777 }, group, size).map_err(said)
            }
            other => Err(format!("unknown storage medium \"{other}\"")),
        }
    }

    /// Writes what a volume shows, if it does not show it already.
    fn write(
        &self,
        pod: &Pod,
        volume: &Volume,
        objects: &Objects,
        payload: &Payload,
    ) -> Result<bool, String> {
        let key = (names::text(&pod.metadata.uid), volume.name.clone());
        let is_settled = |set: &BTreeSet<_>| set.contains(&key);
        if is_settled(&*self.settled.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(false);
        }
        let at = self.place(pod, volume)?;
        fs::create_dir_all(&at).map_err(said)?;
        if payload.in_memory {
            mounted::memory(&at, 0o755, fs_group(pod), None).map_err(said)?;
        }
        let changed = atomic::write(&at, payload, fs_group(pod)).map_err(said)?;
        if payload::never_changes(volume, objects) {
            self.settled.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        }
        Ok(changed)
    }

    /// What a container sees of its pod's volumes, with `/etc/hosts` and the file for last words. For each start
    /// of a container; `envs` are what `subPathExpr` may name.
    pub fn mounts(
        &self,
        pod: &Pod,
        container: &Container,
        envs: &[cri::KeyValue],
        attempt: u32,
        pod_ips: &[String],
    ) -> Result<Vec<cri::Mount>, ConfigError> {
        if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
            return Err(ConfigError::container("block devices are not supported by this node".to_owned()));
        }
        let mut all = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            all.push(self.mount(pod, container, envs, index, mount).map_err(ConfigError::container)?);
        }
        let spec = pod.spec.as_ref();
        let on_host = spec.is_some_and(|spec| spec.host_network == Some(true));
        let is_taken = |all: &[cri::Mount], path: &str| all.iter().any(|mount| mount.container_path == path);
        if !is_taken(&all, HOSTS) && (on_host || !pod_ips.is_empty()) {
            let at = self.folder(pod).map_err(ConfigError::container)?.join("etc-hosts");
            let text = hosts::text(pod, &self.settings.cluster_domain, pod_ips)?;
            write_file(&at, text.as_bytes(), 0o644).map_err(|error| ConfigError::container(said(error)))?;
            all.push(plain(HOSTS, &at, false));
        }
        let path = container.termination_message_path.as_deref().unwrap_or("/dev/termination-log");
        if !path.is_empty() && !is_taken(&all, path) {
            let uid = names::text(&pod.metadata.uid);
            let folder = self.messages(&uid, &container.name).map_err(ConfigError::container)?;
            let at = folder.join(attempt.to_string());
            if !at.exists() {
                write_file(&at, b"", 0o666).map_err(|error| ConfigError::container(said(error)))?;
            }
            all.push(plain(path, &at, false));
        }
        Ok(all)
    }

    fn mount(
        &self,
        pod: &Pod,
        container: &Container,
        envs: &[cri::KeyValue],
        index: usize,
        mount: &VolumeMount,
    ) -> Result<cri::Mount, String> {
        let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
        let volume = volumes.into_iter().find(|volume| volume.name == mount.name).ok_or_else(|| {
            format!("cannot find volume \"{}\" to mount into container \"{}\"", mount.name, container.name)
        })?;
        let whole = match &volume.host_path {
            Some(source) => PathBuf::from(&source.path),
            None => self.place(pod, volume)?,
        };
        let part = match (mount.sub_path_expr.as_deref(), mount.sub_path.as_deref()) {
            (Some(expression), _) if !expression.is_empty() => {
                let find = |name: &str| envs.iter().find(|env| env.key == name).map(|env| env.value.as_str());
                env::expand_all(expression, find).map_err(|name| format!("missing value for \"{name}\""))?
            }
            (_, part) => part.unwrap_or_default().to_owned(),
        };
        let host = if part.is_empty() {
            whole
        } else {
            let target = self.folder(pod)?.join("volume-subpaths").join(&mount.name);
            let target = target.join(&container.name).join(index.to_string());
            bind_part(&whole, &part, &target).map_err(|why| {
                format!(
                    "failed to prepare subPath for volumeMount \"{}\" of container \"{}\": {why}",
                    mount.name, container.name
                )
            })?;
            target
        };
        // Refused and not left out, as kubelet does where the runtime cannot.
        if mount.recursive_read_only.as_deref() == Some("Enabled") {
            return Err(format!(
                "recursive read-only mount of \"{}\" is not supported by this node",
                mount.name
            ));
        }
        let inside = if mount.mount_path.starts_with('/') {
            mount.mount_path.clone()
        } else {
            format!("/{}", mount.mount_path)
        };
        // What the agent writes, and only the agent.
        let is_shown = volume.config_map.is_some()
            || volume.secret.is_some()
            || volume.downward_api.is_some()
            || volume.projected.is_some();
        let propagation = match mount.mount_propagation.as_deref() {
            Some("HostToContainer") => cri::MountPropagation::PropagationHostToContainer,
            Some("Bidirectional") => cri::MountPropagation::PropagationBidirectional,
            _ => cri::MountPropagation::PropagationPrivate,
        };
        Ok(cri::Mount {
            propagation: propagation.into(),
            ..plain(&inside, &host, mount.read_only == Some(true) || is_shown)
        })
    }

    /// The last words that this start of a container left; none: it left none.
    #[must_use]
    pub fn termination_message(&self, uid: &str, container: &str, attempt: u32) -> Option<String> {
        let at = self.messages(uid, container).ok()?.join(attempt.to_string());
        read_end(&at).ok().filter(|text| !text.is_empty())
    }

    /// Forgets the last words of every start before this one.
    pub fn forget_messages(&self, uid: &str, container: &str, before: u32) -> io::Result<()> {
        let Ok(folder) = self.messages(uid, container) else { return Ok(()) };
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let attempt = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            if attempt.is_some_and(|attempt| attempt < before) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Unmounts the parts of volumes that were mounted for a container. One that runs keeps what it sees.
    pub fn release(&self, uid: &str, container: &str) -> io::Result<()> {
        if !is_one_name(uid) || !is_one_name(container) {
            return Ok(());
        }
        let volumes = match fs::read_dir(self.pods().join(uid).join("volume-subpaths")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            volumes => volumes?,
        };
        for volume in volumes {
            match fs::canonicalize(volume?.path().join(container)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(real) => mounted::unmount_below(&real)?,
            }
        }
        Ok(())
    }

    /// Unmounts and removes all that stands here of a pod, whatever its spec was.
    pub fn tear_down(&self, uid: &str) -> io::Result<()> {
        if !is_one_name(uid) {
            return Ok(());
        }
        let folder = self.pods().join(uid);
        match fs::canonicalize(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(real) => {
                mounted::unmount_below(&real)?;
                fs::remove_dir_all(&real)?;
            }
        }
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        settled.retain(|(known, _)| known != uid);
        Ok(())
    }

    /// Uids of pods of which anything stands here.
    pub fn uids(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.pods()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    fn pods(&self) -> PathBuf {
        self.settings.folder.join("pods")
    }

    fn folder(&self, pod: &Pod) -> Result<PathBuf, String> {
        let uid = names::text(&pod.metadata.uid);
        if is_one_name(&uid) { Ok(self.pods().join(uid)) } else { Err(format!("wrong uid \"{uid}\"")) }
    }

    fn place(&self, pod: &Pod, volume: &Volume) -> Result<PathBuf, String> {
        let kind = if volume.empty_dir.is_some() {
            "kubernetes.io~empty-dir"
        } else if volume.config_map.is_some() {
            "kubernetes.io~configmap"
        } else if volume.secret.is_some() {
            "kubernetes.io~secret"
        } else if volume.downward_api.is_some() {
            "kubernetes.io~downward-api"
        } else {
            "kubernetes.io~projected"
        };
        if !is_one_name(&volume.name) {
            return Err(format!("wrong name \"{}\"", volume.name));
        }
        Ok(self.folder(pod)?.join("volumes").join(kind).join(&volume.name))
    }

    fn messages(&self, uid: &str, container: &str) -> Result<PathBuf, String> {
        for name in [uid, container] {
            if !is_one_name(name) {
                return Err(format!("wrong name \"{name}\""));
            }
        }
        Ok(self.pods().join(uid).join("containers").join(container))
    }
}

/// The group that owns what a pod's volumes hold.
fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn plain(inside: &str, host: &Path, readonly: bool) -> cri::Mount {
    cri::Mount {
        container_path: inside.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        readonly,
        ..cri::Mount::default()
    }
}

fn said(error: io::Error) -> String {
    error.to_string()
}

/// In place: a container that has it mounted sees it too.
fn write_file(at: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    if let Some(folder) = at.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(at, bytes)?;
    fs::set_permissions(at, fs::Permissions::from_mode(mode))
}

/// The end of a file that a container wrote, as text.
fn read_end(at: &Path) -> io::Result<String> {
    use io::{Read, Seek, SeekFrom};
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let mut file = fs::OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(at)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MESSAGE_MAX as u64)))?;
    let mut bytes = Vec::new();
    file.take(MESSAGE_MAX as u64).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes what `hostPath` asks for, or refuses what is something else.
fn check_host_path(source: &HostPathVolumeSource) -> Result<(), String> {
    let path = Path::new(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let wrong = |what: &str| Err(format!("hostPath type check failed: {} is not {what}", source.path));
    match kind {
        "DirectoryOrCreate" if !path.exists() => {
            fs::create_dir_all(path).map_err(said)?;
            return fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(said);
        }
        "FileOrCreate" if !path.exists() => {
            let file = fs::OpenOptions::new().create_new(true).write(true).mode(0o644).open(path);
            return file.map(|_| ()).map_err(said);
        }
        _ => {}
    }
    let found = fs::metadata(path).map(|metadata| metadata.file_type());
    let is = |check: fn(&fs::FileType) -> bool| found.as_ref().is_ok_and(check);
    match kind {
        "" => Ok(()),
        "Directory" | "DirectoryOrCreate" if !is(fs::FileType::is_dir) => wrong("a directory"),
        "File" | "FileOrCreate" if !is(fs::FileType::is_file) => wrong("a file"),
        "Socket" if !is(fs::FileType::is_socket) => wrong("a socket file"),
        "CharDevice" if !is(fs::FileType::is_char_device) => wrong("a character device"),
        "BlockDevice" if !is(fs::FileType::is_block_device) => wrong("a block device"),
        "Directory" | "DirectoryOrCreate" | "File" | "FileOrCreate" | "Socket" | "CharDevice"
        | "BlockDevice" => Ok(()),
        other => Err(format!("{other} is an invalid volume type")),
    }
}

/// Mounts a part of a volume at `target`. The part is made if it is not there, and never is what lies outside the
/// volume, whatever links a container put into it.
fn bind_part(whole: &Path, part: &str, target: &Path) -> Result<(), String> {
    if part.starts_with('/') {
        return Err(format!("error SubPath `{part}` must not be an absolute path"));
    }
    if part.split('/').any(|level| level == "..") {
        return Err(format!("unable to provision SubPath `{part}`: must not contain '..'"));
    }
    let found = beneath::open_or_make(whole, Path::new(part)).map_err(said)?;
    mounted::bind(&found, target).map_err(said)
}

#[cfg(test)]
mod tests;
