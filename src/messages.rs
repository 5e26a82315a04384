//! `octobus pub` and `octobus sub`.

use std::io::Read as _;

use bytes::Bytes;
use ops::api::{self, MessageRow};

use crate::{
    cli::{Messages, PubArgs, SubArgs},
    exit::{Failure, Outcome},
    output,
};

pub(crate) async fn publish(args: PubArgs) -> Outcome {
    let client = args.target.client()?;
    let payload = if args.payload == "-" { read_payload()? } else { Bytes::from(args.payload) };
    let qos = args.qos.to_string();
    let mut query = vec![("topic", args.topic.as_str()), ("qos", &qos)];
    if args.retain {
        query.push(("retain", "true"));
    }
    if let Some(node) = &args.node {
        query.push(("node", node));
    }
    let _done: serde_json::Value = client.post("/v1/publish", &query, payload).await?;
    Ok(())
}

fn read_payload() -> Outcome<Bytes> {
    let max = broker::limits::MQTT_PACKET_MAX;
    let mut payload = Vec::new();
    std::io::stdin()
        .take(max as u64 + 1)
        .read_to_end(&mut payload)
        .map_err(|error| Failure::failed(format!("cannot read the payload from standard input: {error}")))?;
    if payload.len() > max {
        return Err(Failure::usage(format!("the payload has more than {max} bytes")));
    }
    Ok(payload.into())
}

pub(crate) async fn subscribe(args: &SubArgs) -> Outcome {
    let mut query = vec![("filter", args.filter.as_str())];
    if let Some(node) = &args.node {
        query.push(("node", node));
    }
    let mut lines = args.target.client()?.lines("/v1/subscribe", &query).await?;
    let mut count = 0;
    while args.count.is_none_or(|max| count < max)
        && let Some(line) = lines.next().await?
    {
        print(&line, args.output)?;
        count += 1;
    }
    Ok(())
}

fn print(line: &[u8], output: Messages) -> Outcome {
    if output == Messages::Json {
        return output::line(line);
    }
    let row: MessageRow = serde_json::from_slice(line).map_err(Failure::failed)?;
    let payload = api::payload(&row.payload).map_err(Failure::failed)?;
    if output == Messages::Raw {
        return output::line(&payload);
    }
    let node = if row.node.is_empty() { "-" } else { &row.node };
    output::line(format!("{node}  {}  {}", row.topic, output::preview(&payload, 4096)).as_bytes())
}
