//! What the journal does to the disk: start a segment, append and sync, erase after a failure.
//!
//! All of the journal's writes go through here. Tests put a tape on it, which keeps what was written and
//! synced in order, so that a crash can be replayed at any point between two of them; and make it fail.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice},
    path::{Path, PathBuf},
};

use super::{
    JournalIo,
    format::{self, GroupHeader, SegmentHeader},
    uring::{Appended, Uring},
};
use crate::store::files;

/// Slices of one vectored write.
pub(super) const IOV_MAX: usize = 1024;

/// An open segment.
#[derive(Debug)]
pub(crate) struct SegmentFile {
    pub(crate) number: u64,
    pub(super) file: File,
    pub(super) path: PathBuf,
}

impl SegmentFile {
    pub(super) fn open(dir: &Path, number: u64) -> io::Result<Self> {
        let path = dir.join(format::segment_name(number));
        Ok(Self { number, file: OpenOptions::new().read(true).write(true).open(&path)?, path })
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
        let path = dir.join(format::segment_name(header.number));
        let file = match spare {
            Some(_) => OpenOptions::new().read(true).write(true).open(&temporary)?,
            None => files::create(&temporary)?,
        };
        let room = if spare.is_some() { Ok(()) } else { files::allocate(&file, &temporary, capacity) };
        let made = room
            .and_then(|()| files::write_at(&file, &temporary, &header.encode(), 0))
            .and_then(|()| files::sync(&file, &temporary))
            .and_then(|()| files::rename(&temporary, &path))
            .and_then(|()| files::sync_dir(dir));
        if let Err(error) = made {
            drop(files::remove(&temporary));
            return Err(error);
        }
        Ok(SegmentFile { number: header.number, file, path })
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
        files::hold(&dir.join(SPARE), capacity)?;
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
        #[cfg(test)]
        let _turns = files::tape::append(&segment.path, offset, slices);
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
        let (file, path) = (&segment.file, &segment.path);
        let erased = files::write_at(file, path, &[0; GroupHeader::LEN], offset);
        if let Err(error) = erased.and_then(|()| files::sync(file, path)) {
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
