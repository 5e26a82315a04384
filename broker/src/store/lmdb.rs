//! The store on disk: journal and checkpoint.
//!
//! ```text
//! PATH/lock          one process per store
//! PATH/journal/      segments, see the journal's documentation
//! PATH/checkpoint/   LMDB, see checkpoint.rs
//! PATH/reserve       blocks held back for the checkpoint
//! PATH/quarantine/   what was found damaged, for whoever looks into it
//! ```
//!
//! Three threads, which sleep while there is nothing to do:
//!
//! - the *writer* journals every group that waits, takes its effects into the overlay, and says `Persisted`;
//! - the *keeper* commits what gathered in the overlay to the checkpoint, at most once a second or per
//!   [`Options::checkpoint_bytes`], frees segments, and rewrites those that are mostly dead;
//! - the *reader* serves reads of Logs: index from checkpoint and overlay, records from the segments.
//!
//! A panic of one of them ends the process: half a store must not acknowledge, whoever waits for the other
//! half would wait for ever, and the journal holds everything that was acknowledged.
//!
//! Recovery is the checkpoint with the groups above its `applied_lsn` on top. It writes nothing: what was
//! replayed is checkpointed like anything else.
//!
//! A segment is freed when the checkpoint is beyond it and no index entry points into it: State and facts
//! live in the checkpoint by then and hold nothing. One that is half dead is rewritten, see compaction.rs.
//!
//! Before a disk or the checkpoint's map is full the store says so, and holds back room for what frees space,
//! see room.rs. When that is used up too, groups are refused and everything else goes on. Refusal by the
//! checkpoint comes late, when the overlay has grown to its bound, because until then nothing depends on it.

pub mod backup;
mod checkpoint;
mod compaction;
pub mod fsck;
mod index;
mod keeper;
mod overlay;
mod pages;
mod quarantine;
mod reader;
mod rebuild;
mod room;
mod segments;
mod topics;
mod writer;
pub mod written;

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread::JoinHandle,
    time::Duration,
};

use bytes::Bytes;
use codec::{Kind, Record};

use self::{
    checkpoint::{Checkpoint, Facts, Summary},
    overlay::Overlay,
    pages::PageError,
    quarantine::Quarantine,
    rebuild::OldGroups,
    room::{Reserve, Room},
    segments::Segments,
};
use super::{
    Damage, Extent, LocalFact, LogRecovery, OpenError, Recovered, Store, StoreEvent, Stretches, facts, files,
    journal::{
        Journal, JournalIo,
        disk::Disk,
        format::{REWRITTEN, segment_name},
        scan::{self, Seen},
    },
};
use crate::core::event::{Group, ReadRequest};

/// How a store is laid out and how often it writes.
#[derive(Debug, Clone)]
pub struct Options {
    /// Size of a segment; a larger group gets a larger one.
    pub segment_bytes: u64,
    /// A checkpoint is due after this much journal, whenever the last one was. Twice as much memory, in
    /// State and index entries, is what the store keeps before it refuses groups.
    pub checkpoint_bytes: usize,
    /// Shortest time between two checkpoints that are due to time.
    pub checkpoint_every: Duration,
    /// A segment that is half dead is rewritten once so many checkpoints in a row took nothing more out of
    /// it: what dies in order is soon freed whole, and rewriting it would wear the flash for nothing.
    pub rewrite_after: u32,
    /// Address space of the checkpoint at first; it grows by doubling.
    pub map_bytes: usize,
    /// Where growing ends.
    pub map_bytes_max: usize,
    /// How the journal writes.
    pub io: JournalIo,
}

impl Options {
    /// For a hub: large segments, room for large checkpoints.
    #[must_use]
    pub fn hub() -> Self {
        Self {
            segment_bytes: 64 << 20,
            checkpoint_bytes: 8 << 20,
            checkpoint_every: Duration::from_secs(1),
            rewrite_after: 16,
            map_bytes: MAP_BYTES,
            map_bytes_max: MAP_BYTES_MAX,
            io: JournalIo::default(),
        }
    }

    /// For a node: small segments, little memory.
    #[must_use]
    pub fn node() -> Self {
        Self { segment_bytes: 8 << 20, checkpoint_bytes: 2 << 20, ..Self::hub() }
    }
}

/// A store on disk. Dropping it journals what was submitted, writes a last checkpoint and waits for both.
#[derive(Debug)]
pub struct LmdbStore {
    shared: std::sync::Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    keeper: Option<JoinHandle<()>>,
    reader: Option<JoinHandle<()>>,
    _lock: File,
}

