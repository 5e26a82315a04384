//! What is said of a pod, in kubelet's words.

use k8s_openapi::{
    api::core::v1::{
        Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
        ContainerStatus, HostIP, PodCondition, PodIP, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};

use super::{
    life::{Key, Life, Now, PULL_SHOWN},
    seen::{Contained, State},
    spec::{self, RestartPolicy},
};

/// What does not come from the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Addresses of this node.
    pub(crate) host_ips: Vec<String>,
    /// Name of the runtime, as it stands before container ids.
    pub(crate) runtime: String,
    /// Class of quality of service.
    pub(crate) qos: &'static str,
}

/// Of a time in nanoseconds since 1970, to the second: the API knows no finer.
pub(crate) fn time(nanos: i64) -> Time {
    Time(Timestamp::from_second(nanos.div_euclid(1_000_000_000)).unwrap_or_default())
}

/// What a status says of a container.
pub(crate) fn prior_of<'a>(status: &'a PodStatus, name: &str) -> Option<&'a ContainerStatus> {
    let regular = status.container_statuses.iter().flatten();
    regular.chain(status.init_container_statuses.iter().flatten()).find(|container| container.name == name)
}

impl Life {
    /// The pod's status now. Conditions that did not change since `before` keep their time.
    pub(crate) fn status(&self, now: Now, facts: &Facts, before: &PodStatus) -> PodStatus {
        let rejected = self.verdict.as_ref().is_some_and(|verdict| verdict.rejected);
        let pod = &self.pod;
        let initialized = self.is_initialized();
        let of = |container: &Container, init: bool| {
            self.container_status(now, facts, container, init, initialized)
        };
        let regular: Vec<ContainerStatus> =
            spec::regulars(pod).filter(|_| !rejected).map(|container| of(container, false)).collect();
        let init: Vec<ContainerStatus> =
            spec::inits(pod).filter(|_| !rejected).map(|container| of(container, true)).collect();
        let phase = self.phase(&regular, &init);
        let ips = self.ips(facts);
        PodStatus {
            conditions: Some(self.conditions(now, phase, &regular, initialized, before)),
            message: self.verdict.as_ref().and_then(|verdict| verdict.message.clone()),
            reason: self.verdict.as_ref().and_then(|verdict| verdict.reason.clone()),
            phase: Some(phase.to_owned()),
            host_ip: facts.host_ips.first().cloned(),
            host_ips: listed(facts.host_ips.iter().map(|ip| HostIP { ip: ip.clone() }).collect()),
            pod_ip: ips.first().cloned(),
            pod_ips: listed(ips.into_iter().map(|ip| PodIP { ip }).collect()),
            qos_class: Some(facts.qos.to_owned()),
            start_time: Some(time(self.started_at)),
            container_statuses: listed(regular),
            init_container_statuses: listed(init),
            observed_generation: None,
            ..PodStatus::default()
        }
    }

    /// The pod's addresses, as long as it has a sandbox.
    pub(crate) fn ips(&self, facts: &Facts) -> Vec<String> {
        match self.sandbox() {
            Some(_) if spec::on_host_network(&self.pod) => facts.host_ips.clone(),
            Some(sandbox) => sandbox.ips.clone(),
            None => Vec::new(),
        }
    }

    fn is_initialized(&self) -> bool {
        let sandbox = self.seen.newest_sandbox().map(|sandbox| sandbox.id.as_str());
        let done = |init: &Container| {
            let Some(sandbox) = sandbox else { return false };
            if spec::is_sidecar(init) {
                return self.was_initialized(sandbox) || self.has_started(sandbox, &init.name);
            }
            self.was_initialized(sandbox) || self.has_succeeded(&init.name)
        };
        spec::inits(&self.pod).all(done)
    }

    fn has_succeeded(&self, name: &str) -> bool {
        self.seen.latest(name).and_then(Contained::exit).is_some_and(|exit| exit.code == 0)
    }

