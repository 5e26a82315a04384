use std::path::Path;

use k8s_openapi::{ByteString, api::core::v1::Secret};
use serde_json::{Value, json};

use super::{fixture, image, qos::qos, *};
use crate::{objects::Objects, quantity::Milli};

fn settings() -> Settings {
    fixture::settings(Path::new("/data/edged"))
}

fn pod(spec: Value) -> Pod {
    fixture::pod(spec)
}

fn with_context(of_pod: Value, own: Value) -> Pod {
    pod(json!({"securityContext": of_pod, "containers": [{"name": "c", "securityContext": own}]}))
}

fn made(pod: &Pod, image: &cri::Image) -> Result<cri::ContainerConfig, ConfigError> {
    let first = &pod.spec.as_ref().expect("a spec").containers[0];
    let inputs = Inputs { attempt: 2, image, envs: Vec::new(), mounts: Vec::new() };
    container(pod, first, &settings(), inputs)
}

fn security(pod: &Pod) -> cri::LinuxContainerSecurityContext {
    made(pod, &cri::Image::default())
        .expect("made")
        .linux
        .expect("linux")
        .security_context
        .expect("a context")
}

fn resources(pod: &Pod) -> cri::LinuxContainerResources {
    made(pod, &cri::Image::default()).expect("made").linux.expect("linux").resources.expect("resources")
}

#[test]
fn a_sandbox_is_named_and_labelled_as_kubelet_does() {
    let made = sandbox(&pod(json!({"containers": [{"name": "c"}]})), &settings(), 3).expect("made");
    let metadata = made.metadata.expect("metadata");
    assert_eq!((metadata.name.as_str(), metadata.namespace.as_str()), ("web", "shop"));
    assert_eq!((metadata.uid.as_str(), metadata.attempt), ("1-2-3", 3));
    assert_eq!(made.labels["app"], "web");
    assert_eq!(made.labels[labels::POD_NAME], "web");
    assert_eq!(made.labels[labels::POD_NAMESPACE], "shop");
    assert_eq!(made.labels[labels::POD_UID], "1-2-3");
    assert!(made.annotations.contains_key("note"));
    assert_eq!(made.log_directory, "/data/edged/logs/shop_web_1-2-3");
    assert_eq!(made.hostname, "web");
}

#[test]
fn a_host_name_is_the_specs_cut_to_a_label_or_the_full_one_where_asked() {
    let name = |spec| hostname(&pod(spec), "cluster.local");
    assert_eq!(name(json!({"containers": [], "hostname": "db"})).expect("a name"), "db");
    let long = format!("{}-{}", "a".repeat(62), "b".repeat(20));
    assert_eq!(name(json!({"containers": [], "hostname": long})).expect("a name"), "a".repeat(62));
    let full = json!({"containers": [], "hostname": "db", "subdomain": "s", "setHostnameAsFQDN": true});
    assert_eq!(name(full).expect("a name"), "db.s.shop.svc.cluster.local");
    let too_long =
        json!({"containers": [], "hostname": "a".repeat(60), "subdomain": "s", "setHostnameAsFQDN": true});
    assert!(name(too_long).expect_err("too long").message.contains("is too long (64 characters is the max"));
    let on_host = pod(json!({"containers": [], "hostNetwork": true}));
    assert_eq!(sandbox(&on_host, &settings(), 0).expect("made").hostname, "");
}

#[test]
fn dns_follows_policy_then_the_pods_own_config_within_limits() {
    let dns = |mut spec: Value| {
        spec["containers"] = json!([]);
        let config = sandbox(&pod(spec), &settings(), 0).expect("made").dns_config.expect("a resolver");
        (config.servers.join(" "), config.searches.join(" "), config.options.join(" "))
    };
    let owned = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
    let of_cluster = owned(
        "10.96.0.10",
        "shop.svc.cluster.local svc.cluster.local cluster.local plant.example",
        "ndots:5",
    );
    let of_node = owned("192.0.2.1", "plant.example", "timeout:1");
    assert_eq!(dns(json!({})), of_cluster);
    assert_eq!(dns(json!({"dnsPolicy": "Default"})), of_node);
    assert_eq!(dns(json!({"dnsPolicy": "ClusterFirst", "hostNetwork": true})), of_node);
    assert_eq!(dns(json!({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true})), of_cluster);
    assert_eq!(dns(json!({"dnsPolicy": "None"})), owned("", "", ""));
    assert_eq!(
        dns(json!({"dnsConfig": {
            "nameservers": ["1.1.1.1", "10.96.0.10", "2.2.2.2", "3.3.3.3"],
            "searches": ["x.example", "cluster.local"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}],
        }})),
        owned(
            "10.96.0.10 1.1.1.1 2.2.2.2",
            "shop.svc.cluster.local svc.cluster.local cluster.local plant.example x.example",
            "ndots:2 edns0"
        )
    );
    let without = Settings { cluster_dns: Vec::new(), ..settings() };
    let config =
        sandbox(&pod(json!({"containers": []})), &without, 0).expect("made").dns_config.expect("one");
    assert_eq!(config.servers, ["192.0.2.1"], "a cluster without name servers: the node's");
}

