use k8s_openapi::api::core::v1::ContainerState;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::pods::{
    seen::Sandbox,
    status::{self, Facts},
};

const SECOND: Duration = Duration::from_secs(1);
const EPOCH: i64 = 1_767_225_600_000_000_000;

/// A runtime that does at once what a life asks for, and a clock.
#[derive(Debug)]
struct World {
    life: Life,
    now: Now,
    ids: u32,
    /// What was asked for, in order.
    done: Vec<Action>,
    /// Kills that are under way: containers that take their time to end.
    slow: bool,
    pending: Vec<(Key, Action)>,
    notices: Vec<Notice>,
}

fn pod(spec: Value) -> Arc<Pod> {
    let metadata = json!({ "name": "web", "namespace": "default", "uid": "u-1" });
    Arc::new(serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap())
}

fn deleted(pod: &Pod, grace: i64) -> Arc<Pod> {
    let mut pod = pod.clone();
    pod.metadata.deletion_timestamp = Some(status::time(EPOCH));
    pod.metadata.deletion_grace_period_seconds = Some(grace);
    Arc::new(pod)
}

fn containers(names: &[&str]) -> Value {
    names.iter().map(|name| json!({ "name": name, "image": format!("{name}:1") })).collect()
}

impl World {
    fn new(spec: Value) -> Self {
        Self::of(pod(spec), Seen::default(), PodStatus::default(), Now { mono: Duration::ZERO, wall: EPOCH })
    }

    fn of(pod: Arc<Pod>, seen: Seen, prior: PodStatus, now: Now) -> Self {
        let life = Life::new(now, pod, seen, prior);
        let (done, pending, notices) = (Vec::new(), Vec::new(), Vec::new());
        Self { life, now, ids: 100, done, slow: false, pending, notices }
    }

    /// The agent is started again: what it knew is lost, what the runtime and the store have is not.
    fn restart(self) -> Self {
        let prior = self.life.status(self.now, &Facts::default(), &PodStatus::default());
        let now = Now { mono: Duration::ZERO, wall: self.now.wall };
        let mut world = Self::of(Arc::clone(&self.life.pod), self.life.seen.clone(), prior, now);
        world.ids = self.ids;
        world
    }

    fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall += i64::try_from(time.as_nanos()).unwrap();
    }

    /// Steps and performs until nothing is left to do now. When to go on.
    fn settle(&mut self) -> Option<Duration> {
        for _ in 0..1_000 {
            let step = self.life.step(self.now);
            self.notices.extend(step.notices);
            if step.actions.is_empty() {
                return step.wake;
            }
            for (key, action) in step.actions {
                self.done.push(action.clone());
                let slow = self.slow && matches!(action, Action::Kill { .. });
                if slow {
                    self.pending.push((key, action));
                } else {
                    self.perform(key, action);
                }
            }
        }
        panic!("it goes on for ever: {:?}", self.done.iter().rev().take(10).collect::<Vec<_>>());
    }

    fn perform(&mut self, key: Key, action: Action) {
        self.ids += 1;
        let id = format!("{}", self.ids);
        let now = self.now;
        match &action {
            Action::RunSandbox { attempt } => self.life.seen_mut().merge_sandbox(Sandbox {
                id,
                attempt: *attempt,
                ready: true,
                ips: vec!["10.0.0.1".to_owned()],
            }),
            Action::Start { container, sandbox, attempt, back_off, .. } => {
                let mark = spec::container(&self.life.pod, container).map(spec::mark).unwrap_or_default();
                self.life.seen_mut().merge_container(Contained {
                    id,
                    sandbox: sandbox.clone(),
                    name: container.clone(),
                    attempt: *attempt,
                    state: State::Running { started_at: now.wall },
                    created_at: now.wall,
                    image: String::new(),
                    image_ref: String::new(),
                    spec: mark,
                    back_off: *back_off,
                    log_path: String::new(),
                });
            }
            Action::Kill { id, .. } => self.ended(id, 143),
            Action::Cancel(_) => return,
            _ => {}
        }
        self.life.done(now, key, Outcome::Done);
    }

    fn ended(&mut self, id: &str, code: i32) {
        let wall = self.now.wall;
        let held = self.life.seen_mut().containers.iter_mut().find(|container| container.id == id).unwrap();
        let State::Running { started_at } = held.state else { panic!("it does not run: {held:?}") };
        held.state = State::Exited(Exit { started_at, finished_at: wall, code, ..Exit::default() });
    }

    fn exit(&mut self, name: &str, code: i32) {
        let id = self.life.seen().latest(name).unwrap().id.clone();
        self.ended(&id, code);
    }

    fn running(&self) -> Vec<&str> {
        let running = self.life.seen().containers.iter().filter(|container| container.is_running());
        running.map(|container| container.name.as_str()).collect()
    }

    fn status(&self) -> PodStatus {
        self.life.status(self.now, &Facts::default(), &PodStatus::default())
    }

    fn phase(&self) -> String {
        self.status().phase.unwrap()
    }

    fn state(&self, name: &str) -> ContainerState {
        status::prior_of(&self.status(), name).unwrap().state.clone().unwrap()
    }

    fn waits_for(&self, name: &str) -> Option<String> {
        self.state(name).waiting?.reason
    }

    fn condition(&self, kind: &str) -> String {
        let conditions = self.status().conditions.unwrap();
        conditions.iter().find(|condition| condition.type_ == kind).unwrap().status.clone()
    }

    fn starts(&self, name: &str) -> usize {
        let starts =
            |action: &&Action| matches!(action, Action::Start { container, .. } if container == name);
        self.done.iter().filter(starts).count()
    }
}

