//! A containerd of the node's own, for machines where the programs are installed and no runtime is configured.
//!
//! It shares nothing with a containerd of the machine but programs: its configuration, images and metadata are below
//! the node's data folder, its sockets below `/run`, its pods have a bridge and a network of their own. Two nodes on
//! one machine do not meet.
//!
//! It outlives the agent. An agent that is killed or replaced leaves it and its pods running, and the next one takes
//! it over ([`process`]); it ends with [`Containerd::stop`] alone. When it ends by itself it is started again, with
//! back-off; pods do not notice.
//!
//! | file | what |
//! |---|---|
//! | `install.rs` | which programs are needed, where they are, which package has them |
//! | `config.rs` | where its files are, and what is in them |
//! | `process.rs` | the process: started, taken over, ended |
//! | `images.rs` | images that come as files |
//! | `archive.rs` | such files, written and read |
//! | `pause.rs` | the image of sandboxes |

pub mod archive;
mod config;
mod images;
mod install;
pub mod pause;
mod process;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use broker::{Tasks, clock::every};
use futures_util::{StreamExt as _, stream};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::{
    process::Command,
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    config::{Layout, Machine, Subnet},
    install::Installed,
    process::Process,
};
pub use self::{
    images::{ImportError, Importer},
    install::{Missing, StartError},
};
use crate::{
    cri::Socket,
    runtime::{Runtime, RuntimeError},
};

/// From its start until it serves: it reads what it knows of all containers first.
const SERVES_WITHIN: Duration = Duration::from_secs(60);
/// How long it may take to end when it is asked to.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
/// Pauses between starts of one that keeps ending.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// One that ran for so long ended for a new reason.
const STEADY: Duration = Duration::from_secs(60);
/// Its log is looked at this often, and cut when it is longer than this.
const LOG_BEAT: Duration = Duration::from_secs(60);
const LOG_BYTES_MAX: u64 = 8 << 20;
/// Sandboxes that are ended at once.
const STOPS_AT_ONCE: usize = 8;

/// What it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The node's data folder.
    pub data: PathBuf,
    /// The image of sandboxes; none: one of our own, which needs no registry.
    pub sandbox_image: Option<String>,
}

/// A containerd that runs and serves. Dropping it leaves it running.
#[derive(Debug)]
pub struct Containerd {
    layout: Layout,
    runtime: Socket,
    importer: Importer,
    /// Cancelled by [`Containerd::stop`], and when this is dropped.
    ending: CancellationToken,
    /// Gives the process back, if there is one, once it is ending.
    supervisor: oneshot::Receiver<Option<Process>>,
}

impl Containerd {
    /// Starts it, or takes over the one that runs, and waits until it serves and can make sandboxes.
    ///
    /// Dropped halfway it may leave a containerd running, which the next start takes over.
    ///
    /// # Errors
    /// See [`StartError`]; the first two are for the operator to mend.
    pub async fn start(settings: &Settings) -> Result<Self, StartError> {
        let installed = install::find()?;
        if !rustix::process::geteuid().is_root() {
            return Err(StartError::NotRoot);
        }
        let layout =
            Layout::new(&settings.data).map_err(StartError::files("read the data folder", &settings.data))?;
        let (machine, changed) = write_files(&layout, &installed, settings)?;
        let socket = layout.socket();
        let runtime = Socket::new(&socket).map_err(|e| not_serving(&layout, &e.to_string()))?;
        let mut adopted = Process::adopt(&layout);
        if changed && let Some(old) = adopted.take() {
            tracing::info!("containerd is started anew with another configuration");
            old.stop(ENDS_WITHIN).await;
        }
        let mut process = match adopted {
            Some(process) => process,
            None => begin(&layout, &installed)?,
        };
        if let Err(e) = serves(&layout, &runtime, &mut process).await {
            // One that hangs would hang for whoever takes it over, too.
            process.stop(ENDS_WITHIN).await;
            return Err(e);
        }
        let importer = Importer {
            ctr: installed.ctr.clone(),
            socket,
            snapshotter: Some(machine.snapshotter().to_owned()),
            record: layout.folder.join("imported.json"),
        };
        if settings.sandbox_image.is_none() {
            import_pause(&layout, &importer, &runtime).await?;
        }
        let ending = CancellationToken::new();
        let (give_back, supervisor) = oneshot::channel();
        let supervised = supervise(process, layout.clone(), installed, ending.clone());
        // It ends with this value, by the token: nobody else has to stop it.
        Tasks::new().spawn("containerd", async move {
            // Nobody takes it back if this value was dropped: it is left running.
            drop(give_back.send(supervised.await));
        });
        Ok(Self { layout, runtime, importer, ending, supervisor })
    }

