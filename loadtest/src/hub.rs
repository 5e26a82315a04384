//! Hubs of this run's own: child processes, so that their memory and CPU are their own too.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use ops::{client::Client, endpoints::Endpoints};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{guard, process, tier::Servers};

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
    /// `None`: it has no NATS front, as in a tier.
    nats: Option<SocketAddr>,
    env: Vec<(&'static str, String)>,
    args: Vec<String>,
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
        Ok(Self { binary, data: data.to_owned(), quic: any, nats: Some(any), env, args: Vec::new() })
    }

    /// The same hub as replica `number` of a tier on these servers, which all know by the authority in this
    /// hub's own data folder ([`make_authority`](Self::make_authority)).
    #[must_use]
    pub fn replica(&self, servers: &Servers, number: u32) -> Self {
        let mut replica = self.clone();
        let name = format!("replica-{number}");
        replica.data = self.data.join(&name);
        replica.nats = None;
        replica.env.extend([
            ("OCTOBUS_FABRIC_AUTHORITY", self.data.join("tier").display().to_string()),
            ("OCTOBUS_FABRIC_COPIES", servers.copies().to_string()),
        ]);
        if let Some((user, file)) = &servers.login {
            replica.env.push(("OCTOBUS_FABRIC_USER", user.clone()));
            replica.env.push(("OCTOBUS_FABRIC_PASSWORD_FILE", file.display().to_string()));
        }
        replica.args = ["--fabric", &servers.list(), "--replica", &name].map(str::to_owned).to_vec();
        replica
    }

    /// Starts the hub alone for a moment, unless its data folder has an authority already.
    ///
    /// # Errors
    /// See [`HubError`].
    pub async fn make_authority(&mut self) -> Result<(), HubError> {
        if !self.data.join("tier").exists() {
            self.start().await?.stop().await;
        }
        Ok(())
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
        let spawn = |source| HubError::Spawn { binary: self.binary.clone(), source };
        std::fs::create_dir_all(&self.data)
            .map_err(|source| HubError::Io { path: self.data.clone(), source })?;
        let nats = self.nats.map_or_else(|| "off".to_owned(), |address| address.to_string());
        let ready = self.data.join("loadtest-ready.json");
        drop(std::fs::remove_file(&ready));
        let mut command = Command::from(guard::command(&self.binary).map_err(spawn)?);
        if self.binary.file_stem().is_some_and(|name| name == "octobus") {
            command.arg("cloud");
        }
        command
            .arg("--data")
            .arg(&self.data)
            .arg("--ready-file")
            .arg(&ready)
            .args(["--quic", &self.quic.to_string(), "--nats", &nats, "--anonymous"])
            .args(["--websocket", "off", "--bootstrap", "off", "--metrics", "off", "--log-level", "warn"])
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        let began = Instant::now();
        let mut child = command.spawn().map_err(spawn)?;
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
        self.nats = endpoints.nats.or(self.nats);
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

/// The hubs that a run started, each with how to start it again.
#[derive(Debug, Default)]
pub struct Hubs(Vec<(Program, Option<Hub>)>);

impl Hubs {
    /// Starts one more; its endpoints.
    ///
    /// # Errors
    /// See [`HubError`].
    pub async fn add(&mut self, mut program: Program) -> Result<Endpoints, HubError> {
        let hub = program.start().await?;
        let endpoints = hub.endpoints.clone();
        self.0.push((program, Some(hub)));
        Ok(endpoints)
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        self.0.len()
    }

    /// Processes of those that run.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.0.iter().filter_map(|(_program, hub)| hub.as_ref().map(Hub::pid))
    }

    /// Resident memory of all, bytes; `None` if none runs.
    #[must_use]
    pub fn rss(&self) -> Option<u64> {
        self.pids().map(|pid| process::rss(pid).ok()).sum::<Option<u64>>().filter(|bytes| *bytes > 0)
    }

    /// So many nodes are a replica's, as it says itself; `None`: it does not answer, or is no replica.
    pub async fn nodes_owned(&self, number: usize) -> Option<u64> {
        let admin = self.0.get(number)?.1.as_ref()?.endpoints.admin.as_ref()?;
        let mut lines = Client::new(admin).lines("/v1/stats", &[]).await.ok()?;
        loop {
            let line = lines.next().await.ok()??;
            if let Some(count) = line.strip_prefix(b"octobus_nodes_owned ") {
                return std::str::from_utf8(count).ok()?.trim_end().parse().ok();
            }
        }
    }

    /// Ends one: at once, or in an orderly way.
    pub async fn end(&mut self, number: usize, orderly: bool) {
        match self.0[number].1.take() {
            Some(hub) if orderly => drop(hub.stop().await),
            Some(hub) => hub.kill().await,
            None => {}
        }
    }

    /// Starts one that was ended.
    ///
    /// # Errors
    /// See [`HubError`].
    pub async fn start(&mut self, number: usize) -> Result<(), HubError> {
        let (program, hub) = &mut self.0[number];
        *hub = Some(program.start().await?);
        Ok(())
    }

    /// Ends all in an orderly way.
    pub async fn stop(mut self) {
        for number in 0..self.0.len() {
            self.end(number, true).await;
        }
    }
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
