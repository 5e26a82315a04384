//! Dropped-write replay, and the rules of the tail.

use std::{
    collections::BTreeMap,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    scan::{Scan, Seen},
    *,
};
use crate::store::{OpenError, facts::samples::*, files};

/// What was done to the disk, in order. A segment is made whole and synced; an append is a write and a sync.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tape(Arc<Mutex<Taped>>);

#[derive(Debug, Default)]
struct Taped {
    ops: Vec<Op>,
    /// The next append writes this many bytes and then fails.
    fail_after: Option<usize>,
    /// No segment can be made.
    full: bool,
    /// Except one, for which room was held back.
    but_one: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Create {
        number: u64,
        header: Vec<u8>,
        capacity: u64,
    },
    Write {
        number: u64,
        offset: u64,
        bytes: Vec<u8>,
    },
    Sync,
    /// Everything up to this lsn was reported.
    Reported(Lsn),
}

impl Tape {
    pub(super) fn create(&self, header: &SegmentHeader, capacity: u64) -> io::Result<()> {
        let mut taped = self.0.lock().unwrap();
        if taped.full && !std::mem::take(&mut taped.but_one) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        taped.ops.push(Op::Create { number: header.number, header: header.encode().to_vec(), capacity });
        Ok(())
    }

    pub(super) fn spare(&self) -> io::Result<()> {
        if self.0.lock().unwrap().full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    pub(super) fn append(
        &self,
        segment: &SegmentFile,
        offset: u64,
        slices: &[IoSlice<'_>],
    ) -> io::Result<()> {
        let mut taped = self.0.lock().unwrap();
        let mut bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let fails = taped.fail_after.take();
        bytes.truncate(fails.unwrap_or(usize::MAX));
        if fails.is_some() {
            files::write_at(&segment.file, &segment.path, &bytes, offset)?;
        }
        taped.ops.push(Op::Write { number: segment.number, offset, bytes });
        if fails.is_some() {
            return Err(io::Error::other("the disk failed"));
        }
        taped.ops.push(Op::Sync);
        Ok(())
    }

    pub(super) fn erase(&self, segment: &SegmentFile, offset: u64) {
        let bytes = vec![0; GroupHeader::LEN];
        let op = Op::Write { number: segment.number, offset, bytes };
        self.0.lock().unwrap().ops.extend([op, Op::Sync]);
    }

    /// The next append writes this many bytes and fails.
    pub(crate) fn fail_after(&self, bytes: usize) {
        self.0.lock().unwrap().fail_after = Some(bytes);
    }

    /// From now on there is, or is not, room for another segment.
    pub(crate) fn set_full(&self, full: bool) {
        self.0.lock().unwrap().full = full;
    }

    /// One more segment can be made: the one for which room is held back.
    pub(crate) fn allow_one(&self) {
        self.0.lock().unwrap().but_one = true;
    }

    fn report(&self, lsn: Lsn) {
        self.0.lock().unwrap().ops.push(Op::Reported(lsn));
    }

    /// What a crash after `cut` ops leaves in `dir`, with sectors of unsynced writes lost as `lost` says.
    /// Returns the last lsn that had been reported.
    fn replay(&self, dir: &Path, cut: usize, mut lost: impl FnMut() -> bool) -> Lsn {
        let mut files: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        let mut unsynced = Vec::new();
        let mut reported = 0;
        let taped = self.0.lock().unwrap();
        let write = |files: &mut BTreeMap<u64, Vec<u8>>, number, offset: u64, bytes: &[u8]| {
            let file: &mut Vec<u8> = files.get_mut(&number).unwrap();
            file[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        for op in &taped.ops[..cut] {
            match op {
                Op::Create { number, header, capacity } => {
                    let mut file = vec![0; *capacity as usize];
                    file[..header.len()].copy_from_slice(header);
                    files.insert(*number, file);
                }
                Op::Write { number, offset, bytes } => unsynced.push((*number, *offset, bytes)),
                Op::Sync => {
                    for (number, offset, bytes) in unsynced.drain(..) {
                        write(&mut files, number, offset, bytes);
                    }
                }
                Op::Reported(lsn) => reported = *lsn,
            }
        }
        for (number, offset, bytes) in unsynced {
            for (at, sector) in bytes.chunks(64).enumerate() {
                if !lost() {
                    write(&mut files, number, offset + 64 * at as u64, sector);
                }
            }
        }
        for (number, bytes) in files {
            std::fs::write(dir.join(format::segment_name(number)), bytes).unwrap();
        }
        reported
    }
}

const ID: [u8; 16] = [7; 16];

type Found = Vec<(Lsn, Vec<Record>)>;

fn reopen(dir: &Path) -> Result<(Scan, Found), OpenError> {
    let mut groups = Vec::new();
    let scan = scan::scan(dir, 0, &mut |seen| {
        if let Seen::Group(found) = seen {
            groups.push((found.lsn, scan::split(found.records).collect()));
        }
    })?;
    Ok((scan, groups))
}

fn journal(dir: &Path, io: JournalIo) -> (Journal, Tape) {
    let tape = Tape::default();
    let mut disk = Disk::new(io).unwrap();
    disk.tape = Some(tape.clone());
    let end = reopen(dir).unwrap().0.end;
    (Journal::new(dir, ID, 4096, disk, &end).unwrap(), tape)
}

fn append(journal: &mut Journal, groups: &[Group]) -> Result<Vec<Place>, AppendError> {
    let (mut places, mut opened) = (Vec::new(), Vec::new());
    journal.append(groups, &mut places, &mut opened).map(|()| places)
}

fn sample(lsn: Lsn, len: usize) -> Group {
    group(lsn, vec![log(1, lsn, &vec![lsn as u8 | 1; len]), put(2, "key", lsn, b"")])
}

fn file(dir: &Path, number: u64) -> std::fs::File {
    std::fs::OpenOptions::new().read(true).write(true).open(dir.join(format::segment_name(number))).unwrap()
}

fn flip(dir: &Path, place: &Place) {
    let at = place.offset + GroupHeader::LEN as u64 + 50;
    let mut byte = [0];
    file(dir, place.segment).read_exact_at(&mut byte, at).unwrap();
    file(dir, place.segment).write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn both_ways_of_writing_give_the_same_groups() {
    for io in [JournalIo::Plain, JournalIo::Auto] {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = journal(dir.path(), io);
        let many = group(1, (1..=3000).map(|seq| log(1, seq, b"x")).collect());
        let groups = [many.clone(), sample(2, 9), group(3, vec![]), sample(4, 5000), sample(5, 0)];
        append(&mut journal, &groups).unwrap();
        let (scan, found) = reopen(dir.path()).unwrap();
        assert_eq!(found, groups.map(|group| (group.lsn, group.records)).to_vec());
        assert_eq!(scan.segments.len(), 4, "a large one has a segment of its own size");
    }
}

/// The lsns that can be read, and what is damaged: segment, offset, and whether groups above the checkpoint went.
fn contained(dir: &Path) -> (Vec<Lsn>, Vec<(u64, u64, bool)>) {
    let (scan, found) = reopen(dir).unwrap();
    let damage =
        scan.damage.iter().map(|damaged| (damaged.place.segment, damaged.place.offset, damaged.is_new));
    (found.into_iter().map(|(lsn, _)| lsn).collect(), damage.collect())
}

#[test]
fn a_damaged_group_with_a_synced_one_behind_it_is_told_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = journal(dir.path(), JournalIo::Plain);
    let places = append(&mut journal, &[sample(1, 100)]).unwrap();
    append(&mut journal, &[sample(2, 100)]).unwrap();
    flip(dir.path(), &places[0]);
    let before = std::fs::read(dir.path().join(format::segment_name(1))).unwrap();
    assert_eq!(contained(dir.path()), (vec![2], vec![(1, 64, true)]));
    assert_eq!(std::fs::read(dir.path().join(format::segment_name(1))).unwrap(), before);
    let none = scan::scan(dir.path(), 1, &mut |_| {}).unwrap();
    assert!(!none.damage[0].is_new, "the checkpoint has it");
}

#[test]
fn a_damaged_group_in_front_of_a_later_segment_is_told_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = journal(dir.path(), JournalIo::Plain);
    let places = append(&mut journal, &[sample(1, 1500), sample(2, 1500), sample(3, 2000)]).unwrap();
    assert_ne!(places[1].segment, places[2].segment);
    flip(dir.path(), &places[0]);
    assert_eq!(contained(dir.path()), (vec![2, 3], vec![(1, 64, true)]));
    flip(dir.path(), &places[1]);
    assert_eq!(contained(dir.path()), (vec![3], vec![(1, 64, true)]));
}

#[test]
fn a_segment_without_a_header_is_told_and_its_number_is_not_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 4000), sample(2, 4000)]).unwrap();
    file(dir.path(), 2).write_all_at(&[9], 30).unwrap();
    assert_eq!(contained(dir.path()), (vec![1], vec![(2, 0, true)]));
    assert_eq!(reopen(dir.path()).unwrap().0.end.next_number, 3);
}

