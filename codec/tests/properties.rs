//! What holds for every value: round trips, agreement with prost and with NATS's matching, and filters against
//! brute force.

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with the fuzz targets, for which this is a library")]
mod checks;

use bytes::{Bytes, BytesMut};
use codec::batch::{self, BATCH_RAW_MAX, Encoder};
use codec::proto::{Frame, Header};
use codec::{Filter, Flags, FrameParts, FrameView, Kind, Record, RecordHeader, Trace, name, topic};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use prost::Message;

/// What once failed is kept beside this file, in `properties.regressions`, and tried first.
fn cases(cases: u32) -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases, failure_persistence: Some(Box::new(kept)), ..ProptestConfig::default() }
}

// === frames ===

fn trace() -> impl Strategy<Value = Trace> {
    (any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u8>()).prop_map(|(trace_id, parent_id, flags)| Trace {
        trace_id,
        parent_id,
        flags,
    })
}

fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..max).prop_map(Bytes::from)
}

fn header() -> impl Strategy<Value = Header> {
    (".{0,20}", bytes(200)).prop_map(|(name, value)| Header { name, value })
}

fn frame() -> impl Strategy<Value = Frame> {
    let trace = prop_oneof![
        trace().prop_map(|trace| [&trace.trace_id[..], &trace.parent_id, &[trace.flags]].concat().into()),
        bytes(30)
    ];
    let time = (any::<u64>(), any::<bool>(), any::<u32>());
    (".{0,40}", time, trace, vec(header(), 0..5), bytes(600)).prop_map(
        |(topic, (time_us, time_trusted, ttl_s), trace, headers, payload)| Frame {
            topic,
            time_us,
            time_trusted,
            trace,
            headers,
            ttl_s,
            payload,
        },
    )
}

/// A key of a field number near ours with any wire type, or of any number.
fn key() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..10, 0u64..7).prop_map(|(number, wire)| number << 3 | wire),
        1 => any::<u64>(),
    ]
}

fn put_varint(out: &mut Vec<u8>, value: u64) {
    prost::encoding::encode_varint(value, out);
}

/// One field: mostly well-formed, its wire type often not the schema's.
fn wire_field() -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        4 => vec(any::<u8>(), 0..12).prop_map(|raw| (raw, true)),
        1 => vec(any::<u8>(), 0..12).prop_map(|raw| (raw, false)),
    ];
    (key(), any::<u64>(), value).prop_map(|(key, number, (raw, fitting))| {
        let mut out = Vec::new();
        put_varint(&mut out, key);
        match key & 7 {
            0 if fitting => put_varint(&mut out, number),
            1 if fitting => out.extend(number.to_le_bytes()),
            2 if fitting => {
                put_varint(&mut out, raw.len() as u64);
                out.extend(raw);
            }
            3 if fitting => put_varint(&mut out, key + 1),
            5 if fitting => out.extend(&number.to_le_bytes()[..4]),
            _ => out.extend(raw),
        }
        out
    })
}

/// Fields, alone or inside a header or a group.
fn wire_message() -> impl Strategy<Value = Vec<u8>> {
    let fields = || vec(wire_field(), 0..6).prop_map(|fields| fields.concat());
    let part = prop_oneof![
        3 => fields(),
        1 => fields().prop_map(|inner| {
            let mut out = vec![0x2a];
            put_varint(&mut out, inner.len() as u64);
            [out, inner].concat()
        }),
        1 => fields().prop_map(|inner| [&[0x43][..], &inner, &[0x44]].concat()),
    ];
    vec(part, 0..4).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn what_frame_parts_write_prost_and_the_view_read(
        topic in ".{0,40}", time_us: u64, time_trusted: bool, trace in proptest::option::of(trace()),
        ttl_s: u32, headers in vec((".{0,20}", vec(any::<u8>(), 0..200)), 0..5),
        payload in vec(any::<u8>(), 0..600),
    ) {
        let borrowed: Vec<_> = headers.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        let parts = FrameParts {
            topic: &topic, time_us, time_trusted, trace, ttl_s, headers: &borrowed, payload: &payload,
        };
        let raw = parts.encode();
        prop_assert_eq!(raw.len(), parts.encoded_len());
        prop_assert!(raw.ends_with(&payload));
        let decoded = Frame::decode(raw.clone()).unwrap();
        prop_assert_eq!(decoded.encoded_len(), raw.len());
        prop_assert_eq!((&decoded.topic, decoded.time_us, decoded.ttl_s), (&topic, time_us, ttl_s));
        prop_assert_eq!(&decoded.payload[..], &payload[..]);
        prop_assert_eq!(decoded.headers.len(), headers.len());
        let view = FrameView::parse(&raw).unwrap();
        prop_assert_eq!(view.trace(), trace);
        checks::frames_agree(&decoded, &view);
    }

    #[test]
    fn what_prost_writes_the_view_reads(frame in frame()) {
        let raw = frame.encode_to_vec();
        checks::frames_agree(&frame, &FrameView::parse(&raw).unwrap());
        checks::frame(&raw);
    }

    #[test]
    fn two_frames_end_to_end_are_merged_as_prost_merges_them(left in frame(), right in frame()) {
        checks::frame(&[left.encode_to_vec(), right.encode_to_vec()].concat());
    }

    #[test]
    fn a_frame_cut_anywhere_is_read_alike(frame in frame(), at: prop::sample::Index) {
        let raw = frame.encode_to_vec();
        checks::frame(&raw[..at.index(raw.len() + 1)]);
    }

    #[test]
    fn prost_and_the_view_agree_on_any_wire_format(raw in wire_message()) {
        checks::frame(&raw);
    }

    #[test]
    fn traceparent_makes_the_round_trip(trace in trace()) {
        prop_assume!(trace.trace_id != [0; 16] && trace.parent_id != [0; 8]);
        prop_assert_eq!(Trace::from_traceparent(&trace.to_traceparent()), Some(trace));
    }
}