#[test]
fn namespaces_are_the_pods_or_the_hosts() {
    use cri::NamespaceMode::{Container, Node, Pod};
    let modes = |mut spec: Value| {
        spec["containers"] = json!([]);
        let linux = sandbox(&pod(spec), &settings(), 0).expect("made").linux.expect("linux");
        let found = linux.security_context.and_then(|context| context.namespace_options).expect("namespaces");
        [found.network(), found.pid(), found.ipc()]
    };
    assert_eq!(modes(json!({})), [Pod, Container, Pod]);
    assert_eq!(modes(json!({"hostNetwork": true, "hostPID": true, "hostIPC": true})), [Node, Node, Node]);
    assert_eq!(modes(json!({"shareProcessNamespace": true})), [Pod, Pod, Pod]);
}

#[test]
fn ports_of_lasting_containers_are_mapped_once() {
    let pod = pod(json!({
        "initContainers": [
            {"name": "i", "ports": [{"containerPort": 1}]},
            {"name": "s", "restartPolicy": "Always", "ports": [{"containerPort": 2, "hostPort": 3}]},
        ],
        "containers": [
            {"name": "c", "ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "UDP", "hostIP": "127.0.0.1"}]},
            {"name": "d", "ports": [{"containerPort": 2, "hostPort": 3, "protocol": "TCP"}]},
        ],
    }));
    let made = sandbox(&pod, &settings(), 0).expect("made").port_mappings;
    let found: Vec<_> =
        made.iter().map(|p| (p.protocol(), p.container_port, p.host_port, p.host_ip.as_str())).collect();
    assert_eq!(found, [(cri::Protocol::Tcp, 2, 3, ""), (cri::Protocol::Udp, 80, 8080, "127.0.0.1")]);
}

/// Who asks for more isolation than there is must not get less without being told.
#[test]
fn what_this_node_cannot_give_is_refused() {
    for (spec, why) in [
        (json!({"runtimeClassName": "gvisor"}), "RuntimeClass \"gvisor\" is not known to this node"),
        (json!({"hostUsers": false}), "user namespaces are not supported by this node"),
        (
            json!({"securityContext": {"supplementalGroupsPolicy": "Strict"}}),
            "SupplementalGroupsPolicy=Strict is not supported by this node",
        ),
    ] {
        let mut spec = spec;
        spec["containers"] = json!([]);
        let error = sandbox(&pod(spec), &settings(), 0).expect_err(why);
        assert!(error.message.ends_with(why), "{}", error.message);
    }
    let claims = pod(json!({"containers": [{"name": "c", "resources": {"claims": [{"name": "gpu"}]}}]}));
    made(&claims, &cri::Image::default()).expect_err("claims");
}

#[test]
fn sysctls_are_named_with_dots() {
    let pod = pod(json!({"containers": [], "securityContext": {"sysctls": [
        {"name": "net/ipv4/tcp_syncookies", "value": "1"}, {"name": "kernel.shm_rmid_forced", "value": "0"},
    ]}}));
    let sysctls = sandbox(&pod, &settings(), 0).expect("made").linux.expect("linux").sysctls;
    assert_eq!(sysctls["net.ipv4.tcp_syncookies"], "1");
    assert_eq!(sysctls["kernel.shm_rmid_forced"], "0");
}

#[test]
fn a_container_is_annotated_with_what_a_new_agent_must_know() {
    let pod = pod(json!({
        "terminationGracePeriodSeconds": 7,
        "containers": [{
            "name": "c", "image": "web:1", "workingDir": "/w", "stdin": true, "stdinOnce": true, "tty": true,
            "terminationMessagePolicy": "FallbackToLogsOnError", "ports": [{"name": "http", "containerPort": 80}],
            "lifecycle": {"preStop": {"exec": {"command": ["bye"]}}},
        }],
    }));
    let image = cri::Image { id: "sha256:1".into(), ..cri::Image::default() };
    let made = made(&pod, &image).expect("made");
    assert_eq!(made.annotations[annotations::RESTART_COUNT], "2");
    assert_eq!(made.annotations[annotations::MESSAGE_PATH], "/dev/termination-log");
    assert_eq!(made.annotations[annotations::MESSAGE_POLICY], "FallbackToLogsOnError");
    assert_eq!(made.annotations[annotations::GRACE_PERIOD], "7");
    assert_eq!(made.annotations[annotations::PRE_STOP], r#"{"exec":{"command":["bye"]}}"#);
    assert!(made.annotations[annotations::PORTS].contains("http"));
    assert_eq!(made.annotations[annotations::HASH].len(), 16);
    assert_eq!(made.labels[labels::CONTAINER_NAME], "c");
    assert_eq!(made.log_path, "c/2.log");
    assert_eq!((made.working_dir.as_str(), made.stdin, made.stdin_once, made.tty), ("/w", true, true, true));
    let image = made.image.expect("an image");
    assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), ("sha256:1", "web:1"));
}

