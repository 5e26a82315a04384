use std::{
    future::{Future, pending},
    sync::{Arc, Mutex},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::{Either, select};
use hyper::header::{HeaderMap, HeaderValue};
use k8s_openapi::api::core::v1::LifecycleHandler;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
};

use super::*;
use crate::{
    fake::{EPOCH_NANOS, Fake, Faults},
    runtime::cri,
};

fn probe(value: Value) -> Probe {
    serde_json::from_value(value).expect("a probe")
}

fn container() -> Container {
    let value = json!({
        "name": "c", "env": [{"name": "WHAT", "value": "world"}],
        "ports": [{"name": "web", "containerPort": 8080}, {"name": "big", "containerPort": 80_000}],
    });
    serde_json::from_value(value).expect("a container")
}

/// Asks while `server` serves.
async fn ask(value: Value, server: impl Future<Output = ()>) -> Outcome {
    let (fake, container) = (Fake::new(0, EPOCH_NANOS), container());
    let target = Target { runtime: &fake, id: "none", container: &container, pod_ip: "127.0.0.1" };
    let probe = probe(value);
    match select(Box::pin(check(&probe, &target)), Box::pin(server)).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right(((), asking)) => asking.await,
    }
}

async fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}

/// Reads one request's head and answers it.
async fn answer(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    reply: impl Fn(&str) -> String,
) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a request"));
    }
    let head = String::from_utf8(head).expect("text");
    let path = head.split(' ').nth(1).expect("a path").to_owned();
    stream.write_all(reply(&path).as_bytes()).await.expect("written");
    stream.shutdown().await.expect("ended");
    head
}

fn status(number: u16, headers: &str) -> String {
    format!("HTTP/1.1 {number} Said\r\n{headers}content-length: 2\r\n\r\nok")
}

/// Serves until it is dropped; what was asked goes to `heads`.
async fn serve(listener: TcpListener, heads: Arc<Mutex<Vec<String>>>, reply: impl Fn(&str) -> String) {
    loop {
        let (mut stream, _) = listener.accept().await.expect("accepted");
        let head = answer(&mut stream, &reply).await;
        heads.lock().expect("not poisoned").push(head);
    }
}

async fn get(reply: impl Fn(&str) -> String, mut action: Value) -> (Outcome, Vec<String>) {
    let (listener, port) = listener().await;
    action["port"] = json!(port);
    let heads = Arc::default();
    let outcome = ask(json!({"httpGet": action}), serve(listener, Arc::clone(&heads), reply)).await;
    let heads = heads.lock().expect("not poisoned").clone();
    (outcome, heads)
}

#[tokio::test]
async fn a_get_passes_by_its_status() {
    for (number, passes) in [(200, true), (204, true), (302, true), (399, true), (400, false), (503, false)] {
        let (outcome, _) = get(|_| status(number, ""), json!({"path": "/healthz"})).await;
        let failed = Outcome::Failure(format!("HTTP probe failed with statuscode: {number}"));
        assert_eq!(outcome, if passes { Outcome::Success } else { failed });
    }
}

#[tokio::test]
async fn a_get_says_who_asks_and_what_the_pod_wants_said() {
    let (_, heads) = get(|_| status(200, ""), json!({"path": "a?b=c"})).await;
    let head = heads[0].to_lowercase();
    assert!(head.starts_with("get /a?b=c http/1.1\r\n"), "{head}");
    assert!(head.contains("user-agent: kube-probe/1.33\r\n") && head.contains("accept: */*\r\n"), "{head}");
    assert!(head.contains("host: 127.0.0.1:"), "{head}");
    let headers = json!([
        {"name": "Host", "value": "shop.example"}, {"name": "X-A", "value": "1"}, {"name": "X-A", "value": "2"},
        {"name": "Accept", "value": ""}, {"name": "User-Agent", "value": "mine"},
    ]);
    let (_, heads) = get(|_| status(200, ""), json!({"httpHeaders": headers})).await;
    let head = heads[0].to_lowercase();
    for said in ["get / http", "host: shop.example\r\n", "x-a: 1\r\n", "x-a: 2\r\n", "user-agent: mine\r\n"] {
        assert!(head.contains(said), "{said} in {head}");
    }
    assert!(!head.contains("accept"), "{head}");
}

#[tokio::test]
async fn redirects_are_followed_on_the_same_host_only() {
    let moved = |path: &str| match path {
        "/old" => status(301, "location: /new\r\n"),
        "/new" => status(302, "location: last?x=1\r\n"),
        "/last?x=1" => status(500, ""),
        "/away" => status(302, "location: http://elsewhere.example/\r\n"),
        _ => status(302, "location: /round\r\n"),
    };
    let (outcome, heads) = get(moved, json!({"path": "/old"})).await;
    assert_eq!(outcome, Outcome::Failure("HTTP probe failed with statuscode: 500".into()));
    assert_eq!(heads.len(), 3);
    let (outcome, heads) = get(moved, json!({"path": "/away"})).await;
    assert_eq!((outcome, heads.len()), (Outcome::Success, 1));
    let (outcome, _) = get(moved, json!({"path": "/round"})).await;
    assert!(matches!(outcome, Outcome::Failure(why) if why.ends_with("stopped after 10 redirects")));
}

