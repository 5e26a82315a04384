//! A session of this process at its own broker, closed when it is done.

use std::{collections::VecDeque, sync::Arc};

use broker::{
    Handle, Outbox, Stopped,
    event::{Event, Front, Output, SessionId, SessionOpen},
};

/// An open session. End it with [`close`](Self::close).
#[derive(Debug)]
pub(super) struct ClientSession {
    broker: Handle,
    outbox: Outbox,
}

impl ClientSession {
    pub(super) async fn open(broker: &Handle) -> Result<Self, Stopped> {
        let (session, outbox) = broker.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: Arc::from(""),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        broker.send(Event::SessionOpened(open), 0).await?;
        Ok(Self { broker: broker.clone(), outbox })
    }

    pub(super) fn id(&self) -> SessionId {
        self.outbox.session()
    }

    /// Sends an event of this session with `bytes` of payload.
    pub(super) async fn send(&self, event: Event, bytes: usize) -> Result<(), Stopped> {
        self.broker.send(event, bytes).await
    }

    /// Waits for outputs. They count as queued until [`done`](Self::done) says otherwise. Cancel safe.
    pub(super) async fn recv(&mut self, into: &mut VecDeque<Output>) {
        self.outbox.recv(into).await;
    }

    /// Says that outputs of this cost are out of the way.
    pub(super) async fn done(&self, bytes: usize) -> Result<(), Stopped> {
        self.broker.send(Event::Sent { session: self.id(), bytes }, 0).await
    }

    pub(super) async fn close(self) {
        let closed = Event::SessionClosed { session: self.id(), clean: true };
        if self.broker.send(closed, 0).await.is_err() {
            tracing::debug!("the broker stopped before a session of the admin socket was closed");
        }
    }
}