#[test]
fn command_and_args_see_the_environment() {
    let pod =
        pod(json!({"containers": [{"name": "c", "command": ["$(A)", "$$(A)"], "args": ["x$(A)y", "$(B)"]}]}));
    let first = &pod.spec.as_ref().expect("a spec").containers[0];
    let envs = vec![cri::KeyValue { key: "A".into(), value: "$(B)".into() }];
    let image = cri::Image::default();
    let inputs = Inputs { attempt: 0, image: &image, envs, mounts: Vec::new() };
    let made = container(&pod, first, &settings(), inputs).expect("made");
    assert_eq!(made.command, ["$(B)", "$(A)"]);
    assert_eq!(made.args, ["x$(B)y", "$(B)"]);
}

#[test]
fn users_come_from_the_container_then_the_pod_then_the_image() {
    let user = |of_pod, own, image: &cri::Image| {
        let made = made(&with_context(of_pod, own), image).expect("made");
        let context = made.linux.expect("linux").security_context.expect("a context");
        (
            context.run_as_user.map(|id| id.value),
            context.run_as_group.map(|id| id.value),
            context.run_as_username,
        )
    };
    let root = cri::Image { uid: Some(cri::Int64Value { value: 0 }), ..cri::Image::default() };
    let named = cri::Image { username: "nginx".into(), ..cri::Image::default() };
    assert_eq!(
        user(json!({"runAsUser": 1}), json!({"runAsUser": 2, "runAsGroup": 3}), &root),
        (Some(2), Some(3), String::new())
    );
    assert_eq!(
        user(json!({"runAsUser": 1, "runAsGroup": 4}), json!({}), &named),
        (Some(1), Some(4), String::new())
    );
    assert_eq!(user(json!({}), json!({}), &root), (Some(0), None, String::new()));
    assert_eq!(user(json!({}), json!({}), &named), (None, None, "nginx".into()));
}

#[test]
fn run_as_non_root_is_verified_with_kubelets_words() {
    let message = |of_pod, own, image: &cri::Image| {
        let error = made(&with_context(of_pod, own), image).map(|_| ());
        error.map_err(|error| (error.reason, error.message))
    };
    let image = |uid: Option<i64>, name: &str| cri::Image {
        uid: uid.map(|value| cri::Int64Value { value }),
        username: name.to_owned(),
        ..cri::Image::default()
    };
    let whose = "(pod: \"web_shop(1-2-3)\", container: c)";
    let refused = |text: &str| Err(("CreateContainerConfigError", format!("{text} {whose}")));
    let yes = || json!({"runAsNonRoot": true});
    assert_eq!(
        message(yes(), json!({}), &image(Some(0), "")),
        refused("container has runAsNonRoot and image will run as root")
    );
    assert_eq!(
        message(yes(), json!({}), &image(None, "app")),
        refused(
            "container has runAsNonRoot and image has non-numeric user (app), cannot verify user is non-root"
        )
    );
    assert_eq!(
        message(json!({}), json!({"runAsNonRoot": true, "runAsUser": 0}), &image(Some(7), "")),
        refused("container's runAsUser breaks non-root policy")
    );
    assert_eq!(message(yes(), json!({"runAsUser": 5}), &image(Some(0), "")), Ok(()));
    assert_eq!(message(yes(), json!({"runAsNonRoot": false}), &image(Some(0), "")), Ok(()));
    assert_eq!(message(yes(), json!({}), &image(Some(7), "")), Ok(()));
}

