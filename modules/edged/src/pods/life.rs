//! A pod's life: what to do next, from what is wanted and what the runtime shows.
//!
//! Sans-IO and level-triggered: [`Life::step`] looks at everything anew and says what to do that is not under way
//! yet. Whoever performs an action says [`Life::done`], after it has told what it saw. Each action has a [`Key`];
//! of one key one action is under way at a time.
//!
//! What must outlive the process stands in the runtime (attempts, back-off, how containers ended) or in the
//! status that was written last; the rest may be forgotten.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};

use super::{
    backoff,
    seen::{Contained, Exit, Seen, State},
    spec::{self, RestartPolicy},
};

/// The time at one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Now {
    /// Of this process, monotonic.
    pub(crate) mono: Duration,
    /// Nanoseconds since 1970.
    pub(crate) wall: i64,
}

/// What an action concerns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Volumes,
    Sandbox,
    Container(String),
    /// Removal of what ended and is not needed.
    Tidy,
    Look,
    Forget,
}

/// Do something, and say when it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make folders and volumes. Idempotent.
    SetUp,
    /// Take changed objects over into volumes.
    Refresh,
    /// Unmount and remove volumes. Idempotent.
    TearDown,
    RunSandbox {
        attempt: u32,
    },
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    /// Get the image, make the container, start it, run its hook.
    Start {
        container: String,
        sandbox: String,
        sandbox_attempt: u32,
        attempt: u32,
        back_off: Duration,
    },
    /// Run the hook, ask it to end, and kill it after the grace period. Takes the place of an action of the same
    /// key that is under way.
    Kill {
        container: String,
        id: String,
        grace: Duration,
    },
    RemoveContainer {
        id: String,
    },
    /// End the action of this key wherever it is.
    Cancel(Key),
    /// List everything of this pod: something was asked for whose answer is unknown.
    Look,
    /// Remove the last of it: logs, folder, status.
    Forget,
}

/// What became of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Failed {
        /// As a status shows it: `ErrImagePull`, `CreateContainerConfigError`, ...
        reason: &'static str,
        message: String,
        /// It may have happened all the same.
        unsure: bool,
    },
    /// It was ended before its end: it may have happened.
    Cancelled,
}

/// Something to tell as an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Notice {
    pub(crate) warning: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    /// Of which container.
    pub(crate) container: Option<String>,
}

/// What a step says.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// In order.
    pub(crate) actions: Vec<(Key, Action)>,
    pub(crate) notices: Vec<Notice>,
    /// Step again at this monotonic time, if nothing happens before.
    pub(crate) wake: Option<Duration>,
}

impl Step {
    fn wake_at(&mut self, at: Duration) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// A terminal phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) succeeded: bool,
    pub(crate) reason: Option<String>,
    pub(crate) message: Option<String>,
    /// It never ran here.
    pub(crate) rejected: bool,
}

/// An action under way.
#[derive(Debug)]
struct Flight {
    action: Action,
    /// Of a kill: when it ends at the latest.
    by: Duration,
    cancelled: bool,
}

/// Why an action of this key did not succeed, until one does.
#[derive(Debug, Clone)]
pub(crate) struct Trouble {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) since: Duration,
    delay: Duration,
    retry_at: Duration,
}

/// What probes say of a running container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Checks {
    /// Its startup probe passed, or it has none.
    pub(crate) started: bool,
    /// Its readiness probe passed last, or it has none.
    pub(crate) ready: bool,
    /// A probe says that it must be restarted; the grace period that this probe asks for.
    pub(crate) condemned: Option<Condemned>,
}

/// Why a container must be restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condemned {
    /// `liveness` or `startup`.
    pub(crate) probe: &'static str,
    pub(crate) grace: Option<Duration>,
}

/// What a probe says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Probed {
    Started,
    Ready(bool),
    Condemned(Condemned),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mounted {
    /// This process has not looked yet.
    Unknown,
    Up,
    Down,
}

#[derive(Debug)]
struct Ending {
    grace: Duration,
    by: Duration,
}

