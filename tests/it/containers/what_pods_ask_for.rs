//! What a pod's spec asks for, looked at from inside its containers, and from the kernel's side.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use edged::{
    cgroups::{Driver, Layout},
    cri::Socket,
    env,
    make::{self, Inputs, Settings, dns},
    node::Machine,
    objects::{Objects, Token},
    probes::{self, Outcome, Target},
    runtime::{Runtime as _, cri},
    volumes::Volumes,
};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{BUSYBOX, Node, PATIENCE, able, exited};

/// A pod made of a spec, as the agent makes it.
struct Made {
    runtime: Socket,
    settings: Settings,
    volumes: Volumes,
    pod: Pod,
    objects: Objects,
    sandbox: String,
    config: cri::PodSandboxConfig,
    ip: String,
}

impl Made {
    async fn run(node: &Node, spec: Value) -> Self {
        let machine = Machine::read();
        let settings = Settings {
            node: "edge-1".to_owned(),
            folder: node.folder.path().join("edged"),
            addresses: vec!["192.0.2.7".parse().unwrap()],
            cluster_dns: vec!["10.96.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".to_owned(),
            host_dns: dns::read("nameserver 192.0.2.1\n"),
            api: Some(("127.0.0.1".to_owned(), 10_550)),
            cgroups: Layout::find(Driver::Cgroupfs),
            memory: machine.memory,
            allocatable: BTreeMap::new(),
        };
        // Control groups are the machine's, so the name must be this test's alone.
        let uid =
            format!("test-{}", node.folder.path().file_name().unwrap().to_str().unwrap().replace('.', ""));
        let metadata = json!({"name": "web", "namespace": "shop", "uid": uid, "labels": {"app": "web"}});
        let pod: Pod = serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap();
        let volumes = Volumes::new(settings.clone());
        let objects = objects(&uid);
        volumes.set_up(&pod, &objects).unwrap();
        settings.cgroups.create(&pod).unwrap();
        let config = make::sandbox(&pod, &settings, 0).unwrap();
        let runtime = node.runtime();
        let sandbox = runtime.run_sandbox(config.clone()).await.unwrap();
        let ip = runtime.sandbox_status(&sandbox).await.unwrap().network.unwrap().ip;
        Self { runtime, settings, volumes, pod, objects, sandbox, config, ip }
    }

    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap()
    }

    /// Starts the first container of the spec; its id.
    async fn start(&self) -> String {
        let container = &self.pod.spec.as_ref().unwrap().containers[0];
        let ips = [self.ip.clone()];
        let image = self.runtime.image(BUSYBOX).await.unwrap().unwrap();
        let envs = env::environment(&self.pod, container, &self.objects, &self.settings, &ips).unwrap();
        let mounts = self.volumes.mounts(&self.pod, container, &envs, 0, &ips).unwrap();
        let inputs = Inputs { attempt: 0, image: &image, envs, mounts };
        let config = make::container(&self.pod, container, &self.settings, inputs).unwrap();
        let id = self.runtime.create_container(&self.sandbox, config, self.config.clone()).await.unwrap();
        self.runtime.start_container(&id).await.unwrap();
        id
    }

    async fn say(&self, id: &str, script: &str) -> String {
        let command = ["sh", "-c", script].map(str::to_owned).to_vec();
        let answer = self.runtime.exec_sync(id, command, PATIENCE).await.unwrap();
        format!("{}{}", String::from_utf8_lossy(&answer.stdout), String::from_utf8_lossy(&answer.stderr))
    }

    /// A file of the pod's control group, or of one of its containers: by its name in version 1, and in version 2.
    fn group(&self, container: &str, [controller, first, second]: [&str; 3]) -> String {
        let parent = self.settings.cgroups.parent(&self.pod);
        let at = Path::new(parent.trim_start_matches('/')).join(container);
        let root = Path::new("/sys/fs/cgroup");
        let split = root.join(controller).join(&at).join(first);
        let unified = root.join(&at).join(second);
        let text = fs::read_to_string(&split).or_else(|_| fs::read_to_string(&unified));
        text.unwrap_or_else(|error| panic!("{} or {}: {error}", split.display(), unified.display()))
            .trim()
            .to_owned()
    }

    /// Ends the pod, and holds it to having left nothing.
    async fn end(mut self) {
        let sandbox = std::mem::take(&mut self.sandbox);
        self.runtime.stop_sandbox(&sandbox).await.unwrap();
        self.runtime.remove_sandbox(&sandbox).await.unwrap();
        for _ in 0..2 {
            self.settings.cgroups.remove(self.uid()).unwrap();
            self.volumes.tear_down(self.uid()).unwrap();
        }
        assert!(!self.settings.cgroups.pods().contains(self.uid()), "control groups are left");
        assert_eq!(self.volumes.uids().unwrap(), Vec::<String>::new());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.uid()), "mounts are left");
    }
}

