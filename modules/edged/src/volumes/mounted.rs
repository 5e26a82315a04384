//! Mounts of ours: file systems in memory, parts of volumes, and getting rid of all of them.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, fstat},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount},
};

/// Mounts over mounts are rare; more than this and somebody mounts as fast as we unmount.
const ROUNDS: usize = 16;

/// Mounts a file system in memory at a folder, unless one is there. `size` bounds it, bytes.
pub(super) fn memory(at: &Path, mode: u32, group: Option<u32>, size: Option<i64>) -> io::Result<()> {
    let real = fs::canonicalize(at)?;
    if table()?.contains(&real) {
        return Ok(());
    }
    let mut options = format!("mode={mode:o}");
    if let Some(group) = group {
        options.push_str(&format!(",gid={group}"));
    }
    if let Some(size) = size {
        options.push_str(&format!(",size={size}"));
    }
    let options = CString::new(options)?;
    mount("tmpfs", &real, "tmpfs", MountFlags::empty(), options.as_c_str())?;
    Ok(())
}

/// Mounts what a descriptor stands for at `target`, in place of what was mounted there.
pub(super) fn bind(what: &OwnedFd, target: &Path) -> io::Result<()> {
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    unmount_all(target)?;
    let is_folder = FileType::from_raw_mode(fstat(what)?.st_mode) == FileType::Directory;
    // What stands there from before may be of the other kind.
    match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() == is_folder => {}
        Ok(found) if found.is_dir() => fs::remove_dir(target)?,
        Ok(_) => fs::remove_file(target)?,
        Err(_) => {}
    }
    if is_folder {
        fs::create_dir_all(target)?;
    } else {
        fs::OpenOptions::new().create(true).append(true).open(target)?;
    }
    mount_bind_recursive(format!("/proc/self/fd/{}", what.as_raw_fd()), target)?;
    Ok(())
}

/// Unmounts all that is mounted at a folder or below it. The folder is given as the kernel names it.
pub(super) fn unmount_below(folder: &Path) -> io::Result<()> {
    for _ in 0..ROUNDS {
        let mut found = table()?;
        found.retain(|at| at.starts_with(folder));
        if found.is_empty() {
            return Ok(());
        }
        // The table is in the order of mounting: what stands on something else comes after it.
        for at in found.into_iter().rev() {
            unmount_all(&at)?;
        }
    }
    Err(io::Error::other(format!("something is mounted below {} again and again", folder.display())))
}

/// Every mount at this very path; none is fine.
fn unmount_all(at: &Path) -> io::Result<()> {
    for _ in 0..ROUNDS {
        match unmount(at, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Somebody looks into it: it goes when they are done, its name goes now.
            Err(Errno::BUSY) => unmount(at, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
            // Nothing is mounted there.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Where anything is mounted, in the order of mounting.
pub(super) fn table() -> io::Result<Vec<PathBuf>> {
    let text = fs::read("/proc/self/mountinfo")?;
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4).map(unescaped)).collect())
}

/// Blanks and line ends stand as `\040`.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let code = text.get(at + 1..at + 4).filter(|_| text[at] == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        out.push(code.unwrap_or(text[at]));
        at += if code.is_some() { 4 } else { 1 };
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mounts_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescaped(br"/a\040b/c\134d"), Path::new("/a b/c\\d"));
        assert_eq!(unescaped(br"/a\9"), Path::new(r"/a\9"));
    }
}
