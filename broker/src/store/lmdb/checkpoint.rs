//! The checkpoint: the only file that names LMDB.
//!
//! Tables, all of bytes, numbers in keys big-endian so that they sort:
//!
//! ```text
//! meta     name -> format (u32), store id (16 bytes), applied_lsn (u64)
//! sources  source -> its declare record
//! state    (source, key) -> record
//! locals   (kind, key) -> body of the record, which has key and value
//! index    (source, start, order) -> run, see index.rs
//! logs     source -> last seq, last epoch, last crc
//! topics   (source, start, order) -> place of a run and its topics, see topics.rs
//! ```
//!
//! Every value (but the format) is followed by a crc32c of key and value. A key that LMDB cannot hold is replaced by its hash; the values hold the key itself.
//!
//! There is one writer, the checkpoint thread. Read transactions copy what they need and end at once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    ops::Bound,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::{Buf, BufMut, Bytes};
use codec::{Kind, Record, RecordHeader};
use heed::{CommitOrAbort, CompactionOption, Env, EnvOpenOptions, MdbError, RoTxn, RwTxn, WithoutTls, types};
use sha2::{Digest, Sha256};

use super::{
    index::{self, Key, Run, Runs},
    overlay::{END, Layer, LogChanges, LogEnd},
    topics::{Probes, RuledOut, Scope, Topics},
};
use crate::{
    core::event::Lsn,
    store::{OpenError, Source, facts, files, journal::Place},
};

/// What LMDB says.
pub(super) type Error = heed::Error;
pub(super) type Result<T> = std::result::Result<T, Error>;

type Raw = heed::Database<'static, types::Bytes, types::Bytes>;

/// A table whose values end with a crc32c of key and value, because LMDB has none. A row whose crc is wrong is not
/// there; [`Opened::repair`] has told of those that were found at the start.
#[derive(Debug, Clone, Copy)]
struct Table(Raw);

type Row<'t> = (&'t [u8], &'t [u8]);

impl Table {
    fn put(self, txn: &mut RwTxn<'_>, key: &[u8], value: &[u8]) -> Result<()> {
        let mut sealed = Vec::with_capacity(value.len() + SEAL);
        sealed.extend_from_slice(value);
        sealed.put_u32_le(seal(key, value));
        self.0.put(txn, key, &sealed)
    }

    fn delete(self, txn: &mut RwTxn<'_>, key: &[u8]) -> Result<bool> {
        self.0.delete(txn, key)
    }

    fn get<'t>(self, txn: &'t RoTxn<'_, WithoutTls>, key: &[u8]) -> Result<Option<&'t [u8]>> {
        Ok(self.0.get(txn, key)?.and_then(|raw| unseal(key, raw)))
    }

    fn iter<'t>(self, txn: &'t RoTxn<'_, WithoutTls>) -> Result<impl Iterator<Item = Result<Row<'t>>>> {
        Ok(self.0.iter(txn)?.filter_map(whole))
    }

    fn range<'t>(
        self,
        txn: &'t RoTxn<'_, WithoutTls>,
        range: &(Bound<&[u8]>, Bound<&[u8]>),
    ) -> Result<impl Iterator<Item = Result<Row<'t>>>> {
        Ok(self.0.range(txn, range)?.filter_map(whole))
    }

    fn get_lower_than<'t>(self, txn: &'t RoTxn<'_, WithoutTls>, key: &[u8]) -> Result<Option<Row<'t>>> {
        Ok(self.0.get_lower_than(txn, key)?.and_then(|(key, raw)| Some((key, unseal(key, raw)?))))
    }

    /// Keys of the rows whose crc is wrong.
    fn damaged(self, txn: &RoTxn<'_, WithoutTls>) -> Result<Vec<Vec<u8>>> {
        let rows = self.0.iter(txn)?;
        let damaged = rows.filter_map(|row| match row {
            Ok((key, raw)) => unseal(key, raw).is_none().then(|| Ok(key.to_vec())),
            Err(error) => Some(Err(error)),
        });
        damaged.collect()
    }
}

fn whole<'t>(row: Result<Row<'t>>) -> Option<Result<Row<'t>>> {
    row.map(|(key, raw)| Some((key, unseal(key, raw)?))).transpose()
}

fn seal(key: &[u8], value: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), value)
}

fn unseal<'t>(key: &[u8], raw: &'t [u8]) -> Option<&'t [u8]> {
    let (value, crc) = raw.split_last_chunk::<SEAL>()?;
    (seal(key, value) == u32::from_le_bytes(*crc)).then_some(value)
}

/// Bytes of a value's crc.
const SEAL: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Checkpoint {
    path: PathBuf,
    /// Transactions hold it shared, whoever grows the map or opens the file anew holds it alone. `None`: it
    /// could not be opened anew, which every commit tries again.
    opened: RwLock<Option<Opened>>,
    map_bytes: AtomicUsize,
    map_bytes_max: usize,
    #[cfg(test)]
    pub(super) growth_fails: std::sync::atomic::AtomicBool,
}

