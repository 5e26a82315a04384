//! What can be typed.

use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
    net::{SocketAddr, ToSocketAddrs as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, ValueEnum};
use loadtest::{
    director::{Aim, Run},
    hub::Program,
    plot,
    progress::Progress,
    report::Report,
    scenario::{Kind, Scenario},
    tier::Servers,
};

/// Simulate a fleet: thousands of nodes, made of the agent's own code, link to a hub
///
/// SCENARIO is a TOML file, or one of connect, steady, telemetry, fan-out, storm, rolling-restart, churn,
/// downlink, endure: those are built in, and lie in loadtest/scenarios. Every key of a scenario can be set with --set.
#[derive(Debug, Parser)]
#[command(
    version,
    name = "loadtest",
    after_help = "\
Examples:
  loadtest steady --self-hosted --nodes 1000             a hub of its own, in a folder that goes afterwards
  loadtest connect --self-hosted --data /tmp/lt --nodes 10000 --processes 2 -o json
  loadtest steady --hub 10.0.0.5:10001 --ca /var/lib/octobus/hub --nodes 500
  loadtest storm.toml --self-hosted --set down=5s --svg storm.svg

Several machines are one fleet: give each --index 0..N-1 --of N, and the same CA and scenario.

Exit codes: 0 passed, 1 failed or a check did not hold, 2 wrong usage."
)]
pub(crate) struct Cli {
    /// A file, or the name of a built-in scenario
    #[arg(value_name = "SCENARIO", required_unless_present = "worker")]
    scenario: Option<String>,
    /// Start a hub, as a process of its own, and end it afterwards
    #[arg(long, conflicts_with_all = ["hub", "ca", "admin", "nats"])]
    self_hosted: bool,
    /// Where the hub of --self-hosted keeps its data; by default a folder that is removed
    #[arg(long, value_name = "DIR", requires = "self_hosted")]
    data: Option<PathBuf>,
    /// Program of --self-hosted: cloudhub or octobus; by default the one beside this program
    #[arg(long, value_name = "FILE", requires = "self_hosted")]
    hub_binary: Option<PathBuf>,
    /// The hubs are replicas of a tier on these nats-servers, separated by commas: what arrived is read there
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    fabric: Vec<String>,
    /// User of the servers' account OCTOBUS
    #[arg(long, value_name = "NAME", requires_all = ["fabric", "fabric_password_file"])]
    fabric_user: Option<String>,
    /// File with the user's password
    #[arg(long, value_name = "FILE", requires = "fabric_user")]
    fabric_password_file: Option<PathBuf>,
    /// Replicas that --self-hosted starts on the nats-servers of --fabric
    #[arg(long, value_name = "N", default_value_t = 1, requires_all = ["self_hosted", "fabric"], value_parser = clap::value_parser!(u32).range(1..=64))]
    replicas: u32,
    /// Hub to link to by QUIC; several times for several replicas
    #[arg(long, value_name = "HOST:PORT", requires = "ca")]
    hub: Vec<String>,
    /// Data folder of the hub, for the CA with which certificates are issued here
    #[arg(long, value_name = "DIR")]
    ca: Option<PathBuf>,
    /// Administration socket of a hub, to enrol the nodes and to change State; several times for several replicas;
    /// default CA/admin.sock if that exists
    #[arg(long, value_name = "SOCKET")]
    admin: Vec<PathBuf>,
    /// NATS front of a hub, for what goes to and comes from subscribers
    #[arg(long, value_name = "HOST:PORT", requires = "hub")]
    nats: Option<String>,
    /// Nodes of the whole fleet
    #[arg(long, value_name = "N")]
    nodes: Option<String>,
    /// Heartbeat period
    #[arg(long, value_name = "DURATION")]
    heartbeat: Option<String>,
    /// Links begun per second; 0: as many as admission lets
    #[arg(long, value_name = "N")]
    rate: Option<String>,
    /// How long the linked fleet is watched
    #[arg(long, value_name = "DURATION")]
    hold: Option<String>,
    /// Any key of the scenario
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Processes that the nodes run in
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    processes: u32,
    /// Which part of the fleet this is, counted from 0
    #[arg(long, value_name = "I", default_value_t = 0, requires = "of")]
    index: u32,
    /// Of how many parts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    of: u32,
    /// Where certificates are kept between runs; default $XDG_CACHE_HOME/octobus/loadtest, or DATA/certs
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Tell the CPU and memory of this process too; several times for several
    #[arg(long, value_name = "PID")]
    watch_pid: Vec<u32>,
    /// Form of the result on standard output; json is one line
    #[arg(short, long, value_name = "FORM", default_value = "text")]
    output: Output,
    /// Draw linked nodes, CPU and memory over time into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Begin without asking
    #[arg(short, long)]
    yes: bool,
    /// Be a process of the fleet: orders come on standard input
    #[arg(long, hide = true)]
    pub(crate) worker: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// A mistake of whoever typed this.
struct Usage(String);

/// Runs what was typed.
pub(crate) async fn run(cli: Cli) -> ExitCode {
    ops::logging::init(&ops::config::Log { level: "error".into(), format: ops::config::LogFormat::Auto });
    // Removed at the end of the run.
    let own_folder = match cli.self_hosted && cli.data.is_none() {
        true => {
            let private = std::fs::Permissions::from_mode(0o700);
            tempfile::Builder::new().prefix("octobus-loadtest-").permissions(private).tempdir().ok()
        }
        false => None,
    };
    let output = cli.output;
    let run = match plan(&cli, own_folder.as_ref().map(tempfile::TempDir::path)) {
        Ok(run) => run,
        Err(Usage(what)) => {
            eprintln!("{what}");
            return ExitCode::from(2);
        }
    };
    if !may_begin(&run, cli.yes) {
        eprintln!("not begun");
        return ExitCode::from(2);
    }
    match Box::pin(run.run()).await {
        Ok((report, samples)) => {
            if let Some(path) = &cli.svg
                && let Err(error) = std::fs::write(path, plot::svg(&report, &samples))
            {
                eprintln!("loadtest: {}: {error}", path.display());
                return ExitCode::FAILURE;
            }
            show(&report, output)
        }
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(report: &Report, output: Output) -> ExitCode {
    let text = match output {
        Output::Text => report.text(),
        Output::Json => format!("{}\n", report.line()),
    };
    for violation in &report.violations {
        eprintln!("not so: {violation}");
    }
    let written = std::io::stdout().lock().write_all(text.as_bytes());
    match written.is_ok() && report.passed {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn plan(cli: &Cli, own_folder: Option<&Path>) -> Result<Run, Usage> {
    let scenario = scenario(cli)?;
    if cli.index >= cli.of {
        return Err(Usage(format!("--index counts from 0: of {} parts the last is {}", cli.of, cli.of - 1)));
    }
    let data = cli.data.as_deref().or(own_folder);
    let aim = match (cli.self_hosted, &cli.ca) {
        (true, _) => {
            let data = data.ok_or_else(|| Usage("no temporary folder; name one with --data".to_owned()))?;
            let mut folder = std::fs::DirBuilder::new();
            let made = folder.recursive(true).mode(0o700).create(data);
            made.map_err(|error| Usage(format!("{}: {error}", data.display())))?;
            let program = Program::new(cli.hub_binary.as_deref(), data, scenario.heartbeat, scenario.nodes);
            Aim::Own(program.map_err(|error| Usage(error.to_string()))?, cli.replicas)
        }
        (false, Some(ca)) if !cli.hub.is_empty() => {
            let hubs = cli.hub.iter().map(|hub| address(hub)).collect::<Result<_, _>>()?;
            let beside = ca.join("admin.sock");
            let mut admins = cli.admin.clone();
            if admins.is_empty() && beside.exists() {
                admins.push(beside);
            }
            let nats = cli.nats.as_deref().map(address).transpose()?;
            Aim::Given { hubs, ca: ca.clone(), admins, nats }
        }
        (false, _) => {
            return Err(Usage(
                "no hub was named: --self-hosted starts one, or name yours with --hub HOST:PORT and its data \
                 folder with --ca DIR"
                    .to_owned(),
            ));
        }
    };
    let cache = match (&cli.cache, data) {
        (Some(cache), _) => cache.clone(),
        (None, Some(data)) => data.join("certs"),
        (None, None) => default_cache(),
    };
    let login = cli.fabric_user.clone().zip(cli.fabric_password_file.clone());
    let servers = (!cli.fabric.is_empty()).then(|| Servers { addresses: cli.fabric.clone(), login });
    Ok(Run {
        scenario,
        aim,
        servers,
        processes: cli.processes,
        part: (cli.index, cli.of),
        cache,
        watch: cli.watch_pid.clone(),
        progress: Progress::on_terminal(),
    })
}

fn scenario(cli: &Cli) -> Result<Scenario, Usage> {
    let mut over = Vec::new();
    for pair in &cli.set {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| Usage(format!("--set {pair}: not KEY=VALUE")))?;
        over.push((key.to_owned(), value.to_owned()));
    }
    let flags =
        [("nodes", &cli.nodes), ("heartbeat", &cli.heartbeat), ("rate", &cli.rate), ("hold", &cli.hold)];
    over.extend(flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))));
    let name = cli.scenario.as_deref().unwrap_or_default();
    let read = match Kind::ALL.into_iter().find(|kind| kind.as_str() == name) {
        Some(kind) => Scenario::built_in(kind, &over),
        None => {
            let text = std::fs::read_to_string(name).map_err(|error| {
                let kinds: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
                Usage(format!("{name}: {error}; built in are {}", kinds.join(", ")))
            })?;
            Scenario::read(name, &text, &over)
        }
    };
    read.map_err(|error| Usage(error.to_string()))
}

fn address(text: &str) -> Result<SocketAddr, Usage> {
    let resolved = text.to_socket_addrs().map_err(|error| Usage(format!("--hub {text}: {error}")))?;
    let mut resolved = resolved;
    resolved.next().ok_or_else(|| Usage(format!("--hub {text}: has no address")))
}

fn default_cache() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("XDG_CACHE_HOME")
        .or_else(|| var("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| PathBuf::from("."))
        .join("octobus/loadtest")
}

/// Says what will be done, and asks where somebody can answer.
fn may_begin(run: &Run, yes: bool) -> bool {
    let at = match &run.aim {
        Aim::Own(program, replicas) => {
            let data = program.data().display();
            match &run.servers {
                Some(servers) => {
                    format!("{replicas} replicas of its own in {data}, on {}", servers.list())
                }
                None => format!("a hub of its own in {data}"),
            }
        }
        Aim::Given { hubs, admins, .. } => {
            let hubs: Vec<_> = hubs.iter().map(SocketAddr::to_string).collect();
            let enrols = match admins.first() {
                Some(admin) => format!("nodes are enrolled through {}", admin.display()),
                None => "nodes must be enrolled already".to_owned(),
            };
            format!("{} ({enrols})", hubs.join(", "))
        }
    };
    let Scenario { kind, nodes, prefix, hold, .. } = &run.scenario;
    eprintln!(
        "{}: {nodes} nodes {prefix}-0 to {prefix}-{} in {} process(es), part {} of {}, watched for {hold:?}, \
         against {at}",
        kind.as_str(),
        nodes - 1,
        run.processes,
        run.part.0 + 1,
        run.part.1,
    );
    if yes || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return true;
    }
    eprint!("Begin? [y/N] ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}