#[test]
fn a_pod_gets_volumes_then_a_sandbox_then_its_containers() {
    let mut world = World::new(json!({ "containers": containers(&["a", "b"]) }));
    assert_eq!(world.phase(), "Pending");
    assert_eq!(world.waits_for("a").as_deref(), Some("ContainerCreating"));
    world.settle();
    assert_eq!(world.done[0], Action::SetUp);
    assert_eq!(world.done[1], Action::RunSandbox { attempt: 0 });
    assert_eq!(world.running(), ["a", "b"]);
    assert_eq!(world.phase(), "Running");
    assert_eq!(world.condition("Ready"), "True");
    assert_eq!(world.status().pod_ip.as_deref(), Some("10.0.0.1"));
}

#[test]
fn init_containers_run_one_after_the_other_before_the_others() {
    let spec = json!({ "initContainers": containers(&["i", "j"]), "containers": containers(&["c"]) });
    let mut world = World::new(spec);
    world.settle();
    assert_eq!(world.running(), ["i"]);
    assert_eq!(world.waits_for("c").as_deref(), Some("PodInitializing"));
    assert_eq!(world.condition("Initialized"), "False");
    world.exit("i", 0);
    world.settle();
    assert_eq!(world.running(), ["j"]);
    world.exit("j", 0);
    world.settle();
    assert_eq!(world.running(), ["c"]);
    assert_eq!(world.condition("Initialized"), "True");
}

#[test]
fn an_init_container_that_fails_ends_a_pod_that_is_never_restarted() {
    let spec = json!({
        "restartPolicy": "Never", "initContainers": containers(&["i"]), "containers": containers(&["c"]),
    });
    let mut world = World::new(spec);
    world.settle();
    world.exit("i", 1);
    world.settle();
    assert_eq!(world.phase(), "Failed");
    assert_eq!(world.starts("c"), 0);
    assert!(world.life.is_finished());
}

#[test]
fn a_sidecar_starts_before_the_rest_and_ends_after_it() {
    let mut sidecar = containers(&["s"]);
    sidecar[0]["restartPolicy"] = json!("Always");
    sidecar[0]["startupProbe"] = json!({ "exec": { "command": ["true"] } });
    let spec =
        json!({ "restartPolicy": "Never", "initContainers": sidecar, "containers": containers(&["c"]) });
    let mut world = World::new(spec);
    world.settle();
    assert_eq!(world.running(), ["s"], "its startup probe has not passed");
    let id = world.life.seen().latest("s").unwrap().id.clone();
    world.life.probed(&id, Probed::Started);
    world.settle();
    assert_eq!(world.running(), ["s", "c"]);
    world.exit("s", 1);
    world.settle();
    assert_eq!(world.starts("s"), 2, "a sidecar is restarted whatever the policy");
    world.exit("c", 0);
    world.settle();
    assert_eq!(world.running(), [""; 0], "it ends with the pod");
    assert_eq!(world.phase(), "Succeeded");
}