#[derive(Debug)]
struct Opened {
    env: Env<WithoutTls>,
    tables: Tables,
}

#[derive(Debug, Clone, Copy)]
struct Tables {
    meta: Table,
    sources: Table,
    state: Table,
    locals: Table,
    index: Table,
    logs: Table,
    topics: Table,
}

/// What the store keeps in memory of its checkpoint.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) store_id: [u8; 16],
    pub(super) applied: Lsn,
    pub(super) ends: HashMap<u32, LogEnd>,
    /// What is alive in each segment.
    pub(super) live: BTreeMap<u64, Live>,
    /// Rows that were lost, and whether with them effects that nobody knows.
    pub(super) lost: Vec<(String, bool)>,
}

/// The facts of a checkpoint, for recovery.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) sources: BTreeMap<u32, Source>,
    pub(super) state: BTreeMap<(u32, Bytes), Record>,
    pub(super) locals: BTreeMap<(Kind, Bytes), Bytes>,
}

/// Index entries that point into a segment, and the bytes of the records that they claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Live {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// How a commit changed what is alive in segments.
#[derive(Debug, Default)]
pub(super) struct LiveChanges(pub(super) BTreeMap<u64, (i64, i64)>);

impl LiveChanges {
    fn add(&mut self, run: &Run) {
        let (entries, bytes) = self.0.entry(run.place.segment).or_default();
        (*entries, *bytes) = (*entries + 1, *bytes + i64::from(run.bytes));
    }

    fn remove(&mut self, run: &Run) {
        let (entries, bytes) = self.0.entry(run.place.segment).or_default();
        (*entries, *bytes) = (*entries - 1, *bytes - i64::from(run.bytes));
    }
}

/// Records of an index entry that were copied from one segment to another.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) source: u32,
    pub(super) key: Key,
    /// The entry, as it was when the copy began.
    pub(super) run: Run,
    /// Where its records are now; `None`: there are none.
    pub(super) to: Option<Place>,
    /// Bytes of those records.
    pub(super) bytes: u32,
    /// Topics of those records.
    pub(super) topics: Topics,
}

impl Move {
    /// The entry that takes the place of this one, which is the planned entry or what is left of it.
    fn moved(&self, key: Key, run: &Run) -> Option<Run> {
        let whole = key == self.key && run.last == self.run.last;
        Some(Run { place: self.to?, bytes: if whole { self.bytes } else { run.bytes }, ..*run })
    }
}

/// Why a checkpoint was not written. Nothing of it is there; it can be tried again.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    #[error("the checkpoint's map of {0} bytes is full")]
    MapFull(usize),
    #[error("the checkpoint's map cannot grow to {wanted} bytes: {error}")]
    Grow { wanted: usize, error: heed::Error },
    #[error("checkpoint: {0}")]
    Lmdb(#[from] heed::Error),
}

impl CommitError {
    /// The file could not be written; a full disk is not told from others, because LMDB does not.
    pub(super) fn is_io(&self) -> bool {
        matches!(self, Self::Lmdb(heed::Error::Io(_)))
    }
}

impl Checkpoint {
    /// Opens or creates. `store_id` is for a new one.
    ///
    /// A new one is made under another name: LMDB's first pages are not safe from a crash before its first
    /// sync, and a file that has half of them could never be opened again.
    pub(super) fn open(
        path: &Path,
        map_bytes: usize,
        map_bytes_max: usize,
        store_id: [u8; 16],
    ) -> std::result::Result<(Self, Summary), OpenError> {
        let fault =
            |error: heed::Error| OpenError::Checkpoint { path: path.to_owned(), what: error.to_string() };
        if !path.join(DATA).exists() {
            make(path, map_bytes, store_id)?;
        }
        let opened = Opened::open(path, map_bytes).map_err(fault)?;
        opened.check_format(path, store_id)?;
        opened.forget_old_topics().map_err(fault)?;
        if !opened.knows_itself().map_err(fault)? {
            let what = "its own description is damaged: move the folder away to have it rebuilt".to_owned();
            return Err(OpenError::Checkpoint { path: path.to_owned(), what });
        }
        let lost = opened.lost().map_err(fault)?;
        let mut summary = opened.summary().map_err(fault)?;
        summary.lost = lost;
        let checkpoint = Self {
            path: path.to_owned(),
            opened: RwLock::new(Some(opened)),
            map_bytes: AtomicUsize::new(map_bytes),
            map_bytes_max,
            #[cfg(test)]
            growth_fails: std::sync::atomic::AtomicBool::new(false),
        };
        Ok((checkpoint, summary))
    }

    fn with<T>(&self, work: impl FnOnce(&Opened) -> Result<T>) -> Result<T> {
        let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
        match &*opened {
            Some(opened) => work(opened),
            None => Err(io::Error::other("the checkpoint could not be opened anew").into()),
        }
    }

