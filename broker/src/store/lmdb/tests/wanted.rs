//! Reads for narrow filters: nothing that is wanted is left out, and what is left out is not read.

use codec::Filter;

use super::{super::topics::Probes, *};

const TOPICS: [&str; 6] = ["t", "a", "a/b", "a/b/c", "a/c", "b/b"];
const FILTERS: [&str; 7] = ["t", "a/b", "a/#", "a/b/+", "+/b", "b/#", "none/#"];

fn of_topic(source: u32, seq: u64, topic: &str, len: usize) -> Record {
    record(Kind::LOG, source, seq, frame(topic, &vec![7; len]))
}

fn wanting(source: u32, from: u64, bytes_max: usize, filters: &[&str]) -> ReadRequest {
    let wanted = filters.iter().map(|filter| Filter::parse(filter).unwrap()).collect();
    ReadRequest { read: 5, source, from, bytes_max, wanted: Some(wanted) }
}

/// Reads on until there is nothing more; where each read ended.
fn read_on(store: &mut LmdbStore, mut request: ReadRequest) -> (Vec<Record>, Vec<u64>) {
    let (mut all, mut ends) = (Vec::new(), Vec::new());
    loop {
        store.read(request.clone());
        let StoreEvent::Read { records, next, .. } = next(store) else { panic!("a read was started") };
        // A gap that covers nothing and ends a read is told again by the next.
        let again = records.first().is_some_and(|first| all.last() == Some(first));
        all.extend(records.into_iter().skip(usize::from(again)));
        ends.push(next);
        if next <= request.from {
            return (all, ends);
        }
        request.from = next;
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// So many groups of one topic, each of so many records.
    Append {
        topic: usize,
        groups: usize,
        records: usize,
        len: usize,
    },
    /// A seq again, under another topic, in a group with what follows it.
    Again {
        back: u64,
        topic: usize,
    },
    /// A part is removed, a change of epoch is told, both within one group of records.
    Gap {
        back: u64,
        len: u64,
        topic: usize,
    },
    NewEpoch {
        topic: usize,
    },
    Raise {
        keep: u64,
    },
    Restart {
        clean: bool,
    },
    Read {
        filters: Vec<usize>,
        from: u64,
        bytes_max: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let topic = || 0..TOPICS.len();
    prop_oneof![
        8 => (topic(), 1..8usize, 1..4usize, 0..300usize)
            .prop_map(|(topic, groups, records, len)| Step::Append { topic, groups, records, len }),
        2 => (0..12u64, topic()).prop_map(|(back, topic)| Step::Again { back, topic }),
        2 => (0..20u64, 0..6u64, topic()).prop_map(|(back, len, topic)| Step::Gap { back, len, topic }),
        1 => topic().prop_map(|topic| Step::NewEpoch { topic }),
        1 => (0..40u64).prop_map(|keep| Step::Raise { keep }),
        1 => any::<bool>().prop_map(|clean| Step::Restart { clean }),
        4 => (proptest::collection::vec(0..FILTERS.len(), 1..3), 0..60u64, 0..3000usize)
            .prop_map(|(filters, from, bytes_max)| Step::Read { filters, from, bytes_max }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_read_for_some_filters_is_a_read_of_everything_without_the_rest(
        steps in proptest::collection::vec(step(), 4..30),
        every in prop_oneof![3 => Just(Duration::ZERO), 1 => Just(NEVER)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = MemStore::auto();
        let (mut store, _) = open(dir.path(), options(every)).unwrap();
        let (mut lsn, mut last, mut gap_to) = (0, 0, 0);
        let reads = (0..FILTERS.len())
            .map(|filter| Step::Read { filters: vec![filter], from: 0, bytes_max: 500 });
        for step in steps.into_iter().chain(reads) {
            let mut records = Vec::new();
            let mut groups = 1;
            match step {
                Step::Append { topic, groups: count, records: each, len } => {
                    groups = count;
                    records = (0..count * each).map(|_| { last += 1; of_topic(1, last, TOPICS[topic], len) }).collect();
                }
                Step::Again { back, topic } => {
                    let seq = last.saturating_sub(back);
                    if seq > gap_to {
                        let old = TOPICS[(topic + 1) % TOPICS.len()];
                        records = vec![of_topic(1, last + 1, old, 200), of_topic(1, seq, TOPICS[topic], 200)];
                        last += 1;
                        records.push(of_topic(1, last, TOPICS[topic], 200));
                        records.push(of_topic(1, last + 1, old, 20));
                        last += 1;
                    }
                }
                Step::Gap { back, len, topic } => {
                    let from = last.saturating_sub(back).max(gap_to + 1);
                    gap_to = (from + len).min(last.max(from));
                    records.push(of_topic(1, last + 1, TOPICS[topic], 200));
                    last = gap_to.max(last + 1);
                    records.push(gap(1, from, gap_to));
                }
                Step::NewEpoch { topic } => {
                    records.push(of_topic(1, last + 1, TOPICS[topic], 150));
                    records.push(gap(1, last + 2, last + 1));
                    records.push(of_topic(1, last + 2, TOPICS[(topic + 1) % TOPICS.len()], 150));
                    last += 2;
                }
                Step::Raise { keep } => records.push(table(1, (last + 1).saturating_sub(keep))),
                Step::Restart { clean } => {
                    if clean { drop(store) } else { store.kill() }
                    (store, _) = open(dir.path(), options(every)).unwrap();
                }
                Step::Read { filters, from, bytes_max } => {
                    let filters: Vec<&str> = filters.into_iter().map(|filter| FILTERS[filter]).collect();
                    let request = wanting(1, from, bytes_max, &filters);
                    let mut expected = read(&mut model, 1, from, usize::MAX);
                    expected.retain(|record| request.wants(record));
                    prop_assert_eq!(read_on(&mut store, request).0, expected);
                }
            }
            if !records.is_empty() {
                let each = records.len() / groups;
                let groups: Vec<Group> = records
                    .chunks(each)
                    .map(|records| { lsn += 1; group(lsn, records.to_vec()) })
                    .collect();
                groups.iter().for_each(|group| model.submit(group.clone()));
                let event = model.poll_event(&mut Context::from_waker(Waker::noop()));
                prop_assert!(matches!(event, Poll::Ready(StoreEvent::Persisted(at)) if at == lsn));
                persist(&mut store, groups);
            }
        }
    }
}

/// Records of topic `a` in several segments, and in the checkpoint.
fn some_runs(path: &Path) -> LmdbStore {
    let (mut store, _) = open(path, options(NEVER)).unwrap();
    persist(&mut store, (1..=60).map(|seq| group(seq, vec![of_topic(1, seq, "a", 150)])).collect());
    drop(store);
    open(path, options(NEVER)).unwrap().0
}

#[test]
fn a_run_in_which_nothing_is_wanted_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = some_runs(dir.path());
    let damaged =
        OpenOptions::new().write(true).open(dir.path().join("journal").join(segment_name(2))).unwrap();
    damaged.write_all_at(&[0xff; 64], 200).unwrap();
    assert_eq!(read_on(&mut store, wanting(1, 0, usize::MAX, &["a/b", "b"])).0, []);
    assert!(!store.shared.quarantine.has(2), "what is damaged was not even looked at");
    let records = read(&mut store, 1, 0, usize::MAX);
    assert!(records.iter().any(|record| record.header.kind == Kind::GAP), "the damage is there");
}

#[test]
fn a_read_that_returns_nothing_says_where_to_read_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = some_runs(dir.path());
    let (records, ends) = read_on(&mut store, wanting(1, 0, usize::MAX, &["+/none"]));
    assert_eq!(records, []);
    assert!(ends.len() > 2 && ends.is_sorted(), "what one read looks at is bounded: {ends:?}");
    assert_eq!(ends.last(), Some(&61));
}

#[test]
fn a_checkpoint_without_topics_or_with_those_of_an_older_one_is_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = some_runs(dir.path());
    let (_, runs, _) = store.shared.checkpoint.runs(1, 0, usize::MAX).unwrap();
    let none = Probes::new(&[Filter::parse("none").unwrap()]).unwrap();
    let ruled_out = |store: &LmdbStore| store.shared.checkpoint.ruled_out(1, &runs, &none).unwrap().0.len();
    assert!(ruled_out(&store) > 0);
    // A version that knows no topics wrote a checkpoint.
    store.shared.checkpoint.set_topics_lsn(7).unwrap();
    drop(store);
    let (mut store, _) = open(dir.path(), options(NEVER)).unwrap();
    assert_eq!(ruled_out(&store), 0);
    assert_eq!(read_on(&mut store, wanting(1, 0, usize::MAX, &["a"])).0.len(), 60);
}