/// What the threads and the store's owner share.
#[derive(Debug)]
struct Shared {
    options: Options,
    checkpoint: Checkpoint,
    groups: Queue<Group>,
    reads: Queue<ReadRequest>,
    events: Events,
    gathering: Mutex<Gathering>,
    gathered: Condvar,
    segments: Segments,
    written: std::sync::Arc<written::Written>,
    room: Room,
    quarantine: Quarantine,
}

/// The overlay and what writer and keeper say to each other about it.
#[derive(Debug, Default)]
struct Gathering {
    overlay: Overlay,
    /// Why the last checkpoint failed.
    failing: Option<String>,
    /// Write a last checkpoint and end.
    stop: bool,
    /// End without a checkpoint, like a process that is killed.
    #[cfg(test)]
    abandoned: bool,
    /// The process is killed after this step of a rewriting.
    #[cfg(test)]
    crash_at: Option<tests::Crash>,
}

impl Gathering {
    /// There is nothing to checkpoint.
    fn is_idle(&self) -> bool {
        self.overlay.frozen.is_none() && self.overlay.active.last_lsn == 0
    }

    /// A checkpoint is due, whenever the last one was.
    fn is_full(&self, options: &Options) -> bool {
        let active = &self.overlay.active;
        active.cost.max(active.journal_bytes as usize) >= options.checkpoint_bytes
    }
}

/// Opens the store in this folder, or makes it, and says what it holds.
///
/// # Errors
/// See [`OpenError`]. Nothing was changed, except that unfinished segments were removed and files that cannot be
/// used were moved to the folder `quarantine`. Damage is no error: see [`Recovered::damage`].
pub fn open(path: &Path, options: Options) -> Result<(LmdbStore, Recovered), OpenError> {
    let disk = Disk::new(options.io).map_err(|source| io_error("set up io_uring for", path, source))?;
    open_on(path, options, disk)
}

