//! A container's log as an answer.

use std::{io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use hyper::StatusCode;
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use super::{
    ContainerView, Of, Pods,
    answer::{self, Answer, Refusal},
};
use crate::{
    logs::{Reader, Step, Wanted},
    runtime::{Runtime, RuntimeError, cri},
};

/// How often a log that has ended is looked at, for as long as somebody follows it.
const BEAT: Duration = Duration::from_millis(100);
/// How often the runtime is asked whether a container that prints nothing still runs.
const LIFE_BEAT: Duration = Duration::from_secs(1);

/// # Errors
/// In kubelet's words: there is no such pod or container, or it has printed nothing yet.
pub(super) fn logs(
    pods: &dyn Pods,
    runtime: &Arc<dyn Runtime>,
    of: &Of,
    mut wanted: Wanted,
    previous: bool,
) -> Result<Answer, Refusal> {
    let (name, container) = (&of.pod, &of.container);
    let not_found = |why| Refusal::new(StatusCode::NOT_FOUND, why);
    let pod =
        pods.pod(&of.namespace, name).ok_or_else(|| not_found(format!("pod {name:?} does not exist")))?;
    let view = pod
        .containers
        .iter()
        .find(|view| view.name == *container)
        .ok_or_else(|| not_found(format!("container {container:?} not found in pod {name:?}")))?;
    if previous {
        let log = view.previous_log.as_ref().ok_or_else(|| {
            Refusal::bad_request(format!(
                "previous terminated container {container:?} in pod {name:?} not found"
            ))
        })?;
        // It has ended: nothing is left to follow.
        wanted.follow = false;
        return Ok(body(open(log, &wanted)?, None));
    }
    let log = view.log.as_ref().ok_or_else(|| Refusal::bad_request(waiting(view, name)))?;
    let reader = open(log, &wanted)?;
    let life = view.id.clone().filter(|_| wanted.follow).map(|id| Life {
        runtime: Arc::clone(runtime),
        id,
        asked: Instant::now(),
    });
    Ok(body(reader, life))
}

fn waiting(view: &ContainerView, pod: &str) -> String {
    let container = &view.name;
    match view.waiting.as_deref() {
        Some("ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName") => format!(
            "container {container:?} in pod {pod:?} is waiting to start: trying and failing to pull image"
        ),
        Some(reason) => format!("container {container:?} in pod {pod:?} is waiting to start: {reason}"),
        None => format!("container {container:?} in pod {pod:?} is not available"),
    }
}

fn open(log: &Path, wanted: &Wanted) -> Result<Reader, Refusal> {
    Reader::open(log, wanted).map_err(|e| {
        let log = log.display();
        Refusal::failed(format!("failed to try resolving symlinks in path {log:?}: {e}"))
    })
}

/// Whether the container that is followed still runs.
struct Life {
    runtime: Arc<dyn Runtime>,
    id: String,
    asked: Instant,
}

impl Life {
    /// Asks at most once per [`LIFE_BEAT`]; in between, and while the runtime does not answer, it is as it was.
    async fn has_ended(&mut self) -> bool {
        if self.asked.elapsed() < LIFE_BEAT {
            return false;
        }
        self.asked = Instant::now();
        match self.runtime.container_status(&self.id).await {
            Ok(status) => status.state() == cri::ContainerState::ContainerExited,
            Err(RuntimeError::NotFound(_)) => true,
            Err(_) => false,
        }
    }
}

/// Each piece is read when the one before has been taken.
fn body(reader: Reader, life: Option<Life>) -> Answer {
    let pieces = stream::unfold(Some((reader, life)), |state| async {
        let (mut reader, mut life) = state?;
        loop {
            let (back, step) = match spawn_blocking(move || {
                let step = reader.step();
                (reader, step)
            })
            .await
            {
                Ok(stepped) => stepped,
                Err(e) => return Some((Err(io::Error::other(e)), None)),
            };
            reader = back;
            match step {
                Ok(Step::Bytes(bytes)) => return Some((Ok(Bytes::from(bytes)), Some((reader, life)))),
                Ok(Step::Full) => return None,
                Ok(Step::AtEnd) => {
                    let followed = life.as_mut()?;
                    if followed.has_ended().await {
                        // What it printed last may have come since.
                        reader.no_more();
                        life = None;
                    } else {
                        sleep(BEAT).await;
                    }
                }
                Err(e) => return Some((Err(e), None)),
            }
        }
    });
    answer::stream(pieces)
}
