//! A hub of this run's own: a child process, so that its memory and CPU are its own too.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use ops::endpoints::Endpoints;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

/// Longest start: a store to recover, a busy machine, a debug build.
const START: Duration = Duration::from_secs(120);
/// Longest orderly end.
const STOP: Duration = Duration::from_secs(60);
/// How often the ready file is looked for.
const LOOK: Duration = Duration::from_millis(10);

/// Why there is no hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No program.
    #[error("no hub to start: neither cloudhub nor octobus lies beside {0}; name one with --hub-binary")]
    NoBinary(PathBuf),
    /// It cannot be run.
    #[error("cannot start {binary}: {source}")]
    Spawn { binary: PathBuf, source: std::io::Error },
    /// It ended.
    #[error("the hub ended at once ({0}); its last words are above")]
    Ended(ExitStatus),
    /// It is stuck.
    #[error("the hub does not serve after {START:?}")]
    Slow,
    /// The file system says no.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

/// How to start a hub; the same again is a restart on the same data and ports.
#[derive(Debug, Clone)]
pub struct Program {
    binary: PathBuf,
    data: PathBuf,
    quic: SocketAddr,
    nats: SocketAddr,
    env: Vec<(&'static str, String)>,
}

/// A running hub. Dropping it kills it.
#[derive(Debug)]
pub struct Hub {
    child: Child,
    /// Where it serves.
    pub endpoints: Endpoints,
    /// From the start of the process to its readiness.
    pub took: Duration,
}

impl Program {
    /// A hub over this folder, on ports of loopback that are free when it starts. `binary` is `cloudhub` or
    /// `octobus`; by default the one that lies beside this program.
    ///
    /// # Errors
    /// There is none.
    pub fn new(
        binary: Option<&Path>,
        data: &Path,
        heartbeat: Duration,
        links: u32,
    ) -> Result<Self, HubError> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let env = vec![
            ("OCTOBUS_LIMITS_HEARTBEAT", ops::config::units::show_duration(heartbeat)),
            ("OCTOBUS_LIMITS_LINKS", (links + 16).to_string()),
        ];
        let binary = binary.map_or_else(beside, |binary| Ok(binary.to_owned()))?;
        Ok(Self { binary, data: data.to_owned(), quic: any, nats: any, env })
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Starts it and waits until it serves. Its ports are kept for the next start.
    ///
    /// # Errors
    /// See [`HubError`].
    pub async fn start(&mut self) -> Result<Hub, HubError> {
        let ready = self.data.join("loadtest-ready.json");
        drop(std::fs::remove_file(&ready));
        let mut command = Command::new(&self.binary);
        if self.binary.file_stem().is_some_and(|name| name == "octobus") {
            command.arg("cloud");
        }
        command
            .arg("--data")
            .arg(&self.data)
            .arg("--ready-file")
            .arg(&ready)
            .args(["--quic", &self.quic.to_string(), "--nats", &self.nats.to_string(), "--anonymous"])
            .args(["--websocket", "off", "--bootstrap", "off", "--metrics", "off", "--log-level", "warn"])
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        let began = Instant::now();
        let mut child =
            command.spawn().map_err(|source| HubError::Spawn { binary: self.binary.clone(), source })?;
        let endpoints = loop {
            if let Some(status) = child.try_wait().ok().flatten() {
                return Err(HubError::Ended(status));
            }
            // One write, then a rename: what can be read is complete.
            match std::fs::read(&ready) {
                Ok(text) => break serde_json::from_slice::<Endpoints>(&text).unwrap_or_default(),
                Err(_) if began.elapsed() > START => return Err(HubError::Slow),
                Err(_) => sleep(LOOK).await,
            }
        };
        self.quic = endpoints.quic.unwrap_or(self.quic);
        self.nats = endpoints.nats.unwrap_or(self.nats);
        Ok(Hub { child, endpoints, took: began.elapsed() })
    }
}

/// The hub's program that was built or installed with this one.
fn beside() -> Result<PathBuf, HubError> {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or_else(|| Path::new("."));
    // A test's executable lies one folder deeper than the binaries.
    let folders = [Some(folder), folder.parent()];
    let found = folders
        .into_iter()
        .flatten()
        .flat_map(|folder| ["cloudhub", "octobus"].map(|name| folder.join(name)))
        .find(|path| path.is_file());
    found.ok_or_else(|| HubError::NoBinary(own.clone()))
}

impl Hub {
    /// Its process; 0 once it has ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// Ends it without a warning (SIGKILL).
    pub async fn kill(mut self) {
        // Gone already: as wanted.
        drop(self.child.start_kill());
        drop(self.child.wait().await);
    }

    /// Asks it to end (SIGTERM), and kills it where that takes too long. How long it took.
    pub async fn stop(mut self) -> Duration {
        let began = Instant::now();
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
            // Gone already: as wanted.
            let _gone = kill_process(pid, Signal::TERM).is_err();
        }
        if timeout(STOP, self.child.wait()).await.is_err() {
            self.kill().await;
        }
        began.elapsed()
    }
}