    /// The runtime that it is.
    #[must_use]
    pub fn runtime(&self) -> Socket {
        self.runtime.clone()
    }

    /// Imports the archives of a folder; see [`Importer::folder`].
    pub async fn import(&self, folder: &Path) -> (Vec<String>, Vec<ImportError>) {
        self.importer.folder(&self.runtime, folder).await
    }

    /// Ends all pods and then itself, and removes what is not kept on disk: mounts, its bridge, its folder below
    /// `/run`. Images stay.
    ///
    /// Not cancel-safe: what is left is found by the next start.
    ///
    /// # Errors
    /// Pods that could not be ended; it has ended all the same, and they are ended by the next that is stopped.
    pub async fn stop(mut self) -> Result<(), RuntimeError> {
        let emptied = match timeout(SERVES_WITHIN, empty(&self.runtime)).await {
            Ok(emptied) => emptied,
            Err(_) => Err(RuntimeError::Unavailable("pods do not end".to_owned())),
        };
        self.ending.cancel();
        // Of a supervisor that panicked, the process is still known by its file.
        let process = (&mut self.supervisor).await.ok().flatten();
        if let Some(process) = process.or_else(|| Process::adopt(&self.layout)) {
            process.stop(ENDS_WITHIN).await;
        }
        if emptied.is_ok() {
            clear(&self.layout).await;
        }
        emptied
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.ending.cancel();
    }
}

/// Folders and files; whether containerd's own configuration is another than before.
fn write_files(
    layout: &Layout,
    installed: &Installed,
    settings: &Settings,
) -> Result<(Machine, bool), StartError> {
    for folder in [layout.folder.clone(), layout.run.clone(), layout.networks()] {
        fs::create_dir_all(&folder).map_err(StartError::files("make the folder", &folder))?;
    }
    let machine = Machine::of(overlay_works(&layout.folder.join("overlay")));
    let network = layout.network();
    let subnet = fs::read_to_string(&network).ok().and_then(|list| Subnet::written(&list));
    let subnet = subnet.unwrap_or_else(|| {
        let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
        Subnet::free(layout, &routes)
    });
    write_if_changed(&network, &config::network(layout, installed, subnet))?;
    let image = settings.sandbox_image.as_deref().unwrap_or(pause::NAME);
    let text = config::containerd(layout, installed, machine, image);
    let changed = write_if_changed(&layout.config(), &text)?;
    Ok((machine, changed))
}

/// True if it was another before.
fn write_if_changed(path: &Path, text: &str) -> Result<bool, StartError> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(false);
    }
    let new = path.with_extension("new");
    let write = || {
        fs::write(&new, text)?;
        fs::rename(&new, path)
    };
    write().map_err(StartError::files("write", path))?;
    Ok(true)
}

/// Whether the kernel and the disk do overlayfs: tried, because nothing says so. Inside another overlay they do not.
fn overlay_works(folder: &Path) -> bool {
    let works = || -> io::Result<()> {
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir_all(folder.join(name))?;
        }
        let at = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
        let merged = folder.join("merged");
        mount("overlay", &merged, "overlay", MountFlags::empty(), options.as_c_str())?;
        let written = fs::write(merged.join("file"), "x");
        unmount(&merged, UnmountFlags::DETACH)?;
        written
    };
    let works = works();
    if let Err(e) = &works {
        tracing::info!("overlayfs does not work here ({e}): images are unpacked as copies");
    }
    // What is left of the trial is removed by the next one.
    fs::remove_dir_all(folder).ok();
    works.is_ok()
}

fn begin(layout: &Layout, installed: &Installed) -> Result<Process, StartError> {
    // A file of an earlier one would be taken for the socket of this one.
    fs::remove_file(layout.socket()).ok();
    Process::start(layout, installed).map_err(StartError::files("start", &installed.containerd))
}

fn not_serving(layout: &Layout, why: &str) -> StartError {
    StartError::NotServing { why: why.to_owned(), log: layout.log() }
}

