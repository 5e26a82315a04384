//! Checks of this machine alone: data folder, disk, clock, limits, io_uring.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use broker::clock;

use super::{Finding, Subject};
use crate::config::units::show_size;

/// A journal and a checkpoint need at least this to be useful.
const FREE_MIN: u64 = 256 << 20;
/// Below this an operator should look.
const FREE_GOOD: u64 = 2 << 30;
/// A flush is on the way of every acknowledgement; SD cards take some 10 ms.
const FLUSH_GOOD: Duration = Duration::from_millis(50);
const FLUSH_MAX: Duration = Duration::from_secs(1);
const FLUSHES: u32 = 8;
const FILES_GOOD: u64 = 16_384;
/// 2025-01-01: this program did not exist before.
const EARLIEST_US: u64 = 1_735_689_600_000_000;
/// 2100-01-01.
const LATEST_US: u64 = 4_102_444_800_000_000;

pub(super) fn examine(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![folder(&subject.data)];
    match existing(&subject.data) {
        Some(folder) => {
            findings.push(space(&folder));
            findings.push(flush(&folder));
        }
        None => findings.push(Finding::skip("disk", "no folder to look at")),
    }
    findings.push(year(clock::wall_us()));
    findings.push(files());
    findings.push(io_uring());
    findings
}

/// The folder, or the nearest one above it that exists.
fn existing(data: &Path) -> Option<PathBuf> {
    data.ancestors().find(|path| path.is_dir()).map(Path::to_owned)
}

fn folder(data: &Path) -> Finding {
    const CHECK: &str = "data folder";
    let shown = data.display();
    if !data.exists() {
        return Finding::fail(
            CHECK,
            format!("{shown} does not exist"),
            format!("name the right one with --data, or make it: install -d -m 700 {shown}"),
        );
    }
    let (own, meta) = match (rustix::process::geteuid().as_raw(), fs::metadata(data)) {
        (own, Ok(meta)) => (own, meta),
        (_, Err(error)) => {
            return Finding::fail(
                CHECK,
                format!("{shown}: {error}"),
                "run this as the user that runs octobus",
            );
        }
    };
    if let Err(error) = scratch(data).and_then(|(_file, path)| fs::remove_file(path)) {
        let remedy = format!("chown -R $(id -u) {shown}, or name another folder with --data");
        return Finding::fail(CHECK, format!("{shown} is not writable: {error}"), remedy);
    }
    if meta.mode() & 0o077 != 0 {
        let found = format!(
            "{shown} has mode {:o}: other users can look at keys' names and sockets",
            meta.mode() & 0o777
        );
        return Finding::warn(CHECK, found, format!("chmod 700 {shown}"));
    }
    if meta.uid() != own {
        let found = format!("{shown} belongs to user {}, this is user {own}", meta.uid());
        return Finding::warn(CHECK, found, "run octobus and this as the same user");
    }
    Finding::ok(CHECK, format!("{shown} is writable, mode 700"))
}

