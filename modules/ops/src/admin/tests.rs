use std::time::Duration;

use axum::routing::get;

use super::*;
use crate::client::Client;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn router() -> Router {
    Router::new()
        .route("/v1/logs", get(|| async { Json(vec!["a", "b"]) }))
        .route("/v1/log", get(|| async { Refusal::not_found("there is no such stream") }))
}

#[tokio::test]
async fn the_socket_and_a_folder_made_for_it_are_closed_to_other_users() {
    let data = folder();
    let path = data.path().join("made/admin.sock");
    let _socket = AdminSocket::bind(&path).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
}

#[tokio::test]
async fn a_dead_process_s_socket_is_replaced_and_a_living_one_s_is_not() {
    let data = folder();
    let path = data.path().join("admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let living = AdminSocket::bind(&path).unwrap();
    assert!(matches!(AdminSocket::bind(&path), Err(AdminError::InUse { .. })));
    drop(living);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_file_that_is_no_socket_is_left_alone() {
    let data = folder();
    let path = data.path().join("admin.sock");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(AdminSocket::bind(&path), Err(AdminError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_says_so() {
    let path = Path::new("/tmp").join("x".repeat(120));
    let error = AdminSocket::bind(&path).unwrap_err().to_string();
    assert!(error.contains("125 bytes") && error.contains("--admin"), "{error}");
}

#[tokio::test]
async fn answers_and_refusals_reach_the_client() {
    let data = folder();
    let path = data.path().join("admin.sock");
    let tasks = Tasks::new();
    AdminSocket::bind(&path).unwrap().serve(router(), &tasks);
    let client = Client::new(&path);
    assert_eq!(client.get::<Vec<String>>("/v1/logs", &[]).await.unwrap(), ["a", "b"]);
    let refused = client.get::<Vec<String>>("/v1/log", &[]).await.unwrap_err();
    assert!(refused.is_not_found());
    assert_eq!(refused.to_string(), "there is no such stream");
    let unknown = client.get::<Vec<String>>("/v1/nothing", &[]).await.unwrap_err();
    assert!(unknown.is_not_found() && unknown.to_string().contains("does not offer"));
    tasks.drain(Duration::from_secs(5)).await;
    assert!(!path.exists(), "the socket is gone with the process");
}

#[tokio::test]
async fn a_stream_of_lines_is_made_as_fast_as_it_is_read() {
    let data = folder();
    let path = data.path().join("admin.sock");
    let tasks = Tasks::new();
    let made = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let (counted, in_tasks) = (Arc::clone(&made), tasks.clone());
    let stream = move || async move {
        stream::ndjson(&in_tasks, "test", |mut lines| async move {
            for line in 0..1_000_000u64 {
                counted.store(line, std::sync::atomic::Ordering::Relaxed);
                lines.line(&[line, u64::MAX, u64::MAX]).await?;
            }
            lines.flush().await
        })
    };
    AdminSocket::bind(&path).unwrap().serve(Router::new().route("/v1/log", get(stream)), &tasks);
    let mut lines = Client::new(&path).lines("/v1/log", &[]).await.unwrap();
    for line in 0..10_000u64 {
        let got: Vec<u64> = serde_json::from_slice(&lines.next().await.unwrap().unwrap()).unwrap();
        assert_eq!(got[0], line);
    }
    assert!(made.load(std::sync::atomic::Ordering::Relaxed) < 100_000, "the writer ran ahead of its reader");
    drop(lines);
    assert_eq!(tasks.drain(Duration::from_secs(5)).await, broker::tasks::Drained::Clean);
}
