//! Images that come as files: imported once, and again when the runtime has them no more.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{
    process::Command,
    time::{Instant, sleep},
};

use super::archive;
use crate::runtime::{Runtime, RuntimeError};

/// How long the CRI part of containerd may take to see what was put beside it.
const SEEN_WITHIN: Duration = Duration::from_secs(10);
/// The namespace in containerd that CRI uses.
const NAMESPACE: &str = "k8s.io";

/// How to bring a file into containerd.
#[derive(Debug, Clone)]
pub struct Importer {
    /// Its command line tool.
    pub ctr: PathBuf,
    pub socket: PathBuf,
    /// Where images are unpacked; none: containerd's default.
    pub snapshotter: Option<String>,
    /// Remembers what was imported.
    pub record: PathBuf,
}

/// What was imported from a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Imported {
    bytes: u64,
    modified_nanos: u64,
    images: Vec<String>,
}

/// A file whose images could not be imported. The others were.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the images of {} cannot be imported: {why}", file.display())]
pub struct ImportError {
    pub file: PathBuf,
    pub why: String,
}

impl Importer {
    /// Imports every `*.tar` of a folder whose content it has not imported yet, or whose images the runtime has lost.
    /// Names of all images that are there by this, and what failed. A folder that is not there is an empty one.
    ///
    /// Not cancel-safe in that the last file may be imported and not remembered: it is imported again then.
    pub async fn folder(&self, runtime: &dyn Runtime, folder: &Path) -> (Vec<String>, Vec<ImportError>) {
        let known = fs::read(&self.record).ok();
        let known: BTreeMap<String, Imported> =
            known.and_then(|record| serde_json::from_slice(&record).ok()).unwrap_or_default();
        let mut record = BTreeMap::new();
        let mut failed = Vec::new();
        for file in archives(folder) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match self.file(runtime, &file, known.get(&name)).await {
                Ok(imported) => {
                    record.insert(name, imported);
                }
                Err(why) => failed.push(ImportError { file, why }),
            }
        }
        if record != known
            && let Err(why) = self.remember(&record)
        {
            failed.push(ImportError { file: self.record.clone(), why: why.to_string() });
        }
        let names = record.into_values().flat_map(|imported| imported.images).collect();
        (names, failed)
    }

    async fn file(
        &self,
        runtime: &dyn Runtime,
        file: &Path,
        known: Option<&Imported>,
    ) -> Result<Imported, String> {
        let (bytes, modified_nanos) = stamp(file).map_err(|e| e.to_string())?;
        if let Some(known) = known
            && (known.bytes, known.modified_nanos) == (bytes, modified_nanos)
            && has_all(runtime, &known.images).await.map_err(|e| e.to_string())?
        {
            return Ok(known.clone());
        }
        let images = archive::names(file).map_err(|e| e.to_string())?;
        tracing::info!(file = %file.display(), ?images, "importing images");
        self.import(file).await?;
        seen(runtime, &images).await?;
        Ok(Imported { bytes, modified_nanos, images })
    }

    /// Brings one file in. A dropped call ends the import.
    pub(super) async fn import(&self, file: &Path) -> Result<(), String> {
        let mut command = Command::new(&self.ctr);
        command.arg("--address").arg(&self.socket).args(["--namespace", NAMESPACE]);
        command.args(["images", "import"]);
        if let Some(snapshotter) = &self.snapshotter {
            command.args(["--snapshotter", snapshotter]);
        }
        let output = command.arg(file).stdin(Stdio::null()).kill_on_drop(true).output().await;
        let output = output.map_err(|e| format!("{}: {e}", self.ctr.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(text.trim().chars().take(1000).collect())
    }

    /// Whole or not at all: a torn record would only cost an import, but it would cost it each time.
    fn remember(&self, record: &BTreeMap<String, Imported>) -> io::Result<()> {
        let new = self.record.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(record)?)?;
        fs::rename(new, &self.record)
    }
}

/// In the order of their names, so that what is imported twice is always imported from the same file last.
fn archives(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let mut archives: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "tar") && path.is_file())
        .collect();
    archives.sort();
    archives
}

fn stamp(file: &Path) -> io::Result<(u64, u64)> {
    let meta = file.metadata()?;
    let modified = meta.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok((meta.len(), u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX)))
}

async fn has_all(runtime: &dyn Runtime, images: &[String]) -> Result<bool, RuntimeError> {
    for image in images {
        if runtime.image(image).await?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// CRI learns of imported images by an event of containerd.
pub(super) async fn seen(runtime: &dyn Runtime, images: &[String]) -> Result<(), String> {
    let deadline = Instant::now() + SEEN_WITHIN;
    let mut pause = Duration::from_millis(2);
    while !has_all(runtime, images).await.map_err(|e| e.to_string())? {
        if Instant::now() >= deadline {
            return Err(format!("containerd imported {images:?} and does not show them"));
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::{
        containerd::archive::Image,
        fake::{Fake, Metadata},
    };

    /// Stands for ctr: it writes what it was asked for into a file.
    fn importer(folder: &Path) -> Importer {
        let ctr = folder.join("ctr");
        let script = "#!/bin/sh\nfor last; do :; done\ncase $last in *bad*) echo broken >&2; exit 1;; esac\n\
                      echo \"$last\" >>\"$(dirname \"$0\")/calls\"\n";
        fs::write(&ctr, script).expect("written");
        fs::set_permissions(&ctr, fs::Permissions::from_mode(0o755)).expect("set");
        let record = folder.join("imported.json");
        Importer { ctr, socket: folder.join("socket"), snapshotter: None, record }
    }

    fn put(folder: &Path, file: &str, image: &str) {
        let image = Image { name: image.to_owned(), ..Image::default() };
        fs::write(folder.join(file), image.archive().expect("an archive")).expect("written");
    }

    #[tokio::test]
    async fn an_archive_is_imported_once_and_again_when_its_image_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let (here, importer) = (folder.path(), importer(folder.path()));
        let calls = || fs::read_to_string(here.join("calls")).unwrap_or_default().lines().count();
        let fake = Fake::default();
        fake.add_image("example.org/a:1", 1);
        put(here, "a.tar", "example.org/a:1");
        let (names, failed) = importer.folder(&fake, here).await;
        assert_eq!((names.as_slice(), failed.len()), (&["example.org/a:1".to_owned()][..], 0));
        importer.folder(&fake, here).await;
        assert_eq!(calls(), 1, "what was imported is not imported again");
        fake.reboot(Metadata::Lost);
        let import = importer.folder(&fake, here);
        let seen_later = async {
            while calls() < 2 {
                tokio::task::yield_now().await;
            }
            fake.add_image("example.org/a:1", 1);
        };
        let ((names, failed), ()) = tokio::join!(import, seen_later);
        assert_eq!((names.len(), failed.len()), (1, 0));
    }

    #[tokio::test]
    async fn one_bad_file_does_not_keep_the_others_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let importer = importer(folder.path());
        let fake = Fake::default();
        fake.add_image("example.org/c:1", 1);
        put(folder.path(), "a-bad.tar", "example.org/a:1");
        fs::write(folder.path().join("b.tar"), [1; 4000]).expect("written");
        put(folder.path(), "c.tar", "example.org/c:1");
        let (names, failed) = importer.folder(&fake, folder.path()).await;
        assert_eq!(names, ["example.org/c:1"]);
        let why: Vec<_> = failed.iter().map(|failure| failure.why.as_str()).collect();
        assert_eq!(why, ["broken", "it is no tar archive"]);
    }
}
