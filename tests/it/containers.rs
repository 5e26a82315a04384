//! Containers without a registry: a containerd of the node's own, driven through its socket. Each test has one of its
//! own, and counts what is left of it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use edged::{
    containerd::{
        Containerd, Settings,
        archive::{Entry, Image},
    },
    cri::Socket,
    runtime::{Runtime, RuntimeError, cri},
};
use tokio::time::timeout;

mod through_the_server;
mod what_pods_ask_for;

/// How long anything in here may take.
const PATIENCE: Duration = Duration::from_secs(30);
const BUSYBOX: &str = "octobus.test/busybox:1";

/// A node's data folder with a containerd of its own.
struct Node {
    folder: tempfile::TempDir,
    containerd: Option<Containerd>,
    pods: u32,
}

impl Node {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        put_busybox(&folder.path().join("images"));
        let mut node = Self { folder, containerd: None, pods: 0 };
        node.start_again().await;
        node
    }

    /// As an agent does that was killed and started again.
    async fn start_again(&mut self) {
        let containerd = Containerd::start(&self.settings()).await.unwrap();
        let (images, failed) = containerd.import(&self.folder.path().join("images")).await;
        assert_eq!((images, failed), (vec![BUSYBOX.to_owned()], Vec::new()));
        self.containerd = Some(containerd);
    }

    fn settings(&self) -> Settings {
        Settings { data: self.folder.path().to_owned(), sandbox_image: None }
    }

    fn runtime(&self) -> Socket {
        self.containerd.as_ref().unwrap().runtime()
    }

    fn pod(&mut self, name: &str) -> Pod {
        self.pods += 1;
        let config = cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{}", self.pods),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.folder.path().join("logs").join(name).to_str().unwrap().to_owned(),
            linux: Some(cri::LinuxPodSandboxConfig::default()),
            ..cri::PodSandboxConfig::default()
        };
        Pod { runtime: self.runtime(), config, sandbox: String::new() }
    }

    /// Ends everything, and holds it to having left nothing.
    async fn stop(mut self) {
        let run = self.run_folder();
        self.containerd.take().unwrap().stop().await.unwrap();
        let data = self.folder.path().to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let run = run.to_str().unwrap();
        let left: Vec<_> = mounts.lines().filter(|line| line.contains(data) || line.contains(run)).collect();
        assert!(left.is_empty(), "mounts are left: {left:#?}");
        assert!(!Path::new(run).exists(), "{run} is left");
        let bridge = self.bridge();
        assert!(!Path::new("/sys/class/net").join(&bridge).exists(), "{bridge} is left");
        let processes = processes_naming(run);
        assert!(processes.is_empty(), "processes are left: {processes:?}");
    }

    fn run_folder(&self) -> PathBuf {
        self.runtime().path().parent().unwrap().to_owned()
    }

    fn bridge(&self) -> String {
        let network = self.folder.path().join("edged/containerd/cni/10-octobus.conflist");
        let network: serde_json::Value = serde_json::from_slice(&fs::read(network).unwrap()).unwrap();
        network["plugins"][0]["bridge"].as_str().unwrap().to_owned()
    }
}

/// A test that failed leaves nothing either: what still runs is taken over, and ended.
impl Drop for Node {
    fn drop(&mut self) {
        if self.containerd.take().is_none() {
            return;
        }
        let settings = self.settings();
        let end = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                if let Ok(containerd) = Containerd::start(&settings).await {
                    containerd.stop().await.ok();
                }
            });
        };
        // The test's own runtime may be ending.
        std::thread::spawn(end).join().ok();
    }
}

/// Command lines with this in them: containerd itself, and the shims of its containers.
fn processes_naming(what: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let lines = all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(what))
        .collect()
}

struct Pod {
    runtime: Socket,
    config: cri::PodSandboxConfig,
    sandbox: String,
}

impl Pod {
    async fn run(mut self) -> Self {
        self.sandbox = self.runtime.run_sandbox(self.config.clone()).await.unwrap();
        self
    }

    async fn container(&self, name: &str, script: &str) -> String {
        let context = cri::LinuxContainerSecurityContext {
            namespace_options: Some(cri::NamespaceOption {
                pid: cri::NamespaceMode::Container.into(),
                ..cri::NamespaceOption::default()
            }),
            ..cri::LinuxContainerSecurityContext::default()
        };
        let linux = cri::LinuxContainerConfig { security_context: Some(context), resources: None };
        let config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: BUSYBOX.to_owned(), ..cri::ImageSpec::default() }),
            command: vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()],
            log_path: format!("{name}.log"),
            linux: Some(linux),
            ..cri::ContainerConfig::default()
        };
        let runtime = &self.runtime;
        let id = runtime.create_container(&self.sandbox, config, self.config.clone()).await.unwrap();
        runtime.start_container(&id).await.unwrap();
        id
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(Path::new(&self.config.log_directory).join(format!("{name}.log"))).unwrap()
    }
}

