//! Records what a store does to its files, and makes of it what a crash at any point could leave.
//!
//! The model of the disk is as pessimistic as POSIX allows: what a file was given since its last sync is lost
//! or kept sector by sector, its size apart from its bytes; names that were made, changed or removed since
//! their folder's last sync are lost or kept one by one. A sector is written whole or not at all.
//!
//! LMDB's commit is recorded when it is done, as its contract has it: the pages that changed, a sync, the meta
//! page, a sync. That it comes after journal writes that ran beside it is one of the orders that could have
//! been, and its pages mean nothing before its meta page is there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rand::{Rng, rngs::SmallRng};

/// One operation.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// A new, empty file of this name.
    Create(PathBuf),
    /// It has at least this size.
    Grow(PathBuf, u64),
    Write(PathBuf, u64, Vec<u8>),
    Sync(PathBuf),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Not of the disk: what has been said or asked so far, as a count of the owner's notes.
    Said(usize),
}

/// A recording of everything that happens in one folder, until it is dropped.
#[derive(Debug)]
pub(crate) struct Tape {
    root: PathBuf,
    taped: Arc<Mutex<Taped>>,
}

#[derive(Debug, Default)]
struct Taped {
    ops: Vec<Op>,
    /// LMDB's file as it was when it was last looked at.
    mapped: BTreeMap<PathBuf, Vec<u8>>,
}

/// The tapes that run. Few and short-lived: tests.
static RUNNING: Mutex<Vec<(PathBuf, Arc<Mutex<Taped>>)>> = Mutex::new(Vec::new());

impl Tape {
    /// Begins to record what happens in this folder, and says what is in it now.
    pub(crate) fn on(root: &Path) -> (Self, CrashDisk) {
        let taped = Arc::<Mutex<Taped>>::default();
        lock(&RUNNING).push((root.to_owned(), Arc::clone(&taped)));
        let mut disk = CrashDisk { root: root.to_owned(), ..CrashDisk::default() };
        disk.take_in(root);
        for (path, inode) in &disk.names {
            if path.ends_with(MAPPED) {
                lock(&taped).mapped.insert(path.clone(), disk.inodes[*inode].durable.clone());
            }
        }
        (Self { root: root.to_owned(), taped }, disk)
    }

    /// Everything so far has been said before whatever comes now.
    pub(crate) fn said(&self, notes: usize) {
        lock(&self.taped).ops.push(Op::Said(notes));
    }

    /// What was recorded.
    pub(crate) fn ops(&self) -> Vec<Op> {
        lock(&self.taped).ops.clone()
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        lock(&RUNNING).retain(|(root, _)| *root != self.root);
    }
}

/// Records an operation on this path, if a tape runs there: a sync when the turn is dropped, because it promises
/// nothing before it is done; anything else at once, because it may reach the disk from now on.
pub(crate) fn begin(path: &Path, op: impl FnOnce() -> Op) -> Option<Turn> {
    let taped = of(path)?;
    let op = op();
    if matches!(op, Op::Sync(_) | Op::SyncDir(_)) {
        return Some(Turn { taped, sync: Some(op) });
    }
    let mut taping = lock(&taped);
    if let Op::Rename(from, to) = &op {
        let moved = taping.mapped.extract_if(.., |path, _| path.starts_with(from));
        let moved: Vec<_> = moved.map(|(path, bytes)| (moved_path(&path, from, to), bytes)).collect();
        taping.mapped.extend(moved);
    }
    taping.ops.push(op);
    drop(taping);
    Some(Turn { taped, sync: None })
}

/// As [`begin`], for a write of these slices and the sync that follows it.
pub(crate) fn append(path: &Path, offset: u64, slices: &[std::io::IoSlice<'_>]) -> Option<Turn> {
    begin(path, || {
        let bytes = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        Op::Write(path.to_owned(), offset, bytes)
    })?;
    begin(path, || Op::Sync(path.to_owned()))
}

/// An operation that is under way.
pub(crate) struct Turn {
    taped: Arc<Mutex<Taped>>,
    sync: Option<Op>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.taped).ops.extend(self.sync.take());
    }
}

/// LMDB has committed: records the pages of this file that differ from the last time.
pub(crate) fn mapped_changed(path: &Path) {
    let Some(taped) = of(path) else { return };
    let now = std::fs::read(path).expect("LMDB's file is there");
    let mut taped = lock(&taped);
    let before = taped.mapped.insert(path.to_owned(), now.clone()).unwrap_or_default();
    let mut ops = Vec::new();
    if before.is_empty() {
        ops.push(Op::Create(path.to_owned()));
    }
    let changed = |at: usize| {
        let page = at..(at + PAGE).min(now.len());
        (before.get(page.clone()) != now.get(page.clone()))
            .then(|| Op::Write(path.to_owned(), at as u64, now[page].to_vec()))
    };
    ops.extend((METAS * PAGE..now.len()).step_by(PAGE).filter_map(changed));
    ops.push(Op::Sync(path.to_owned()));
    ops.extend((0..METAS * PAGE).step_by(PAGE).filter_map(changed));
    ops.push(Op::Sync(path.to_owned()));
    taped.ops.extend(ops);
}

fn of(path: &Path) -> Option<Arc<Mutex<Taped>>> {
    let running = lock(&RUNNING);
    running.iter().find(|(root, _)| path.starts_with(root)).map(|(_, taped)| Arc::clone(taped))
}

