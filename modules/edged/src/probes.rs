//! Probes: asking a container whether it has started, lives and is ready, as kubelet asks.
//!
//! [`Schedule`] decides when and what the answers amount to; it knows neither clock nor network. [`check`] asks once.
//! [`hooks`] runs what a container wants done after its start and before its end, by the same means.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Container, ExecAction, GRPCAction, HTTPGetAction, Probe, TCPSocketAction},
    apimachinery::pkg::util::intstr::IntOrString,
};
use tokio::time::{Instant, timeout};

use crate::{
    env,
    runtime::{Runtime, RuntimeError},
};

mod grpc;
pub mod hooks;
mod http;
mod schedule;

pub use schedule::{Schedule, Verdict};

/// What is kept of an answer's text, bytes.
const TEXT_MAX: usize = 10 << 10;
/// Being unable to ask is tried again at once, so often.
const TRIES: usize = 3;

/// What a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Whether it has started; until then nothing else is asked.
    Startup,
    /// Whether it must be restarted.
    Liveness,
    /// Whether it takes requests.
    Readiness,
}

/// What one asking found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is well.
    Success,
    /// It is not, in kubelet's words.
    Failure(String),
    /// It could not be asked. Counts for nothing.
    Unknown(String),
}

/// Whom to ask.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Runs commands in it.
    pub runtime: &'a dyn Runtime,
    /// The container, by the runtime's id.
    pub id: &'a str,
    /// Its part of the spec: named ports, environment.
    pub container: &'a Container,
    /// The pod's address.
    pub pod_ip: &'a str,
}

/// How long one asking may take.
#[must_use]
pub fn time_limit(probe: &Probe) -> Duration {
    Duration::from_secs(
        probe.timeout_seconds.filter(|seconds| *seconds > 0).unwrap_or(1).unsigned_abs().into(),
    )
}

/// Asks once, within the probe's time limit. Dropping it closes whatever was opened; a command in the container is
/// the runtime's to end.
pub async fn check(probe: &Probe, target: &Target<'_>) -> Outcome {
    let mut last = Outcome::Unknown("the probe has no handler".to_owned());
    for _ in 0..TRIES {
        last = check_once(probe, target).await;
        if !matches!(last, Outcome::Unknown(_)) {
            break;
        }
    }
    last
}

async fn check_once(probe: &Probe, target: &Target<'_>) -> Outcome {
    let limit = time_limit(probe);
    if let Some(action) = &probe.exec {
        exec(action, target, limit).await
    } else if let Some(action) = &probe.http_get {
        http_get(action, target, limit).await
    } else if let Some(action) = &probe.tcp_socket {
        tcp_socket(action, target, limit).await
    } else if let Some(action) = &probe.grpc {
        grpc_health(action, target, limit).await
    } else {
        Outcome::Unknown(format!("missing probe handler for {}", target.container.name))
    }
}

/// A command with the values of its container's own variables.
fn command(action: &ExecAction, container: &Container) -> Vec<String> {
    let value = |name: &str| {
        let own = container.env.iter().flatten().find(|variable| variable.name == name)?;
        own.value.as_deref()
    };
    action.command.iter().flatten().map(|word| env::expand(word, value)).collect()
}

async fn exec(action: &ExecAction, target: &Target<'_>, limit: Duration) -> Outcome {
    let begun = Instant::now();
    let words = command(action, target.container);
    let shown = words.join(" ");
    match target.runtime.exec_sync(target.id, words, limit).await {
        Ok(answer) if answer.exit_code == 0 => Outcome::Success,
        Ok(answer) => Outcome::Failure(output(&answer.stdout, &answer.stderr)),
        // Its time was up: that is an answer.
        Err(RuntimeError::Unavailable(_)) if begun.elapsed() >= limit => {
            Outcome::Failure(format!("command {} timed out after {}", env::quoted(&shown), seconds(limit)))
        }
        Err(error) => Outcome::Unknown(error.to_string()),
    }
}

/// What a command said, the beginning of it.
fn output(stdout: &[u8], stderr: &[u8]) -> String {
    let both: Vec<u8> = stdout.iter().chain(stderr).take(TEXT_MAX).copied().collect();
    String::from_utf8_lossy(&both).into_owned()
}

async fn http_get(action: &HTTPGetAction, target: &Target<'_>, limit: Duration) -> Outcome {
    let request = match http::Get::new(action, target, "kube-probe") {
        Ok(request) => request,
        Err(why) => return Outcome::Unknown(why),
    };
    match timeout(limit, request.fetch()).await {
        Ok(Ok(status)) if (200..400).contains(&status) => Outcome::Success,
        Ok(Ok(status)) => Outcome::Failure(format!("HTTP probe failed with statuscode: {status}")),
        Ok(Err(why)) => Outcome::Failure(format!("Get \"{}\": {why}", request.url())),
        Err(_) => Outcome::Failure(format!(
            "Get \"{}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            request.url()
        )),
    }
}

async fn tcp_socket(action: &TCPSocketAction, target: &Target<'_>, limit: Duration) -> Outcome {
    let port = match port(&action.port, target.container) {
        Ok(port) => port,
        Err(why) => return Outcome::Unknown(why),
    };
    let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip);
    let address = http::with_port(host, port);
    match timeout(limit, tokio::net::TcpStream::connect(&address)).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(http::dial_error(&address, &error)),
        Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

async fn grpc_health(action: &GRPCAction, target: &Target<'_>, limit: Duration) -> Outcome {
    let Ok(port) = u16::try_from(action.port) else {
        return Outcome::Unknown(format!("invalid port number: {}", action.port));
    };
    let address = http::with_port(target.pod_ip, port);
    grpc::check(&address, action.service.as_deref().unwrap_or_default(), limit).await
}

/// A port by number or by the name that the container gives it.
fn port(named: &IntOrString, container: &Container) -> Result<u16, String> {
    let found = match named {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let ports = container.ports.iter().flatten();
            let own = ports.into_iter().find(|port| port.name.as_deref() == Some(name));
            match own.map(|port| port.container_port).or_else(|| name.parse().ok()) {
                Some(number) => number,
                None => return Err(format!("couldn't find port: {name} in container {}", container.name)),
            }
        }
    };
    match u16::try_from(found) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("invalid port number: {found}")),
    }
}

fn seconds(limit: Duration) -> String {
    format!("{}s", limit.as_secs())
}

#[cfg(test)]
mod tests;
