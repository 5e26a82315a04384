//! The lanes of a link beside control, and the peer's Streams: a task for each that is open.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use codec::{Class, Record};
use tokio::{
    io::AsyncRead,
    task::{JoinError, JoinSet},
};

use super::{
    Broken, Link, Transport,
    reader::{self, ReadEnd, Turns},
    session::Shared,
    stream::{self, ByteStream, StreamCode},
    writer::{self, Queue},
};

/// What is open. Dropping it aborts all of it.
#[derive(Debug, Default)]
pub(super) struct Classes {
    tasks: JoinSet<Done>,
    lanes: [Option<Lane>; Class::ALL.len()],
    turns: Arc<Turns>,
    readers: usize,
    streams: usize,
    closing: bool,
}

#[derive(Debug)]
struct Lane {
    queue: Arc<Queue>,
    /// Its writer runs.
    open: bool,
}

/// How a task ended.
#[derive(Debug)]
pub(super) enum Done {
    Reader(Result<(), ReadEnd>),
    Writer(Class, Result<(), Broken>),
    Stream,
}

/// The next task that ends, while there are any.
pub(super) fn poll_next_done(
    classes: &mut Option<Box<Classes>>,
    cx: &mut Context<'_>,
) -> Poll<Result<Done, JoinError>> {
    match classes {
        Some(classes) => match classes.tasks.poll_join_next(cx) {
            Poll::Ready(Some(done)) => Poll::Ready(done),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        },
        None => Poll::Pending,
    }
}

impl Classes {
    /// Queues records of a class, and opens its lane if it has none.
    pub(super) fn send<T: Transport>(
        &mut self,
        class: Class,
        records: Vec<Record>,
        cost: usize,
        transport: &T,
        shared: &Arc<Shared>,
        idle: Duration,
    ) {
        let lane =
            self.lanes[class as usize].get_or_insert_with(|| Lane { queue: Arc::default(), open: false });
        lane.queue.push(records, cost);
        if !lane.open {
            self.open(class, transport, shared, idle);
        }
    }

    fn open<T: Transport>(&mut self, class: Class, transport: &T, shared: &Arc<Shared>, idle: Duration) {
        let Some(lane) = &mut self.lanes[class as usize] else { return };
        lane.open = true;
        let (queue, shared, transport) = (Arc::clone(&lane.queue), Arc::clone(shared), transport.clone());
        self.tasks.spawn(async move {
            let wrote = match transport.open(class).await {
                Ok(sender) => writer::write_lane(sender, class, queue, shared, idle).await,
                Err(Broken) => Err(Broken),
            };
            Done::Writer(class, wrote)
        });
    }

    /// Reads a lane that the peer has opened.
    pub(super) fn read<R: AsyncRead + Unpin + Send + 'static>(&mut self, lane: R, shared: &Arc<Shared>) {
        self.readers += 1;
        let (shared, turn) = (Arc::clone(shared), self.turns.enter());
        self.tasks.spawn(async move { Done::Reader(reader::read_class(lane, shared, turn).await) });
    }

    /// Serves a Stream that the peer has opened.
    pub(super) fn serve(&mut self, accepted: ByteStream, link: &Link) {
        if self.streams >= STREAMS_SERVED_MAX {
            return accepted.reset(StreamCode::BUSY);
        }
        self.streams += 1;
        let (peer, links, patience) = (link.peer.clone(), Arc::clone(&link.links), link.params.handshake);
        self.tasks.spawn(async move {
            stream::serve(accepted, peer, &links, patience).await;
            Done::Stream
        });
    }

    /// What is queued is still sent, nothing is added.
    pub(super) fn close(&mut self) {
        self.closing = true;
        self.lanes.iter().flatten().for_each(|lane| lane.queue.close());
    }

    pub(super) fn reader_ended(&mut self) {
        self.readers -= 1;
    }

    pub(super) fn stream_ended(&mut self) {
        self.streams -= 1;
    }

    pub(super) fn writer_ended<T: Transport>(
        &mut self,
        class: Class,
        wrote: Result<(), Broken>,
        transport: &T,
        shared: &Arc<Shared>,
        idle: Duration,
    ) {
        let Some(lane) = &mut self.lanes[class as usize] else { return };
        match wrote {
            // More was queued while it finished.
            Ok(()) if !lane.queue.is_empty() => self.open(class, transport, shared, idle),
            Ok(()) => self.lanes[class as usize] = None,
            // The lane stays "open": what its queue holds can no longer be sent in order. A lost connection
            // shows at the control lane; a peer that refuses one class fills the core's bound for it.
            Err(Broken) if self.closing => lane.open = false,
            Err(Broken) => {}
        }
    }

    /// A writer runs.
    pub(super) fn write(&self) -> bool {
        self.lanes.iter().flatten().any(|lane| lane.open)
    }

    /// A reader runs.
    pub(super) fn read_on(&self) -> bool {
        self.readers > 0
    }

    /// Nothing is open.
    pub(super) fn are_at_rest(&self) -> bool {
        self.tasks.is_empty() && self.lanes.iter().all(Option::is_none)
    }
}

/// Streams that the peer may have opening or echoing; transports permit no more either.
const STREAMS_SERVED_MAX: usize = 32;