#[tokio::test]
async fn https_is_asked_without_looking_at_the_certificate() {
    let made = rcgen::generate_simple_self_signed(["elsewhere.example".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a certificate with its key");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (listener, port) = listener().await;
    let server = async {
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut stream = acceptor.accept(stream).await.expect("a handshake");
        answer(&mut stream, |_| status(200, "")).await;
    };
    assert_eq!(ask(json!({"httpGet": {"port": port, "scheme": "HTTPS"}}), server).await, Outcome::Success);
}

#[tokio::test]
async fn nobody_there_is_a_failure_in_the_words_of_kubelet() {
    let (listener, port) = listener().await;
    drop(listener);
    let dial = format!("dial tcp 127.0.0.1:{port}: connect: connection refused");
    let get = ask(json!({"httpGet": {"port": port, "path": "/x"}}), pending()).await;
    assert_eq!(get, Outcome::Failure(format!("Get \"http://127.0.0.1:{port}/x\": {dial}")));
    assert_eq!(ask(json!({"tcpSocket": {"port": port}}), pending()).await, Outcome::Failure(dial));
    let grpc = ask(json!({"grpc": {"port": port}}), pending()).await;
    let start = format!("error: failed to connect service at \"127.0.0.1:{port}\": ");
    assert!(matches!(&grpc, Outcome::Failure(why) if why.starts_with(&start)), "{grpc:?}");
}

#[tokio::test]
async fn a_socket_that_takes_connections_passes() {
    let (listener, port) = listener().await;
    assert_eq!(ask(json!({"tcpSocket": {"port": port}}), pending()).await, Outcome::Success);
    let named = ask(json!({"tcpSocket": {"port": port.to_string(), "host": "127.0.0.1"}}), pending()).await;
    assert_eq!(named, Outcome::Success);
    drop(listener);
}

#[tokio::test]
async fn a_server_that_says_nothing_fails_when_the_time_is_up() {
    let (listener, port) = listener().await;
    let mute = async {
        let _held = listener.accept().await.expect("accepted");
        pending().await
    };
    let outcome = ask(json!({"httpGet": {"port": port}, "timeoutSeconds": 1}), mute).await;
    let said = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)";
    assert!(matches!(&outcome, Outcome::Failure(why) if why.ends_with(said)), "{outcome:?}");
}

#[test]
fn ports_have_numbers_or_the_containers_names_for_them() {
    let container = container();
    let of = |value: Value| port(&serde_json::from_value(value).expect("a port"), &container);
    assert_eq!(of(json!(80)), Ok(80));
    assert_eq!(of(json!("web")), Ok(8080));
    assert_eq!(of(json!("81")), Ok(81));
    assert_eq!(of(json!("none")), Err("couldn't find port: none in container c".into()));
    assert_eq!(of(json!("big")), Err("invalid port number: 80000".into()));
    assert_eq!(of(json!(0)), Err("invalid port number: 0".into()));
}

/// A server of the health protocol that answers each service as its name says.
async fn health(listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut connection = h2::server::handshake(stream).await.expect("a handshake");
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let mut body = request.into_body();
            let mut bytes = BytesMut::new();
            while bytes.len() < 5 || bytes.len() < 5 + usize::from(bytes[4]) {
                // The connection must be served for the rest of the request to come.
                tokio::select! {
                    data = body.data() => match data {
                        Some(data) => bytes.extend_from_slice(&data.expect("data")),
                        None => break,
                    },
                    _more = connection.accept() => {}
                }
            }
            let service =
                bytes.get(7..).map(|name| String::from_utf8_lossy(name).into_owned()).unwrap_or_default();
            let (state, code) = match service.as_str() {
                "" => (1, "0"),
                "sick" => (2, "0"),
                "silent" => (0, "12"),
                _ => (0, "5"),
            };
            let response = hyper::Response::builder().header("content-type", "application/grpc");
            let mut stream =
                respond.send_response(response.body(()).expect("a response"), false).expect("sent");
            if code == "0" {
                let mut message = BytesMut::new();
                message.put_u8(0);
                message.put_u32(2);
                message.put_slice(&[8, state]);
                stream.send_data(message.freeze(), false).expect("sent");
            } else {
                stream.send_data(Bytes::new(), false).expect("sent");
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static(code));
            trailers.insert("grpc-message", HeaderValue::from_static("no"));
            stream.send_trailers(trailers).expect("sent");
        }
    }
}