pub(super) fn open_on(
    path: &Path,
    options: Options,
    disk: Disk,
) -> Result<(LmdbStore, Recovered), OpenError> {
    let (journal_dir, checkpoint_dir) = (path.join("journal"), path.join("checkpoint"));
    make_dir(path)?;
    let lock = lock(path)?;
    make_dir(&journal_dir)?;

    let new_id = getrandom::u64()
        .and_then(|low| Ok(u128::from(low) | u128::from(getrandom::u64()?) << 64))
        .map_err(|error| io_error("name the new store", path, io::Error::other(error)))?
        .to_le_bytes();
    let quarantine = Quarantine::new(path);
    let mut damage = Vec::new();
    let of_store = scan::of_store(&journal_dir)?;
    if let Some(what) = damage_of(&checkpoint_dir)? {
        quarantine
            .take(&checkpoint_dir)
            .map_err(|source| io_error("move to quarantine", &checkpoint_dir, source))?;
        damage.push(Damage { file: "checkpoint/data.mdb".to_owned(), offset: 0, what });
    }
    let id = of_store.map_or(new_id, |(id, _)| id);
    let (checkpoint, mut summary) =
        Checkpoint::open(&checkpoint_dir, options.map_bytes, options.map_bytes_max, id)?;
    sync_dir(&checkpoint_dir)?;
    if !summary.lost.is_empty() {
        let repaired = checkpoint.repair();
        let fault = |error: checkpoint::Error| error.to_string();
        let repaired = repaired
            .map_err(|error| OpenError::Checkpoint { path: checkpoint_dir.clone(), what: fault(error) })?;
        summary = Summary { lost: summary.lost, ..repaired };
    }
    // Something was freed or rewritten, so there was a checkpoint, and this is not it.
    let is_lost = summary.applied == 0 && (!damage.is_empty() || of_store.is_some_and(|(_, had)| had));
    if is_lost && damage.is_empty() {
        let what = "it is not the one that the journal was written with".to_owned();
        damage.push(Damage { file: "checkpoint/data.mdb".to_owned(), offset: 0, what });
    }

    let mut overlay = Overlay::new(std::mem::take(&mut summary.ends));
    let rewritten = if is_lost { scan::rewritten(&journal_dir)? } else { Vec::new() };
    let mut old = OldGroups::list(&journal_dir, &rewritten)?;
    let mut found = scan::scan(&journal_dir, summary.applied, &mut |seen| match seen {
        Seen::Group(found) => {
            old.apply(found.lsn, &mut overlay);
            overlay.apply(found.lsn, found.place, scan::split(found.records).map(compact));
        }
        Seen::Damaged(damaged) if damaged.is_new => overlay.lose(damaged.place),
        Seen::Damaged(_) => {}
    })?;
    old.apply(u64::MAX, &mut overlay);
    if is_lost {
        // What was freed is missing between what was not, which is no damage; what is damaged is told to who reads it.
        found.damage.retain(|damaged| damaged.is_whole);
        found.end.last_lsn = found.end.last_lsn.max(overlay.active.last_lsn);
        rebuild::declare_lost(&mut overlay);
    }
    found.damage.append(&mut old.damage);
    let mut all = found.segments.iter().chain(&found.rewritten).map(|segment| segment.header);
    if let Some(alien) = all.find(|header| header.store_id != summary.store_id) {
        let what = "the segment belongs to another checkpoint".to_owned();
        return Err(OpenError::Corrupt { segment: alien.number, offset: 0, what });
    }
    for (what, _) in &summary.lost {
        damage.push(Damage { file: "checkpoint/data.mdb".to_owned(), offset: 0, what: what.clone() });
    }
    let rows_lost = summary.lost.iter().any(|(_, uncertain)| *uncertain);
    // A number that index entries know must not be given to another segment.
    let known = summary.live.range(..REWRITTEN).next_back().map_or(0, |(number, _)| *number);
    found.end.next_number = found.end.next_number.max(known + 1);
    for damaged in &found.damage {
        let segment = damaged.place.segment;
        if damaged.is_whole {
            let name = journal_dir.join(segment_name(segment));
            quarantine.take(&name).map_err(|source| io_error("move to quarantine", &name, source))?;
        } else {
            quarantine.keep(segment);
        }
        let (file, offset) = (quarantine::file(segment), damaged.place.offset);
        damage.push(Damage { file, offset, what: damaged.what.clone() });
    }
    for damage in &damage {
        tracing::error!(%damage, "the store is damaged; what is left of it is used");
    }
    let last_lsn = found.end.last_lsn;
    let fault = |error: &dyn std::fmt::Display| OpenError::Checkpoint {
        path: checkpoint_dir.clone(),
        what: error.to_string(),
    };
    let mut recovered = recover(&checkpoint, &overlay, last_lsn).map_err(|error| fault(&error))?;
    recovered.damage = damage;
    recovered.uncertain = is_lost || rows_lost || found.damage.iter().any(|damaged| damaged.is_new);
    if recovered.uncertain {
        checkpoint.note_uncertain(last_lsn).map_err(|error| fault(&error))?;
    } else {
        // A crash before the core wrote what follows from it.
        recovered.uncertain = checkpoint.is_uncertain(last_lsn).map_err(|error| fault(&error))?;
    }
    if is_lost && let Some(layer) = overlay.freeze() {
        // Rewritten segments to which nothing points would be freed.
        checkpoint.commit(&layer).map_err(|error| fault(&error))?;
        (overlay.frozen, summary.applied) = (None, layer.last_lsn);
        summary.live = checkpoint.live().map_err(|error| fault(&error))?;
    }
    let journal = Journal::new(&journal_dir, summary.store_id, options.segment_bytes, disk, &found.end)
        .map_err(|source| io_error("open the last segment in", &journal_dir, source))?;

    let shared = std::sync::Arc::new(Shared {
        room: Room::default(),
        quarantine,
        options,
        checkpoint,
        groups: Queue::default(),
        reads: Queue::default(),
        events: Events::default(),
        gathering: Mutex::new(Gathering { overlay, ..Gathering::default() }),
        gathered: Condvar::new(),
        written: std::sync::Arc::default(),
        segments: Segments::new(journal_dir, found.segments.into_iter().chain(found.rewritten)),
    });
    let reserve = Reserve::new(&path.join("reserve"), shared.options.checkpoint_bytes as u64);
    let keeper = keeper::Keeper::new(summary.store_id, summary.live, summary.applied, reserve);
    let store = LmdbStore {
        writer: Some(spawn("store-write", path, &shared, move |shared| writer::run(shared, journal))?),
        keeper: Some(spawn("store-keep", path, &shared, move |shared| keeper.run(shared))?),
        reader: Some(spawn("store-read", path, &shared, reader::run)?),
        shared,
        _lock: lock,
    };
    Ok((store, recovered))
}

