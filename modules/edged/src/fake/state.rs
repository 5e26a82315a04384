//! What the fake holds: sandboxes, containers, images, and the chance that decides about calls.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use tokio::{sync::mpsc, time::Instant};

use super::{Behaviour, Faults, Left, Metadata, lives};
use crate::runtime::{
    Hint, RuntimeError,
    cri::{self, ContainerState, PodSandboxState},
};

/// Bytes of an image that was pulled.
const PULLED_BYTES: u64 = 1 << 20;

/// What was drawn for one call.
#[derive(Debug)]
pub(super) struct Chance {
    pub(super) late: Option<Duration>,
    pub(super) lost: bool,
}

#[derive(Debug)]
struct Sandbox {
    status: cri::PodSandboxStatus,
    log_directory: String,
}

#[derive(Debug)]
struct Container {
    sandbox: String,
    status: cri::ContainerStatus,
    behaviour: Behaviour,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) up: bool,
    pub(super) faults: Faults,
    pub(super) lose_next: Vec<&'static str>,
    pub(super) calls: BTreeMap<&'static str, usize>,
    pub(super) hints: Vec<mpsc::Sender<Hint>>,
    pub(super) streaming: Option<String>,
    random: u64,
    epoch_nanos: i64,
    began: Instant,
    ids: u64,
    addresses: u32,
    sandboxes: BTreeMap<String, Sandbox>,
    containers: BTreeMap<String, Container>,
    images: BTreeMap<String, cri::Image>,
    refused_pulls: BTreeMap<String, String>,
    scripts: BTreeMap<String, VecDeque<Behaviour>>,
}

impl State {
    pub(super) fn new(seed: u64, epoch_nanos: i64, began: Instant) -> Self {
        Self {
            up: true,
            faults: Faults::default(),
            lose_next: Vec::new(),
            calls: BTreeMap::new(),
            hints: Vec::new(),
            streaming: None,
            random: seed,
            epoch_nanos,
            began,
            ids: 0,
            addresses: 0,
            sandboxes: BTreeMap::new(),
            containers: BTreeMap::new(),
            images: BTreeMap::new(),
            refused_pulls: BTreeMap::new(),
            scripts: BTreeMap::new(),
        }
    }

