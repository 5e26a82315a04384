//! P10: Live within a process, 1 to 1 and 1 to 16, 64 B to 1 MiB, in bursts of 64 and of 1.
//!
//! Ours is the real thing: a core over `MemStore::auto`, its driver, a session that publishes through the handle
//! and sessions that receive from their outboxes, all on one current_thread runtime, as on a node. A burst is
//! sent, then everybody's receipt is awaited, so a burst of 1 measures the round trip.
//!
//! Peers carry the same `Bytes` and match no topics:
//! - `tokio broadcast`: `tokio::sync::broadcast`, tasks on one current_thread runtime;
//! - `crossbeam threads`: one bounded `crossbeam_channel` and one thread per receiver, which blocks;
//! - `crossbeam queue`: the same channels drained by the sending thread itself. Nobody waits for anybody: the
//!   lowest price of a queue, and no bus.
//!
//! An operation is one delivery. Frames are encoded (ours) or made (peers) before the clock starts: what is
//! measured is the hop. Payload copies are counted by comparing addresses, allocations by the allocator.

use std::{
    cell::Cell,
    collections::VecDeque,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::Context;
use broker::{
    Handle, Outbox, Tasks,
    core::Config,
    driver,
    event::{Event, Output, Reply, SessionId},
    limits,
    store::mem::MemStore,
};
use bytes::Bytes;
use crossbeam_channel as crossbeam;
use octobus_benches::{
    alloc,
    measure::{self, Figure, Sample, Side},
    report::{self, say},
    routing,
};
use serde_json::{Value, json};
use tokio::{
    runtime::Runtime,
    sync::{broadcast, mpsc},
};

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

const ROUND: Duration = Duration::from_millis(100);
const TOPIC: &str = "line/7/temp";
const SIZES: [usize; 5] = [64, 256, 4 << 10, 64 << 10, 1 << 20];
/// What a burst may weigh, so that no queue overflows on either side.
const BURST_BYTES_MAX: usize = 768 << 10;

#[derive(Debug, Clone, Copy)]
struct Case {
    fanout: usize,
    size: usize,
    burst: usize,
}

fn main() -> anyhow::Result<()> {
    let mut cases = Vec::new();
    for fanout in [1, 16] {
        for burst in [64, 1] {
            for size in SIZES {
                let burst = burst.min(BURST_BYTES_MAX / size).max(1);
                if burst == 1 && cases.iter().any(|case| is_done(case, fanout, size)) {
                    continue; // already measured: larger bursts do not fit
                }
                cases.push(compare(Case { fanout, size, burst })?);
            }
        }
    }
    report::print("P10", &cases)
}

fn is_done(case: &Value, fanout: usize, size: usize) -> bool {
    case["fanout"] == fanout && case["size"] == size && case["burst"] == 1
}

fn compare(case: Case) -> anyhow::Result<Value> {
    let ours = Ours::new(case)?;
    let broadcast = Broadcast::new(case)?;
    let threads = Threads::new(case);
    let queue = Queue::new(case);
    let mut sides = [
        Side::new("ours", || measure::run_for(ROUND, || ours.chunk())),
        Side::new("tokio broadcast", || measure::run_for(ROUND, || broadcast.chunk())),
        Side::new("crossbeam threads", || measure::run_for(ROUND, || threads.chunk())),
        Side::new("crossbeam queue", || measure::run_for(ROUND, || queue.chunk())),
    ];
    let names: Vec<&str> = sides.iter().map(|side| side.name).collect();
    let samples = measure::interleave(&mut sides);
    drop(sides);

    let mut row = json!({
        "case": format!("1 to {}, {} B, bursts of {}", case.fanout, case.size, case.burst),
        "fanout": case.fanout, "size": case.size, "burst": case.burst,
    });
    let figures: Vec<Figure> =
        samples.iter().map(|rounds| Figure::of(rounds.iter().map(Sample::cpu_ns))).collect();
    row["ours"] = figures[0].json();
    row["cpu_ns_per_op"] = json!(measure::round(figures[0].median));
    row["wall_ns_per_op"] = Figure::of(samples[0].iter().map(Sample::wall_ns)).json();
    for n in 1..names.len() {
        row["peer"][names[n]] = figures[n].json();
        row["ratio"][names[n]] = measure::ratio(&samples[0], &samples[n], Sample::cpu_ns).json();
        row["wall_ratio"][names[n]] = measure::ratio(&samples[0], &samples[n], Sample::wall_ns).json();
    }
    let hops = [
        count(|| ours.chunk()),
        count(|| broadcast.chunk()),
        count(|| threads.chunk()),
        count(|| queue.chunk()),
    ];
    for (name, (allocations, bytes)) in names.iter().zip(hops) {
        row["allocations_per_op"][name] = json!(allocations);
        row["allocated_bytes_per_op"][name] = json!(bytes);
    }
    row["payload_copies"] = json!(ours.copied.load(Ordering::Relaxed));
    row["dropped"] = json!(ours.lost.get());
    let medians: Vec<String> = figures.iter().map(|figure| format!("{:9.1}", figure.median)).collect();
    say(format_args!(
        "1:{:<2} {:>7} B x{:<2} cpu ns/op {}  allocs/op {:.2} copies {}",
        case.fanout,
        case.size,
        case.burst,
        medians.join(" "),
        hops[0].0,
        row["payload_copies"]
    ));
    Ok(row)
}

/// Allocations and allocated bytes of one operation.
fn count(mut chunk: impl FnMut() -> u64) -> (f64, f64) {
    let mut ops = 0;
    let (allocations, bytes) = alloc::count(|| ops = chunk());
    (measure::round(allocations as f64 / ops as f64), measure::round(bytes as f64 / ops as f64))
}

impl Case {
    /// Bursts between two looks at the clock.
    fn bursts(self) -> usize {
        (4096 / (self.burst * self.fanout)).clamp(1, 256)
    }

    fn ops(self) -> u64 {
        (self.bursts() * self.burst * self.fanout) as u64
    }
}

/// A broker within this process.
struct Ours {
    case: Case,
    runtime: Runtime,
    handle: Handle,
    publisher: SessionId,
    frame: Bytes,
    done: std::cell::RefCell<mpsc::Receiver<()>>,
    /// Deliveries whose bytes are not those that were published.
    copied: Arc<AtomicU64>,
    /// Bursts of which not everything came.
    lost: Cell<u64>,
    _publisher_outbox: Outbox,
    _tasks: Tasks,
}

impl Ours {
    fn new(case: Case) -> anyhow::Result<Self> {
        let runtime = current_thread()?;
        let frame = routing::frame(TOPIC, &vec![b'x'; case.size]);
        let (done_tx, done) = mpsc::channel(case.fanout);
        let copied = Arc::new(AtomicU64::new(0));
        let tasks = Tasks::new();
        let (handle, publisher, outbox) = runtime.block_on(async {
            let store = MemStore::auto();
            let recovered = store.recover();
            let handle = driver::start(Config::node("bench", [1; 16], 1), store, recovered, &tasks);
            let (publisher, mut outbox) = handle.open_session();
            open(&handle, publisher, &mut outbox).await?;
            for _ in 0..case.fanout {
                let (session, mut outbox) = handle.open_session();
                open(&handle, session, &mut outbox).await?;
                handle.send(routing::subscribed(session, 1, "line/+/temp"), 0).await?;
                wait_for(&mut outbox, |reply| matches!(reply, Reply::Subscribed { .. })).await;
                let subscriber = Subscriber {
                    outbox,
                    handle: handle.clone(),
                    burst: case.burst,
                    address: routing::address(&frame),
                    copied: Arc::clone(&copied),
                    done: done_tx.clone(),
                };
                tasks.spawn("subscriber", subscriber.run());
            }
            anyhow::Ok((handle, publisher, outbox))
        })?;
        Ok(Self {
            case,
            runtime,
            handle,
            publisher,
            frame,
            done: done.into(),
            copied,
            lost: Cell::new(0),
            _publisher_outbox: outbox,
            _tasks: tasks,
        })
    }

    fn chunk(&self) -> u64 {
        let done = &mut *self.done.borrow_mut();
        self.runtime.block_on(async {
            for _ in 0..self.case.bursts() {
                let messages = (0..self.case.burst).map(|_| routing::publish(&self.frame, 0)).collect();
                let event = Event::Published { session: self.publisher, messages };
                self.handle.send(event, self.case.burst * self.frame.len()).await.expect("the broker runs");
                for _ in 0..self.case.fanout {
                    let received = tokio::time::timeout(Duration::from_secs(5), done.recv()).await;
                    if received.is_err() {
                        self.lost.set(self.lost.get() + 1);
                    }
                }
            }
        });
        self.case.ops()
    }
}

async fn open(handle: &Handle, session: SessionId, outbox: &mut Outbox) -> anyhow::Result<()> {
    handle.send(routing::opened(session), 0).await?;
    wait_for(outbox, |reply| matches!(reply, Reply::Opened { .. })).await;
    Ok(())
}

async fn wait_for(outbox: &mut Outbox, wanted: impl Fn(&Reply) -> bool) {
    let mut outputs = VecDeque::new();
    loop {
        outbox.recv(&mut outputs).await;
        if outputs.drain(..).any(|output| matches!(output, Output::Reply(reply) if wanted(&reply))) {
            return;
        }
    }
}

/// A session that takes what comes, and reports it as sent at every 16 KiB as the writers of fronts do.
struct Subscriber {
    outbox: Outbox,
    handle: Handle,
    burst: usize,
    address: usize,
    copied: Arc<AtomicU64>,
    done: mpsc::Sender<()>,
}

impl Subscriber {
    async fn run(mut self) {
        let mut outputs = VecDeque::new();
        let (mut received, mut unreported) = (0, 0);
        loop {
            self.outbox.recv(&mut outputs).await;
            for output in outputs.drain(..) {
                unreported += output.cost();
                if let Output::Deliver(delivery) = output {
                    received += 1;
                    let moved = routing::address(&delivery.frame) != self.address;
                    self.copied.fetch_add(u64::from(moved), Ordering::Relaxed);
                }
            }
            if unreported >= limits::SENT_REPORT_BYTES {
                let event = Event::Sent { session: self.outbox.session(), bytes: unreported };
                if self.handle.send(event, 0).await.is_err() {
                    return;
                }
                unreported = 0;
            }
            while received >= self.burst {
                received -= self.burst;
                if self.done.send(()).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// `tokio::sync::broadcast` and tasks.
struct Broadcast {
    case: Case,
    runtime: Runtime,
    sender: broadcast::Sender<Bytes>,
    payload: Bytes,
    done: std::cell::RefCell<mpsc::Receiver<()>>,
    _tasks: Tasks,
}

impl Broadcast {
    fn new(case: Case) -> anyhow::Result<Self> {
        let runtime = current_thread()?;
        let (sender, _) = broadcast::channel(case.burst.max(2));
        let (done_tx, done) = mpsc::channel(case.fanout);
        let tasks = Tasks::new();
        runtime.block_on(async {
            for _ in 0..case.fanout {
                let (mut receiver, done) = (sender.subscribe(), done_tx.clone());
                tasks.spawn("subscriber", async move {
                    let mut received = 0;
                    while let Ok(payload) = receiver.recv().await {
                        std::hint::black_box(payload);
                        received += 1;
                        if received == case.burst {
                            received = 0;
                            if done.send(()).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
            tokio::task::yield_now().await;
        });
        let payload = vec![b'x'; case.size].into();
        Ok(Self { case, runtime, sender, payload, done: done.into(), _tasks: tasks })
    }

    fn chunk(&self) -> u64 {
        let done = &mut *self.done.borrow_mut();
        self.runtime.block_on(async {
            for _ in 0..self.case.bursts() {
                for _ in 0..self.case.burst {
                    self.sender.send(self.payload.clone()).expect("receivers live");
                }
                for _ in 0..self.case.fanout {
                    done.recv().await;
                }
            }
        });
        self.case.ops()
    }
}

/// `crossbeam_channel` and a thread for each receiver.
struct Threads {
    case: Case,
    senders: Vec<crossbeam::Sender<Bytes>>,
    payload: Bytes,
    done: crossbeam::Receiver<()>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new(case: Case) -> Self {
        let (done_tx, done) = crossbeam::bounded(case.fanout);
        let mut senders = Vec::new();
        let mut threads = Vec::new();
        for _ in 0..case.fanout {
            let (sender, receiver) = crossbeam::bounded(case.burst.max(2));
            let done = done_tx.clone();
            senders.push(sender);
            threads.push(std::thread::spawn(move || {
                let mut received = 0;
                for payload in &receiver {
                    drop::<Bytes>(std::hint::black_box(payload));
                    received += 1;
                    if received == case.burst {
                        received = 0;
                        if done.send(()).is_err() {
                            return;
                        }
                    }
                }
            }));
        }
        Self { case, senders, payload: vec![b'x'; case.size].into(), done, threads }
    }

    fn chunk(&self) -> u64 {
        for _ in 0..self.case.bursts() {
            for _ in 0..self.case.burst {
                for sender in &self.senders {
                    sender.send(self.payload.clone()).expect("receivers live");
                }
            }
            for _ in 0..self.case.fanout {
                self.done.recv().expect("receivers live");
            }
        }
        self.case.ops()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.senders.clear();
        for thread in self.threads.drain(..) {
            thread.join().expect("a receiver does not panic");
        }
    }
}

/// `crossbeam_channel`, sent and received by one thread.
struct Queue {
    case: Case,
    channels: Rc<[(crossbeam::Sender<Bytes>, crossbeam::Receiver<Bytes>)]>,
    payload: Bytes,
}

impl Queue {
    fn new(case: Case) -> Self {
        let channels = (0..case.fanout).map(|_| crossbeam::bounded(case.burst.max(2))).collect();
        Self { case, channels, payload: vec![b'x'; case.size].into() }
    }

    fn chunk(&self) -> u64 {
        for _ in 0..self.case.bursts() {
            for _ in 0..self.case.burst {
                for (sender, _) in &*self.channels {
                    sender.try_send(self.payload.clone()).expect("room for a burst");
                }
            }
            for (_, receiver) in &*self.channels {
                for payload in receiver.try_iter() {
                    drop::<Bytes>(std::hint::black_box(payload));
                }
            }
        }
        self.case.ops()
    }
}

fn current_thread() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")
}
