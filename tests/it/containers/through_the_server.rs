//! What a client gets of real containers through the node's server: logs as they grow, commands, ports, figures.

use std::{sync::Arc, time::Duration};

use broker::Tasks;
use edged::{
    logs::rotate::{Limits, rotate},
    server::{ContainerView, PodView, Pods, Server},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::{sleep, timeout},
};

use super::{Node, PATIENCE, Pod, able, exited};

#[derive(Debug)]
struct One(PodView);

impl Pods for One {
    fn pod(&self, _namespace: &str, name: &str) -> Option<PodView> {
        (self.0.name == name).then(|| self.0.clone())
    }

    fn pods(&self) -> Vec<PodView> {
        vec![self.0.clone()]
    }

    fn objects(&self) -> Vec<serde_json::Value> {
        Vec::new()
    }
}

/// A server that knows of one pod with one container.
fn server(node: &Node, pod: &Pod, container: &str) -> (Arc<Server>, PodView) {
    let log = std::path::Path::new(&pod.config.log_directory).join("main.log");
    let view = PodView {
        namespace: "default".into(),
        name: "one".into(),
        uid: "u".into(),
        started_at: 0,
        sandbox: Some(pod.sandbox.clone()),
        containers: vec![ContainerView {
            name: "main".into(),
            id: Some(container.to_owned()),
            running: true,
            log: Some(log),
            ..ContainerView::default()
        }],
    };
    let pods = Arc::new(One(view.clone()));
    let server = Server::new("edge-1", node.folder.path().to_owned(), Arc::new(node.runtime()), pods);
    (server, view)
}

/// One connection to the server, with a request written to it, read up to the end of the answer's headers.
async fn ask(server: &Arc<Server>, tasks: &Tasks, path: &str, headers: &str) -> (String, DuplexStream) {
    let (mut near, far) = duplex(64 << 10);
    let (server, inner) = (Arc::clone(server), tasks.clone());
    tasks.spawn("server", async move { server.serve(far, &inner).await });
    let request = format!("GET {path} HTTP/1.1\r\nhost: edge-1\r\n{headers}\r\n");
    near.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(PATIENCE, near.read_u8()).await.unwrap().unwrap());
    }
    (String::from_utf8(head).unwrap(), near)
}

/// As WebSocket clients of Kubernetes do: every message begins with the number of its channel.
struct Channels(DuplexStream);

impl Channels {
    async fn open(server: &Arc<Server>, tasks: &Tasks, path: &str) -> Self {
        let headers = "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-protocol: v4.channel.k8s.io\r\n";
        let (head, stream) = ask(server, tasks, path, headers).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(head.to_ascii_lowercase().contains("s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
        Self(stream)
    }

    /// A short message; a mask of zeros is a mask.
    async fn send(&mut self, channel: u8, text: &[u8]) {
        let length = u8::try_from(text.len() + 1).unwrap();
        assert!(length < 126);
        let mut frame = vec![0x82, 0x80 | length, 0, 0, 0, 0, channel];
        frame.extend_from_slice(text);
        self.0.write_all(&frame).await.unwrap();
    }

    /// The next message that has something in it; none at the end.
    async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let next = timeout(PATIENCE, self.0.read_u8()).await.expect("in time");
            let kind = next.ok()? & 0x0f;
            let mut length = usize::from(self.0.read_u8().await.unwrap());
            if length == 126 {
                length = usize::from(self.0.read_u16().await.unwrap());
            }
            let mut message = vec![0; length];
            self.0.read_exact(&mut message).await.unwrap();
            match kind {
                8 => return None,
                2 if length > 1 => return Some((message[0], message.split_off(1))),
                _ => {}
            }
        }
    }

    /// Everything of one channel until its text has this in it.
    async fn until(&mut self, channel: u8, text: &str) -> String {
        let mut all = Vec::new();
        while !String::from_utf8_lossy(&all).contains(text) {
            let (from, message) = self.receive().await.unwrap_or_else(|| {
                panic!("ended after {:?}", String::from_utf8_lossy(&all));
            });
            if from == channel {
                all.extend(message);
            }
        }
        String::from_utf8_lossy(&all).into_owned()
    }
}

#[tokio::test]
async fn commands_and_ports_go_through_and_figures_come_back() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let id = pod.container("main", "echo page >/tmp/index.html; exec httpd -f -p 8080 -h /tmp").await;
    let (server, _) = server(&node, &pod, &id);
    let tasks = Tasks::new();

    let path = "/exec/default/one/main?command=sh&command=-c&command=read+x;+echo+got+$x;+exit+7&input=1&output=1&error=1";
    let mut command = Channels::open(&server, &tasks, path).await;
    command.send(0, b"this\n").await;
    assert_eq!(command.until(1, "\n").await, "got this\n");
    let status = command.until(3, "}").await;
    assert!(status.contains("\"ExitCode\",\"message\":\"7\""), "{status}");

    let mut port = Channels::open(&server, &tasks, "/portForward/default/one?port=8080").await;
    port.send(0, b"GET /index.html HTTP/1.0\r\n\r\n").await;
    let answer = port.until(0, "page").await;
    assert!(answer.contains("200 OK"), "{answer}");

    let (head, mut stream) = ask(&server, &tasks, "/stats/summary", "connection: close\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let mut body = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut body)).await.unwrap().unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let container = &summary["pods"][0]["containers"][0];
    assert!(container["memory"]["workingSetBytes"].as_u64().unwrap() > 0, "{container}");
    assert!(container["cpu"]["usageCoreNanoSeconds"].as_u64().unwrap() > 0, "{container}");
    assert!(container["cpu"]["usageNanoCores"].is_u64(), "{container}");
    tasks.drain(PATIENCE).await;
    node.stop().await;
}

#[tokio::test]
async fn who_follows_a_log_gets_every_line_across_rotations() {
    if !able() {
        return;
    }
    let mut node = Node::start().await;
    let pod = node.pod("one").run().await;
    let script = "i=0; while [ $i -lt 250 ]; do echo line $i; i=$((i+1)); sleep 0.01; done";
    let id = pod.container("main", script).await;
    let (server, view) = server(&node, &pod, &id);
    let tasks = Tasks::new();
    let path = "/containerLogs/default/one/main?follow=true";
    let (_, mut stream) = ask(&server, &tasks, path, "connection: close\r\n").await;
    let log = view.containers[0].log.clone().unwrap();
    let runtime = node.runtime();
    let rotations = async {
        let limits = Limits { bytes: 100, files: 10 };
        let mut rotated = 0;
        let mut now = std::time::SystemTime::UNIX_EPOCH;
        for _ in 0..4 {
            // Longer than the server takes to see that a file was put aside.
            sleep(Duration::from_millis(450)).await;
            now += Duration::from_secs(1);
            rotated += usize::from(rotate(&runtime, &id, &log, limits, now.into()).await.unwrap());
        }
        rotated
    };
    let mut text = Vec::new();
    let reading = timeout(PATIENCE, stream.read_to_end(&mut text));
    let (rotated, read) = tokio::join!(rotations, reading);
    read.expect("it ends with the container").unwrap();
    assert!(rotated >= 3, "{rotated} rotations");
    // Chunks' lengths stand between the lines.
    let text = String::from_utf8(text).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("line ")).collect();
    let expected: Vec<String> = (0..250).map(|n| format!("line {n}")).collect();
    assert_eq!(lines, expected);
    assert_eq!(exited(&runtime, &id).await.exit_code, 0);
    tasks.drain(PATIENCE).await;
    node.stop().await;
}
