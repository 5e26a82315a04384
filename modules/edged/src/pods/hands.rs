//! Performs the actions of pods, and tells what it saw.
//!
//! Actions of all pods share bounds: calls that make something, and pulls. Ending waits for neither. Dropping an
//! action under way leaves open how far it came; whoever drops it looks.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    life::{Action, KILL_FAILED, Outcome},
    maker::Maker,
    report::{Happening, Reporter},
    seen::{self, Contained, Sandbox, Seen, State},
    spec,
    table::Table,
};
use crate::{
    make::{self, image},
    probes::{Target, hooks},
    runtime::{Runtime, RuntimeError, cri},
};

/// Sandboxes and containers that are made at a time, on all pods together.
const MAKING_MAX: usize = 6;
/// Images that are pulled at a time.
const PULLS_MAX: usize = 3;
/// What a container is given to end after its hook used up the grace period.
const LEAST_GRACE: Duration = Duration::from_secs(2);
/// Of a log that stands in for a termination message: lines and bytes.
const MESSAGE_LINES: usize = 80;
const MESSAGE_BYTES: u64 = 2_048;

/// Something that an action saw.
#[derive(Debug)]
pub(crate) enum Sight {
    Sandbox(Sandbox),
    Container(Contained),
    /// Everything that there is, against what was known before it was asked for.
    All {
        known_before: BTreeSet<String>,
        seen: Seen,
    },
}

/// What an action needs of its pod.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) pod: Arc<Pod>,
    pub(crate) ips: Vec<String>,
    pub(crate) known: BTreeSet<String>,
}

/// Shared by all pods of a node.
#[derive(Debug)]
pub(crate) struct Hands {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) maker: Arc<dyn Maker>,
    pub(crate) report: Reporter,
    pub(crate) table: Arc<Table>,
    /// Marks what this agent makes.
    pub(crate) node: String,
    making: Semaphore,
    pulls: Semaphore,
}

/// Why a start did not succeed.
struct Failure {
    reason: &'static str,
    message: String,
    unsure: bool,
}

impl Failure {
    fn new(reason: &'static str, error: impl ToString) -> Self {
        Self { reason, message: error.to_string(), unsure: false }
    }

    /// Of a call: what a runtime refused it may have begun, so it is looked for whatever it said.
    fn call(reason: &'static str, error: &RuntimeError) -> Self {
        Self { reason, message: error.to_string(), unsure: true }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed { reason: failure.reason, message: failure.message, unsure: failure.unsure }
    }
}

impl From<make::ConfigError> for Failure {
    fn from(error: make::ConfigError) -> Self {
        Self::new(error.reason, error.message)
    }
}

impl Hands {
    pub(crate) fn new(
        runtime: Arc<dyn Runtime>,
        maker: Arc<dyn Maker>,
        report: Reporter,
        table: Arc<Table>,
        node: &str,
    ) -> Self {
        let (making, pulls) = (Semaphore::new(MAKING_MAX), Semaphore::new(PULLS_MAX));
        Self { runtime, maker, report, table, node: node.to_owned(), making, pulls }
    }