    fn phase(&self, regular: &[ContainerStatus], init: &[ContainerStatus]) -> &'static str {
        if let Some(verdict) = &self.verdict {
            // Until everything has ended, a pod that is to end still runs.
            if self.is_finished() || verdict.rejected || verdict.reason.is_some() || all_ended(regular, init)
            {
                return if verdict.succeeded { "Succeeded" } else { "Failed" };
            }
        }
        let sidecar = |status: &ContainerStatus| spec::is_sidecar_name(&self.pod, &status.name);
        let waits_for_init = init.iter().any(|status| {
            let state = status.state.as_ref();
            match sidecar(status) {
                true => status.started != Some(true),
                false => state
                    .and_then(|state| state.terminated.as_ref())
                    .is_none_or(|terminated| terminated.exit_code != 0),
            }
        });
        let began = regular.iter().any(|status| status.container_id.is_some());
        if waits_for_init && !began {
            return "Pending";
        }
        let (mut running, mut waiting, mut stopped, mut failed) = (0, 0, 0, 0);
        for status in regular {
            let ended = |state: &Option<ContainerState>| {
                state.as_ref().and_then(|state| state.terminated.as_ref()).map(|ended| ended.exit_code)
            };
            match &status.state {
                Some(state) if state.running.is_some() => running += 1,
                state => match ended(state).or_else(|| ended(&status.last_state)) {
                    Some(code) => {
                        stopped += 1;
                        failed += usize::from(code != 0);
                    }
                    None => waiting += 1,
                },
            }
        }
        match spec::restart_policy(&self.pod) {
            _ if waiting > 0 && stopped + running == 0 => "Pending",
            _ if waiting + running > 0 => "Running",
            RestartPolicy::Always => "Running",
            _ if failed == 0 => "Succeeded",
            RestartPolicy::Never => "Failed",
            RestartPolicy::OnFailure => "Running",
        }
    }

    fn container_status(
        &self,
        now: Now,
        facts: &Facts,
        container: &Container,
        init: bool,
        initialized: bool,
    ) -> ContainerStatus {
        let name = &container.name;
        let latest = self.seen.latest(name).filter(|latest| latest.state != State::Created);
        let told = prior_of(&self.prior, name);
        let state = self.state(now, facts, container, latest, init, initialized);
        let shows_latest = state.terminated.is_some();
        let earlier = self
            .seen
            .of_name(name)
            .filter(|held| held.exit().is_some())
            .filter(|held| !(shows_latest && latest.is_some_and(|latest| latest.id == held.id)))
            .max_by_key(|held| (held.attempt, held.created_at));
        let last_state = earlier
            .map(|held| ended_state(facts, held))
            // Of containers that the runtime has forgotten.
            .or_else(|| if latest.is_none() { told.and_then(last_told) } else { told?.last_state.clone() })
            .or_else(|| Some(ContainerState::default()));
        let runs = state.running.is_some();
        let checks = latest.map(|latest| self.checks(latest)).unwrap_or_default();
        let sidecar = spec::is_sidecar(container);
        let started = runs && checks.started;
        let ready = if init && !sidecar {
            state.terminated.as_ref().is_some_and(|ended| ended.exit_code == 0)
        } else {
            started && checks.ready
        };
        let restarts = latest.map(|latest| i32::try_from(latest.attempt).unwrap_or(i32::MAX));
        let id = |latest: &Contained| format!("{}://{}", facts.runtime, latest.id);
        ContainerStatus {
            name: name.clone(),
            container_id: latest.map(id),
            image: latest
                .map(|latest| latest.image.clone())
                .filter(|image| !image.is_empty() && !image.starts_with("sha256:"))
                .unwrap_or_else(|| container.image.clone().unwrap_or_default()),
            image_id: latest.map_or_else(String::new, |latest| latest.image_ref.clone()),
            ready,
            started: Some(started),
            restart_count: restarts.or_else(|| told.map(|told| told.restart_count)).unwrap_or(0),
            state: Some(state),
            last_state,
            ..ContainerStatus::default()
        }
    }

    fn state(
        &self,
        now: Now,
        facts: &Facts,
        container: &Container,
        latest: Option<&Contained>,
        init: bool,
        initialized: bool,
    ) -> ContainerState {
        let key = Key::Container(container.name.clone());
        let starting = self.is_starting(&container.name);
        let trouble = self.troubles.get(&key).filter(|trouble| trouble.reason != super::life::KILL_FAILED);
        match latest.map(|latest| (latest, &latest.state)) {
            // Its hook has not ended: it does not count as running yet.
            Some((_, State::Running { .. })) if starting => {}
            Some((_, State::Running { started_at })) => return running_state(*started_at),
            Some((latest, State::Unknown)) => return running_state(latest.created_at),
            Some((latest, State::Exited(exit))) => {
                if self.is_ending() {
                    return ended_state(facts, latest);
                }
                let crashes = exit.code != 0 || !init;
                if let Some(delay) = self.waits(now, latest).filter(|_| crashes && trouble.is_none()) {
                    let message = format!(
                        "back-off {} restarting failed container={} pod={}_{}({})",
                        shown(delay),
                        container.name,
                        spec::name(&self.pod),
                        spec::namespace(&self.pod),
                        spec::uid(&self.pod)
                    );
                    return waiting_state("CrashLoopBackOff", Some(message));
                }
                if trouble.is_none() && !starting {
                    return ended_state(facts, latest);
                }
            }
            Some((_, State::Created)) | None => {}
        }
        if let Some(trouble) = trouble {
            if trouble.reason == "ErrImagePull" && now.mono >= trouble.since + PULL_SHOWN {
                let image = container.image.as_deref().unwrap_or_default();
                let message =
                    format!("Back-off pulling image \"{image}\": ErrImagePull: {}", trouble.message);
                return waiting_state("ImagePullBackOff", Some(message));
            }
            return waiting_state(trouble.reason, Some(trouble.message.clone()));
        }
        let has_inits = spec::inits(&self.pod).next().is_some();
        let reason =
            if has_inits && (init || !initialized) { "PodInitializing" } else { "ContainerCreating" };
        waiting_state(reason, None)
    }

    fn conditions(
        &self,
        now: Now,
        phase: &str,
        regular: &[ContainerStatus],
        initialized: bool,
        before: &PodStatus,
    ) -> Vec<PodCondition> {
        let pod = &self.pod;
        let completed = phase == "Succeeded";
        let over = completed || phase == "Failed";
        let sandboxed =
            self.sandbox().is_some_and(|sandbox| spec::on_host_network(pod) || !sandbox.ips.is_empty());
        let mut conditions = Vec::new();
        let mut say = |kind: &str, holds: bool, reason: Option<&str>, message: Option<String>| {
            let status = if holds { "True" } else { "False" };
            let same = before
                .conditions
                .iter()
                .flatten()
                .find(|condition| condition.type_ == kind && condition.status == status);
            conditions.push(PodCondition {
                type_: kind.to_owned(),
                status: status.to_owned(),
                reason: reason.map(str::to_owned),
                message,
                last_transition_time: same
                    .and_then(|condition| condition.last_transition_time.clone())
                    .or_else(|| Some(time(now.wall))),
                ..PodCondition::default()
            });
        };
        say("PodReadyToStartContainers", sandboxed && !over, None, None);
        let incomplete: Vec<&str> = spec::inits(pod)
            .filter(|init| !spec::is_sidecar(init) && !self.has_succeeded(&init.name))
            .map(|init| init.name.as_str())
            .collect();
        match (initialized || completed, completed) {
            (true, true) => say("Initialized", true, Some("PodCompleted"), None),
            (true, false) => say("Initialized", true, None, None),
            (false, _) => {
                let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
                say("Initialized", false, Some("ContainersNotInitialized"), Some(message));
            }
        }
        let unready: Vec<&str> =
            regular.iter().filter(|status| !status.ready).map(|status| status.name.as_str()).collect();
        let ready = initialized && unready.is_empty() && !regular.is_empty() && !over;
        let (reason, message) = match phase {
            "Succeeded" => (Some("PodCompleted"), None),
            "Failed" => (Some("PodFailed"), None),
            _ if ready => (None, None),
            _ => (
                Some("ContainersNotReady"),
                Some(format!("containers with unready status: [{}]", unready.join(" "))),
            ),
        };
        // Conditions that others set, for which readiness waits.
        let foreign = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let foreign: Vec<&PodCondition> = foreign.collect();
        let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
        let closed = gates.clone().find(|gate| {
            !foreign.iter().any(|held| held.type_ == gate.condition_type && held.status == "True")
        });
        match closed.filter(|_| ready) {
            Some(gate) => {
                let message = format!(
                    "the status of pod readiness gate \"{}\" is not \"True\", but False",
                    gate.condition_type
                );
                say("Ready", false, Some("ReadinessGatesNotReady"), Some(message));
            }
            None => say("Ready", ready, reason, message.clone()),
        }
        say("ContainersReady", ready, reason, message);
        say("PodScheduled", true, None, None);
        for gate in gates {
            let held = foreign.iter().find(|held| held.type_ == gate.condition_type);
            conditions.extend(held.map(|held| (*held).clone()));
        }
        conditions
    }
}

