//! A global allocator that counts while it is asked to: what a hop allocates, what a structure holds.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
};

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
static TRACKING: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicI64 = AtomicI64::new(0);

/// The system's allocator. Outside of [`count`] it costs one load and a branch per allocation, on all sides alike.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counting;

// It forwards to the system's allocator, whose contract is the same; counting touches nothing but atomics.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        held(layout.size(), 0);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        held(0, layout.size());
        // SAFETY: `at` came from this allocator, that is from the system's.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(new_size);
        held(new_size, layout.size());
        // SAFETY: `at` came from this allocator, that is from the system's.
        unsafe { System.realloc(at, layout, new_size) }
    }
}

fn note(size: usize) {
    if COUNTING.load(Ordering::Relaxed) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size as u64, Ordering::Relaxed);
    }
}

fn held(come: usize, gone: usize) {
    if TRACKING.load(Ordering::Relaxed) {
        LIVE.fetch_add(come as i64 - gone as i64, Ordering::Relaxed);
    }
}

/// From now on [`live`] is kept.
pub fn track() {
    TRACKING.store(true, Ordering::SeqCst);
}

/// Bytes that are allocated now, as they were asked for, less what was when [`track`] was called. What the
/// system's allocator adds to each piece is not in it.
#[must_use]
pub fn live() -> i64 {
    LIVE.load(Ordering::Relaxed)
}

/// What was allocated meanwhile, by all threads: how often, and how many bytes. Growing counts as an allocation.
///
/// Zeros unless the binary's global allocator is [`Counting`].
pub fn count(work: impl FnOnce()) -> (u64, u64) {
    let before = (ALLOCATIONS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
    COUNTING.store(true, Ordering::SeqCst);
    work();
    COUNTING.store(false, Ordering::SeqCst);
    (ALLOCATIONS.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
}