    /// Writes what is committed now to another file, without its free pages.
    pub(super) fn copy(&self, to: &Path) -> Result<()> {
        self.with(|opened| opened.env.copy_to_path(to, CompactionOption::Enabled).map(drop))
    }

    /// Takes out the rows whose crc is wrong; what is left. Entries of the index are replaced by such as tell their
    /// readers that records are lost.
    pub(super) fn repair(&self) -> Result<Summary> {
        self.with(|opened| opened.repair().and_then(|()| opened.summary()))
    }

    /// All sources, State and facts.
    pub(super) fn facts(&self) -> Result<Facts> {
        self.with(Opened::facts)
    }

    /// The declare records of all sources.
    pub(super) fn sources(&self) -> Result<Vec<Record>> {
        self.with(|opened| {
            let txn = opened.env.read_txn()?;
            let rows = opened.tables.sources.iter(&txn)?;
            rows.filter_map(|row| row.map(|(_, value)| decode_record(value)).transpose()).collect()
        })
    }

    /// Notes that what is known up to this lsn is uncertain, until a group follows it.
    pub(super) fn note_uncertain(&self, at: Lsn) -> Result<()> {
        self.with(|opened| {
            let mut txn = opened.env.write_txn()?;
            opened.tables.meta.put(&mut txn, META_UNCERTAIN, &at.to_be_bytes())?;
            txn.commit()
        })
    }

    /// Whether nothing was written since it was noted that what is known is uncertain.
    pub(super) fn is_uncertain(&self, last: Lsn) -> Result<bool> {
        self.with(|opened| {
            let txn = opened.env.read_txn()?;
            Ok(opened.tables.meta.get(&txn, META_UNCERTAIN)?.is_some_and(|at| *at == last.to_be_bytes()))
        })
    }

    /// What is alive in each segment, counted anew.
    pub(super) fn live(&self) -> Result<BTreeMap<u64, Live>> {
        self.with(Opened::live)
    }

    /// Index entries of a Log from the one that reaches `from` on, at most `limit` and one; the key from
    /// which on there may be more; and the lsn up to which all is in.
    pub(super) fn runs(&self, source: u32, from: u64, limit: usize) -> Result<(Lsn, Runs, Key)> {
        self.with(|opened| opened.runs(source, from, limit))
    }

    /// Which of these runs of a Log have nothing that is asked for.
    pub(super) fn ruled_out(&self, source: u32, runs: &Runs, probes: &Probes) -> Result<RuledOut> {
        self.with(|opened| opened.ruled_out(source, runs, probes))
    }

    /// As a version that knows no topics leaves it.
    #[cfg(test)]
    pub(super) fn set_topics_lsn(&self, at: Lsn) -> Result<()> {
        self.with(|opened| {
            let mut txn = opened.env.write_txn()?;
            opened.tables.meta.put(&mut txn, META_TOPICS, &at.to_be_bytes())?;
            txn.commit()
        })
    }

    /// All index entries that point into these segments, in no order.
    pub(super) fn runs_in(&self, segments: &BTreeSet<u64>) -> Result<Vec<(u32, Key, Run)>> {
        let (mut found, mut from) = (Vec::new(), Some(Bound::Unbounded));
        while let Some(start) = from.take() {
            let last = self.with(|opened| opened.runs_from(start, segments, &mut found))?;
            from = last.map(Bound::Excluded);
        }
        Ok(found)
    }

    /// Says so if no more than a twentieth of the map's greatest size is left: that is for what deletes.
    pub(super) fn nearly_full(&self) -> Option<String> {
        let used = self.with(Opened::used).unwrap_or(0);
        let max = self.map_bytes_max as u64;
        (used > max - max / 20).then(|| format!("{used} of {max} bytes of the checkpoint's map are used"))
    }

    /// Writes a layer and the lsn up to which all is in, in one synced transaction. Grows the map if that
    /// is what it takes.
    ///
    /// After an error the commit may still turn out to have happened: what is alive must be counted anew.
    pub(super) fn commit(&self, layer: &Layer) -> std::result::Result<LiveChanges, CommitError> {
        self.growing(|opened| opened.commit(layer))
    }

    /// Gives the records of index entries another place, in one synced transaction. The entries may have been
    /// cut since the moves were planned; nothing else happens to entries of closed segments.
    ///
    /// After an error it may still turn out to have happened.
    pub(super) fn move_runs(&self, moves: &[Move]) -> std::result::Result<LiveChanges, CommitError> {
        self.growing(|opened| opened.move_runs(moves))
    }

