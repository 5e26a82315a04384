//! What the bytes in the egress cost the core's queue, so that it hears of them once they are written.

use std::collections::VecDeque;

use crate::limits;

/// Costs of outputs that are not written yet, and of those written and not yet reported.
#[derive(Debug, Default)]
pub(super) struct Costs {
    /// (how many bytes must have been written in all, cost)
    queued: VecDeque<(u64, usize)>,
    written: u64,
    unreported: usize,
}

impl Costs {
    /// An output of this cost ends where the egress ends now.
    pub(super) fn queued(&mut self, pending: usize, cost: usize) {
        let end = self.written + pending as u64;
        match self.queued.back_mut() {
            Some((last, costs)) if *last == end => *costs += cost,
            _ => self.queued.push_back((end, cost)),
        }
    }

    /// Returns the cost to report now, or 0.
    pub(super) fn written(&mut self, bytes: usize) -> usize {
        self.written += bytes as u64;
        while let Some(&(end, cost)) = self.queued.front()
            && end <= self.written
        {
            self.unreported += cost;
            self.queued.pop_front();
        }
        if self.unreported >= limits::SENT_REPORT_BYTES { std::mem::take(&mut self.unreported) } else { 0 }
    }
}
