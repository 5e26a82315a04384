//! What the journal does to the disk: start a segment, append and sync, erase after a failure.
//!
//! All of the journal's writes go through here. Tests put a tape on it, which keeps what was written and
//! synced in order, so that a crash can be replayed at any point between two of them; and make it fail.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::FallocateFlags;

use super::{
    JournalIo,
    format::{self, GroupHeader, SegmentHeader},
    uring::{Appended, Uring},
};

/// Slices of one vectored write.
pub(super) const IOV_MAX: usize = 1024;

/// An open segment.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    pub(crate) number: u64,
    pub(super) file: File,
}

impl SegmentFile {
    pub(super) fn open(dir: &Path, number: u64) -> io::Result<Self> {
        let path = dir.join(format::segment_name(number));
        Ok(Self { number, file: OpenOptions::new().read(true).write(true).open(path)? })
    }
}

/// See the module's documentation.
pub(crate) struct Disk {
    uring: Option<Uring>,
    /// Size of the spare file, if there is one.
    spare: Option<u64>,
    #[cfg(test)]
    pub(crate) tape: Option<super::tests::Tape>,
}

impl Disk {
    /// Fails only for [`JournalIo::Uring`], where there is none.
    pub(crate) fn new(io: JournalIo) -> io::Result<Self> {
        let uring = match io {
            JournalIo::Plain => None,
            JournalIo::Uring => Some(Uring::new()?),
            JournalIo::Auto => Uring::new()
                .inspect_err(|error| tracing::info!(%error, "no io_uring, the journal writes plainly"))
                .ok(),
        };
        Ok(Self {
            uring,
            spare: None,
            #[cfg(test)]
            tape: None,
        })
    }

    /// Makes a segment that is whole under its name or not there at all.
    pub(super) fn create(
        &mut self,
        dir: &Path,
        header: &SegmentHeader,
        capacity: u64,
    ) -> io::Result<SegmentFile> {
        #[cfg(test)]
        if let Some(tape) = &self.tape {
            tape.create(header, capacity)?;
        }
        let spare = self.spare.take().filter(|held| *held == capacity);
        let temporary = dir.join(if spare.is_some() { SPARE } else { TEMPORARY });
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let file = options.create(spare.is_none()).truncate(spare.is_none()).open(&temporary)?;
        let room = if spare.is_some() { Ok(()) } else { allocate(&file, capacity) };
        let made = room
            .and_then(|()| file.write_all_at(&header.encode(), 0))
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::rename(&temporary, dir.join(format::segment_name(header.number))))
            .and_then(|()| File::open(dir)?.sync_all());
        if let Err(error) = made {
            drop(std::fs::remove_file(&temporary));
            return Err(error);
        }
        Ok(SegmentFile { number: header.number, file })
    }

    /// Makes sure that there is room for another segment, whatever becomes of the disk: an allocated file
    /// that the next segment is made of. It outlives the process.
    pub(super) fn keep_spare(&mut self, dir: &Path, capacity: u64) -> io::Result<()> {
        if self.spare == Some(capacity) {
            return Ok(());
        }
        #[cfg(test)]
        if let Some(tape) = &self.tape {
            tape.spare()?;
        }
        // Nothing but a segment's header is ever written to it before it has a segment's name.
        hold(&dir.join(SPARE), capacity)?;
        self.spare = Some(capacity);
        Ok(())
    }

    /// Writes at `offset` and syncs. On an error any part of it may be there.
    pub(super) fn append(
        &mut self,
        segment: &SegmentFile,
        offset: u64,
        slices: &[IoSlice<'_>],
    ) -> io::Result<()> {
        #[cfg(test)]
        if let Some(tape) = &self.tape {
            tape.append(segment, offset, slices)?;
        }
        if let Some(uring) = &mut self.uring {
            match uring.append(&segment.file, offset, slices) {
                Ok(Appended::Done) => return Ok(()),
                Ok(Appended::Incomplete) => {}
                Ok(Appended::Broken(error)) => self.give_up_uring(&error),
                Err(error) if is_refused(&error) => self.give_up_uring(&error),
                Err(error) => return Err(error),
            }
        }
        write_plain(&segment.file, offset, slices)?;
        Ok(rustix::fs::fdatasync(&segment.file)?)
    }

    fn give_up_uring(&mut self, error: &io::Error) {
        tracing::warn!(%error, "io_uring is refused, the journal writes plainly from now on");
        self.uring = None;
    }

    /// After a failed append: makes its first group unreadable, as well as a failing disk allows.
    pub(super) fn erase(&mut self, segment: &SegmentFile, offset: u64) {
        #[cfg(test)]
        if let Some(tape) = &self.tape {
            tape.erase(segment, offset);
        }
        let erased = segment.file.write_all_at(&[0; GroupHeader::LEN], offset);
        if let Err(error) = erased.and_then(|()| segment.file.sync_data()) {
            tracing::error!(segment = segment.number, offset, %error, "cannot erase a refused group");
        }
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("uring", &self.uring.is_some()).finish_non_exhaustive()
    }
}

/// Name of a segment that is being made.
pub(super) const TEMPORARY: &str = "next.tmp";
/// Name of the file that holds back the room of the next segment.
pub(super) const SPARE: &str = "spare";

/// Makes a file whose blocks are allocated; one that is there already keeps them.
pub(crate) fn hold(path: &Path, bytes: u64) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let found = file.metadata()?;
    if found.len() == bytes && found.blocks() * 512 >= bytes {
        return Ok(file);
    }
    if let Err(error) = file.set_len(0).and_then(|()| allocate(&file, bytes)) {
        drop(std::fs::remove_file(path));
        return Err(error);
    }
    Ok(file)
}

/// Reserves the blocks, so that a write into the segment cannot meet a full disk. File systems that know
/// no reservation get a sparse file.
fn allocate(file: &File, capacity: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, capacity) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => file.set_len(capacity),
        Err(error) => Err(error.into()),
    }
}

/// The ring, not the file, is what failed.
fn is_refused(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
    )
}

fn write_plain(file: &File, mut offset: u64, slices: &[IoSlice<'_>]) -> io::Result<()> {
    for part in slices.chunks(IOV_MAX) {
        let mut part = part.to_vec();
        let mut left = &mut part[..];
        while !left.is_empty() {
            let written = match rustix::io::pwritev(file, left, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            offset += written as u64;
            IoSlice::advance_slices(&mut left, written);
        }
    }
    Ok(())
}