fn space(folder: &Path) -> Finding {
    const CHECK: &str = "disk space";
    let stat = match rustix::fs::statvfs(folder) {
        Ok(stat) => stat,
        Err(error) => return Finding::skip(CHECK, error.to_string()),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let found = format!("{} free", show_size(free >> 20 << 20));
    let remedy = "free some, or lower max_bytes of the streams; a full disk refuses messages";
    match free {
        0..FREE_MIN => Finding::fail(CHECK, found, remedy),
        FREE_MIN..FREE_GOOD => Finding::warn(CHECK, found, remedy),
        _ => Finding::ok(CHECK, found),
    }
}

fn flush(folder: &Path) -> Finding {
    const CHECK: &str = "disk flush";
    let (mut file, path) = match scratch(folder) {
        Ok(made) => made,
        Err(error) => return Finding::skip(CHECK, format!("cannot write there: {error}")),
    };
    let mut worst = Duration::ZERO;
    let mut failed = None;
    for _ in 0..FLUSHES {
        let began = tokio::time::Instant::now();
        if let Err(error) = file.write_all(&[0x5a; 4096]).and_then(|()| file.sync_data()) {
            failed = Some(error);
            break;
        }
        worst = worst.max(began.elapsed());
    }
    drop(file);
    if let Err(error) = fs::remove_file(&path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove the doctor's file");
    }
    let remedy = "every acknowledged message waits for a flush: use a better disk, or expect that delay";
    match failed {
        Some(error) => Finding::fail(
            CHECK,
            format!("a write cannot be flushed: {error}"),
            "look at the disk's errors (dmesg)",
        ),
        None if worst > FLUSH_MAX => Finding::fail(CHECK, format!("4 KiB took up to {worst:.1?}"), remedy),
        None if worst > FLUSH_GOOD => Finding::warn(CHECK, format!("4 KiB took up to {worst:.1?}"), remedy),
        None => Finding::ok(CHECK, format!("4 KiB in at most {worst:.1?}")),
    }
}

/// A file of this process in the folder; it is the caller's to remove. The name cannot be foreseen from
/// outside the folder's owner, and an existing file is never opened.
fn scratch(folder: &Path) -> std::io::Result<(fs::File, PathBuf)> {
    let path = folder.join(format!(".doctor-{}", std::process::id()));
    let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
    Ok((file, path))
}

fn year(wall_us: u64) -> Finding {
    let shown = crate::api::rfc3339(wall_us);
    if (EARLIEST_US..LATEST_US).contains(&wall_us) {
        Finding::ok("clock", shown)
    } else {
        let found = format!("{shown} cannot be: certificates will look expired or not yet valid");
        Finding::fail("clock", found, "set the clock (timedatectl set-ntp true), or fit a clock battery")
    }
}

fn files() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let current = limit.current.unwrap_or(u64::MAX);
    let found = format!("{current} open files allowed");
    if current >= FILES_GOOD {
        return Finding::ok("open files", found);
    }
    let remedy = "each client is one: raise it (LimitNOFILE=65536 in the unit, or ulimit -n 65536)";
    Finding::warn("open files", found, remedy)
}

/// The kernel's switch is read, rather than a ring set up: the store tries at start and falls back.
fn io_uring() -> Finding {
    const CHECK: &str = "io_uring";
    let slower = "nothing must be done: plain writes serve, at a lower rate";
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").as_deref().map(str::trim) {
        Ok("0") => Finding::ok(CHECK, "available"),
        Ok("1") => {
            Finding::warn(CHECK, "only for privileged processes (kernel.io_uring_disabled = 1)", slower)
        }
        Ok(_) => Finding::warn(CHECK, "switched off (kernel.io_uring_disabled)", slower),
        Err(_) if Path::new("/proc/sys/kernel").is_dir() => {
            Finding::ok(CHECK, "the kernel has no switch for it: it is tried at start")
        }
        Err(_) => Finding::skip(CHECK, "no /proc here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn a_clock_in_1970_is_a_failure_with_a_remedy() {
        let finding = year(1_000_000);
        assert_eq!(finding.verdict, Verdict::Fail);
        assert!(finding.remedy.contains("timedatectl"));
        assert_eq!(year(1_790_000_000_000_000).verdict, Verdict::Ok);
    }

    #[test]
    fn an_open_data_folder_is_a_warning_and_the_check_leaves_nothing_behind() {
        use std::os::unix::fs::PermissionsExt;
        let data = tempfile::tempdir().unwrap();
        fs::set_permissions(data.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(folder(data.path()).verdict, Verdict::Warn);
        fs::set_permissions(data.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(data.path()).verdict, Verdict::Ok);
        assert_eq!(flush(data.path()).verdict, Verdict::Ok);
        assert_eq!(fs::read_dir(data.path()).unwrap().count(), 0);
    }
}
