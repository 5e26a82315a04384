use std::{path::Path, sync::Arc};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::make::fixture;

fn objects() -> Objects {
    let map = json!({"data": {"a": "1", "b": "2", "no=name": "x"}});
    let secret = json!({"data": {"key": "c2VjcmV0"}});
    Objects {
        config_maps: [("m".to_owned(), Arc::new(serde_json::from_value(map).expect("a map")))].into(),
        secrets: [("s".to_owned(), Arc::new(serde_json::from_value(secret).expect("a secret")))].into(),
        ..Objects::default()
    }
}

fn made(container: Value) -> Result<Vec<(String, String)>, ConfigError> {
    let mut container = container;
    container["name"] = json!("c");
    let pod = fixture::pod(json!({"serviceAccountName": "robot", "containers": [container]}));
    let settings = Settings { api: None, ..fixture::settings(Path::new("/data")) };
    let first = &pod.spec.as_ref().expect("a spec").containers[0];
    let made =
        environment(&pod, first, &objects(), &settings, &["10.0.0.5".to_owned(), "fd00::5".to_owned()])?;
    Ok(made.into_iter().map(|variable| (variable.key, variable.value)).collect())
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn later_ones_win_and_values_see_what_came_before() {
    let made = made(json!({
        "envFrom": [{"configMapRef": {"name": "m"}}, {"prefix": "P_", "configMapRef": {"name": "m"}}],
        "env": [
            {"name": "b", "value": "$(a)$(P_b)"}, {"name": "c", "value": "<$(b)>"},
            {"name": "d", "value": "$(e)"}, {"name": "e", "value": ""}, {"name": "f", "value": "$$(a)"},
        ],
    }));
    assert_eq!(
        made.expect("made"),
        pairs(&[
            ("a", "1"),
            ("b", "12"),
            ("P_a", "1"),
            ("P_b", "2"),
            ("c", "<12>"),
            ("d", "$(e)"),
            ("e", ""),
            ("f", "$(a)")
        ])
    );
}

#[test]
fn the_nodes_api_is_told_unless_the_pod_says_otherwise() {
    let pod = fixture::pod(json!({"containers": [{"name": "c", "env": [
        {"name": "URL", "value": "https://$(KUBERNETES_SERVICE_HOST):$(KUBERNETES_SERVICE_PORT)"},
        {"name": "KUBERNETES_SERVICE_PORT_HTTPS", "value": "mine"},
    ]}]}));
    let first = &pod.spec.as_ref().expect("a spec").containers[0];
    let settings = fixture::settings(Path::new("/data"));
    let made = environment(&pod, first, &Objects::default(), &settings, &[]).expect("made");
    let value = |name: &str| made.iter().find(|v| v.key == name).map(|v| v.value.as_str());
    assert_eq!(value("URL"), Some("https://127.0.0.1:10550"));
    assert_eq!(value("KUBERNETES_SERVICE_PORT_HTTPS"), Some("mine"));
    assert_eq!(value("KUBERNETES_PORT_10550_TCP_ADDR"), Some("127.0.0.1"));
    assert_eq!(value("KUBERNETES_PORT"), Some("tcp://127.0.0.1:10550"));
}

#[test]
fn what_is_missing_fails_with_kubelets_words_unless_it_is_optional() {
    let from = |source: Value| json!({"env": [{"name": "X", "valueFrom": source}]});
    let refused = |container: Value| {
        let error = made(container).expect_err("refused");
        assert_eq!(error.reason, "CreateContainerConfigError");
        error.message
    };
    let map = |name: &str, key: &str, optional: bool| json!({"configMapKeyRef": {"name": name, "key": key, "optional": optional}});
    let secret = |name: &str, key: &str, optional: bool| json!({"secretKeyRef": {"name": name, "key": key, "optional": optional}});
    assert_eq!(refused(from(map("gone", "a", false))), "configmap \"gone\" not found");
    assert_eq!(refused(from(map("m", "z", false))), "couldn't find key z in ConfigMap shop/m");
    assert_eq!(refused(from(secret("gone", "a", false))), "secret \"gone\" not found");
    assert_eq!(refused(from(secret("s", "z", false))), "couldn't find key z in Secret shop/s");
    assert_eq!(
        refused(json!({"envFrom": [{"configMapRef": {"name": "gone"}}]})),
        "configmap \"gone\" not found"
    );
    assert_eq!(refused(json!({"envFrom": [{"secretRef": {"name": "gone"}}]})), "secret \"gone\" not found");
    for optional in
        [map("gone", "a", true), map("m", "z", true), secret("gone", "a", true), secret("s", "z", true)]
    {
        assert_eq!(made(from(optional)).expect("optional"), [], "no variable at all");
    }
    let none = json!({"envFrom": [
        {"configMapRef": {"name": "gone", "optional": true}}, {"secretRef": {"name": "gone", "optional": true}},
    ]});
    assert_eq!(made(none).expect("optional"), []);
    assert_eq!(made(from(secret("s", "key", false))).expect("there"), pairs(&[("X", "secret")]));
}

#[test]
fn fields_of_the_pod_are_told() {
    let field = |path: &str| {
        let made = made(json!({"env": [{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}]}));
        made.map(|all| all[0].1.clone())
    };
    for (path, value) in [
        ("metadata.name", "web"),
        ("metadata.namespace", "shop"),
        ("metadata.uid", "1-2-3"),
        ("metadata.labels", "app=\"web\""),
        ("metadata.labels['app']", "web"),
        ("metadata.labels['none']", ""),
        ("metadata.annotations", "note=\"a \\\"b\\\"\\nc\""),
        ("metadata.annotations['note']", "a \"b\"\nc"),
        ("spec.nodeName", "edge-1"),
        ("spec.serviceAccountName", "robot"),
        ("status.hostIP", "192.0.2.7"),
        ("status.hostIPs", "192.0.2.7"),
        ("status.podIP", "10.0.0.5"),
        ("status.podIPs", "10.0.0.5,fd00::5"),
    ] {
        assert_eq!(field(path).as_deref(), Ok(value), "{path}");
    }
    assert_eq!(
        field("spec.containers").expect_err("unknown").message,
        "unsupported fieldPath: spec.containers"
    );
}

#[test]
fn resources_are_told_in_units_of_the_divisor_rounded_up() {
    let of = |resource: &str, divisor: &str| {
        let resources = json!({"limits": {"cpu": "1500m", "memory": "64Mi"}, "requests": {"cpu": "250m"}});
        let reference = json!({"resource": resource, "divisor": divisor});
        let made = made(json!({
            "resources": resources, "env": [{"name": "X", "valueFrom": {"resourceFieldRef": reference}}],
        }));
        made.map(|all| all[0].1.clone())
    };
    for (resource, divisor, value) in [
        ("limits.cpu", "0", "2"),
        ("limits.cpu", "1", "2"),
        ("limits.cpu", "1m", "1500"),
        ("requests.cpu", "1m", "250"),
        ("limits.memory", "1Mi", "64"),
        ("limits.memory", "1", "67108864"),
        ("limits.memory", "1Gi", "1"),
        ("requests.memory", "1", "0"),
        ("limits.ephemeral-storage", "1", "0"),
    ] {
        assert_eq!(of(resource, divisor).as_deref(), Ok(value), "{resource} in {divisor}");
    }
    assert!(of("limits.gold", "1").is_err());
    let unlimited = made(json!({"env": [
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        {"name": "MEMORY", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Gi"}}},
    ]}));
    assert_eq!(unlimited.expect("made"), pairs(&[("CPU", "4"), ("MEMORY", "8")]), "what the node has");
}

#[test]
fn expansion_leaves_alone_what_is_no_reference() {
    let look = |name: &str| match name {
        "A" => Some("$(B)"),
        "" => Some("empty"),
        _ => None,
    };
    for (text, meant) in [
        ("$(A)", "$(B)"),
        ("$(B)", "$(B)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$$(B)"),
        ("$", "$"),
        ("a$", "a$"),
        ("$(A", "$(A"),
        ("$((A)", "$((A)"),
        ("$x$é", "$x$é"),
        ("$()", "empty"),
        ("$$", "$"),
    ] {
        assert_eq!(expand(text, look), meant, "{text}");
    }
    assert_eq!(expand_all("x/$(A)", look), Ok("x/$(B)".to_owned()));
    assert_eq!(expand_all("$(A)/$(C)/$(D)", look), Err("C".to_owned()));
}

/// As the reference implementation walks: byte by byte, with no look ahead but to the closing bracket.
fn reference(text: &str, look: impl Fn(&str) -> Option<&'static str>) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::new();
    let mut at = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('$', Some('$')) => {
                out.push('$');
                at += 2;
            }
            ('$', Some('(')) => match (at + 2..chars.len()).find(|end| chars[*end] == ')') {
                Some(end) => {
                    let name: String = chars[at + 2..end].iter().collect();
                    out.push_str(&look(&name).map_or_else(|| format!("$({name})"), str::to_owned));
                    at = end + 1;
                }
                None => {
                    out.push_str("$(");
                    at += 2;
                }
            },
            (other, _) => {
                out.push(other);
                at += 1;
            }
        }
    }
    out
}

proptest! {
    #[test]
    fn expansion_is_the_reference_expansion(text in "[$()Abé]{0,24}") {
        let look = |name: &str| (name == "A").then_some("$(A)$$");
        prop_assert_eq!(expand(&text, look), reference(&text, look));
    }

    #[test]
    fn text_without_dollars_is_what_it_was(text in "[^$]{0,40}") {
        prop_assert_eq!(expand(&text, |_| Some("x")), text);
    }
}