/// Waits until it says that it is ready, or has ended.
async fn serves(layout: &Layout, runtime: &Socket, process: &mut Process) -> Result<(), StartError> {
    let ready = async {
        let mut last = "it does not answer".to_owned();
        let deadline = Instant::now() + SERVES_WITHIN;
        while Instant::now() < deadline {
            // A hung one answers nothing: the wait for one answer is bounded too.
            match timeout(SERVES_WITHIN / 4, runtime.status()).await {
                Ok(Ok(status)) => {
                    let unready: Vec<_> = status.conditions.iter().filter(|c| !c.status).collect();
                    let Some(condition) = unready.first() else { return Ok(()) };
                    last = format!("{}: {}", condition.r#type, condition.message);
                }
                Ok(Err(e)) => last = e.to_string(),
                Err(_) => {}
            }
            sleep(Duration::from_millis(20)).await;
        }
        Err(last)
    };
    let outcome = tokio::select! {
        ready = ready => ready,
        how = process.ended() => Err(format!("it ended at once: {how}")),
    };
    outcome.map_err(|why| not_serving(layout, &why))
}

async fn import_pause(layout: &Layout, importer: &Importer, runtime: &Socket) -> Result<(), StartError> {
    let image = pause::image().ok_or_else(|| {
        let machine = std::env::consts::ARCH;
        StartError::Pause(format!("there is none for {machine}; set edged.sandbox_image"))
    })?;
    let there = runtime.image(pause::NAME).await.map_err(|e| StartError::Pause(e.to_string()))?;
    if there.is_some() {
        return Ok(());
    }
    let file = layout.folder.join("pause.tar");
    let bytes = image.archive().map_err(|e| StartError::Pause(e.to_string()))?;
    fs::write(&file, bytes).map_err(StartError::files("write", &file))?;
    importer.import(&file).await.map_err(StartError::Pause)?;
    images::seen(runtime, &[pause::NAME.to_owned()]).await.map_err(StartError::Pause)
}

/// Starts it again whenever it ends, until it is to end for good; the process then, if there is one.
async fn supervise(
    mut process: Process,
    layout: Layout,
    installed: Installed,
    ending: CancellationToken,
) -> Option<Process> {
    let mut backoff = BACKOFF_MIN;
    let mut log_beat = every(LOG_BEAT);
    loop {
        let how = tokio::select! {
            () = ending.cancelled() => return Some(process),
            _ = log_beat.tick() => {
                if let Err(error) = cut_log(&layout) {
                    tracing::warn!(%error, "cannot cut containerd's log");
                }
                continue;
            }
            how = process.ended() => how,
        };
        if process.age() > STEADY {
            backoff = BACKOFF_MIN;
        }
        process = loop {
            tracing::warn!(%how, log = %layout.log().display(), ?backoff, "containerd ended and is started again");
            tokio::select! {
                () = ending.cancelled() => return None,
                () = sleep(backoff) => {}
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
            match begin(&layout, &installed) {
                Ok(process) => break process,
                Err(error) => tracing::warn!(%error, "containerd does not start"),
            }
        };
    }
}

/// The log stays open: what is in it is copied away, and the file cut to nothing. Whatever is written in between is
/// lost.
fn cut_log(layout: &Layout) -> io::Result<()> {
    let log = layout.log();
    if log.metadata()?.len() <= LOG_BYTES_MAX {
        return Ok(());
    }
    fs::copy(&log, log.with_extension("log.1"))?;
    fs::OpenOptions::new().write(true).open(&log)?.set_len(0)
}

/// Ends and removes all pods.
async fn empty(runtime: &Socket) -> Result<(), RuntimeError> {
    let sandboxes = runtime.sandboxes().await?;
    let ends = stream::iter(sandboxes).map(|sandbox| async move {
        runtime.stop_sandbox(&sandbox.id).await?;
        runtime.remove_sandbox(&sandbox.id).await
    });
    let mut ends = ends.buffer_unordered(STOPS_AT_ONCE);
    let mut outcome = Ok(());
    while let Some(end) = ends.next().await {
        outcome = outcome.and(end);
    }
    outcome
}

/// Removes what is not on disk, once no pod is left. What cannot be removed is said and left: the next start meets it
/// with ease.
async fn clear(layout: &Layout) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let of_ours =
        |path: &&str| [&layout.folder, &layout.run].iter().any(|ours| Path::new(path).starts_with(ours));
    for path in mounts.lines().filter_map(|line| line.split(' ').nth(4)).filter(of_ours) {
        if let Err(error) = unmount(path, UnmountFlags::DETACH) {
            tracing::warn!(%error, path, "a mount of containerd is left");
        }
    }
    let bridge = layout.bridge();
    if Path::new("/sys/class/net").join(&bridge).exists() {
        let mut command = Command::new("ip");
        command.args(["link", "delete", &bridge]).stdin(Stdio::null()).stdout(Stdio::null());
        match command.output().await {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let error = String::from_utf8_lossy(&output.stderr);
                tracing::warn!(%error, bridge, "the bridge of pods is left");
            }
            Err(error) => tracing::warn!(%error, bridge, "the bridge of pods is left"),
        }
    }
    if let Err(error) = fs::remove_dir_all(&layout.run) {
        tracing::warn!(%error, folder = %layout.run.display(), "containerd's folder is left");
    }
}
