//! A [`Runtime`] in memory, for tests and simulation: it does what containerd does to states, names and ids, and fails
//! as containerd fails.
//!
//! It is deterministic: ids count up, chance comes from a seed, and time is tokio's, which tests pause. What a container
//! does is told beforehand by its image ([`Fake::script`]); what goes wrong by [`Faults`].
//!
//! Names are reserved as containerd reserves them: a sandbox or container made twice with the same attempt is refused,
//! also where the first answer was lost.

mod state;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use broker::Tasks;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

use self::state::State;
use crate::runtime::{
    Answer, Hint, Runtime, RuntimeError,
    cri::{self, ContainerState, PodSandboxState},
};

/// Nanoseconds since 1970 at which the clock of a fake begins, unless told otherwise: 2026-01-01.
pub const EPOCH_NANOS: i64 = 1_767_225_600_000_000_000;
/// Hints that wait for the agent; more are lost, as they may be.
const HINTS_WAITING_MAX: usize = 256;

/// What a container does once it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Behaviour {
    /// It ends by itself after this long, or never.
    pub runs: Option<Duration>,
    /// Its exit code then.
    pub code: i32,
    /// The kernel ends it then for want of memory.
    pub oom: bool,
    /// How long it takes to end when it is asked to; none: it does not listen, and is killed.
    pub stops_in: Option<Duration>,
    /// It cannot be started, and why.
    pub start_error: Option<String>,
}

impl Behaviour {
    /// It runs until it is asked to end, which it does at once.
    #[must_use]
    pub const fn forever() -> Self {
        Self { runs: None, code: 0, oom: false, stops_in: Some(Duration::ZERO), start_error: None }
    }

    /// It ends by itself.
    #[must_use]
    pub fn ends(after: Duration, code: i32) -> Self {
        Self { runs: Some(after), code, ..Self::forever() }
    }
}

/// What goes wrong, drawn from a seed for every call. Chances are in thousandths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// The call does not reach the runtime.
    pub unreached: u32,
    /// It is done, but the answer is lost.
    pub lost: u32,
    /// It is late, by up to [`Faults::late_by`].
    pub late: u32,
    /// The most that a call is late.
    pub late_by: Duration,
    /// A hint is not given.
    pub hints_lost: u32,
}

/// What is left in the runtime.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Left {
    /// All sandboxes.
    pub sandboxes: usize,
    /// Those that are ready.
    pub sandboxes_ready: usize,
    /// All containers.
    pub containers: usize,
    /// Those that run.
    pub containers_running: usize,
}

/// What containerd knows after a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metadata {
    /// Its disk was kept: sandboxes are not ready, containers have ended and nobody knows how.
    Kept,
    /// Its disk was emptied: there is nothing.
    Lost,
}

type Exec = dyn Fn(&cri::ContainerStatus, &[String]) -> cri::ExecSyncResponse + Send + Sync;

