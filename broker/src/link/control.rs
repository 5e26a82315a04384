//! The control lane of a link, both directions, as part of the link's own task.
//!
//! At rest it is the two ends of the lane and nothing else: the state of a batch that is being read, handed to
//! the core or written is made when the batch comes and goes with it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use codec::{Class, Record};

use super::{
    Broken, LaneSender, Transport,
    reader::{self, Begun, Control, ReadEnd},
    session::{Pulsed, Shared},
    writer::{self, Found, Waiting},
};
use crate::limits;

/// Both directions.
pub(super) struct ControlLane<T: Transport> {
    reading: Reading<T::Receiver>,
    writing: Writing<T::Sender>,
    queue: Waiting,
    /// Cost that the core was not yet told is sent.
    unreported: usize,
}

type Work<R> = Pin<Box<dyn Future<Output = R> + Send>>;

enum Reading<R> {
    /// Waits for a batch to begin.
    Idle(R),
    Batch(Work<(R, Result<Control, ReadEnd>)>),
    /// The core gets what the batch held.
    Handing(Work<(R, Result<(), ReadEnd>)>),
    Ended,
}

enum Writing<S> {
    /// Waits for something to send.
    Idle(S),
    Batch(Work<Result<S, Broken>>),
    /// The core is told what was sent.
    Reporting(Work<Result<S, Broken>>),
    Finishing(Work<Result<(), Broken>>),
    /// Finished, or the peer takes no more.
    Ended,
}

/// What the lane has for its link.
#[derive(Debug)]
pub(super) enum News {
    /// Heartbeats that came.
    Pulses(Vec<Pulsed>),
    /// The peer has finished, or something is wrong.
    ReadEnded(Result<(), ReadEnd>),
}

impl<T: Transport> ControlLane<T> {
    pub(super) fn new((sender, receiver): (T::Sender, T::Receiver)) -> Self {
        Self {
            reading: Reading::Idle(receiver),
            writing: Writing::Idle(sender),
            queue: Waiting::default(),
            unreported: 0,
        }
    }

    pub(super) fn push(&mut self, records: Vec<Record>, cost: usize) {
        self.queue.push(records, cost);
    }

    pub(super) fn push_pulse(&mut self, record: Record) {
        self.queue.push_pulse(record);
    }

    /// What waits is still sent, then the lane is finished.
    pub(super) fn close(&mut self) {
        self.queue.close();
    }

    pub(super) fn has_written(&self) -> bool {
        matches!(self.writing, Writing::Ended)
    }

