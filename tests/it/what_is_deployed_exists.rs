//! Pins that what `deploy/` names exists: selectors match labels, ports and volumes are there, the configuration is
//! accepted, units are sound, metrics of alerts and dashboard are served, and the image is built of what there is.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use octobus_tests::octobus::{Octobus, Role, binary, folder};
use ops::config::{Config, Flags};
use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

use crate::operations::get;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    let documents = YamlLoader::load_from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    documents.iter().map(json).collect()
}

fn json(yaml: &Yaml) -> Value {
    match yaml {
        Yaml::String(text) => text.as_str().into(),
        Yaml::Integer(number) => (*number).into(),
        Yaml::Boolean(is) => (*is).into(),
        Yaml::Array(all) => all.iter().map(json).collect(),
        Yaml::Hash(map) => {
            map.iter().map(|(key, value)| (key.as_str().expect("a key").to_owned(), json(value))).collect()
        }
        Yaml::Null => Value::Null,
        other => panic!("nothing that a manifest needs: {other:?}"),
    }
}

/// Every manifest of `deploy/kubernetes`, with its kind.
fn manifests() -> Vec<(String, Value)> {
    let listed = yaml("deploy/kubernetes/kustomization.yaml");
    let listed: BTreeSet<&str> =
        listed[0]["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap()).collect();
    let there: BTreeSet<String> = fs::read_dir(root().join("deploy/kubernetes"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|file| file != "kustomization.yaml")
        .collect();
    assert!(there.iter().map(String::as_str).eq(listed), "the list names all that is there: {there:?}");
    let all = there.iter().flat_map(|file| yaml(&format!("deploy/kubernetes/{file}")));
    all.map(|document| (document["kind"].as_str().unwrap().to_owned(), document)).collect()
}

fn of_kind<'a>(all: &'a [(String, Value)], kind: &str) -> Vec<&'a Value> {
    all.iter().filter(|(of, _)| of == kind).map(|(_, document)| document).collect()
}

fn name(document: &Value) -> &str {
    document["metadata"]["name"].as_str().unwrap()
}

/// Whether all labels of a selector are among these.
fn selects(selector: &Value, labels: &Value) -> bool {
    let wanted = selector.as_object().unwrap();
    !wanted.is_empty() && wanted.iter().all(|(key, value)| labels[key] == *value)
}

#[test]
fn manifests_refer_to_what_is_there() {
    let all = manifests();
    let set = of_kind(&all, "StatefulSet")[0];
    let pod = &set["spec"]["template"];
    let labels = &pod["metadata"]["labels"];
    let container = &pod["spec"]["containers"][0];
    let ports = container["ports"].as_array().unwrap();
    let has_port = |port: &Value, protocol: &Value| {
        ports.iter().any(|held| held["name"] == *port && held["protocol"] == *protocol)
    };

    assert!(selects(&set["spec"]["selector"]["matchLabels"], labels), "the set selects its pods");
    for kind in ["PodDisruptionBudget", "NetworkPolicy"] {
        let spec = &of_kind(&all, kind)[0]["spec"];
        let selector = if kind == "NetworkPolicy" { &spec["podSelector"] } else { &spec["selector"] };
        assert!(selects(&selector["matchLabels"], labels), "{kind} selects the pods");
    }
    let services = of_kind(&all, "Service");
    for service in &services {
        assert!(selects(&service["spec"]["selector"], labels), "{} selects the pods", name(service));
        for port in service["spec"]["ports"].as_array().unwrap() {
            assert!(has_port(&port["targetPort"], &port["protocol"]), "{}: {port}", name(service));
        }
    }
    let headless = services.iter().find(|service| name(service) == set["spec"]["serviceName"]);
    assert_eq!(headless.expect("the set's service")["spec"]["clusterIP"], "None");
    for protocol in ["TCP", "UDP"] {
        let faces_nodes = |service: &&&Value| {
            let ports = service["spec"]["ports"].as_array().unwrap();
            service["spec"]["type"] == "LoadBalancer" && ports.iter().all(|port| port["protocol"] == protocol)
        };
        assert!(services.iter().any(|service| faces_nodes(&service)), "a Service for {protocol}");
    }
    let monitor = &of_kind(&all, "ServiceMonitor")[0]["spec"];
    let scraped = services
        .iter()
        .find(|service| selects(&monitor["selector"]["matchLabels"], &service["metadata"]["labels"]));
    let scraped = scraped.expect("a Service that is scraped")["spec"]["ports"].as_array().unwrap();
    assert!(scraped.iter().any(|port| port["name"] == monitor["endpoints"][0]["port"]));
    for rule in of_kind(&all, "NetworkPolicy")[0]["spec"]["ingress"].as_array().unwrap() {
        for port in rule["ports"].as_array().unwrap() {
            assert!(has_port(&port["port"], &port["protocol"]), "the policy names {port}");
        }
    }
    for (probe, path) in
        [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
    {
        let ask = &container[probe]["httpGet"];
        assert!(ask["path"] == path && has_port(&ask["port"], &"TCP".into()), "{probe}: {ask}");
    }
}

#[test]
fn volumes_are_declared_and_what_they_hold_is_made_or_documented() {
    let all = manifests();
    let spec = &of_kind(&all, "StatefulSet")[0]["spec"]["template"]["spec"];
    let volumes = spec["volumes"].as_array().unwrap();
    let every =
        spec["containers"].as_array().unwrap().iter().chain(spec["initContainers"].as_array().unwrap());
    for container in every {
        for mount in container["volumeMounts"].as_array().unwrap() {
            assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount}");
        }
        let confined = &container["securityContext"];
        assert_eq!(confined["allowPrivilegeEscalation"], false, "{container}");
        assert_eq!(confined["readOnlyRootFilesystem"], true, "{container}");
    }
    let said = text("deploy/kubernetes/kustomization.yaml");
    for volume in volumes {
        if let Some(map) = volume["configMap"]["name"].as_str() {
            assert!(of_kind(&all, "ConfigMap").iter().any(|held| name(held) == map), "{map}");
        }
        if let Some(secret) = volume["secret"]["secretName"].as_str() {
            assert!(said.contains(&format!("secret generic {secret} ")), "how to make {secret} is not said");
        }
    }
}