/// See the module's documentation. Clones are the same runtime.
#[derive(Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
    exec: Arc<Mutex<Option<Arc<Exec>>>>,
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl Fake {
    /// A runtime that is up, has no images and gets any image at once. Chance follows from the seed. The clock begins
    /// at `epoch_nanos` since 1970 and goes on with tokio's.
    #[must_use]
    pub fn new(seed: u64, epoch_nanos: i64) -> Self {
        Self {
            state: Arc::new(Mutex::new(State::new(seed, epoch_nanos, Instant::now()))),
            exec: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }

    /// What containers of this image do: each start takes the next, the last one is for all further ones.
    pub fn script(&self, image: &str, behaviours: impl IntoIterator<Item = Behaviour>) {
        self.state().script(image, behaviours.into_iter().collect());
    }

    /// An image that is there without a pull.
    pub fn add_image(&self, name: &str, bytes: u64) {
        self.state().add_image(name, bytes);
    }

    /// Pulls of this image fail with this text from now on; with none they succeed.
    pub fn refuse_pull(&self, name: &str, why: Option<&str>) {
        self.state().refuse_pull(name, why);
    }

    /// What commands in containers answer. Without it they end with 0 and print nothing.
    pub fn on_exec(
        &self,
        answer: impl Fn(&cri::ContainerStatus, &[String]) -> cri::ExecSyncResponse + Send + Sync + 'static,
    ) {
        *self.exec.lock().expect("no panic under this lock") = Some(Arc::new(answer));
    }

    /// Where its streaming server is: a prefix such as `http://127.0.0.1:4000`.
    pub fn stream_at(&self, url: &str) {
        self.state().streaming = Some(url.to_owned());
    }

    /// What goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// The next call of this method fails as if it had been lost after it was done.
    pub fn lose_next(&self, method: &'static str) {
        self.state().lose_next.push(method);
    }

    /// The runtime's own process ends: containers run on, calls fail, hints end.
    pub fn kill(&self) {
        self.state().kill();
    }

    /// It is started again.
    pub fn start(&self) {
        self.state().up = true;
    }

    /// The machine is started anew: nothing runs any more. The runtime is up again.
    pub fn reboot(&self, metadata: Metadata) {
        self.state().reboot(metadata);
    }

    /// A container ends by itself, now. False if it does not run.
    pub fn crash(&self, id: &str, code: i32) -> bool {
        self.state().ended(id, code, false)
    }

    /// A sandbox dies, with all that runs in it. False if it is not ready.
    pub fn crash_sandbox(&self, id: &str) -> bool {
        self.state().stop_sandbox(id)
    }

    /// What is left in it.
    #[must_use]
    pub fn left(&self) -> Left {
        self.state().left()
    }

    /// How often a method of [`Runtime`] was called, whatever came of it.
    #[must_use]
    pub fn calls(&self, method: &str) -> usize {
        self.state().calls.get(method).copied().unwrap_or(0)
    }

    /// How often each method was called.
    #[must_use]
    pub fn all_calls(&self) -> BTreeMap<&'static str, usize> {
        self.state().calls.clone()
    }

    /// One call: it may not reach the state, be late, or be answered by nothing.
    async fn call<T>(
        &self,
        method: &'static str,
        act: impl FnOnce(&mut State) -> Result<T, RuntimeError> + Send,
    ) -> Result<T, RuntimeError> {
        let chance = self.state().admit(method)?;
        if let Some(late) = chance.late {
            sleep(late).await;
        }
        let answer = {
            let mut state = self.state();
            state.reached()?;
            act(&mut state)
        };
        if chance.lost {
            return Err(RuntimeError::Unavailable(format!("the answer to {method} was lost")));
        }
        answer
    }

    /// Ends a container when its time has come.
    fn end_after(&self, id: String, after: Duration, code: i32, oom: bool) {
        let end = Instant::now() + after;
        let state = Arc::clone(&self.state);
        // It ends by itself, at the latest when the test's runtime does.
        Tasks::new().spawn("container of the fake runtime", async move {
            sleep_until(end).await;
            state.lock().expect("no panic under this lock").ended(&id, code, oom);
        });
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self::new(0, EPOCH_NANOS)
    }
}

