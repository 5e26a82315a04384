use std::{os::unix::fs::MetadataExt, sync::Arc};

use serde_json::{Value, json};

use super::*;
use crate::{make::fixture, objects::Token};

/// A node in a folder that goes with the test, with whatever is still mounted below.
struct Bench {
    folder: tempfile::TempDir,
    volumes: Volumes,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let volumes = Volumes::new(fixture::settings(&folder.path().join("edged")));
        Self { folder, volumes }
    }

    fn pod_folder(&self) -> PathBuf {
        self.folder.path().join("edged/pods/1-2-3")
    }

    fn read(&self, path: &str) -> String {
        let at = self.pod_folder().join("volumes").join(path);
        fs::read_to_string(&at).unwrap_or_else(|error| panic!("{}: {error}", at.display()))
    }

    fn mode(&self, path: &str) -> u32 {
        fs::metadata(self.pod_folder().join("volumes").join(path)).expect("there").mode() & 0o7777
    }

    fn mounts_below(&self) -> usize {
        let real = fs::canonicalize(self.folder.path()).expect("real");
        mounted::table().expect("a table").iter().filter(|at| at.starts_with(&real)).count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Ok(real) = fs::canonicalize(self.folder.path())
            && let Err(error) = mounted::unmount_below(&real)
        {
            eprintln!("{}: {error}", real.display());
        }
    }
}

fn map(data: Value) -> Arc<k8s_openapi::api::core::v1::ConfigMap> {
    Arc::new(serde_json::from_value(data).expect("a config map"))
}

fn secret(data: Value) -> Arc<k8s_openapi::api::core::v1::Secret> {
    Arc::new(serde_json::from_value(data).expect("a secret"))
}

fn with(volumes: Value) -> Pod {
    fixture::pod(json!({"containers": [{"name": "c"}], "volumes": volumes}))
}

fn objects() -> Objects {
    Objects {
        config_maps: [(
            "m".to_owned(),
            map(json!({"data": {"a": "1", "b": "2"}, "binaryData": {"c": "AP8="}})),
        )]
        .into(),
        secrets: [("s".to_owned(), secret(json!({"data": {"key": "c2VjcmV0"}})))].into(),
        tokens: [(
            "api".to_owned(),
            Arc::new(Token {
                pod_uid: "1-2-3".into(),
                audience: String::new(),
                token: "jwt".into(),
                expiration_timestamp: String::new(),
            }),
        )]
        .into(),
    }
}