// === topics and filters ===

/// Every sequence of up to `max` levels, joined.
fn paths(levels: &[&str], max: usize) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    let mut longest: Vec<String> = levels.iter().map(|level| (*level).to_owned()).collect();
    for _ in 0..max {
        all.extend(longest.iter().cloned());
        longest = longest
            .iter()
            .flat_map(|path| levels.iter().map(move |level| format!("{path}/{level}")))
            .collect();
    }
    all
}

/// Every filter of up to three levels before a `#`, over a few names.
fn small_filters() -> Vec<Filter> {
    let closed = paths(&["a", "", "$x", topic::INBOX, "+"], 3);
    let open = closed.iter().map(|path| format!("{path}/#")).chain(["#".to_owned()]);
    open.chain(closed.iter().cloned()).filter_map(|text| Filter::parse(&text).ok()).collect()
}

/// Every topic of up to four levels, over those names and one more of each sort.
fn small_topics() -> Vec<String> {
    let mut topics = paths(&["a", "b", "", "$x", "$y", topic::INBOX], 4);
    topics.retain(|topic| topic::validate_topic(topic).is_ok());
    topics
}

/// A bit per topic: which the filter matches, by a definition of matching that shares no code with ours.
fn matched(filter: &Filter, topics: &[String], dollar: bool) -> Vec<u64> {
    let mut bits = vec![0; topics.len().div_ceil(64)];
    for (at, topic) in topics.iter().enumerate() {
        let levels: Vec<_> = topic.split('/').collect();
        let wanted: Vec<_> = filter.as_str().split('/').collect();
        let hidden = (levels[0].starts_with('$') && !dollar) || levels[0] == topic::INBOX;
        let expected = !(hidden && matches!(wanted[0], "+" | "#")) && by_definition(&wanted, &levels);
        assert_eq!(filter.matches(topic, dollar), expected, "{filter} {topic}");
        bits[at / 64] |= u64::from(expected) << (at % 64);
    }
    bits
}

fn by_definition(filter: &[&str], topic: &[&str]) -> bool {
    match (filter, topic) {
        (["#"], _) | ([], []) => true,
        ([wanted, filter @ ..], [level, topic @ ..]) => {
            (*wanted == "+" || wanted == level) && by_definition(filter, topic)
        }
        _ => false,
    }
}

#[test]
fn covering_and_intersecting_are_exact_over_all_small_filters() {
    let (filters, topics) = (small_filters(), small_topics());
    let strict: Vec<_> = filters.iter().map(|filter| matched(filter, &topics, false)).collect();
    let wide: Vec<_> = filters.iter().map(|filter| matched(filter, &topics, true)).collect();
    let within =
        |inner: &[u64], outer: &[u64]| inner.iter().zip(outer).all(|(inner, outer)| inner & !outer == 0);
    for (i, left) in filters.iter().enumerate() {
        for (j, right) in filters.iter().enumerate() {
            let covered = within(&strict[j], &strict[i]) && within(&wide[j], &wide[i]);
            assert_eq!(left.covers(right), covered, "{left} covers {right}");
            let common = wide[i].iter().zip(&wide[j]).any(|(left, right)| left & right != 0);
            assert_eq!(left.intersects(right), common, "{left} intersects {right}");
        }
    }
}

// === names ===

/// Matching of subjects as NATS defines it.
fn nats_matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            (_, None) => return false,
            (wanted, Some(token)) if wanted != "*" && wanted != token => return false,
            _ => {}
        }
    }
    tokens.next().is_none()
}

