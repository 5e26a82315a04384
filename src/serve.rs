//! `octobus cloud` and `octobus edge`: start, say where, wait for a signal, stop in order.

use std::{path::Path, time::Duration};

use broker::tasks::Drained;
use cloudhub::hub::Hub;
use edgehub::edge::Edge;
use ops::{
    config::{Config, Flags, Role},
    endpoints::Endpoints,
    logging,
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{Failure, Outcome};

/// From the first signal to the end of a node, or of dev.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn cloud(flags: &Flags) -> Outcome {
    let (config, mut signals) = prepare(Role::Cloud, flags)?;
    let hub = Box::pin(Hub::start(&config)).await.map_err(cannot_start)?;
    tracing::info!(tier = hub.tier(), endpoints = ?hub.endpoints(), "serving");
    announce(&config, hub.endpoints())?;
    signals.first().await;
    signals.or_second(hub.stop(config.limits.drain)).await
}

pub(crate) async fn edge(flags: &Flags) -> Outcome {
    let (config, mut signals) = prepare(Role::Edge, flags)?;
    let edge = Box::pin(Edge::start(&config)).await.map_err(cannot_start)?;
    tracing::info!(node = edge.name(), endpoints = ?edge.endpoints(), "serving");
    announce(&config, edge.endpoints())?;
    signals.first().await;
    signals.or_second(edge.stop(STOP_DEADLINE)).await
}

/// Configuration, logging and signals, in this order, before anything that has to be undone.
pub(crate) fn prepare(role: Role, flags: &Flags) -> Outcome<(Config, Signals)> {
    let config = Config::load(role, flags)?;
    logging::init(&config.log);
    tracing::info!(role = role.as_str(), config = %config.effective(), "starting");
    Ok((config, Signals::new()?))
}

pub(crate) fn cannot_start(error: impl std::error::Error) -> Failure {
    let mut message = format!("cannot start: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Messages that already tell their cause are not told twice.
        let text = inner.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    Failure::failed(message)
}

/// Writes the ready file, if one is wanted.
pub(crate) fn announce(config: &Config, endpoints: &Endpoints) -> Outcome {
    let Some(path) = &config.ready_file else {
        return Ok(());
    };
    let cannot = |path: &Path, error| Failure::failed(format!("cannot write {}: {error}", path.display()));
    endpoints.write(path).map_err(|error| cannot(path, error))
}

/// SIGINT and SIGTERM, caught from the moment this exists.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Outcome<Self> {
        let catch =
            |kind| signal(kind).map_err(|error| Failure::failed(format!("cannot handle signals: {error}")));
        Ok(Self { interrupt: catch(SignalKind::interrupt())?, terminate: catch(SignalKind::terminate())? })
    }

    /// Waits for one. Cancel safe.
    pub(crate) async fn first(&mut self) {
        tokio::select! {
            biased;
            _signal = self.interrupt.recv() => tracing::info!("SIGINT: stopping"),
            _signal = self.terminate.recv() => tracing::info!("SIGTERM: stopping"),
        }
    }

    /// Waits for the stop to end; a second signal ends it at once.
    pub(crate) async fn or_second(&mut self, stop: impl Future<Output = Drained>) -> Outcome {
        tokio::select! {
            biased;
            () = self.first() => Err(Failure::failed("a second signal: stopped at once; the journal has all that was acknowledged")),
            drained = Box::pin(stop) => match drained {
                Drained::Clean => Ok(()),
                Drained::Forced(tasks) => {
                    tracing::warn!(tasks, "not everything ended in time; the journal has all that was acknowledged");
                    Ok(())
                }
            },
        }
    }
}