#[test]
fn a_container_that_fails_is_restarted_at_once_then_after_a_delay_that_grows() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    world.settle();
    world.exit("c", 1);
    world.settle();
    assert_eq!(world.starts("c"), 2, "at once");
    for delay in [10, 20, 40] {
        world.exit("c", 1);
        let wake = world.settle().unwrap();
        assert_eq!(wake, world.now.mono + delay * SECOND);
        assert_eq!(world.waits_for("c").as_deref(), Some("CrashLoopBackOff"));
        assert_eq!(world.phase(), "Running");
        let starts = world.starts("c");
        world.pass(delay * SECOND - SECOND / 10);
        world.settle();
        assert_eq!(world.starts("c"), starts, "not before its time");
        world.pass(SECOND / 10);
        world.settle();
        assert_eq!(world.starts("c"), starts + 1);
    }
    assert!(world.notices.iter().any(|notice| notice.reason == "BackOff"));
    assert_eq!(status::prior_of(&world.status(), "c").unwrap().restart_count, 4);
}

#[test]
fn the_delay_before_a_restart_survives_the_agent() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    world.settle();
    for delay in [0, 10, 20] {
        world.pass(delay * SECOND);
        world.settle();
        world.exit("c", 1);
        world.settle();
    }
    world.pass(20 * SECOND);
    world.settle();
    world.exit("c", 1);
    world.settle();
    world.pass(15 * SECOND);
    let mut world = world.restart();
    let wake = world.settle().unwrap();
    assert_eq!(wake, 25 * SECOND, "of 40 s, 15 have passed");
    assert_eq!(world.waits_for("c").as_deref(), Some("CrashLoopBackOff"));
}

#[test]
fn a_restart_of_the_agent_touches_no_running_container() {
    let mut world = World::new(json!({ "containers": containers(&["a", "b"]) }));
    world.settle();
    let before = world.life.seen().clone();
    let mut world = world.restart();
    world.settle();
    assert_eq!(world.done, [Action::SetUp]);
    assert_eq!(*world.life.seen(), before);
    assert_eq!(world.condition("Ready"), "True");
}

#[test]
fn a_pod_whose_containers_are_over_is_over() {
    for (policy, code, phase) in
        [("OnFailure", 0, "Succeeded"), ("Never", 0, "Succeeded"), ("Never", 3, "Failed")]
    {
        let mut world = World::new(json!({ "restartPolicy": policy, "containers": containers(&["c"]) }));
        world.settle();
        world.exit("c", code);
        world.settle();
        assert_eq!(world.phase(), phase, "{policy}");
        assert!(world.life.is_finished());
        assert!(world.done.contains(&Action::TearDown));
        assert_eq!(world.state("c").terminated.unwrap().exit_code, code);
        let mut world = world.restart();
        world.settle();
        assert_eq!((world.phase().as_str(), world.starts("c")), (phase, 0), "it is never started again");
    }
}

#[test]
fn a_deleted_pod_ends_within_its_grace_period_and_says_when_nothing_is_left() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    world.settle();
    world.slow = true;
    let gone = deleted(&world.life.pod.clone(), 30);
    world.life.set_pod(world.now, gone);
    world.settle();
    let id = world.life.seen().latest("c").unwrap().id.clone();
    let kill = |grace: u32| Action::Kill { container: "c".to_owned(), id: id.clone(), grace: grace * SECOND };
    assert_eq!(world.done.last(), Some(&kill(30)));
    assert!(!world.life.is_finished());
    world.pass(5 * SECOND);
    // kubectl delete --grace-period=2, later.
    let sooner = deleted(&world.life.pod.clone(), 2);
    world.life.set_pod(world.now, sooner);
    world.settle();
    assert_eq!(world.done.last(), Some(&kill(2)), "a shorter grace period takes effect at once");
    world.slow = false;
    let (key, action) = world.pending.pop().unwrap();
    world.perform(key, action);
    world.settle();
    assert!(world.life.is_finished());
    assert!(world.done.contains(&Action::TearDown));
    assert_eq!(world.phase(), "Failed");
    assert!(!world.life.is_forgotten(), "its object is still there");
    world.life.set_gone();
    world.settle();
    assert!(world.life.is_forgotten());
    assert_eq!(*world.life.seen(), Seen::default());
}

#[test]
fn a_pod_that_runs_longer_than_it_may_fails() {
    let spec = json!({ "activeDeadlineSeconds": 60, "containers": containers(&["c"]) });
    let mut world = World::new(spec);
    assert_eq!(world.settle(), Some(60 * SECOND));
    world.pass(40 * SECOND);
    let mut world = world.restart();
    assert_eq!(world.settle(), Some(20 * SECOND), "it is counted from its start, not the agent's");
    world.pass(20 * SECOND);
    world.settle();
    assert_eq!(world.phase(), "Failed");
    assert_eq!(world.status().reason.as_deref(), Some("DeadlineExceeded"));
    assert_eq!(world.running(), [""; 0]);
}