    /// Performs one action.
    pub(crate) async fn perform(&self, action: Action, context: &Context) -> (Vec<Sight>, Outcome) {
        let mut sights = Vec::new();
        let done = match action {
            Action::SetUp => self.set_up(context).await,
            Action::Refresh => self.refresh(context).await,
            Action::TearDown => self.tear_down(context).await,
            Action::RunSandbox { attempt } => self.run_sandbox(context, attempt, &mut sights).await,
            Action::StopSandbox { id } => ended("KillPodSandboxError", self.runtime.stop_sandbox(&id).await),
            Action::RemoveSandbox { id } => {
                ended("RemovePodSandboxError", self.runtime.remove_sandbox(&id).await)
            }
            Action::RemoveContainer { id } => {
                ended("RemoveContainerError", self.runtime.remove_container(&id).await)
            }
            Action::Start { container, sandbox, sandbox_attempt, attempt, back_off } => {
                let (container, sandbox) = (container.as_str(), sandbox.as_str());
                let start = Start { container, sandbox, sandbox_attempt, attempt, back_off };
                self.start(context, &start, &mut sights).await
            }
            Action::Kill { container, id, grace } => {
                self.kill(context, &container, &id, grace, &mut sights).await
            }
            Action::Look => self.look(context, &mut sights).await,
            Action::Forget => {
                let pod = &context.pod;
                let (namespace, name) = (spec::namespace(pod).to_owned(), spec::name(pod).to_owned());
                let uid = spec::uid(pod).to_owned();
                self.blocking(move |maker| maker.forget(&namespace, &name, &uid)).await;
                Ok(())
            }
            // Whoever drives the action ends it.
            Action::Cancel(_) => Ok(()),
        };
        (sights, done.map_or_else(Outcome::from, |()| Outcome::Done))
    }

