//! P13: the MQTT front per second of the server's CPU time, and the memory of idle clients.
//!
//! One driver for all servers, on processor 1; servers on processor 0. It publishes 256 B in a closed loop: so
//! many messages may be under way, half of them are sent at a time. A delivery is the operation; the server's CPU
//! time is the scheduler's, and at QoS 1 includes the second after the load, when checkpoints follow.
//!
//! What an acknowledgement promises differs: `ours` sends PUBACK after the message's journal group was fdatasynced.
//! mosquitto (persistence off) and rumqttd acknowledge from memory, and so does `ours, mem`: the same broker over
//! `MemStore`, for equal semantics.

use std::time::Duration;

use anyhow::Context;
use broker::Tasks;
use octobus_benches::{
    measure::{self, Figure, ROUNDS, Sample},
    mqtt::{self, Group},
    report::{self, say},
    server::{self, Server},
};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, task::JoinSet};

const PAYLOAD: usize = 256;
const ROUND: Duration = Duration::from_millis(1000);
/// What a store may put off: its checkpoint, at most a second later.
const AFTERWARDS: Duration = Duration::from_millis(1200);
const IDLE_CLIENTS: u64 = 10_000;
const IDLE: Duration = Duration::from_secs(3);

/// Groups of a publisher and its subscribers, and how much each may have under way.
#[derive(Debug, Clone, Copy)]
struct Case {
    qos: u8,
    groups: usize,
    fanout: usize,
    window: u64,
}

const CASES: [Case; 6] = [
    Case { qos: 0, groups: 16, fanout: 1, window: 64 },
    Case { qos: 0, groups: 1, fanout: 100, window: 32 },
    Case { qos: 0, groups: 1, fanout: 1000, window: 16 },
    Case { qos: 1, groups: 16, fanout: 1, window: 64 },
    Case { qos: 1, groups: 1, fanout: 100, window: 32 },
    Case { qos: 1, groups: 1, fanout: 1000, window: 16 },
];

impl Case {
    fn name(self) -> String {
        format!("QoS {}, {} x 1 to {}, {PAYLOAD} B", self.qos, self.groups, self.fanout)
    }
}

fn main() -> anyhow::Result<()> {
    server::take_processor(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut cases = Vec::new();
    // Some cases only: `p13_mqtt 'QoS 1' idle`.
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str()));
    for case in CASES.into_iter().filter(|case| is_wanted(&case.name())) {
        cases.push(throughput(&runtime, case)?);
    }
    if is_wanted("idle") {
        cases.push(runtime.block_on(idle())?);
    }
    report::print("P13", &cases)
}

fn servers() -> anyhow::Result<Vec<Server>> {
    Ok(vec![Server::front("lmdb")?, Server::front("mem")?, Server::mosquitto()?, Server::rumqttd()?])
}

/// A server and what drives it, in one case.
struct Driven {
    server: Server,
    groups: Vec<Group>,
    tasks: Tasks,
    lost: u64,
    samples: Vec<Sample>,
}

fn throughput(runtime: &Runtime, case: Case) -> anyhow::Result<Value> {
    let mut driven = Vec::new();
    for server in servers()? {
        driven.push(runtime.block_on(connect(server, case))?);
    }
    for round in 0..=ROUNDS {
        for side in &mut driven {
            let sample = runtime
                .block_on(side.round(case))
                .with_context(|| format!("drive {} ({case:?})", side.server.name))?;
            if round > 0 {
                side.samples.push(sample); // the first is the warm-up
            }
        }
    }
    let mut row = json!({ "case": case.name(), "qos": case.qos, "fanout": case.fanout });
    for (n, side) in driven.iter().enumerate() {
        let name = side.server.name;
        let per_cpu_s = Figure::of(side.samples.iter().map(|sample| 1e9 / sample.cpu_ns()));
        let per_s = Figure::of(side.samples.iter().map(|sample| 1e9 / sample.wall_ns()));
        say(format_args!(
            "{:24} {name:10} {:9.0}/cpu-s [{:.0}-{:.0}] {:9.0}/s  lost {}  PSS {} KiB",
            row["case"].as_str().unwrap_or_default(),
            per_cpu_s.median,
            per_cpu_s.min,
            per_cpu_s.max,
            per_s.median,
            side.lost,
            side.server.pss()? >> 10,
        ));
        let figures = json!({ "per_cpu_s": per_cpu_s.json(), "per_s": per_s.json(), "lost": side.lost,
            "cpu_ns_per_op": measure::round(1e9 / per_cpu_s.median), "pss": side.server.pss()? });
        if n < 2 { row[name] = figures } else { row["peer"][name] = figures }
    }
    for ours in &driven[..2] {
        for peer in &driven[2..] {
            let ratio = measure::ratio(&ours.samples, &peer.samples, Sample::cpu_ns);
            row["ratio"][ours.server.name][peer.server.name] = ratio.json();
        }
    }
    for side in driven {
        drop(side.groups);
        runtime.block_on(side.tasks.drain(Duration::from_millis(1)));
    }
    Ok(row)
}