    fn growing<T>(&self, commit: impl Fn(&Opened) -> Result<T>) -> std::result::Result<T, CommitError> {
        loop {
            let committed = self.with(&commit);
            #[cfg(test)]
            files::tape::mapped_changed(&self.path.join(DATA));
            match committed {
                Err(heed::Error::Mdb(MdbError::MapFull)) => self.grow()?,
                // After some errors LMDB refuses everything until the file is opened anew.
                Err(error @ (heed::Error::Io(_) | heed::Error::Mdb(MdbError::Panic))) => {
                    self.open_anew(&mut self.opened.write().unwrap_or_else(PoisonError::into_inner))?;
                    return Err(error.into());
                }
                result => return Ok(result?),
            }
        }
    }

    #[allow(unsafe_code)] // LMDB trusts its caller to have no transaction open
    fn grow(&self) -> std::result::Result<(), CommitError> {
        let map_bytes = self.map_bytes.load(Relaxed);
        let wanted = map_bytes.saturating_mul(2).min(self.map_bytes_max);
        if wanted <= map_bytes {
            return Err(CommitError::MapFull(map_bytes));
        }
        #[cfg(test)]
        let wanted = if self.growth_fails.load(Relaxed) { 1 << 60 } else { wanted };
        let mut alone = self.opened.write().unwrap_or_else(PoisonError::into_inner);
        let Some(opened) = &*alone else { return Ok(()) };
        // SAFETY: every transaction is opened and ended under a shared lock of `opened`, which this function
        // holds alone.
        match unsafe { opened.env.resize(wanted) } {
            Ok(()) => {
                self.map_bytes.store(wanted, Relaxed);
                Ok(())
            }
            Err(error) => {
                // LMDB has unmapped the file by now, and would map nothing if it were asked for the old size. Nobody
                // may look at it before it is opened anew.
                self.open_anew(&mut alone)?;
                Err(CommitError::Grow { wanted, error })
            }
        }
    }

    /// Closes the file and opens it with the size of map that it had.
    fn open_anew(&self, opened: &mut Option<Opened>) -> Result<()> {
        *opened = None;
        *opened = Some(Opened::open(&self.path, self.map_bytes.load(Relaxed))?);
        Ok(())
    }
}

impl Opened {
    #[allow(unsafe_code)] // LMDB maps a file into memory
    fn open(path: &Path, map_bytes: usize) -> Result<Self> {
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(map_bytes).max_dbs(TABLES as u32).max_readers(READERS);
        // SAFETY: the files are in the store's own folder, whose lock this process holds, and nothing else
        // in this process writes to them or opens them.
        let env = unsafe { options.open(path) }?;
        let tables = Tables::create(&env)?;
        Ok(Self { env, tables })
    }

    /// Whether what the checkpoint says of itself is whole.
    fn knows_itself(&self) -> Result<bool> {
        let txn = self.env.read_txn()?;
        Ok(self.tables.meta.get(&txn, META_STORE_ID)?.is_some()
            && (self.tables.meta.0.get(&txn, META_APPLIED)?.is_none()
                || self.tables.meta.get(&txn, META_APPLIED)?.is_some()))
    }

    fn check_format(&self, path: &Path, store_id: [u8; 16]) -> std::result::Result<(), OpenError> {
        let fault =
            |error: heed::Error| OpenError::Checkpoint { path: path.to_owned(), what: error.to_string() };
        let mut txn = self.env.write_txn().map_err(fault)?;
        match self.tables.meta.0.get(&txn, META_FORMAT).map_err(fault)? {
            Some(raw) if *raw == FORMAT.to_be_bytes() => Ok(()),
            Some(raw) => {
                let found = raw.try_into().map_or(0, u32::from_be_bytes);
                Err(OpenError::Format { path: PathBuf::from(path), found, known: FORMAT })
            }
            None => {
                let meta = self.tables.meta;
                // Every format has it as it is.
                meta.0
                    .put(&mut txn, META_FORMAT, &FORMAT.to_be_bytes())
                    .and_then(|()| meta.put(&mut txn, META_STORE_ID, &store_id))
                    .and_then(|()| txn.commit())
                    .map_err(fault)
            }
        }
    }

    /// Drops the topics of all runs if a version that knows nothing of them wrote since.
    fn forget_old_topics(&self) -> Result<()> {
        let mut txn = self.env.write_txn()?;
        let (meta, topics) = (self.tables.meta, self.tables.topics);
        let applied = meta.0.get(&txn, META_APPLIED)?;
        if meta.get(&txn, META_TOPICS)? == applied.and_then(|raw| unseal(META_APPLIED, raw)) {
            return Ok(());
        }
        topics.0.clear(&mut txn)?;
        txn.commit()
    }

