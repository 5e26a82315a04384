//! Pins that a hub is a Kubernetes API server by itself: `dev` prints where, stock kubectl works with what it
//! prints, and a restart has lost no object and no right.

use std::{process::Command, time::Duration};

use octobus_tests::{
    clock,
    octobus::{Octobus, Role, Running, folder, free_port},
    process::{Finished, run_command},
    procfs,
};

fn kubectl(dev: &Running, arguments: &[&str]) -> Finished {
    let mut command = Command::new("kubectl");
    command.args(arguments).env("KUBECONFIG", dev.text("kubeconfig"));
    run_command(Duration::from_secs(30), &mut command)
}

#[test]
fn measured_dev_is_ready_within_two_seconds_and_idle_with_the_kubernetes_api() {
    let folder = folder();
    let port = free_port().to_string();
    let octobus = Octobus::new(Role::Dev, &folder.path().join("data")).args(&["--kubernetes", &port]);
    let dev = octobus.start();
    assert!(dev.took < Duration::from_secs(2), "ready {:?}", dev.took);
    let span = Duration::from_secs(5);
    clock::pause(Duration::from_secs(2));
    let before = procfs::cpu_time(dev.process.pid());
    clock::pause(span);
    let used = procfs::cpu_time(dev.process.pid()) - before;
    assert!(used < span / 100, "{used:?} of CPU in {span:?} without any work");
    dev.stop();
}

/// Whether a kubectl is installed that reads OpenAPI v3: Debian's does not.
fn is_installed() -> bool {
    let version = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output();
    let said = version.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
    let minor = said.split("\"minor\": \"").nth(1).and_then(|rest| rest.split(['"', '+']).next());
    minor.and_then(|minor| minor.parse::<u32>().ok()).is_some_and(|minor| minor >= 27)
}

#[test]
fn what_kubectl_made_is_there_after_a_restart() {
    if !is_installed() {
        eprintln!("not run: kubectl 1.27 or newer is not installed");
        return;
    }
    let folder = folder();
    let port = free_port().to_string();
    let octobus = Octobus::new(Role::Dev, &folder.path().join("data")).args(&["--kubernetes", &port]);
    let dev = octobus.start();
    let yes = kubectl(&dev, &["auth", "can-i", "create", "deployments"]).ok();
    assert_eq!(yes, ["yes"]);
    kubectl(&dev, &["create", "namespace", "plant"]).ok();
    kubectl(&dev, &["create", "configmap", "kept", "-n", "plant", "--from-literal=k=v"]).ok();
    kubectl(&dev, &["create", "deployment", "web", "-n", "plant", "--image=localhost/busybox:1"]).ok();
    kubectl(&dev, &["wait", "--for=create", "pod", "-l", "app=web", "-n", "plant", "--timeout=20s"]).ok();
    let uid = [
        "get",
        "configmap",
        "kept",
        "-n",
        "plant",
        "-o",
        "jsonpath={.metadata.uid} {.metadata.resourceVersion}",
    ];
    let before = kubectl(&dev, &uid).ok();
    dev.stop();
    let dev = octobus.start();
    assert_eq!(kubectl(&dev, &uid).ok(), before);
    kubectl(&dev, &["delete", "namespace", "plant", "--timeout=20s"]).ok();
    dev.stop();
}