#[test]
fn groups_are_those_of_files_and_the_supplemental_ones() {
    let context = security(&with_context(json!({"fsGroup": 5, "supplementalGroups": [6, 7]}), json!({})));
    assert_eq!(context.supplemental_groups, [5, 6, 7]);
}

#[test]
fn privileges_are_what_the_container_says() {
    let plain = security(&with_context(json!({}), json!({})));
    assert!(!plain.privileged && !plain.readonly_rootfs && !plain.no_new_privs);
    assert!(plain.masked_paths.contains(&"/proc/kcore".to_owned()));
    assert!(plain.readonly_paths.contains(&"/proc/sys".to_owned()));
    let asked = security(&with_context(
        json!({}),
        json!({
            "privileged": true, "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
            "procMount": "Unmasked", "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]},
        }),
    ));
    assert!(asked.privileged && asked.readonly_rootfs && asked.no_new_privs);
    assert!(asked.masked_paths.is_empty() && asked.readonly_paths.is_empty());
    let capabilities = asked.capabilities.expect("capabilities");
    assert_eq!(
        (capabilities.add_capabilities, capabilities.drop_capabilities),
        (vec!["NET_ADMIN".into()], vec!["ALL".into()])
    );
    let pod = with_context(json!({}), json!({"privileged": true}));
    let linux = sandbox(&pod, &settings(), 0).expect("made").linux.expect("linux");
    assert!(
        linux.security_context.expect("a context").privileged,
        "a sandbox for a privileged container is one"
    );
}

#[test]
fn profiles_of_system_calls_and_apparmor_come_from_the_container_then_the_pod() {
    use cri::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    let seccomp = |of_pod, own| {
        let found = security(&with_context(of_pod, own)).seccomp.expect("a profile");
        (found.profile_type(), found.localhost_ref)
    };
    let kind = |kind: &str| json!({"seccompProfile": {"type": kind}});
    assert_eq!(seccomp(json!({}), json!({})), (Unconfined, String::new()));
    assert_eq!(seccomp(kind("RuntimeDefault"), json!({})), (RuntimeDefault, String::new()));
    assert_eq!(seccomp(kind("RuntimeDefault"), kind("Unconfined")), (Unconfined, String::new()));
    let local = json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "p/a.json"}});
    assert_eq!(seccomp(json!({}), local), (Localhost, "/data/edged/seccomp/p/a.json".into()));
    let wrong = made(&with_context(json!({}), kind("Localhost")), &cri::Image::default());
    assert!(wrong.expect_err("no name").message.contains("localhostProfile must be set"));

    let apparmor = |of_pod, own| security(&with_context(of_pod, own)).apparmor_profile;
    assert_eq!(apparmor(json!({}), json!({})), "");
    assert_eq!(
        apparmor(json!({"appArmorProfile": {"type": "RuntimeDefault"}}), json!({})),
        "runtime/default"
    );
    let own = json!({"appArmorProfile": {"type": "Localhost", "localhostProfile": "mine"}});
    assert_eq!(apparmor(json!({"appArmorProfile": {"type": "Unconfined"}}), own), "localhost/mine");
    let mut noted = with_context(json!({}), json!({}));
    let key = "container.apparmor.security.beta.kubernetes.io/c".to_owned();
    noted.metadata.annotations = Some([(key, "localhost/old".to_owned())].into());
    assert_eq!(security(&noted).apparmor_profile, "localhost/old");
}

