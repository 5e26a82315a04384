//! containerd as a process that outlives its parent: an agent that starts finds the one of the agent before.

use std::{fs, io, os::fd::OwnedFd, path::Path, process::Stdio, time::Duration};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{
    net::unix::pipe,
    process::{Child, Command},
    time::{Instant, timeout},
};

use super::{config::Layout, install::Installed};

/// A containerd that runs. Dropping it leaves it running.
#[derive(Debug)]
pub(super) struct Process {
    /// Names this process and no later one with its number.
    handle: OwnedFd,
    /// The same, as something to wait for: it is readable once the process has ended.
    end: pipe::Receiver,
    /// Of the agent itself, if it started it: it has to be reaped then.
    child: Option<Child>,
    started: Instant,
}

impl Process {
    /// Starts one, in a process group of its own: what a terminal sends to the agent does not reach it.
    pub(super) fn start(layout: &Layout, installed: &Installed) -> io::Result<Self> {
        let log = fs::OpenOptions::new().create(true).append(true).open(layout.log())?;
        let child = Command::new(&installed.containerd)
            .arg("--config")
            .arg(layout.config())
            .env("PATH", &installed.path)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(false)
            .spawn()?;
        let pid = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let pid = pid.ok_or_else(|| io::Error::other("containerd ended at once"))?;
        let process = Self::of(pid, Some(child))?;
        fs::write(layout.process(), format!("{} {}", pid.as_raw_nonzero(), began(pid)?))?;
        Ok(process)
    }

    /// The one that an earlier agent started and that still runs.
    pub(super) fn adopt(layout: &Layout) -> Option<Self> {
        let written = fs::read_to_string(layout.process()).ok()?;
        let (pid, start) = written.split_once(' ')?;
        let pid = Pid::from_raw(pid.parse().ok()?)?;
        let process = Self::of(pid, None).ok()?;
        // Looked at after the handle was taken: it is that process, or it has ended.
        (began(pid).ok()? == start && is_ours(pid, &layout.config())).then_some(process)
    }

    fn of(pid: Pid, child: Option<Child>) -> io::Result<Self> {
        let handle = pidfd_open(pid, PidfdFlags::empty())?;
        // It is no pipe, but is only ever waited for, never read.
        let end = pipe::Receiver::from_owned_fd_unchecked(handle.try_clone()?)?;
        Ok(Self { handle, end, child, started: Instant::now() })
    }

    /// For how long it is known to run.
    pub(super) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits for its end, and says how it was if that is known. Cancel-safe.
    pub(super) async fn ended(&mut self) -> String {
        if let Some(child) = &mut self.child {
            return match child.wait().await {
                Ok(status) => status.to_string(),
                Err(e) => e.to_string(),
            };
        }
        match self.end.readable().await {
            Ok(()) => "ended".to_owned(),
            Err(e) => e.to_string(),
        }
    }

    /// Asks it to end, and kills it when it does not. What it started runs on.
    pub(super) async fn stop(mut self, patience: Duration) {
        for signal in [Signal::TERM, Signal::KILL] {
            // It may have ended meanwhile.
            pidfd_send_signal(&self.handle, signal).ok();
            if timeout(patience, self.ended()).await.is_ok() {
                return;
            }
        }
    }
}

/// When a process began, in the kernel's words: with its number it names it, until the next boot.
fn began(pid: Pid) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    // The second field is the program's name, in brackets, with whatever is in it.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let began = after_name.split_whitespace().nth(19);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let began = began.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(format!("{began} {}", boot.trim()))
}

fn is_ours(pid: Pid, config: &Path) -> bool {
    let words = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    words.split(|byte| *byte == 0).any(|word| word == config.as_os_str().as_encoded_bytes())
}