/// Busybox with its names, as an archive that `octobus` imports.
fn put_busybox(folder: &Path) {
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox"));
    let busybox = busybox.expect("busybox-static is installed");
    let mut entries = vec![("bin/busybox".to_owned(), Entry::Program(busybox))];
    for name in ["sh", "cat", "echo", "sleep", "nc", "seq", "id", "wget", "httpd", "true"] {
        entries.push((format!("bin/{name}"), Entry::Link("busybox".to_owned())));
    }
    entries.push(("tmp".to_owned(), Entry::Folder));
    let image = Image {
        name: BUSYBOX.to_owned(),
        entries,
        environment: vec!["PATH=/bin".to_owned()],
        ..Image::default()
    };
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("busybox.tar"), image.archive().unwrap()).unwrap();
}

/// Whether this machine can run containers at all; the tests say so and end where it cannot.
fn able() -> bool {
    let able = rustix::process::geteuid().is_root();
    if !able {
        eprintln!("containers need root: not tested");
    }
    able
}

async fn exited(runtime: &Socket, id: &str) -> cri::ContainerStatus {
    let exit = async {
        loop {
            let mut hints = runtime.hints().await.unwrap();
            let status = runtime.container_status(id).await.unwrap();
            if status.state() == cri::ContainerState::ContainerExited {
                return status;
            }
            timeout(Duration::from_millis(500), hints.recv()).await.ok();
        }
    };
    timeout(PATIENCE, exit).await.expect("the container ends")
}

#[tokio::test]
async fn a_pod_runs_with_no_registry_and_leaves_nothing_behind() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let runtime = node.runtime();
    let status = runtime.sandbox_status(&pod.sandbox).await.unwrap();
    assert!(!status.network.unwrap().ip.is_empty());
    let id = pod.container("main", "echo out; echo err >&2; exit 3").await;
    let status = exited(&runtime, &id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    let log = pod.log("main");
    assert!(log.contains(" stdout F out\n") && log.contains(" stderr F err\n"), "{log}");
    let running = pod.container("other", "sleep 1000").await;
    let answer =
        runtime.exec_sync(&running, vec!["cat".into(), "/proc/1/cmdline".into()], PATIENCE).await.unwrap();
    assert_eq!(answer.stdout, b"sleep\x001000\0");
    let late = runtime.exec_sync(&running, vec!["sleep".into(), "100".into()], Duration::from_secs(1)).await;
    assert!(matches!(late, Err(RuntimeError::Unavailable(_))), "{late:?}");
    assert!(matches!(runtime.container_status("none").await, Err(RuntimeError::NotFound(_))));
    runtime.remove_container("none").await.unwrap();
    runtime.remove_sandbox("none").await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn an_exit_is_hinted_once_the_runtime_shows_it() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let runtime = node.runtime();
    let id = pod.container("main", "exec sleep 1000").await;
    let mut hints = runtime.hints().await.unwrap();
    // Whether the subscription stands is not told: what comes first of it says so.
    let first = pod.container("first", "exit 0").await;
    let seen = async { while hints.recv().await.unwrap().id != first {} };
    if timeout(Duration::from_secs(1), seen).await.is_err() {
        exited(&runtime, &first).await;
    }
    runtime.stop_container(&id, Duration::ZERO).await.unwrap();
    let hinted = async {
        loop {
            let hint = hints.recv().await.expect("the runtime is there");
            let status = runtime.container_status(&id).await.unwrap();
            if hint.id == id && status.state() == cri::ContainerState::ContainerExited {
                return status;
            }
        }
    };
    let status = timeout(PATIENCE, hinted).await.expect("a hint");
    assert_eq!(status.exit_code, 137);
    node.stop().await;
}

