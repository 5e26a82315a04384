//! Pins that a node's own API needs no hub: stock clients list and watch what the node has, `octobus ctl` shows it
//! to who stands at the machine, what only the hub can do is refused and not forgotten; and that no secret is in
//! the clear on any disk of it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use broker::seal::{self, SealKey};
use octobus_tests::{
    clock,
    octobus::{NODE, Pair, Running, folder, free_port, octobus},
    process::{Finished, run_command},
    stock::{Place, python},
};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(30);
const SECRET: &str = "correct-horse-battery-staple";
const OBJECTS: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {mode: safe}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}}
spec:
  nodeName: edge-1
  containers:
  - name: c
    image: localhost/busybox:1
    envFrom: [{configMapRef: {name: settings}}, {secretRef: {name: password}}]
"#;

fn kubectl(kubeconfig: &str, arguments: &[&str]) -> Finished {
    let mut command = Command::new("kubectl");
    command.args(arguments).args(["--request-timeout", "10s"]).env("KUBECONFIG", kubeconfig);
    run_command(SOON, &mut command)
}

fn ctl(node: &Running, arguments: &[&str]) -> Finished {
    let admin = node.admin();
    octobus(&[&["ctl"], arguments, &["--admin", admin.to_str().unwrap()]].concat())
}

/// What the node holds of `fleet` under a prefix, opened.
fn held(node: &Running, data: &Path, prefix: &str) -> Vec<Value> {
    let identity: Value =
        serde_json::from_slice(&fs::read(data.join("identity/identity.json")).unwrap()).unwrap();
    let key = SealKey::parse(identity["secrets"].as_str().unwrap()).unwrap();
    let admin = node.admin();
    let rows = ["get", "state", "--space", "fleet", "--prefix", prefix, "-o", "json", "--admin"];
    let rows = octobus(&[&rows[..], &[admin.to_str().unwrap()]].concat()).ok().join("\n");
    let rows: Vec<Value> = serde_json::from_str(&rows).unwrap();
    let open = |row: &Value| {
        let sealed =
            base64::Engine::decode(&base64::prelude::BASE64_STANDARD, row["value"].as_str().unwrap());
        let opened = seal::open(&key, row["key"].as_str().unwrap(), &sealed.unwrap());
        serde_json::from_slice(&opened.expect("sealed with the tier's key")).unwrap()
    };
    rows.iter().map(open).collect()
}

/// Every file under a folder in which any of these bytes stand.
fn files_with(folder: &Path, wanted: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            files_with(&path, wanted, found);
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap();
            let has = |text: &&str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
            if wanted.iter().any(has) {
                found.push(path);
            }
        }
    }
}

#[test]
fn a_node_answers_its_clients_with_no_hub_and_shows_no_secret_on_its_disk() {
    let folder = folder();
    let pair = Pair::joined(folder.path(), |hub| hub);
    let port = free_port().to_string();
    let hub = pair.hub.args(&["--kubernetes", &port]);
    let (running, mut node) = (hub.start(), pair.node.start());
    let (cloud, local) = (running.text("kubeconfig"), node.text("api_kubeconfig"));
    let file = folder.path().join("objects.yaml");
    fs::write(&file, OBJECTS).unwrap();
    let from = format!("--from-literal=word={SECRET}");
    kubectl(&cloud, &["create", "secret", "generic", "password", &from]).ok();
    clock::wait_for("the default account", SOON, || {
        kubectl(&cloud, &["get", "serviceaccount", "default"]).status.success().then_some(())
    });
    kubectl(&cloud, &["apply", "-f", file.to_str().unwrap()]).ok();
    let data = pair.node.data();
    let tokens = clock::wait_for("the pod, its secret and its token at the node", SOON, || {
        let pods = kubectl(&local, &["get", "pods", "-o", "name"]).stdout;
        let secrets = held(&node, data, "obj/core/secrets/default/password");
        let tokens = held(&node, data, "obj/octobus.io/tokens/default/web-1");
        (pods == ["pod/web-1"] && secrets.len() == 1 && !tokens.is_empty()).then_some(tokens)
    });
    // A write goes up as the node, which may not do everything.
    let refused = kubectl(&local, &["label", "pod", "web-1", "a=b"]);
    assert!(refused.describe().contains("orbidden"), "{}", refused.describe());
    let word = kubectl(&local, &["get", "secret", "password", "-o", "jsonpath={.data.word}"]).ok().join("");
    running.stop();

    // Alone.
    clock::wait_for("the node to notice", SOON, || {
        kubectl(&local, &["delete", "pod", "web-1"]).describe().contains("no link to its hub").then_some(())
    });
    assert_eq!(kubectl(&local, &["get", "pods", "-l", "app=web", "-o", "name"]).ok(), ["pod/web-1"]);
    let before =
        kubectl(&local, &["get", "pod", "web-1", "-o", "jsonpath={.metadata.resourceVersion}"]).ok().join("");
    let shown = ctl(&node, &["get", "pods", "-A"]).ok().join("\n");
    assert!(shown.contains("NAMESPACE") && shown.contains("web-1"), "{shown}");
    let shown = ctl(&node, &["describe", "pod", "web-1"]).ok().join("\n");
    assert!(shown.contains("localhost/busybox:1"), "{shown}");
    assert_eq!(ctl(&node, &["get", "nodes", "-o", "name"]).ok(), [format!("nodes/{NODE}")]);
    assert_eq!(ctl(&node, &["get", "pod", "nothing"]).status.code(), Some(3));
    let (token, ca) = (folder.path().join("token"), folder.path().join("ca.crt"));
    fs::write(&token, tokens[0]["token"].as_str().unwrap()).unwrap();
    let map = ["get", "configmap", "kube-root-ca.crt", "-o", "jsonpath={.data.ca\\.crt}"];
    fs::write(&ca, kubectl(&local, &map).ok().join("\n")).unwrap();
    let api = node.endpoint("api");
    let mut client = python(Place::Here, "kube_offline.py");
    client.args([&token, &ca]).arg("web-1").env("KUBERNETES_SERVICE_HOST", api.ip().to_string());
    client.env("KUBERNETES_SERVICE_PORT", api.port().to_string());
    assert_eq!(run_command(SOON, &mut client).ok(), ["holds"]);
    // What the test itself wrote is no leak.
    fs::remove_file(&token).unwrap();

    // After a restart it is all there still, and what was seen before is gone, not something else.
    node.stop();
    node = pair.node.start();
    assert_eq!(kubectl(&local, &["get", "pods", "-o", "name"]).ok(), ["pod/web-1"]);
    let path = format!("/api/v1/pods?watch=true&timeoutSeconds=1&resourceVersion={before}");
    let gone = kubectl(&local, &["get", "--raw", &path]);
    assert!(gone.describe().contains("410"), "{}", gone.describe());

    // With the hub back the node's word goes up again.
    let running = hub.start();
    clock::wait_for("the hub to answer", SOON, || {
        let asked = kubectl(&local, &["get", "--raw", "/api/v1/services"]);
        (!asked.describe().contains("no link to its hub")).then_some(())
    });
    node.stop();
    running.stop();
    let mut found = Vec::new();
    files_with(folder.path(), &[SECRET, word.as_str()], &mut found);
    assert!(word.len() > 20 && found.is_empty(), "{found:?}");
}
