//! The codec: frames, filters, batches.

use std::hint::black_box;

use bytes::Bytes;
use codec::{Class, Filter, Flags, FrameParts, FrameView, Kind, Record, RecordHeader, proto};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use octobus_benches::routing::{self, TOPIC};
use prost::Message as _;

fn frames(criterion: &mut Criterion) {
    let frame = routing::frame_of_size(TOPIC, 256);
    let payload = [b'x'; 200];
    let parts = FrameParts { topic: TOPIC, time_us: 1, payload: &payload, ..FrameParts::default() };
    let mut group = criterion.benchmark_group("frame");
    group.bench_function("view", |bencher| bencher.iter(|| FrameView::parse(black_box(&frame))));
    group.bench_function("prost", |bencher| bencher.iter(|| proto::Frame::decode(black_box(frame.clone()))));
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(&parts).encode()));
    group.finish();
}

fn filters(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("filter");
    for text in [TOPIC, "plant/+/boiler/#", "site/#"] {
        let filter = Filter::parse(text).expect("a valid filter");
        group.bench_function(text, |bencher| bencher.iter(|| filter.matches(black_box(TOPIC), false)));
    }
    group.finish();
}

fn records(criterion: &mut Criterion) {
    let body: Bytes = routing::frame_of_size(TOPIC, 256);
    let header = RecordHeader {
        kind: Kind::LOG,
        class: Class::Event as u8,
        flags: Flags::QOS1,
        source: 7,
        epoch: 1,
        seq: 1,
        aux: 0,
    };
    let record = Record { header, body };
    let mut group = criterion.benchmark_group("record");
    group.throughput(Throughput::Bytes(record.wire_len() as u64 * 64));
    group.bench_function("64 put and taken", |bencher| {
        bencher.iter(|| {
            let mut wire = bytes::BytesMut::with_capacity(record.wire_len() * 64);
            for _ in 0..64 {
                black_box(&record).put(&mut wire);
            }
            let mut wire = wire.freeze();
            while let Some(taken) = Record::take(&mut wire) {
                black_box(taken);
            }
        });
    });
    group.finish();
}

criterion_group!(benches, frames, filters, records);
criterion_main!(benches);
