//! A short, seeded run of the fuzz targets' checks in every test run: no nightly, no cargo-fuzz.
//!
//! Each decoder is fed mutations of valid inputs, and random bytes. The same inputs every time: a failure
//! prints its input, which belongs into a unit test of the decoder then.

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz targets, for which this is a library")]
mod checks;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use bytes::{Bytes, BytesMut};
use codec::batch::Encoder;
use codec::proto::{Frame, Header};
use codec::{Flags, FrameParts, Kind, Record, RecordHeader, Trace, name};
use prost::Message;

const MUTATIONS: usize = 20_000;
const RANDOM: usize = 5_000;

/// SplitMix64: small, and the same everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// Bytes that decoders treat specially, more likely than the rest.
const NOTABLE: &[u8] =
    &[0, 1, 2, 0x0a, 0x2a, 0x32, 0x7f, 0x80, 0xff, b'%', b'=', b'.', b'/', b'*', b'>', b'+', b'#'];

fn mutate(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[rng.below(seeds.len())].clone();
    for _ in 0..=rng.below(4) {
        let at = rng.below(data.len());
        match rng.below(7) {
            0 if !data.is_empty() => data[at] ^= 1 << rng.below(8),
            1 if !data.is_empty() => data[at] = NOTABLE[rng.below(NOTABLE.len())],
            2 if !data.is_empty() => drop(data.remove(at)),
            3 => data.insert(at, NOTABLE[rng.below(NOTABLE.len())]),
            4 => data.truncate(at),
            5 => {
                let noise_len = rng.below(8);
                let noise = rng.bytes(noise_len);
                data.splice(at..at, noise);
            }
            _ => {
                let other = &seeds[rng.below(seeds.len())];
                let from = rng.below(other.len());
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
        }
    }
    data
}

fn run(seed: u64, seeds: &[Vec<u8>], check: fn(&[u8])) {
    let mut rng = Rng(seed);
    let run_one = |data: &[u8]| {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(data))) {
            eprintln!("input: {data:02x?} {:?}", String::from_utf8_lossy(data));
            resume_unwind(panic);
        }
    };
    seeds.iter().for_each(|data| run_one(data));
    for _ in 0..MUTATIONS {
        run_one(&mutate(&mut rng, seeds));
    }
    for _ in 0..RANDOM {
        let len = rng.below(128);
        run_one(&rng.bytes(len));
    }
}

fn frames() -> Vec<Vec<u8>> {
    let trace = Trace::from_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let parts = FrameParts {
        topic: "sensors/boiler/temp",
        time_us: 1_700_000_000_000_000,
        time_trusted: true,
        trace,
        ttl_s: 86_400,
        headers: &[("content-type", b"text/plain"), ("x", b"")],
        payload: b"71.5",
    };
    let by_prost = Frame {
        topic: "ü/a".into(),
        headers: vec![Header { name: "n".into(), value: Bytes::from_static(b"v") }],
        ttl_s: 1,
        payload: vec![7; 200].into(),
        ..Frame::default()
    };
    vec![
        parts.encode().to_vec(),
        by_prost.encode_to_vec(),
        // Headers apart, a group between them, a bool and a ttl beyond their width, a topic replaced.
        b"\x2a\x03\x0a\x01a\x43\x08\x01\x4b\x4c\x44\x2a\x03\x12\x01b\x18\x80\x02\x38\xff\xff\xff\xff\x1f\x0a\x01x\x0a\x01y".to_vec(),
        [vec![0x43; 100], vec![0x44; 100]].concat(),
        [vec![0x43; 101], vec![0x44; 101]].concat(),
        [&[0x2a, 0xc6, 0x01][..], &[0x43; 99], &[0x44; 99]].concat(),
        [&[0x2a, 0xc8, 0x01][..], &[0x43; 100], &[0x44; 100]].concat(),
    ]
}

fn records() -> Vec<Record> {
    let record = |kind, body: Bytes| {
        let flags = Flags::TIME_TRUSTED;
        let header = RecordHeader { kind, class: 3, flags, source: 1, epoch: 2, seq: 3, aux: 0 };
        Record { header, body }
    };
    let mut records: Vec<_> = frames().into_iter().map(|frame| record(Kind::LOG, frame.into())).collect();
    records.push(record(Kind::GAP, Bytes::new()));
    records.push(record(Kind(12), Bytes::from_static(b"from a newer peer")));
    records
}

fn batches() -> Vec<Vec<u8>> {
    let records: Vec<_> = records().into_iter().filter(|record| record.header.kind.is_known()).collect();
    let large = Record { body: vec![9; 70_000].into(), ..records[0].clone() };
    [&records[..], &records[..1], std::slice::from_ref(&large)]
        .into_iter()
        .map(|records| Encoder::new().encode(records).expect("a batch").buffers().concat())
        .collect()
}

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn no_bytes_make_the_two_frame_readers_disagree() {
    run(1, &frames(), checks::frame);
}

#[test]
fn no_bytes_break_the_record_reader() {
    let mut raw = BytesMut::new();
    records().iter().for_each(|record| record.put(&mut raw));
    run(2, &[raw.to_vec(), records()[0].header.encode(u32::MAX).to_vec()], checks::record);
}

#[test]
fn no_bytes_break_the_batch_reader() {
    run(3, &batches(), checks::batch);
}

#[test]
fn no_name_has_two_spellings() {
    let mut deep = String::new();
    name::node_subject(name::UP_PREFIX, "plant.1", &["l"; 32].join("/"), &mut deep);
    let seeds = texts(&[
        "a.b.c",
        "a.%.b%2E%25.%",
        "*.b.>",
        "a=2E.=.=C3=BC",
        "plant%2E1.a.b",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        &deep,
        &[&["l"; 31].join("."), ".>"].concat(),
    ]);
    run(4, &seeds, checks::subject);
}

#[test]
fn no_text_makes_a_filter_break_its_promises() {
    let seeds = texts(&[
        "a/b/c\na/+/c\n+/b/#",
        "$SYS/x\n#\n$SYS/#",
        "_INBOX/1\n+/1\n_INBOX/#",
        "a\na/#\n+/#",
        "/\n/+\n+/",
        "50 %/v1.2\n*/>\nü/#",
    ]);
    run(5, &seeds, checks::topic);
}