/// The new path of what was at `path` once `from` is named `to`.
fn moved_path(path: &Path, from: &Path, to: &Path) -> PathBuf {
    let rest = path.strip_prefix(from).expect("at or below it");
    if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk that forgets what was not synced.
#[derive(Debug, Default, Clone)]
pub(crate) struct CrashDisk {
    root: PathBuf,
    inodes: Vec<Inode>,
    /// As a running process sees them.
    names: BTreeMap<PathBuf, usize>,
    /// As a crash leaves them at least.
    durable_names: BTreeMap<PathBuf, usize>,
    pending_names: Vec<NameChange>,
}

#[derive(Debug, Default, Clone)]
struct Inode {
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Debug, Clone)]
enum Pending {
    Grow(u64),
    Write(u64, Vec<u8>),
}

/// A folder's entry: made, moved here from another name, or taken away.
#[derive(Debug, Clone)]
struct NameChange {
    /// Whose sync makes it durable.
    dir: PathBuf,
    path: PathBuf,
    inode: Option<usize>,
    from: Option<PathBuf>,
}

impl CrashDisk {
    fn take_in(&mut self, dir: &Path) {
        for entry in std::fs::read_dir(dir).expect("the folder is there").flatten() {
            let path = entry.path();
            if path.is_dir() {
                self.take_in(&path);
            } else if !path.ends_with("lock.mdb") && !path.ends_with("lock") {
                let durable = std::fs::read(&path).expect("a file of the store");
                self.names.insert(path, self.inodes.len());
                self.inodes.push(Inode { durable, pending: Vec::new() });
            }
        }
        self.durable_names = self.names.clone();
    }

    /// The next operation.
    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Create(path) => {
                let inode = self.inodes.len();
                self.inodes.push(Inode::default());
                self.change_name(path, path, Some(inode), None);
            }
            Op::Grow(path, len) => self.inode(path).pending.push(Pending::Grow(*len)),
            Op::Write(path, offset, bytes) => {
                self.inode(path).pending.push(Pending::Write(*offset, bytes.clone()));
            }
            Op::Sync(path) => {
                let inode = self.inode(path);
                for pending in std::mem::take(&mut inode.pending) {
                    inode.settle(&pending, &mut || true);
                }
            }
            Op::SyncDir(dir) => {
                let (synced, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending_names)
                    .into_iter()
                    .partition(|change| change.dir == *dir);
                self.pending_names = rest;
                synced.iter().for_each(|change| change.settle(&mut self.durable_names));
            }
            Op::Rename(from, to) => {
                // A folder takes what is in it along.
                let moved: Vec<PathBuf> =
                    self.names.keys().filter(|path| path.starts_with(from)).cloned().collect();
                for old in moved {
                    let inode = self.names.remove(&old);
                    let new = moved_path(&old, from, to);
                    self.change_name(to, &new, inode, Some(old));
                }
            }
            Op::Remove(path) => {
                self.names.remove(path);
                self.change_name(path, path, None, None);
            }
            Op::Said(_) => {}
        }
    }

    /// `entry` is the name in its folder that this is about: the file's, or that of a folder above it.
    fn change_name(&mut self, entry: &Path, path: &Path, inode: Option<usize>, from: Option<PathBuf>) {
        if let Some(inode) = inode {
            self.names.insert(path.to_owned(), inode);
        }
        let dir = entry.parent().expect("below the root").to_owned();
        self.pending_names.push(NameChange { dir, path: path.to_owned(), inode, from });
    }

    fn inode(&mut self, path: &Path) -> &mut Inode {
        let inode = *self.names.get(path).unwrap_or_else(|| panic!("{path:?} is written and not there"));
        &mut self.inodes[inode]
    }

    /// Writes what a crash now could leave into another folder. Of what is not synced, about this share is
    /// kept, by chance.
    pub(crate) fn crash_into(&self, root: &Path, kept: f64, rng: &mut SmallRng) {
        let mut names = self.durable_names.clone();
        for change in &self.pending_names {
            if rng.random_bool(kept) {
                change.settle(&mut names);
            }
        }
        for (path, inode) in names {
            let mut inode = self.inodes[inode].clone();
            for pending in std::mem::take(&mut inode.pending) {
                inode.settle(&pending, &mut || rng.random_bool(kept));
            }
            let path = root.join(path.strip_prefix(&self.root).expect("below the root"));
            std::fs::create_dir_all(path.parent().expect("below the root")).expect("a folder of the test");
            std::fs::write(&path, &inode.durable).expect("a file of the test");
        }
    }
}

impl Inode {
    fn settle(&mut self, pending: &Pending, kept: &mut dyn FnMut() -> bool) {
        match pending {
            Pending::Grow(len) => {
                let len = usize::try_from(*len).expect("small files");
                if len > self.durable.len() && kept() {
                    self.durable.resize(len, 0);
                }
            }
            Pending::Write(offset, bytes) => {
                let (mut at, end) = (*offset as usize, *offset as usize + bytes.len());
                while at < end {
                    let to = (at / SECTOR * SECTOR + SECTOR).min(end);
                    if kept() {
                        self.durable.resize(self.durable.len().max(to), 0);
                        self.durable[at..to]
                            .copy_from_slice(&bytes[at - *offset as usize..to - *offset as usize]);
                    }
                    at = to;
                }
            }
        }
    }
}

impl NameChange {
    fn settle(&self, names: &mut BTreeMap<PathBuf, usize>) {
        if let Some(from) = &self.from {
            names.remove(from);
        }
        match self.inode {
            Some(inode) => names.insert(self.path.clone(), inode),
            None => names.remove(&self.path),
        };
    }
}

const SECTOR: usize = 512;
/// LMDB's page, and how many of them say where the tree is.
const PAGE: usize = 4096;
const METAS: usize = 2;
const MAPPED: &str = "checkpoint/data.mdb";