#[test]
fn processor_and_memory_become_shares_quota_and_limit() {
    let of = |limits: Value, requests: Value| {
        let pod = pod(
            json!({"containers": [{"name": "c", "resources": {"limits": limits, "requests": requests}}]}),
        );
        let made = resources(&pod);
        (made.cpu_shares, made.cpu_quota, made.memory_limit_in_bytes)
    };
    assert_eq!(of(json!({}), json!({})), (2, 0, 0));
    assert_eq!(of(json!({}), json!({"cpu": "500m"})), (512, 0, 0));
    assert_eq!(of(json!({"cpu": "500m", "memory": "64Mi"}), json!({})), (512, 50_000, 64 << 20));
    assert_eq!(of(json!({"cpu": "2"}), json!({"cpu": "1"})), (1024, 200_000, 0));
    assert_eq!(of(json!({"cpu": "1m"}), json!({"cpu": "1m"})), (2, 1_000, 0));
    assert_eq!(of(json!({"cpu": "1000"}), json!({"cpu": "1000"})).0, 262_144);
}

#[test]
fn huge_pages_are_limited_by_size() {
    let pod = pod(json!({"containers": [{"name": "c", "resources": {"limits": {
        "hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi",
    }}}]}));
    let limits = resources(&pod).hugepage_limits;
    let found: Vec<_> = limits.iter().map(|limit| (limit.page_size.as_str(), limit.limit)).collect();
    assert_eq!(found, [("2MB", 4 << 20), ("1GB", 1 << 30)]);
}

#[test]
fn scores_for_the_oom_killer_follow_the_class() {
    let score = |container: Value| resources(&pod(json!({"containers": [container]}))).oom_score_adj;
    let of = |limits: Value, requests: Value| json!({"name": "c", "resources": {"limits": limits, "requests": requests}});
    let exact = json!({"cpu": "1", "memory": "1Gi"});
    assert_eq!(score(of(exact.clone(), exact)), -997);
    assert_eq!(score(of(json!({}), json!({}))), 1000);
    assert_eq!(score(of(json!({}), json!({"memory": "4Gi"}))), 500);
    assert_eq!(score(of(json!({}), json!({"cpu": "1m"}))), 999);
    assert_eq!(score(of(json!({}), json!({"memory": "8Gi"}))), 3);
    let critical = pod(json!({"priority": 2_000_001_000, "containers": [{"name": "c"}]}));
    assert_eq!(resources(&critical).oom_score_adj, -997);
    let sidecar = pod(json!({
        "initContainers": [{"name": "s", "restartPolicy": "Always"}],
        "containers": [{"name": "c", "resources": {"requests": {"memory": "4Gi"}}}],
    }));
    let init = &sidecar.spec.as_ref().expect("a spec").init_containers.as_ref().expect("some")[0];
    assert_eq!(resources::oom_score(&sidecar, init, 8 << 30), 500, "no sooner than what it serves");
}

#[test]
fn classes_of_service_are_kubelets() {
    let of = |spec| qos(&pod(spec)).as_str();
    let exact = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
    assert_eq!(of(json!({"containers": [{"name": "c"}]})), "BestEffort");
    assert_eq!(of(json!({"containers": [{"name": "c", "resources": exact}]})), "Guaranteed");
    assert_eq!(of(json!({"containers": [{"name": "c", "resources": exact}, {"name": "d"}]})), "Burstable");
    let less = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}});
    assert_eq!(of(json!({"containers": [{"name": "c", "resources": less}]})), "Burstable");
    assert_eq!(
        of(json!({"containers": [{"name": "c", "resources": {"limits": {"cpu": "1"}}}]})),
        "Burstable"
    );
    let other = json!({"requests": {"ephemeral-storage": "1Gi"}});
    assert_eq!(of(json!({"containers": [{"name": "c", "resources": other}]})), "BestEffort");
}

#[test]
fn what_a_pod_needs_counts_sidecars_init_containers_and_overhead() {
    let asks = |cpu: &str| json!({"requests": {"cpu": cpu}});
    let pod = pod(json!({
        "overhead": {"cpu": "10m"},
        "initContainers": [
            {"name": "a", "resources": asks("300m")},
            {"name": "s", "restartPolicy": "Always", "resources": asks("100m")},
            {"name": "b", "resources": asks("500m")},
        ],
        "containers": [{"name": "c", "resources": asks("200m")}, {"name": "d", "resources": asks("200m")}],
    }));
    assert_eq!(resources::pod_requests(&pod)["cpu"], Milli(610), "b beside the sidecar is the peak");
}

