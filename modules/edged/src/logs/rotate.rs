//! Rotation: a log that grew too large is put aside under its name and the time, the runtime opens it anew, and the
//! oldest of those put aside are removed. They stay as they are: nobody reads them but people at the machine.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker::clock::every;
use time::OffsetDateTime;

use crate::{runtime::Runtime, server::Pods};

/// How often sizes are looked at.
const BEAT: Duration = Duration::from_secs(10);

/// When and how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A log of more bytes is rotated.
    pub bytes: u64,
    /// Files of one instance of a container, the one being written included; at least two.
    pub files: usize,
}

impl Default for Limits {
    /// As kubelet: 10 MiB, 5 files.
    fn default() -> Self {
        Self { bytes: 10 << 20, files: 5 }
    }
}

/// Rotates the logs of all running containers, for as long as it is polled.
pub async fn run(pods: Arc<dyn Pods>, runtime: Arc<dyn Runtime>, limits: Limits) {
    let mut beat = every(BEAT);
    loop {
        beat.tick().await;
        for pod in pods.pods() {
            for container in pod.containers {
                let (true, Some(id), Some(log)) = (container.running, container.id, container.log) else {
                    continue;
                };
                if let Err(error) = rotate(&*runtime, &id, &log, limits, super::now()).await {
                    tracing::warn!(%error, log = %log.display(), "a log cannot be rotated");
                }
            }
        }
    }
}

/// Rotates one log if it is too large; whether it was.
///
/// A call that is dropped may leave the log put aside and not opened anew: the next call completes it.
///
/// # Errors
/// The disk's, or the runtime's refusal to open it anew: everything is as before then.
pub async fn rotate(
    runtime: &dyn Runtime,
    id: &str,
    log: &Path,
    limits: Limits,
    now: OffsetDateTime,
) -> io::Result<bool> {
    let bytes = match log.metadata() {
        Ok(file) => file.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return reopen(runtime, id, log).await,
        Err(e) => return Err(e),
    };
    if bytes <= limits.bytes {
        return Ok(false);
    }
    // Room is made first: a disk that is full is a reason to rotate.
    let mut aside = put_aside(log)?;
    aside.truncate(aside.len().saturating_sub(limits.files.max(2) - 2));
    for oldest in aside {
        fs::remove_file(oldest)?;
    }
    let to = name_aside(log, now);
    fs::rename(log, &to)?;
    if let Err(e) = runtime.reopen_log(id).await {
        fs::rename(&to, log)?;
        return Err(io::Error::other(e));
    }
    Ok(true)
}

/// A log was put aside and the agent ended before the runtime was told, or the container has not printed yet.
async fn reopen(runtime: &dyn Runtime, id: &str, log: &Path) -> io::Result<bool> {
    if put_aside(log)?.is_empty() {
        return Ok(false);
    }
    runtime.reopen_log(id).await.map_err(io::Error::other)?;
    Ok(true)
}

fn name_aside(log: &Path, now: OffsetDateTime) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    let (date, time) = (now.date(), now.time());
    name.push(format!(
        ".{:04}{:02}{:02}-{:02}{:02}{:02}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    ));
    PathBuf::from(name)
}

/// The files of a log that were put aside, the oldest first.
fn put_aside(log: &Path) -> io::Result<Vec<PathBuf>> {
    let Some((folder, name)) = log.parent().zip(log.file_name()) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    let prefix = [name.as_encoded_bytes(), b"."].concat();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(&prefix) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fake::Fake, runtime::cri};

    async fn running(fake: &Fake) -> String {
        let metadata =
            cri::PodSandboxMetadata { name: "web".to_owned(), ..cri::PodSandboxMetadata::default() };
        let config = cri::PodSandboxConfig { metadata: Some(metadata), ..cri::PodSandboxConfig::default() };
        fake.add_image("web", 1);
        let sandbox = fake.run_sandbox(config.clone()).await.expect("a sandbox");
        let container = cri::ContainerConfig {
            image: Some(cri::ImageSpec { image: "web".to_owned(), ..cri::ImageSpec::default() }),
            ..cri::ContainerConfig::default()
        };
        let id = fake.create_container(&sandbox, container, config).await.expect("a container");
        fake.start_container(&id).await.expect("started");
        id
    }

    #[tokio::test]
    async fn a_large_log_is_put_aside_and_the_oldest_go() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("0.log");
        let other = folder.path().join("10.log.20260101-000000");
        fs::write(&other, "of another instance").expect("written");
        let fake = Fake::default();
        let id = running(&fake).await;
        let limits = Limits { bytes: 10, files: 3 };
        let mut now = OffsetDateTime::UNIX_EPOCH;
        for round in 0..5 {
            fs::write(&log, format!("{round} 0123456789")).expect("written");
            now += Duration::from_secs(1);
            assert!(rotate(&fake, &id, &log, limits, now).await.expect("rotated"));
            assert!(!log.exists(), "the runtime makes it anew");
            fs::write(&log, "small").expect("written");
            assert!(!rotate(&fake, &id, &log, limits, now).await.expect("looked at"));
        }
        let aside = put_aside(&log).expect("listed");
        let kept: Vec<_> = aside.iter().map(|path| fs::read_to_string(path).expect("read")).collect();
        assert_eq!(kept, ["3 0123456789", "4 0123456789"]);
        assert!(aside[1].ends_with("0.log.19700101-000005"), "{aside:?}");
        assert!(other.exists());
        assert_eq!(fake.calls("reopen_log"), 5);
    }

    #[tokio::test]
    async fn a_log_that_is_not_opened_anew_stays_where_it_was() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("0.log");
        fs::write(&log, "0123456789").expect("written");
        let fake = Fake::default();
        let id = running(&fake).await;
        fake.kill();
        let limits = Limits { bytes: 5, files: 2 };
        rotate(&fake, &id, &log, limits, OffsetDateTime::UNIX_EPOCH).await.expect_err("away");
        assert_eq!(fs::read_to_string(&log).expect("read"), "0123456789");
        // An agent ended between the two steps: the next one completes it.
        fake.start();
        fs::rename(&log, name_aside(&log, OffsetDateTime::UNIX_EPOCH)).expect("renamed");
        assert!(rotate(&fake, &id, &log, limits, OffsetDateTime::UNIX_EPOCH).await.expect("done"));
        assert_eq!(fake.calls("reopen_log"), 2);
    }
}