#[tokio::test]
async fn grpc_health_passes_while_it_is_serving() {
    for (service, outcome) in [
        ("", Outcome::Success),
        ("sick", Outcome::Failure("service unhealthy (responded with \"NOT_SERVING\")".into())),
        (
            "silent",
            Outcome::Failure(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): no"
                    .into(),
            ),
        ),
        (
            "unknown",
            Outcome::Failure("error: health rpc failed: rpc error: code = NotFound desc = no".into()),
        ),
    ] {
        let (listener, port) = listener().await;
        let asked =
            ask(json!({"grpc": {"port": port, "service": service}, "timeoutSeconds": 10}), health(listener));
        assert_eq!(asked.await, outcome, "{service}");
    }
}

/// A fake with one running container; its id.
async fn running() -> (Fake, String) {
    let fake = Fake::new(0, EPOCH_NANOS);
    fake.on_exec(|_, command| {
        let (code, text) = match command[0].as_str() {
            "well" => (0, String::new()),
            "echo" => (0, String::new()),
            other => (3, format!("{other}: not well")),
        };
        let said = if command[0] == "echo" { command[1..].join(" ") } else { text };
        cri::ExecSyncResponse { stdout: said.into_bytes(), stderr: b"!".to_vec(), exit_code: code }
    });
    let metadata =
        cri::PodSandboxMetadata { name: "p".into(), uid: "u".into(), namespace: "n".into(), attempt: 0 };
    let config = cri::PodSandboxConfig { metadata: Some(metadata), ..cri::PodSandboxConfig::default() };
    let sandbox = fake.run_sandbox(config.clone()).await.expect("a sandbox");
    let image = cri::ImageSpec { image: "web".into(), ..cri::ImageSpec::default() };
    fake.pull_image("web", None).await.expect("pulled");
    let own = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(image),
        ..cri::ContainerConfig::default()
    };
    let id = fake.create_container(&sandbox, own, config).await.expect("a container");
    fake.start_container(&id).await.expect("started");
    (fake, id)
}

#[tokio::test]
async fn a_command_passes_by_its_exit_code() {
    let (fake, id) = running().await;
    let container = container();
    let target = Target { runtime: &fake, id: &id, container: &container, pod_ip: "" };
    let of = |command: Value| probe(json!({"exec": {"command": command}}));
    assert_eq!(check(&of(json!(["well"])), &target).await, Outcome::Success);
    assert_eq!(check(&of(json!(["$(WHAT)"])), &target).await, Outcome::Failure("world: not well!".into()));
}

#[tokio::test]
async fn what_cannot_be_asked_is_tried_again_and_counts_for_nothing() {
    let (fake, id) = running().await;
    let container = container();
    let target = Target { runtime: &fake, id: &id, container: &container, pod_ip: "" };
    fake.set_faults(Faults { unreached: 1000, ..Faults::default() });
    let before = fake.calls("exec_sync");
    let outcome = check(&probe(json!({"exec": {"command": ["well"]}})), &target).await;
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    assert_eq!(fake.calls("exec_sync") - before, TRIES);
    let mut schedule =
        Schedule::new(Kind::Liveness, &probe(json!({"failureThreshold": 1})), Instant::now(), Duration::ZERO);
    assert_eq!(schedule.finished(Instant::now(), &outcome), None);
    assert!(matches!(check(&probe(json!({})), &target).await, Outcome::Unknown(_)));
}

/// The runtime does not tell a command whose time was up from an answer that never came, but the time does.
#[tokio::test(start_paused = true)]
async fn a_command_whose_time_is_up_is_a_failure() {
    let (fake, id) = running().await;
    let container = container();
    let target = Target { runtime: &fake, id: &id, container: &container, pod_ip: "" };
    fake.set_faults(Faults { late: 1000, late_by: secs(3600), lost: 1000, ..Faults::default() });
    let outcome = check(&probe(json!({"exec": {"command": ["well"]}, "timeoutSeconds": 1})), &target).await;
    assert_eq!(outcome, Outcome::Failure("command \"well\" timed out after 1s".into()));
}

