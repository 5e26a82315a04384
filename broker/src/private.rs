//! Files that nobody else may read: keys, secrets, and what stands beside them.
//!
//! A file is 0600 in a directory of 0700, written whole or not at all: to a temporary name, synced,
//! renamed, directory synced. Reading refuses a file that others can read, because a key that was
//! readable for a while is not a secret any more and silence would hide that.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Why a private file or directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PrivateError {
    /// Others can read or write it.
    #[error("{path} has mode {mode:04o} and holds secrets: run `chmod {wanted:04o} {path}`")]
    Mode { path: PathBuf, mode: u32, wanted: u32 },
    /// It is larger than anything this program writes there.
    #[error("{path} is larger than {max} bytes: it was not written by octobus")]
    TooLarge { path: PathBuf, max: usize },
    /// The file system says no.
    #[error("cannot {doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

/// Creates a directory of mode 0700 and what is missing above it, or checks the one that is there.
///
/// # Errors
/// It cannot be created, or others can enter it.
pub fn create_dir(path: &Path) -> Result<(), PrivateError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))?;
    let meta = fs::metadata(path).map_err(io_error("read", path))?;
    check_mode(path, meta.mode(), 0o700)
}

/// Replaces `path` by `bytes`; durable when this returns. After a crash the file is the old or the new one.
///
/// # Errors
/// The file system says no; the old file is untouched.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), PrivateError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let written = write_new(&temporary, bytes).and_then(|()| {
        fs::rename(&temporary, path).map_err(io_error("rename to", path))?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        sync_dir(dir.unwrap_or_else(|| Path::new(".")))
    });
    if written.is_err() {
        // It may not exist at all; the error worth reporting is the first one.
        drop(fs::remove_file(&temporary));
    }
    written
}

/// Reads at most `max` bytes; `None` if there is no such file.
///
/// # Errors
/// Others can read the file, it is larger than `max`, or the file system says no.
pub fn read(path: &Path, max: usize) -> Result<Option<Vec<u8>>, PrivateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(io_error("open", path)(source)),
    };
    let meta = file.metadata().map_err(io_error("read", path))?;
    check_mode(path, meta.mode(), 0o600)?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    if bytes.len() > max {
        return Err(PrivateError::TooLarge { path: path.into(), max });
    }
    Ok(Some(bytes))
}

/// Makes the entries of a directory (names created, renamed, removed in it) durable.
///
/// # Errors
/// The file system says no.
pub fn sync_dir(path: &Path) -> Result<(), PrivateError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(io_error("sync", path))
}

fn write_new(path: &Path, bytes: &[u8]) -> Result<(), PrivateError> {
    // A leftover of a crash may have any mode: never write a secret into a file that exists.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error("remove", path)(error));
        }
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("create", path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error("write", path))
}

fn check_mode(path: &Path, mode: u32, wanted: u32) -> Result<(), PrivateError> {
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(PrivateError::Mode { path: path.into(), mode: mode & 0o7777, wanted })
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PrivateError {
    let path = path.to_path_buf();
    move |source| PrivateError::Io { doing, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_written_file_is_private_and_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/key");
        create_dir(path.parent().unwrap()).unwrap();
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path, 3).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write(&path, b"secret").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = read(&path, 100).unwrap_err().to_string();
        assert!(error.contains("chmod 0600"), "{error}");
    }

    #[test]
    fn a_leftover_temporary_file_does_not_lend_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let leftover = dir.path().join("key.new");
        fs::write(&leftover, b"old").unwrap();
        fs::set_permissions(&leftover, fs::Permissions::from_mode(0o666)).unwrap();
        write(&path, b"secret").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn an_oversized_file_is_refused_and_an_absent_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert_eq!(read(&path, 1).unwrap(), None);
        write(&path, b"secret").unwrap();
        assert!(matches!(read(&path, 5), Err(PrivateError::TooLarge { .. })));
    }
}
