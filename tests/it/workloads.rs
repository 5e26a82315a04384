//! The whole of it: `kubectl` at a hub, real containers at a node. What is applied runs, what ends is started again,
//! what is deleted is gone, and whoever is killed in between leaves containers as they are.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use edged::containerd::archive::{Entry, Image};
use octobus_tests::{
    clock::wait_for,
    octobus::{Octobus, Role, Running, folder, free_port},
    process::{Finished, run_command},
};
use serde_json::Value;

const BUSYBOX: &str = "octobus.test/busybox:1";

/// Whether this machine can run containers and has a kubectl; the tests say so and end where not.
pub(crate) fn able() -> bool {
    let root = rustix::process::geteuid().is_root();
    let has = |program: &str| {
        let asked = Command::new(program).arg("--help").stdout(Stdio::null()).stderr(Stdio::null()).status();
        asked.is_ok()
    };
    let able = root && has("kubectl") && has("containerd") && has("runc");
    if !able {
        eprintln!("not run: it needs root, kubectl, containerd and runc");
    }
    able
}

fn put_busybox(folder: &Path) {
    let busybox = fs::read("/usr/bin/busybox").or_else(|_| fs::read("/bin/busybox"));
    let busybox = busybox.expect("busybox-static is installed");
    let mut entries = vec![("bin/busybox".to_owned(), Entry::Program(busybox))];
    for name in ["sh", "cat", "echo", "sleep", "true", "false"] {
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

/// A hub and a node in one process, with real containers.
pub(crate) struct Site {
    octobus: Octobus,
    dev: Running,
    _folder: tempfile::TempDir,
}

impl Site {
    pub(crate) fn start() -> Self {
        let folder = folder();
        let data = folder.path().join("data");
        put_busybox(&data.join("images"));
        let port = free_port().to_string();
        let octobus = Octobus::new(Role::Dev, &data).args(&["--kubernetes", &port]).with_pods();
        let dev = octobus.start();
        let site = Self { octobus, dev, _folder: folder };
        wait_for("the node is ready", Duration::from_secs(40), || {
            let ready = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
            let said = site.kubectl(&["get", "nodes", "-o", ready]).stdout;
            said.concat().contains("True").then_some(())
        });
        site
    }

    pub(crate) fn kubeconfig(&self) -> String {
        self.dev.text("kubeconfig")
    }

    pub(crate) fn stop(self) {
        self.dev.stop();
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new("kubectl");
        command.args(arguments).env("KUBECONFIG", self.dev.text("kubeconfig"));
        run_command(Duration::from_secs(60), &mut command)
    }

    pub(crate) fn apply(&self, manifest: &Value) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), manifest.to_string()).unwrap();
        let applied = self.kubectl(&["apply", "-f", file.path().to_str().unwrap()]);
        applied.ok();
    }

    /// The pods of a selector, as the API has them.
    pub(crate) fn pods(&self, selector: &str) -> Vec<Value> {
        let listed = self.kubectl(&["get", "pods", "-l", selector, "-o", "json"]);
        let listed: Value = serde_json::from_str(&listed.stdout.concat()).unwrap_or_default();
        listed["items"].as_array().cloned().unwrap_or_default()
    }

    pub(crate) fn running(&self, selector: &str, count: usize) -> Vec<Value> {
        wait_for(&format!("{count} pods of {selector} run"), Duration::from_secs(60), || {
            let found = self.pods(selector);
            (found.len() == count && found.iter().all(is_ready)).then_some(found)
        })
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
    pod["status"]["phase"] == "Running"
        && conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

fn container_id(pod: &Value) -> String {
    pod["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default().to_owned()
}

pub(crate) fn deployment(name: &str, replicas: usize, script: &str) -> Value {
    serde_json::json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": name },
        "spec": {
            "replicas": replicas, "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "c", "image": BUSYBOX, "imagePullPolicy": "IfNotPresent",
                        "command": ["sh", "-c", script],
                    }],
                },
            },
        },
    })
}

#[test]
fn what_is_applied_runs_what_ends_is_started_again_what_is_deleted_is_gone() {
    if !able() {
        return;
    }
    let mut site = Site::start();
    site.apply(&deployment("web", 2, "while true; do sleep 1; done"));
    let pods = site.running("app=web", 2);
    assert!(pods.iter().all(|pod| pod["status"]["podIP"].as_str().is_some_and(|ip| ip.contains('.'))));
    let ids: Vec<String> = pods.iter().map(container_id).collect();
    assert!(ids.iter().all(|id| id.starts_with("containerd://")), "{ids:?}");

    // A container that fails is started again, and counted.
    site.apply(&deployment("crash", 1, "sleep 1; exit 3"));
    wait_for("the crashing container waits for its next start", Duration::from_secs(60), || {
        let pods = site.pods("app=crash");
        let status =
            &pods.first().map(|pod| pod["status"]["containerStatuses"][0].clone()).unwrap_or_default();
        let waits = status["restartCount"].as_i64() >= Some(1)
            && status["lastState"]["terminated"]["exitCode"] == 3
            && status["state"]["waiting"]["reason"] == "CrashLoopBackOff";
        waits.then_some(())
    });

    // The agent is killed: the same containers.
    site.dev.process.kill();
    site.dev = site.octobus.start();
    let mut after = site.running("app=web", 2).iter().map(container_id).collect::<Vec<_>>();
    let mut before = ids;
    before.sort();
    after.sort();
    assert_eq!(after, before, "a killed agent leaves containers as they are");

    site.kubectl(&["delete", "deployment", "web", "crash", "--timeout=30s"]).ok();
    wait_for("all pods are gone", Duration::from_secs(60), || {
        (site.pods("app=web").is_empty() && site.pods("app=crash").is_empty()).then_some(())
    });
    let Site { dev, .. } = site;
    dev.stop();
}
