//! Servers in processes of their own, on processor 0; whoever drives them takes processor 1.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::{measure, procfs};

const STARTS_WITHIN: Duration = Duration::from_secs(10);

/// A running server. Dropping it kills the process and removes its folder.
#[derive(Debug)]
pub struct Server {
    /// How the figures name it.
    pub name: &'static str,
    /// Where it speaks MQTT.
    pub address: SocketAddr,
    /// From exec until it accepted, or until its ready file stood.
    pub started_in: Duration,
    child: Child,
    _folder: TempDir,
}

impl Server {
    /// mosquitto as Debian ships it, without persistence, with no bound on what waits for a client.
    ///
    /// # Errors
    /// It is not installed, or does not start.
    pub fn mosquitto() -> anyhow::Result<Self> {
        let (folder, address) = (TempDir::new()?, free_address()?);
        let config = folder.path().join("mosquitto.conf");
        let text = format!(
            "listener {} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\nuser root\n\
             set_tcp_nodelay true\nmax_inflight_messages 0\nmax_queued_messages 0\nmax_connections -1\n",
            address.port()
        );
        fs::write(&config, text)?;
        let mut command = on_processor(0, Path::new("mosquitto"));
        command.arg("-c").arg(&config);
        Self::start("mosquitto", command, address, folder, None)
    }

    /// rumqttd as a library, with the settings of its own example file.
    ///
    /// # Errors
    /// It does not start.
    pub fn rumqttd() -> anyhow::Result<Self> {
        let (folder, address) = (TempDir::new()?, free_address()?);
        let mut command = on_processor(0, &beside_us("serve_rumqttd")?);
        command.arg(address.to_string());
        Self::start("rumqttd", command, address, folder, None)
    }

    /// Our broker and MQTT front over a store: `lmdb` (a PUBACK follows the fdatasync) or `mem` (as durable as the
    /// peers: not at all).
    ///
    /// # Errors
    /// It does not start.
    pub fn front(store: &str) -> anyhow::Result<Self> {
        let (folder, address) = (data_folder()?, free_address()?);
        let mut command = on_processor(0, &beside_us("serve_front")?);
        command.arg(address.to_string()).arg(store).arg(folder.path());
        Self::start(if store == "mem" { "ours, mem" } else { "ours" }, command, address, folder, None)
    }

    /// The node agent as it is shipped, on this data folder.
    ///
    /// # Errors
    /// It does not start.
    pub fn edgehub(data: &Path, flags: &[String]) -> anyhow::Result<Self> {
        let (folder, address) = (TempDir::new()?, free_address()?);
        let ready = folder.path().join("ready.json");
        let mut command = on_processor(0, &beside_us("edgehub")?);
        command.arg("--mqtt").arg(address.to_string()).arg("--anonymous=true").arg("--data").arg(data);
        command.arg("--ready-file").arg(&ready).args(flags);
        Self::start("edgehub", command, address, folder, Some(&ready))
    }

    /// redis as Debian ships it, which syncs its append-only file before it answers.
    ///
    /// # Errors
    /// It is not installed, or does not start.
    pub fn redis() -> anyhow::Result<Self> {
        let (folder, address) = (data_folder()?, free_address()?);
        let mut command = Command::new("redis-server");
        command.args(["--port", &address.port().to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no"]);
        command
            .args(["--auto-aof-rewrite-percentage", "0", "--logfile", "/dev/null", "--dir"])
            .arg(folder.path());
        Self::start("redis", command, address, folder, None)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that it has used.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        procfs::cpu_time(self.child.id())
    }

    /// Its proportional set size in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn pss(&self) -> anyhow::Result<u64> {
        procfs::pss(self.child.id())
    }

    fn start(
        name: &'static str,
        mut command: Command,
        address: SocketAddr,
        folder: TempDir,
        ready: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let started = measure::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {name} ({:?})", command.get_program()))?;
        let mut server = Self { name, address, started_in: Duration::ZERO, child, _folder: folder };
        while !ready.map_or_else(|| TcpStream::connect(address).is_ok(), Path::exists) {
            server.check(started)?;
            std::thread::sleep(Duration::from_micros(500));
        }
        server.started_in = started.elapsed();
        Ok(server)
    }

    fn check(&mut self, started: Instant) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended at once: {status}", self.name);
        }
        if started.elapsed() > STARTS_WITHIN {
            bail!("{} does not serve {} within {STARTS_WITHIN:?}", self.name, self.address);
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; its folder goes either way.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A program pinned to one processor; `taskset` becomes it, so it keeps the process id.
#[must_use]
pub fn on_processor(number: u32, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.arg("-c").arg(number.to_string()).arg(program);
    command
}

/// Pins this process (its threads so far) to one processor. Without `taskset` it stays where it is.
pub fn take_processor(number: u32) {
    let own = std::process::id().to_string();
    let pinned =
        Command::new("taskset").args(["-pc", &number.to_string(), &own]).stdout(Stdio::null()).status();
    if !pinned.is_ok_and(|status| status.success()) {
        crate::report::say(format_args!("not pinned to processor {number}: is taskset installed?"));
    }
}

/// A binary that was built together with this one.
///
/// # Errors
/// It was not.
pub fn beside_us(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if !path.exists() {
        bail!("{} does not exist: cargo build --release --workspace", path.display());
    }
    Ok(path)
}

/// A folder on the disk that the build is on: folders for temporary files may be memory.
///
/// # Errors
/// It cannot be made.
pub fn data_folder() -> anyhow::Result<TempDir> {
    let exe = std::env::current_exe()?;
    let beside = exe.parent().context("a binary stands in a folder")?;
    Ok(tempfile::Builder::new().prefix("bench-data-").tempdir_in(beside)?)
}

fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
