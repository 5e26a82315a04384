//! The HTTP server behind Streams of kind `kubelet`: logs, commands, ports and figures of the node's pods, at the
//! paths and in the words of a kubelet, so that an API server forwards its clients' requests unchanged.
//!
//! What a client is sent is made as it reads: a client that stops reading holds one piece of a log, or the window of
//! its Stream, and nothing else. What an upgraded connection carries is never looked at.
//!
//! | file | what |
//! |---|---|
//! | `route.rs` | from path and query to what is asked for: pure |
//! | `answer.rs` | bodies, and errors in kubelet's words |
//! | `print.rs` | a container's log, as it grows |
//! | `upgrade.rs` | exec, attach, port-forward: on to the runtime's streaming server |
//! | `figures.rs` | what pods use, as summary and as metrics |

mod answer;
mod figures;
mod print;
mod route;
mod upgrade;

use std::{convert::Infallible, fmt, path::PathBuf, sync::Arc, time::Duration};

use broker::{
    Tasks,
    link::stream::{IncomingStream, StreamCode},
};
use hyper::{Request, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, mpsc},
};

use self::{
    answer::{Answer, Refusal},
    route::Route,
};
use crate::{
    runtime::{Runtime, RuntimeError, cri},
    stats::Stats,
};

/// The kind of Streams that this answers.
pub const KIND: &str = "kubelet";
/// Streams that are answered at once; more are refused as busy.
const STREAMS_MAX: usize = 128;
/// Headers of a request, bytes.
const HEADER_BYTES_MAX: usize = 64 << 10;
/// How long the headers of a request may take.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);
/// How long a command of `/run` may take.
const RUN_WITHIN: Duration = Duration::from_secs(120);

/// How long a container that is to be restarted has to end by itself.
const RESTART_GRACE: Duration = Duration::from_secs(10);

/// See the module's documentation.
#[derive(Debug)]
pub struct Server {
    runtime: Arc<dyn Runtime>,
    pods: Arc<dyn Pods>,
    stats: Stats,
}

impl Server {
    /// For the node of this name.
    #[must_use]
    pub fn new(node: &str, data: PathBuf, runtime: Arc<dyn Runtime>, pods: Arc<dyn Pods>) -> Arc<Self> {
        let stats = Stats::new(node, data, Arc::clone(&runtime), Arc::clone(&pods));
        Arc::new(Self { runtime, pods, stats })
    }