    /// splitmix64: the next of a sequence that the seed decides.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn happens(&mut self, thousandths: u32) -> bool {
        thousandths > 0 && self.draw() % 1000 < u64::from(thousandths)
    }

    /// Counts a call and decides what becomes of it.
    pub(super) fn admit(&mut self, method: &'static str) -> Result<Chance, RuntimeError> {
        *self.calls.entry(method).or_default() += 1;
        self.reached()?;
        let faults = self.faults.clone();
        if self.happens(faults.unreached) {
            return Err(RuntimeError::Unavailable(format!("{method} did not reach the runtime")));
        }
        let late = self.happens(faults.late).then(|| {
            let most = u64::try_from(faults.late_by.as_millis()).unwrap_or(u64::MAX).max(1);
            Duration::from_millis(1 + self.draw() % most)
        });
        let asked = self.lose_next.iter().position(|lost| *lost == method);
        let lost = match asked {
            Some(at) => {
                self.lose_next.remove(at);
                true
            }
            None => self.happens(faults.lost),
        };
        Ok(Chance { late, lost })
    }

    pub(super) fn reached(&self) -> Result<(), RuntimeError> {
        if self.up {
            return Ok(());
        }
        Err(RuntimeError::Unavailable("the runtime is down".to_owned()))
    }

    fn now_nanos(&self) -> i64 {
        let passed = i64::try_from(self.began.elapsed().as_nanos()).unwrap_or(i64::MAX);
        self.epoch_nanos.saturating_add(passed)
    }

    /// 64 hexadecimal digits, the first twelve of which tell it apart, as people are shown them.
    fn next_id(&mut self) -> String {
        self.ids += 1;
        format!("{:012x}{:052x}", self.ids, 0)
    }

    fn hint(&mut self, id: &str) {
        if self.happens(self.faults.hints_lost) {
            return;
        }
        // One that has no room is lost; one whose reader has gone is forgotten.
        self.hints.retain(|sender| {
            !matches!(sender.try_send(Hint { id: id.to_owned() }), Err(mpsc::error::TrySendError::Closed(_)))
        });
    }

    pub(super) fn kill(&mut self) {
        self.up = false;
        self.hints.clear();
    }

    pub(super) fn reboot(&mut self, metadata: Metadata) {
        self.up = true;
        self.hints.clear();
        match metadata {
            Metadata::Lost => {
                self.sandboxes.clear();
                self.containers.clear();
                self.images.clear();
            }
            Metadata::Kept => {
                let now = self.now_nanos();
                for sandbox in self.sandboxes.values_mut() {
                    sandbox.status.set_state(PodSandboxState::SandboxNotready);
                }
                for container in self.containers.values_mut() {
                    if container.status.state() == ContainerState::ContainerRunning {
                        finish(&mut container.status, now, 255, "Unknown");
                    }
                }
            }
        }
    }

    pub(super) fn left(&self) -> Left {
        Left {
            sandboxes: self.sandboxes.len(),
            sandboxes_ready: self
                .sandboxes
                .values()
                .filter(|s| s.status.state() == PodSandboxState::SandboxReady)
                .count(),
            containers: self.containers.len(),
            containers_running: self
                .containers
                .values()
                .filter(|c| c.status.state() == ContainerState::ContainerRunning)
                .count(),
        }
    }

    pub(super) fn run_sandbox(&mut self, config: cri::PodSandboxConfig) -> Result<String, RuntimeError> {
        let reserved = self.sandboxes.values().find(|s| s.status.metadata == config.metadata);
        if let Some(other) = reserved {
            return Err(RuntimeError::Refused(format!(
                "failed to reserve sandbox name: name is reserved for {:?}",
                other.status.id
            )));
        }
        let id = self.next_id();
        let host_network = config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref()?.namespace_options.as_ref())
            .is_some_and(|n| n.network() == cri::NamespaceMode::Node);
        let ip = if host_network {
            String::new()
        } else {
            self.addresses += 1;
            std::net::Ipv4Addr::from_bits(0x0a58_0000 + self.addresses).to_string()
        };
        let status = cri::PodSandboxStatus {
            id: id.clone(),
            metadata: config.metadata,
            state: PodSandboxState::SandboxReady.into(),
            created_at: self.now_nanos(),
            network: Some(cri::PodSandboxNetworkStatus { ip, additional_ips: Vec::new() }),
            labels: config.labels,
            annotations: config.annotations,
            ..cri::PodSandboxStatus::default()
        };
        self.sandboxes.insert(id.clone(), Sandbox { status, log_directory: config.log_directory });
        self.hint(&id);
        Ok(id)
    }

    /// True if it was ready.
    pub(super) fn stop_sandbox(&mut self, id: &str) -> bool {
        let inside: Vec<_> =
            self.containers.iter().filter(|(_, c)| c.sandbox == id).map(|(i, _)| i.clone()).collect();
        for container in inside {
            self.ended(&container, 137, false);
        }
        let Some(sandbox) = self.sandboxes.get_mut(id) else { return false };
        let was_ready = sandbox.status.state() == PodSandboxState::SandboxReady;
        sandbox.status.set_state(PodSandboxState::SandboxNotready);
        if was_ready {
            self.hint(id);
        }
        was_ready
    }

    pub(super) fn remove_sandbox(&mut self, id: &str) {
        self.stop_sandbox(id);
        self.containers.retain(|_, c| c.sandbox != id);
        if self.sandboxes.remove(id).is_some() {
            self.hint(id);
        }
    }

    pub(super) fn sandbox_status(&self, id: &str) -> Result<cri::PodSandboxStatus, RuntimeError> {
        let sandbox = self.sandboxes.get(id).ok_or_else(|| not_found("sandbox", id))?;
        Ok(sandbox.status.clone())
    }

    pub(super) fn sandboxes(&self) -> Vec<cri::PodSandbox> {
        self.sandboxes
            .values()
            .map(|sandbox| {
                let status = sandbox.status.clone();
                cri::PodSandbox {
                    id: status.id,
                    metadata: status.metadata,
                    state: status.state,
                    created_at: status.created_at,
                    labels: status.labels,
                    annotations: status.annotations,
                    runtime_handler: status.runtime_handler,
                }
            })
            .collect()
    }

    pub(super) fn create_container(
        &mut self,
        sandbox: &str,
        config: cri::ContainerConfig,
        pod: &cri::PodSandboxMetadata,
    ) -> Result<String, RuntimeError> {
        let owner = self.sandboxes.get(sandbox).ok_or_else(|| not_found("sandbox", sandbox))?;
        if owner.status.state() != PodSandboxState::SandboxReady {
            return Err(RuntimeError::Refused(format!("sandbox {sandbox:?} is not running")));
        }
        if owner.status.metadata.as_ref() != Some(pod) {
            return Err(RuntimeError::Refused(format!("sandbox {sandbox:?} is of another pod")));
        }
        let log_directory = owner.log_directory.clone();
        // containerd reserves by pod, name and attempt, whichever sandbox of the pod it is in.
        let reserved = self.containers.values().find(|other| {
            other.status.metadata == config.metadata
                && self
                    .sandboxes
                    .get(&other.sandbox)
                    .is_some_and(|s| s.status.metadata.as_ref().is_some_and(|m| m.uid == pod.uid))
        });
        if let Some(other) = reserved {
            return Err(RuntimeError::Refused(format!(
                "failed to reserve container name: name is reserved for {:?}",
                other.status.id
            )));
        }
        let spec = config.image.unwrap_or_default();
        let image = self
            .image(&spec.image)
            .ok_or_else(|| RuntimeError::NotFound(format!("image {:?} not found", spec.image)))?;
        let behaviour = self.next_behaviour(image.repo_tags.first().map_or("", |tag| tag));
        let id = self.next_id();
        let log_path = format!("{log_directory}/{}", config.log_path);
        let status = cri::ContainerStatus {
            id: id.clone(),
            metadata: config.metadata,
            state: ContainerState::ContainerCreated.into(),
            created_at: self.now_nanos(),
            image: Some(spec),
            image_ref: image.id.clone(),
            image_id: image.id,
            labels: config.labels,
            annotations: config.annotations,
            mounts: config.mounts,
            log_path,
            ..cri::ContainerStatus::default()
        };
        let container = Container { sandbox: sandbox.to_owned(), status, behaviour };
        self.containers.insert(id.clone(), container);
        self.hint(&id);
        Ok(id)
    }

    fn next_behaviour(&mut self, image: &str) -> Behaviour {
        let Some(script) = self.scripts.get_mut(image) else { return Behaviour::forever() };
        if script.len() > 1 {
            return script.pop_front().unwrap_or_else(Behaviour::forever);
        }
        script.front().cloned().unwrap_or_else(Behaviour::forever)
    }

    pub(super) fn start_container(&mut self, id: &str) -> Result<Behaviour, RuntimeError> {
        let now = self.now_nanos();
        let container = self.containers.get_mut(id).ok_or_else(|| not_found("container", id))?;
        let state = container.status.state();
        if state != ContainerState::ContainerCreated {
            return Err(RuntimeError::Refused(format!(
                "failed to set starting state for container {id:?}: container is in {} state",
                state.as_str_name()
            )));
        }
        if let Some(why) = container.behaviour.start_error.clone() {
            // As runc's errors: the container is left behind as one that has ended.
            finish(&mut container.status, now, 128, "StartError");
            container.status.message.clone_from(&why);
            container.status.started_at = 0;
            self.hint(id);
            return Err(RuntimeError::Refused(why));
        }
        container.status.set_state(ContainerState::ContainerRunning);
        container.status.started_at = now;
        let behaviour = container.behaviour.clone();
        self.hint(id);
        Ok(behaviour)
    }

    /// A container ends, if it has not. True if it did now.
    pub(super) fn ended(&mut self, id: &str, code: i32, oom: bool) -> bool {
        let now = self.now_nanos();
        let Some(container) = self.containers.get_mut(id) else { return false };
        if container.status.state() != ContainerState::ContainerRunning {
            return false;
        }
        let (code, reason) = match (oom, code) {
            (true, _) => (137, "OOMKilled"),
            (false, 0) => (0, "Completed"),
            (false, code) => (code, "Error"),
        };
        finish(&mut container.status, now, code, reason);
        self.hint(id);
        true
    }

    /// How long it takes a container to end when it is asked; at once where there is nothing to end.
    pub(super) fn stops_in(&self, id: &str) -> Option<Duration> {
        match self.containers.get(id) {
            Some(container) if lives(container.status.state()) => container.behaviour.stops_in,
            _ => Some(Duration::ZERO),
        }
    }

    pub(super) fn remove_container(&mut self, id: &str) {
        if self.containers.remove(id).is_some() {
            self.hint(id);
        }
    }

    pub(super) fn container_status(&self, id: &str) -> Result<cri::ContainerStatus, RuntimeError> {
        let container = self.containers.get(id).ok_or_else(|| not_found("container", id))?;
        Ok(container.status.clone())
    }

    pub(super) fn running(&self, id: &str) -> Result<cri::ContainerStatus, RuntimeError> {
        let status = self.container_status(id)?;
        if status.state() != ContainerState::ContainerRunning {
            let state = status.state().as_str_name();
            return Err(RuntimeError::Refused(format!("container is in {state} state")));
        }
        Ok(status)
    }

    pub(super) fn containers(&self) -> Vec<cri::Container> {
        self.containers
            .values()
            .map(|container| {
                let status = container.status.clone();
                cri::Container {
                    id: status.id,
                    pod_sandbox_id: container.sandbox.clone(),
                    metadata: status.metadata,
                    image: status.image,
                    image_ref: status.image_ref,
                    state: status.state,
                    created_at: status.created_at,
                    labels: status.labels,
                    annotations: status.annotations,
                    image_id: status.image_id,
                }
            })
            .collect()
    }

    pub(super) fn stream_url(&self, kind: &str, id: &str) -> Result<String, RuntimeError> {
        let prefix =
            self.streaming.as_ref().ok_or_else(|| RuntimeError::Refused("no streaming server".to_owned()))?;
        Ok(format!("{prefix}/{kind}/{id}"))
    }

    pub(super) fn stats(&self) -> Vec<cri::ContainerStats> {
        let now = self.now_nanos();
        let amount = |value| Some(cri::UInt64Value { value });
        self.containers
            .values()
            .filter(|c| c.status.state() == ContainerState::ContainerRunning)
            .map(|container| {
                let ran = u64::try_from(now - container.status.started_at).unwrap_or(0);
                cri::ContainerStats {
                    attributes: Some(cri::ContainerAttributes {
                        id: container.status.id.clone(),
                        metadata: container.status.metadata.clone(),
                        labels: container.status.labels.clone(),
                        annotations: container.status.annotations.clone(),
                    }),
                    cpu: Some(cri::CpuUsage {
                        timestamp: now,
                        usage_core_nano_seconds: amount(ran / 100),
                        usage_nano_cores: None,
                    }),
                    memory: Some(cri::MemoryUsage {
                        timestamp: now,
                        working_set_bytes: amount(1 << 20),
                        ..cri::MemoryUsage::default()
                    }),
                    ..cri::ContainerStats::default()
                }
            })
            .collect()
    }

    pub(super) fn script(&mut self, image: &str, behaviours: VecDeque<Behaviour>) {
        self.scripts.insert(image.to_owned(), behaviours);
    }

    pub(super) fn add_image(&mut self, name: &str, bytes: u64) -> String {
        if let Some(image) = self.images.get(name) {
            return image.id.clone();
        }
        let id = format!("sha256:{}", self.next_id());
        let image = cri::Image {
            id: id.clone(),
            repo_tags: vec![name.to_owned()],
            size: bytes,
            ..cri::Image::default()
        };
        self.images.insert(name.to_owned(), image);
        id
    }

    pub(super) fn refuse_pull(&mut self, name: &str, why: Option<&str>) {
        match why {
            Some(why) => self.refused_pulls.insert(name.to_owned(), why.to_owned()),
            None => self.refused_pulls.remove(name),
        };
    }

    pub(super) fn pull(&mut self, name: &str) -> Result<String, RuntimeError> {
        match self.refused_pulls.get(name) {
            Some(why) => Err(RuntimeError::Refused(why.clone())),
            None => Ok(self.add_image(name, PULLED_BYTES)),
        }
    }

    pub(super) fn images(&self) -> Vec<cri::Image> {
        self.images.values().cloned().collect()
    }

    /// By name or by id.
    pub(super) fn image(&self, name: &str) -> Option<cri::Image> {
        let by_name = self.images.get(name);
        by_name.or_else(|| self.images.values().find(|image| image.id == name)).cloned()
    }

    pub(super) fn remove_image(&mut self, name: &str) {
        self.images.retain(|tag, image| tag != name && image.id != name);
    }

    pub(super) fn image_disk(&self) -> cri::FilesystemUsage {
        let used = self.images.values().map(|image| image.size).sum();
        cri::FilesystemUsage {
            timestamp: self.now_nanos(),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: "/".to_owned() }),
            used_bytes: Some(cri::UInt64Value { value: used }),
            inodes_used: None,
        }
    }
}

fn finish(status: &mut cri::ContainerStatus, now: i64, code: i32, reason: &str) {
    status.set_state(ContainerState::ContainerExited);
    status.finished_at = now;
    status.exit_code = code;
    status.reason = reason.to_owned();
}

fn not_found(what: &str, id: &str) -> RuntimeError {
    RuntimeError::NotFound(format!("an error occurred when try to find {what} {id:?}: not found"))
}
