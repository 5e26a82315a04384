//! Stock clients (`mosquitto_pub`, `mosquitto_sub`) against a real broker: core, driver and MQTT front.
//!
//! What is pinned here is that they understand us, not how. Skipped where the clients are not installed.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::{net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use broker::{
    Tasks,
    core::Config as CoreConfig,
    front::{
        auth::Auth,
        mqtt::{self, Config},
    },
    store::mem::MemStore,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::TcpListener,
    process::{Child, ChildStdout, Command},
};

/// Far beyond what anything here takes: only a hang is caught.
const PATIENCE: Duration = Duration::from_secs(30);

struct Broker {
    address: SocketAddr,
    config: Arc<Config>,
    tasks: Tasks,
}

impl Broker {
    async fn start() -> Self {
        let tasks = Tasks::new();
        let store = MemStore::auto();
        let recovered = store.recover();
        let handle = broker::driver::start(CoreConfig::node("edge-1", [1; 16], 7), store, recovered, &tasks);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Arc::new(Config::new(Auth::Anonymous));
        tasks.spawn("mqtt", mqtt::serve(listener, Arc::clone(&config), handle, tasks.clone()));
        Self { address, config, tasks }
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        self.with_address(Command::new(program), args)
    }

    fn with_address(&self, mut command: Command, args: &[&str]) -> Command {
        command.args(["-h", "127.0.0.1", "-p", &self.address.port().to_string()]).args(args);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    async fn publish(&self, args: &[&str]) {
        let status = self.command("mosquitto_pub", args).status();
        let status = tokio::time::timeout(PATIENCE, status).await.expect("publishes in time").unwrap();
        assert!(status.success(), "{args:?}: {status}");
    }

    /// Starts a subscriber and waits until its subscription is acknowledged.
    async fn subscribe(&self, args: &[&str]) -> Subscriber {
        // Into a pipe, mosquitto_sub would keep what `-d` says until it ends.
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "mosquitto_sub", "-d"]);
        let mut child = self.with_address(command, args).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut subscriber = Subscriber { child, lines };
        while !subscriber.line().await.starts_with("Subscribed") {}
        subscriber
    }

    /// Runs a subscriber to its end and returns the messages that it printed.
    async fn collect(&self, args: &[&str]) -> Vec<String> {
        let output = self.command("mosquitto_sub", args).output();
        let output = tokio::time::timeout(PATIENCE, output).await.expect("gets them in time").unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }
}

struct Subscriber {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Subscriber {
    async fn line(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await;
        line.expect("says something in time").unwrap().expect("still runs")
    }

    /// The next line that our own format marks as a message.
    async fn message(&mut self) -> String {
        loop {
            if let Some(message) = self.line().await.strip_prefix("=> ") {
                return message.to_owned();
            }
        }
    }
}

fn installed() -> bool {
    let found = std::process::Command::new("mosquitto_sub").arg("--help").output().is_ok();
    if !found {
        eprintln!("skipped: mosquitto_sub is not installed");
    }
    found
}

#[tokio::test]
async fn messages_of_every_qos_arrive_once_and_in_order_in_both_versions() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    for version in ["311", "5"] {
        for qos in ["0", "1", "2"] {
            let mut subscriber = broker
                .subscribe(&["-V", version, "-q", qos, "-t", "sensors/#", "-F", "=> %t %p %q", "-C", "3"])
                .await;
            for payload in ["71.5", "72", "73"] {
                broker.publish(&["-V", version, "-q", qos, "-t", "sensors/boiler/temp", "-m", payload]).await;
            }
            for payload in ["71.5", "72", "73"] {
                let expected = format!("sensors/boiler/temp {payload} {qos}");
                assert_eq!(subscriber.message().await, expected, "version {version}");
            }
            let status = tokio::time::timeout(PATIENCE, subscriber.child.wait()).await.unwrap().unwrap();
            assert!(status.success());
        }
    }
    assert_eq!(broker.config.counters.closed(mqtt::Cause::Malformed), 0);
    assert_eq!(broker.config.counters.closed(mqtt::Cause::ProtocolError), 0);
}

#[tokio::test]
async fn a_large_message_crosses_unchanged() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    let large = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(large.path(), vec![b'x'; 900_000]).unwrap();
    let mut subscriber = broker.subscribe(&["-q", "1", "-t", "big", "-F", "=> %l", "-C", "1"]).await;
    broker.publish(&["-q", "1", "-t", "big", "-f", large.path().to_str().unwrap()]).await;
    assert_eq!(subscriber.message().await, "900000");
}

#[tokio::test]
async fn a_retained_message_waits_for_its_subscribers_until_it_is_cleared() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    broker.publish(&["-q", "1", "-r", "-t", "state/door", "-m", "open"]).await;
    for version in ["311", "5"] {
        let got =
            broker.collect(&["-V", version, "-q", "1", "-t", "state/+", "-F", "%r %p", "-C", "1"]).await;
        assert_eq!(got, ["1 open"]);
    }
    broker.publish(&["-q", "1", "-r", "-n", "-t", "state/door"]).await;
    let mut subscriber = broker.subscribe(&["-q", "1", "-t", "state/+", "-F", "=> %r %p", "-C", "1"]).await;
    broker.publish(&["-q", "1", "-t", "state/door", "-m", "shut"]).await;
    assert_eq!(subscriber.message().await, "0 shut", "the cleared one does not come first");
}

#[tokio::test]
async fn a_persistent_session_gets_what_came_while_it_was_away() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    for (version, lasting) in [("311", &["-c"][..]), ("5", &["-c", "-x", "3600"])] {
        let id = format!("meter-{version}");
        let common = [&["-V", version, "-i", &id, "-q", "1", "-t", "jobs/#"], lasting].concat();
        broker.collect(&[&common[..], &["-E"]].concat()).await;
        for payload in ["one", "two", "three"] {
            broker.publish(&["-q", "1", "-t", "jobs/a", "-m", payload]).await;
        }
        let got = broker.collect(&[&common[..], &["-C", "3"]].concat()).await;
        assert_eq!(got, ["one", "two", "three"], "version {version}");
    }
}

#[tokio::test]
async fn stopping_ends_every_connection() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    let _subscriber = broker.subscribe(&["-t", "#"]).await;
    broker.tasks.stopped().cancel();
    let closed = || broker.config.counters.closed(mqtt::Cause::Shutdown);
    let gone = async {
        while closed() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the connection is closed");
}

#[tokio::test]
async fn the_will_of_a_client_that_dies_is_published() {
    if !installed() {
        return;
    }
    let broker = Broker::start().await;
    let mut heir = broker.subscribe(&["-q", "1", "-t", "wills/#", "-F", "=> %t %p"]).await;
    let mut mortal = broker
        .subscribe(&["-t", "x", "--will-topic", "wills/a", "--will-payload", "gone", "--will-qos", "1"])
        .await;
    mortal.child.kill().await.unwrap();
    assert_eq!(heir.message().await, "wills/a gone");
}
