//! What simulated devices publish at their nodes: durable messages, spread evenly over nodes and time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use broker::{
    Handle, Stopped, clock,
    event::{Event, Front, Publish, SessionId, SessionOpen, Target},
};
use tokio::time::Instant;

use crate::{
    crew::Crew,
    mark::{ACK, Mark, UP},
};

/// How often it is asked what is due.
const TURN: Duration = Duration::from_millis(5);

/// A device of each node.
#[derive(Debug)]
pub struct Devices {
    sessions: Vec<Option<SessionId>>,
    published: Vec<AtomicU32>,
    /// Whose turn it is, and when.
    turn: usize,
    due: Option<Instant>,
}

impl Devices {
    /// One for each node; none has connected.
    #[must_use]
    pub fn new(nodes: u32) -> Self {
        Self {
            sessions: vec![None; nodes as usize],
            published: (0..nodes).map(|_node| AtomicU32::new(0)).collect(),
            turn: 0,
            due: None,
        }
    }

    /// How much each has published.
    #[must_use]
    pub fn published(&self) -> Vec<u32> {
        self.published.iter().map(|count| count.load(Relaxed)).collect()
    }

    /// Publishes `per_s` messages of each node in a second, until dropped. Cancel safe: what was counted as
    /// published was, and the next call goes on where this one was.
    ///
    /// # Errors
    /// The nodes' driver has stopped.
    pub async fn publish(&mut self, crew: &Crew, per_s: f64, size: u32) -> Result<(), Stopped> {
        let nodes = self.sessions.len();
        let each = Duration::from_secs_f64(1.0 / (per_s * nodes as f64));
        let mut turns = clock::every(TURN);
        loop {
            turns.tick().await;
            while let due = *self.due.get_or_insert_with(Instant::now)
                && due <= Instant::now()
            {
                self.publish_one(crew, self.turn % nodes, size).await?;
                (self.due, self.turn) = (Some(due + each), self.turn + 1);
            }
        }
    }

    async fn publish_one(&mut self, crew: &Crew, place: usize, size: u32) -> Result<(), Stopped> {
        let number = u32::try_from(place).expect("a node's place");
        let broker = crew.fleet.member(number);
        let session = self.session(&broker, place).await?;
        let count = &self.published[place];
        let mark = Mark::now(crew.plan.run, crew.plan.first + number, count.load(Relaxed));
        let frame = mark.frame(UP, size as usize);
        let bytes = frame.len();
        broker.send(published(session, frame, 1), bytes).await?;
        count.fetch_add(1, Relaxed);
        crew.tally.published.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Says at the hub that a message of its has arrived at the node.
    ///
    /// # Errors
    /// The nodes' driver has stopped.
    pub async fn answer(&mut self, crew: &Arc<Crew>, mark: Mark) -> Result<(), Stopped> {
        let place = mark.node.saturating_sub(crew.plan.first);
        let broker = crew.fleet.member(place);
        let session = self.session(&broker, place as usize).await?;
        let frame = mark.frame(ACK, 0);
        let bytes = frame.len();
        broker.send(published(session, frame, 0), bytes).await
    }

    async fn session(&mut self, broker: &Handle, place: usize) -> Result<SessionId, Stopped> {
        if let Some(session) = self.sessions[place] {
            return Ok(session);
        }
        // Nobody reads its outbox: it asks for nothing.
        let (session, _outbox) = broker.open_session();
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
        self.sessions[place] = Some(session);
        Ok(session)
    }
}

fn published(session: SessionId, frame: bytes::Bytes, qos: u8) -> Event {
    let message =
        Publish { target: Target::Own, frame, qos, packet_id: 0, dup: false, retain: false, reply: None };
    Event::Published { session, messages: vec![message] }
}