fn subject_of(topic: &str) -> String {
    let mut subject = String::new();
    name::topic_to_subject(topic, &mut subject);
    subject
}

#[test]
fn the_subjects_of_a_filter_match_what_the_filter_matches() {
    let topics: Vec<_> = small_topics().into_iter().map(|topic| (subject_of(&topic), topic)).collect();
    for filter in small_filters() {
        let (subject, below) = name::filter_to_subjects(&filter);
        for (topic_subject, topic) in topics.iter().filter(|(_, topic)| !topic::is_reserved(topic)) {
            let by_nats = nats_matches(&subject, topic_subject)
                || below.as_ref().is_some_and(|below| nats_matches(below, topic_subject));
            assert_eq!(filter.matches(topic, true), by_nats, "{filter} {topic}");
        }
        for subject in below.iter().chain([&subject]) {
            let again = name::subject_to_filter(subject).unwrap();
            assert!(filter.covers(&again), "{filter} {subject}");
            assert_eq!(name::filter_to_subjects(&again), (subject.clone(), None));
        }
    }
}

/// Levels that are likely to need escaping.
fn level() -> impl Strategy<Value = String> {
    prop_oneof!["[a-c%.*>= \t\u{7f}\u{1}$-]{0,6}", "[^/+#\u{0}]{0,8}", Just(String::new())]
}

fn valid_topic() -> impl Strategy<Value = String> {
    vec(level(), 1..=32)
        .prop_map(|levels| levels.join("/"))
        .prop_filter("within the limits", |topic| topic::validate_topic(topic).is_ok())
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn every_topic_makes_the_round_trip_through_a_legal_subject(topic in valid_topic()) {
        let subject = subject_of(&topic);
        prop_assert!(subject.split('.').all(|token| !token.is_empty() && !matches!(token, "*" | ">")));
        prop_assert!(!subject.bytes().any(|byte| byte <= b' ' || byte == 0x7f));
        prop_assert_eq!(name::subject_to_topic(&subject), Ok(topic));
    }

    #[test]
    fn every_node_name_and_topic_are_found_again(node in "[^\u{0}]{1,20}", topic in valid_topic()) {
        let mut subject = String::new();
        name::node_subject(name::UP_PREFIX, &node, &topic, &mut subject);
        let (found, rest) = name::split_node(&subject[name::UP_PREFIX.len()..]).unwrap();
        prop_assert_eq!((found, name::subject_to_topic(rest)), (node, Ok(topic)));
    }

    #[test]
    fn every_list_of_levels_makes_the_round_trip_through_a_legal_kv_key(levels in vec(".{0,12}", 1..8)) {
        let key = name::kv_key_encode(levels.iter().map(String::as_str));
        prop_assert!(key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-=.".contains(&byte)));
        prop_assert!(!key.starts_with('.') && !key.ends_with('.') && !key.contains(".."));
        prop_assert_eq!(name::kv_key_decode(&key), Ok(levels));
    }

    #[test]
    fn whatever_text_a_decoder_of_names_accepts_is_its_only_spelling(text in "[a%=.*>/2EF+#ü ]{0,12}") {
        checks::subject(text.as_bytes());
    }
}

// === records and batches ===

fn record() -> impl Strategy<Value = Record> {
    let body = prop_oneof![
        8 => bytes(300),
        2 => (any::<u8>(), 0..40_000usize).prop_map(|(byte, len)| vec![byte; len].into()),
        2 => bytes(6_000),
        1 => (60_000..80_000usize).prop_map(|len| vec![1; len].into()),
    ];
    (1u8..=8, 0u8..3, any::<(u16, u32, u64, u64, u64)>(), body).prop_map(
        |(kind, class, (flags, source, epoch, seq, aux), body)| {
            let flags = Flags(flags);
            Record { header: RecordHeader { kind: Kind(kind), class, flags, source, epoch, seq, aux }, body }
        },
    )
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn records_make_the_round_trip(records in vec(record(), 0..8)) {
        let mut raw = BytesMut::new();
        records.iter().for_each(|record| record.put(&mut raw));
        let mut raw = raw.freeze();
        for record in records {
            prop_assert_eq!(Record::take(&mut raw), Some(record));
        }
        prop_assert!(raw.is_empty());
    }

    #[test]
    fn whatever_is_split_comes_back_in_order(records in vec(record(), 0..12)) {
        let mut encoder = Encoder::new();
        let mut sent = Vec::new();
        for batch in batch::split(&records) {
            let raw_len: usize = batch.iter().map(Record::wire_len).sum();
            prop_assert!(batch.len() == 1 || raw_len <= BATCH_RAW_MAX);
            checks::batch_round_trip(&mut encoder, batch);
            sent.extend_from_slice(batch);
        }
        prop_assert_eq!(sent, records);
    }
}