#[test]
fn images_are_pulled_by_policy() {
    let of = |container: Value| image::policy(&serde_json::from_value(container).expect("a container"));
    use image::Policy::{Always, IfNotPresent, Never};
    assert_eq!(of(json!({"name": "c", "image": "web"})), Always);
    assert_eq!(of(json!({"name": "c", "image": "r:5000/web"})), Always);
    assert_eq!(of(json!({"name": "c", "image": "web:latest"})), Always);
    assert_eq!(of(json!({"name": "c", "image": "web:1"})), IfNotPresent);
    assert_eq!(of(json!({"name": "c", "image": "web@sha256:00"})), IfNotPresent);
    assert_eq!(of(json!({"name": "c", "image": "web", "imagePullPolicy": "Never"})), Never);
    for (policy, is_here, pull) in [
        (Always, true, true),
        (Always, false, true),
        (IfNotPresent, false, true),
        (IfNotPresent, true, false),
        (Never, true, false),
    ] {
        assert_eq!(image::decide(policy, "web:1", is_here), Ok(pull), "{policy:?} {is_here}");
    }
    let never = image::decide(Never, "web:1", false).expect_err("it is not here");
    assert_eq!(never.reason, "ErrImageNeverPull");
    assert_eq!(never.message, "Container image \"web:1\" is not present with pull policy of Never");
}

#[test]
fn an_image_without_a_tag_is_the_latest_and_a_wrong_name_is_said() {
    let digest = format!("web@sha256:{}", "0".repeat(64));
    for (given, meant) in [
        ("web", "web:latest"),
        ("localhost/web", "localhost/web:latest"),
        ("r.example:5000/a/web", "r.example:5000/a/web:latest"),
        ("web:1.2-x_Y", "web:1.2-x_Y"),
        (&digest, &digest),
    ] {
        assert_eq!(image::name(given).as_deref(), Ok(meant));
    }
    for wrong in ["", "Web", "web:", "web:a b", "a//b", "-web", "web@sha256:x", "/web"] {
        assert_eq!(image::name(wrong).expect_err(wrong).reason, "InvalidImageName");
    }
    let said = image::name("Web").expect_err("wrong").message;
    assert!(said.contains("couldn't parse image name \"Web\": invalid reference format"), "{said}");
}

#[test]
fn credentials_are_those_of_the_registry_the_longest_path_first() {
    let secret = |key: &str, json: Value| {
        let data = [(key.to_owned(), ByteString(json.to_string().into_bytes()))];
        std::sync::Arc::new(Secret { data: Some(data.into()), ..Secret::default() })
    };
    let objects = Objects {
        secrets: [
            (
                "new".to_owned(),
                secret(
                    ".dockerconfigjson",
                    json!({"auths": {
                        "https://index.docker.io/v1/": {"auth": "aHViOnB3"},
                        "r.example/team": {"username": "team", "password": "t"},
                        "r.example": {"username": "all", "password": "a"},
                        "*.cloud.example": {"username": "star", "password": "s"},
                    }}),
                ),
            ),
            (
                "old".to_owned(),
                secret(".dockercfg", json!({"p.example:5000": {"username": "port", "password": "p"}})),
            ),
        ]
        .into(),
        ..Objects::default()
    };
    let pod = pod(
        json!({"containers": [], "imagePullSecrets": [{"name": "new"}, {"name": "gone"}, {"name": "old"}]}),
    );
    let users = |image: &str| -> Vec<String> {
        image::credentials(image, &pod, &objects).into_iter().map(|auth| auth.username).collect()
    };
    assert_eq!(users("web:1"), ["hub"]);
    assert_eq!(users("docker.io/library/web"), ["hub"]);
    assert_eq!(users("r.example/team/web:1"), ["team", "all"]);
    assert_eq!(users("r.example/other/web"), ["all"]);
    assert_eq!(users("eu.cloud.example/web"), ["star"]);
    assert_eq!(users("a.eu.cloud.example/web"), [""; 0]);
    assert_eq!(users("p.example:5000/web"), ["port"]);
    assert_eq!(users("p.example/web"), [""; 0]);
}
