//! What a container wants done right after its start, and before it is asked to end.

use std::time::Duration;

use k8s_openapi::api::core::v1::LifecycleHandler;
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{Target, command, http, output, port};
use crate::env::quoted;

/// What the runtime may take longer than the limit to say that a command's time was up.
const SLACK: Duration = Duration::from_secs(1);

/// Runs a hook to its end, or until its time is up. Why it failed, in kubelet's words.
pub async fn run(handler: &LifecycleHandler, target: &Target<'_>, limit: Duration) -> Result<(), String> {
    match timeout(limit + SLACK, run_one(handler, target, limit)).await {
        Ok(done) => done,
        Err(_) => {
            let name = &target.container.name;
            Err(format!("lifecycle hook of container \"{name}\" did not end within {}s", limit.as_secs()))
        }
    }
}

async fn run_one(handler: &LifecycleHandler, target: &Target<'_>, limit: Duration) -> Result<(), String> {
    let container = target.container;
    if let Some(action) = &handler.exec {
        let words = command(action, container);
        let shown = words.join(" ");
        let failed = |why: String, said: String| {
            let name = &container.name;
            Err(format!(
                "Exec lifecycle hook ([{shown}]) for Container \"{name}\" failed - error: {why}, message: {}",
                quoted(&said)
            ))
        };
        match target.runtime.exec_sync(target.id, words, limit).await {
            Ok(answer) if answer.exit_code == 0 => Ok(()),
            Ok(answer) => failed(
                format!(
                    "command '{shown}' exited with {}: {}",
                    answer.exit_code,
                    output(b"", &answer.stderr)
                ),
                output(&answer.stdout, &answer.stderr),
            ),
            Err(error) => failed(error.to_string(), String::new()),
        }
    } else if let Some(action) = &handler.http_get {
        let request = http::Get::new(action, target, "kube-lifecycle")?;
        let failed = |why: String| {
            format!(
                "HTTP lifecycle hook ({}) for Container \"{}\" failed - error: Get \"{}\": {why}",
                action.path.as_deref().unwrap_or_default(),
                container.name,
                request.url()
            )
        };
        // That it was told is enough: what it answers is its own affair.
        match timeout(limit, request.fetch()).await {
            Ok(answer) => answer.map(|_| ()).map_err(failed),
            Err(_) => Err(failed("context deadline exceeded".to_owned())),
        }
    } else if let Some(action) = &handler.tcp_socket {
        let host = action.host.as_deref().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip);
        let address = http::with_port(host, port(&action.port, container)?);
        match timeout(limit, TcpStream::connect(&address)).await {
            Ok(connected) => connected.map(|_| ()).map_err(|error| http::dial_error(&address, &error)),
            Err(_) => Err(format!("dial tcp {address}: i/o timeout")),
        }
    } else if let Some(action) = &handler.sleep {
        // However long it would be: the pod is ended when its time is up.
        sleep(Duration::from_secs(action.seconds.max(0).unsigned_abs()).min(limit)).await;
        Ok(())
    } else {
        Err("invalid handler: it names nothing to do".to_owned())
    }
}
