//! kubectl at the hub, real containers at the node, and what goes between them over Streams: logs, commands, files,
//! ports, figures.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use octobus_tests::clock::wait_for;

use super::workloads::{Site, able, deployment};

const SOON: Duration = Duration::from_secs(60);

/// A kubectl that goes on until it is dropped, and what it prints.
struct Going {
    kubectl: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Going {
    fn start(site: &Site, arguments: &[&str]) -> Self {
        let mut command = Command::new("kubectl");
        command.args(arguments).env("KUBECONFIG", site.kubeconfig()).stdout(Stdio::piped());
        let mut kubectl = command.spawn().unwrap();
        let lines = BufReader::new(kubectl.stdout.take().unwrap());
        Self { kubectl, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Going {
    fn drop(&mut self) {
        drop(self.kubectl.kill());
        drop(self.kubectl.wait());
    }
}

#[test]
fn kubectl_reads_logs_runs_commands_copies_files_forwards_ports_and_sees_what_is_used() {
    if !able() {
        return;
    }
    let site = Site::start();
    let script = "echo began; mkdir -p /tmp/www; echo page > /tmp/www/index.html; \
                  busybox ln -s busybox /bin/tar; busybox httpd -p 8080 -h /tmp/www; \
                  n=0; while true; do n=$((n+1)); echo line $n; sleep 1; done";
    let script = script.replace("mkdir", "busybox mkdir");
    site.apply(&deployment("web", 1, &script));
    site.running("app=web", 1);

    assert!(site.kubectl(&["logs", "deploy/web"]).ok().starts_with(&["began".to_owned()]));
    let mut following = Going::start(&site, &["logs", "-f", "--tail=1", "deploy/web"]);
    let first = following.line();
    assert!(first.starts_with("line ") && following.line() != first, "{first}");
    drop(following);

    let said = site.kubectl(&["exec", "deploy/web", "--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (said.status.code(), &*said.stdout),
        (Some(7), &["out".to_owned()][..]),
        "{}",
        said.describe()
    );
    assert!(said.stderr.iter().any(|line| line == "err"), "{}", said.describe());
    let mut command = Command::new("kubectl");
    command.args(["exec", "-i", "deploy/web", "--", "cat"]).env("KUBECONFIG", site.kubeconfig());
    let mut cat = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
    let mut stdin = cat.stdin.take().unwrap();
    let writing = {
        let sent = sent.clone();
        std::thread::spawn(move || stdin.write_all(&sent).unwrap())
    };
    let mut back = Vec::new();
    cat.stdout.take().unwrap().read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(cat.wait().unwrap().success() && back == sent, "the end of stdin reaches the command");

    let folder = tempfile::tempdir().unwrap();
    let (there, back) = (folder.path().join("there"), folder.path().join("back"));
    fs::write(&there, &sent).unwrap();
    let pod = site.pods("app=web")[0]["metadata"]["name"].as_str().unwrap().to_owned();
    site.kubectl(&["cp", there.to_str().unwrap(), &format!("{pod}:/tmp/copied")]).ok();
    site.kubectl(&["cp", &format!("{pod}:/tmp/copied"), back.to_str().unwrap()]).ok();
    assert!(fs::read(&back).unwrap() == sent);

    let mut forwarding = Going::start(&site, &["port-forward", "deploy/web", ":8080"]);
    let said = forwarding.line();
    let address = said.strip_prefix("Forwarding from ").and_then(|rest| rest.split(' ').next());
    let mut client = TcpStream::connect(address.unwrap_or_else(|| panic!("{said}"))).unwrap();
    client.write_all(b"GET /index.html HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("page\n"), "{answer}");
    drop(forwarding);

    wait_for("figures", SOON, || {
        let (nodes, pods) = (site.kubectl(&["top", "node"]), site.kubectl(&["top", "pod"]));
        let shown = nodes.stdout.concat().contains("edge-1") && pods.stdout.concat().contains("web-");
        shown.then_some(())
    });
    site.stop();
}
