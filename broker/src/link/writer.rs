//! The sending side of a link: one queue and one writer per class. Control's are part of the link's own task
//! ([`control`](super::control)).
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

/// What waits for a lane.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Heartbeats, in front of everything.
    pulses: VecDeque<Record>,
    /// With each output's last record, its cost.
    records: VecDeque<(Record, usize)>,
    closing: bool,
}

/// What a writer found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Records for one batch; outputs of this cost end in it.
    Batch(usize),
    /// Nothing now.
    Nothing,
    /// Nothing, and nothing will follow.
    End,
}

impl Waiting {
    pub(super) fn push(&mut self, records: Vec<Record>, cost: usize) {
        let last = records.len().saturating_sub(1);
        let costs = (0..).map(|at| if at == last { cost } else { 0 });
        self.records.extend(records.into_iter().zip(costs));
    }

    /// A heartbeat or an answer to one, in front of everything. The core does not count these, so a peer that
    /// asks and does not read gets no more than a few: further ones are dropped.
    pub(super) fn push_pulse(&mut self, record: Record) {
        if self.pulses.len() < PULSES_UNWRITTEN_MAX {
            self.pulses.push_back(record);
        }
    }

    /// What waits is still sent, nothing is added.
    pub(super) fn close(&mut self) {
        self.closing = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty() && self.pulses.is_empty()
    }

    pub(super) fn take(&mut self, batch: &mut Vec<Record>) -> Found {
        let (mut raw_len, mut cost) = (0, 0);
        for pulse in self.pulses.drain(..) {
            raw_len += pulse.wire_len();
            batch.push(pulse);
        }
        while let Some((record, _)) = self.records.front()
            && batch.len() < usize::from(u16::MAX)
            && fits(raw_len, record.wire_len())
        {
            let (record, record_cost) = self.records.pop_front().expect("just seen");
            raw_len += record.wire_len();
            cost += record_cost;
            batch.push(record);
        }
        if self.is_empty() {
            // A burst must not leave its high-water mark with an idle link.
            self.records.shrink_to(0);
            self.pulses.shrink_to(0);
        }
        match batch.is_empty() {
            false => Found::Batch(cost),
            true if self.closing => Found::End,
            true => Found::Nothing,
        }
    }
}

impl Queue {
    pub(super) fn push(&self, records: Vec<Record>, cost: usize) {
        self.state().push(records, cost);
        self.ready.notify_one();
    }

    /// What waits is still sent, nothing is added.
    pub(super) fn close(&self) {
        self.state().close();
        self.ready.notify_one();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().is_empty()
    }

    fn take(&self, batch: &mut Vec<Record>) -> Found {
        self.state().take(batch)
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().expect("no panic under this lock")
    }
}

/// Writes a queue to a lane until the queue is closed or was empty for as long as `idle`; then finishes the
/// lane. Records that come while it finishes stay in the queue for the next lane.
pub(super) async fn write_lane<S: LaneSender>(
    mut lane: S,
    class: Class,
    queue: Arc<Queue>,
    shared: Arc<Shared>,
    idle: Duration,
) -> Result<(), Broken> {
    let mut batch = Vec::new();
    let mut unreported = 0;
    loop {
        match queue.take(&mut batch) {
            Found::Batch(cost) => {
                if let Some(encoded) = encode(&batch, class, &shared) {
                    lane.write(encoded.into_buffers()).await?;
                    shared.note_sent();
                }
                batch = Vec::new();
                unreported += cost;
                if unreported >= limits::SENT_REPORT_BYTES || queue.is_empty() {
                    report(&mut unreported, &shared).await?;
                }
            }
            Found::Nothing => {
                let woken = tokio::time::timeout(idle, queue.ready.notified()).await;
                if woken.is_err() && queue.is_empty() {
                    break;
                }
            }
            Found::End => break,
        }
    }
    lane.finish().await
}

/// Tells the core what the transport has taken.
pub(super) async fn report(unreported: &mut usize, shared: &Shared) -> Result<(), Broken> {
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

/// Encodes and counts. `None` for records that cannot travel: a mistake of this process, not of the peer.
pub(super) fn encode(batch: &[Record], class: Class, shared: &Shared) -> Option<Encoded> {
    match ENCODER.with_borrow_mut(|encoder| encoder.encode(batch)) {
        Ok(encoded) => {
            let (raw, wire) = (encoded.raw_len(), encoded.wire_len());
            shared.counters.sent[class as usize].count(batch.len(), raw, wire);
            Some(encoded)
        }
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
        let mut queue = Waiting::default();
        queue.push(vec![control_record(Message::Ack(Default::default()))], 7);
        (0..1000).for_each(|nonce| queue.push_pulse(pulse(nonce)));
        let mut batch = Vec::new();
        assert_eq!(queue.take(&mut batch), Found::Batch(7));
        assert_eq!(batch.len(), PULSES_UNWRITTEN_MAX + 1);
        assert_eq!(batch[0], pulse(0));
        assert!(queue.is_empty());
    }
}
