//! `octobus top`: what happens, per second, from the counters that everybody can scrape.

use std::{io::IsTerminal as _, time::Duration};

use bytes::Bytes;
use hyper::Method;
use ops::client::Client;
use tokio::time::Instant;

use crate::{
    cli::TopArgs,
    exit::Outcome,
    get::{human, samples},
    output::{self, Table},
};

const PERIOD: Duration = Duration::from_secs(1);
/// Cursor home, clear to the end.
const REDRAW: &str = "\x1b[H\x1b[J";

pub(crate) async fn run(args: &TopArgs) -> Outcome {
    let client = args.target.client()?;
    let redraw = !args.once && std::io::stdout().is_terminal();
    let mut ticks = broker::clock::every(PERIOD);
    ticks.tick().await;
    let mut before = page(&client).await?;
    let mut at = Instant::now();
    loop {
        ticks.tick().await;
        let now = page(&client).await?;
        let elapsed = at.elapsed().as_secs_f64();
        at = Instant::now();
        if redraw {
            output::bytes(REDRAW.as_bytes())?;
        }
        table(&before, &now, elapsed).print()?;
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

async fn page(client: &Client) -> Outcome<String> {
    let page = client.text(Method::GET, "/v1/stats", &[], Bytes::new()).await?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

/// Gauges as they are; counters that moved as rates.
fn table(before: &str, now: &str, elapsed: f64) -> Table {
    let (before, now_all) = (samples(before), samples(now));
    let mut table = Table::new(&["WHAT", "NOW", "PER SECOND"]);
    for (name, value) in &now_all {
        let plain = name.split('{').next().unwrap_or(name);
        if plain.ends_with("_bucket") || plain.ends_with("_info") || *value == 0.0 {
            continue;
        }
        let is_counter = plain.ends_with("_total") || plain.ends_with("_sum") || plain.ends_with("_count");
        let shown = name.strip_prefix("octobus_").unwrap_or(name).to_owned();
        let rate = (value - before.get(name).copied().unwrap_or(0.0)) / elapsed;
        let rate = if is_counter { format(plain, rate) } else { String::new() };
        table.row(vec![shown, format(plain, *value), rate]);
    }
    table
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // of a positive size
fn format(name: &str, value: f64) -> String {
    if name.contains("bytes") && value >= 0.0 {
        human(value as u64)
    } else if value.fract() == 0.0 || value >= 1_000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_has_a_rate_and_a_gauge_has_none() {
        let before =
            "octobus_published_total{qos=\"1\"} 100\noctobus_queue_bytes 2048\noctobus_drops_total 0\n";
        let now = "octobus_published_total{qos=\"1\"} 300\noctobus_queue_bytes 4096\noctobus_drops_total 0\n";
        let shown = format!("{:?}", table(before, now, 2.0));
        assert!(shown.contains(r#"["published_total{qos=\"1\"}", "300", "100"]"#), "{shown}");
        assert!(shown.contains(r#"["queue_bytes", "4.0KiB", ""]"#), "{shown}");
        assert!(!shown.contains("drops"), "what never happened is not shown: {shown}");
    }
}
