//! That the fake is a runtime to believe.

use super::*;

fn sandbox(name: &str, attempt: u32) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            attempt,
        }),
        log_directory: "/logs".to_owned(),
        ..cri::PodSandboxConfig::default()
    }
}

fn container(image: &str, attempt: u32) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: "main".to_owned(), attempt }),
        image: Some(cri::ImageSpec { image: image.to_owned(), ..cri::ImageSpec::default() }),
        log_path: format!("main/{attempt}.log"),
        ..cri::ContainerConfig::default()
    }
}

async fn started(fake: &Fake, image: &str) -> (String, String) {
    fake.pull_image(image, None).await.expect("pulled");
    let pod = fake.run_sandbox(sandbox("web", 0)).await.expect("a sandbox");
    let id = fake.create_container(&pod, container(image, 0), sandbox("web", 0)).await.expect("a container");
    fake.start_container(&id).await.expect("started");
    (pod, id)
}

#[tokio::test(start_paused = true)]
async fn a_container_ends_when_its_script_says_and_a_hint_says_so() {
    let fake = Fake::default();
    fake.script("job", [Behaviour::ends(Duration::from_secs(5), 3)]);
    let (_, id) = started(&fake, "job").await;
    let mut hints = fake.hints().await.expect("hints");
    assert_eq!(hints.recv().await, Some(Hint { id: id.clone() }));
    let status = fake.container_status(&id).await.expect("a status");
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 3));
    assert_eq!(status.finished_at - status.started_at, 5_000_000_000);
    assert_eq!(status.log_path, "/logs/main/0.log");
}

#[tokio::test(start_paused = true)]
async fn what_ignores_the_request_to_end_is_killed_after_the_grace() {
    let fake = Fake::default();
    fake.script("deaf", [Behaviour { stops_in: None, ..Behaviour::forever() }]);
    let (_, id) = started(&fake, "deaf").await;
    let before = Instant::now();
    fake.stop_container(&id, Duration::from_secs(30)).await.expect("stopped");
    assert_eq!(before.elapsed(), Duration::from_secs(30));
    assert_eq!(fake.container_status(&id).await.expect("a status").exit_code, 137);
}

#[tokio::test(start_paused = true)]
async fn a_name_stays_reserved_when_the_answer_was_lost() {
    let fake = Fake::default();
    fake.lose_next("run_sandbox");
    let lost = fake.run_sandbox(sandbox("web", 0)).await;
    assert!(matches!(lost, Err(RuntimeError::Unavailable(_))), "{lost:?}");
    let again = fake.run_sandbox(sandbox("web", 0)).await;
    assert!(matches!(again, Err(RuntimeError::Refused(_))), "{again:?}");
    assert_eq!(fake.left().sandboxes, 1);
    fake.run_sandbox(sandbox("web", 1)).await.expect("another attempt is another name");
}

#[tokio::test(start_paused = true)]
async fn a_reboot_ends_everything_and_keeps_what_the_disk_knew() {
    let fake = Fake::default();
    let (pod, id) = started(&fake, "web").await;
    fake.reboot(Metadata::Kept);
    let status = fake.container_status(&id).await.expect("known");
    assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 255));
    let left = fake.left();
    assert_eq!((left.sandboxes, left.sandboxes_ready, left.containers_running), (1, 0, 0));
    let refused = fake.create_container(&pod, container("web", 1), sandbox("web", 0)).await;
    assert!(matches!(refused, Err(RuntimeError::Refused(_))), "{refused:?}");
    fake.reboot(Metadata::Lost);
    assert_eq!(fake.left(), Left::default());
    assert!(fake.images().await.expect("answers").is_empty());
}

#[tokio::test(start_paused = true)]
async fn containers_outlive_the_runtimes_own_process() {
    let fake = Fake::default();
    let (_, id) = started(&fake, "web").await;
    let mut hints = fake.hints().await.expect("hints");
    fake.kill();
    assert_eq!(hints.recv().await, None);
    assert!(matches!(fake.containers().await, Err(RuntimeError::Unavailable(_))));
    fake.start();
    let status = fake.container_status(&id).await.expect("known");
    assert_eq!(status.state(), ContainerState::ContainerRunning);
}

#[tokio::test(start_paused = true)]
async fn the_same_seed_gives_the_same_faults() {
    let run = |seed| async move {
        let fake = Fake::new(seed, EPOCH_NANOS);
        fake.set_faults(Faults { unreached: 200, lost: 200, ..Faults::default() });
        let mut outcomes = Vec::new();
        for attempt in 0..200 {
            outcomes.push(fake.run_sandbox(sandbox("web", attempt)).await.is_ok());
        }
        (outcomes, fake.left())
    };
    let first = run(7).await;
    assert_eq!(first, run(7).await);
    assert_ne!(first, run(8).await);
    let answered = first.0.iter().filter(|ok| **ok).count();
    assert!(first.1.sandboxes > answered, "some were done and not told");
}

#[tokio::test(start_paused = true)]
async fn stopping_and_removing_what_is_not_there_succeeds() {
    let fake = Fake::default();
    fake.stop_sandbox("none").await.expect("stopped");
    fake.remove_sandbox("none").await.expect("removed");
    fake.stop_container("none", Duration::ZERO).await.expect("stopped");
    fake.remove_container("none").await.expect("removed");
    fake.remove_image("none").await.expect("removed");
    assert!(matches!(fake.container_status("none").await, Err(RuntimeError::NotFound(_))));
}
