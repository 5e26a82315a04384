//! The sending side of a link: one queue and one writer per class.
//!
//! A batch is what is waiting when the writer comes by; nothing sleeps to make it larger. The transport's
//! stream priorities order the classes on the wire.

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use codec::{
    Class, Record,
    batch::{Encoded, Encoder, fits},
};
use tokio::sync::Notify;

use super::{Broken, LaneSender, session::Shared};
use crate::{core::event::Event, limits};

/// Heartbeats that wait for their writer.
const PULSES_UNWRITTEN_MAX: usize = 8;

/// Records of one class on their way to the transport. Its bytes are part of what the core counts for the
/// session until they are reported as sent.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Heartbeats, in front of everything.
    pulses: VecDeque<Record>,
    /// With each output's last record, its cost.
    records: VecDeque<(Record, usize)>,
    closing: bool,
}

/// What a writer found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// Records for one batch; outputs of this cost end in it.
    Batch(usize),
    Nothing,
    /// Nothing, and nothing will follow.
    End,
}

impl Queue {
    pub(super) fn push(&self, records: Vec<Record>, cost: usize) {
        let last = records.len().saturating_sub(1);
        let costs = (0..).map(|at| if at == last { cost } else { 0 });
        self.state().records.extend(records.into_iter().zip(costs));
        self.ready.notify_one();
    }

    /// A heartbeat or an answer to one, in front of everything. The core does not count these, so a peer that
    /// asks and does not read gets no more than a few: further ones are dropped.
    pub(super) fn push_pulse(&self, record: Record) {
        let mut state = self.state();
        if state.pulses.len() < PULSES_UNWRITTEN_MAX {
            state.pulses.push_back(record);
            self.ready.notify_one();
        }
    }

    /// What waits is still sent, nothing is added.
    pub(super) fn close(&self) {
        self.state().closing = true;
        self.ready.notify_one();
    }

    pub(super) fn is_empty(&self) -> bool {
        let state = self.state();
        state.records.is_empty() && state.pulses.is_empty()
    }

    fn take(&self, batch: &mut Vec<Record>) -> Found {
        let mut state = self.state();
        let (mut raw_len, mut cost) = (0, 0);
        for pulse in state.pulses.drain(..) {
            raw_len += pulse.wire_len();
            batch.push(pulse);
        }
        while let Some((record, _)) = state.records.front()
            && batch.len() < usize::from(u16::MAX)
            && fits(raw_len, record.wire_len())
        {
            let (record, record_cost) = state.records.pop_front().expect("just seen");
            raw_len += record.wire_len();
            cost += record_cost;
            batch.push(record);
        }
        match batch.is_empty() {
            false => Found::Batch(cost),
            true if state.closing => Found::End,
            true => {
                // A burst must not leave its high-water mark with an idle link.
                state.records.shrink_to(0);
                Found::Nothing
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().expect("no panic under this lock")
    }
}

/// Writes a queue to a lane until the queue is closed or, with `idle`, was empty for that long; then finishes
/// the lane. Records that come while it finishes stay in the queue for the next lane.
pub(super) async fn write_lane<S: LaneSender>(
    mut lane: S,
    class: Class,
    queue: Arc<Queue>,
    shared: Arc<Shared>,
    idle: Option<Duration>,
) -> Result<(), Broken> {
    let mut batch = Vec::new();
    let mut unreported = 0;
    loop {
        match queue.take(&mut batch) {
            Found::Batch(cost) => {
                if let Some(encoded) = encode(&batch, class) {
                    shared.counters.sent[class as usize].count(
                        batch.len(),
                        encoded.raw_len(),
                        encoded.wire_len(),
                    );
                    lane.write(encoded.into_buffers()).await?;
                    shared.note_sent();
                }
                batch = Vec::new();
                unreported += cost;
                if unreported >= limits::SENT_REPORT_BYTES || queue.is_empty() {
                    report(&mut unreported, &shared).await?;
                }
            }
            Found::Nothing => match idle {
                None => queue.ready.notified().await,
                Some(idle) => {
                    let woken = tokio::time::timeout(idle, queue.ready.notified()).await;
                    if woken.is_err() && queue.is_empty() {
                        break;
                    }
                }
            },
            Found::End => break,
        }
    }
    lane.finish().await
}

async fn report(unreported: &mut usize, shared: &Shared) -> Result<(), Broken> {
    let bytes = std::mem::take(unreported);
    if bytes == 0 {
        return Ok(());
    }
    let event = Event::Sent { session: shared.session, bytes };
    shared.broker.send(event, 0).await.map_err(|_stopped| Broken)
}

thread_local! {
    // Its scratch is 150 KiB: one per thread serves every link of it, as encoding never waits.
    static ENCODER: RefCell<Encoder> = RefCell::new(Encoder::new());
}

/// `None` for records that cannot travel: a mistake of this process, not of the peer.
fn encode(batch: &[Record], class: Class) -> Option<Encoded> {
    match ENCODER.with_borrow_mut(|encoder| encoder.encode(batch)) {
        Ok(encoded) => Some(encoded),
        Err(error) => {
            tracing::error!(%error, class = class.as_str(), records = batch.len(), "records dropped: no batch");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use codec::proto::{Heartbeat, control::Message};

    use super::*;
    use crate::link::control_record;

    fn pulse(nonce: u64) -> Record {
        control_record(Message::HeartbeatAck(Heartbeat { nonce, time_us: 0 }))
    }

    #[test]
    fn a_peer_that_asks_and_never_reads_gets_few_answers_and_they_go_first() {
        let queue = Queue::default();
        queue.push(vec![control_record(Message::Ack(Default::default()))], 7);
        (0..1000).for_each(|nonce| queue.push_pulse(pulse(nonce)));
        let mut batch = Vec::new();
        assert_eq!(queue.take(&mut batch), Found::Batch(7));
        assert_eq!(batch.len(), PULSES_UNWRITTEN_MAX + 1);
        assert_eq!(batch[0], pulse(0));
        assert!(queue.is_empty());
    }
}