#[test]
fn a_damaged_group_with_only_groups_of_its_own_write_behind_it_is_the_torn_tail() {
    let dir = tempfile::tempdir().unwrap();
    let (mut writer, _) = journal(dir.path(), JournalIo::Plain);
    append(&mut writer, &[sample(1, 100)]).unwrap();
    let places = append(&mut writer, &[sample(2, 100), sample(3, 100)]).unwrap();
    flip(dir.path(), &places[0]);
    let (scan, found) = reopen(dir.path()).unwrap();
    assert_eq!((scan.end.last_lsn, found.len()), (1, 1));

    // Group 3 of the torn write is whole and would follow: it must not come back behind another group 2.
    let (mut writer, _) = journal(dir.path(), JournalIo::Plain);
    append(&mut writer, &[sample(2, 100)]).unwrap();
    assert_eq!(reopen(dir.path()).unwrap().0.end.last_lsn, 2);
}

#[test]
fn a_refused_group_is_not_there_after_a_restart_and_its_lsn_is_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, tape) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 100)]).unwrap();
    tape.fail_after(usize::MAX);
    let refused = append(&mut journal, &[sample(2, 100), sample(3, 100)]).unwrap_err();
    assert_eq!(refused.lsn, 2);
    assert_eq!(reopen(dir.path()).unwrap().0.end.last_lsn, 1);

    append(&mut journal, &[group(2, vec![log(1, 2, b"another")])]).unwrap();
    let (_, found) = reopen(dir.path()).unwrap();
    assert_eq!(found[1], (2, vec![log(1, 2, b"another")]));
    assert_eq!(found.len(), 2);
}

