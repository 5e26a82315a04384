//! What the runtime shows of one pod: its sandboxes and containers, merged from answers in any order.
//!
//! A container only ever goes created, running, exited, and a sandbox ready, not ready. So an older answer never
//! takes back what a newer one said, and only a complete list may say that something is gone.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use crate::runtime::cri;

/// Of a container: how long to wait after its end before the next attempt, milliseconds.
pub(crate) const BACK_OFF: &str = "octobus.io/back-off-ms";
/// Of a container: what of its specification changes it when changed.
pub(crate) const SPEC: &str = "octobus.io/spec";

/// Of a sandbox or container: the node whose agent made it. What another made is none of ours.
pub(crate) const AGENT: &str = "octobus.io/agent";

const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// A sandbox as it was seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) attempt: u32,
    pub(crate) ready: bool,
    /// Empty with the host's network, or as long as nobody asked.
    pub(crate) ips: Vec<String>,
}

/// A container as it was seen last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contained {
    pub(crate) id: String,
    pub(crate) sandbox: String,
    pub(crate) name: String,
    pub(crate) attempt: u32,
    pub(crate) state: State,
    /// Nanoseconds since 1970.
    pub(crate) created_at: i64,
    pub(crate) image: String,
    pub(crate) image_ref: String,
    /// [`SPEC`].
    pub(crate) spec: String,
    /// [`BACK_OFF`].
    pub(crate) back_off: Duration,
    pub(crate) log_path: String,
}

/// Where a container stands. Times are nanoseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    Created,
    Running { started_at: i64 },
    Exited(Exit),
    Unknown,
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) started_at: i64,
    pub(crate) finished_at: i64,
    pub(crate) code: i32,
    pub(crate) reason: String,
    /// What it left as its termination message, or why it was not started.
    pub(crate) message: String,
}

impl State {
    fn rank(&self) -> u8 {
        match self {
            Self::Created => 0,
            Self::Unknown => 1,
            Self::Running { .. } => 2,
            Self::Exited(_) => 3,
        }
    }
}

impl Contained {
    /// From an answer; `None` if it is no pod's.
    pub(crate) fn of(status: &cri::ContainerStatus, sandbox: &str) -> Option<Self> {
        let state = match status.state() {
            cri::ContainerState::ContainerCreated => State::Created,
            cri::ContainerState::ContainerRunning => State::Running { started_at: status.started_at },
            cri::ContainerState::ContainerExited => State::Exited(Exit {
                started_at: status.started_at,
                finished_at: status.finished_at,
                code: status.exit_code,
                reason: status.reason.clone(),
                message: status.message.clone(),
            }),
            cri::ContainerState::ContainerUnknown => State::Unknown,
        };
        let back_off = status.annotations.get(BACK_OFF).and_then(|text| text.parse().ok()).unwrap_or(0);
        Some(Self {
            id: status.id.clone(),
            sandbox: sandbox.to_owned(),
            name: status.labels.get(CONTAINER_NAME)?.clone(),
            attempt: status.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
            state,
            created_at: status.created_at,
            image: status.image.as_ref().map_or_else(String::new, |image| image.image.clone()),
            image_ref: status.image_ref.clone(),
            spec: status.annotations.get(SPEC).cloned().unwrap_or_default(),
            back_off: Duration::from_millis(back_off),
            log_path: status.log_path.clone(),
        })
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running { .. } | State::Unknown)
    }

    pub(crate) fn exit(&self) -> Option<&Exit> {
        match &self.state {
            State::Exited(exit) => Some(exit),
            _ => None,
        }
    }
}

impl Sandbox {
    /// From an answer.
    pub(crate) fn of(status: &cri::PodSandboxStatus) -> Self {
        let network = status.network.as_ref();
        let first = network.map(|network| network.ip.clone()).filter(|ip| !ip.is_empty());
        let more =
            network.into_iter().flat_map(|network| network.additional_ips.iter().map(|ip| ip.ip.clone()));
        Self {
            id: status.id.clone(),
            attempt: status.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
            ready: status.state() == cri::PodSandboxState::SandboxReady,
            ips: first.into_iter().chain(more).collect(),
        }
    }
}

/// The uid of the pod that the agent of this node made a sandbox or container for.
pub(crate) fn uid_of<'a>(labels: &'a HashMap<String, String>, node: &str) -> Option<&'a str> {
    let ours = labels.get(AGENT).is_some_and(|agent| agent == node);
    labels.get(POD_UID).map(String::as_str).filter(|uid| ours && !uid.is_empty())
}