/// An image that could not be pulled is shown as such for so long, then as waited for.
pub(crate) const PULL_SHOWN: Duration = Duration::from_secs(3);
/// The least that a container gets to end once the grace period is over.
const LEAST_GRACE: Duration = Duration::from_secs(2);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Life {
    pub(super) pod: Arc<Pod>,
    pub(super) seen: Seen,
    pub(super) verdict: Option<Verdict>,
    /// Nanoseconds since 1970.
    pub(super) started_at: i64,
    /// As it was written last, before this process.
    pub(super) prior: PodStatus,
    pub(super) troubles: BTreeMap<Key, Trouble>,
    pub(super) checks: HashMap<String, Checks>,
    /// The object is gone.
    gone: bool,
    mounted: Mounted,
    flights: BTreeMap<Key, Flight>,
    /// When an ended instance may be followed by the next.
    anchors: HashMap<String, Duration>,
    /// Sandboxes whose network is released.
    stopped: BTreeSet<String>,
    /// Containers that are restarted whatever the policy says: their specification changed.
    renewed: BTreeSet<String>,
    ending: Option<Ending>,
    deadline: Option<Duration>,
    unsure: bool,
    /// Objects that its volumes show have changed.
    stale: bool,
    notices: Vec<Notice>,
    told_back_off: BTreeSet<String>,
    finished: bool,
    forgotten: bool,
}

impl Life {
    /// The life of a pod from what there is of it: what the runtime shows, and the status written last.
    pub(crate) fn new(now: Now, pod: Arc<Pod>, seen: Seen, prior: PodStatus) -> Self {
        let started_at = prior.start_time.as_ref().map_or(now.wall, |time| nanos(time.0.as_second()));
        let verdict = match prior.phase.as_deref() {
            Some(phase @ ("Succeeded" | "Failed")) => Some(Verdict {
                succeeded: phase == "Succeeded",
                reason: prior.reason.clone(),
                message: prior.message.clone(),
                rejected: prior.container_statuses.as_ref().is_none_or(Vec::is_empty),
            }),
            _ => None,
        };
        let mut life = Self {
            deadline: deadline(now, &pod, started_at),
            pod,
            seen,
            verdict,
            started_at,
            prior,
            troubles: BTreeMap::new(),
            checks: HashMap::new(),
            gone: false,
            mounted: Mounted::Unknown,
            flights: BTreeMap::new(),
            anchors: HashMap::new(),
            stopped: BTreeSet::new(),
            renewed: BTreeSet::new(),
            ending: None,
            unsure: false,
            stale: false,
            notices: Vec::new(),
            told_back_off: BTreeSet::new(),
            finished: false,
            forgotten: false,
        };
        life.resume_checks();
        life
    }

    /// The object changed.
    pub(crate) fn set_pod(&mut self, now: Now, pod: Arc<Pod>) {
        self.pod = pod;
        self.deadline = deadline(now, &self.pod, self.started_at);
        self.retry_now();
    }

    /// The object is gone: end and remove everything.
    pub(crate) fn set_gone(&mut self) {
        self.gone = true;
        self.finished = false;
    }

    /// It must not run here.
    pub(crate) fn reject(&mut self, reason: &str, message: &str) {
        if self.verdict.is_none() {
            self.notices.push(Notice {
                warning: true,
                reason: "Failed",
                message: format!("{reason}: {message}"),
                container: None,
            });
            self.verdict = Some(Verdict {
                succeeded: false,
                reason: Some(reason.to_owned()),
                message: Some(message.to_owned()),
                rejected: true,
            });
        }
    }

    /// An object that this pod uses changed: volumes show it, and what waited for it is tried again at once.
    pub(crate) fn objects_changed(&mut self) {
        self.stale = true;
        self.retry_now();
    }

    fn retry_now(&mut self) {
        for trouble in self.troubles.values_mut() {
            if matches!(trouble.reason, "FailedMount" | "CreateContainerConfigError") {
                trouble.retry_at = Duration::ZERO;
            }
        }
    }

    /// Everything that the runtime showed.
    pub(crate) fn seen_mut(&mut self) -> &mut Seen {
        &mut self.seen
    }

    pub(crate) fn seen(&self) -> &Seen {
        &self.seen
    }

