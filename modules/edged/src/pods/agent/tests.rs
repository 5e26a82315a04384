//! The agent over a runtime that fails: whatever was lost, killed or started anew in between, it converges.

use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until};

use super::*;
use crate::{
    cgroups::Layout,
    env,
    fake::{Behaviour, EPOCH_NANOS, Fake, Faults, Left, Metadata},
    make::{self, ConfigError, Inputs},
    objects::Objects,
    pods::maker::Maker,
    runtime::cri,
};

/// Configurations as a node makes them, and no folders but those of logs.
#[derive(Debug)]
struct Plain(make::Settings);

impl Maker for Plain {
    fn set_up(&self, _: &Pod, _: &Objects) -> Result<(), String> {
        Ok(())
    }
    fn refresh(&self, _: &Pod, _: &Objects) -> Result<(), String> {
        Ok(())
    }
    fn tear_down(&self, _: &str) -> Result<(), String> {
        Ok(())
    }
    fn uids(&self) -> Vec<String> {
        Vec::new()
    }
    fn forget(&self, _: &str, _: &str, _: &str) {}
    fn sandbox(&self, pod: &Pod, attempt: u32) -> Result<cri::PodSandboxConfig, ConfigError> {
        make::sandbox(pod, &self.0, attempt)
    }
    fn container(
        &self,
        pod: &Pod,
        container: &k8s_openapi::api::core::v1::Container,
        objects: &Objects,
        image: &cri::Image,
        attempt: u32,
        pod_ips: &[String],
    ) -> Result<cri::ContainerConfig, ConfigError> {
        let envs = env::environment(pod, container, objects, &self.0, pod_ips)?;
        make::container(pod, container, &self.0, Inputs { attempt, image, envs, mounts: Vec::new() })
    }
    fn release(&self, _: &str, _: &str) {}
    fn termination_message(&self, _: &str, _: &str, _: u32) -> Option<String> {
        None
    }
}

/// A node whose disk outlives its agent.
struct Node {
    folder: tempfile::TempDir,
    fake: Fake,
    agent: Agent,
    began: Instant,
    /// What the agent wrote to `status`.
    disk: BTreeMap<String, Bytes>,
    wanted: BTreeMap<Name, Arc<Pod>>,
    made: u32,
}

fn settings(folder: &std::path::Path) -> make::Settings {
    make::Settings {
        node: "n".to_owned(),
        folder: folder.to_owned(),
        addresses: vec![[10, 0, 0, 1].into()],
        cluster_dns: Vec::new(),
        cluster_domain: String::new(),
        host_dns: cri::DnsConfig::default(),
        api: None,
        cgroups: Layout::none(),
        memory: 1 << 30,
        allocatable: BTreeMap::new(),
    }
}

fn agent(folder: &std::path::Path, fake: &Fake, began: Instant) -> Agent {
    let table = Arc::new(Table::new(Arc::new(|| None)));
    let maker = Arc::new(Plain(settings(folder)));
    let hands = Hands::new(Arc::new(fake.clone()), maker, Reporter::new("n"), table, "n");
    let settings = Settings {
        node: "n".to_owned(),
        host_ips: vec!["10.0.0.1".to_owned()],
        limits: admit::Limits { pods: 100, allocatable: BTreeMap::new() },
        clock: Clock { began: Instant::now(), simulated: Some(EPOCH_NANOS + nanos(began.elapsed())) },
    };
    Agent::new(settings, Arc::new(hands))
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap()
}

impl Node {
    async fn start(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (fake, began) = (Fake::new(seed, EPOCH_NANOS), Instant::now());
        fake.add_image("app:1", 1);
        let agent = agent(folder.path(), &fake, began);
        let (disk, wanted) = (BTreeMap::new(), BTreeMap::new());
        let mut node = Self { folder, fake, agent, began, disk, wanted, made: 0 };
        node.begin().await;
        node
    }

    /// What an agent does first: what was written, what the runtime shows, what must be.
    async fn begin(&mut self) {
        for (key, value) in &self.disk {
            let name = key.strip_prefix("pod/").and_then(|rest| rest.split_once('/'));
            if let (Some((namespace, name)), Ok(prior)) = (name, serde_json::from_slice(value)) {
                self.agent.priors.insert((namespace.to_owned(), name.to_owned()), prior);
            }
        }
        self.agent.list_all().await;
        for (name, pod) in self.wanted.clone() {
            self.agent.changed(Change::Pod(name, Some(pod)));
        }
        self.agent.changed(Change::Synced);
        self.agent.collect();
    }

    /// The agent is killed where it stands, and started again.
    async fn kill_agent(&mut self) {
        self.write();
        self.agent = agent(self.folder.path(), &self.fake, self.began);
        self.begin().await;
    }

    fn write(&mut self) {
        for (key, value) in self.agent.report.take_entries() {
            match value {
                Some(value) => drop(self.disk.insert(key, value)),
                None => drop(self.disk.remove(&key)),
            }
        }
    }

    async fn pass(&mut self, time: Duration) {
        let (end, mut relist) = (Instant::now() + time, clock::every(Duration::from_secs(1)));
        loop {
            tokio::select! {
                () = sleep_until(end) => break,
                Some(ended) = self.agent.workers.join_next_with_id() => {
                    self.agent.ended(ended.expect("no worker panics").0);
                }
                _ = relist.tick() => self.agent.relist().await,
            }
            self.agent.collect();
        }
        self.write();
    }

