//! Prometheus text, version 0.0.4.

use std::fmt::{Display, Write};

/// The type of a family of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Buckets; see [`Text::histogram`].
    Histogram,
}

/// A page being written.
#[derive(Debug, Default)]
pub struct Text {
    page: String,
}

impl Text {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Begins a family. All of its samples follow before the next family begins.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// A sample of the family begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut shown = String::new();
        for (at, (label, text)) in labels.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            shown.push_str(comma);
            shown.push_str(label);
            shown.push_str("=\"");
            for c in text.chars() {
                match c {
                    '\\' => shown.push_str("\\\\"),
                    '"' => shown.push_str("\\\""),
                    '\n' => shown.push_str("\\n"),
                    c => shown.push(c),
                }
            }
            shown.push('"');
        }
        if shown.is_empty() {
            self.line(format_args!("{name} {value}"));
        } else {
            self.line(format_args!("{name}{{{shown}}} {value}"));
        }
    }

    /// The samples of a histogram: `buckets` are (upper bound, observations at or below it and above the
    /// bound before), `sum` is of all observations in the unit of the bounds. What is above the last
    /// bound stands in `beyond`.
    pub fn histogram(&mut self, name: &str, buckets: &[(f64, u64)], beyond: u64, sum: f64) {
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (bound, observed) in buckets {
            count += observed;
            self.sample(&bucket, &[("le", &bound.to_string())], count);
        }
        count += beyond;
        self.sample(&bucket, &[("le", "+Inf")], count);
        self.sample(&format!("{name}_sum"), &[], sum);
        self.sample(&format!("{name}_count"), &[], count);
    }

    pub(super) fn finish(self) -> String {
        self.page
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.page, "{line}").expect("a String takes everything");
    }
}

/// Microseconds in the unit of Prometheus.
#[allow(clippy::cast_precision_loss)] // exact for 285 years
pub(super) fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_of_a_histogram_are_cumulative() {
        let mut text = Text::new();
        text.histogram("octobus_flush_seconds", &[(0.001, 3), (0.01, 2)], 1, 0.5);
        assert_eq!(
            text.finish(),
            "octobus_flush_seconds_bucket{le=\"0.001\"} 3\noctobus_flush_seconds_bucket{le=\"0.01\"} 5\n\
             octobus_flush_seconds_bucket{le=\"+Inf\"} 6\noctobus_flush_seconds_sum 0.5\noctobus_flush_seconds_count 6\n"
        );
    }
}
