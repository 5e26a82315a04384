//! Stock kubectl as a process: the commands of every day.

use std::{path::PathBuf, process::Output, time::Duration};

use serde_json::Value;
use tokio::process::Command;

use super::{
    client::TestServer,
    semantics::until,
    workloads::{node, run_pods},
};

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: c, image: 'localhost/busybox:1', ports: [{containerPort: 80}]}
";

const DEFINITION: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: valves.plant.example}
spec:
  group: plant.example
  scope: Namespaced
  names: {plural: valves, singular: valve, kind: Valve, shortNames: [vv]}
  versions:
  - name: v1
    served: true
    storage: true
    additionalPrinterColumns:
    - {name: Open, type: boolean, jsonPath: .spec.open}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            description: What is wanted of a valve.
            required: [open]
            properties:
              open: {type: boolean, description: Whether it lets anything through.}
";

const VALVE: &str = "
apiVersion: plant.example/v1
kind: Valve
metadata: {name: v3}
spec: {open: true}
";

pub(crate) struct Kubectl<'a> {
    server: &'a TestServer,
    folder: tempfile::TempDir,
}

impl<'a> Kubectl<'a> {
    pub(crate) fn new(server: &'a TestServer) -> Self {
        Self { server, folder: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new("kubectl");
        command
            .args(arguments.split(' '))
            .env("KUBECONFIG", &self.server.serving.kubeconfig)
            .env("HOME", self.folder.path())
            .kill_on_drop(true);
        command
    }

    async fn output(&self, arguments: &str) -> Output {
        let running = self.command(arguments).output();
        tokio::time::timeout(Duration::from_secs(30), running)
            .await
            .expect("kubectl ends")
            .expect("kubectl is there")
    }

    /// What it prints when it succeeds.
    pub(crate) async fn ok(&self, arguments: &str) -> String {
        let output = self.output(arguments).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "kubectl {arguments}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// What it prints when it fails.
    async fn fails(&self, arguments: &str) -> String {
        let output = self.output(arguments).await;
        assert!(!output.status.success(), "kubectl {arguments}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

/// Whether a kubectl is installed that reads OpenAPI v3. Debian has none, and no package archive that a
/// test may add; `tests/deps` says so where it is missing.
pub(crate) async fn is_installed() -> bool {
    let version = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output().await;
    let said: Value =
        version.ok().and_then(|out| serde_json::from_slice(&out.stdout).ok()).unwrap_or_default();
    let minor = said["clientVersion"]["minor"].as_str().unwrap_or_default();
    minor.trim_end_matches('+').parse::<u32>().is_ok_and(|minor| minor >= 27)
}

#[tokio::test]
async fn the_commands_of_every_day_work() {
    if !is_installed().await {
        eprintln!("not run: kubectl 1.27 or newer is not installed");
        return;
    }
    let server = TestServer::start().await;
    let kubectl = Kubectl::new(&server);
    until(async || {
        server.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).await.0 == 200
    })
    .await;
    node(&server, "edge-1").await;
    assert!(kubectl.ok("get nodes").await.contains("edge-1   Ready"));

    let file = kubectl.file("web.yaml", DEPLOYMENT);
    assert_eq!(kubectl.ok(&format!("apply -f {file}")).await, "deployment.apps/web created\n");
    assert_eq!(kubectl.ok(&format!("apply -f {file}")).await, "deployment.apps/web unchanged\n");
    assert_eq!(kubectl.ok(&format!("diff -f {file}")).await, "");
    let changed = kubectl.file("changed.yaml", &DEPLOYMENT.replace("busybox:1", "busybox:2"));
    assert!(
        kubectl.fails(&format!("diff -f {changed}")).await.contains("+        - image: localhost/busybox:2")
            || kubectl.fails(&format!("diff -f {changed}")).await.contains("busybox:2")
    );
    assert_eq!(kubectl.ok(&format!("apply -f {changed}")).await, "deployment.apps/web configured\n");
    let wrong = kubectl.file("wrong.yaml", &DEPLOYMENT.replace("replicas: 2", "replica: 2"));
    assert!(kubectl.fails(&format!("apply -f {wrong}")).await.contains("unknown field \"spec.replica\""));
    let forced = kubectl.ok(&format!("apply --server-side --force-conflicts -f {file}")).await;
    assert_eq!(forced, "deployment.apps/web serverside-applied\n");

    kubectl.ok("scale deploy/web --replicas=3").await;
    kubectl.ok("label deploy web tier=front").await;
    kubectl.ok("annotate deploy web note=x").await;
    let waiting = kubectl.command("rollout status deploy/web --timeout=20s").output();
    let agent = async {
        loop {
            run_pods(&server, "Running").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let rolled = tokio::select! {
        rolled = waiting => rolled.unwrap(),
        () = agent => unreachable!("it runs until the rollout is over"),
    };
    assert!(rolled.status.success(), "{}", String::from_utf8_lossy(&rolled.stderr));
    let wide = kubectl.ok("get deploy,rs,pods -o wide").await;
    assert!(wide.contains("3/3     3            3") && wide.contains("edge-1"), "{wide}");
    kubectl.ok("wait --for=condition=Available deploy/web --timeout=10s").await;
    assert!(kubectl.ok("describe deploy web").await.contains("ScalingReplicaSet"));
    assert!(kubectl.ok("get events").await.contains("Scheduled"));

    kubectl.ok("taint node edge-1 k=v:NoSchedule").await;
    kubectl.ok("cordon edge-1").await;
    assert!(kubectl.ok("get nodes").await.contains("Ready,SchedulingDisabled"));
    kubectl.ok("taint node edge-1 k-").await;
    kubectl.ok("uncordon edge-1").await;

    assert!(kubectl.ok("explain deployment.spec.replicas").await.contains("<integer>"));
    assert!(kubectl.ok("explain pod.spec.containers").await.contains("<[]Container>"));
    assert_eq!(kubectl.ok("auth can-i list pods").await, "yes\n");
    assert_eq!(kubectl.fails("auth can-i list pods --as nobody").await, "no\n");
    assert!(
        kubectl.fails("get pods --as nobody").await.contains("User \"nobody\" cannot list resource \"pods\"")
    );
    assert!(kubectl.ok("api-resources").await.contains("deployments"));

    let mut watching = kubectl.command("get configmaps -w --no-headers");
    let mut watching = watching.stdout(std::process::Stdio::piped()).spawn().unwrap();
    kubectl.ok("create configmap seen --from-literal=k=v").await;
    let mut shown = tokio::io::BufReader::new(watching.stdout.take().unwrap());
    let seen = async {
        let mut line = String::new();
        while !line.contains("seen") {
            line.clear();
            tokio::io::AsyncBufReadExt::read_line(&mut shown, &mut line).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), seen).await.expect("the watch shows it");
    watching.kill().await.unwrap();

    let definition = kubectl.file("crd.yaml", DEFINITION);
    kubectl.ok(&format!("apply -f {definition}")).await;
    kubectl.ok("wait --for=condition=Established crd/valves.plant.example --timeout=10s").await;
    let valve = kubectl.file("valve.yaml", VALVE);
    kubectl.ok(&format!("apply -f {valve}")).await;
    let valves = kubectl.ok("get vv").await;
    assert!(valves.contains("OPEN") && valves.contains("true"), "{valves}");
    assert!(kubectl.ok("explain valve.spec.open").await.contains("Whether it lets anything through"));
    let bad = kubectl.file("bad.yaml", &VALVE.replace("open: true", "open: 7"));
    assert!(kubectl.fails(&format!("apply -f {bad}")).await.contains("must be of type boolean"));

    let json: Value = serde_json::from_str(&kubectl.ok("get deploy web -o json").await).unwrap();
    assert_eq!(json["spec"]["replicas"], 3);
    kubectl.ok("delete deploy web").await;
    kubectl.ok("delete crd valves.plant.example").await;
    kubectl.fails("get vv").await;
    server.stop().await;
}