    /// The tables whose values have crcs and can be repaired.
    fn repairable(&self) -> [(&'static str, Table); 5] {
        let Tables { sources, state, locals, index, logs, .. } = self.tables;
        [("sources", sources), ("state", state), ("facts", locals), ("Logs", logs), ("index", index)]
    }

    /// Which rows have a wrong crc, and whether with them effects went that nobody knows.
    fn lost(&self) -> Result<Vec<(String, bool)>> {
        let txn = self.env.read_txn()?;
        let mut lost = Vec::new();
        for (name, table) in self.repairable() {
            let count = table.damaged(&txn)?.len();
            if count > 0 {
                lost.push((format!("{count} rows of the table of {name} are lost"), name != "index"));
            }
        }
        Ok(lost)
    }

    /// As [`Checkpoint::repair`].
    fn repair(&self) -> Result<()> {
        let mut txn = self.env.write_txn()?;
        for (_, table) in self.repairable() {
            for key in table.damaged(&txn)? {
                table.delete(&mut txn, &key)?;
            }
        }
        let Tables { index, logs, topics, .. } = self.tables;
        topics.0.clear(&mut txn)?;
        let mut holes: Vec<(u32, u64, u64)> = Vec::new();
        let mut last: BTreeMap<u32, u64> = BTreeMap::new();
        for row in index.iter(&txn)? {
            let (mut key, value) = row?;
            let Some(run) = Run::decode(value).filter(|_| key.len() == INDEX_KEY) else { continue };
            let (source, start, order) = (key.get_u32(), key.get_u64(), key.get_u8());
            let before = last.entry(source).or_insert_with(|| start.saturating_sub(1));
            if start > *before + 1 {
                holes.push((source, *before + 1, start - 1));
            }
            *before = (*before).max(if order == facts::FULL { run.last } else { start.saturating_sub(1) });
        }
        for (source, last) in last {
            let key = source.to_be_bytes();
            match logs.get(&txn, &key)?.map(decode_end) {
                Some(end) if end.last > last => holes.push((source, last + 1, end.last)),
                Some(_) => {}
                None => logs.put(&mut txn, &key, &encode_end(&LogEnd { last, ..LogEnd::default() }))?,
            }
        }
        for (source, from, to) in holes {
            let place = Place { segment: 0, offset: 0, len: 0 };
            let run = Run { place, last: to, bytes: 0, gap: false };
            index.put(&mut txn, &index_key(source, (from, facts::FULL)), &run.encode())?;
        }
        txn.commit()
    }

    fn summary(&self) -> Result<Summary> {
        let txn = self.env.read_txn()?;
        let mut ends = HashMap::new();
        for row in self.tables.logs.iter(&txn)? {
            let (mut key, value) = row?;
            ends.extend((key.len() == 4).then(|| (key.get_u32(), decode_end(value))));
        }
        let live = self.live()?;
        let store_id = self.tables.meta.get(&txn, META_STORE_ID)?.and_then(|raw| raw.try_into().ok());
        let applied = self.applied(&txn)?;
        Ok(Summary { store_id: store_id.unwrap_or_default(), applied, ends, live, lost: Vec::new() })
    }

    fn live(&self) -> Result<BTreeMap<u64, Live>> {
        let txn = self.env.read_txn()?;
        let mut live = BTreeMap::new();
        for row in self.tables.index.iter(&txn)? {
            if let Some(run) = Run::decode(row?.1) {
                let live: &mut Live = live.entry(run.place.segment).or_default();
                *live = Live { entries: live.entries + 1, bytes: live.bytes + u64::from(run.bytes) };
            }
        }
        Ok(live)
    }

    fn applied(&self, txn: &RoTxn<'_, WithoutTls>) -> Result<Lsn> {
        let raw = self.tables.meta.get(txn, META_APPLIED)?;
        Ok(raw.and_then(|raw| raw.try_into().ok()).map_or(0, Lsn::from_be_bytes))
    }

    fn facts(&self) -> Result<Facts> {
        let txn = self.env.read_txn()?;
        let mut facts = Facts::default();
        for row in self.tables.sources.iter(&txn)? {
            let declared = decode_record(row?.1).and_then(|record| facts::declared(&record));
            facts.sources.extend(declared.map(|source| (source.number, source)));
        }
        for row in self.tables.state.iter(&txn)? {
            let Some(record) = decode_record(row?.1) else { continue };
            let key = facts::state_key(&record);
            facts.state.extend(key.map(|key| ((record.header.source, key), record)));
        }
        for row in self.tables.locals.iter(&txn)? {
            let (key, body) = row?;
            let kind = key.first().map(|kind| Kind(*kind));
            if let (Some(kind), Some((key, Some(value)))) =
                (kind, facts::local(&Bytes::copy_from_slice(body)))
            {
                facts.locals.insert((kind, key), value);
            }
        }
        Ok(facts)
    }

    fn runs(&self, source: u32, from: u64, limit: usize) -> Result<(Lsn, Runs, Key)> {
        let txn = self.env.read_txn()?;
        let mut runs = self.reaching(&txn, source, (from, facts::EMPTY))?;
        let more = self.page(&txn, source, (from, facts::EMPTY), END, limit)?;
        let until =
            if more.len() < limit { END } else { more.last_key_value().map_or(END, |(key, _)| after(*key)) };
        runs.extend(more);
        Ok((self.applied(&txn)?, runs, until))
    }

    fn ruled_out(&self, source: u32, runs: &Runs, probes: &Probes) -> Result<RuledOut> {
        let (Some((first, _)), Some((last, _))) = (runs.first_key_value(), runs.last_key_value()) else {
            return Ok(RuledOut::default());
        };
        let txn = self.env.read_txn()?;
        let (first, last) = (index_key(source, *first), index_key(source, *last));
        let range = (Bound::Included(&first[..]), Bound::Included(&last[..]));
        let mut ruled_out = RuledOut::default();
        for row in self.tables.topics.range(&txn, &range)? {
            let (key, raw) = row?;
            let scope = Scope::decode(raw).filter(|_| key.len() == INDEX_KEY && !probes.may_match(raw));
            ruled_out.0.extend(scope.map(|scope| ((&key[4..]).get_u64(), scope)));
        }
        Ok(ruled_out)
    }

    /// The entry in front of this place, which may reach over it.
    fn reaching(&self, txn: &RoTxn<'_, WithoutTls>, source: u32, from: Key) -> Result<Runs> {
        let found = self.tables.index.get_lower_than(txn, &index_key(source, from))?;
        Ok(found.and_then(|row| decode_run(source, row)).into_iter().collect())
    }

    /// At most `limit` entries of a Log in `from..to`.
    fn page(
        &self,
        txn: &RoTxn<'_, WithoutTls>,
        source: u32,
        from: Key,
        to: Key,
        limit: usize,
    ) -> Result<Runs> {
        let (from, to) = (index_key(source, from), index_key(source, to));
        let range = (Bound::Included(&from[..]), Bound::Excluded(&to[..]));
        let rows = self.tables.index.range(txn, &range)?.take(limit);
        rows.filter_map(|row| row.map(|row| decode_run(source, row)).transpose()).collect()
    }

    /// Bytes of pages that hold something.
    fn used(&self) -> Result<u64> {
        let txn = self.env.read_txn()?;
        let Tables { meta, sources, state, locals, index, logs, topics } = &self.tables;
        let mut bytes = 0;
        for table in [meta, sources, state, locals, index, logs, topics] {
            let stat = table.0.stat(&txn)?;
            let pages = stat.branch_pages + stat.leaf_pages + stat.overflow_pages;
            bytes += pages as u64 * u64::from(stat.page_size);
        }
        Ok(bytes)
    }

    fn commit(&self, layer: &Layer) -> Result<LiveChanges> {
        let mut txn = self.env.write_txn()?;
        let mut live = LiveChanges::default();
        let tables = &self.tables;
        for (source, (_, record)) in &layer.sources {
            tables.sources.put(&mut txn, &source.to_be_bytes(), &encode_record(record))?;
        }
        for ((source, key), record) in &layer.state {
            let key = bounded_key(&source.to_be_bytes(), key);
            if record.header.kind == Kind::FORGET {
                tables.state.delete(&mut txn, &key)?;
            } else {
                tables.state.put(&mut txn, &key, &encode_record(record))?;
            }
        }
        for ((kind, key), (body, has_value)) in &layer.locals {
            let key = bounded_key(&[kind.0], key);
            if *has_value {
                tables.locals.put(&mut txn, &key, body)?;
            } else {
                tables.locals.delete(&mut txn, &key)?;
            }
        }
        for (source, changes) in &layer.logs {
            self.commit_log(&mut txn, *source, changes, &mut live)?;
        }
        tables.meta.put(&mut txn, META_APPLIED, &layer.last_lsn.to_be_bytes())?;
        tables.meta.put(&mut txn, META_TOPICS, &layer.last_lsn.to_be_bytes())?;
        txn.commit()?;
        Ok(live)
    }

    fn commit_log(
        &self,
        txn: &mut RwTxn<'_>,
        source: u32,
        changes: &LogChanges,
        live: &mut LiveChanges,
    ) -> Result<()> {
        let mut at = (0, facts::EMPTY);
        loop {
            let below = self.page(txn, source, at, (changes.first, facts::EMPTY), PAGE)?;
            let Some((last, _)) = below.last_key_value() else { break };
            at = after(*last);
            let mut kept = below.clone();
            index::raise(&mut kept, changes.first);
            self.replace(txn, source, &below, &kept, live)?;
        }
        for (from, to) in &changes.cuts {
            let mut touched = self.reaching(txn, source, (*from, facts::EMPTY))?;
            if from <= to {
                let end = after((*to, facts::FULL));
                touched.extend(self.page(txn, source, (*from, facts::EMPTY), end, usize::MAX)?);
            }
            let mut kept = touched.clone();
            index::cut(&mut kept, *from, *to);
            self.replace(txn, source, &touched, &kept, live)?;
        }
        for (key, run) in &changes.runs {
            let key = index_key(source, *key);
            if let Some(old) = self.tables.index.get(txn, &key)?.and_then(Run::decode) {
                live.remove(&old);
            }
            live.add(run);
            self.tables.index.put(txn, &key, &run.encode())?;
        }
        for (start, run, topics) in &changes.topics {
            let key = index_key(source, (*start, facts::FULL));
            // What was cut since is read.
            if self.tables.index.get(txn, &key)?.and_then(Run::decode) == Some(*run) {
                self.tables.topics.put(txn, &key, &topics.encode(run))?;
            }
        }
        self.tables.logs.put(txn, &source.to_be_bytes(), &encode_end(&changes.end))
    }

    fn move_runs(&self, moves: &[Move]) -> Result<LiveChanges> {
        let mut txn = self.env.write_txn()?;
        let mut live = LiveChanges::default();
        let mut moved: HashMap<(u32, Key), (Run, Topics)> = HashMap::new();
        for planned in moves {
            let until = after((planned.run.last, facts::FULL));
            let mut old = self.page(&txn, planned.source, planned.key, until, usize::MAX)?;
            old.retain(|_, run| run.place == planned.run.place && run.gap == planned.run.gap);
            let Some((first, _)) = old.first_key_value() else { continue };
            // The entry in front may be one that was moved before this.
            let mut before = self.reaching(&txn, planned.source, *first)?;
            let mut new = Runs::new();
            for (key, run) in &old {
                if let Some(run) = planned.moved(*key, run) {
                    new.insert(*key, run);
                    moved.insert((planned.source, *key), (run, planned.topics.clone()));
                }
            }
            if let (Some(mut front), Some(next)) = (before.first_entry(), new.first_entry())
                && front.get_mut().join(next.get())
            {
                let (next_key, _) = next.remove_entry();
                let (key, joined) = (*front.key(), *front.get());
                old.extend(self.reaching(&txn, planned.source, *first)?);
                new.insert(key, joined);
                let next = moved.remove(&(planned.source, next_key));
                if let (Some((run, topics)), Some((_, next))) = (moved.get_mut(&(planned.source, key)), next)
                {
                    *run = joined;
                    topics.join(&next);
                }
            }
            self.replace(&mut txn, planned.source, &old, &new, &mut live)?;
        }
        for ((source, key), (run, topics)) in moved {
            if topics.is_worth_keeping(&run) {
                self.tables.topics.put(&mut txn, &index_key(source, key), &topics.encode(&run))?;
            }
        }
        txn.commit()?;
        Ok(live)
    }

    /// As [`Checkpoint::runs_in`], one page; the last key of it.
    fn runs_from(
        &self,
        from: Bound<Vec<u8>>,
        segments: &BTreeSet<u64>,
        found: &mut Vec<(u32, Key, Run)>,
    ) -> Result<Option<Vec<u8>>> {
        let txn = self.env.read_txn()?;
        let range = (from.as_ref().map(Vec::as_slice), Bound::Unbounded);
        let mut last = None;
        for row in self.tables.index.range(&txn, &range)?.take(PAGE) {
            let (mut key, value) = row?;
            last = Some(key.to_vec());
            if let Some(run) = Run::decode(value)
                && segments.contains(&run.place.segment)
                && key.len() == INDEX_KEY
            {
                found.push((key.get_u32(), (key.get_u64(), key.get_u8()), run));
            }
        }
        Ok(last)
    }

    fn replace(
        &self,
        txn: &mut RwTxn<'_>,
        source: u32,
        old: &Runs,
        new: &Runs,
        live: &mut LiveChanges,
    ) -> Result<()> {
        for (key, run) in old.iter().filter(|(key, _)| !new.contains_key(*key)) {
            self.tables.index.delete(txn, &index_key(source, *key))?;
            live.remove(run);
            self.hand_on_topics(txn, source, *key, new)?;
        }
        for (key, run) in new.iter().filter(|(key, run)| old.get(*key) != Some(*run)) {
            self.tables.index.put(txn, &index_key(source, *key), &run.encode())?;
            if let Some(old) = old.get(key) {
                live.remove(old);
            }
            live.add(run);
        }
        Ok(())
    }
}

impl Opened {
    /// The topics of a run go with it, or to what is left of its records under another start.
    fn hand_on_topics(&self, txn: &mut RwTxn<'_>, source: u32, of: Key, new: &Runs) -> Result<()> {
        let key = index_key(source, of);
        let Some(raw) = self.tables.topics.get(txn, &key)?.map(<[u8]>::to_vec) else { return Ok(()) };
        self.tables.topics.delete(txn, &key)?;
        let scope = Scope::decode(&raw);
        let heir = new.range(of..).find(|(_, run)| scope.is_some_and(|scope| scope.covers(run)));
        match heir {
            Some((key, _)) => self.tables.topics.put(txn, &index_key(source, *key), &raw),
            None => Ok(()),
        }
    }
}

impl Tables {
    fn create(env: &Env<WithoutTls>) -> Result<Self> {
        let txn = env.write_txn()?;
        let made = env.create_databases_and_commit(txn, |databases, txn| {
            let mut create = |name| databases.create_database::<types::Bytes, types::Bytes>(txn, Some(name));
            let tables: [_; TABLES] = [
                create("meta")?,
                create("sources")?,
                create("state")?,
                create("locals")?,
                create("index")?,
                create("logs")?,
                create("topics")?,
            ];
            Ok::<_, heed::Error>(CommitOrAbort::<_, ()>::Commit(tables))
        })?;
        let [meta, sources, state, locals, index, logs, topics] = made.unwrap_commit();
        let [meta, sources, state, locals, index, logs, topics] =
            [meta, sources, state, locals, index, logs, topics].map(Table);
        Ok(Self { meta, sources, state, locals, index, logs, topics })
    }
}

/// A new checkpoint, whole under its name or not there at all.
fn make(path: &Path, map_bytes: usize, store_id: [u8; 16]) -> std::result::Result<(), OpenError> {
    let unfinished = path.with_extension("new");
    let made = match std::fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => std::fs::DirBuilder::new().mode(0o700).create(&unfinished),
    };
    made.map_err(|source| OpenError::Io { doing: "make", path: unfinished.clone(), source })?;
    let new = Opened::open(&unfinished, map_bytes);
    let new =
        new.map_err(|error| OpenError::Checkpoint { path: path.to_owned(), what: error.to_string() })?;
    new.check_format(&unfinished, store_id)?;
    new.env.prepare_for_closing().wait();
    #[cfg(test)]
    files::tape::mapped_changed(&unfinished.join(DATA));
    let named = files::sync_dir(&unfinished)
        .and_then(|()| files::rename(&unfinished, path))
        .and_then(|()| files::sync_dir(path.parent().unwrap_or(path)));
    named.map_err(|source| OpenError::Io { doing: "make", path: path.to_owned(), source })
}

