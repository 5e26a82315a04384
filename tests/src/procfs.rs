//! What the kernel says about a process.

use std::{fs, time::Duration};

/// Ticks per second in /proc: part of the kernel's interface, whatever its own rate.
const USER_HZ: u64 = 100;

/// User and system time used so far by the process and all its threads.
///
/// # Panics
/// If the process is gone.
#[must_use]
pub fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let after_name = stat.rsplit_once(") ").expect("/proc/PID/stat has a name").1;
    let field = |n: usize| -> u64 {
        after_name.split(' ').nth(n).and_then(|text| text.parse().ok()).expect("/proc/PID/stat has numbers")
    };
    // utime and stime are fields 14 and 15; two stand before the state.
    let ticks = field(11) + field(12);
    Duration::from_millis(ticks * 1000 / USER_HZ)
}

/// Resident memory in bytes.
///
/// # Panics
/// If the process is gone.
#[must_use]
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("/proc/PID/status has VmRSS");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("VmRSS in kB");
    kib * 1024
}
