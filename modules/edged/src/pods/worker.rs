//! One task per pod: steps its life, performs what that says, and shows what became of it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, Id, JoinError, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    hands::{Context, Hands, Sight},
    life::{Action, Key, Life, Notice, Now, Outcome},
    probing::Probing,
    report::Happening,
    seen::Seen,
    spec,
    status::{self, Facts},
};
use crate::server::{ContainerView, PodView};

/// Something that a worker is told.
#[derive(Debug)]
pub(crate) enum Tell {
    /// Objects that it uses changed.
    Objects,
    /// The runtime shows something else than was seen of it: list it.
    Look,
    /// Something became of this container or sandbox.
    Changed(String),
    /// All that the runtime shows of it, with states: look if that is not what was seen.
    Compare(BTreeSet<(String, i32)>),
}

/// What there is to be.
#[derive(Debug, Clone)]
pub(crate) struct Desired {
    pub(crate) pod: Arc<Pod>,
    /// The object is gone: nothing of it may be left.
    pub(crate) gone: bool,
}

/// Time for workers: real, or what a test says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) began: Instant,
    /// Wall time at the beginning, nanoseconds, where it goes on with `began`.
    pub(crate) simulated: Option<i64>,
}

impl Clock {
    pub(crate) fn now(&self) -> Now {
        let mono = self.began.elapsed();
        let wall = match self.simulated {
            Some(began) => began.saturating_add(i64::try_from(mono.as_nanos()).unwrap_or(i64::MAX)),
            None => i64::try_from(broker::clock::wall_us()).unwrap_or(i64::MAX).saturating_mul(1_000),
        };
        Now { mono, wall }
    }
}

/// What a worker begins with.
#[derive(Debug)]
pub(crate) struct Begin {
    pub(crate) pod: Arc<Pod>,
    pub(crate) seen: Seen,
    pub(crate) prior: PodStatus,
    pub(crate) gone: bool,
    pub(crate) reject: Option<(&'static str, String)>,
}

/// What a call came to: which it was, what it saw, how it ended.
type Done = (Key, Vec<Sight>, Outcome);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Worker {
    life: Life,
    hands: Arc<Hands>,
    clock: Clock,
    facts: Facts,
    desired: watch::Receiver<Desired>,
    inbox: mpsc::Receiver<Tell>,
    /// Of each key the task that performs it now.
    flights: HashMap<Key, (Id, AbortHandle)>,
    work: JoinSet<Done>,
    probing: Probing,
    status: PodStatus,
    shown: Option<Bytes>,
    /// Under which key of `status` this is; orphans have none.
    key: Option<String>,
}

impl Worker {
    pub(crate) fn new(
        hands: Arc<Hands>,
        clock: Clock,
        facts: Facts,
        begin: Begin,
        desired: watch::Receiver<Desired>,
        inbox: mpsc::Receiver<Tell>,
    ) -> Self {
        let key =
            (!begin.gone).then(|| format!("pod/{}/{}", spec::namespace(&begin.pod), spec::name(&begin.pod)));
        let status = begin.prior.clone();
        let mut life = Life::new(clock.now(), begin.pod, begin.seen, begin.prior);
        if begin.gone {
            life.set_gone();
        }
        if let Some((reason, message)) = begin.reject {
            life.reject(reason, &message);
        }
        let probing = Probing::new(Arc::clone(&hands));
        let (flights, work) = (HashMap::new(), JoinSet::new());
        Self { life, hands, clock, facts, desired, inbox, flights, work, probing, status, shown: None, key }
    }

    /// Until nothing is left of the pod, or the agent ends; dropping it leaves containers as they are.
    pub(crate) async fn run(mut self) {
        loop {
            let wake = self.step();
            if self.life.is_forgotten() {
                return;
            }
            let wake = wake.map(|at| self.clock.began + at);
            tokio::select! {
                changed = self.desired.changed() => {
                    if changed.is_err() {
                        return; // the agent has ended
                    }
                    let Desired { pod, gone } = self.desired.borrow_and_update().clone();
                    self.life.set_pod(self.clock.now(), pod);
                    if gone {
                        self.life.set_gone();
                    }
                }
                told = self.inbox.recv() => match told {
                    Some(told) => self.told(told),
                    None => return, // the agent has ended
                },
                Some(done) = self.work.join_next_with_id() => self.done(done),
                probed = self.probing.next() => {
                    let (id, probed, notice) = probed;
                    if let Some(probed) = probed {
                        self.life.probed(&id, probed);
                    }
                    self.tell(notice);
                }
                () = sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => {}
            }
        }
    }

    fn told(&mut self, told: Tell) {
        match told {
            Tell::Objects => self.life.objects_changed(),
            Tell::Look => self.life.look(),
            Tell::Changed(id) => self.life.changed(&id),
            Tell::Compare(listed) => {
                if self.flights.is_empty() && self.life.seen().differs(&listed) {
                    self.life.look();
                }
            }
        }
    }

