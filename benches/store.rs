//! The stores: groups from submitted to durable. One group is what one turn of a busy broker writes.

use std::{
    future::poll_fn,
    task::{Context, Waker},
};

use broker::{
    event::{Group, Lsn},
    store::{
        Store, StoreEvent,
        lmdb::{self, Options},
        mem::MemStore,
    },
};
use codec::{Class, Flags, Kind, Record, RecordHeader};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use octobus_benches::{
    routing::{self, TOPIC},
    server,
};

/// Groups on their way at a time, as from 64 producers that wait for their acknowledgement.
const PRODUCERS: u64 = 64;

/// Appends to one Log under one source, seq by seq.
struct Appender {
    lsn: Lsn,
    frame: bytes::Bytes,
}

impl Appender {
    fn new() -> Self {
        Self { lsn: 0, frame: routing::frame_of_size(TOPIC, 256) }
    }

    fn group(&mut self) -> Group {
        self.lsn += 1;
        let header = RecordHeader {
            kind: Kind::LOG,
            class: Class::Event as u8,
            flags: Flags::QOS1,
            source: 1,
            epoch: 1,
            seq: self.lsn,
            aux: 0,
        };
        Group {
            lsn: self.lsn,
            lane: Default::default(),
            records: vec![Record { header, body: self.frame.clone() }],
        }
    }
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append, 64 producers, 256 B");
    group.throughput(Throughput::Elements(PRODUCERS));
    let mut mem = MemStore::auto();
    let mut appender = Appender::new();
    group.bench_function("mem", |bencher| {
        bencher.iter(|| {
            for _ in 0..PRODUCERS {
                mem.submit(appender.group());
            }
            let mut context = Context::from_waker(Waker::noop());
            while mem.poll_event(&mut context).is_ready() {}
            if appender.lsn.is_multiple_of(65_536) {
                mem = MemStore::auto(); // it keeps everything
                appender.lsn = 0;
            }
        });
    });
    let folder = server::data_folder().expect("a folder beside the binary");
    let (mut store, _recovered) = lmdb::open(folder.path(), Options::hub()).expect("a new store");
    let mut appender = Appender::new();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    group.bench_function("journal", |bencher| {
        bencher.iter(|| {
            for _ in 0..PRODUCERS {
                store.submit(appender.group());
            }
            runtime.block_on(async {
                loop {
                    match poll_fn(|context| store.poll_event(context)).await {
                        StoreEvent::Persisted(lsn) if lsn == appender.lsn => return,
                        StoreEvent::Refused { reason, .. } => panic!("the store refuses: {reason}"),
                        _ => {}
                    }
                }
            });
        });
    });
    group.finish();
}

criterion_group!(benches, append);
criterion_main!(benches);
