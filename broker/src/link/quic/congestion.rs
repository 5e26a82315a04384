//! Congestion control of QUIC links: Cubic for loss, and [`DelayBound`] for the queue that Cubic would keep.

use std::{any::Any, sync::Arc, time::Instant};

use quinn_proto::{
    RttEstimator,
    congestion::{Controller, ControllerFactory, CubicConfig},
};

use super::super::delay::DelayBound;

/// Makes the controller of each connection.
#[derive(Debug, Default)]
pub(super) struct CubicWithinDelay(Arc<CubicConfig>);

impl ControllerFactory for CubicWithinDelay {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = Arc::clone(&self.0).build(now, current_mtu);
        Box::new(Bounded { cubic, delay: DelayBound::new(now.into()) })
    }
}

struct Bounded {
    cubic: Box<dyn Controller>,
    delay: DelayBound,
}

impl Controller for Bounded {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        // Below our bound Cubic sees a window that is not used; only when it is the smaller may it grow.
        let ours = self.delay.bytes() < self.cubic.window();
        self.cubic.on_ack(now, sent, bytes, app_limited || ours, rtt);
        let took = now.saturating_duration_since(sent);
        self.delay.on_ack(now.into(), took, bytes, !app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window().min(self.delay.bytes())
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self { cubic: self.cubic.clone_box(), delay: self.delay.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