    /// Goes on in both directions. Cancel safe.
    pub(super) fn poll(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<News> {
        self.poll_write(shared, cx);
        self.poll_read(shared, cx)
    }

    fn poll_write(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) {
        loop {
            self.writing = match std::mem::replace(&mut self.writing, Writing::Ended) {
                Writing::Idle(sender) => match self.begin(sender, shared) {
                    Writing::Idle(sender) => {
                        self.writing = Writing::Idle(sender);
                        return;
                    }
                    begun => begun,
                },
                Writing::Batch(mut work) => match work.as_mut().poll(cx) {
                    Poll::Ready(Ok(sender)) => self.after_batch(sender, shared),
                    Poll::Ready(Err(Broken)) => Writing::Ended,
                    Poll::Pending => {
                        self.writing = Writing::Batch(work);
                        return;
                    }
                },
                Writing::Reporting(mut work) => match work.as_mut().poll(cx) {
                    Poll::Ready(Ok(sender)) => Writing::Idle(sender),
                    Poll::Ready(Err(Broken)) => Writing::Ended,
                    Poll::Pending => {
                        self.writing = Writing::Reporting(work);
                        return;
                    }
                },
                Writing::Finishing(mut work) => match work.as_mut().poll(cx) {
                    // How it went shows at the reading side.
                    Poll::Ready(_finished) => Writing::Ended,
                    Poll::Pending => {
                        self.writing = Writing::Finishing(work);
                        return;
                    }
                },
                Writing::Ended => return,
            };
        }
    }

    /// Begins what is to be written, if anything is.
    fn begin(&mut self, mut sender: T::Sender, shared: &Arc<Shared>) -> Writing<T::Sender> {
        let mut batch = Vec::new();
        match self.queue.take(&mut batch) {
            Found::Nothing => Writing::Idle(sender),
            Found::End => Writing::Finishing(Box::pin(sender.finish())),
            Found::Batch(cost) => {
                self.unreported += cost;
                let Some(encoded) = writer::encode(&batch, Class::Control, shared) else {
                    return self.after_batch(sender, shared);
                };
                let shared = Arc::clone(shared);
                Writing::Batch(Box::pin(async move {
                    sender.write(encoded.into_buffers()).await?;
                    shared.note_sent();
                    Ok(sender)
                }))
            }
        }
    }

    fn after_batch(&mut self, sender: T::Sender, shared: &Arc<Shared>) -> Writing<T::Sender> {
        let enough = self.unreported >= limits::SENT_REPORT_BYTES || self.queue.is_empty();
        if self.unreported == 0 || !enough {
            return Writing::Idle(sender);
        }
        let (mut unreported, shared) = (std::mem::take(&mut self.unreported), Arc::clone(shared));
        Writing::Reporting(Box::pin(async move {
            writer::report(&mut unreported, &shared).await?;
            Ok(sender)
        }))
    }

    fn poll_read(&mut self, shared: &Arc<Shared>, cx: &mut Context<'_>) -> Poll<News> {
        loop {
            match &mut self.reading {
                Reading::Idle(lane) => match ready!(Begun::poll(lane, cx)) {
                    Ok(Some(begun)) => {
                        let Reading::Idle(mut lane) = std::mem::replace(&mut self.reading, Reading::Ended)
                        else {
                            unreachable!("just seen");
                        };
                        let shared = Arc::clone(shared);
                        self.reading = Reading::Batch(Box::pin(async move {
                            let read = reader::read_control(&mut lane, begun, &shared).await;
                            (lane, read)
                        }));
                    }
                    Ok(None) => return self.end(Ok(())),
                    Err(end) => return self.end(Err(end)),
                },
                Reading::Batch(work) => match ready!(work.as_mut().poll(cx)) {
                    (lane, Ok(control)) => {
                        self.reading = self.hand(lane, control.records, control.bytes, shared);
                        if !control.pulses.is_empty() {
                            return Poll::Ready(News::Pulses(control.pulses));
                        }
                    }
                    (_lane, Err(end)) => return self.end(Err(end)),
                },
                Reading::Handing(work) => {
                    let (lane, handed) = ready!(work.as_mut().poll(cx));
                    shared.handing.store(false, Relaxed);
                    shared.note_received();
                    match handed {
                        Ok(()) => self.reading = Reading::Idle(lane),
                        Err(end) => return self.end(Err(end)),
                    }
                }
                Reading::Ended => return Poll::Pending,
            }
        }
    }

    fn hand(
        &self,
        lane: T::Receiver,
        records: Vec<Record>,
        bytes: usize,
        shared: &Arc<Shared>,
    ) -> Reading<T::Receiver> {
        if records.is_empty() {
            return Reading::Idle(lane);
        }
        shared.handing.store(true, Relaxed);
        let shared = Arc::clone(shared);
        Reading::Handing(Box::pin(async move {
            let handed = reader::hand(records, bytes, &shared).await;
            (lane, handed)
        }))
    }

    fn end(&mut self, how: Result<(), ReadEnd>) -> Poll<News> {
        self.reading = Reading::Ended;
        Poll::Ready(News::ReadEnded(how))
    }
}

impl<T: Transport> fmt::Debug for ControlLane<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlLane").field("queue", &self.queue).finish_non_exhaustive()
    }
}
