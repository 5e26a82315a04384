//! Backups of a data folder: made of a running process or of a folder at rest, and made into a folder again.
//!
//! A backup is a folder with a copy of the store and of everything else that the data folder holds, keys
//! included, and `backup.json`, which is written last: without it the backup is not complete. Left out is what
//! says which copy of the folder this is (`instance.json`). So what is restored mints a new instance, new
//! epochs and new incarnations at its first start: what it does from then on is never taken for what the
//! original did after the backup.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    OpenError, files,
    lmdb::{
        self,
        backup::{Copied, Copier},
    },
};
use crate::{clock, private};

/// What stands in `backup.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of backups; this version knows 1.
    pub format: u32,
    /// Version that made it.
    pub octobus: String,
    /// When, microseconds since 1970.
    pub made_us: u64,
    /// Segments of the journal.
    pub segments: u64,
    /// Bytes of checkpoint and segments.
    pub bytes: u64,
    /// The other files, relative to the folder.
    pub files: Vec<PathBuf>,
}

/// Why there is no backup, or nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A folder must be new or empty.
    #[error("{0} is not empty: name a folder that does not exist yet")]
    NotEmpty(PathBuf),
    /// It would contain itself.
    #[error("{0} is inside the data folder: name a folder elsewhere")]
    Inside(PathBuf),
    /// There is no `backup.json`.
    #[error("{0} is not a complete backup: it has no backup.json")]
    NotABackup(PathBuf),
    /// A later version wrote it.
    #[error("{path} has backup format {found}; this version reads 1: use the version that wrote it")]
    Format { path: PathBuf, found: u32 },
    /// The process stops.
    #[error("the store is closed")]
    Closed,
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// Everything else.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    /// The manifest.
    #[error(transparent)]
    Private(#[from] private::PrivateError),
}

/// Makes a backup of the data folder of a running process. Blocks; the process goes on meanwhile.
///
/// # Errors
/// See [`BackupError`]; what was written is left, without `backup.json`.
pub fn of_running(copier: &Copier, data: &Path, to: &Path) -> Result<Manifest, BackupError> {
    make(data, to, |to| copier.copy(to)?.ok_or(BackupError::Closed))
}

/// Makes a backup of a data folder that no process uses.
///
/// # Errors
/// See [`BackupError`]; it is in use, for example.
pub fn of_folder(data: &Path, to: &Path) -> Result<Manifest, BackupError> {
    let file = data.join("checkpoint/data.mdb");
    fs::metadata(&file).map_err(io_error("find", &file))?;
    let _lock = lmdb::lock(data)?;
    make(data, to, |to| {
        let (journal, checkpoint) = (to.join("journal"), to.join("checkpoint"));
        lmdb::make_dir(&journal)?;
        lmdb::make_dir(&checkpoint)?;
        files::copy(&file, &checkpoint.join("data.mdb")).map_err(io_error("copy", &file))?;
        lmdb::sync_dir(&checkpoint)?;
        let mut copied = lmdb::backup::copy_journal(&data.join("journal"), &journal)?;
        copied.bytes += fs::metadata(&file).map_err(io_error("read", &file))?.len();
        Ok(copied)
    })
}

/// Makes a data folder of a backup. It is another store's from its first start on: see the module's
/// documentation.
///
/// # Errors
/// See [`BackupError`]. What was written is left: remove it.
pub fn restore(backup: &Path, data: &Path) -> Result<Manifest, BackupError> {
    let raw = private::read(&backup.join(MANIFEST), MANIFEST_BYTES_MAX)?;
    let parsed = raw.and_then(|raw| serde_json::from_slice::<Manifest>(&raw).ok());
    let manifest = parsed.ok_or_else(|| BackupError::NotABackup(backup.to_owned()))?;
    if manifest.format != FORMAT {
        return Err(BackupError::Format { path: backup.to_owned(), found: manifest.format });
    }
    begin(data)?;
    copy_tree(backup, data, &|name| name == MANIFEST, &mut Vec::new())?;
    let parent = data.parent().filter(|parent| !parent.as_os_str().is_empty());
    lmdb::sync_dir(parent.unwrap_or_else(|| Path::new(".")))?;
    Ok(manifest)
}

fn make(
    data: &Path,
    to: &Path,
    store: impl FnOnce(&Path) -> Result<Copied, BackupError>,
) -> Result<Manifest, BackupError> {
    begin(to)?;
    let inside = |path: &Path| fs::canonicalize(path).map_err(io_error("find", path));
    if inside(to)?.starts_with(inside(data)?) {
        fs::remove_dir(to).map_err(io_error("remove", to))?;
        return Err(BackupError::Inside(to.to_owned()));
    }
    let copied = store(to)?;
    let mut others = Vec::new();
    copy_tree(data, to, &|name| NOT_COPIED.contains(&name), &mut others)?;
    let files =
        others.into_iter().filter_map(|path| path.strip_prefix(to).map(Path::to_owned).ok()).collect();
    let manifest = Manifest {
        format: FORMAT,
        octobus: env!("CARGO_PKG_VERSION").to_owned(),
        made_us: clock::wall_us(),
        segments: copied.segments,
        bytes: copied.bytes,
        files,
    };
    let raw = serde_json::to_vec_pretty(&manifest).expect("paths that were UTF-8 and numbers");
    private::write(&to.join(MANIFEST), &raw)?;
    Ok(manifest)
}

/// A new or empty folder of mode 0700.
fn begin(to: &Path) -> Result<(), BackupError> {
    lmdb::make_dir(to)?;
    match fs::read_dir(to).map_err(io_error("list", to))?.next() {
        None => Ok(()),
        Some(_) => Err(BackupError::NotEmpty(to.to_owned())),
    }
}

/// Copies what is in a folder, but for what is skipped at its top, and says which files those were. Files get
/// mode 0600, folders 0700, whatever they had: there are keys among them.
fn copy_tree(
    from: &Path,
    to: &Path,
    skip: &dyn Fn(&str) -> bool,
    copied: &mut Vec<PathBuf>,
) -> Result<(), BackupError> {
    for entry in fs::read_dir(from).map_err(io_error("list", from))? {
        let entry = entry.map_err(io_error("list", from))?;
        let kind = entry.file_type().map_err(io_error("read", from))?;
        let name = entry.file_name();
        // What is not UTF-8 is not ours.
        let Some(text) = name.to_str().filter(|text| !skip(text)) else { continue };
        let (old, new) = (entry.path(), to.join(text));
        if kind.is_dir() {
            fs::DirBuilder::new().mode(0o700).create(&new).map_err(io_error("make", &new))?;
            copy_tree(&old, &new, &|_| false, copied)?;
        } else if kind.is_file() {
            files::copy(&old, &new).map_err(io_error("copy", &old))?;
            copied.push(new);
        }
    }
    Ok(lmdb::sync_dir(to)?)
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackupError {
    let path = path.to_owned();
    move |source| BackupError::Io { doing, path, source }
}

const FORMAT: u32 = 1;
const MANIFEST: &str = "backup.json";
const MANIFEST_BYTES_MAX: usize = 1 << 20;
/// The store, which is copied by its own rules; what belongs to a process; and which copy this is.
const NOT_COPIED: [&str; 8] = [
    "journal",
    "checkpoint",
    "checkpoint.new",
    "reserve",
    "lock",
    "admin.sock",
    "instance.json",
    "quarantine",
];
