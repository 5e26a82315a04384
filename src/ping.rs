//! `octobus ping`: round trips and throughput of a link, over a Stream that the other side echoes.

use hyper::Method;
use ops::api::PingRow;

use crate::{
    cli::{PingArgs, Rows},
    exit::{Failure, Outcome},
    get::human,
    output,
};

pub(crate) async fn run(args: &PingArgs) -> Outcome {
    let (count, bytes) = (args.count.to_string(), args.bytes.to_string());
    let mut query = vec![("count", &*count), ("bytes", &*bytes)];
    query.extend(args.node.as_deref().map(|node| ("node", node)));
    let client = args.target.client()?;
    let answer = client.text(Method::GET, "/v1/ping", &query, bytes::Bytes::new()).await?;
    let row: PingRow = serde_json::from_slice(&answer).map_err(|error| Failure::failed(error.to_string()))?;
    match args.output {
        Rows::Json => output::json(&row),
        Rows::Text => output::line(text(&row).as_bytes()),
    }
}

#[allow(clippy::cast_precision_loss)] // microseconds of half a minute
fn text(row: &PingRow) -> String {
    let ms = |us: u64| us as f64 / 1_000.0;
    let trips = &row.round_trips_us;
    let (least, most) = (trips.iter().min().copied().unwrap_or(0), trips.iter().max().copied().unwrap_or(0));
    let mean = trips.iter().sum::<u64>() / u64::try_from(trips.len().max(1)).expect("at most 1000");
    let mut text = format!(
        "{}: {} round trips, least {:.3} ms, mean {:.3} ms, most {:.3} ms",
        row.peer,
        trips.len(),
        ms(least),
        ms(mean),
        ms(most)
    );
    if let Some(us) = row.echo_us {
        let rate = u128::from(row.bytes) * 1_000_000 / u128::from(us.max(1));
        let rate = human(u64::try_from(rate).unwrap_or(u64::MAX));
        text += &format!("; {} there and back in {:.1} ms, {rate}/s each way", human(row.bytes), ms(us));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_one_line() {
        let row = PingRow {
            peer: "edge-1".into(),
            round_trips_us: vec![400, 600],
            bytes: 1 << 20,
            echo_us: Some(500_000),
        };
        assert_eq!(
            text(&row),
            "edge-1: 2 round trips, least 0.400 ms, mean 0.500 ms, most 0.600 ms; 1.0MiB there and back in 500.0 ms, 2.0MiB/s each way"
        );
    }
}
