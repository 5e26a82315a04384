//! Hints from a runtime: CRI's own events where it has them, else containerd's, else none.
//!
//! CRI's events come after the runtime has noted what they say. containerd's event of an exit comes from below its CRI
//! part and overtakes it, so that who looks at once may still see the container running, and would not look again.
//! Hence an exit becomes a hint once the runtime shows it, or after a second at the latest.

use std::{future::Future, time::Duration};

use broker::{Tasks, clock::every};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use prost::Message as _;
use tokio::{sync::mpsc, time::sleep};
use tonic::{Code, Streaming};

use super::{ANSWER_BYTES_MAX, Socket};
use crate::runtime::{Hint, Runtime as _, RuntimeError, cri};

#[allow(missing_docs, clippy::all, unreachable_pub, unused_qualifications)]
mod events {
    tonic::include_proto!("containerd.services.events.v1");
}

/// Hints that wait for the agent. They say only where to look, so the one that finds no room is replaced by *look
/// everywhere*, which waits for room.
const WAITING_MAX: usize = 256;
/// Exits whose noting by the runtime is awaited at once; of the others the hint is given as they come.
const SETTLING_MAX: usize = 256;
/// How often the connection is tried where a runtime has no events.
const BEAT: Duration = Duration::from_secs(10);
/// What CRI may see of containerd's events: what became of tasks in its own namespace.
const FILTER: &str = r#"namespace==k8s.io,topic~="^/tasks/(start|oom|exit|delete)$""#;

/// Starts a task that lives as long as the runtime's connection and the receiver.
///
/// A runtime sends nothing, not even headers, before the first event: what it has cannot be known earlier, and is not
/// waited for here. That it answers at all is.
pub(super) async fn subscribe(socket: &Socket) -> Result<mpsc::Receiver<Hint>, RuntimeError> {
    socket.version().await?;
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let socket = socket.clone();
    // It ends with the connection and with the receiver: nobody has to stop it.
    Tasks::new().spawn("hints of the container runtime", async move {
        let hints = Hints(sender);
        tokio::select! {
            () = hints.0.closed() => {}
            () = run(&socket, &hints) => {}
        }
    });
    Ok(receiver)
}

struct Hints(mpsc::Sender<Hint>);

impl Hints {
    /// Cancel-safe: a hint that is not given is one the receiver did not want any more.
    async fn give(&self, id: String) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.0.try_send(Hint { id }) {
            // An error would mean that nobody listens, which ends the task.
            self.0.send(Hint { id: String::new() }).await.ok();
        }
    }
}

/// Ends with the connection.
async fn run(socket: &Socket, hints: &Hints) {
    let mut client = socket.runtime.clone();
    match client.get_container_events(cri::GetEventsRequest {}).await {
        Ok(events) => return cri_events(events.into_inner(), hints).await,
        Err(status) if no_such_service(status.code()) => {}
        Err(status) => {
            tracing::debug!(%status, "the container runtime ended its events");
            return;
        }
    }
    let mut client = events::events_client::EventsClient::new(socket.channel.clone())
        .max_decoding_message_size(ANSWER_BYTES_MAX);
    let request = events::SubscribeRequest { filters: vec![FILTER.to_owned()] };
    match client.subscribe(request).await {
        Ok(events) => return containerd_events(socket, events.into_inner(), hints).await,
        Err(status) if no_such_service(status.code()) => {}
        Err(status) => {
            tracing::debug!(%status, "containerd ended its events");
            return;
        }
    }
    silence(|| async { socket.version().await.is_ok() }).await;
}

/// containerd 1.6 does not know the call; CRI-O knows it and refuses where events are not switched on.
fn no_such_service(code: Code) -> bool {
    matches!(code, Code::Unimplemented | Code::FailedPrecondition | Code::Unknown)
}

async fn cri_events(mut events: Streaming<cri::ContainerEventResponse>, hints: &Hints) {
    while let Ok(Some(event)) = events.message().await {
        hints.give(event.container_id).await;
    }
}

