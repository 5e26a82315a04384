//! What the store wrote, as metrics.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use broker::store::lmdb::written::Written;

use super::{Collect, Kind, Text};

/// Metrics of the store of this process, to be [registered](super::Exporter::register) once.
#[must_use]
pub fn store(written: Arc<Written>) -> Collect {
    Arc::new(move |text: &mut Text| {
        let name = "octobus_store_written_bytes_total";
        text.family(name, Kind::Counter, "Bytes written to the store's files, by cause.");
        let causes = [
            ("journal", &written.journal),
            ("checkpoint", &written.checkpoint),
            ("compaction", &written.compaction),
        ];
        for (cause, bytes) in causes {
            text.sample(name, &[("cause", cause)], bytes.load(Relaxed));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_there_before_anything_was_written() {
        let written = Arc::new(Written::default());
        written.compaction.store(7, Relaxed);
        let mut text = Text::new();
        store(written)(&mut text);
        let page = text.finish();
        assert!(page.contains("octobus_store_written_bytes_total{cause=\"journal\"} 0"), "{page}");
        assert!(page.contains("octobus_store_written_bytes_total{cause=\"compaction\"} 7"), "{page}");
    }
}
