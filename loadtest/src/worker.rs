//! A process of the fleet: does what lines on standard input say.

use std::{
    io::{BufRead as _, Write as _},
    sync::Arc,
    time::Duration,
};

use broker::clock;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::{
    crew::Crew,
    node, process,
    publish::Devices,
    wire::{News, Numbers, Order, Plan, Times},
};

/// How often the director hears where the nodes stand.
const TICK: Duration = Duration::from_millis(100);
/// Orders that wait.
const ORDERS_WAITING: usize = 16;
/// How long links have to end in an orderly way.
const FAREWELL: Duration = Duration::from_secs(10);

/// Runs until told to stop, or until standard input ends: a worker does not outlive its director.
pub async fn run() {
    let mut orders = orders();
    let plan = match orders.recv().await {
        Some(Order::Plan(plan)) => *plan,
        Some(_) | None => return say(&News::Failed { error: "the first order is no plan".to_owned() }),
    };
    if let Err(error) = work(plan, orders).await {
        say(&News::Failed { error });
    }
}

async fn work(plan: Plan, mut orders: mpsc::Receiver<Order>) -> Result<(), String> {
    let crew = Crew::new(plan).map_err(|error| error.to_string())?;
    let mut nodes = JoinSet::new();
    let rss = process::rss(std::process::id()).unwrap_or(0);
    say(&News::Ready { rss });
    let mut ticks = clock::every(TICK);
    let mut devices = Devices::new(crew.plan.nodes);
    let (mut publishing, mut churn) = (None, 0.0);
    let (answer, mut answers) = mpsc::channel(ORDERS_WAITING);
    loop {
        let order = tokio::select! {
            biased;
            order = orders.recv() => order,
            _ = ticks.tick() => {
                say(&News::Tick(crew.tally.counts()));
                continue;
            }
            Some(mark) = answers.recv() => {
                devices.answer(&crew, mark).await.map_err(|stopped| stopped.to_string())?;
                continue;
            }
            stopped = publish(&mut devices, &crew, publishing) => return Err(stopped),
            () = let_go(&crew, churn) => continue,
        };
        match order {
            Some(Order::Publish { per_s, size }) => publishing = (per_s > 0.0).then_some((per_s, size)),
            Some(Order::Churn { per_s }) => churn = per_s,
            Some(Order::Answer) => crew.tally.answer(answer.clone()),
            Some(Order::Ramp) => {
                for place in 0..crew.plan.nodes {
                    nodes.spawn(node::run(Arc::clone(&crew), place));
                }
            }
            Some(Order::Forget) => crew.tally.forget(),
            Some(Order::Tell) => say(&News::Numbers(Box::new(numbers(&crew, &devices)))),
            Some(Order::Stop) | None => break,
            Some(Order::Plan(_)) => return Err("one plan is enough".to_owned()),
        }
    }
    crew.stop.cancel();
    drop(timeout(FAREWELL, async { while nodes.join_next().await.is_some() {} }).await);
    crew.tasks.drain(FAREWELL).await;
    Ok(())
}

/// Never returns but when the nodes are gone.
async fn publish(devices: &mut Devices, crew: &Crew, publishing: Option<(f64, u32)>) -> String {
    let Some((per_s, size)) = publishing else { return std::future::pending().await };
    match devices.publish(crew, per_s, size).await {
        Ok(()) => "publishing has ended".to_owned(),
        Err(stopped) => stopped.to_string(),
    }
}

/// Lets one node go, some time from now: so many in a second on average, at times that have no memory.
async fn let_go(crew: &Crew, per_s: f64) {
    if per_s <= 0.0 {
        return std::future::pending().await;
    }
    let random = || getrandom::u64().unwrap_or(1) as f64 / u64::MAX as f64;
    tokio::time::sleep(Duration::from_secs_f64(-random().max(1e-9).ln() / per_s)).await;
    let any = (random() * crew.leashes.len() as f64) as usize;
    crew.leashes[any.min(crew.leashes.len() - 1)].pull();
}

fn numbers(crew: &Crew, devices: &Devices) -> Numbers {
    let own = std::process::id();
    let cpu = process::cpu_time(own).unwrap_or_default();
    let times = |times: &std::sync::Mutex<_>| Times::of(&times.lock().expect("no panic under this lock"));
    Numbers {
        counts: crew.tally.counts(),
        rss: process::rss(own).unwrap_or(0),
        cpu_us: u64::try_from(cpu.as_micros()).unwrap_or(u64::MAX),
        welcome: times(&crew.tally.welcome),
        heartbeat: times(&crew.tally.heartbeat),
        change: times(&crew.tally.change),
        published: devices.published(),
        held: crew.tally.held(crew.plan.nodes),
        last_down_us: crew.tally.last_down_us(),
        ends: crew.tally.ends(),
    }
}

/// A director that does not listen any more has ended, and standard input says so too.
fn say(news: &News) {
    let mut line = serde_json::to_vec(news).expect("news have string keys");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    drop(out.write_all(&line).and_then(|()| out.flush()));
}

/// Standard input is read by a thread of its own, which ends with it or with the process.
fn orders() -> mpsc::Receiver<Order> {
    let (sender, receiver) = mpsc::channel(ORDERS_WAITING);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let order = line.ok().and_then(|line| serde_json::from_str(&line).ok());
            let Some(order) = order else { return };
            if sender.blocking_send(order).is_err() {
                return;
            }
        }
    });
    receiver
}