    pub(crate) fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }

    /// A probe of this instance changed its mind.
    pub(crate) fn probed(&mut self, id: &str, probed: Probed) {
        let Some(container) = self.seen.containers.iter().find(|container| container.id == id) else {
            return;
        };
        let name = container.name.clone();
        let checks = self.checks.entry(id.to_owned()).or_insert_with(|| initial(&self.pod, &name));
        match probed {
            Probed::Started => checks.started = true,
            Probed::Ready(ready) => checks.ready = ready,
            Probed::Condemned(condemned) => checks.condemned = Some(condemned),
        }
    }

    /// The runtime may show something else than was seen: list it.
    pub(crate) fn look(&mut self) {
        self.unsure = true;
    }

    /// Something became of this container or sandbox.
    pub(crate) fn changed(&mut self, id: &str) {
        let sandbox = self.seen.sandboxes.iter().any(|sandbox| sandbox.id == id);
        // What becomes of a container by an action is told with that.
        let container = self.seen.containers.iter().find(|container| container.id == id);
        let ended = container.is_some_and(|held| matches!(held.state, State::Exited(_)));
        self.unsure |= sandbox || container.is_some() && !ended;
    }

    /// Nanoseconds since 1970.
    pub(crate) fn started_at(&self) -> i64 {
        self.started_at
    }

    /// What probes say of this instance.
    pub(crate) fn checks(&self, container: &Contained) -> Checks {
        self.checks.get(&container.id).cloned().unwrap_or_else(|| initial(&self.pod, &container.name))
    }

    /// True once nothing of it is left running or mounted, and it will never be started again.
    pub(crate) fn is_finished(&self) -> bool {
        self.finished
    }

    /// True once nothing at all is left of it.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.forgotten
    }

    /// Its containers are to end, or have.
    pub(crate) fn is_ending(&self) -> bool {
        self.gone || self.verdict.is_some() || spec::is_deleted(&self.pod)
    }

    /// An action of this key is under way.
    pub(crate) fn is_busy(&self, key: &Key) -> bool {
        self.flights.contains_key(key)
    }

    /// The start of this container is under way.
    pub(super) fn is_starting(&self, container: &str) -> bool {
        let flight = self.flights.get(&Key::Container(container.to_owned()));
        flight.is_some_and(|flight| matches!(flight.action, Action::Start { .. }))
    }

    /// The sandbox that containers are made in.
    pub(super) fn sandbox(&self) -> Option<&super::seen::Sandbox> {
        self.seen.newest_sandbox().filter(|sandbox| sandbox.ready)
    }

    /// What became of an action. Everything that it saw was merged before.
    pub(crate) fn done(&mut self, now: Now, key: Key, outcome: Outcome) {
        let Some(flight) = self.flights.remove(&key) else { return };
        match outcome {
            Outcome::Done => {
                self.troubles.remove(&key);
                match flight.action {
                    Action::SetUp => self.mounted = Mounted::Up,
                    Action::TearDown => self.mounted = Mounted::Down,
                    Action::StopSandbox { id } => {
                        // Containers that it ended are seen by looking.
                        let ran = |held: &Contained| held.sandbox == id && held.is_running();
                        self.unsure |= self.seen.containers.iter().any(ran);
                        if let Some(held) = self.seen.sandboxes.iter_mut().find(|held| held.id == id) {
                            held.ready = false;
                        }
                        self.stopped.insert(id);
                    }
                    Action::RemoveSandbox { id } | Action::RemoveContainer { id } => self.seen.remove(&id),
                    Action::Forget => self.forgotten = true,
                    Action::Refresh
                    | Action::Look
                    | Action::RunSandbox { .. }
                    | Action::Start { .. }
                    | Action::Kill { .. }
                    | Action::Cancel(_) => {}
                }
            }
            Outcome::Failed { reason, message, unsure } => {
                self.unsure |= unsure || key == Key::Look;
                let delay = self.troubles.get(&key).map_or(Duration::ZERO, |trouble| trouble.delay);
                let (first, longest) = pace(&key, reason);
                let delay = backoff::doubled(delay, first, longest);
                let retry_at = now.mono + delay;
                self.troubles.insert(key, Trouble { reason, message, since: now.mono, delay, retry_at });
            }
            Outcome::Cancelled => self.unsure = true,
        }
    }

    /// Looks at everything anew.
    pub(crate) fn step(&mut self, now: Now) -> Step {
        let mut step = Step::default();
        if self.forgotten {
            return step;
        }
        self.checks.retain(|id, _| self.seen.containers.iter().any(|container| container.id == *id));
        self.anchors.retain(|id, _| self.seen.containers.iter().any(|container| container.id == *id));
        self.judge(now, &mut step);
        if self.unsure && !self.is_busy(&Key::Look) {
            self.want(now, &mut step, Key::Look, Action::Look);
            // What happens from now on, that list may not show.
            self.unsure = !self.is_busy(&Key::Look);
        }
        if self.is_ending() {
            self.end(now, &mut step);
        } else {
            self.ending = None;
            self.run(now, &mut step);
        }
        step.notices = std::mem::take(&mut self.notices);
        step
    }

    /// What was seen may not be what there is.
    fn is_unsure(&self) -> bool {
        self.unsure || self.is_busy(&Key::Look)
    }

    /// Whether it has come to a terminal phase.
    fn judge(&mut self, now: Now, step: &mut Step) {
        if self.verdict.is_some() || self.gone {
            return;
        }
        if let Some(deadline) = self.deadline {
            if now.mono >= deadline {
                let message = "Pod was active on the node longer than the specified deadline".to_owned();
                self.notices.push(Notice {
                    warning: false,
                    reason: "DeadlineExceeded",
                    message: message.clone(),
                    container: None,
                });
                self.verdict = Some(Verdict {
                    succeeded: false,
                    reason: Some("DeadlineExceeded".to_owned()),
                    message: Some(message),
                    rejected: false,
                });
                return;
            }
            step.wake_at(deadline);
        }
        if self.is_unsure() || spec::is_deleted(&self.pod) {
            return;
        }
        let pod = Arc::clone(&self.pod);
        let never = spec::restart_policy(&pod) == RestartPolicy::Never;
        let failed_for_good = |container: &Container| {
            let exit = self.seen.latest(&container.name).and_then(Contained::exit);
            !spec::is_sidecar(container) && exit.is_some_and(|exit| exit.code != 0)
        };
        let over = |container: &Container| {
            !self.is_busy(&Key::Container(container.name.clone())) && self.is_over(container)
        };
        // A pod that is never restarted does not get another sandbox once anything ran in one.
        let bereft = never
            && !self.is_busy(&Key::Sandbox)
            && self.seen.newest_sandbox().is_some_and(|sandbox| !sandbox.ready)
            && !self.seen.containers.is_empty()
            && self.seen.containers.iter().all(|container| !container.is_running());
        let succeeded = if never && spec::inits(&pod).any(failed_for_good) {
            false
        } else if spec::regulars(&pod).all(over) {
            spec::regulars(&pod).all(|container| {
                self.seen.latest(&container.name).and_then(Contained::exit).is_some_and(|exit| exit.code == 0)
            })
        } else if bereft {
            false
        } else {
            return;
        };
        self.verdict = Some(Verdict { succeeded, reason: None, message: None, rejected: false });
    }

    /// It has ended and is not started again.
    fn is_over(&self, container: &Container) -> bool {
        let exit = self.seen.latest(&container.name).and_then(Contained::exit);
        exit.is_some_and(|exit| !self.restarts(container, exit))
    }

    fn restarts(&self, container: &Container, exit: &Exit) -> bool {
        if spec::is_sidecar(container) || self.renewed.contains(&container.name) {
            return true;
        }
        let init = spec::inits(&self.pod).any(|init| init.name == container.name);
        match spec::restart_policy(&self.pod) {
            RestartPolicy::Always => !init || exit.code != 0,
            RestartPolicy::OnFailure => exit.code != 0,
            RestartPolicy::Never => false,
        }
    }

    fn run(&mut self, now: Now, step: &mut Step) {
        if self.mounted != Mounted::Up {
            self.stale = false;
            return self.want(now, step, Key::Volumes, Action::SetUp);
        }
        if self.stale && !self.is_busy(&Key::Volumes) {
            self.stale = false;
            self.want(now, step, Key::Volumes, Action::Refresh);
        }
        if self.is_unsure() {
            return;
        }
        let Some(sandbox) = self.have_sandbox(now, step) else { return };
        if self.initialize(now, step, &sandbox) {
            let pod = Arc::clone(&self.pod);
            for container in spec::regulars(&pod) {
                self.tend(now, step, &sandbox, container);
            }
        }
        self.tidy(now, step, &sandbox);
    }

    /// The sandbox that is ready, or sees to it that one will be.
    fn have_sandbox(&mut self, now: Now, step: &mut Step) -> Option<String> {
        let Some(newest) = self.seen.newest_sandbox() else {
            self.want(now, step, Key::Sandbox, Action::RunSandbox { attempt: 0 });
            return None;
        };
        let (id, attempt) = (newest.id.clone(), newest.attempt);
        if newest.ready {
            return Some(id);
        }
        if !self.stopped.contains(&id) {
            if !self.is_busy(&Key::Sandbox) {
                self.notices.push(Notice {
                    warning: false,
                    reason: "SandboxChanged",
                    message: "Pod sandbox changed, it will be killed and re-created.".to_owned(),
                    container: None,
                });
            }
            self.want(now, step, Key::Sandbox, Action::StopSandbox { id });
            return None;
        }
        self.want(now, step, Key::Sandbox, Action::RunSandbox { attempt: attempt + 1 });
        None
    }

    /// Sees to init containers in order. True once all have succeeded and sidecars have started.
    fn initialize(&mut self, now: Now, step: &mut Step, sandbox: &str) -> bool {
        let pod = Arc::clone(&self.pod);
        let was_initialized = self.was_initialized(sandbox);
        for init in spec::inits(&pod) {
            if spec::is_sidecar(init) {
                self.tend(now, step, sandbox, init);
                if !was_initialized && !self.has_started(sandbox, &init.name) {
                    return false;
                }
            } else if !was_initialized {
                let latest = self.seen.latest_in(sandbox, &init.name);
                if latest.and_then(Contained::exit).is_some_and(|exit| exit.code == 0) {
                    continue;
                }
                self.tend_init(now, step, sandbox, init);
                return false;
            }
        }
        true
    }

    /// Any of the containers that come after initialization has been in this sandbox.
    pub(super) fn was_initialized(&self, sandbox: &str) -> bool {
        spec::regulars(&self.pod).any(|container| self.seen.latest_in(sandbox, &container.name).is_some())
    }

    /// It runs, its hook has ended, and its startup probe has passed.
    pub(super) fn has_started(&self, sandbox: &str, name: &str) -> bool {
        let running = self.seen.latest_in(sandbox, name).filter(|container| container.is_running());
        running.is_some_and(|container| self.checks(container).started) && !self.is_starting(name)
    }

    /// As [`tend`](Self::tend), of an init container that has not succeeded in this sandbox: it runs again there
    /// although it may have succeeded in an earlier one.
    fn tend_init(&mut self, now: Now, step: &mut Step, sandbox: &str, init: &Container) {
        let here = self.seen.latest_in(sandbox, &init.name).cloned();
        match here.as_ref().map(|container| &container.state) {
            None | Some(State::Exited(_)) => self.start(now, step, sandbox, init),
            Some(_) => self.tend(now, step, sandbox, init),
        }
    }

    /// Starts it, restarts it, or ends it for a restart, as is due.
    fn tend(&mut self, now: Now, step: &mut Step, sandbox: &str, container: &Container) {
        let key = Key::Container(container.name.clone());
        let Some(here) = self.seen.latest_in(sandbox, &container.name).cloned() else {
            // It may have run in an earlier sandbox, and be over.
            if !self.is_over(container) {
                self.start(now, step, sandbox, container);
            }
            return;
        };
        match &here.state {
            State::Exited(exit) => {
                if self.restarts(container, exit) {
                    self.start(now, step, sandbox, container);
                }
            }
            State::Created => {
                if !self.is_busy(&key) {
                    self.want(now, step, key, Action::RemoveContainer { id: here.id });
                }
            }
            State::Unknown => self.kill(now, step, &here, now.mono + LEAST_GRACE, None),
            State::Running { .. } if self.is_busy(&key) => {}
            State::Running { .. } => {
                let grace = spec::grace(&self.pod);
                if !here.spec.is_empty() && here.spec != spec::mark(container) {
                    self.renewed.insert(container.name.clone());
                    let why = format!("Container {} definition changed, will be restarted", container.name);
                    self.kill(now, step, &here, now.mono + grace, Some(why));
                } else if let Some(condemned) = self.checks(&here).condemned {
                    let why = format!(
                        "Container {} failed {} probe, will be restarted",
                        container.name, condemned.probe
                    );
                    self.kill(now, step, &here, now.mono + condemned.grace.unwrap_or(grace), Some(why));
                }
            }
        }
    }

    /// Starts the next instance, once it may be.
    fn start(&mut self, now: Now, step: &mut Step, sandbox: &str, container: &Container) {
        let key = Key::Container(container.name.clone());
        if self.is_busy(&key) {
            return;
        }
        let latest = self.seen.latest(&container.name).cloned();
        if let Some((ended, exit)) = latest.as_ref().and_then(|ended| Some((ended, ended.exit()?)))
            && !self.renewed.contains(&container.name)
        {
            let at = self.may_follow(now, ended, exit);
            if now.mono < at {
                step.wake_at(at);
                if self.told_back_off.insert(ended.id.clone()) {
                    let message = format!(
                        "Back-off restarting failed container {} in pod {}_{}({})",
                        container.name,
                        spec::name(&self.pod),
                        spec::namespace(&self.pod),
                        spec::uid(&self.pod)
                    );
                    self.notices.push(Notice {
                        warning: true,
                        reason: "BackOff",
                        message,
                        container: Some(container.name.clone()),
                    });
                }
                return;
            }
        }
        let attempt = self.next_attempt(&container.name);
        let back_off = backoff::noted_after(latest.as_ref());
        let sandbox_attempt = self.seen.newest_sandbox().map_or(0, |sandbox| sandbox.attempt);
        let action = Action::Start {
            container: container.name.clone(),
            sandbox: sandbox.to_owned(),
            sandbox_attempt,
            attempt,
            back_off,
        };
        self.want(now, step, key, action);
    }

    /// The monotonic time from which on an ended instance may be followed by the next. A wall clock that went
    /// back prolongs no wait.
    fn may_follow(&mut self, now: Now, ended: &Contained, exit: &Exit) -> Duration {
        if let Some(at) = self.anchors.get(&ended.id) {
            return *at;
        }
        let delay = backoff::delay_after(ended, exit);
        let since = Duration::from_nanos(now.wall.saturating_sub(exit.finished_at).max(0).unsigned_abs());
        let at = now.mono + delay.saturating_sub(since);
        self.anchors.insert(ended.id.clone(), at);
        at
    }

    /// While a restart is waited for: for how long after the end.
    pub(super) fn waits(&self, now: Now, ended: &Contained) -> Option<Duration> {
        let at = self.anchors.get(&ended.id)?;
        (now.mono < *at).then_some(ended.back_off)
    }

    fn next_attempt(&self, name: &str) -> u32 {
        let seen = self.seen.latest(name).map(|container| match container.state {
            State::Created => container.attempt,
            _ => container.attempt + 1,
        });
        let told = || {
            let status = super::status::prior_of(&self.prior, name)?;
            let count = u32::try_from(status.restart_count).ok()?;
            Some(if status.container_id.is_some() { count + 1 } else { count })
        };
        seen.or_else(told).unwrap_or(0)
    }

    /// Ends an instance at this time at the latest.
    fn kill(&mut self, now: Now, step: &mut Step, container: &Contained, by: Duration, why: Option<String>) {
        let key = Key::Container(container.name.clone());
        if let Some(flight) = self.flights.get(&key) {
            let kills_it = matches!(&flight.action, Action::Kill { id, .. } if *id == container.id);
            let slower = kills_it && by + Duration::from_millis(100) < flight.by;
            if !slower {
                return;
            }
        } else {
            if let Some(trouble) = self.troubles.get(&key).filter(|trouble| trouble.reason == KILL_FAILED)
                && now.mono < trouble.retry_at
            {
                return step.wake_at(trouble.retry_at);
            }
            let message = why.unwrap_or_else(|| format!("Stopping container {}", container.name));
            let container = Some(container.name.clone());
            self.notices.push(Notice { warning: false, reason: "Killing", message, container });
        }
        let grace = by.saturating_sub(now.mono);
        let action = Action::Kill { container: container.name.clone(), id: container.id.clone(), grace };
        self.flights.insert(key.clone(), Flight { action: action.clone(), by, cancelled: false });
        step.actions.push((key, action));
    }

    /// Has an action done, unless one of its key is under way or failed a moment ago.
    fn want(&mut self, now: Now, step: &mut Step, key: Key, action: Action) {
        if self.is_busy(&key) {
            return;
        }
        if let Some(trouble) = self.troubles.get(&key) {
            if trouble.reason == "ErrImagePull" && now.mono < trouble.since + PULL_SHOWN {
                step.wake_at(trouble.since + PULL_SHOWN); // to be shown as waited for
            }
            if now.mono < trouble.retry_at {
                return step.wake_at(trouble.retry_at);
            }
        }
        if let Action::Start { container, .. } = &action {
            self.renewed.remove(container);
        }
        self.flights
            .insert(key.clone(), Flight { action: action.clone(), by: Duration::MAX, cancelled: false });
        step.actions.push((key, action));
    }

    /// Removes what ended and is not needed: of each container all but the last that ended, and older sandboxes.
    fn tidy(&mut self, now: Now, step: &mut Step, current: &str) {
        let surplus = self.seen.containers.iter().find(|container| {
            let newer = |other: &Contained| {
                other.exit().is_some()
                    && (other.attempt, other.created_at) > (container.attempt, container.created_at)
            };
            let ended = matches!(container.state, State::Exited(_) | State::Created);
            let forsaken = container.sandbox != current && matches!(container.state, State::Created);
            let busy = self.is_busy(&Key::Container(container.name.clone()));
            ended && !busy && (forsaken || self.seen.of_name(&container.name).any(newer))
        });
        if let Some(container) = surplus {
            let id = container.id.clone();
            return self.want(now, step, Key::Tidy, Action::RemoveContainer { id });
        }
        let older = self.seen.sandboxes.iter().find(|sandbox| {
            let used = |container: &Contained| container.sandbox == sandbox.id;
            sandbox.id != current && (sandbox.ready || !self.seen.containers.iter().any(used))
        });
        if let Some(sandbox) = older {
            let id = sandbox.id.clone();
            let action =
                if sandbox.ready { Action::StopSandbox { id } } else { Action::RemoveSandbox { id } };
            self.want(now, step, Key::Tidy, action);
        }
    }

    /// Ends everything: containers, then sidecars in reverse order, network, volumes.
    fn end(&mut self, now: Now, step: &mut Step) {
        self.cancel_starts(step);
        let pod = Arc::clone(&self.pod);
        let by = self.end_by(now);
        let is_sidecar = |container: &Contained| spec::is_sidecar_name(&pod, &container.name);
        let running: Vec<Contained> =
            self.seen.containers.iter().filter(|container| container.is_running()).cloned().collect();
        let (sidecars, others): (Vec<_>, Vec<_>) =
            running.iter().partition(|container| is_sidecar(container));
        for container in &others {
            self.kill(now, step, container, by, None);
        }
        if others.is_empty() {
            let last = spec::inits(&pod)
                .rev()
                .find_map(|init| sidecars.iter().find(|container| container.name == init.name));
            let by = by.max(now.mono + LEAST_GRACE);
            for container in last.or_else(|| sidecars.first()).into_iter() {
                if !self.is_busy(&Key::Container(container.name.clone())) {
                    self.kill(now, step, container, by, None);
                }
            }
        }
        let busy = self.flights.keys().any(|key| matches!(key, Key::Container(_) | Key::Sandbox | Key::Tidy));
        if !running.is_empty() || busy || self.is_unsure() {
            return;
        }
        let unstopped = self.seen.sandboxes.iter().find(|sandbox| !self.stopped.contains(&sandbox.id));
        if let Some(sandbox) = unstopped {
            let id = sandbox.id.clone();
            return self.want(now, step, Key::Sandbox, Action::StopSandbox { id });
        }
        if self.mounted != Mounted::Down {
            return self.want(now, step, Key::Volumes, Action::TearDown);
        }
        self.finished = true;
        if self.verdict.is_none() && !self.gone {
            self.verdict = Some(self.verdict_of_deleted());
        }
        if self.gone {
            self.forget(now, step);
        }
    }

    /// Removes what is left of a pod that has ended and whose object is gone.
    fn forget(&mut self, now: Now, step: &mut Step) {
        if let Some(sandbox) = self.seen.sandboxes.first() {
            let id = sandbox.id.clone();
            return self.want(now, step, Key::Sandbox, Action::RemoveSandbox { id });
        }
        if let Some(container) = self.seen.containers.first() {
            let id = container.id.clone();
            return self.want(now, step, Key::Tidy, Action::RemoveContainer { id });
        }
        self.want(now, step, Key::Forget, Action::Forget);
    }

    fn verdict_of_deleted(&self) -> Verdict {
        let failed = spec::regulars(&self.pod).any(|container| {
            self.seen.latest(&container.name).and_then(Contained::exit).is_none_or(|exit| exit.code != 0)
        });
        Verdict { succeeded: !failed, reason: None, message: None, rejected: false }
    }

    /// Starts that are under way are of no use any more.
    fn cancel_starts(&mut self, step: &mut Step) {
        for (key, flight) in &mut self.flights {
            if matches!(flight.action, Action::Start { .. }) && !flight.cancelled {
                flight.cancelled = true;
                step.actions.push((key.clone(), Action::Cancel(key.clone())));
            }
        }
    }

    /// When containers have ended at the latest. A grace period that is shortened counts from then.
    fn end_by(&mut self, now: Now) -> Duration {
        let deleted = self.gone || spec::is_deleted(&self.pod);
        let grace = if deleted { spec::deletion_grace(&self.pod) } else { spec::grace(&self.pod) };
        let ending = self.ending.get_or_insert(Ending { grace, by: now.mono + grace });
        if grace < ending.grace {
            *ending = Ending { grace, by: ending.by.min(now.mono + grace) };
        }
        ending.by
    }

    /// A container that runs since before this process is as ready as it was said to be.
    fn resume_checks(&mut self) {
        for container in self.seen.containers.iter().filter(|container| container.is_running()) {
            let told = super::status::prior_of(&self.prior, &container.name);
            let same = |id: &String| id.ends_with(&format!("//{}", container.id));
            let told = told.filter(|status| status.container_id.as_ref().is_some_and(same));
            let mut checks = initial(&self.pod, &container.name);
            if let Some(told) = told {
                checks.started |= told.started == Some(true);
                checks.ready |= told.ready;
            }
            self.checks.insert(container.id.clone(), checks);
        }
    }
}