impl LmdbStore {
    /// What it writes, counted.
    #[must_use]
    pub fn written(&self) -> std::sync::Arc<written::Written> {
        std::sync::Arc::clone(&self.shared.written)
    }

    /// What makes copies of this store while it runs.
    #[must_use]
    pub fn copier(&self) -> backup::Copier {
        backup::Copier(std::sync::Arc::downgrade(&self.shared))
    }
}

#[cfg(test)]
impl LmdbStore {
    /// Ends the store as if its process were killed: no last checkpoint.
    pub(super) fn kill(self) {
        let mut gathering = lock_of(&self.shared.gathering);
        gathering.abandoned = true;
        gathering.stop = true;
        drop(gathering);
        self.shared.gathered.notify_all();
    }
}

impl Store for LmdbStore {
    fn submit(&mut self, group: Group) {
        self.shared.groups.push(group);
    }

    fn read(&mut self, request: ReadRequest) {
        self.shared.reads.push(request);
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<StoreEvent> {
        self.shared.events.poll(cx)
    }
}

impl Drop for LmdbStore {
    fn drop(&mut self) {
        self.shared.reads.close();
        self.shared.groups.close();
        join(self.reader.take());
        join(self.writer.take());
        lock_of(&self.shared.gathering).stop = true;
        self.shared.gathered.notify_all();
        join(self.keeper.take());
    }
}

fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread {
        thread.join().expect("a thread of the store that panics ends the process");
    }
}

fn spawn(
    name: &str,
    path: &Path,
    shared: &std::sync::Arc<Shared>,
    body: impl FnOnce(&Shared) + Send + 'static,
) -> Result<JoinHandle<()>, OpenError> {
    let shared = std::sync::Arc::clone(shared);
    let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    let guarded = move || {
        if catch_unwind(AssertUnwindSafe(|| body(&shared))).is_err() {
            abort("a thread of the store panicked");
        }
    };
    thread.spawn(guarded).map_err(|source| io_error("start a thread for", path, source))
}

/// Ends the process where going on could lose or hide what was acknowledged. The journal holds everything;
/// the next start recovers it.
fn abort(why: &str) -> ! {
    tracing::error!(why, "the store cannot go on, the process ends");
    std::process::abort()
}

/// What is wrong with the pages of a checkpoint, if it is damaged.
fn damage_of(checkpoint: &Path) -> Result<Option<String>, OpenError> {
    match pages::check(checkpoint) {
        Ok(()) => Ok(None),
        Err(PageError::Damaged(what)) => Ok(Some(what)),
        Err(PageError::Io(error)) if scan::is_damage(&error) => Ok(Some(error.to_string())),
        Err(PageError::Io(error)) => Err(io_error("read", checkpoint, error)),
    }
}

/// Checkpoint and overlay together.
fn recover(checkpoint: &Checkpoint, overlay: &Overlay, last_lsn: u64) -> checkpoint::Result<Recovered> {
    let layer = &overlay.active;
    let Facts { mut sources, mut state, mut locals } = checkpoint.facts()?;
    sources.extend(layer.sources.iter().map(|(number, (source, _))| (*number, source.clone())));
    for (key, record) in &layer.state {
        if record.header.kind == Kind::FORGET {
            state.remove(key);
        } else {
            state.insert(key.clone(), record.clone());
        }
    }
    for (key, (body, has_value)) in &layer.locals {
        match facts::local(body) {
            Some((_, Some(value))) if *has_value => drop(locals.insert(key.clone(), value)),
            _ => drop(locals.remove(key)),
        }
    }
    let mut logs = Vec::with_capacity(overlay.ends.len());
    for (source, end) in &overlay.ends {
        let (_, mut runs, _) = checkpoint.runs(*source, 0, usize::MAX)?;
        if let Some(changes) = layer.logs.get(source) {
            changes.apply(&mut runs, overlay::END);
        }
        let mut kept = Stretches::default();
        for ((start, _), run) in &runs {
            let records = if run.gap { 0 } else { run.last - start + 1 };
            kept.push(Extent { start: *start, bytes: u64::from(run.bytes), records });
        }
        logs.push(LogRecovery {
            source: *source,
            first: runs.keys().next().map_or(0, |(start, _)| *start),
            last: end.last,
            last_epoch: end.last_epoch,
            last_crc: end.last_crc,
            kept,
        });
    }
    logs.sort_by_key(|log| log.source);
    Ok(Recovered {
        last_lsn,
        sources: sources.into_values().collect(),
        logs,
        state: state.into_values().collect(),
        locals: locals.into_iter().map(|((kind, key), value)| LocalFact { kind, key, value }).collect(),
        ..Recovered::default()
    })
}