fn after((start, order): Key) -> Key {
    (start, order + 1)
}

fn index_key(source: u32, (start, order): Key) -> [u8; INDEX_KEY] {
    let mut raw = [0; INDEX_KEY];
    let mut out = &mut raw[..];
    out.put_u32(source);
    out.put_u64(start);
    out.put_u8(order);
    raw
}

/// `None` if the entry is of another Log.
fn decode_run(source: u32, (mut key, value): (&[u8], &[u8])) -> Option<(Key, Run)> {
    if key.len() != INDEX_KEY || key.get_u32() != source {
        return None;
    }
    Some(((key.get_u64(), key.get_u8()), Run::decode(value)?))
}

fn bounded_key(prefix: &[u8], key: &[u8]) -> Vec<u8> {
    let mut out = prefix.to_vec();
    if key.len() <= KEY_MAX {
        out.extend_from_slice(key);
    } else {
        out.extend_from_slice(&key[..KEY_MAX]);
        out.extend_from_slice(&Sha256::digest(key));
    }
    out
}

fn encode_record(record: &Record) -> Vec<u8> {
    let mut raw = Vec::with_capacity(record.wire_len());
    let body_len = u32::try_from(record.body.len()).expect("bodies are bounded by FRAME_MAX");
    raw.extend_from_slice(&record.header.encode(body_len));
    raw.extend_from_slice(&record.body);
    raw
}

