//! What the kernel says about a process.

use std::{fs, time::Duration};

use anyhow::Context;

/// User and system time used so far by the process and all threads that it has now, as the scheduler counts it:
/// to the nanosecond, where /proc/PID/stat has ticks of 10 ms.
///
/// # Errors
/// The process is gone.
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("list the server's threads")? {
        // A thread may end between the two looks.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        let on_cpu = text.split(' ').next().context("schedstat has three numbers")?;
        total += on_cpu.parse::<u64>().context("schedstat has numbers")?;
    }
    Ok(Duration::from_nanos(total))
}

/// As [`cpu_time`], of the threads of this name.
///
/// # Errors
/// The process is gone.
pub fn cpu_time_of(pid: u32, name: &str) -> anyhow::Result<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).context("list the server's threads")? {
        let folder = thread?.path();
        let is_named = fs::read_to_string(folder.join("comm")).is_ok_and(|comm| comm.trim() == name);
        let Ok(text) = fs::read_to_string(folder.join("schedstat")) else { continue };
        if is_named {
            let on_cpu = text.split(' ').next().context("schedstat has three numbers")?;
            total += on_cpu.parse::<u64>().context("schedstat has numbers")?;
        }
    }
    Ok(Duration::from_nanos(total))
}

/// Proportional set size in bytes: private memory, and a fair share of what is shared.
///
/// # Errors
/// The process is gone, or is not ours to look at.
pub fn pss(pid: u32) -> anyhow::Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read the server's PSS")?;
    kib(&rollup, "Pss:")
}

/// Bytes that the process has caused to be written to block devices so far, in pages.
///
/// # Errors
/// The process is gone, or is not ours to look at.
pub fn written(pid: u32) -> anyhow::Result<u64> {
    io(pid, "write_bytes: ")
}

/// Bytes that the process has read so far, from files in the page cache too.
///
/// # Errors
/// The process is gone, or is not ours to look at.
pub fn read(pid: u32) -> anyhow::Result<u64> {
    io(pid, "rchar: ")
}

fn io(pid: u32, name: &str) -> anyhow::Result<u64> {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).context("read the process's io")?;
    let line = io.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("find {name}"))?;
    Ok(line.parse()?)
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
