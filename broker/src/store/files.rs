//! What a store does to the files in its folder.
//!
//! Whatever changes a name or the bytes of a file of a store goes through here, or, on the one hot path, through
//! the journal's [`Disk`](super::journal::disk::Disk). Tests put a `Tape` on a store's folder, which keeps every
//! such operation in order, so that a crash can be replayed at any point between two of them. LMDB writes by
//! itself; its commits are told to the tape.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use rustix::fs::FallocateFlags;

#[cfg(test)]
use self::tape::Op;

#[cfg(test)]
pub(crate) mod tape;

/// Opens a file of mode 0600 for reading and writing; empty, even if it was there.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    #[cfg(test)]
    let _turn = tape::begin(path, || Op::Create(path.to_owned()));
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Reserves the blocks, so that a write into the file cannot meet a full disk. File systems that know no
/// reservation get a sparse file.
pub(crate) fn allocate(file: &File, path: &Path, len: u64) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(path, || Op::Grow(path.to_owned(), len));
    #[cfg(not(test))]
    let _: &Path = path;
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(len),
        Err(error) => Err(error.into()),
    }
}

/// Makes a file whose blocks are allocated; one that is there already keeps them.
pub(crate) fn hold(path: &Path, bytes: u64) -> io::Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| found.len() == bytes && found.blocks() * 512 >= bytes) {
        return Ok(());
    }
    let file = create(path)?;
    allocate(&file, path, bytes).inspect_err(|_| drop(remove(path)))
}

/// Writes all of `bytes` at this offset.
pub(crate) fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(path, || Op::Write(path.to_owned(), offset, bytes.to_vec()));
    #[cfg(not(test))]
    let _: &Path = path;
    file.write_all_at(bytes, offset)
}

/// Makes the bytes of a file durable, and its size; its name is its folder's.
pub(crate) fn sync(file: &File, path: &Path) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(path, || Op::Sync(path.to_owned()));
    #[cfg(not(test))]
    let _: &Path = path;
    file.sync_all()
}

/// Makes the names in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(dir, || Op::SyncDir(dir.to_owned()));
    File::open(dir)?.sync_all()
}

/// Gives a file or folder a new name in the same folder, in place of the file or empty folder that had it.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(from, || Op::Rename(from.to_owned(), to.to_owned()));
    std::fs::rename(from, to)
}

/// Removes a file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    let _turn = tape::begin(path, || Op::Remove(path.to_owned()));
    std::fs::remove_file(path)
}

/// Copies a file to one of mode 0600 that must not be there, and makes its bytes durable.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut old = File::open(from)?;
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    io::copy(&mut old, &mut new)?;
    sync(&new, to)
}

/// Keeps the size of a file and nothing of what is behind `end`, durably.
pub(crate) fn cut(path: &Path, end: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let len = file.metadata()?.len();
    file.set_len(end)?;
    file.set_len(len)?;
    sync(&file, path)
}

/// Nobody but its owner reads or writes it.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
}
