//! What must hold for any input of each decoder. Every check panics if it does not.
//!
//! The fuzz targets call these with what libFuzzer thinks of; `../tests/fuzz_smoke.rs` includes this file and
//! calls them with seeded mutations of valid inputs, so that every test run has a little of both.

use bytes::{Bytes, BytesMut};
use codec::batch::{self, BATCH_RAW_MAX, Encoder, Prefix, RECORD_BYTES_MAX};
use codec::proto::Frame;
use codec::{Filter, FrameParts, FrameView, Record, RecordHeader, Trace, name, topic};
use prost::Message;

/// prost and `FrameView` accept the same bytes and see the same values, and what is written from those values
/// is read as them.
pub fn frame(data: &[u8]) {
    match (Frame::decode(data), FrameView::parse(data)) {
        (Ok(decoded), Ok(view)) => {
            frames_agree(&decoded, &view);
            rewritten_frame_agrees(&decoded, &view);
        }
        (Err(_), Err(_)) => {}
        (decoded, view) => panic!("prost: {decoded:?}, FrameView: {view:?}"),
    }
}

/// The values that the two readers saw.
pub fn frames_agree(decoded: &Frame, view: &FrameView<'_>) {
    assert_eq!(view.topic(), decoded.topic);
    assert_eq!(view.time_us(), decoded.time_us);
    assert_eq!(view.time_trusted(), decoded.time_trusted);
    assert_eq!(view.ttl_s(), decoded.ttl_s);
    assert_eq!(view.payload(), &decoded.payload[..]);
    match view.trace() {
        Some(trace) => {
            assert_eq!([&trace.trace_id[..], &trace.parent_id, &[trace.flags]].concat(), &decoded.trace[..])
        }
        None => assert_ne!(decoded.trace.len(), Trace::LEN),
    }
    assert!(
        view.headers().eq(decoded.headers.iter().map(|header| (&header.name[..], &header.value[..]))),
        "{:?} {:?}",
        view.headers().collect::<Vec<_>>(),
        decoded.headers
    );
}

fn rewritten_frame_agrees(decoded: &Frame, view: &FrameView<'_>) {
    let headers: Vec<_> = view.headers().collect();
    let parts = FrameParts {
        topic: view.topic(),
        time_us: view.time_us(),
        time_trusted: view.time_trusted(),
        trace: view.trace(),
        ttl_s: view.ttl_s(),
        headers: &headers,
        payload: view.payload(),
    };
    let raw = parts.encode();
    assert_eq!(raw.len(), parts.encoded_len());
    let again = Frame::decode(raw.clone()).expect("prost reads what we write");
    let trace = if view.trace().is_some() { decoded.trace.clone() } else { Bytes::new() };
    assert_eq!(again, Frame { trace, ..decoded.clone() });
    frames_agree(&again, &FrameView::parse(&raw).expect("we read what we write"));
}

/// Records are taken off the front until none is whole, and written as they were read.
pub fn record(data: &[u8]) {
    let mut raw = Bytes::copy_from_slice(data);
    loop {
        let before = raw.len();
        let Some(record) = Record::take(&mut raw) else {
            assert_eq!(raw.len(), before);
            return;
        };
        assert_eq!(before - raw.len(), record.wire_len());
        let mut written = BytesMut::new();
        record.put(&mut written);
        assert_eq!(Record::take(&mut written.freeze()), Some(record));
    }
}

/// A prefix that is accepted bounds what is read, and what is decoded can be sent on. The input is tried as it
/// is and with its checksum corrected, or else nothing behind the checksum would ever be reached.
pub fn batch(data: &[u8]) {
    let Some((prefix, rest)) = data.split_first_chunk::<{ Prefix::LEN }>() else { return };
    let Ok(decoded) = Prefix::decode(prefix) else { return };
    assert!(decoded.wire_len() <= decoded.raw_len() && decoded.raw_len() <= RECORD_BYTES_MAX);
    assert!(decoded.count() == 1 || decoded.raw_len() <= BATCH_RAW_MAX);
    assert!(decoded.count() * RecordHeader::LEN <= decoded.raw_len());
    let wire = &rest[..rest.len().min(decoded.wire_len())];
    read_batch(prefix, wire);
    read_batch(&with_checksum(*prefix, wire), wire);
}

