//! The core's statistics as metrics.

use broker::core::{DropReason, Latencies, Stats};

use super::{Kind, Text, text::seconds};

pub(super) fn write(stats: &Stats, text: &mut Text) {
    clients(stats, text);
    logs(stats, text);
    links(stats, text);
    by_reason(
        text,
        "octobus_drops_total",
        "Messages that policy dropped, by reason.",
        stats.drops.iter().map(|(reason, count)| (drop_reason(*reason), *count)),
    );
    by_reason(
        text,
        "octobus_gaps_total",
        "Records that gaps stand for, by reason.",
        stats.gaps.iter().map(|(reason, count)| (*reason, *count)),
    );
    drained(stats, text);
    budgets(stats, text);
    flush(&stats.flush, text);
    gauge(text, "octobus_queue_bytes", "Bytes queued for clients and links.", stats.queue_bytes);
}

/// What was sent above and what budgets say to it. Nothing of it on a hub.
fn budgets(stats: &Stats, text: &mut Text) {
    if !stats.spent_today.is_empty() {
        let name = "octobus_link_spent_bytes";
        text.family(name, Kind::Gauge, "Bytes of records sent above today (UTC), before compression.");
        for ((receiver, class), bytes) in &stats.spent_today {
            let to = if receiver.is_empty() { "hub" } else { receiver };
            text.sample(name, &[("to", to), ("class", class.as_str())], *bytes);
        }
    }
    if stats.budgets.is_empty() {
        return;
    }
    let name = "octobus_budget_spent_bytes";
    text.family(name, Kind::Gauge, "Bytes that a budget's records took today and in this month (UTC).");
    for budget in &stats.budgets {
        text.sample(name, &[("budget", &budget.name), ("of", "day")], budget.day);
        text.sample(name, &[("budget", &budget.name), ("of", "month")], budget.month);
    }
    let name = "octobus_budget_cap_bytes";
    text.family(name, Kind::Gauge, "Bytes that a budget permits in a day and a month.");
    for budget in &stats.budgets {
        for (of, cap) in [("day", budget.per_day), ("month", budget.per_month)] {
            if let Some(cap) = cap {
                text.sample(name, &[("budget", &budget.name), ("of", of)], cap);
            }
        }
    }
    let name = "octobus_budget_holds";
    text.family(name, Kind::Gauge, "1 while something waits for a budget, by why.");
    for budget in &stats.budgets {
        let by = budget.held.map_or("nothing", broker::core::HeldBy::as_str);
        text.sample(name, &[("budget", &budget.name), ("by", by)], u8::from(budget.held.is_some()));
    }
}

fn flush(flush: &Latencies, text: &mut Text) {
    let name = "octobus_flush_seconds";
    text.family(name, Kind::Histogram, "From handing a group to the store until it is durable.");
    let bounds = Latencies::BOUNDS_US.iter().map(|bound| seconds(*bound));
    let buckets: Vec<(f64, u64)> = bounds.zip(flush.within).collect();
    text.histogram(name, &buckets, flush.beyond, seconds(flush.sum_us));
}

fn clients(stats: &Stats, text: &mut Text) {
    let name = "octobus_sessions";
    text.family(
        name,
        Kind::Gauge,
        "Sessions: connected clients, those kept for clients that are away, links.",
    );
    text.sample(name, &[("kind", "client"), ("connected", "true")], stats.clients);
    text.sample(name, &[("kind", "client"), ("connected", "false")], stats.clients_away);
    text.sample(name, &[("kind", "link"), ("connected", "true")], stats.links);
    gauge(text, "octobus_subscriptions", "Subscriptions of clients.", stats.subscriptions);
    let name = "octobus_published_total";
    text.family(name, Kind::Counter, "Messages that clients published, by QoS.");
    for (qos, count) in ["0", "1", "2"].iter().zip(stats.published) {
        text.sample(name, &[("qos", qos)], count);
    }
    counter(text, "octobus_published_bytes_total", "Bytes of their frames.", stats.published_bytes);
    counter(text, "octobus_delivered_total", "Deliveries to clients.", stats.delivered);
    counter(
        text,
        "octobus_slow_consumers_total",
        "Clients closed because they did not read.",
        stats.slow_consumers,
    );
}

fn logs(stats: &Stats, text: &mut Text) {
    gauge(text, "octobus_logs", "Logs kept.", stats.logs);
    gauge(text, "octobus_log_bytes", "Bytes of records kept in Logs.", stats.log_bytes);
    gauge(
        text,
        "octobus_log_unacknowledged_records",
        "Records of exported Logs that no hub has acknowledged.",
        stats.log_unacknowledged,
    );
    let name = "octobus_log_seconds_to_full";
    text.family(
        name,
        Kind::Gauge,
        "Until a stream must refuse, thin or drop what has not arrived, at the rate it fills now.",
    );
    for (stream, seconds) in &stats.seconds_to_full {
        text.sample(name, &[("stream", stream)], seconds);
    }
    let age_us = match stats.oldest_unacknowledged_us {
        0 => 0,
        since => broker::clock::wall_us().saturating_sub(since),
    };
    let name = "octobus_queue_oldest_seconds";
    text.family(
        name,
        Kind::Gauge,
        "Age of the oldest record that no hub has acknowledged; 0 if there is none.",
    );
    text.sample(name, &[], seconds(age_us));
    counter(text, "octobus_journal_groups_total", "Groups handed to the journal.", stats.groups);
}

fn links(stats: &Stats, text: &mut Text) {
    counter(
        text,
        "octobus_link_duplicates_total",
        "Records received over links that were held already; they had no effect.",
        stats.link_duplicates_in,
    );
    by_reason(
        text,
        "octobus_link_refusals_total",
        "Links refused or closed by the broker, by reason.",
        stats.link_refusals.iter().map(|(reason, count)| (*reason, *count)),
    );
}

fn drained(stats: &Stats, text: &mut Text) {
    let name = "octobus_drain_links_total";
    text.family(
        name,
        Kind::Counter,
        "Links that the end of this process ended: by themselves, or when time was over.",
    );
    text.sample(name, &[("result", "clean")], stats.drained_clean);
    text.sample(name, &[("result", "forced")], stats.drained_forced);
}

fn drop_reason(reason: DropReason) -> &'static str {
    reason.as_str()
}

fn by_reason<'a>(text: &mut Text, name: &str, help: &str, counts: impl Iterator<Item = (&'a str, u64)>) {
    text.family(name, Kind::Counter, help);
    for (reason, count) in counts {
        text.sample(name, &[("reason", reason)], count);
    }
}

fn gauge(text: &mut Text, name: &str, help: &str, value: u64) {
    text.family(name, Kind::Gauge, help);
    text.sample(name, &[], value);
}

fn counter(text: &mut Text, name: &str, help: &str, value: u64) {
    text.family(name, Kind::Counter, help);
    text.sample(name, &[], value);
}
