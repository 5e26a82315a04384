//! P12: durable appends to a Log, 64 producers that each wait for their acknowledgement, 256 B of payload.
//!
//! Ours is the store alone, as the core uses it: one group per record, io_uring and plain. The peers promise the
//! same, that a record survives the power: redis with `appendfsync always` over 64 connections (the CPU is the
//! server's, network included), and one transaction per record in SQLite (WAL, synchronous=FULL), redb and LMDB,
//! none of which lets 64 producers share a sync. `batch` is what nothing can beat by much: one pwrite of 64 records
//! and one fdatasync, into a preallocated file.
//!
//! Bytes on disk are what the kernel was given to write to block devices for each byte of payload; ours also by
//! cause, as the store counts them. The second after a round, in which ours writes its checkpoint, belongs to it.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::Context;
use broker::{
    event::{Group, Lsn},
    store::{
        Store, StoreEvent,
        journal::JournalIo,
        lmdb::{self, LmdbStore, Options, written::Written},
    },
};
use codec::{Class, Flags, Kind, Record, RecordHeader};
use octobus_benches::{
    measure::{self, Figure, ROUNDS, Sample},
    procfs,
    report::{self, say},
    routing::{self, TOPIC},
    server::{self, Server},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
};

const PRODUCERS: usize = 64;
const PAYLOAD: usize = 256;
/// What a store may put off: its checkpoint, at most a second later.
const AFTERWARDS: Duration = Duration::from_millis(1200);

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let round = std::env::var("P12_ROUND_MS").map_or(Ok(1000), |text| text.parse())?;
    let round = Duration::from_millis(round);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut sides: Vec<Measured> = Vec::new();
    let mut add = |name: &'static str, side: anyhow::Result<Box<dyn Side>>| match side {
        _ if !(wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()))) => {}
        Ok(side) => sides.push(Measured { name, side, samples: Vec::new(), more: Vec::new() }),
        Err(error) => say(format_args!("{name}: left out: {error:#}")),
    };
    add("ours, io_uring", Ours::open(JournalIo::Uring));
    add("ours, plain", Ours::open(JournalIo::Plain));
    add("batch", Batch::open());
    add("redis", Redis::open(runtime));
    add("sqlite", Sqlite::open());
    add("redb", Redb::open());
    add("lmdb", Lmdb::open());
    for n in 0..=ROUNDS {
        for side in &mut sides {
            let (sample, more) = side.round(round).with_context(|| format!("measure {}", side.name))?;
            if n > 0 {
                side.samples.push(sample); // the first is the warm-up
                side.more.push(more);
            }
        }
    }
    let cases: Vec<Value> = sides.iter().map(Measured::report).collect();
    let mut ratios = json!({});
    for ours in sides.iter().filter(|side| side.name.starts_with("ours")) {
        for peer in sides.iter().filter(|side| !side.name.starts_with("ours")) {
            let cpu = measure::ratio(&ours.samples, &peer.samples, Sample::cpu_ns);
            let wall = measure::ratio(&ours.samples, &peer.samples, Sample::wall_ns);
            say(format_args!(
                "{} : {:8} CPU {:.2} [{:.2}-{:.2}]  records/s {:.2}",
                ours.name, peer.name, cpu.median, cpu.min, cpu.max, wall.median
            ));
            ratios[ours.name][peer.name] = json!({ "cpu": cpu.json(), "per_s": wall.json() });
        }
    }
    report::print("P12", &[json!({ "case": "append, 64 producers, 256 B", "sides": cases, "ratio": ratios })])
}

/// Somebody who makes records durable.
trait Side {
    /// Appends for this long. How long each record took until it was acknowledged goes into `latencies`.
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()>;

    /// CPU time so far.
    fn cpu(&self) -> anyhow::Result<Duration> {
        Ok(measure::process_cpu())
    }

    /// The process whose writes count.
    fn pid(&self) -> u32 {
        std::process::id()
    }