/// A record that is kept does not keep the whole group it was read with.
fn compact(mut record: Record) -> Record {
    if record.header.kind != Kind::LOG {
        record.body = Bytes::copy_from_slice(&record.body);
    }
    record
}

pub(super) fn make_dir(path: &Path) -> Result<(), OpenError> {
    if path.is_dir() {
        return Ok(());
    }
    let parents = new_parents(path);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| io_error("make", path, source))?;
    parents.into_iter().try_for_each(sync_dir)
}

/// The folders that get a new entry when this one is made, up to the first that is there.
fn new_parents(path: &Path) -> Vec<&Path> {
    let mut parents = Vec::new();
    for parent in path.ancestors().skip(1) {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        parents.push(parent);
        if parent.is_dir() {
            break;
        }
    }
    parents
}

pub(super) fn sync_dir(path: &Path) -> Result<(), OpenError> {
    files::sync_dir(path).map_err(|source| io_error("sync", path, source))
}

pub(super) fn lock(path: &Path) -> Result<File, OpenError> {
    let name = path.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&name);
    let file = file.map_err(|source| io_error("open", &name, source))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::Locked(path.to_owned())),
        Err(error) => Err(io_error("lock", &name, error.into())),
    }
}

pub(super) fn io_error(doing: &'static str, path: &Path, source: io::Error) -> OpenError {
    OpenError::Io { doing, path: path.to_owned(), source }
}

/// Poison is of no interest: a thread of the store that panics ends the process.
fn lock_of<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Work for one thread. The driver bounds it: by `UNPERSISTED_BYTES_MAX`, and by the reads it has open.
#[derive(Debug)]
struct Queue<T> {
    state: Mutex<(VecDeque<T>, bool)>,
    changed: Condvar,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { state: Mutex::default(), changed: Condvar::new() }
    }
}

impl<T> Queue<T> {
    fn push(&self, item: T) {
        lock_of(&self.state).0.push_back(item);
        self.changed.notify_one();
    }

    /// What waits is still taken; then [`Queue::take`] returns false.
    fn close(&self) {
        lock_of(&self.state).1 = true;
        self.changed.notify_one();
    }

    /// Waits for this long; false at once if nobody pushes any more.
    fn pause(&self, time: Duration) -> bool {
        let state = lock_of(&self.state);
        let waited = self.changed.wait_timeout_while(state, time, |state| !state.1);
        !waited.unwrap_or_else(PoisonError::into_inner).0.1
    }

    /// As [`Queue::take`], and returns with nothing after this long.
    fn take_within(&self, time: Duration, into: &mut VecDeque<T>) -> bool {
        let nothing = |state: &mut (VecDeque<T>, bool)| state.0.is_empty() && !state.1;
        let waited = self.changed.wait_timeout_while(lock_of(&self.state), time, nothing);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        std::mem::swap(&mut state.0, into);
        !(into.is_empty() && state.1)
    }

    /// Waits for work and moves all of it into `into`; false if there will be no more.
    fn take(&self, into: &mut VecDeque<T>) -> bool {
        let mut state = lock_of(&self.state);
        while state.0.is_empty() {
            if state.1 {
                return false;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.0, into);
        true
    }
}

/// Completions on their way to the driver.
#[derive(Debug, Default)]
struct Events {
    state: Mutex<(VecDeque<StoreEvent>, Option<Waker>)>,
}

impl Events {
    fn push(&self, event: StoreEvent) {
        let mut state = lock_of(&self.state);
        match (state.0.back_mut(), event) {
            (Some(StoreEvent::Persisted(last)), StoreEvent::Persisted(lsn)) => *last = lsn,
            (_, event) => state.0.push_back(event),
        }
        let waker = state.1.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<StoreEvent> {
        let mut state = lock_of(&self.state);
        if let Some(event) = state.0.pop_front() {
            return Poll::Ready(event);
        }
        state.1 = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Enough for LMDB's commit and for no large buffer.
const STACK_BYTES: usize = 256 << 10;
const MAP_BYTES: usize = if cfg!(target_pointer_width = "64") { 4 << 30 } else { 512 << 20 };
const MAP_BYTES_MAX: usize = if cfg!(target_pointer_width = "64") { 64 << 30 } else { 512 << 20 };

#[cfg(test)]
mod tests;