    /// Answers Streams until no more come. What it answers lives in `tasks`.
    pub async fn run(self: Arc<Self>, mut incoming: mpsc::Receiver<IncomingStream>, tasks: Tasks) {
        let places = Arc::new(Semaphore::new(STREAMS_MAX));
        while let Some(stream) = incoming.recv().await {
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                let full = "the node answers as many requests as it can";
                tasks.spawn("kubelet stream refused", stream.refuse(StreamCode::BUSY, full));
                continue;
            };
            let (server, stop, inner) = (Arc::clone(&self), tasks.stopped(), tasks.clone());
            tasks.spawn("kubelet stream", async move {
                let _place = place;
                let served = async {
                    // Who has gone meanwhile needs no answer.
                    if let Ok(stream) = stream.accept().await {
                        server.serve(stream, &inner).await;
                    }
                };
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = served => {}
                }
            });
        }
    }

    /// Answers the requests of one connection, to its end.
    pub async fn serve<S>(self: Arc<Self>, stream: S, tasks: &Tasks)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = service_fn(|request| {
            let (server, tasks) = (Arc::clone(&self), tasks.clone());
            async move { Ok::<_, Infallible>(server.answer(request, &tasks).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADERS_WITHIN)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a kubelet stream broke");
        }
    }

    async fn answer(&self, request: Request<Incoming>, tasks: &Tasks) -> Answer {
        let route = match route::of(request.method(), request.uri()) {
            Ok(route) => route,
            Err(refusal) => return refusal.into(),
        };
        let answered = match route {
            Route::Healthz => Ok(answer::text("ok")),
            Route::Pods => Ok(answer::json(&serde_json::json!({
                "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods.objects(),
            }))),
            Route::Summary => Ok(answer::json(&figures::summary(&self.stats.read().await))),
            Route::Metrics => Ok(answer::text(figures::metrics(&self.stats.read().await))),
            Route::Logs { of, wanted, previous } => {
                print::logs(&*self.pods, &self.runtime, &of, wanted, previous)
            }
            Route::Exec { of, command, channels } => match self.container(&of) {
                Err(refusal) => Err(refusal),
                Ok(container_id) => {
                    let url = self.runtime.exec(cri::ExecRequest {
                        container_id,
                        cmd: command,
                        tty: channels.tty,
                        stdin: channels.stdin,
                        stdout: channels.stdout,
                        stderr: channels.stderr,
                    });
                    upgrade::to(url.await, request, tasks).await
                }
            },
            Route::Attach { of, channels } => match self.container(&of) {
                Err(refusal) => Err(refusal),
                Ok(container_id) => {
                    let url = self.runtime.attach(cri::AttachRequest {
                        container_id,
                        tty: channels.tty,
                        stdin: channels.stdin,
                        stdout: channels.stdout,
                        stderr: channels.stderr,
                    });
                    upgrade::to(url.await, request, tasks).await
                }
            },
            Route::PortForward { namespace, pod, uid, ports } => {
                match self.sandbox(&namespace, &pod, uid.as_deref()) {
                    Err(refusal) => Err(refusal),
                    Ok(pod_sandbox_id) => {
                        let url = self
                            .runtime
                            .port_forward(cri::PortForwardRequest { pod_sandbox_id, port: ports });
                        upgrade::to(url.await, request, tasks).await
                    }
                }
            }
            Route::Run { of, command } => self.run_command(&of, command).await,
            Route::Restart { namespace, pod, container } => {
                self.restart(&namespace, &pod, container.as_deref()).await
            }
        };
        answered.unwrap_or_else(Into::into)
    }

    fn pod(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<PodView, Refusal> {
        let pod = self.pods.pod(namespace, name).filter(|pod| uid.is_none_or(|uid| uid == pod.uid));
        pod.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, format!("pod {name:?} does not exist")))
    }

    /// The container that is meant, by the runtime's id.
    fn container(&self, of: &Of) -> Result<String, Refusal> {
        let pod = self.pod(&of.namespace, &of.pod, of.uid.as_deref())?;
        let container = pod.containers.into_iter().find(|container| container.name == of.container);
        let id = container.filter(|container| container.running).and_then(|container| container.id);
        id.ok_or_else(|| Refusal::failed(format!("container not found ({:?})", of.container)))
    }

    fn sandbox(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<String, Refusal> {
        let pod = self.pod(namespace, name, uid)?;
        let missing = || Refusal::failed(format!("cannot find sandbox of pod {name:?}"));
        pod.sandbox.ok_or_else(missing)
    }

    /// Stops what runs; the life of the pod goes on as after any end.
    async fn restart(&self, namespace: &str, name: &str, only: Option<&str>) -> Result<Answer, Refusal> {
        let pod = self.pod(namespace, name, None)?;
        let wanted = |container: &ContainerView| only.is_none_or(|only| only == container.name);
        let running = pod.containers.into_iter().filter(|container| container.running && wanted(container));
        let ids: Vec<String> = running.filter_map(|container| container.id).collect();
        if ids.is_empty() {
            return Err(Refusal::failed(format!("no such container of pod {name:?} runs")));
        }
        for id in &ids {
            self.runtime.stop_container(id, RESTART_GRACE).await?;
        }
        Ok(answer::text("ok"))
    }

    async fn run_command(&self, of: &Of, command: Vec<String>) -> Result<Answer, Refusal> {
        let id = self.container(of)?;
        let answer = self.runtime.exec_sync(&id, command, RUN_WITHIN).await?;
        let mut output = answer.stdout;
        output.extend_from_slice(&answer.stderr);
        if answer.exit_code == 0 {
            return Ok(answer::text(output));
        }
        let printed = String::from_utf8_lossy(&output);
        let code = answer.exit_code;
        Err(Refusal::failed(format!("command terminated with exit code {code}: {printed}")))
    }
}

impl From<RuntimeError> for Refusal {
    fn from(error: RuntimeError) -> Self {
        let status = match &error {
            RuntimeError::NotFound(_) => StatusCode::NOT_FOUND,
            RuntimeError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            RuntimeError::Refused(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

/// Which container a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Of {
    namespace: String,
    pod: String,
    /// If it is given, only a pod of this uid is meant.
    uid: Option<String>,
    container: String,
}

/// The node's pods as this server needs them. Asked anew for every request.
pub trait Pods: fmt::Debug + Send + Sync {
    /// The pod of this name that the node has now, if any.
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView>;
    /// All pods that the node has.
    fn pods(&self) -> Vec<PodView>;
    /// The same pods as objects of the Kubernetes API, with their statuses.
    fn objects(&self) -> Vec<serde_json::Value>;
}

/// A pod at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// Nanoseconds since 1970 at which the node accepted it.
    pub started_at: i64,
    /// The sandbox that is ready, by the runtime's id.
    pub sandbox: Option<String>,
    /// Those of its specification, started or not: init containers too.
    pub containers: Vec<ContainerView>,
}

/// A container of a pod at this moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerView {
    pub name: String,
    /// The newest instance by the runtime's id, whether it runs or not.
    pub id: Option<String>,
    /// It runs.
    pub running: bool,
    /// Why it does not run yet: `ContainerCreating`, `ImagePullBackOff`, ...
    pub waiting: Option<String>,
    /// The log of the newest instance.
    pub log: Option<PathBuf>,
    /// The log of the instance before, if it is kept.
    pub previous_log: Option<PathBuf>,
}

#[cfg(test)]
mod tests;