/// A kill that failed is tried again, after a moment.
pub(crate) const KILL_FAILED: &str = "KillContainerError";

fn initial(pod: &Pod, name: &str) -> Checks {
    let container = spec::container(pod, name);
    Checks {
        started: container.is_none_or(|container| container.startup_probe.is_none()),
        ready: container.is_none_or(|container| container.readiness_probe.is_none()),
        condemned: None,
    }
}

/// The first and the longest delay before an action is tried again.
fn pace(key: &Key, reason: &str) -> (Duration, Duration) {
    let seconds = Duration::from_secs;
    match (key, reason) {
        (_, "ErrImagePull" | "ErrImageNeverPull" | "InvalidImageName") => (seconds(10), seconds(300)),
        (Key::Volumes, _) => (Duration::from_millis(500), seconds(122)),
        (Key::Look, _) => (seconds(1), seconds(10)),
        (Key::Container(_), "CreateContainerConfigError") => (seconds(2), seconds(30)),
        _ => (seconds(1), seconds(30)),
    }
}

fn deadline(now: Now, pod: &Pod, started_at: i64) -> Option<Duration> {
    let active = spec::active_deadline(pod)?;
    let since = Duration::from_nanos(now.wall.saturating_sub(started_at).max(0).unsigned_abs());
    Some(now.mono + active.saturating_sub(since))
}

fn nanos(seconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000)
}

#[cfg(test)]
mod tests;