fn schedule(kind: Kind, value: Value) -> (Schedule, Instant) {
    let now = Instant::now();
    (Schedule::new(kind, &probe(value), now, Duration::ZERO), now)
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_due_after_its_delay_and_then_every_period_however_long_answers_take() {
    let (mut schedule, start) =
        schedule(Kind::Readiness, json!({"initialDelaySeconds": 5, "periodSeconds": 2}));
    assert_eq!(schedule.due(), start + secs(5));
    schedule.begin(start + secs(5));
    assert_eq!(schedule.due(), start + secs(7));
    schedule.finished(start + secs(6), &Outcome::Success);
    assert_eq!(schedule.due(), start + secs(7));
    let (schedule, start) = self::schedule(Kind::Readiness, json!({}));
    assert_eq!(schedule.due(), start, "without a delay at once");
    let jittered = Schedule::new(Kind::Readiness, &probe(json!({})), start, secs(3));
    assert_eq!(jittered.due(), start + secs(3));
}

#[tokio::test(start_paused = true)]
async fn a_verdict_turns_at_its_threshold_of_answers_in_a_row() {
    let (mut schedule, now) =
        schedule(Kind::Readiness, json!({"successThreshold": 2, "failureThreshold": 3}));
    let failed = || Outcome::Failure(String::new());
    let mut say = |outcome: Outcome| schedule.finished(now, &outcome);
    assert_eq!(say(Outcome::Success), None);
    assert_eq!(say(failed()), None);
    assert_eq!(say(Outcome::Success), None);
    assert_eq!(say(Outcome::Success), Some(Verdict::Passed));
    assert_eq!(say(Outcome::Success), None, "it did not turn");
    assert_eq!(say(failed()), None);
    assert_eq!(say(failed()), None);
    assert_eq!(say(Outcome::Unknown(String::new())), None);
    assert_eq!(say(failed()), Some(Verdict::Failed), "what could not be asked breaks no row");
    assert_eq!(schedule.verdict(), Verdict::Failed);
}

#[tokio::test(start_paused = true)]
async fn the_verdict_that_ends_an_instance_or_its_start_is_the_last() {
    let far = secs(86_400 * 365);
    for (kind, outcome, is_last) in [
        (Kind::Startup, Outcome::Success, true),
        (Kind::Startup, Outcome::Failure(String::new()), true),
        (Kind::Liveness, Outcome::Success, false),
        (Kind::Liveness, Outcome::Failure(String::new()), true),
        (Kind::Readiness, Outcome::Failure(String::new()), false),
    ] {
        let (mut schedule, now) = schedule(kind, json!({"failureThreshold": 1}));
        schedule.begin(now);
        schedule.finished(now, &outcome).expect("a verdict");
        assert_eq!(schedule.due() > now + far, is_last, "{kind:?} {outcome:?}");
    }
}

async fn hook(value: Value, server: impl Future<Output = ()>) -> Result<(), String> {
    let (fake, id) = running().await;
    let container = container();
    let target = Target { runtime: &fake, id: &id, container: &container, pod_ip: "127.0.0.1" };
    let handler: LifecycleHandler = serde_json::from_value(value).expect("a handler");
    match select(Box::pin(hooks::run(&handler, &target, secs(10))), Box::pin(server)).await {
        Either::Left((done, _)) => done,
        Either::Right(((), running)) => running.await,
    }
}

#[tokio::test]
async fn a_hook_that_fails_says_so_in_the_words_of_kubelet() {
    assert_eq!(hook(json!({"exec": {"command": ["well"]}}), pending()).await, Ok(()));
    assert_eq!(
        hook(json!({"exec": {"command": ["bad", "x"]}}), pending()).await,
        Err("Exec lifecycle hook ([bad x]) for Container \"c\" failed - error: command 'bad x' exited with 3: !, \
             message: \"bad: not well!\""
            .into())
    );
    let (listener, port) = listener().await;
    drop(listener);
    let refused =
        hook(json!({"httpGet": {"port": port, "path": "/bye"}}), pending()).await.expect_err("nobody");
    assert!(
        refused.starts_with("HTTP lifecycle hook (/bye) for Container \"c\" failed - error: Get "),
        "{refused}"
    );
    hook(json!({"tcpSocket": {"port": port}}), pending()).await.expect_err("nobody");
    hook(json!({}), pending()).await.expect_err("nothing to do");
}

#[tokio::test]
async fn a_hook_by_http_is_done_when_it_was_told() {
    let (listener, port) = listener().await;
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let server = serve(listener, Arc::clone(&heads), |_| status(500, ""));
    assert_eq!(hook(json!({"httpGet": {"port": port, "path": "bye"}}), server).await, Ok(()));
    let head = heads.lock().expect("not poisoned")[0].to_lowercase();
    assert!(head.starts_with("get /bye ") && head.contains("user-agent: kube-lifecycle/1.33"), "{head}");
}

#[tokio::test(start_paused = true)]
async fn a_hook_may_sleep_within_its_time() {
    let begun = Instant::now();
    assert_eq!(hook(json!({"sleep": {"seconds": 4}}), pending()).await, Ok(()));
    assert_eq!(begun.elapsed(), secs(4));
    assert_eq!(hook(json!({"sleep": {"seconds": 400}}), pending()).await, Ok(()));
    assert_eq!(begun.elapsed(), secs(14));
}