fn decode_record(raw: &[u8]) -> Option<Record> {
    let (header, body) = raw.split_first_chunk::<{ RecordHeader::LEN }>()?;
    Some(Record { header: RecordHeader::decode(header).0, body: Bytes::copy_from_slice(body) })
}

fn encode_end(end: &LogEnd) -> [u8; 20] {
    let mut raw = [0; 20];
    let mut out = &mut raw[..];
    out.put_u64(end.last);
    out.put_u64(end.last_epoch);
    out.put_u32(end.last_crc);
    raw
}

fn decode_end(mut raw: &[u8]) -> LogEnd {
    if raw.len() != 20 {
        return LogEnd::default();
    }
    LogEnd { last: raw.get_u64(), last_epoch: raw.get_u64(), last_crc: raw.get_u32() }
}

/// LMDB's file in its folder.
const DATA: &str = "data.mdb";
/// Format of the checkpoint. 2: values have checksums.
const FORMAT: u32 = 2;
const TABLES: usize = 7;
/// Bytes of an index entry's key.
const INDEX_KEY: usize = 13;
/// The reader thread, the checkpoint thread, recovery, and room.
const READERS: u32 = 8;
const META_FORMAT: &[u8] = b"format";
const META_STORE_ID: &[u8] = b"store id";
const META_UNCERTAIN: &[u8] = b"uncertain at";
const META_APPLIED: &[u8] = b"applied lsn";
/// The applied lsn, as a version wrote it that keeps topics.
const META_TOPICS: &[u8] = b"topics at";
/// Bytes of a key besides its prefix; LMDB takes 1 900 and more with longer-keys.
const KEY_MAX: usize = 1536;
/// Index entries looked at together, by whatever looks at many.
const PAGE: usize = 1024;
