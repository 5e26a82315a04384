//! What the kernel says about a process.

use std::{fs, io, time::Duration};

/// User and system time used so far by the process and all threads that it has now, as the scheduler counts it:
/// to the nanosecond, where /proc/PID/stat has ticks of 10 ms.
///
/// # Errors
/// The process is gone, or another user's.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the two looks.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        total += text.split(' ').next().and_then(|on_cpu| on_cpu.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}

/// Resident memory in bytes.
///
/// # Errors
/// The process is gone.
pub fn rss(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| io::Error::other("/proc/PID/status has no VmRSS"))
}

/// The load average of the last minute: a figure measured beside others' work is worth less.
#[must_use]
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_has_run() {
        let own = std::process::id();
        assert!(rss(own).unwrap() > 1 << 20);
        assert!(cpu_time(own).unwrap() > Duration::ZERO);
        assert!(cpu_time(u32::MAX).is_err());
    }
}