#[test]
fn a_sandbox_that_died_is_replaced_and_initialization_runs_again() {
    let spec = json!({ "initContainers": containers(&["i"]), "containers": containers(&["c"]) });
    let mut world = World::new(spec);
    world.settle();
    world.exit("i", 0);
    world.settle();
    world.exit("c", 255);
    for sandbox in &mut world.life.seen_mut().sandboxes {
        sandbox.ready = false;
    }
    world.settle();
    assert!(world.done.contains(&Action::RunSandbox { attempt: 1 }));
    assert_eq!(world.starts("i"), 2);
    world.exit("i", 0);
    world.settle();
    assert_eq!(world.running(), ["c"]);
    assert_eq!(status::prior_of(&world.status(), "c").unwrap().restart_count, 1);
}

#[test]
fn an_image_that_cannot_be_pulled_is_waited_for_longer_and_longer() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    let failed =
        || Outcome::Failed { reason: "ErrImagePull", message: "no such host".to_owned(), unsure: false };
    for (delay, longest) in
        [(10, false), (20, false), (40, false), (80, false), (160, false), (300, true), (300, true)]
    {
        loop {
            let step = world.life.step(world.now);
            let Some((key, action)) = step.actions.into_iter().next() else { break };
            if matches!(action, Action::Start { .. }) {
                world.life.done(world.now, key, failed());
                assert_eq!(world.waits_for("c").as_deref(), Some("ErrImagePull"));
                break;
            }
            world.perform(key, action);
        }
        world.pass(PULL_SHOWN);
        assert_eq!(world.waits_for("c").as_deref(), Some("ImagePullBackOff"), "{longest}");
        assert_eq!(world.life.step(world.now).wake, Some(world.now.mono + delay * SECOND - PULL_SHOWN));
        world.pass(delay * SECOND - PULL_SHOWN);
    }
    assert_eq!(world.phase(), "Pending");
}

#[test]
fn what_was_missing_is_tried_again_as_soon_as_objects_change() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    let (key, _) = world.life.step(world.now).actions.remove(0);
    let message = "configmap \"x\" not found".to_owned();
    let missing = Outcome::Failed { reason: "FailedMount", message, unsure: false };
    world.life.done(world.now, key, missing);
    assert!(world.life.step(world.now).actions.is_empty());
    world.life.objects_changed();
    world.settle();
    assert_eq!(world.running(), ["c"]);
}

#[test]
fn after_a_lost_answer_it_looks_before_it_goes_on() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    let (key, action) = world.life.step(world.now).actions.remove(0);
    world.perform(key, action);
    let (key, action) = world.life.step(world.now).actions.remove(0);
    assert_eq!(action, Action::RunSandbox { attempt: 0 });
    let lost = Outcome::Failed { reason: "FailedCreatePodSandBox", message: String::new(), unsure: true };
    world.life.done(world.now, key, lost);
    let step = world.life.step(world.now);
    assert_eq!(step.actions, [(Key::Look, Action::Look)]);
    // It had been made.
    let sandbox = Sandbox { id: "s".to_owned(), attempt: 0, ready: true, ips: Vec::new() };
    world.life.seen_mut().merge_sandbox(sandbox);
    world.life.done(world.now, Key::Look, Outcome::Done);
    world.settle();
    assert_eq!(world.life.seen().sandboxes.len(), 1);
    assert_eq!(world.running(), ["c"]);
}

#[test]
fn a_container_that_fails_its_liveness_probe_is_restarted() {
    let mut container = containers(&["c"]);
    container[0]["livenessProbe"] = json!({ "exec": { "command": ["false"] } });
    container[0]["readinessProbe"] = json!({ "exec": { "command": ["true"] } });
    let mut world = World::new(json!({ "containers": container, "terminationGracePeriodSeconds": 7 }));
    world.settle();
    assert_eq!(world.condition("Ready"), "False", "its readiness probe has not passed");
    let id = world.life.seen().latest("c").unwrap().id.clone();
    world.life.probed(&id, Probed::Ready(true));
    assert_eq!(world.condition("Ready"), "True");
    world.life.probed(&id, Probed::Condemned(Condemned { probe: "liveness", grace: None }));
    world.settle();
    assert!(world.done.contains(&Action::Kill { container: "c".to_owned(), id, grace: 7 * SECOND }));
    assert_eq!(world.starts("c"), 2);
    let told = world.notices.iter().find(|notice| notice.reason == "Killing").unwrap();
    assert_eq!(told.message, "Container c failed liveness probe, will be restarted");
}