impl Runtime for Fake {
    fn version(&self) -> Answer<'_, cri::VersionResponse> {
        Box::pin(self.call("version", |_| {
            Ok(cri::VersionResponse {
                version: "0.1.0".to_owned(),
                runtime_name: "fake".to_owned(),
                runtime_version: "1.0.0".to_owned(),
                runtime_api_version: "v1".to_owned(),
            })
        }))
    }

    fn status(&self) -> Answer<'_, cri::RuntimeStatus> {
        let condition = |kind: &str| cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status: true,
            ..cri::RuntimeCondition::default()
        };
        let conditions = vec![condition("RuntimeReady"), condition("NetworkReady")];
        Box::pin(self.call("status", |_| Ok(cri::RuntimeStatus { conditions })))
    }

    fn run_sandbox(&self, config: cri::PodSandboxConfig) -> Answer<'_, String> {
        Box::pin(self.call("run_sandbox", |state| state.run_sandbox(config)))
    }

    fn stop_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("stop_sandbox", |state| {
            state.stop_sandbox(id);
            Ok(())
        }))
    }

    fn remove_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("remove_sandbox", |state| {
            state.remove_sandbox(id);
            Ok(())
        }))
    }

    fn sandbox_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::PodSandboxStatus> {
        Box::pin(self.call("sandbox_status", |state| state.sandbox_status(id)))
    }

    fn sandboxes(&self) -> Answer<'_, Vec<cri::PodSandbox>> {
        Box::pin(self.call("sandboxes", |state| Ok(state.sandboxes())))
    }

    fn create_container<'a>(
        &'a self,
        sandbox: &'a str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Answer<'a, String> {
        let metadata = sandbox_config.metadata.unwrap_or_default();
        Box::pin(
            self.call("create_container", move |state| state.create_container(sandbox, config, &metadata)),
        )
    }

    fn start_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("start_container", |state| {
            let behaviour = state.start_container(id)?;
            if let Some(after) = behaviour.runs {
                self.end_after(id.to_owned(), after, behaviour.code, behaviour.oom);
            }
            Ok(())
        }))
    }

    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> Answer<'a, ()> {
        Box::pin(async move {
            let chance = self.state().admit("stop_container")?;
            // Nothing is held while it ends: another call may shorten the grace.
            let stops_in = {
                let state = self.state();
                state.reached()?;
                state.stops_in(id)
            };
            let (after, code) = match stops_in {
                Some(after) if after <= grace => (after, 143),
                _ => (grace, 137),
            };
            if !after.is_zero() {
                sleep(after).await;
            }
            self.state().ended(id, code, false);
            if chance.lost {
                return Err(RuntimeError::Unavailable("the answer was lost".to_owned()));
            }
            Ok(())
        })
    }

    fn remove_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("remove_container", |state| {
            state.remove_container(id);
            Ok(())
        }))
    }

    fn container_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::ContainerStatus> {
        Box::pin(self.call("container_status", |state| state.container_status(id)))
    }

    fn containers(&self) -> Answer<'_, Vec<cri::Container>> {
        Box::pin(self.call("containers", |state| Ok(state.containers())))
    }

    fn reopen_log<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("reopen_log", |state| {
            state.running(id)?;
            Ok(())
        }))
    }

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        _limit: Duration,
    ) -> Answer<'a, cri::ExecSyncResponse> {
        let exec = self.exec.lock().expect("no panic under this lock").clone();
        Box::pin(self.call("exec_sync", move |state| {
            let status = state.running(id)?;
            Ok(exec.map_or_else(cri::ExecSyncResponse::default, |exec| exec(&status, &command)))
        }))
    }

    fn exec(&self, request: cri::ExecRequest) -> Answer<'_, String> {
        Box::pin(self.call("exec", move |state| {
            state.running(&request.container_id)?;
            state.stream_url("exec", &request.container_id)
        }))
    }

    fn attach(&self, request: cri::AttachRequest) -> Answer<'_, String> {
        Box::pin(self.call("attach", move |state| {
            state.running(&request.container_id)?;
            state.stream_url("attach", &request.container_id)
        }))
    }

    fn port_forward(&self, request: cri::PortForwardRequest) -> Answer<'_, String> {
        Box::pin(self.call("port_forward", move |state| {
            let status = state.sandbox_status(&request.pod_sandbox_id)?;
            if status.state() != PodSandboxState::SandboxReady {
                let id = request.pod_sandbox_id;
                return Err(RuntimeError::Refused(format!("sandbox container {id:?} is not running")));
            }
            state.stream_url("portforward", &request.pod_sandbox_id)
        }))
    }

    fn container_stats(&self) -> Answer<'_, Vec<cri::ContainerStats>> {
        Box::pin(self.call("container_stats", |state| Ok(state.stats())))
    }

    fn hints(&self) -> Answer<'_, mpsc::Receiver<Hint>> {
        Box::pin(self.call("hints", |state| {
            let (sender, receiver) = mpsc::channel(HINTS_WAITING_MAX);
            state.hints.push(sender);
            Ok(receiver)
        }))
    }

    fn images(&self) -> Answer<'_, Vec<cri::Image>> {
        Box::pin(self.call("images", |state| Ok(state.images())))
    }

    fn image<'a>(&'a self, name: &'a str) -> Answer<'a, Option<cri::Image>> {
        Box::pin(self.call("image", |state| Ok(state.image(name))))
    }

    fn pull_image<'a>(&'a self, name: &'a str, _auth: Option<cri::AuthConfig>) -> Answer<'a, String> {
        Box::pin(self.call("pull_image", |state| state.pull(name)))
    }

    fn remove_image<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        Box::pin(self.call("remove_image", |state| {
            state.remove_image(name);
            Ok(())
        }))
    }

    fn image_disks(&self) -> Answer<'_, Vec<cri::FilesystemUsage>> {
        Box::pin(self.call("image_disks", |state| Ok(vec![state.image_disk()])))
    }
}

/// True of a container that was made or runs: it can be ended.
fn lives(state: ContainerState) -> bool {
    matches!(state, ContainerState::ContainerCreated | ContainerState::ContainerRunning)
}

#[cfg(test)]
mod tests;