#[test]
fn a_disk_that_keeps_failing_gets_one_new_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, tape) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 100)]).unwrap();
    for _ in 0..5 {
        tape.fail_after(30);
        append(&mut journal, &[sample(2, 100)]).unwrap_err();
        assert_eq!(reopen(dir.path()).unwrap().0.end.last_lsn, 1);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    append(&mut journal, &[sample(2, 100)]).unwrap();
    let (scan, found) = reopen(dir.path()).unwrap();
    assert_eq!((scan.segments.len(), scan.end.last_lsn, found.len()), (2, 2, 2));
}

#[test]
fn a_full_disk_refuses_from_the_first_group_that_needs_a_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, tape) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 100)]).unwrap();
    tape.set_full(true);
    let refused = append(&mut journal, &[sample(2, 100), sample(3, 5000)]).unwrap_err();
    assert_eq!((refused.lsn, refused.source.kind()), (3, io::ErrorKind::StorageFull));
    append(&mut journal, &[sample(3, 100)]).unwrap();
    assert_eq!(reopen(dir.path()).unwrap().0.end.last_lsn, 3);
}

#[test]
fn another_format_is_refused_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 100)]).unwrap();
    file(dir.path(), 1).write_all_at(&[2], 8).unwrap();
    assert!(matches!(reopen(dir.path()), Err(OpenError::Format { found: 2, known: 1, .. })));
}