    fn done(&mut self, done: Result<(Id, Done), JoinError>) {
        let of = |flights: &HashMap<Key, (Id, AbortHandle)>, id: Id| {
            flights.iter().find(|(_, (held, _))| *held == id).map(|(key, _)| key.clone())
        };
        let (key, sights, outcome) = match done {
            Ok((id, done)) => match of(&self.flights, id) {
                Some(_) => done,
                None => (Key::Look, done.1, Outcome::Cancelled), // another took its place, but it saw something
            },
            Err(error) => {
                let Some(key) = of(&self.flights, error.id()) else { return };
                let outcome = match error.is_cancelled() {
                    true => Outcome::Cancelled,
                    false => Outcome::Failed { reason: "Error", message: error.to_string(), unsure: true },
                };
                (key, Vec::new(), outcome)
            }
        };
        for sight in sights {
            let seen = self.life.seen_mut();
            match sight {
                Sight::Sandbox(sandbox) => seen.merge_sandbox(sandbox),
                Sight::Container(container) => seen.merge_container(container),
                Sight::All { known_before, seen: all } => {
                    seen.take_all(&known_before, all);
                }
            }
        }
        if outcome == Outcome::Cancelled && key == Key::Look {
            return;
        }
        self.flights.remove(&key);
        self.life.done(self.clock.now(), key, outcome);
    }

    /// Steps, performs, shows. When to step again.
    fn step(&mut self) -> Option<Duration> {
        let now = self.clock.now();
        let step = self.life.step(now);
        for (key, action) in step.actions {
            self.perform(key, action);
        }
        step.notices.into_iter().for_each(|notice| self.tell(Some(notice)));
        if self.life.is_forgotten() {
            return None;
        }
        let pod = Arc::clone(self.life.pod());
        let ips = self.life.ips(&self.facts);
        let running = !self.life.is_ending();
        self.probing.follow(&pod, &self.life, ips.first().map(String::as_str), running);
        self.show(now);
        step.wake
    }

    fn perform(&mut self, key: Key, action: Action) {
        if let Action::Cancel(key) = action {
            if let Some((_, task)) = self.flights.get(&key) {
                task.abort();
            }
            return;
        }
        let context = Context {
            pod: Arc::clone(self.life.pod()),
            ips: self.life.ips(&self.facts),
            known: self.life.seen().ids(),
        };
        let hands = Arc::clone(&self.hands);
        let of = key.clone();
        let task = self.work.spawn(async move {
            let (sights, outcome) = hands.perform(action, &context).await;
            (of, sights, outcome)
        });
        if let Some((_, before)) = self.flights.insert(key, (task.id(), task)) {
            before.abort();
        }
    }

    fn tell(&self, notice: Option<Notice>) {
        let Some(Notice { warning, reason, message, container }) = notice else { return };
        let pod = Arc::clone(self.life.pod());
        self.hands.report.happened(Happening { pod, warning, reason, message, container });
    }

    /// Writes the status if it changed, and shows the pod to the server.
    fn show(&mut self, now: Now) {
        let Some(key) = &self.key else { return };
        let status = self.life.status(now, &self.facts, &self.status);
        let finished = self.life.is_finished();
        let pod = Arc::clone(self.life.pod());
        let value = json!({ "uid": spec::uid(&pod), "status": status, "finished": finished });
        let value = Bytes::from(value.to_string());
        if self.shown.as_ref() == Some(&value) {
            return;
        }
        self.hands.report.put(key.clone(), value.clone());
        self.shown = Some(value);
        let view = self.view(&pod, &status);
        let shown = Pod { status: Some(status.clone()), ..(*pod).clone() };
        match serde_json::to_value(&shown) {
            Ok(object) => {
                let name = (spec::namespace(&pod).to_owned(), spec::name(&pod).to_owned());
                self.hands.table.show(name, view, object);
            }
            Err(error) => tracing::error!(%error, "a pod that cannot be shown"),
        }
        self.status = status;
    }

    fn view(&self, pod: &Pod, status: &PodStatus) -> PodView {
        let seen = self.life.seen();
        let containers = spec::containers(pod).map(|container| {
            let latest = seen.latest(&container.name);
            let before = seen
                .of_name(&container.name)
                .filter(|held| latest.is_none_or(|latest| latest.id != held.id))
                .max_by_key(|held| (held.attempt, held.created_at));
            let told = status::prior_of(status, &container.name);
            let waiting = told.and_then(|told| told.state.as_ref()?.waiting.as_ref()?.reason.clone());
            let log = |path: &str| if path.is_empty() { None } else { Some(path.into()) };
            ContainerView {
                name: container.name.clone(),
                id: latest.map(|latest| latest.id.clone()),
                running: latest.is_some_and(super::seen::Contained::is_running),
                waiting,
                log: latest.and_then(|latest| log(&latest.log_path)),
                previous_log: before.and_then(|before| log(&before.log_path)),
            }
        });
        PodView {
            namespace: spec::namespace(pod).to_owned(),
            name: spec::name(pod).to_owned(),
            uid: spec::uid(pod).to_owned(),
            started_at: self.life.started_at(),
            sandbox: seen.newest_sandbox().filter(|sandbox| sandbox.ready).map(|sandbox| sandbox.id.clone()),
            containers: containers.collect(),
        }
    }
}
