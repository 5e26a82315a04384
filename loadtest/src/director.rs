//! A run from its beginning to its report.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use cloudhub::admin::{IdentityOrder, IdentityRow};
use ops::client::{Client, ClientError};
use tokio::time::Instant;

use crate::{
    hub::{Hub, HubError, Program},
    pki::{self, Kept, PkiError},
    process,
    progress::Progress,
    report::{Cpu, Report, merged, quantiles},
    scenario::{Kind, Scenario},
    wire::{Numbers, Order, Plan},
    workers::{WorkerError, Workers},
};

/// Names enrolled with one request.
const ENROLLED_AT_ONCE: usize = 1000;
/// How often the run is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Why a run came to no report.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The own hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The hub's administration.
    #[error(transparent)]
    Admin(#[from] ClientError),
    /// A process of the fleet.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A scenario that needs what was not given.
    #[error("scenario {0} needs {1}")]
    Needs(&'static str, &'static str),
}

/// At whom a run aims.
#[derive(Debug)]
pub enum Aim {
    /// A hub that the run starts.
    Own(Program),
    /// Hubs that run already.
    Given {
        /// Where nodes link.
        hubs: Vec<SocketAddr>,
        /// The hub's data folder, or one with its folder `tier`: for the CA.
        ca: PathBuf,
        /// The administration socket of one of them, to enrol the nodes; without one they must be enrolled.
        admin: Option<PathBuf>,
    },
}

/// All that a run is told.
#[derive(Debug)]
pub struct Run {
    /// What happens.
    pub scenario: Scenario,
    /// To whom.
    pub aim: Aim,
    /// Processes of this part of the fleet.
    pub processes: u32,
    /// Which part of the fleet this is, and of how many: `(0, 1)` is all of it.
    pub part: (u32, u32),
    /// Where certificates are kept.
    pub cache: PathBuf,
    /// Further processes whose CPU is told.
    pub watch: Vec<u32>,
    /// Shows how it goes.
    pub progress: Progress,
}

/// A run that has begun.
struct Running {
    scenario: Scenario,
    hub: Option<Hub>,
    workers: Workers,
    watch: Vec<u32>,
    nodes: u32,
    progress: Progress,
    report: Report,
    /// Before the first dial.
    hub_rss: Option<u64>,
}

impl Run {
    /// Runs it. The hub that it started has ended when this returns.
    ///
    /// # Errors
    /// See [`RunError`]: a run that was made and found something wrong has a report instead.
    pub async fn run(self) -> Result<Report, RunError> {
        let Self { scenario, aim, processes, part, cache, watch, mut progress } = self;
        let (first, nodes) = share(scenario.nodes, part.0, part.1);
        let mut report =
            Report { scenario: scenario.kind.as_str().to_owned(), nodes, processes, ..Report::default() };
        let mut hub = None;
        let (hubs, ca, admin): (Vec<SocketAddr>, _, _) = match aim {
            Aim::Own(mut own) => {
                progress.say("starting a hub");
                let started = own.start().await?;
                let (quic, admin) = (started.endpoints.quic, started.endpoints.admin.clone());
                let data = own.data().to_owned();
                hub = Some(started);
                (quic.into_iter().collect(), data, admin)
            }
            Aim::Given { hubs, ca, admin } => (hubs, ca, admin),
        };
        let kept = pki::prepare(&ca, &cache, &scenario.prefix, first + nodes, |done| {
            if done % 500 == 0 {
                progress.show("certificates", u64::from(done), u64::from(first + nodes));
            }
        })?;
        let hub_pid = hub.as_ref().map(Hub::pid);
        let before = hub_pid.and_then(|pid| process::rss(pid).ok());
        let mut enrolled = 0;
        if let Some(admin) = &admin {
            enrolled = enrol(&Client::new(admin), &kept, first, nodes, &mut progress).await?;
        }
        let hub_rss = hub_pid.and_then(|pid| process::rss(pid).ok());
        if let (Some(before), Some(after), 1..) = (before, hub_rss, enrolled) {
            report.hub_rss_bytes_per_enrolment = Some((after as f64 - before as f64) / enrolled as f64);
        }
        let plans = plans(&scenario, &hubs, &kept, (first, nodes), processes);
        let workers = Workers::start(plans).await?;
        let mut running = Running { scenario, hub, workers, watch, nodes, progress, report, hub_rss };
        let told = running.all().await;
        let Running { workers, hub, mut report, .. } = running;
        workers.stop().await;
        if let Some(hub) = hub {
            hub.stop().await;
        }
        told?;
        report.load = process::load();
        report.passed = report.violations.is_empty();
        Ok(report)
    }
}