#[test]
fn a_missing_segment_is_told_and_the_rest_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = journal(dir.path(), JournalIo::Plain);
    append(&mut journal, &[sample(1, 4000), sample(2, 4000), sample(3, 4000)]).unwrap();
    std::fs::remove_file(dir.path().join(format::segment_name(2))).unwrap();
    let (found, damage) = contained(dir.path());
    assert_eq!((found, damage.len(), damage[0].2), (vec![1, 3], 1, true));
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<usize>),
    Fail { groups: Vec<usize>, after: usize },
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let groups = || proptest::collection::vec(0..600usize, 1..5);
    let step = prop_oneof![
        6 => groups().prop_map(Step::Append),
        2 => (groups(), 0..1500usize).prop_map(|(groups, after)| Step::Fail { groups, after }),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Writes are recorded; after a cut anywhere, everything reported is there, each lsn once and in
    /// order, with the contents that were last given to it.
    #[test]
    fn whatever_a_crash_drops_what_was_reported_is_there_and_nothing_twice(
        steps in steps(), cut: prop::sample::Index, lost: Vec<bool>,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut writer, tape) = journal(dir.path(), JournalIo::Plain);
        // All contents that were ever given to an lsn, and the one that was reported.
        let mut given: BTreeMap<Lsn, Vec<Vec<Record>>> = BTreeMap::new();
        let mut durable: BTreeMap<Lsn, Vec<Record>> = BTreeMap::new();
        for (version, step) in steps.into_iter().enumerate() {
            let (lens, fail) = match step {
                Step::Append(lens) => (lens, None),
                Step::Fail { groups, after } => (groups, Some(after)),
                Step::Reopen => {
                    let end = reopen(dir.path()).unwrap().0.end;
                    prop_assert_eq!(end.last_lsn + 1, writer.next_lsn());
                    let mut disk = Disk::new(JournalIo::Plain).unwrap();
                    disk.tape = Some(tape.clone());
                    writer = Journal::new(dir.path(), ID, 4096, disk, &end).unwrap();
                    continue;
                }
            };
            let groups: Vec<Group> = (writer.next_lsn()..)
                .zip(lens)
                .map(|(lsn, len)| group(lsn, vec![log(1, lsn, &Bytes::from(vec![version as u8; len]))]))
                .collect();
            for group in &groups {
                given.entry(group.lsn).or_default().push(group.records.clone());
            }
            if let Some(after) = fail {
                tape.fail_after(after);
            }
            let result = append(&mut writer, &groups);
            prop_assert_eq!(result.is_err(), fail.is_some());
            tape.report(writer.next_lsn() - 1);
            let written = groups.into_iter().take_while(|group| group.lsn < writer.next_lsn());
            durable.extend(written.map(|group| (group.lsn, group.records)));
        }

        let ops = tape.0.lock().unwrap().ops.len();
        let crashed = tempfile::tempdir().unwrap();
        let mut lost = lost.into_iter().chain(std::iter::repeat(true));
        let reported = tape.replay(crashed.path(), cut.index(ops + 1), || lost.next().unwrap());
        let (scan, found) = reopen(crashed.path()).unwrap();
        prop_assert!(scan.end.last_lsn >= reported, "{} was reported, {:?}", reported, scan);
        prop_assert!(scan.damage.is_empty(), "a crash damages nothing: {:?}", scan.damage);
        for (expected, (lsn, records)) in (1..).zip(found) {
            prop_assert_eq!(lsn, expected);
            if lsn <= reported {
                prop_assert_eq!(&durable[&lsn], &records);
            }
            prop_assert!(given[&lsn].contains(&records));
        }
    }
}
