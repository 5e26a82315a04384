//! A run from its beginning to its report.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use broker::Tasks;
use cloudhub::admin::{IdentityOrder, IdentityRow};
use ops::client::{Client, ClientError};
use tokio::time::Instant;

use crate::{
    hub::{HubError, Hubs, Program},
    line,
    pki::{self, Kept, PkiError},
    process,
    progress::Progress,
    report::Report,
    scenario::{Kind, Scenario},
    tier::{Servers, TierError},
    wire::Plan,
    workers::{WorkerError, Workers},
};

/// Names enrolled with one request.
const ENROLLED_AT_ONCE: usize = 1000;

/// Why a run came to no report.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// An own hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The tier's NATS servers.
    #[error(transparent)]
    Tier(#[from] TierError),
    /// The hub's administration.
    #[error(transparent)]
    Admin(#[from] ClientError),
    /// A process of the fleet.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The hub's NATS front.
    #[error("NATS: {0}")]
    Nats(std::io::Error),
    /// The long line.
    #[error("no port for a long line: {0}")]
    Line(std::io::Error),
    /// State that had to be written first, or last.
    #[error("no hub took what was to be written in time")]
    NotWritten,
    /// A scenario that needs what was not given.
    #[error("scenario {0} needs {1}")]
    Needs(&'static str, &'static str),
}

/// At whom a run aims.
#[derive(Debug)]
pub enum Aim {
    /// A hub that the run starts, or so many replicas of it on the tier's NATS servers.
    Own(Program, u32),
    /// Hubs that run already.
    Given {
        /// Where nodes link.
        hubs: Vec<SocketAddr>,
        /// The hub's data folder, or one with its folder `tier`: for the CA.
        ca: PathBuf,
        /// Administration sockets, to enrol the nodes, to change State and to read what arrived; any that answers is
        /// asked. Without one the nodes must be enrolled.
        admins: Vec<PathBuf>,
        /// The NATS front of one of them.
        nats: Option<SocketAddr>,
    },
}

/// All that a run is told.
#[derive(Debug)]
pub struct Run {
    /// What happens.
    pub scenario: Scenario,
    /// To whom.
    pub aim: Aim,
    /// The NATS servers of the hubs' tier, if they are replicas.
    pub servers: Option<Servers>,
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
pub(crate) struct Running {
    pub(crate) scenario: Scenario,
    /// Tells this run's messages from those of others.
    pub(crate) run: u64,
    /// This part's first node.
    pub(crate) first: u32,
    /// This part's nodes.
    pub(crate) nodes: u32,
    /// First part of their names.
    pub(crate) prefix: String,
    /// The own hubs.
    pub(crate) hubs: Hubs,
    pub(crate) admins: Vec<PathBuf>,
    pub(crate) servers: Option<Servers>,
    pub(crate) nats: Option<SocketAddr>,
    pub(crate) workers: Workers,
    pub(crate) watch: Vec<u32>,
    pub(crate) progress: Progress,
    pub(crate) report: Report,
    /// Before the first dial.
    pub(crate) hub_rss: Option<u64>,
    /// How it went, for a plot.
    pub(crate) samples: Vec<Sample>,
    pub(crate) began: Instant,
}

/// A moment of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sample {
    /// Seconds after the first dial.
    pub at_s: f64,
    /// Nodes linked.
    pub connected: u64,
    /// CPU of the hub and of the workers so far, seconds.
    pub cpu_s: (f64, f64),
    /// Resident memory of the hub and of the workers, bytes.
    pub rss: (u64, u64),
}

impl Run {
    /// Runs it. The hubs that it started have ended when this returns.
    ///
    /// # Errors
    /// See [`RunError`]: a run that was made and found something wrong has a report instead.
    pub async fn run(self) -> Result<(Report, Vec<Sample>), RunError> {
        let Self { scenario, aim, servers, processes, part, cache, watch, mut progress } = self;
        let (first, nodes) = share(scenario.nodes, part.0, part.1);
        let mut report =
            Report { scenario: scenario.kind.as_str().to_owned(), nodes, processes, ..Report::default() };
        let mut own = Hubs::default();
        let (mut hubs, ca, admins, nats): (Vec<SocketAddr>, _, _, _) = match aim {
            Aim::Own(mut program, replicas) => {
                progress.say("starting a hub");
                let data = program.data().to_owned();
                let programs: Vec<Program> = match &servers {
                    Some(servers) => {
                        program.make_authority().await?;
                        (0..replicas).map(|number| program.replica(servers, number)).collect()
                    }
                    None => vec![program],
                };
                let (mut hubs, mut admins, mut front) = (Vec::new(), Vec::new(), None);
                for program in programs {
                    let ops::endpoints::Endpoints { quic, admin, nats, .. } = own.add(program).await?;
                    hubs.extend(quic);
                    admins.extend(admin);
                    front = front.or(nats);
                }
                (hubs, data, admins, front)
            }
            Aim::Given { hubs, ca, admins, nats } => (hubs, ca, admins, nats),
        };
        let lines = Tasks::new();
        if let (Kind::Downlink, Some(hub)) = (scenario.kind, hubs.first_mut()) {
            *hub = line::start(*hub, scenario.round_trip, &lines).await.map_err(RunError::Line)?;
        }
        let kept = pki::prepare(&ca, &cache, &scenario.prefix, first + nodes, |done| {
            if done % 500 == 0 {
                progress.show("certificates", u64::from(done), u64::from(first + nodes));
            }
        })?;
        let before = own.rss();
        let mut enrolled = 0;
        if let Some(admin) = admins.first() {
            enrolled = enrol(&Client::new(admin), &kept, first, nodes, &mut progress).await?;
        }
        let hub_rss = own.rss();
        if let (Some(before), Some(after), 1..) = (before, hub_rss, enrolled) {
            report.hub_rss_bytes_per_enrolment = Some((after as f64 - before as f64) / enrolled as f64);
        }
        let run = getrandom::u64().unwrap_or_else(|_no_randomness| broker::clock::wall_us());
        let plans = plans(&scenario, &hubs, &kept, run, (first, nodes), processes);
        let workers = Workers::start(plans).await?;
        let mut running = Running {
            run,
            first,
            nodes,
            prefix: scenario.prefix.clone(),
            scenario,
            hubs: own,
            admins,
            servers,
            nats,
            workers,
            watch,
            progress,
            report,
            hub_rss,
            samples: Vec::new(),
            began: Instant::now(),
        };
        let told = Box::pin(running.all()).await;
        let Running { workers, hubs, mut report, samples, .. } = running;
        workers.stop().await;
        lines.drain(Duration::from_secs(1)).await;
        hubs.stop().await;
        told?;
        report.load = process::load();
        report.passed = report.violations.is_empty();
        Ok((report, samples))
    }
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
    run: u64,
    (first, nodes): (u32, u32),
    processes: u32,
) -> Vec<Plan> {
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