impl Running {
    async fn all(&mut self) -> Result<(), RunError> {
        let before = self.cpu();
        self.ramp().await?;
        let linked = self.cpu();
        match self.scenario.kind {
            Kind::Connect | Kind::Steady => self.hold().await?,
            other => return Err(RunError::Needs(other.as_str(), "more than this version has")),
        }
        let end = self.cpu();
        self.tell_cpu(&before, &linked, &end);
        let numbers = self.workers.numbers().await?;
        self.tell(&numbers);
        Ok(())
    }

    /// Links all nodes, or as many as patience allows.
    async fn ramp(&mut self) -> Result<(), RunError> {
        let (began, wanted) = (Instant::now(), u64::from(self.nodes));
        self.workers.order(&Order::Ramp).await?;
        loop {
            self.workers.listen(Instant::now() + LOOK).await?;
            let connected = self.workers.counts().connected;
            self.progress.show("linked", connected, wanted);
            if connected >= wanted || began.elapsed() > self.scenario.patience {
                break;
            }
        }
        let counts = self.workers.counts();
        let report = &mut self.report;
        report.ramp_s = began.elapsed().as_secs_f64();
        (report.connected, report.failed) = (counts.connected, wanted.saturating_sub(counts.connected));
        report.handshakes_per_s = counts.welcomed as f64 / report.ramp_s;
        if report.failed > 0 {
            report.violations.push(format!("{} of {wanted} nodes were not linked in time", report.failed));
        }
        Ok(())
    }

    /// Watches linked nodes: their heartbeats, and what they cost.
    async fn hold(&mut self) -> Result<(), RunError> {
        let connect = self.workers.numbers().await?;
        self.tell_welcome(&connect);
        self.workers.order(&Order::Forget).await?;
        let (began, hold) = (Instant::now(), self.scenario.hold);
        let before = self.cpu();
        while began.elapsed() < hold {
            self.workers.listen((began + hold).min(Instant::now() + LOOK)).await?;
            self.progress.show("watched", began.elapsed().as_secs(), hold.as_secs());
        }
        let (held, after) = (began.elapsed(), self.cpu());
        let numbers = self.workers.numbers().await?;
        let heartbeats = merged(numbers.iter().map(|numbers| &numbers.heartbeat));
        self.report.hold_s = held.as_secs_f64();
        self.report.heartbeats = heartbeats.len();
        (self.report.heartbeat_p50_us, self.report.heartbeat_p99_us) = quantiles(&heartbeats);
        let used = |what: &str| -> Option<f64> {
            let of = |all: &[Used]| -> Duration {
                all.iter().filter(|used| used.what == what).map(|used| used.cpu).sum()
            };
            (!heartbeats.is_empty() && after.iter().any(|used| used.what == what))
                .then(|| (of(&after) - of(&before)).as_secs_f64() * 1e6 / heartbeats.len() as f64)
        };
        self.report.hub_cpu_us_per_heartbeat = used("hub");
        self.report.node_cpu_us_per_heartbeat = used("worker");
        let lost = self.workers.counts().lost;
        if lost > 0 {
            self.report.violations.push(format!("{lost} links ended though nobody ended them"));
        }
        Ok(())
    }

    fn tell_welcome(&mut self, numbers: &[Numbers]) {
        let welcome = merged(numbers.iter().map(|numbers| &numbers.welcome));
        (self.report.welcome_p50_us, self.report.welcome_p99_us) = quantiles(&welcome);
    }

