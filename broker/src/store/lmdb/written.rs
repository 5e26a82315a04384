//! What a store wrote, by cause: the wear of the flash under it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes given to the file system since the store was opened. What the file system adds is not in it.
#[derive(Debug, Default)]
pub struct Written {
    /// Groups and headers of segments.
    pub journal: AtomicU64,
    /// Pages of commits.
    pub checkpoint: AtomicU64,
    /// Segments that were rewritten.
    pub compaction: AtomicU64,
}

impl Written {
    /// Runs a commit, and counts what this thread writes meanwhile.
    pub(super) fn commit<T>(&self, commit: impl FnOnce() -> T) -> T {
        let before = written_by_this_thread();
        let done = commit();
        self.checkpoint.fetch_add(written_by_this_thread().saturating_sub(before), Relaxed);
        done
    }
}

/// LMDB does not say what it writes; the kernel does. 0 where it does not.
fn written_by_this_thread() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").unwrap_or_default();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")?.parse().ok()).unwrap_or(0)
}