/// Everything that the runtime shows of one pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sandboxes: Vec<Sandbox>,
    pub(crate) containers: Vec<Contained>,
}

impl Seen {
    /// The sandbox of the highest attempt, ready or not.
    pub(crate) fn newest_sandbox(&self) -> Option<&Sandbox> {
        // Of two of the same attempt, which a lost answer may leave, one that is ready.
        self.sandboxes.iter().max_by(|a, b| (a.attempt, a.ready, &a.id).cmp(&(b.attempt, b.ready, &b.id)))
    }

    /// The newest instance of a container, in whatever sandbox.
    pub(crate) fn latest(&self, name: &str) -> Option<&Contained> {
        self.of_name(name).max_by_key(|container| (container.attempt, container.created_at))
    }

    /// The newest instance of a container in one sandbox.
    pub(crate) fn latest_in(&self, sandbox: &str, name: &str) -> Option<&Contained> {
        self.of_name(name)
            .filter(|container| container.sandbox == sandbox)
            .max_by_key(|container| (container.attempt, container.created_at))
    }

    /// All instances of a container.
    pub(crate) fn of_name<'a, 'n>(
        &'a self,
        name: &'n str,
    ) -> impl Iterator<Item = &'a Contained> + use<'a, 'n> {
        self.containers.iter().filter(move |container| container.name == name)
    }

    /// Takes what was seen of a sandbox.
    pub(crate) fn merge_sandbox(&mut self, sandbox: Sandbox) {
        match self.sandboxes.iter_mut().find(|held| held.id == sandbox.id) {
            Some(held) => {
                held.ready &= sandbox.ready;
                if !sandbox.ips.is_empty() {
                    held.ips = sandbox.ips;
                }
            }
            None => self.sandboxes.push(sandbox),
        }
    }

    /// Takes what was seen of a container.
    pub(crate) fn merge_container(&mut self, container: Contained) {
        match self.containers.iter_mut().find(|held| held.id == container.id) {
            Some(held) if container.state.rank() >= held.state.rank() => {
                let sandbox = std::mem::take(&mut held.sandbox);
                *held = container;
                if held.sandbox.is_empty() {
                    held.sandbox = sandbox;
                }
            }
            Some(_) => {}
            None => self.containers.push(container),
        }
    }

    /// Takes a complete list. Of what was known before it was asked for, only what it shows is still there; what
    /// was removed since is not taken back.
    pub(crate) fn take_all(&mut self, known_before: &BTreeSet<String>, all: Self) {
        let (listed, held) = (all.ids(), self.ids());
        let stays = |id: &String| !known_before.contains(id) || listed.contains(id);
        self.sandboxes.retain(|sandbox| stays(&sandbox.id));
        self.containers.retain(|container| stays(&container.id));
        let removed = |id: &String| known_before.contains(id) && !held.contains(id);
        for sandbox in all.sandboxes.into_iter().filter(|sandbox| !removed(&sandbox.id)) {
            self.merge_sandbox(sandbox);
        }
        for container in all.containers.into_iter().filter(|container| !removed(&container.id)) {
            self.merge_container(container);
        }
    }

    /// Whether a list of ids and states, as the runtime counts those, shows something else.
    pub(crate) fn differs(&self, listed: &BTreeSet<(String, i32)>) -> bool {
        let sandboxes = self.sandboxes.iter().map(|sandbox| {
            let ready = cri::PodSandboxState::SandboxReady as i32;
            let not_ready = cri::PodSandboxState::SandboxNotready as i32;
            (sandbox.id.clone(), if sandbox.ready { ready } else { not_ready })
        });
        let containers = self.containers.iter().map(|container| {
            let state = match container.state {
                State::Created => cri::ContainerState::ContainerCreated,
                State::Running { .. } => cri::ContainerState::ContainerRunning,
                State::Exited(_) => cri::ContainerState::ContainerExited,
                State::Unknown => cri::ContainerState::ContainerUnknown,
            };
            (container.id.clone(), state as i32)
        });
        sandboxes.chain(containers).collect::<BTreeSet<_>>() != *listed
    }

    /// Ids of everything.
    pub(crate) fn ids(&self) -> BTreeSet<String> {
        let sandboxes = self.sandboxes.iter().map(|sandbox| sandbox.id.clone());
        sandboxes.chain(self.containers.iter().map(|container| container.id.clone())).collect()
    }

    /// It was removed, and with a sandbox all that was in it.
    pub(crate) fn remove(&mut self, id: &str) {
        self.sandboxes.retain(|sandbox| sandbox.id != id);
        self.containers.retain(|container| container.id != id && container.sandbox != id);
    }
}