    /// Bytes so far by cause.
    fn written(&self) -> Option<[u64; 3]> {
        None
    }
}

/// A side and its rounds.
struct Measured {
    name: &'static str,
    side: Box<dyn Side>,
    samples: Vec<Sample>,
    more: Vec<More>,
}

/// What a round says besides its sample.
struct More {
    p50_us: f64,
    p99_us: f64,
    /// Per byte of payload.
    disk: f64,
    by_cause: Option<[f64; 3]>,
}

impl Measured {
    fn round(&mut self, round: Duration) -> anyhow::Result<(Sample, More)> {
        let mut latencies = Latencies::default();
        let (cpu, bytes, written) =
            (self.side.cpu()?, procfs::written(self.side.pid())?, self.side.written());
        let started = measure::now();
        self.side.run(round, &mut latencies)?;
        let wall = started.elapsed();
        std::thread::sleep(AFTERWARDS);
        let payload = (latencies.0.len() * PAYLOAD) as f64;
        let sample = Sample { ops: latencies.0.len() as u64, wall, cpu: self.side.cpu()? - cpu };
        let by_cause = written
            .zip(self.side.written())
            .map(|(before, now)| std::array::from_fn(|cause| (now[cause] - before[cause]) as f64 / payload));
        let more = More {
            p50_us: latencies.percentile(50),
            p99_us: latencies.percentile(99),
            disk: (procfs::written(self.side.pid())? - bytes) as f64 / payload,
            by_cause,
        };
        Ok((sample, more))
    }

    fn report(&self) -> Value {
        let per_s = Figure::of(self.samples.iter().map(|sample| 1e9 / sample.wall_ns()));
        let cpu = Figure::of(self.samples.iter().map(Sample::cpu_ns));
        let of = |pick: fn(&More) -> f64| Figure::of(self.more.iter().map(pick));
        let (p50, p99, disk) = (of(|more| more.p50_us), of(|more| more.p99_us), of(|more| more.disk));
        say(format_args!(
            "{:16} {:8.0} ns CPU [{:.0}-{:.0}] {:9.0}/s  p50 {:7.0} us  p99 {:7.0} us  {:.2} bytes written per byte",
            self.name, cpu.median, cpu.min, cpu.max, per_s.median, p50.median, p99.median, disk.median
        ));
        let mut row = json!({ "side": self.name, "cpu_ns_per_op": cpu.json(), "per_s": per_s.json(),
            "p50_us": p50.json(), "p99_us": p99.json(), "disk_bytes_per_payload_byte": disk.json() });
        for (cause, name) in ["journal", "checkpoint", "compaction"].into_iter().enumerate() {
            let rounds: Vec<f64> =
                self.more.iter().filter_map(|more| more.by_cause.map(|bytes| bytes[cause])).collect();
            if !rounds.is_empty() {
                let figure = Figure::of(rounds);
                say(format_args!("{:16} {name} {:.3} bytes per byte", "", figure.median));
                row["bytes_by_cause"][name] = figure.json();
            }
        }
        row
    }
}

/// How long each record took.
#[derive(Default)]
struct Latencies(Vec<Duration>);

impl Latencies {
    fn percentile(&mut self, percent: usize) -> f64 {
        self.0.sort_unstable();
        let at = (self.0.len() * percent / 100).min(self.0.len().saturating_sub(1));
        self.0.get(at).map_or(0.0, |latency| latency.as_nanos() as f64 / 1000.0)
    }
}

struct Ours {
    store: LmdbStore,
    written: Arc<Written>,
    lsn: Lsn,
    frame: bytes::Bytes,
    runtime: Runtime,
    _folder: TempDir,
}

impl Ours {
    fn open(io: JournalIo) -> anyhow::Result<Box<dyn Side>> {
        let folder = server::data_folder()?;
        let (store, _) = lmdb::open(folder.path(), Options { io, ..Options::hub() })?;
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let frame = routing::frame_of_size(TOPIC, PAYLOAD);
        Ok(Box::new(Self { written: store.written(), store, lsn: 0, frame, runtime, _folder: folder }))
    }