#[test]
fn a_config_map_is_shown_whole_or_by_items_with_their_rights() {
    let bench = Bench::new();
    let pod = with(json!([
        {"name": "all", "configMap": {"name": "m"}},
        {"name": "some", "configMap": {"name": "m", "defaultMode": 0o400, "items": [
            {"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 0o755},
        ]}},
        {"name": "none", "configMap": {"name": "gone", "optional": true}},
    ]));
    bench.volumes.set_up(&pod, &objects()).expect("set up");
    let at = "kubernetes.io~configmap";
    assert_eq!(bench.read(&format!("{at}/all/a")), "1");
    assert_eq!(bench.mode(&format!("{at}/all/a")), 0o644);
    let binary = bench.pod_folder().join("volumes").join(at).join("all/c");
    assert_eq!(fs::read(binary).expect("there"), [0, 255]);
    assert_eq!(bench.read(&format!("{at}/some/x/y")), "1");
    assert_eq!(bench.mode(&format!("{at}/some/x/y")), 0o400);
    assert_eq!(bench.mode(&format!("{at}/some/z")), 0o755);
    assert!(!bench.pod_folder().join("volumes").join(at).join("some/c").exists());
    assert_eq!(
        fs::read_link(bench.pod_folder().join("volumes").join(at).join("all/a")).expect("a link"),
        Path::new("..data/a")
    );
    assert!(bench.pod_folder().join("volumes").join(at).join("none").is_dir());
}

#[test]
fn what_a_volume_names_and_is_not_here_fails_with_kubelets_words() {
    let bench = Bench::new();
    let refused = |volume: Value| {
        let pod = with(json!([volume]));
        bench.volumes.set_up(&pod, &objects()).expect_err("refused").to_string()
    };
    let of = |source: Value| {
        let mut volume = source;
        volume["name"] = json!("v");
        volume
    };
    let failed = |why: &str| format!("MountVolume.SetUp failed for volume \"v\" : {why}");
    assert_eq!(refused(of(json!({"configMap": {"name": "gone"}}))), failed("configmap \"gone\" not found"));
    assert_eq!(refused(of(json!({"secret": {"secretName": "gone"}}))), failed("secret \"gone\" not found"));
    let item = json!({"configMap": {"name": "m", "items": [{"key": "q", "path": "q"}]}});
    assert_eq!(refused(of(item)), failed("configmap references non-existent config key: q"));
    let item = json!({"secret": {"secretName": "s", "items": [{"key": "q", "path": "q"}]}});
    assert_eq!(refused(of(item)), failed("secret references non-existent secret key: q"));
    assert_eq!(refused(of(json!({"nfs": {"server": "a", "path": "/"}}))), failed("no volume plugin matched"));
    let token = json!({"projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}});
    assert_eq!(refused(of(token)), failed("failed to fetch token: it has not arrived yet"));
}

#[test]
fn no_path_of_an_item_leads_out_of_its_volume() {
    let bench = Bench::new();
    for path in ["../x", "/x", "a/../../x", "..data", "..", "", "./a/.."] {
        let items = json!([{"key": "a", "path": path}]);
        let pod = with(json!([{"name": "v", "configMap": {"name": "m", "items": items}}]));
        bench.volumes.set_up(&pod, &objects()).expect_err(path);
    }
}

#[test]
fn a_changed_object_is_shown_at_once_and_whole() {
    let bench = Bench::new();
    let pod = with(json!([{"name": "v", "configMap": {"name": "m"}}]));
    let mut objects = objects();
    bench.volumes.set_up(&pod, &objects).expect("set up");
    let volume = bench.pod_folder().join("volumes/kubernetes.io~configmap/v");
    let before = fs::read_link(volume.join("..data")).expect("a link");
    assert!(!bench.volumes.refresh(&pod, &objects).expect("refreshed"), "nothing changed");
    bench.volumes.set_up(&pod, &objects).expect("set up again");
    assert_eq!(fs::read_link(volume.join("..data")).expect("a link"), before);

    // Half of a write that a crash cut off.
    fs::create_dir(volume.join("..2026_01_01_00_00_00.000000")).expect("made");
    objects.config_maps.insert("m".into(), map(json!({"data": {"a": "new", "d": "4"}})));
    assert!(bench.volumes.refresh(&pod, &objects).expect("refreshed"));
    assert_eq!(fs::read_to_string(volume.join("a")).expect("there"), "new");
    assert_eq!(fs::read_to_string(volume.join("d")).expect("there"), "4");
    assert!(fs::symlink_metadata(volume.join("b")).is_err(), "what is not shown any more has no name");
    assert_ne!(fs::read_link(volume.join("..data")).expect("a link"), before);
    let folders = fs::read_dir(&volume)
        .expect("a folder")
        .flatten()
        .filter(|e| e.file_type().expect("a type").is_dir());
    assert_eq!(folders.count(), 1, "only what is shown");
}

#[test]
fn an_object_that_never_changes_is_not_shown_anew() {
    let bench = Bench::new();
    let pod = with(json!([{"name": "v", "configMap": {"name": "m"}}]));
    let mut objects = objects();
    bench.volumes.set_up(&pod, &objects).expect("set up");
    objects.config_maps.insert("m".into(), map(json!({"immutable": true, "data": {"a": "last"}})));
    assert!(bench.volumes.refresh(&pod, &objects).expect("refreshed"), "the change that made it so");
    objects
        .config_maps
        .insert("m".into(), map(json!({"immutable": true, "data": {"a": "another of this name"}})));
    assert!(!bench.volumes.refresh(&pod, &objects).expect("refreshed"));
    assert_eq!(bench.read("kubernetes.io~configmap/v/a"), "last");
}

#[test]
fn secrets_and_tokens_are_only_in_memory_and_go_without_a_trace() {
    let bench = Bench::new();
    let pod = with(json!([
        {"name": "v", "secret": {"secretName": "s", "defaultMode": 0o400}},
        {"name": "api", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
            {"configMap": {"name": "m", "items": [{"key": "a", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]}},
        {"name": "down", "downwardAPI": {"items": [
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "cpu", "resourceFieldRef": {"containerName": "c", "resource": "limits.cpu"}},
        ]}},
        {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]));
    bench.volumes.set_up(&pod, &objects()).expect("set up");
    bench.volumes.set_up(&pod, &objects()).expect("set up again");
    assert_eq!(bench.mounts_below(), 4, "one file system for each, however often");
    assert_eq!(bench.read("kubernetes.io~secret/v/key"), "secret");
    assert_eq!(bench.mode("kubernetes.io~secret/v/key"), 0o400);
    assert_eq!(bench.read("kubernetes.io~projected/api/token"), "jwt");
    assert_eq!(bench.read("kubernetes.io~projected/api/ca.crt"), "1");
    assert_eq!(bench.read("kubernetes.io~projected/api/namespace"), "shop");
    assert_eq!(bench.read("kubernetes.io~downward-api/down/labels"), "app=\"web\"");
    assert_eq!(bench.read("kubernetes.io~downward-api/down/cpu"), "4");
    let ram = bench.pod_folder().join("volumes/kubernetes.io~empty-dir/ram");
    fs::write(ram.join("much"), vec![0; 2 << 20]).expect_err("its limit holds");

    assert_eq!(bench.volumes.uids().expect("listed"), ["1-2-3"]);
    bench.volumes.tear_down("1-2-3").expect("torn down");
    bench.volumes.tear_down("1-2-3").expect("torn down again");
    assert_eq!(bench.mounts_below(), 0);
    assert_eq!(bench.volumes.uids().expect("listed"), [""; 0]);
}

#[test]
fn a_token_for_an_earlier_pod_of_the_name_is_not_shown() {
    let bench = Bench::new();
    let sources = json!([{"serviceAccountToken": {"path": "token", "audience": "vault"}}]);
    let pod = with(json!([{"name": "api", "projected": {"sources": sources}}]));
    let token = |uid: &str, audience: &str| {
        let token = Token {
            pod_uid: uid.into(),
            audience: audience.into(),
            token: "jwt".into(),
            expiration_timestamp: String::new(),
        };
        Objects { tokens: [("api".to_owned(), Arc::new(token))].into(), ..Objects::default() }
    };
    bench.volumes.set_up(&pod, &token("0-0-0", "vault")).expect_err("another pod's");
    bench.volumes.set_up(&pod, &token("1-2-3", "bank")).expect_err("for somebody else");
    bench.volumes.set_up(&pod, &token("1-2-3", "vault")).expect("its own");
}

#[test]
fn each_token_of_a_volume_is_its_own() {
    let bench = Bench::new();
    let sources = json!([
        {"serviceAccountToken": {"path": "token"}},
        {"serviceAccountToken": {"path": "for/vault", "audience": "vault"}},
    ]);
    let pod = with(json!([{"name": "api", "projected": {"sources": sources}}]));
    let mut objects = objects();
    bench.volumes.set_up(&pod, &objects).expect_err("one of them has not arrived");
    let vault = Token { audience: "vault".into(), token: "other".into(), ..(*objects.tokens["api"]).clone() };
    objects.tokens.insert("api.for.vault".into(), Arc::new(vault));
    bench.volumes.set_up(&pod, &objects).expect("set up");
    assert_eq!(bench.read("kubernetes.io~projected/api/token"), "jwt");
    assert_eq!(bench.read("kubernetes.io~projected/api/for/vault"), "other");
}

#[test]
fn an_empty_folder_is_for_everybody_and_keeps_what_was_put_into_it() {
    let bench = Bench::new();
    let pod = with(json!([{"name": "v", "emptyDir": {}}]));
    bench.volumes.set_up(&pod, &Objects::default()).expect("set up");
    assert_eq!(bench.mode("kubernetes.io~empty-dir/v"), 0o777);
    assert_eq!(bench.mode(".."), 0o750, "for pods, not for accounts of the machine");
    let at = bench.pod_folder().join("volumes/kubernetes.io~empty-dir/v");
    fs::write(at.join("kept"), "x").expect("written");
    fs::set_permissions(&at, fs::Permissions::from_mode(0o700)).expect("set by a container");
    bench.volumes.set_up(&pod, &Objects::default()).expect("set up again");
    assert_eq!(bench.read("kubernetes.io~empty-dir/v/kept"), "x");
    assert_eq!(bench.mode("kubernetes.io~empty-dir/v"), 0o700);
    let odd = with(json!([{"name": "w", "emptyDir": {"medium": "Tape"}}]));
    bench.volumes.set_up(&odd, &Objects::default()).expect_err("no such medium");
}

#[test]
fn the_group_of_files_owns_what_volumes_hold() {
    let bench = Bench::new();
    let pod = fixture::pod(json!({
        "securityContext": {"fsGroup": 4242, "runAsUser": 1001},
        "containers": [{"name": "c"}],
        "volumes": [
            {"name": "v", "emptyDir": {}},
            {"name": "ram", "emptyDir": {"medium": "Memory"}},
            {"name": "s", "secret": {"secretName": "s", "defaultMode": 0o400}},
            {"name": "api", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
        ],
    }));
    bench.volumes.set_up(&pod, &objects()).expect("set up");
    let group =
        |path: &str| fs::metadata(bench.pod_folder().join("volumes").join(path)).expect("there").gid();
    for path in ["kubernetes.io~empty-dir/v", "kubernetes.io~empty-dir/ram"] {
        assert_eq!((group(path), bench.mode(path)), (4242, 0o2777), "{path}");
    }
    assert_eq!(
        (group("kubernetes.io~secret/s/key"), bench.mode("kubernetes.io~secret/s/key")),
        (4242, 0o440)
    );
    let token = bench.pod_folder().join("volumes/kubernetes.io~projected/api/token");
    let found = fs::metadata(token).expect("there");
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (1001, 4242, 0o640));
}

#[test]
fn host_paths_are_made_or_refused_by_type() {
    let bench = Bench::new();
    let base = bench.folder.path().join("host");
    fs::create_dir(&base).expect("made");
    fs::write(base.join("file"), "x").expect("written");
    let _socket = std::os::unix::net::UnixListener::bind(base.join("socket")).expect("bound");
    let set_up = |path: &str, kind: &str| {
        let path = base.join(path).to_string_lossy().into_owned();
        let pod = with(json!([{"name": "v", "hostPath": {"path": path, "type": kind}}]));
        bench
            .volumes
            .set_up(&pod, &Objects::default())
            .map_err(|error| error.why.rsplit_once(" is ").map(|(_, why)| why.to_owned()))
    };
    let not = |what: &str| Err(Some(format!("not {what}")));
    assert_eq!(set_up("anything", ""), Ok(()));
    assert_eq!(set_up("made/deep", "DirectoryOrCreate"), Ok(()));
    assert_eq!(set_up("made", "Directory"), Ok(()));
    assert_eq!(set_up("new", "FileOrCreate"), Ok(()));
    assert_eq!(set_up("file", "File"), Ok(()));
    assert_eq!(set_up("socket", "Socket"), Ok(()));
    assert_eq!(set_up("gone", "Directory"), not("a directory"));
    assert_eq!(set_up("file", "DirectoryOrCreate"), not("a directory"));
    assert_eq!(set_up("made", "File"), not("a file"));
    assert_eq!(set_up("file", "Socket"), not("a socket file"));
    assert_eq!(set_up("file", "CharDevice"), not("a character device"));
    assert_eq!(set_up("file", "BlockDevice"), not("a block device"));
}

fn container_of(pod: &Pod) -> &Container {
    &pod.spec.as_ref().expect("a spec").containers[0]
}

#[test]
fn a_container_sees_its_volumes_its_hosts_and_a_file_for_last_words() {
    let bench = Bench::new();
    let pod = fixture::pod(json!({
        "containers": [{"name": "c", "volumeMounts": [
            {"name": "data", "mountPath": "/data", "mountPropagation": "HostToContainer"},
            {"name": "conf", "mountPath": "etc/conf"},
            {"name": "host", "mountPath": "/host", "readOnly": true},
        ]}],
        "volumes": [
            {"name": "data", "emptyDir": {}}, {"name": "conf", "configMap": {"name": "m"}},
            {"name": "host", "hostPath": {"path": "/tmp"}},
        ],
    }));
    bench.volumes.set_up(&pod, &objects()).expect("set up");
    let mounts =
        bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &["10.0.0.5".into()]).expect("mounts");
    let at = bench.pod_folder();
    let seen: Vec<_> = mounts
        .iter()
        .map(|mount| (mount.container_path.as_str(), mount.host_path.clone(), mount.readonly))
        .collect();
    let host = |path: &str| at.join(path).to_string_lossy().into_owned();
    assert_eq!(
        seen,
        [
            ("/data", host("volumes/kubernetes.io~empty-dir/data"), false),
            ("/etc/conf", host("volumes/kubernetes.io~configmap/conf"), true),
            ("/host", "/tmp".to_owned(), true),
            ("/etc/hosts", host("etc-hosts"), false),
            ("/dev/termination-log", host("containers/c/0"), false),
        ]
    );
    assert_eq!(mounts[0].propagation(), cri::MountPropagation::PropagationHostToContainer);
    assert!(fs::read_to_string(at.join("etc-hosts")).expect("there").contains("10.0.0.5\tweb\n"));

    assert_eq!(bench.volumes.termination_message("1-2-3", "c", 0), None);
    fs::write(at.join("containers/c/0"), format!("{}end", "x".repeat(5_000))).expect("written");
    let message = bench.volumes.termination_message("1-2-3", "c", 0).expect("a message");
    assert!(message.len() == MESSAGE_MAX && message.ends_with("end"));
    bench.volumes.mounts(&pod, container_of(&pod), &[], 1, &[]).expect("the next start");
    bench.volumes.forget_messages("1-2-3", "c", 1).expect("forgotten");
    assert_eq!(bench.volumes.termination_message("1-2-3", "c", 0), None);
}

#[test]
fn a_container_that_mounts_what_the_pod_has_not_is_refused() {
    let bench = Bench::new();
    let pod = fixture::pod(
        json!({"containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}),
    );
    let error = bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &[]).expect_err("refused");
    assert_eq!(error.message, "cannot find volume \"v\" to mount into container \"c\"");
}

#[test]
fn mounts_that_this_node_cannot_make_are_refused() {
    let bench = Bench::new();
    for container in [
        json!({"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v", "recursiveReadOnly": "Enabled"}]}),
        json!({"name": "c", "volumeDevices": [{"name": "v", "devicePath": "/dev/v"}]}),
    ] {
        let pod =
            fixture::pod(json!({"containers": [container], "volumes": [{"name": "v", "emptyDir": {}}]}));
        bench.volumes.set_up(&pod, &Objects::default()).expect("set up");
        let error = bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &[]).expect_err("refused");
        assert!(error.message.ends_with("not supported by this node"), "{}", error.message);
    }
}

fn with_part(mount: Value) -> Pod {
    let mut mount = mount;
    mount["name"] = json!("v");
    mount["mountPath"] = json!("/v");
    fixture::pod(json!({
        "containers": [{"name": "c", "volumeMounts": [mount]}], "volumes": [{"name": "v", "emptyDir": {}}],
    }))
}

#[test]
fn a_part_of_a_volume_is_mounted_and_nothing_of_it_stays() {
    let bench = Bench::new();
    let pod = with_part(json!({"subPathExpr": "logs/$(NAME)"}));
    bench.volumes.set_up(&pod, &Objects::default()).expect("set up");
    let envs = [cri::KeyValue { key: "NAME".into(), value: "web".into() }];
    for attempt in 0..2 {
        let mounts = bench.volumes.mounts(&pod, container_of(&pod), &envs, attempt, &[]).expect("mounts");
        fs::write(Path::new(&mounts[0].host_path).join("line"), "x").expect("written");
        assert_eq!(bench.mounts_below(), 1, "a new start takes the place of the old one");
    }
    assert_eq!(bench.read("kubernetes.io~empty-dir/v/logs/web/line"), "x");
    assert_eq!(bench.mode("kubernetes.io~empty-dir/v/logs"), 0o777);
    let error = bench.volumes.mounts(&pod, container_of(&pod), &[], 2, &[]).expect_err("no such variable");
    assert_eq!(error.message, "missing value for \"NAME\"");
    bench.volumes.release("1-2-3", "other").expect("nothing of it");
    assert_eq!(bench.mounts_below(), 1);
    bench.volumes.release("1-2-3", "c").expect("released");
    bench.volumes.release("1-2-3", "c").expect("released again");
    assert_eq!(bench.mounts_below(), 0);
    bench.volumes.mounts(&pod, container_of(&pod), &envs, 3, &[]).expect("mounts");
    bench.volumes.tear_down("1-2-3").expect("torn down");
    assert_eq!(bench.mounts_below(), 0);
}

#[test]
fn a_part_may_be_a_file_that_is_shown_by_links() {
    let bench = Bench::new();
    let pod = fixture::pod(json!({
        "containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/etc/a", "subPath": "a"}]}],
        "volumes": [{"name": "v", "configMap": {"name": "m"}}],
    }));
    bench.volumes.set_up(&pod, &objects()).expect("set up");
    let mounts = bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &[]).expect("mounts");
    assert_eq!(fs::read_to_string(&mounts[0].host_path).expect("a file"), "1");
}