    fn tell(&mut self, numbers: &[Numbers]) {
        let counts = self.workers.counts();
        let linked = counts.connected as f64;
        let workers: u64 = numbers.iter().map(|numbers| numbers.rss).sum();
        let grown =
            |now: u64, before: u64| Some((now as f64 - before as f64) / linked).filter(|_| linked > 0.0);
        self.report.node_rss_bytes = grown(workers, self.workers.empty_rss());
        let hub = self.hub.as_ref().and_then(|hub| process::rss(hub.pid()).ok());
        self.report.hub_rss_bytes_per_node =
            hub.zip(self.hub_rss).and_then(|(now, before)| grown(now, before));
        self.report.failed_dials = counts.failed;
        self.report.resumed = counts.resumed;
        self.report.published = counts.published;
        for (end, count) in numbers.iter().flat_map(|numbers| &numbers.ends) {
            *self.report.ends.entry(end.clone()).or_default() += count;
        }
    }

    /// CPU of every process that is watched, up to now.
    fn cpu(&self) -> Vec<Used> {
        let hub = self.hub.iter().map(|hub| ("hub", hub.pid()));
        let workers = self.workers.pids().into_iter().map(|pid| ("worker", pid));
        let watched = self.watch.iter().map(|pid| ("watched", *pid));
        let all = hub.chain(workers).chain(watched);
        all.map(|(what, pid)| Used { what, pid, cpu: process::cpu_time(pid).unwrap_or_default() }).collect()
    }

    fn tell_cpu(&mut self, before: &[Used], linked: &[Used], end: &[Used]) {
        for now in end {
            let at = |all: &[Used]| {
                all.iter().find(|used| used.pid == now.pid).map_or(Duration::ZERO, |used| used.cpu)
            };
            self.report.cpu.push(Cpu {
                what: now.what.to_owned(),
                pid: now.pid,
                ramp_s: at(linked).saturating_sub(at(before)).as_secs_f64(),
                hold_s: now.cpu.saturating_sub(at(linked)).as_secs_f64(),
                rss: process::rss(now.pid).unwrap_or(0),
            });
        }
    }
}

/// What a process has used.
#[derive(Debug, Clone, Copy)]
struct Used {
    what: &'static str,
    pid: u32,
    cpu: Duration,
}

/// A part's share of a number: (where it begins, how many).
fn share(all: u32, index: u32, of: u32) -> (u32, u32) {
    let at = |index: u32| u32::try_from(u64::from(all) * u64::from(index) / u64::from(of)).unwrap_or(all);
    (at(index), at(index + 1) - at(index))
}

fn plans(
    scenario: &Scenario,
    hubs: &[SocketAddr],
    kept: &Kept,
    (first, nodes): (u32, u32),
    processes: u32,
) -> Vec<Plan> {
    let run = getrandom::u64().unwrap_or_else(|_no_randomness| broker::clock::wall_us());
    let plan = |index| {
        let (begin, nodes) = share(nodes, index, processes);
        Plan {
            first: first + begin,
            nodes,
            sockets: share(scenario.sockets, index, processes).1.max(1),
            rate: scenario.rate / f64::from(processes),
            in_flight: share(scenario.in_flight, index, processes).1.max(1),
            hubs: hubs.to_vec(),
            kept: kept.clone(),
            run,
            scenario: scenario.clone(),
        }
    };
    (0..processes).map(plan).collect()
}

async fn enrol(
    admin: &Client,
    kept: &Kept,
    first: u32,
    nodes: u32,
    progress: &mut Progress,
) -> Result<usize, ClientError> {
    let names: Vec<String> = (first..first + nodes).map(|number| pki::name(&kept.prefix, number)).collect();
    let (mut done, mut enrolled) = (0, 0);
    for some in names.chunks(ENROLLED_AT_ONCE) {
        let order = IdentityOrder { key: kept.key_sha256.clone(), nodes: some.to_vec() };
        let row: IdentityRow = admin.post_json("/v1/identities", &order).await?;
        (done, enrolled) = (done + some.len(), enrolled + row.enrolled);
        progress.show("enrolled", done as u64, u64::from(nodes));
    }
    Ok(enrolled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_disjoint_and_together_everything() {
        for (all, of) in [(10, 3), (1, 4), (100_000, 7), (5, 5)] {
            let mut next = 0;
            for index in 0..of {
                let (first, count) = share(all, index, of);
                assert_eq!(first, next);
                next += count;
            }
            assert_eq!(next, all);
        }
    }
}
