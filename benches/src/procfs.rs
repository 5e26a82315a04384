//! What the kernel says about a process.

use std::{fs, time::Duration};

use anyhow::Context;

/// Ticks per second in /proc: part of the kernel's interface, whatever its own rate.
const USER_HZ: u64 = 100;

/// User and system time used so far by the process and all its threads, to 10 ms.
///
/// # Errors
/// The process is gone.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("read the server's CPU time")?;
    let after_name = stat.rsplit_once(") ").context("/proc/PID/stat has a name")?.1;
    let field = |n: usize| after_name.split(' ').nth(n).and_then(|text| text.parse::<u64>().ok());
    // utime and stime are fields 14 and 15; two stand before the state.
    let (user, system) = field(11).zip(field(12)).context("/proc/PID/stat has numbers")?;
    Ok(Duration::from_millis((user + system) * 1000 / USER_HZ))
}

/// Proportional set size in bytes: private memory, and a fair share of what is shared.
///
/// # Errors
/// The process is gone, or is not ours to look at.
pub fn pss(pid: u32) -> anyhow::Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read the server's PSS")?;
    kib(&rollup, "Pss:")
}

/// Resident memory of this process in bytes.
///
/// # Errors
/// /proc is not mounted.
pub fn own_rss() -> anyhow::Result<u64> {
    kib(&fs::read_to_string("/proc/self/status").context("read own memory")?, "VmRSS:")
}

fn kib(text: &str, name: &str) -> anyhow::Result<u64> {
    let line = text.lines().find(|line| line.starts_with(name)).with_context(|| format!("find {name}"))?;
    let kib: u64 = line.split_whitespace().nth(1).with_context(|| format!("read {line}"))?.parse()?;
    Ok(kib * 1024)
}

/// The load average of the last minute: a figure measured under load of others is worth less.
#[must_use]
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN)
}
