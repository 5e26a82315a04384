//! The only file that names io_uring: one linked submission of a vectored write and its fdatasync.

use std::{
    fs::File,
    io::{self, IoSlice},
    os::fd::AsRawFd,
};

use io_uring::{IoUring, opcode, squeue, types};

use super::disk::IOV_MAX;

/// Writes of one submission: with IOV_MAX slices each, more than a chunk of the journal has.
const WRITES_MAX: usize = 31;

/// A ring of its own, used by one thread.
pub(crate) struct Uring {
    ring: IoUring,
}

/// How a submission ended.
pub(crate) enum Appended {
    /// Written and synced.
    Done,
    /// A write was short or cut the chain: it may be repeated as a whole.
    Incomplete,
    /// The kernel took nothing. The ring still holds the entries and must be dropped unused.
    Broken(io::Error),
}

impl Uring {
    /// A ring, if the kernel (or a seccomp filter) allows one.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { ring: IoUring::new(WRITES_MAX as u32 + 1)? })
    }

    /// Writes `slices` at `offset` and syncs the data, as one chain: the kernel starts each step when the
    /// one before has fully succeeded. Waits for all of it.
    pub(crate) fn append(
        &mut self,
        file: &File,
        offset: u64,
        slices: &[IoSlice<'_>],
    ) -> io::Result<Appended> {
        if slices.len() > WRITES_MAX * IOV_MAX {
            return Ok(Appended::Incomplete);
        }
        let fd = types::Fd(file.as_raw_fd());
        let mut chain = Vec::with_capacity(slices.len() / IOV_MAX + 2);
        let mut lens = Vec::with_capacity(chain.capacity());
        let mut at = offset;
        for part in slices.chunks(IOV_MAX) {
            let len: usize = part.iter().map(|slice| slice.len()).sum();
            // An IoSlice is ABI compatible with an iovec.
            let write = opcode::Writev::new(fd, part.as_ptr().cast(), part.len() as u32).offset(at);
            chain.push(write.build().flags(squeue::Flags::IO_LINK).user_data(lens.len() as u64));
            lens.push(len);
            at += len as u64;
        }
        let sync = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC);
        chain.push(sync.build().user_data(lens.len() as u64));

        let mut results = vec![None; chain.len()];
        match self.run(&chain, &mut results) {
            Ok(true) => check(&results, &lens),
            Ok(false) => Ok(Appended::Incomplete),
            Err(error) => Ok(Appended::Broken(error)),
        }
    }

    /// Submits the chain and returns when every entry of it has completed: true if the kernel took it at
    /// once, so that the links held. An error: the kernel has taken nothing of it.
    #[allow(unsafe_code)] // io_uring cannot know how long buffers live; this function does
    fn run(&mut self, chain: &[squeue::Entry], results: &mut [Option<i32>]) -> io::Result<bool> {
        // SAFETY: the entries point to the caller's file and slices, which the caller borrows for longer
        // than this call. This function does not return while the kernel has an entry: it waits for as many
        // completions as there are entries, and a ring that can no longer be waited on ends the process.
        // Entries that the kernel never took are read by nobody, because the caller drops the ring then.
        unsafe { self.ring.submission().push_multiple(chain) }.map_err(io::Error::other)?;
        let mut first = None;
        let mut left = chain.len();
        while left > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(taken) => drop(first.get_or_insert(taken)),
                Err(error) if retry(&error) => {}
                Err(error) if first.is_none() => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "io_uring cannot be waited on while it owns the journal's buffers");
                    std::process::abort();
                }
            }
            for done in self.ring.completion() {
                results[done.user_data() as usize] = Some(done.result());
                left -= 1;
            }
        }
        Ok(first == Some(chain.len()))
    }
}

fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy
    )
}

fn check(results: &[Option<i32>], lens: &[usize]) -> io::Result<Appended> {
    let canceled = rustix::io::Errno::CANCELED.raw_os_error();
    let mut incomplete = false;
    for (at, result) in results.iter().enumerate() {
        let result = result.expect("every entry has completed");
        if result < 0 && result != -canceled {
            return Err(io::Error::from_raw_os_error(-result));
        }
        incomplete |= result < 0 || lens.get(at).is_some_and(|len| *len != result as usize);
    }
    Ok(if incomplete { Appended::Incomplete } else { Appended::Done })
}