#[test]
fn a_hub_takes_the_configuration_and_listens_where_its_container_does() {
    let all = manifests();
    let files = folder();
    let path = files.path().join("hub.toml");
    fs::write(&path, of_kind(&all, "ConfigMap")[0]["data"]["hub.toml"].as_str().unwrap()).unwrap();
    let spec = &of_kind(&all, "StatefulSet")[0]["spec"]["template"]["spec"];
    let container = &spec["containers"][0];
    let replica = Flags { config: Some(path), replica: Some("octobus-hub-0".to_owned()), ..Flags::default() };
    let config = Config::load(ops::config::Role::Cloud, &replica).unwrap_or_else(|error| panic!("{error}"));
    assert!(container["env"].as_array().unwrap().iter().any(|held| held["name"] == "OCTOBUS_REPLICA"));

    let listen = &config.listen;
    let ports = container["ports"].as_array().unwrap();
    for (port, address) in [
        ("websocket", listen.websocket),
        ("quic", listen.quic),
        ("bootstrap", listen.bootstrap),
        ("metrics", listen.metrics),
    ] {
        let held = ports.iter().find(|held| held["name"] == port).expect(port);
        assert_eq!(held["containerPort"].as_u64(), address.map(|address| address.port().into()), "{port}");
        assert!(address.unwrap().ip().is_unspecified(), "{port} is reached from other machines");
    }
    let mounts = container["volumeMounts"].as_array().unwrap();
    let fabric = config.fabric.expect("a replica of a tier");
    for used in [&config.data, &fabric.authority.unwrap(), &fabric.password_file.unwrap()] {
        let within = |mount: &Value| used.starts_with(mount["mountPath"].as_str().unwrap());
        assert!(mounts.iter().any(within), "{} is on no volume", used.display());
    }
    let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace >= config.limits.drain.as_secs() + 10, "killed after {grace} s, in the middle of its end");
}

#[test]
fn units_are_sound_and_start_what_there_is() {
    for (unit, role) in [("octobus-hub", "cloud"), ("octobus-edge", "edge")] {
        let said = text(&format!("deploy/systemd/{unit}.service"));
        let start = said.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("what to start");
        assert!(
            start.starts_with(&format!("/usr/local/bin/octobus {role} --config /etc/octobus/")),
            "{start}"
        );
        for line in
            ["NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet=", "Restart=always"]
        {
            assert!(said.lines().any(|held| held == line), "{unit} lacks {line}");
        }
        let files = folder();
        let path = files.path().join(format!("{unit}.service"));
        fs::write(&path, said.replace("/usr/local/bin/octobus", binary("octobus").to_str().unwrap()))
            .unwrap();
        let Ok(ran) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() else {
            continue; // not installed here: the lines above are all that can be said
        };
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!said.contains(unit), "{said}");
    }
}