/// A test that failed leaves nothing either.
impl Drop for Made {
    fn drop(&mut self) {
        if self.sandbox.is_empty() {
            return;
        }
        let (socket, sandbox) = (self.runtime.path().to_owned(), self.sandbox.clone());
        let end = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let socket = Socket::new(&socket).unwrap();
                socket.stop_sandbox(&sandbox).await.ok();
                socket.remove_sandbox(&sandbox).await.ok();
            });
        };
        // The test's own runtime may be ending.
        std::thread::spawn(end).join().ok();
        self.settings.cgroups.remove(self.uid()).ok();
        self.volumes.tear_down(self.uid()).ok();
    }
}

fn objects(uid: &str) -> Objects {
    let map = json!({"data": {"color": "blue", "size": "L"}});
    let secret = json!({"data": {"key": "c2VjcmV0"}});
    let token = Token {
        pod_uid: uid.to_owned(),
        audience: String::new(),
        token: "jwt".to_owned(),
        expiration_timestamp: String::new(),
    };
    Objects {
        config_maps: [("conf".to_owned(), Arc::new(serde_json::from_value(map).unwrap()))].into(),
        secrets: [("key".to_owned(), Arc::new(serde_json::from_value(secret).unwrap()))].into(),
        tokens: [("api".to_owned(), Arc::new(token))].into(),
    }
}

