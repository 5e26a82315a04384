//! What links count, as metrics.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use broker::link::{Counters, counters::Traffic};
use codec::Class;

use super::{Collect, Kind, Text};

/// Metrics of all links of this process, to be [registered](super::Exporter::register) once.
#[must_use]
pub fn links(counters: Arc<Counters>) -> Collect {
    Arc::new(move |text| write(&counters, text))
}

fn write(counters: &Counters, text: &mut Text) {
    let name = "octobus_links";
    text.family(name, Kind::Gauge, "Links that are up.");
    text.sample(name, &[], counters.up.load(Relaxed));
    // A link that ended is dialled again: by how they ended is why.
    let name = "octobus_link_reconnects_total";
    text.family(name, Kind::Counter, "Links that ended and had to be made again, by reason of the end.");
    for (reason, count) in counters.ended() {
        text.sample(name, &[("reason", reason)], count);
    }
    let name = "octobus_link_handshakes_failed_total";
    text.family(name, Kind::Counter, "Handshakes that failed, were refused or took too long.");
    text.sample(name, &[], counters.handshakes_failed.load(Relaxed));
    let name = "octobus_link_bytes_total";
    text.family(name, Kind::Counter, "Bytes of batches as they travelled, by class and direction.");
    by_class(counters, text, name, |traffic| &traffic.wire_bytes);
    let name = "octobus_link_records_total";
    text.family(name, Kind::Counter, "Records over links, by class and direction.");
    by_class(counters, text, name, |traffic| &traffic.records);
    let name = "octobus_link_batches_total";
    text.family(name, Kind::Counter, "Batches over links, by class and direction.");
    by_class(counters, text, name, |traffic| &traffic.batches);
    let name = "octobus_link_raw_bytes_total";
    text.family(name, Kind::Counter, "Bytes of records over links before compression.");
    by_class(counters, text, name, |traffic| &traffic.raw_bytes);
    let name = "octobus_link_rtt_seconds";
    text.family(name, Kind::Gauge, "Last round trip that a heartbeat measured.");
    text.sample(name, &[], super::text::seconds(counters.rtt_us.load(Relaxed)));
    let name = "octobus_link_clock_offset_seconds";
    text.family(name, Kind::Gauge, "Peer's wall clock minus this one's at the last heartbeat.");
    let offset = counters.clock_offset_us.load(Relaxed);
    let seconds = super::text::seconds(offset.unsigned_abs());
    text.sample(name, &[], if offset < 0 { -seconds } else { seconds });
}

fn by_class(counters: &Counters, text: &mut Text, name: &str, field: fn(&Traffic) -> &AtomicU64) {
    for (at, class) in Class::ALL.iter().enumerate() {
        let directions = [("in", &counters.received[at]), ("out", &counters.sent[at])];
        for (direction, traffic) in directions {
            let labels = [("class", class.as_str()), ("direction", direction)];
            text.sample(name, &labels, field(traffic).load(Relaxed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_there_before_anything_happened() {
        let mut text = Text::new();
        links(Arc::default())(&mut text);
        let page = text.finish();
        for name in
            ["octobus_links 0", "# TYPE octobus_link_reconnects_total counter", "octobus_link_rtt_seconds 0"]
        {
            assert!(page.contains(name), "{name} is not in\n{page}");
        }
        assert!(page.contains("octobus_link_bytes_total{class=\"control\",direction=\"out\"} 0"));
    }

    #[test]
    fn a_clock_behind_ours_is_a_negative_offset() {
        let counters = Arc::new(Counters::default());
        counters.clock_offset_us.store(-1_500_000, Relaxed);
        let mut text = Text::new();
        links(counters)(&mut text);
        assert!(text.finish().contains("octobus_link_clock_offset_seconds -1.5\n"));
    }
}
