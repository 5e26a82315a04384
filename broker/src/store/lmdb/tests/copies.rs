//! Copies of a store that runs, and what examining one finds.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::store::{
    backup::{self, BackupError},
    lmdb::fsck,
};

fn content(path: &Path) -> (Vec<Record>, Recovered) {
    let (mut store, recovered) = open(path, options(NEVER)).unwrap();
    (read(&mut store, 1, 0, usize::MAX), recovered)
}

fn groups(lsns: std::ops::RangeInclusive<u64>) -> Vec<Group> {
    let records = |lsn: u64| vec![log(1, lsn, &[7; 700]), put(2, &format!("key/{}", lsn % 5), lsn, b"v")];
    lsns.map(|lsn| group(lsn, records(lsn))).collect()
}

fn declared(path: &Path, checkpoint_every: Duration) -> LmdbStore {
    let (mut store, _) = open(path, options(checkpoint_every)).unwrap();
    let sources = vec![declare(1, SourceKind::Log, "s"), declare(2, SourceKind::State, "t")];
    persist(&mut store, vec![group(1, sources)]);
    store
}

#[test]
fn a_copy_of_a_running_store_holds_all_that_was_durable_and_nothing_torn() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut store = declared(dir.path(), Duration::from_millis(1));
    let copier = store.copier();
    let mut lsn = 1;
    std::thread::scope(|scope| {
        let copies = scope.spawn(|| {
            for n in 0..4 {
                let to = to.path().join(n.to_string());
                std::fs::create_dir(&to).unwrap();
                copier.copy(&to).unwrap().unwrap();
            }
        });
        while !copies.is_finished() {
            persist(&mut store, groups(lsn + 1..=lsn + 10));
            lsn += 10;
        }
        copies.join().unwrap();
    });
    drop(store);
    assert!(copier.copy(to.path()).unwrap().is_none(), "the store is closed");
    let (all, _) = content(dir.path());
    for n in 0..4 {
        let copy = to.path().join(n.to_string());
        let report = fsck::check(&copy).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
        let (records, recovered) = content(&copy);
        assert_eq!(records[..], all[..records.len()], "copy {n}");
        assert_eq!(recovered.last_lsn, records.len() as u64 + 1);
    }
}

#[test]
fn what_is_written_after_a_copy_does_not_change_it() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut store = declared(dir.path(), NEVER);
    persist(&mut store, groups(2..=30));
    store.copier().copy(to.path()).unwrap().unwrap();
    persist(&mut store, groups(31..=60));
    drop(store);
    assert_eq!(content(to.path()).1.last_lsn, 30);
    assert_eq!(content(dir.path()).1.last_lsn, 60);
}

#[test]
fn a_restored_folder_holds_everything_but_the_instance_and_nobody_else_reads_it() {
    let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (to, restored) = (root.path().join("backup"), root.path().join("restored"));
    let mut store = declared(dir.path(), NEVER);
    persist(&mut store, groups(2..=30));
    assert!(matches!(backup::of_folder(dir.path(), &to), Err(BackupError::Store(OpenError::Locked(_)))));
    drop(store);
    std::fs::create_dir(dir.path().join("identity")).unwrap();
    std::fs::write(dir.path().join("identity/identity.json"), "a key").unwrap();
    std::fs::write(dir.path().join("instance.json"), "an instance").unwrap();

    assert!(matches!(backup::of_folder(dir.path(), &dir.path().join("inside")), Err(BackupError::Inside(_))));
    let made = backup::of_folder(dir.path(), &to).unwrap();
    assert_eq!(made.files, [Path::new("identity/identity.json")]);
    assert!(matches!(backup::of_folder(dir.path(), &to), Err(BackupError::NotEmpty(_))));
    assert!(matches!(backup::restore(&to, dir.path()), Err(BackupError::NotEmpty(_))));
    assert_eq!(backup::restore(&to, &restored).unwrap(), made);
    let key = restored.join("identity/identity.json");
    assert_eq!(std::fs::read(&key).unwrap(), b"a key");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(&restored).unwrap().permissions().mode() & 0o777, 0o700);
    assert!(!restored.join("instance.json").exists());
    let (original, copy) = (content(dir.path()), content(&restored));
    assert_eq!(copy.0, original.0);
    assert_eq!(comparable(copy.1), comparable(original.1));

    std::fs::remove_file(to.join("backup.json")).unwrap();
    let again = backup::restore(&to, &root.path().join("again"));
    assert!(matches!(again, Err(BackupError::NotABackup(_))), "it was not finished");
}

#[test]
fn fsck_names_what_is_damaged_beyond_its_log_or_missing() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = declared(dir.path(), NEVER);
    persist(&mut store, groups(2..=30));
    drop(store);
    let clean = fsck::check(dir.path()).unwrap();
    assert_eq!(clean.problems, Vec::<String>::new());
    assert_eq!((clean.logs, clean.records, clean.state), (1, 29, 5));

    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    let mut key = b"device\0c".to_vec();
    key.extend(1u32.to_be_bytes());
    let cursor = codec::encode(&codec::proto::Cursor { epoch: 1, low: 99, acked: vec![] });
    persist(&mut store, vec![group(31, vec![fact(Kind::CURSOR, &key, Some(&cursor))])]);
    assert!(matches!(fsck::check(dir.path()), Err(OpenError::Locked(_))));
    drop(store);
    let first = dir.path().join("journal").join(segment_name(1));
    OpenOptions::new().write(true).open(first).unwrap().write_all_at(&[9], 1000).unwrap();
    let problems = fsck::check(dir.path()).unwrap().problems;
    assert!(problems.iter().any(|said| said.contains("damaged")), "{problems:?}");
    assert!(problems.iter().any(|said| said.contains("cursor of \"device\" is at 99")), "{problems:?}");
    assert!(fsck::check(&dir.path().join("nothing")).is_err());
}