#[test]
fn a_changed_image_makes_another_container_whatever_the_policy() {
    let mut world = World::new(json!({ "restartPolicy": "Never", "containers": containers(&["c"]) }));
    world.settle();
    let changed = pod(json!({ "restartPolicy": "Never", "containers": [{ "name": "c", "image": "c:2" }] }));
    world.life.set_pod(world.now, changed);
    world.settle();
    assert_eq!(world.starts("c"), 2);
    assert_eq!(world.running(), ["c"]);
    assert_eq!(world.phase(), "Running");
}

#[test]
fn a_rejected_pod_is_failed_and_runs_nothing() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    world.life.reject("OutOfcpu", "Node didn't have enough resource: cpu");
    world.settle();
    let status = world.status();
    assert_eq!(status.phase.as_deref(), Some("Failed"));
    assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
    assert!(world.life.is_finished());
    assert_eq!(world.done, [Action::TearDown]);
}

#[test]
fn of_a_container_the_last_that_ended_is_kept_for_its_logs() {
    let mut world = World::new(json!({ "containers": containers(&["c"]) }));
    world.settle();
    for _ in 0..5 {
        world.exit("c", 1);
        while let Some(wake) = world.settle() {
            let wait = wake.saturating_sub(world.now.mono);
            world.pass(wait);
        }
    }
    let seen = world.life.seen();
    assert_eq!(seen.containers.iter().filter(|container| !container.is_running()).count(), 1);
    assert_eq!(seen.latest("c").unwrap().attempt, 5);
}

proptest! {
    /// Whatever ends, is lost or is restarted in whatever order: a pod that is wanted comes to run, and of a pod
    /// that is not wanted nothing is left.
    #[test]
    fn every_life_converges(
        events in prop::collection::vec((0u8..6, 0u8..3, 0i32..2), 0..40),
        policy in prop::sample::select(vec!["Always", "OnFailure", "Never"]),
    ) {
        let mut sidecar = containers(&["s"]);
        sidecar[0]["restartPolicy"] = json!("Always");
        let inits = json!([{ "name": "i", "image": "i:1" }, sidecar[0]]);
        let spec = json!({
            "restartPolicy": policy, "initContainers": inits, "containers": containers(&["a", "b"]),
        });
        let mut world = World::new(spec);
        let names = ["i", "a", "b"];
        for (event, which, code) in events {
            world.settle();
            let name = names[usize::from(which)];
            let runs = world.life.seen().latest(name).is_some_and(Contained::is_running);
            match event {
                0 if runs => world.exit(name, code),
                1 => world = world.restart(),
                2 => {
                    let wall = world.now.wall;
                    let seen = world.life.seen_mut();
                    seen.sandboxes.iter_mut().for_each(|sandbox| sandbox.ready = false);
                    for container in seen.containers.iter_mut().filter(|container| container.is_running()) {
                        let exit = Exit { started_at: wall, finished_at: wall, code: 255, ..Exit::default() };
                        container.state = State::Exited(exit);
                    }
                }
                3 => world.life.look(),
                _ => world.pass(SECOND * u32::from(which) * 60),
            }
        }
        // Initialization succeeds from now on, and time passes.
        for _ in 0..200 {
            let wake = world.settle();
            if world.life.seen().latest("i").is_some_and(Contained::is_running) {
                world.exit("i", 0);
            } else if let Some(wake) = wake {
                let wait = wake.saturating_sub(world.now.mono);
                world.pass(wait);
            } else {
                break;
            }
        }
        let ready = world.life.seen().sandboxes.iter().filter(|sandbox| sandbox.ready).count();
        if world.life.is_ending() {
            prop_assert!(world.life.is_finished());
            prop_assert_eq!((ready, world.running().len()), (0, 0));
        } else {
            prop_assert_eq!(ready, 1);
            prop_assert!(world.running().contains(&"s"));
        }
        world.life.set_gone();
        for _ in 0..10 {
            world.settle();
            world.pass(60 * SECOND);
        }
        prop_assert!(world.life.is_forgotten());
        prop_assert_eq!(world.life.seen(), &Seen::default());
    }
}