#[tokio::test]
async fn containers_outlive_the_agent_and_containerd() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let id = pod.container("main", "sleep 1000").await;
    let process = fs::read_to_string(node.run_folder().join("process")).unwrap();

    // The agent goes, and another takes over.
    drop(node.containerd.take());
    node.start_again().await;
    assert_eq!(fs::read_to_string(node.run_folder().join("process")).unwrap(), process);
    let runtime = node.runtime();
    let status = runtime.container_status(&id).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);

    // containerd is killed: it is away, then it is back with the same container.
    let mut hints = runtime.hints().await.unwrap();
    let pid: i32 = process.split(' ').next().unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let ended = async { while hints.recv().await.is_some() {} };
    timeout(PATIENCE, ended).await.expect("hints end with the connection");
    let back = async {
        loop {
            match runtime.container_status(&id).await {
                Ok(status) => return status,
                Err(RuntimeError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(e) => panic!("{e}"),
            }
        }
    };
    let status = timeout(PATIENCE, back).await.expect("containerd is started again");
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning);
    node.stop().await;
}

/// What the machine's end does to one node: every process of it is gone, and what was not on disk.
fn reboot(node: &mut Node) {
    let run = node.run_folder();
    drop(node.containerd.take());
    let process = fs::read_to_string(run.join("process")).unwrap();
    let mut ends: Vec<i32> = vec![process.split(' ').next().unwrap().parse().unwrap()];
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let processes: Vec<i32> =
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let read = |pid: &i32, file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let is_shim = |pid: &&i32| {
        let line = String::from_utf8_lossy(&read(pid, "cmdline")).into_owned();
        line.contains(run.to_str().unwrap())
    };
    ends.extend(processes.iter().filter(is_shim));
    // Parents before their children: nobody notes how they ended.
    let mut at = 0;
    while at < ends.len() {
        let parent = format!("PPid:\t{}\n", ends[at]);
        let of_parent = |pid: &&i32| String::from_utf8_lossy(&read(pid, "status")).contains(&parent);
        let children: Vec<i32> = processes.iter().filter(of_parent).copied().collect();
        ends.extend(children.into_iter().filter(|child| !ends.contains(child)).collect::<Vec<_>>());
        at += 1;
    }
    for pid in &ends {
        let pid = rustix::process::Pid::from_raw(*pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
    }
    for pid in &ends {
        // It is gone, or a shadow that nobody has reaped yet.
        while !read(pid, "cmdline").is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let below = [run.to_str().unwrap(), node.folder.path().to_str().unwrap()];
    let mounts: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    for mount in mounts.iter().rev().filter(|mount| below.iter().any(|below| mount.starts_with(below))) {
        rustix::mount::unmount(*mount, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
    fs::remove_dir_all(run).unwrap();
}

#[tokio::test]
async fn after_a_reboot_the_runtime_knows_its_pods_and_runs_them_again() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let id = pod.container("main", "sleep 1000").await;
    reboot(&mut node);
    node.start_again().await;
    let runtime = node.runtime();
    let status = runtime.container_status(&id).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerExited, "{status:?}");
    let sandbox = runtime.sandbox_status(&pod.sandbox).await.unwrap();
    assert_eq!(sandbox.state(), cri::PodSandboxState::SandboxNotready, "{sandbox:?}");
    let mut again = node.pod("one");
    again.config.metadata.clone_from(&pod.config.metadata);
    again.config.metadata.as_mut().unwrap().attempt = 1;
    let again = again.run().await;
    let running = again.container("again", "sleep 1000").await;
    runtime.stop_sandbox(&pod.sandbox).await.unwrap();
    runtime.remove_sandbox(&pod.sandbox).await.unwrap();
    let status = runtime.container_status(&running).await.unwrap();
    assert_eq!(status.state(), cri::ContainerState::ContainerRunning, "the new pod is not the old one");
    assert_eq!(runtime.sandboxes().await.unwrap().len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn two_nodes_on_one_machine_do_not_meet() {
    if !able() {
        return;
    }
    let (mut one, mut two) = tokio::join!(Node::start(), Node::start());
    assert_ne!(one.bridge(), two.bridge());
    let (of_one, of_two) = (one.pod("same").run().await, two.pod("same").run().await);
    let address = async |pod: &Pod| {
        let status = pod.runtime.sandbox_status(&pod.sandbox).await.unwrap();
        status.network.unwrap().ip
    };
    assert_ne!(address(&of_one).await, address(&of_two).await);
    assert_eq!(one.runtime().sandboxes().await.unwrap().len(), 1);
    one.stop().await;
    let left = of_two.runtime.sandbox_status(&of_two.sandbox).await.unwrap();
    assert_eq!(left.state(), cri::PodSandboxState::SandboxReady);
    two.stop().await;
}