    fn add(&mut self, name: &str) {
        self.made += 1;
        let uid = format!("uid-{}", self.made);
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": name, "namespace": "d", "uid": uid },
            "spec": {
                "nodeName": "n", "terminationGracePeriodSeconds": 3,
                "containers": [
                    { "name": "a", "image": "app:1", "imagePullPolicy": "IfNotPresent" },
                    { "name": "b", "image": "app:1", "imagePullPolicy": "IfNotPresent" },
                ],
            },
        }))
        .unwrap();
        let key = ("d".to_owned(), name.to_owned());
        self.wanted.insert(key.clone(), Arc::new(pod.clone()));
        self.agent.changed(Change::Pod(key, Some(Arc::new(pod))));
    }

    fn remove(&mut self, name: &str) {
        let key = ("d".to_owned(), name.to_owned());
        self.wanted.remove(&key);
        self.agent.changed(Change::Pod(key, None));
    }

    async fn running(&self) -> Vec<String> {
        use crate::runtime::Runtime as _;
        let all = self.fake.containers().await.unwrap();
        let mut ids: Vec<String> = all
            .into_iter()
            .filter(|container| container.state() == cri::ContainerState::ContainerRunning)
            .map(|container| container.id)
            .collect();
        ids.sort();
        ids
    }

    fn status(&self, name: &str) -> Value {
        serde_json::from_slice(&self.disk[&format!("pod/d/{name}")]).unwrap()
    }
}

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn a_killed_agent_leaves_containers_as_they_are() {
    let mut node = Node::start(1).await;
    node.add("p");
    node.pass(MINUTE).await;
    let before = node.running().await;
    assert_eq!(before.len(), 2);
    assert_eq!(node.status("p")["status"]["phase"], "Running");
    node.kill_agent().await;
    node.pass(MINUTE).await;
    assert_eq!(node.running().await, before);
    let left = Left { sandboxes: 1, sandboxes_ready: 1, containers: 2, containers_running: 2 };
    assert_eq!(node.fake.left(), left);
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_the_last_wanted_pods_run_again() {
    for metadata in [Metadata::Kept, Metadata::Lost] {
        let mut node = Node::start(2).await;
        node.add("p");
        node.pass(MINUTE).await;
        node.fake.reboot(metadata);
        node.fake.add_image("app:1", 1);
        node.kill_agent().await;
        node.pass(MINUTE).await;
        assert_eq!(node.running().await.len(), 2, "{metadata:?}");
        assert_eq!(node.status("p")["status"]["containerStatuses"][0]["restartCount"], 1);
    }
}

#[tokio::test(start_paused = true)]
async fn what_nobody_wants_is_ended_only_once_everything_wanted_is_known() {
    let mut node = Node::start(3).await;
    node.add("p");
    node.pass(MINUTE).await;
    node.agent = agent(node.folder.path(), &node.fake, node.began);
    node.agent.list_all().await;
    node.pass(MINUTE).await;
    assert_eq!(node.running().await.len(), 2, "nobody has said that all is known");
    node.agent.changed(Change::Synced);
    node.agent.collect();
    node.pass(MINUTE).await;
    assert_eq!(node.fake.left(), Left::default());
}

#[tokio::test(start_paused = true)]
async fn another_pod_of_a_name_waits_until_nothing_is_left_of_the_first() {
    let mut node = Node::start(4).await;
    node.add("p");
    node.pass(MINUTE).await;
    node.add("p");
    node.pass(MINUTE).await;
    assert_eq!(node.status("p")["uid"], "uid-2");
    assert_eq!(node.running().await.len(), 2);
    assert_eq!(node.fake.left().sandboxes, 1);
}

/// Draws from a seed: a linear congruence is enough to choose what happens next.
fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

#[tokio::test(start_paused = true)]
async fn whatever_fails_in_between_it_converges_and_leaks_nothing() {
    for seed in 0..12 {
        let mut chance = seed;
        let mut node = Node::start(seed).await;
        node.fake.script("app:1", [Behaviour::ends(Duration::from_secs(7), 1), Behaviour::forever()]);
        let names = ["p", "q", "r"];
        for _ in 0..30 {
            let late_by = Duration::from_secs(2);
            node.fake.set_faults(Faults { unreached: 30, lost: 60, late: 100, late_by, hints_lost: 500 });
            let name = names[usize::try_from(draw(&mut chance, 3)).unwrap()];
            match draw(&mut chance, 8) {
                0 | 1 => node.add(name),
                2 => node.remove(name),
                3 => node.kill_agent().await,
                4 => {
                    node.fake.reboot(Metadata::Kept);
                    node.kill_agent().await;
                }
                5 => {
                    node.fake.set_faults(Faults::default());
                    if let Some(id) = node.running().await.first() {
                        node.fake.crash(id, 137);
                    }
                }
                6 => {
                    node.fake.kill();
                    node.pass(Duration::from_secs(5)).await;
                    node.fake.start();
                }
                _ => {}
            }
            let seconds = draw(&mut chance, 20);
            node.pass(Duration::from_secs(seconds)).await;
        }
        node.fake.set_faults(Faults::default());
        node.pass(20 * MINUTE).await;
        assert_eq!(node.running().await.len(), 2 * node.wanted.len(), "seed {seed}");
        let left = node.fake.left();
        assert_eq!(left.sandboxes_ready, node.wanted.len(), "seed {seed}: {left:?}");
        // Unchanged pods are the same containers through a quiet restart of the agent.
        let before = node.running().await;
        node.kill_agent().await;
        node.pass(MINUTE).await;
        assert_eq!(node.running().await, before, "seed {seed}");
        for name in names {
            node.remove(name);
        }
        node.pass(5 * MINUTE).await;
        assert_eq!(node.fake.left(), Left::default(), "seed {seed}");
        let statuses: Vec<&String> = node.disk.keys().filter(|key| key.starts_with("pod/")).collect();
        assert!(statuses.is_empty(), "seed {seed}: {statuses:?}");
    }
}