fn all_ended(regular: &[ContainerStatus], init: &[ContainerStatus]) -> bool {
    let running =
        |status: &ContainerStatus| status.state.as_ref().is_some_and(|state| state.running.is_some());
    !regular.iter().chain(init).any(running)
}

fn listed<T>(values: Vec<T>) -> Option<Vec<T>> {
    if values.is_empty() { None } else { Some(values) }
}

fn running_state(started_at: i64) -> ContainerState {
    let running = ContainerStateRunning { started_at: Some(time(started_at)) };
    ContainerState { running: Some(running), ..ContainerState::default() }
}

fn waiting_state(reason: &str, message: Option<String>) -> ContainerState {
    let waiting = ContainerStateWaiting { reason: Some(reason.to_owned()), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn ended_state(facts: &Facts, held: &Contained) -> ContainerState {
    let exit = held.exit().cloned().unwrap_or_default();
    let reason = match exit.reason.as_str() {
        "" if exit.code == 0 => "Completed".to_owned(),
        "" => "Error".to_owned(),
        reason => reason.to_owned(),
    };
    let terminated = ContainerStateTerminated {
        container_id: Some(format!("{}://{}", facts.runtime, held.id)),
        exit_code: exit.code,
        reason: Some(reason),
        message: Some(exit.message).filter(|message| !message.is_empty()),
        started_at: Some(time(exit.started_at)),
        finished_at: Some(time(exit.finished_at)),
        signal: None,
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

/// How it ended, as far as an earlier status knows.
fn last_told(told: &ContainerStatus) -> Option<ContainerState> {
    let ended = told.state.clone().filter(|state| state.terminated.is_some());
    ended.or_else(|| told.last_state.clone())
}

/// As Go shows a duration: `10s`, `1m20s`, `5m0s`.
fn shown(delay: std::time::Duration) -> String {
    let seconds = delay.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{}s", seconds / 60, seconds % 60) }
}
