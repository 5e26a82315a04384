//! One hub: the tier is its own broker.

use std::sync::Arc;

use broker::{
    Handle,
    event::{
        Command, Event, Front, Output, Publish, Reply, Response, SessionOpen, StateEntry, StateOp, Target,
    },
};
use bytes::Bytes;

use super::{Answer, Conflict, Entry, Fabric, FabricError, Owner};

/// The fabric of a hub that is alone.
#[derive(Debug, Clone)]
pub struct Local {
    broker: Handle,
}

impl Local {
    /// Of this broker.
    #[must_use]
    pub const fn new(broker: Handle) -> Self {
        Self { broker }
    }

    async fn read(&self, space: &str, key: &str) -> Result<Option<Entry>, FabricError> {
        let command =
            Command::StateGet { origin: Arc::from(""), space: Arc::from(space), key: key.to_owned() };
        match self.broker.call(command).await? {
            Response::Entry(found) => Ok(found.map(entry)),
            other => Err(unexpected(other)),
        }
    }

    /// A session of its own for each message: few are sent this way, and each waits for its acknowledgement.
    async fn publish_down(&self, node: &str, frame: Bytes) -> Result<(), FabricError> {
        let (session, mut outbox) = self.broker.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        let bytes = frame.len();
        let publish = Publish {
            target: Target::Node(node.into()),
            frame,
            qos: 1,
            packet_id: 1,
            dup: false,
            retain: false,
            reply: None,
        };
        self.broker.send(Event::SessionOpened(open), 0).await?;
        self.broker.send(Event::Published { session, messages: vec![publish] }, bytes).await?;
        let mut outputs = std::collections::VecDeque::new();
        let outcome = 'answered: loop {
            outbox.recv(&mut outputs).await;
            for output in outputs.drain(..) {
                match output {
                    Output::Reply(Reply::PubAck(_)) => break 'answered Ok(()),
                    Output::Reply(Reply::Refused { reason, .. }) => {
                        break 'answered Err(FabricError::Refused(reason.to_string()));
                    }
                    Output::Close(_) => break 'answered Err(FabricError::Stopped(broker::Stopped)),
                    _ => {}
                }
            }
        };
        self.broker.send(Event::SessionClosed { session, clean: true }, 0).await?;
        outcome
    }
}

impl Fabric for Local {
    fn get<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>> {
        Box::pin(self.read(space, key))
    }

    fn peek<'a>(&'a self, space: &'a str, key: &'a str) -> Answer<'a, Option<Entry>> {
        Box::pin(self.read(space, key))
    }

    fn list<'a>(
        &'a self,
        space: &'a str,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> Answer<'a, Vec<Entry>> {
        Box::pin(list_core(&self.broker, space, prefix, after, limit))
    }

    fn write(&self, ops: Vec<StateOp>) -> Answer<'_, Result<Vec<u64>, Conflict>> {
        Box::pin(async {
            match self.broker.call(Command::StateWrite(ops)).await? {
                Response::Written(revisions) => Ok(Ok(revisions)),
                Response::Conflict { index, found } => Ok(Err(Conflict { index, found })),
                other => Err(unexpected(other)),
            }
        })
    }

    fn barrier(&self) -> Answer<'_, u64> {
        Box::pin(async {
            match self.broker.call(Command::StateBarrier { space: Arc::from("fleet") }).await? {
                Response::Written(revisions) => Ok(revisions.first().copied().unwrap_or_default()),
                other => Err(unexpected(other)),
            }
        })
    }

    fn append_down<'a>(&'a self, node: &'a str, frame: Bytes) -> Answer<'a, ()> {
        Box::pin(self.publish_down(node, frame))
    }

    fn owner<'a>(&'a self, node: &'a str) -> Answer<'a, Owner> {
        Box::pin(async move {
            match self.broker.call(Command::Sessions).await? {
                Response::Sessions(sessions) => {
                    let linked = |session: &broker::event::SessionInfo| {
                        matches!(session.kind, "link" | "relayed")
                            && &*session.name == node
                            && session.established
                    };
                    Ok(if sessions.iter().any(linked) { Owner::Here } else { Owner::Nobody })
                }
                other => Err(unexpected(other)),
            }
        })
    }
}

/// Entries that a core holds.
pub(super) async fn list_core(
    broker: &Handle,
    space: &str,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<Entry>, FabricError> {
    let command = Command::StateList {
        origin: Arc::from(""),
        space: Arc::from(space),
        prefix: prefix.to_owned(),
        after: after.map(str::to_owned),
        limit,
        at: None,
    };
    match broker.call(command).await? {
        Response::Entries { entries, .. } => Ok(entries.into_iter().map(entry).collect()),
        other => Err(unexpected(other)),
    }
}

fn entry(found: StateEntry) -> Entry {
    Entry { value: found.value(), revision: found.revision, key: found.key }
}

fn unexpected(response: Response) -> FabricError {
    match response {
        Response::Refused(why) => FabricError::Refused(why),
        other => FabricError::Refused(format!("unexpected answer {other:?}")),
    }
}
