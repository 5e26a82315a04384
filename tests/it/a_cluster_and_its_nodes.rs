//! Pins that the guide to Kubernetes is what happens: each of its commands is run as it stands there, against a hub
//! that is a cluster by itself and a hub that serves it from outside; and that the manifest of rights is the one
//! that the code makes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    time::Duration,
};

use octobus_tests::{
    clock,
    octobus::{Octobus, Role, binary, folder, free_port, join, octobus},
    process::run_command,
    stock::Place,
};

const SOON: Duration = Duration::from_secs(30);

fn text(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(path)).unwrap()
}

/// Lines of a guide that are to be typed.
fn commands(guide: &str) -> BTreeSet<String> {
    let typed = guide.lines().filter_map(|line| line.strip_prefix("    "));
    typed
        .filter(|line| ["octobus ", "kubectl ", "export "].iter().any(|start| line.starts_with(start)))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_of_the_guide_to_kubernetes_works() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let mut run = BTreeSet::new();
    let mut typed = |line: &str| assert!(run.insert(line.to_owned()), "{line} is typed once");

    typed("octobus cloud --data DATA --kubernetes 127.0.0.1:6443 --users users.toml");
    let port = free_port().to_string();
    let cluster = Octobus::new(Role::Cloud, &at("cluster")).args(&["--kubernetes", &port]).start();
    typed("export KUBECONFIG=DATA/kubernetes/kubeconfig");
    let admin = cluster.text("kubeconfig");
    assert_eq!(admin, at("cluster/kubernetes/kubeconfig").display().to_string());

    typed("octobus init --kubeconfig admin.conf --out hub.conf");
    let conf = at("hub.conf").display().to_string();
    // The namespace of Leases comes a moment after the start.
    let applied = clock::wait_for("octobus init", SOON, || {
        let mut command = Command::new(binary("octobus"));
        let done = run_command(SOON, command.args(["init", "--kubeconfig", &admin, "--out", &conf]));
        done.status.success().then_some(done.stdout)
    });
    assert!(format!("{applied:?}").contains("octobus cloud --kubeconfig"), "{applied:?}");

    typed("octobus cloud --data DATA --kubeconfig hub.conf --users users.toml");
    let hub = Octobus::new(Role::Cloud, &at("hub")).args(&["--kubeconfig", &conf]);
    let running = hub.start();
    join(Place::Here, &running, &hub, "edge-7", &at("node"));
    let quic = format!("quic://{}", hub.address("--quic"));
    let node = Octobus::new(Role::Edge, &at("node")).args(&["--hub", &quic]).start();

    typed("octobus get state --space fleet --prefix want/ --data DATA");
    let data = at("hub").display().to_string();
    clock::wait_for("the want of the node", SOON, || {
        let lines = octobus(&["get", "state", "--space", "fleet", "--prefix", "want/", "--data", &data]).ok();
        lines.iter().any(|line| line.contains("want/edge-7")).then_some(())
    });

    typed("kubectl get nodes");
    let kubectl = Command::new("kubectl").arg("version").arg("--client").output();
    if kubectl.is_ok_and(|out| out.status.success()) {
        let mut command = Command::new("kubectl");
        let nodes = run_command(SOON, command.args(["get", "nodes"]).env("KUBECONFIG", &admin)).ok();
        assert!(nodes.iter().any(|line| line.contains("edge-7") && line.contains("edge")), "{nodes:?}");
    }

    assert_eq!(commands(&text("docs/kubernetes.md")), run);
    node.stop();
    running.stop();
    cluster.stop();
}

#[test]
fn the_manifest_of_rights_is_the_one_that_the_code_makes() {
    let printed = octobus(&["init", "--print"]).ok().join("\n");
    assert_eq!(printed.trim_end(), text("deploy/bridge/rights.yaml").trim_end());
    // And it is YAML, of six objects that say what they are.
    let documents = yaml_rust2::YamlLoader::load_from_str(&printed).unwrap();
    let mut kinds = BTreeMap::<String, usize>::new();
    for document in &documents {
        *kinds.entry(document["kind"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    let expected =
        ["ClusterRole", "ClusterRoleBinding", "Namespace", "Role", "RoleBinding", "ServiceAccount"];
    assert_eq!(kinds, expected.map(|kind| (kind.to_owned(), 1)).into());
    let secrets = documents.iter().find(|document| document["kind"].as_str() == Some("ClusterRole")).unwrap();
    let verbs = secrets["rules"]
        .as_vec()
        .unwrap()
        .iter()
        .find(|rule| rule["resources"][0].as_str() == Some("secrets"));
    let verbs: Vec<_> =
        verbs.unwrap()["verbs"].as_vec().unwrap().iter().filter_map(|verb| verb.as_str()).collect();
    assert_eq!(verbs, ["get", "list", "watch"], "secrets are read and never written");
}