async fn containerd_events(socket: &Socket, mut events: Streaming<events::Envelope>, hints: &Hints) {
    let mut settling = FuturesUnordered::new();
    loop {
        tokio::select! {
            envelope = events.message() => {
                let Ok(Some(envelope)) = envelope else { return };
                match subject(&envelope) {
                    Subject::None => {}
                    Subject::Ended(id) if settling.len() < SETTLING_MAX => {
                        settling.push(settled(socket, id));
                    }
                    Subject::Changed(id) | Subject::Ended(id) => hints.give(id).await,
                }
            }
            Some(id) = settling.next() => hints.give(id).await,
        }
    }
}

/// What an event of containerd is about.
#[derive(Debug, PartialEq, Eq)]
enum Subject {
    /// Not about a container: one of its other processes, or not understood.
    None,
    Changed(String),
    Ended(String),
}

fn subject(envelope: &events::Envelope) -> Subject {
    let value = envelope.event.as_ref().map_or(&[][..], |event| &event.value);
    if envelope.topic == "/tasks/exit" {
        return match events::TaskExit::decode(value) {
            Ok(exit) if exit.id == exit.container_id => Subject::Ended(exit.container_id),
            _ => Subject::None,
        };
    }
    match events::TaskEvent::decode(value) {
        Ok(event) => Subject::Changed(event.container_id),
        Err(_) => Subject::None,
    }
}

/// The id, once the runtime shows that what it names does not run, or after a second.
async fn settled(socket: &Socket, id: String) -> String {
    let mut pause = Duration::from_millis(2);
    while pause < Duration::from_millis(600) {
        if !shown_running(socket, &id).await {
            break;
        }
        sleep(pause).await;
        pause *= 2;
    }
    id
}

async fn shown_running(socket: &Socket, id: &str) -> bool {
    match socket.container_status(id).await {
        Ok(status) => status.state() == cri::ContainerState::ContainerRunning,
        // A sandbox is a container of containerd too.
        Err(RuntimeError::NotFound(_)) => matches!(
            socket.sandbox_status(id).await,
            Ok(status) if status.state() == cri::PodSandboxState::SandboxReady
        ),
        Err(_) => false,
    }
}

/// Says nothing for as long as the runtime answers.
async fn silence<F: Future<Output = bool>>(alive: impl Fn() -> F) {
    let mut beat = every(BEAT);
    loop {
        beat.tick().await;
        if !alive().await {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(topic: &str, value: Vec<u8>) -> events::Envelope {
        events::Envelope {
            namespace: "k8s.io".to_owned(),
            topic: topic.to_owned(),
            event: Some(events::Any { type_url: String::new(), value }),
        }
    }

    #[test]
    fn the_end_of_a_probe_is_not_the_end_of_its_container() {
        let exit = |id: &str| {
            let exit = events::TaskExit { container_id: "c".to_owned(), id: id.to_owned() };
            subject(&envelope("/tasks/exit", exit.encode_to_vec()))
        };
        assert_eq!(exit("c"), Subject::Ended("c".to_owned()));
        assert_eq!(exit("probe-1"), Subject::None);
    }

    #[test]
    fn events_that_are_not_understood_say_nothing() {
        assert_eq!(subject(&envelope("/tasks/exit", vec![0xff, 0xff])), Subject::None);
        assert_eq!(subject(&envelope("/tasks/oom", vec![0x0a, 0x7f])), Subject::None);
        let start = events::TaskEvent { container_id: "c".to_owned() };
        let mut more = start.encode_to_vec();
        more.extend([0x10, 42]);
        assert_eq!(
            subject(&envelope("/tasks/start", more)),
            Subject::Changed("c".to_owned()),
            "fields that are not read are skipped"
        );
    }

    #[tokio::test]
    async fn where_no_room_is_left_the_agent_is_told_to_look_everywhere() {
        let (sender, mut receiver) = mpsc::channel(1);
        let hints = Hints(sender);
        hints.give("a".to_owned()).await;
        let second = hints.give("b".to_owned());
        let reading = async {
            let first = receiver.recv().await.expect("a hint");
            (first.id, receiver.recv().await.expect("a hint").id)
        };
        let ((), read) = tokio::join!(second, reading);
        assert_eq!(read, ("a".to_owned(), String::new()));
    }
}