    fn submit(&mut self) {
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
        let records = vec![Record { header, body: self.frame.clone() }];
        self.store.submit(Group { lsn: self.lsn, lane: Default::default(), records });
    }
}

impl Side for Ours {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        let started = measure::now();
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let mut acked = self.lsn;
        loop {
            if started.elapsed() < round {
                let at = measure::now();
                while waiting.len() < PRODUCERS {
                    self.submit();
                    waiting.push_back(at);
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
            let (runtime, store) = (&self.runtime, &mut self.store);
            match runtime.block_on(std::future::poll_fn(|context| store.poll_event(context))) {
                StoreEvent::Persisted(lsn) => {
                    let now = measure::now();
                    let done = waiting.drain(..usize::try_from(lsn - acked)?);
                    latencies.0.extend(done.map(|at| now - at));
                    acked = lsn;
                }
                other => anyhow::bail!("the store says {other:?}"),
            }
        }
    }

    fn written(&self) -> Option<[u64; 3]> {
        let Written { journal, checkpoint, compaction } = &*self.written;
        Some([journal, checkpoint, compaction].map(|bytes| bytes.load(Relaxed)))
    }
}

/// The floor.
struct Batch {
    file: File,
    offset: u64,
    _folder: TempDir,
}

const BATCH_FILE: u64 = 1 << 30;

impl Batch {
    fn open() -> anyhow::Result<Box<dyn Side>> {
        let folder = server::data_folder()?;
        let file = File::create(folder.path().join("batches"))?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BATCH_FILE)?;
        file.sync_all()?;
        Ok(Box::new(Self { file, offset: 0, _folder: folder }))
    }
}

impl Side for Batch {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        let started = measure::now();
        let records = vec![7; PRODUCERS * PAYLOAD];
        while started.elapsed() < round {
            let at = measure::now();
            self.file.write_all_at(&records, self.offset)?;
            self.file.sync_data()?;
            self.offset = (self.offset + records.len() as u64) % (BATCH_FILE - records.len() as u64);
            latencies.0.extend(std::iter::repeat_n(at.elapsed(), PRODUCERS));
        }
        Ok(())
    }
}

/// One record after the other, for stores in which a transaction is one producer's: the others wait in a queue.
fn one_by_one(
    round: Duration,
    latencies: &mut Latencies,
    mut commit: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let started = measure::now();
    let mut asked: VecDeque<Instant> = std::iter::repeat_n(started, PRODUCERS).collect();
    while started.elapsed() < round {
        commit(&[7; PAYLOAD])?;
        let now = measure::now();
        latencies.0.push(now - asked.pop_front().expect("as many as producers"));
        asked.push_back(now);
    }
    Ok(())
}

struct Redis {
    server: Server,
    connections: Vec<TcpStream>,
    runtime: Runtime,
}

impl Redis {
    fn open(runtime: Runtime) -> anyhow::Result<Box<dyn Side>> {
        let server = Server::redis()?;
        let connections = runtime.block_on(async {
            let mut connections = Vec::new();
            for _ in 0..PRODUCERS {
                let stream = TcpStream::connect(server.address).await?;
                stream.set_nodelay(true)?;
                connections.push(stream);
            }
            anyhow::Ok(connections)
        })?;
        Ok(Box::new(Self { server, connections, runtime }))
    }
}