/// The prefix with the checksum that belongs to it and these wire bytes.
pub fn with_checksum(mut prefix: [u8; Prefix::LEN], wire: &[u8]) -> [u8; Prefix::LEN] {
    prefix[16..20].fill(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&prefix), wire);
    prefix[16..20].copy_from_slice(&crc.to_le_bytes());
    prefix
}

fn read_batch(prefix: &[u8; Prefix::LEN], wire: &[u8]) {
    let prefix = Prefix::decode(prefix).expect("the checksum is not looked at here");
    let Ok(records) = batch::decode(&prefix, Bytes::copy_from_slice(wire)) else { return };
    assert!(records.len() <= prefix.count());
    if !records.is_empty() {
        batch_round_trip(&mut Encoder::new(), &records);
    }
}

/// What is encoded as one batch is decoded as it was.
pub fn batch_round_trip(encoder: &mut Encoder, records: &[Record]) {
    let encoded = encoder.encode(records).expect("these records are one batch");
    let whole = Bytes::from(encoded.buffers().concat());
    assert_eq!(whole.len(), encoded.wire_len());
    let prefix = Prefix::decode(whole.first_chunk().expect("it has a prefix")).expect("it is ours");
    let again = batch::decode(&prefix, whole.slice(Prefix::LEN..));
    assert_eq!(again.as_deref(), Ok(records));
}

/// What a decoder of names accepts is what its encoder writes.
pub fn subject(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(topic) = name::subject_to_topic(text) {
        topic::validate_topic(&topic).expect("only valid topics come out");
        assert_eq!(subject_of(&topic), text);
    }
    if let Ok(filter) = name::subject_to_filter(text) {
        let (subject, below) = name::filter_to_subjects(&filter);
        assert_eq!(below, None, "a subject is never two");
        // At the limits of filters `>` can only mean `*`.
        assert!(subject == text || filter.levels().count() == topic::TOPIC_LEVELS_MAX, "{subject} {text}");
    }
    if let Ok(name) = name::unescape_token(text) {
        let mut token = String::new();
        name::escape_token(&name, &mut token);
        assert_eq!(token, text);
    }
    if let Ok((node, rest)) = name::split_node(text) {
        let mut token = String::new();
        name::escape_token(&node, &mut token);
        assert_eq!(format!("{token}.{rest}"), text);
    }
    if let Ok(levels) = name::kv_key_decode(text) {
        assert_eq!(name::kv_key_encode(levels.iter().map(String::as_str)), text);
    }
    if let Some(trace) = Trace::from_traceparent(text) {
        assert_eq!(trace.to_traceparent(), text);
    }
}

fn subject_of(topic: &str) -> String {
    let mut subject = String::new();
    name::topic_to_subject(topic, &mut subject);
    subject
}

/// The input is up to three lines: a topic and two filters. Filters keep their promises about the topic, and
/// topic and filters make the way through subjects unchanged.
pub fn topic(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut lines = text.splitn(3, '\n');
    let topic = lines.next().filter(|topic| topic::validate_topic(topic).is_ok());
    let mut filters = lines.filter_map(|line| Filter::parse(line).ok());
    let (left, right) = (filters.next(), filters.next());
    if let Some(topic) = topic {
        assert_eq!(name::subject_to_topic(&subject_of(topic)).as_deref(), Ok(topic));
        let exact = Filter::exact(topic).expect("the topic is valid");
        assert!(exact.matches(topic, false) && exact.covers(&exact) && exact.is_exact());
    }
    for filter in left.iter().chain(&right) {
        assert_eq!(Filter::from_levels(filter.levels()).as_ref(), Ok(filter));
        assert!(filter.covers(filter) && filter.intersects(filter));
    }
    if let (Some(topic), Some(left), Some(right)) = (topic, left, right) {
        for dollar in [false, true] {
            let (by_left, by_right) = (left.matches(topic, dollar), right.matches(topic, dollar));
            assert!(!left.covers(&right) || !by_right || by_left, "{left} covers {right}, not {topic}");
            assert!(!by_left || !by_right || left.intersects(&right), "{left} and {right} meet in {topic}");
        }
    }
}