async fn connect(server: Server, case: Case) -> anyhow::Result<Driven> {
    let tasks = Tasks::new();
    let mut groups = Vec::new();
    for n in 0..case.groups {
        let (name, window) = (format!("g{n}"), case.window);
        let connected =
            Group::connect(server.address, &name, case.qos, case.fanout, window, PAYLOAD, &tasks).await;
        groups.push(connected.with_context(|| format!("connect to {}", server.name))?);
    }
    Ok(Driven { server, groups, tasks, lost: 0, samples: Vec::new() })
}

impl Driven {
    async fn round(&mut self, case: Case) -> anyhow::Result<Sample> {
        let (cpu, started) = (self.server.cpu()?, measure::now());
        let mut running = JoinSet::new();
        for mut group in self.groups.drain(..) {
            running.spawn(async move {
                let done = group.run_until(started + ROUND).await;
                (group, done)
            });
        }
        let mut ops = 0;
        while let Some(ended) = running.join_next().await {
            let (group, done) = ended?;
            let (delivered, lost) = done?;
            ops += delivered;
            self.lost += lost;
            self.groups.push(group);
        }
        let wall = started.elapsed();
        if case.qos > 0 {
            tokio::time::sleep(AFTERWARDS).await;
        }
        Ok(Sample { ops, wall, cpu: self.server.cpu()? - cpu })
    }
}

/// What the rounds with idle clients saw of one server.
#[derive(Default)]
struct Idle {
    /// Bytes of PSS per client.
    pss: Vec<f64>,
    /// Share of a core.
    cores: Vec<f64>,
    /// CPU microseconds per connect and subscribe.
    connect_us: Vec<f64>,
}

/// 10 000 clients, each with a subscription of its own, that say nothing. One fresh process per server and round.
async fn idle() -> anyhow::Result<Value> {
    let starts: [fn() -> anyhow::Result<Server>; 3] =
        [|| Server::front("lmdb"), Server::mosquitto, Server::rumqttd];
    let mut seen: Vec<(&str, Idle)> =
        ["ours", "mosquitto", "rumqttd"].map(|name| (name, Idle::default())).into();
    for _ in 0..ROUNDS {
        for (start, (name, seen)) in starts.iter().zip(&mut seen) {
            let server = start()?;
            idle_round(&server, seen).await.with_context(|| format!("idle clients of {name}"))?;
        }
    }
    let mut row = json!({ "case": format!("{IDLE_CLIENTS} idle clients") });
    let ours = Figure::of(seen[0].1.pss.iter().copied()).median;
    for (name, seen) in &seen {
        let [pss, cores, connect] =
            [&seen.pss, &seen.cores, &seen.connect_us].map(|of| Figure::of(of.iter().copied()));
        say(format_args!(
            "idle {name:10} {:.0} B PSS per client [{:.0}-{:.0}], {:.2} % of a core, {:.1} us CPU per connect",
            pss.median,
            pss.min,
            pss.max,
            cores.median * 100.0,
            connect.median
        ));
        let figures = json!({ "pss_per_client": pss.json(), "idle_cores": cores.json(), "connect_cpu_us": connect.json() });
        if *name == "ours" {
            row[*name] = figures;
        } else {
            row["peer"][*name] = figures;
            row["ratio"][*name] = json!(measure::round(pss.median / ours));
        }
    }
    Ok(row)
}

async fn idle_round(server: &Server, seen: &mut Idle) -> anyhow::Result<()> {
    let (before, cpu) = (server.pss()?, server.cpu()?);
    let mut clients = Vec::new();
    for n in 0..IDLE_CLIENTS {
        let mut client = mqtt::connect(server.address, &format!("device-{n:05}")).await?;
        mqtt::subscribe(&mut client, &format!("device/{n:05}/set"), 0).await?;
        clients.push(client);
    }
    seen.connect_us.push((server.cpu()? - cpu).as_micros() as f64 / IDLE_CLIENTS as f64);
    // What connecting left behind is given back, by those who give back.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (cpu, started) = (server.cpu()?, measure::now());
    tokio::time::sleep(IDLE).await;
    seen.cores.push((server.cpu()? - cpu).as_secs_f64() / started.elapsed().as_secs_f64());
    seen.pss.push((server.pss()?.saturating_sub(before)) as f64 / IDLE_CLIENTS as f64);
    Ok(())
}