impl Side for Redis {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        let mut append = format!("*3\r\n$5\r\nRPUSH\r\n$3\r\nlog\r\n${PAYLOAD}\r\n").into_bytes();
        append.extend([7; PAYLOAD]);
        append.extend(b"\r\n");
        let append: bytes::Bytes = append.into();
        let connections = std::mem::take(&mut self.connections);
        self.connections = self.runtime.block_on(async {
            let started = measure::now();
            let mut producers = tokio::task::JoinSet::new();
            for mut stream in connections {
                let append = append.clone();
                producers.spawn(async move {
                    let (mut took, mut answer) = (Vec::new(), [0; 64]);
                    while started.elapsed() < round {
                        let at = measure::now();
                        stream.write_all(&append).await?;
                        let read = stream.read(&mut answer).await?;
                        anyhow::ensure!(answer[..read].starts_with(b":"), "redis refuses");
                        took.push(at.elapsed());
                    }
                    anyhow::Ok((stream, took))
                });
            }
            let mut connections = Vec::new();
            while let Some(done) = producers.join_next().await {
                let (stream, took) = done??;
                latencies.0.extend(took);
                connections.push(stream);
            }
            anyhow::Ok(connections)
        })?;
        Ok(())
    }

    fn cpu(&self) -> anyhow::Result<Duration> {
        self.server.cpu()
    }

    fn pid(&self) -> u32 {
        self.server.pid()
    }
}

struct Sqlite {
    connection: rusqlite::Connection,
    _folder: TempDir,
}

impl Sqlite {
    fn open() -> anyhow::Result<Box<dyn Side>> {
        let folder = server::data_folder()?;
        let connection = rusqlite::Connection::open(folder.path().join("log.db"))?;
        connection.execute_batch(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
             CREATE TABLE log (seq INTEGER PRIMARY KEY, body BLOB);",
        )?;
        Ok(Box::new(Self { connection, _folder: folder }))
    }
}

impl Side for Sqlite {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        let mut insert = self.connection.prepare("INSERT INTO log (body) VALUES (?1)")?;
        one_by_one(round, latencies, |body| Ok(insert.execute([body]).map(drop)?))
    }
}

const TABLE: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("log");

struct Redb {
    database: redb::Database,
    seq: u64,
    _folder: TempDir,
}

impl Redb {
    fn open() -> anyhow::Result<Box<dyn Side>> {
        let folder = server::data_folder()?;
        let database = redb::Database::create(folder.path().join("log.redb"))?;
        Ok(Box::new(Self { database, seq: 0, _folder: folder }))
    }
}

impl Side for Redb {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        one_by_one(round, latencies, |body| {
            self.seq += 1;
            let write = self.database.begin_write()?;
            write.open_table(TABLE)?.insert(self.seq, body)?;
            Ok(write.commit()?)
        })
    }
}

struct Lmdb {
    env: heed::Env,
    table: heed::Database<'static, heed::types::Bytes, heed::types::Bytes>,
    seq: u64,
    _folder: TempDir,
}

impl Lmdb {
    fn open() -> anyhow::Result<Box<dyn Side>> {
        let folder = server::data_folder()?;
        let env = open_lmdb(folder.path())?;
        let txn = env.write_txn()?;
        let made = env.create_databases_and_commit(txn, |databases, txn| {
            let table = databases.create_database::<heed::types::Bytes, heed::types::Bytes>(txn, None)?;
            Ok::<_, heed::Error>(heed::CommitOrAbort::<_, ()>::Commit([table]))
        })?;
        let [table] = made.unwrap_commit();
        Ok(Box::new(Self { env, table, seq: 0, _folder: folder }))
    }
}

#[allow(unsafe_code)] // LMDB maps a file into memory
fn open_lmdb(path: &Path) -> anyhow::Result<heed::Env> {
    // SAFETY: nobody else opens a file in this new folder.
    Ok(unsafe { heed::EnvOpenOptions::new().map_size(4 << 30).open(path) }?)
}

impl Side for Lmdb {
    fn run(&mut self, round: Duration, latencies: &mut Latencies) -> anyhow::Result<()> {
        one_by_one(round, latencies, |body| {
            self.seq += 1;
            let mut txn = self.env.write_txn()?;
            self.table.put(&mut txn, &self.seq.to_be_bytes(), body)?;
            Ok(txn.commit()?)
        })
    }
}