#[tokio::test]
async fn a_container_is_what_its_pod_says() {
    if !able() {
        return;
    }
    let node = Node::start().await;
    let made = Made::run(
        &node,
        json!({
            "hostname": "db", "hostAliases": [{"ip": "10.1.2.3", "hostnames": ["peer"]}],
            "shareProcessNamespace": false,
            "securityContext": {
                "runAsUser": 1000, "runAsGroup": 1001, "fsGroup": 2000, "supplementalGroups": [3000],
                "runAsNonRoot": true,
            },
            "containers": [{
                "name": "main", "image": BUSYBOX, "command": ["sh", "-c", "echo $(WHO) >/dev/termination-log; exec sleep 1000"],
                "workingDir": "/data",
                "env": [
                    {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "color"}}},
                    {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                ],
                "securityContext": {
                    "readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                },
                "resources": {"limits": {"cpu": "250m", "memory": "64Mi"}, "requests": {"cpu": "100m"}},
                "volumeMounts": [
                    {"name": "data", "mountPath": "/data"},
                    {"name": "data", "mountPath": "/part", "subPathExpr": "of/$(WHO)"},
                    {"name": "ram", "mountPath": "/ram"},
                    {"name": "conf", "mountPath": "/etc/conf"},
                    {"name": "conf", "mountPath": "/etc/color", "subPath": "color"},
                    {"name": "key", "mountPath": "/etc/key"},
                    {"name": "api", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"},
                ],
            }],
            "volumes": [
                {"name": "data", "emptyDir": {}}, {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
                {"name": "conf", "configMap": {"name": "conf"}},
                {"name": "key", "secret": {"secretName": "key", "defaultMode": 0o400}},
                {"name": "api", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}},
            ],
        }),
    )
    .await;
    let id = made.start().await;
    for (script, said) in [
        ("id -u; id -g; id -G", "1000\n1001\n1001 2000 3000\n".to_owned()),
        ("busybox hostname; busybox pwd", "db\n/data\n".to_owned()),
        ("echo $COLOR $IP $LIMIT", format!("blue {} 64\n", made.ip)),
        ("echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT", "127.0.0.1:10550\n".to_owned()),
        ("busybox grep -c nameserver.10.96.0.10 /etc/resolv.conf", "1\n".to_owned()),
        (
            "busybox grep db /etc/hosts; busybox grep peer /etc/hosts",
            format!("{}\tdb\n10.1.2.3\tpeer\n", made.ip),
        ),
        ("busybox touch /x", "touch: /x: Read-only file system\n".to_owned()),
        ("busybox touch /etc/conf/x", "touch: /etc/conf/x: Read-only file system\n".to_owned()),
        (
            "busybox grep -E 'CapEff|NoNewPrivs' /proc/self/status",
            "CapEff:\t0000000000000000\nNoNewPrivs:\t1\n".to_owned(),
        ),
        (
            "echo kept >/part/file; cat /data/of/web/file; busybox stat -c %g /part/file",
            "kept\n2000\n".to_owned(),
        ),
        (
            "busybox dd if=/dev/zero of=/ram/x bs=1M count=2 2>&1 | busybox grep -c 'No space'",
            "1\n".to_owned(),
        ),
        ("cat /etc/conf/size /etc/color", "Lblue".to_owned()),
        ("cat /etc/key/key; busybox stat -L -c ' %a %g' /etc/key/key", "secret 440 2000\n".to_owned()),
        (
            "cd /var/run/secrets/kubernetes.io/serviceaccount; cat token; busybox stat -L -c ' %a %u' token",
            "jwt 640 1000\n".to_owned(),
        ),
        ("busybox grep -c ' /proc/sys .* ro,' /proc/mounts", "1\n".to_owned()),
    ] {
        assert_eq!(made.say(&id, script).await, said, "{script}");
    }

    // Limits, as the kernel has them: of the container, and of the pod.
    for group in [id.as_str(), ""] {
        let memory = made.group(group, ["memory", "memory.limit_in_bytes", "memory.max"]);
        assert_eq!(memory, (64 << 20).to_string());
        let quota = made.group(group, ["cpu", "cpu.cfs_quota_us", "cpu.max"]);
        assert_eq!(quota.split(' ').next(), Some("25000"));
        let weight = made.group(group, ["cpu", "cpu.shares", "cpu.weight"]);
        assert!(["102", "4"].contains(&weight.as_str()), "{weight}");
    }

    // A changed object is seen by who runs; by who mounted a part of it, at the next start.
    let changed: Value = json!({"data": {"color": "red", "size": "XL"}});
    let mut objects = made.objects.clone();
    objects.config_maps.insert("conf".to_owned(), Arc::new(serde_json::from_value(changed).unwrap()));
    assert!(made.volumes.refresh(&made.pod, &objects).unwrap());
    assert_eq!(made.say(&id, "cat /etc/conf/color /etc/conf/size /etc/color").await, "redXLblue");

    assert_eq!(made.volumes.termination_message(made.uid(), "main", 0).as_deref(), Some("web\n"));
    made.end().await;
    node.stop().await;
}

#[tokio::test]
async fn a_container_that_takes_more_memory_than_it_may_is_killed_and_says_so() {
    if !able() {
        return;
    }
    let node = Node::start().await;
    let made = Made::run(
        &node,
        json!({"containers": [{
            "name": "main", "image": BUSYBOX, "command": ["busybox", "tail", "/dev/zero"],
            "resources": {"limits": {"memory": "16Mi"}},
        }]}),
    )
    .await;
    let id = made.start().await;
    let status = exited(&made.runtime, &id).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    made.end().await;
    node.stop().await;
}

#[tokio::test]
async fn each_probe_reaches_a_container_and_a_privileged_one_shares_the_hosts_namespaces() {
    if !able() {
        return;
    }
    let node = Node::start().await;
    let made = Made::run(
        &node,
        json!({
            "hostPID": true,
            "containers": [{
                "name": "main", "image": BUSYBOX,
                "command": ["sh", "-c", "echo well >/tmp/index.html; exec httpd -f -p 8080 -h /tmp"],
                "ports": [{"name": "web", "containerPort": 8080}],
                "securityContext": {"privileged": true},
            }],
        }),
    )
    .await;
    let id = made.start().await;
    let container = &made.pod.spec.as_ref().unwrap().containers[0];
    let target = Target { runtime: &made.runtime, id: &id, container, pod_ip: &made.ip };
    let check = async |probe: Value| probes::check(&serde_json::from_value(probe).unwrap(), &target).await;
    let up = async {
        while check(json!({"tcpSocket": {"port": "web"}})).await != Outcome::Success {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, up).await.expect("the server comes up");
    assert_eq!(check(json!({"httpGet": {"port": 8080, "path": "/index.html"}})).await, Outcome::Success);
    let missing = check(json!({"httpGet": {"port": "web", "path": "/none"}})).await;
    assert_eq!(missing, Outcome::Failure("HTTP probe failed with statuscode: 404".to_owned()));
    assert_eq!(check(json!({"exec": {"command": ["true"]}})).await, Outcome::Success);
    let wrong = check(json!({"exec": {"command": ["sh", "-c", "echo no; exit 1"]}})).await;
    assert_eq!(wrong, Outcome::Failure("no\n".to_owned()));
    let slow = check(json!({"exec": {"command": ["sleep", "100"]}, "timeoutSeconds": 1})).await;
    assert_eq!(slow, Outcome::Failure("command \"sleep 100\" timed out after 1s".to_owned()));
    let init = made.say(&id, "cat /proc/1/comm").await;
    assert_eq!(init, fs::read_to_string("/proc/1/comm").unwrap(), "the host's processes are seen");
    let privileges = made.say(&id, "busybox grep CapEff /proc/self/status").await;
    assert_ne!(privileges.trim(), "CapEff:\t0000000000000000");
    made.end().await;
    node.stop().await;
}
