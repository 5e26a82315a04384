//! The hub as a binary of its own: `octobus cloud` without the rest of the command line.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use cloudhub::hub::Hub;
use ops::config::{Config, Flags, Role};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A hub: nodes link to it, NATS clients talk to nodes through it.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match Config::load(Role::Cloud, &cli.flags) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    ops::logging::init(&config.log);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ran = runtime.context("cannot start the runtime").and_then(|runtime| runtime.block_on(run(&config)));
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloudhub: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: &Config) -> anyhow::Result<()> {
    // Before anything that has to be undone, so that no signal is lost.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle SIGTERM")?;
    tracing::info!(config = %config.effective(), "starting");
    let hub = Box::pin(Hub::start(config)).await.context("cannot start")?;
    tracing::info!(tier = hub.tier(), endpoints = ?hub.endpoints(), "serving");
    if let Some(path) = &config.ready_file {
        hub.endpoints().write(path).with_context(|| format!("cannot write {}", path.display()))?;
    }
    asked_to_stop(&mut interrupt, &mut terminate).await;
    tracing::info!("stopping; a second signal stops at once");
    tokio::select! {
        biased;
        () = asked_to_stop(&mut interrupt, &mut terminate) => anyhow::bail!("stopped at once by a second signal"),
        drained = Box::pin(hub.stop(config.limits.drain)) => tracing::info!(?drained, "stopped"),
    }
    Ok(())
}

async fn asked_to_stop(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
