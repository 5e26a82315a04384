//! The probes of one pod: which are due, and what they say.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    hands::Hands,
    life::{Condemned, Life, Notice, Probed},
    seen::State,
    spec,
};
use crate::probes::{Kind, Outcome, Schedule, Target, Verdict, check};

/// Something that a probe said: of which instance, what that means, and what to tell.
pub(crate) type Said = (String, Option<Probed>, Option<Notice>);

#[derive(Debug)]
struct Watched {
    kind: Kind,
    probe: Probe,
    container: Arc<Container>,
    schedule: Schedule,
    busy: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Probing {
    hands: Arc<Hands>,
    /// By id of the instance.
    watched: BTreeMap<String, Vec<Watched>>,
    checks: JoinSet<(String, Kind, Outcome)>,
    ip: String,
}

impl Probing {
    pub(crate) fn new(hands: Arc<Hands>) -> Self {
        Self { hands, watched: BTreeMap::new(), checks: JoinSet::new(), ip: String::new() }
    }

    /// Probes what runs now, and nothing else.
    pub(crate) fn follow(&mut self, pod: &Pod, life: &Life, ip: Option<&str>, running: bool) {
        if self.ip != ip.unwrap_or_default() {
            self.ip = ip.unwrap_or_default().to_owned();
        }
        let mut before = std::mem::take(&mut self.watched);
        for container in spec::containers(pod).filter(|_| running) {
            let none = container.startup_probe.is_none()
                && container.liveness_probe.is_none()
                && container.readiness_probe.is_none();
            let latest = life.seen().latest(&container.name).filter(|_| !none);
            let Some(latest) = latest.filter(|latest| matches!(latest.state, State::Running { .. })) else {
                continue;
            };
            if life.is_starting(&container.name) {
                continue;
            }
            let checks = life.checks(latest);
            let wanted: &[(Kind, &Option<Probe>)] = if checks.started {
                &[(Kind::Liveness, &container.liveness_probe), (Kind::Readiness, &container.readiness_probe)]
            } else {
                &[(Kind::Startup, &container.startup_probe)]
            };
            let mut held = before.remove(&latest.id).unwrap_or_default();
            held.retain(|watched| wanted.iter().any(|(kind, _)| *kind == watched.kind));
            for (kind, probe) in wanted {
                let Some(probe) = probe else { continue };
                if held.iter().any(|watched| watched.kind == *kind) {
                    continue;
                }
                held.push(Watched {
                    kind: *kind,
                    probe: probe.clone(),
                    container: Arc::new(container.clone()),
                    schedule: Schedule::new(*kind, probe, Instant::now(), Duration::ZERO),
                    busy: false,
                });
            }
            self.watched.insert(latest.id.clone(), held);
        }
    }

    /// Waits until a probe says something. Cancel safe.
    pub(crate) async fn next(&mut self) -> Said {
        loop {
            self.begin_due();
            let idle = self.watched.values().flatten().filter(|watched| !watched.busy);
            let due = idle.map(|watched| watched.schedule.due()).min();
            let checking = !self.checks.is_empty();
            tokio::select! {
                Some(done) = self.checks.join_next(), if checking => match done {
                    Ok((id, kind, outcome)) => {
                        if let Some(said) = self.finished(id, kind, &outcome) {
                            return said;
                        }
                    }
                    Err(error) => tracing::error!(%error, "a probe"),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = std::future::pending(), if due.is_none() && !checking => {}
            }
        }
    }

    fn begin_due(&mut self) {
        let now = Instant::now();
        for (id, watched) in &mut self.watched {
            for watched in watched.iter_mut().filter(|watched| !watched.busy && watched.schedule.due() <= now)
            {
                watched.busy = true;
                watched.schedule.begin(now);
                let (hands, id, kind) = (Arc::clone(&self.hands), id.clone(), watched.kind);
                let (probe, container) = (watched.probe.clone(), Arc::clone(&watched.container));
                let ip = self.ip.clone();
                self.checks.spawn(async move {
                    let target =
                        Target { runtime: &*hands.runtime, id: &id, container: &container, pod_ip: &ip };
                    let outcome = check(&probe, &target).await;
                    (id, kind, outcome)
                });
            }
        }
    }

    fn finished(&mut self, id: String, kind: Kind, outcome: &Outcome) -> Option<Said> {
        let watched = self.watched.get_mut(&id)?.iter_mut().find(|watched| watched.kind == kind)?;
        watched.busy = false;
        let verdict = watched.schedule.finished(Instant::now(), outcome);
        let name = watched.container.name.clone();
        let shown = match kind {
            Kind::Startup => "Startup",
            Kind::Liveness => "Liveness",
            Kind::Readiness => "Readiness",
        };
        let notice = match outcome {
            Outcome::Success => None,
            Outcome::Failure(message) => Some(format!("{shown} probe failed: {message}")),
            Outcome::Unknown(message) => Some(format!("{shown} probe errored: {message}")),
        };
        let notice = notice.map(|message| Notice {
            warning: true,
            reason: "Unhealthy",
            message,
            container: Some(name),
        });
        let condemned = |probe: &'static str| {
            let grace = watched.probe.termination_grace_period_seconds;
            let grace = grace.map(|grace| Duration::from_secs(grace.max(0).unsigned_abs()));
            Probed::Condemned(Condemned { probe, grace })
        };
        let probed = match (kind, verdict) {
            (Kind::Startup, Some(Verdict::Passed)) => Some(Probed::Started),
            (Kind::Startup, Some(Verdict::Failed)) => Some(condemned("startup")),
            (Kind::Liveness, Some(Verdict::Failed)) => Some(condemned("liveness")),
            (Kind::Readiness, Some(verdict)) => Some(Probed::Ready(verdict == Verdict::Passed)),
            _ => None,
        };
        (probed.is_some() || notice.is_some()).then_some((id, probed, notice))
    }
}