#[test]
fn a_part_outside_of_its_volume_is_refused() {
    let bench = Bench::new();
    for (part, why) in [
        ("/etc", "error SubPath `/etc` must not be an absolute path"),
        ("../x", "unable to provision SubPath `../x`: must not contain '..'"),
        ("a/../../x", "unable to provision SubPath `a/../../x`: must not contain '..'"),
    ] {
        let pod = with_part(json!({"subPath": part}));
        bench.volumes.set_up(&pod, &Objects::default()).expect("set up");
        let error = bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &[]).expect_err("refused");
        assert!(error.message.ends_with(why), "{}", error.message);
    }
    let pod = with_part(json!({"subPath": "link/passwd"}));
    let volume = bench.pod_folder().join("volumes/kubernetes.io~empty-dir/v");
    std::os::unix::fs::symlink("/etc", volume.join("link")).expect("linked by a container");
    bench.volumes.mounts(&pod, container_of(&pod), &[], 0, &[]).expect_err("a link out of the volume");
    assert_eq!(bench.mounts_below(), 0);
}

/// Even a mount over a mount, which a container with propagation may have left.
#[test]
fn tearing_down_unmounts_whatever_is_mounted_and_touches_nothing_outside() {
    let bench = Bench::new();
    let outside = bench.folder.path().join("outside");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join("kept"), "x").expect("written");
    let pod = with(json!([{"name": "v", "emptyDir": {"medium": "Memory"}}]));
    bench.volumes.set_up(&pod, &Objects::default()).expect("set up");
    let volume = bench.pod_folder().join("volumes/kubernetes.io~empty-dir/v");
    let inner = volume.join("inner");
    fs::create_dir(&inner).expect("made");
    for _ in 0..2 {
        rustix::mount::mount_bind(&outside, &inner).expect("mounted");
    }
    std::os::unix::fs::symlink(&outside, volume.join("link")).expect("linked");
    bench.volumes.tear_down("1-2-3").expect("torn down");
    assert_eq!(bench.mounts_below(), 0);
    assert_eq!(fs::read_to_string(outside.join("kept")).expect("kept"), "x");
}

#[test]
fn a_uid_that_is_a_path_names_no_folder() {
    let bench = Bench::new();
    let victim = bench.folder.path().join("edged/victim");
    fs::create_dir_all(&victim).expect("made");
    for uid in ["../victim", "..", ".", "", "a/b"] {
        bench.volumes.tear_down(uid).expect("nothing to do");
        let mut pod = with(json!([{"name": "v", "emptyDir": {}}]));
        pod.metadata.uid = Some(uid.to_owned());
        bench.volumes.set_up(&pod, &Objects::default()).expect_err("refused");
    }
    assert!(victim.exists());
}