    /// Runs what blocks on a thread for it. `None` if that panicked.
    async fn blocking<T: Send + 'static>(
        &self,
        act: impl FnOnce(&dyn Maker) -> T + Send + 'static,
    ) -> Option<T> {
        let maker = Arc::clone(&self.maker);
        let run = tokio::task::spawn_blocking(move || act(&*maker)).await;
        run.inspect_err(|error| tracing::error!(%error, "a pod's folders")).ok()
    }

    fn tell(
        &self,
        pod: &Arc<Pod>,
        warning: bool,
        reason: &'static str,
        message: String,
        container: Option<&str>,
    ) {
        let container = container.map(str::to_owned);
        self.report.happened(Happening { pod: Arc::clone(pod), warning, reason, message, container });
    }

    async fn set_up(&self, context: &Context) -> Result<(), Failure> {
        let (pod, objects) = (Arc::clone(&context.pod), self.table.objects_of(&context.pod));
        let made = self.blocking(move |maker| maker.set_up(&pod, &objects)).await;
        made.unwrap_or_else(|| Err("panicked".to_owned())).map_err(|message| {
            self.tell(&context.pod, true, "FailedMount", message.clone(), None);
            Failure::new("FailedMount", message)
        })
    }

    async fn refresh(&self, context: &Context) -> Result<(), Failure> {
        let (pod, objects) = (Arc::clone(&context.pod), self.table.objects_of(&context.pod));
        let refreshed = self.blocking(move |maker| maker.refresh(&pod, &objects)).await;
        let refreshed = refreshed.unwrap_or_else(|| Err("panicked".to_owned()));
        // What cannot be refreshed stays as it is, and is tried again with the next change.
        if let Err(message) = refreshed {
            self.tell(&context.pod, true, "FailedMount", message, None);
        }
        Ok(())
    }

    async fn tear_down(&self, context: &Context) -> Result<(), Failure> {
        let uid = spec::uid(&context.pod).to_owned();
        let removed = self.blocking(move |maker| maker.tear_down(&uid)).await;
        removed
            .unwrap_or_else(|| Err("panicked".to_owned()))
            .map_err(|message| Failure::new("FailedUnmount", message))
    }

    async fn run_sandbox(
        &self,
        context: &Context,
        attempt: u32,
        sights: &mut Vec<Sight>,
    ) -> Result<(), Failure> {
        const REASON: &str = "FailedCreatePodSandBox";
        let made = async {
            let mut config = self.maker.sandbox(&context.pod, attempt)?;
            config.labels.insert(seen::AGENT.to_owned(), self.node.clone());
            // The runtime wants the folder of logs to be there.
            folder(PathBuf::from(&config.log_directory))
                .await
                .map_err(|error| Failure::new(REASON, error))?;
            let _permit = self.making.acquire().await;
            let id = self.runtime.run_sandbox(config).await.map_err(|error| Failure::call(REASON, &error))?;
            let status =
                self.runtime.sandbox_status(&id).await.map_err(|error| Failure::call(REASON, &error))?;
            sights.push(Sight::Sandbox(Sandbox::of(&status)));
            Ok(())
        };
        made.await.inspect_err(|failure: &Failure| {
            let message = format!("Failed to create pod sandbox: {}", failure.message);
            self.tell(&context.pod, true, REASON, message, None);
        })
    }

    async fn start(
        &self,
        context: &Context,
        start: &Start<'_>,
        sights: &mut Vec<Sight>,
    ) -> Result<(), Failure> {
        let pod = &context.pod;
        let Some(container) = spec::container(pod, start.container) else {
            return Err(Failure::new("CreateContainerError", "there is no such container in the pod"));
        };
        let started = self.start_it(context, container, start, sights).await;
        started.inspect_err(|failure| {
            let pulled =
                matches!(failure.reason, "ErrImagePull" | "ErrImageNeverPull" | "PostStartHookError");
            if !pulled {
                let message = format!("Error: {}", failure.message);
                self.tell(pod, true, "Failed", message, Some(&container.name));
            }
        })
    }

    async fn start_it(
        &self,
        context: &Context,
        container: &Container,
        start: &Start<'_>,
        sights: &mut Vec<Sight>,
    ) -> Result<(), Failure> {
        let pod = &context.pod;
        let name = container.name.as_str();
        let image = self.image(pod, container).await?;
        let objects = self.table.objects_of(pod);
        let config = {
            let (pod, container, objects) = (Arc::clone(pod), container.clone(), objects);
            let (attempt, ips) = (start.attempt, context.ips.clone());
            self.blocking(move |maker| maker.container(&pod, &container, &objects, &image, attempt, &ips))
                .await
        };
        let mut config = config.unwrap_or_else(|| {
            let message = "panicked".to_owned();
            Err(make::ConfigError { reason: "CreateContainerConfigError", message })
        })?;
        let back_off = u64::try_from(start.back_off.as_millis()).unwrap_or(u64::MAX);
        config.labels.insert(seen::AGENT.to_owned(), self.node.clone());
        config.annotations.insert(seen::BACK_OFF.to_owned(), back_off.to_string());
        config.annotations.insert(seen::SPEC.to_owned(), spec::mark(container));
        let sandbox = self.maker.sandbox(pod, start.sandbox_attempt)?;
        if let Some(logs) = Path::new(&sandbox.log_directory).join(&config.log_path).parent() {
            folder(logs.to_owned()).await.map_err(|error| Failure::new("CreateContainerError", error))?;
        }
        let permit = self.making.acquire().await;
        let id = self
            .runtime
            .create_container(start.sandbox, config, sandbox)
            .await
            .map_err(|error| Failure::call("CreateContainerError", &error))?;
        self.tell(pod, false, "Created", format!("Created container: {name}"), Some(name));
        let started = self.runtime.start_container(&id).await;
        drop(permit);
        // Also of one that did not start: the runtime says how it ended.
        let seen = self.container(context, &id, start.sandbox).await;
        started.map_err(|error| Failure::call("RunContainerError", &error))?;
        self.tell(pod, false, "Started", format!("Started container {name}"), Some(name));
        sights.push(Sight::Container(seen.map_err(|error| Failure::call("RunContainerError", &error))?));
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        if let Some(hook) = hook {
            let ip = context.ips.first().map_or("", String::as_str);
            let target = Target { runtime: &*self.runtime, id: &id, container, pod_ip: ip };
            if let Err(error) = hooks::run(hook, &target, HOOK_MAX).await {
                let message = format!("PostStartHook failed: {error}");
                self.tell(pod, true, "FailedPostStartHook", message.clone(), Some(name));
                sights.clear();
                let grace = spec::grace(pod);
                self.kill(context, name, &id, grace, sights).await?;
                return Err(Failure::new("PostStartHookError", message));
            }
        }
        Ok(())
    }

    /// The image of a container, pulled if its policy says so.
    async fn image(&self, pod: &Arc<Pod>, container: &Container) -> Result<cri::Image, Failure> {
        let name = image::name(container.image.as_deref().unwrap_or_default())?;
        let shown = container.image.as_deref().unwrap_or_default();
        let unknown = |error: RuntimeError| Failure {
            reason: "ImageInspectError",
            message: format!("Failed to inspect image \"{shown}\": {error}"),
            unsure: false,
        };
        let held = self.runtime.image(&name).await.map_err(unknown)?;
        let policy = image::policy(container);
        let pull = image::decide(policy, shown, held.is_some()).map_err(|error| {
            self.tell(pod, true, error.reason, error.message.clone(), Some(&container.name));
            Failure::from(error)
        })?;
        if !pull {
            let message = format!("Container image \"{shown}\" already present on machine");
            self.tell(pod, false, "Pulled", message, Some(&container.name));
            return held.ok_or_else(|| Failure::new("ErrImageNeverPull", "the image is gone"));
        }
        let began = Instant::now();
        let _permit = self.pulls.acquire().await;
        self.tell(pod, false, "Pulling", format!("Pulling image \"{shown}\""), Some(&container.name));
        let objects = self.table.objects_of(pod);
        let credentials = image::credentials(&name, pod, &objects);
        let mut pulled = Err(RuntimeError::Refused("no credentials".to_owned()));
        for auth in credentials.into_iter().map(Some).chain([None]) {
            pulled = self.runtime.pull_image(&name, auth).await;
            if pulled.is_ok() {
                break;
            }
        }
        if let Err(error) = pulled {
            let message = format!("failed to pull image \"{shown}\": {error}");
            self.tell(
                pod,
                true,
                "Failed",
                format!("Failed to pull image \"{shown}\": {error}"),
                Some(&container.name),
            );
            self.tell(pod, true, "Failed", "Error: ErrImagePull".to_owned(), Some(&container.name));
            return Err(Failure::new("ErrImagePull", message));
        }
        let message =
            format!("Successfully pulled image \"{shown}\" in {:.3}s", began.elapsed().as_secs_f64());
        self.tell(pod, false, "Pulled", message, Some(&container.name));
        let held = self.runtime.image(&name).await.map_err(unknown)?;
        held.ok_or_else(|| {
            Failure::new("ErrImagePull", format!("image \"{shown}\" is not there after a pull"))
        })
    }

    async fn kill(
        &self,
        context: &Context,
        name: &str,
        id: &str,
        grace: Duration,
        sights: &mut Vec<Sight>,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        let container = spec::container(&context.pod, name);
        let hook = container.and_then(|container| container.lifecycle.as_ref()?.pre_stop.as_ref());
        if let (Some(hook), Some(container)) = (hook, container)
            && !grace.is_zero()
        {
            let ip = context.ips.first().map_or("", String::as_str);
            let target = Target { runtime: &*self.runtime, id, container, pod_ip: ip };
            let ran = tokio::time::timeout(grace, hooks::run(hook, &target, grace)).await;
            if let Ok(Err(error)) = ran {
                let message = format!("PreStopHook failed: {error}");
                self.tell(&context.pod, true, "FailedPreStopHook", message, Some(name));
            }
        }
        let left = grace.saturating_sub(began.elapsed());
        let left = if hook.is_some() { left.max(LEAST_GRACE.min(grace)) } else { left };
        let stopped = self.runtime.stop_container(id, left).await;
        stopped.map_err(|error| Failure::call(KILL_FAILED, &error))?;
        match self.container(context, id, "").await {
            Ok(container) => sights.push(Sight::Container(container)),
            Err(error) => return Err(Failure::call(KILL_FAILED, &error)),
        }
        let (uid, name) = (spec::uid(&context.pod).to_owned(), name.to_owned());
        self.blocking(move |maker| maker.release(&uid, &name)).await;
        Ok(())
    }

    /// Lists everything of a pod.
    async fn look(&self, context: &Context, sights: &mut Vec<Sight>) -> Result<(), Failure> {
        const REASON: &str = "RuntimeUnavailable";
        let uid = spec::uid(&context.pod);
        let failed = |error: RuntimeError| Failure::new(REASON, error);
        let sandboxes = self.runtime.sandboxes().await.map_err(failed)?;
        let containers = self.runtime.containers().await.map_err(failed)?;
        let mut seen = Seen::default();
        for sandbox in
            sandboxes.iter().filter(|sandbox| seen::uid_of(&sandbox.labels, &self.node) == Some(uid))
        {
            match self.runtime.sandbox_status(&sandbox.id).await {
                Ok(status) => seen.sandboxes.push(Sandbox::of(&status)),
                Err(RuntimeError::NotFound(_)) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        for container in
            containers.iter().filter(|container| seen::uid_of(&container.labels, &self.node) == Some(uid))
        {
            match self.container(context, &container.id, &container.pod_sandbox_id).await {
                Ok(container) => seen.containers.push(container),
                Err(RuntimeError::NotFound(_)) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        sights.push(Sight::All { known_before: context.known.clone(), seen });
        Ok(())
    }

    /// A container as it is now. `sandbox`: where it is, empty if that is known already.
    pub(crate) async fn container(
        &self,
        context: &Context,
        id: &str,
        sandbox: &str,
    ) -> Result<Contained, RuntimeError> {
        let status = self.runtime.container_status(id).await?;
        let mut container = Contained::of(&status, sandbox)
            .ok_or_else(|| RuntimeError::NotFound(format!("container {id} is no pod's")))?;
        let uid = spec::uid(&context.pod).to_owned();
        let fallback = spec::container(&context.pod, &container.name)
            .and_then(|spec| spec.termination_message_policy.as_deref())
            == Some("FallbackToLogsOnError");
        let (name, attempt, log) = (container.name.clone(), container.attempt, container.log_path.clone());
        if let State::Exited(exit) = &mut container.state {
            let failed = exit.code != 0;
            let left = self
                .blocking(move |maker| {
                    let message = maker.termination_message(&uid, &name, attempt);
                    message
                        .filter(|message| !message.is_empty())
                        .or_else(|| if fallback && failed { log_end(&log) } else { None })
                })
                .await
                .flatten();
            if let Some(left) = left {
                let before = std::mem::take(&mut exit.message);
                exit.message = if before.is_empty() { left } else { format!("{before}: {left}") };
            }
        }
        Ok(container)
    }
}

/// A hook that runs after the start is given this long.
const HOOK_MAX: Duration = Duration::from_mins(10);

struct Start<'a> {
    container: &'a str,
    sandbox: &'a str,
    sandbox_attempt: u32,
    attempt: u32,
    back_off: Duration,
}

fn ended(reason: &'static str, answer: Result<(), RuntimeError>) -> Result<(), Failure> {
    answer.map_err(|error| Failure::call(reason, &error))
}

/// Makes a folder, and those above it.
async fn folder(path: PathBuf) -> io::Result<()> {
    let made = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&path)
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
    });
    made.await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The end of a container's log, without what the log says of each line.
fn log_end(path: &str) -> Option<String> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    // What stands before a line's text is not counted: twice the bytes hold enough.
    file.seek(SeekFrom::Start(length.saturating_sub(4 * MESSAGE_BYTES))).ok()?;
    let mut bytes = Vec::new();
    file.take(4 * MESSAGE_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    let mut end = lines[lines.len().saturating_sub(MESSAGE_LINES)..].join("\n");
    end.push('\n');
    let most = usize::try_from(MESSAGE_BYTES).unwrap_or(usize::MAX);
    while end.len() > most {
        end.remove(0);
    }
    Some(end)
}