#[test]
fn a_node_that_runs_pods_sees_the_machine_as_their_runtime_does() {
    let (unit, more) =
        (text("deploy/systemd/octobus-edge.service"), text("deploy/systemd/octobus-edge-pods.conf"));
    let names = |text: &str| -> BTreeSet<String> {
        let names = text.lines().filter_map(|line| Some(line.split_once('=')?.0.to_owned()));
        names.filter(|name| !name.starts_with('#')).collect()
    };
    let (hard, undone) = (names(&unit), names(&more));
    // Each of these gives the node namespaces or rights of its own, in which mounts for pods would stay.
    let walls = ["Protect", "Private", "Restrict", "NoNew", "CapabilityBounding", "SystemCallFilter", "User"];
    for name in hard.iter().filter(|name| walls.iter().any(|wall| name.starts_with(wall))) {
        assert!(undone.contains(name), "{name} still holds for a node that runs pods");
    }
    let files = folder();
    let path = files.path().join("octobus-edge.service");
    fs::write(&path, unit.replace("/usr/local/bin/octobus", binary("octobus").to_str().unwrap())).unwrap();
    fs::create_dir(files.path().join("octobus-edge.service.d")).unwrap();
    fs::write(files.path().join("octobus-edge.service.d/pods.conf"), more).unwrap();
    if let Ok(ran) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(!said.contains("octobus-edge"), "{said}");
    }
}

/// Names of metrics in an expression.
fn metrics_in(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("octobus_"))
}

fn is_balanced(expression: &str) -> bool {
    let mut open = Vec::new();
    for c in expression.chars() {
        match c {
            '(' | '{' | '[' => open.push(c),
            ')' | '}' | ']' => match open.pop() {
                Some(held) if "(){}[]".contains(&format!("{held}{c}")) => {}
                _ => return false,
            },
            _ => {}
        }
    }
    open.is_empty() && expression.matches('"').count().is_multiple_of(2)
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_a_hub_serves() {
    let mut asked: Vec<(String, String)> = Vec::new();
    let rules = &yaml("deploy/prometheus/octobus.rules.yaml")[0];
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let alert = rule["alert"].as_str().unwrap().to_owned();
        assert!(
            rule["annotations"]["summary"].is_string() && rule["labels"]["severity"].is_string(),
            "{alert}"
        );
        asked.push((alert, rule["expr"].as_str().unwrap().to_owned()));
    }
    let dashboard: Value = serde_json::from_str(&text("deploy/grafana/octobus.json")).unwrap();
    let mut panels = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(panels.insert(panel["id"].as_u64().unwrap()), "a panel twice");
        for target in panel["targets"].as_array().unwrap() {
            asked.push((panel["title"].to_string(), target["expr"].as_str().unwrap().to_owned()));
        }
    }
    assert!(asked.len() > 20, "{asked:?}");

    let files = folder();
    let hub = Octobus::new(Role::Dev, &files.path().join("data")).start();
    let (_, page) = get(hub.endpoint("metrics"), "/metrics");
    hub.stop();
    let mut served = BTreeSet::new();
    for line in page.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').expect("a name and a kind");
        served.insert(name.to_owned());
        if kind == "histogram" {
            served.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}")));
        }
    }
    for (what, expression) in asked {
        assert!(is_balanced(&expression), "{what}: {expression}");
        assert!(metrics_in(&expression).next().is_some(), "{what} asks for nothing of ours");
        for metric in metrics_in(&expression) {
            assert!(served.contains(metric), "{what}: no hub serves {metric}");
        }
    }
}

#[test]
fn the_image_is_built_of_what_there_is() {
    let said = text("deploy/container/Containerfile");
    let mut copied = BTreeSet::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("COPY ")) {
        let parts: Vec<&str> = line.split_whitespace().collect();
        if parts[0].starts_with("--from=") {
            assert!(parts[1].ends_with("/release/octobus"), "{line}");
            continue;
        }
        for source in &parts[..parts.len() - 1] {
            assert!(root().join(source).exists(), "{source} is not there");
            copied.insert((*source).to_owned());
        }
    }
    let manifest: toml::Table = text("Cargo.toml").parse().unwrap();
    for member in manifest["workspace"]["members"].as_array().unwrap() {
        let top = member.as_str().unwrap().split('/').next().unwrap();
        assert!(copied.contains(top), "{top} is of the workspace and not in the image's source");
    }
    assert!(said.contains("cargo build --release --locked --bin octobus"), "the program of the image");
    assert!(said.contains("USER 10001:10001"), "not as root");
}
