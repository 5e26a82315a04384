//! `octobus put`, `delete`, `watch`, `ask`, `want`, `barrier` and `accept-removal`: State, by hand.

use std::io::Read as _;

use bytes::Bytes;
use hyper::Method;
use ops::api::{self, Answer, Asked, StateRow, WatchRow, Written};

use crate::{
    cli::{AcceptArgs, AskArgs, BarrierArgs, DeleteArgs, PutArgs, Rows, WantArgs, WantCommand, WatchArgs},
    exit::{Failure, Outcome},
    output,
};

pub(crate) async fn put(args: PutArgs) -> Outcome {
    let value = match (args.value, &args.file) {
        (Some(value), None) if value != "-" => Bytes::from(value),
        (_, Some(path)) => {
            let read = std::fs::read(path);
            read.map_err(|error| Failure::failed(format!("cannot read {}: {error}", path.display())))?.into()
        }
        _ => read_value()?,
    };
    if value.len() > broker::limits::STATE_VALUE_MAX {
        return Err(Failure::usage(format!(
            "the value has more than {} bytes",
            broker::limits::STATE_VALUE_MAX
        )));
    }
    let revision = args.revision.map(|revision| revision.to_string());
    let mut query = vec![("space", args.space.as_str()), ("key", &args.key)];
    query.extend(revision.as_deref().map(|revision| ("revision", revision)));
    if args.create {
        query.push(("create", "true"));
    }
    let answer = args.target.client()?.text(Method::PUT, "/v1/state/entry", &query, value).await?;
    print_revision(&answer)
}

pub(crate) async fn delete(args: &DeleteArgs) -> Outcome {
    let revision = args.revision.map(|revision| revision.to_string());
    let mut query = vec![("space", args.space.as_str()), ("key", &args.key)];
    query.extend(revision.as_deref().map(|revision| ("revision", revision)));
    let client = args.target.client()?;
    let answer = client.text(Method::DELETE, "/v1/state/entry", &query, Bytes::new()).await?;
    let written: Written = serde_json::from_slice(&answer).map_err(Failure::failed)?;
    if written.revisions == [0] {
        return Err(Failure::not_found(format!("space {} has no key {}", args.space, args.key)));
    }
    print_revision(&answer)
}

fn print_revision(answer: &[u8]) -> Outcome {
    let written: Written = serde_json::from_slice(answer).map_err(Failure::failed)?;
    let revision = written.revisions.last().copied().unwrap_or(0);
    output::line(revision.to_string().as_bytes())
}

fn read_value() -> Outcome<Bytes> {
    let max = broker::limits::STATE_VALUE_MAX;
    let mut value = Vec::new();
    std::io::stdin()
        .take(max as u64 + 1)
        .read_to_end(&mut value)
        .map_err(|error| Failure::failed(format!("cannot read the value from standard input: {error}")))?;
    Ok(value.into())
}

pub(crate) async fn watch(args: &WatchArgs) -> Outcome {
    let from = args.from.map(|from| from.to_string());
    let prefix = args.prefix.join("\0");
    let mut query = vec![("space", args.space.as_str()), ("prefix", &prefix)];
    query.extend(args.node.as_deref().map(|node| ("origin", node)));
    query.extend(from.as_deref().map(|from| ("from", from)));
    if args.previous {
        query.push(("previous", "true"));
    }
    let mut lines = args.target.client()?.lines("/v1/state/watch", &query).await?;
    let mut count = 0;
    while args.count.is_none_or(|max| count < max)
        && let Some(line) = lines.next().await?
    {
        match args.output {
            Rows::Json => output::line(&line)?,
            Rows::Text => output::line(text(&line)?.as_bytes())?,
        }
        count += 1;
    }
    Ok(())
}

fn text(line: &[u8]) -> Outcome<String> {
    let row: WatchRow = serde_json::from_slice(line).map_err(Failure::failed)?;
    let was = |previous: Option<StateRow>| {
        previous.map_or_else(String::new, |row| format!("  (was {})", preview(&row)))
    };
    Ok(match row {
        WatchRow::Put { entry, previous } => {
            format!("{}  put  {}  {}{}", entry.local, entry.key, preview(&entry), was(previous))
        }
        WatchRow::Deleted { key, local, previous, .. } => format!("{local}  deleted  {key}{}", was(previous)),
        WatchRow::Synced { revision } => format!("{revision}  synced"),
        WatchRow::TooOld { oldest } => {
            return Err(Failure::failed(format!(
                "this watch fell behind what is known: list again, or watch from {oldest} on"
            )));
        }
    })
}

fn preview(row: &StateRow) -> String {
    api::payload(&row.value).map_or_else(|_| "?".to_owned(), |bytes| output::preview(&bytes, 200))
}

pub(crate) async fn want(command: WantCommand) -> Outcome {
    let (args, action) = match command {
        WantCommand::List(args) => {
            let query = [("node", args.node.as_str())];
            let keys: Vec<String> = args.target.client()?.get("/v1/state/want", &query).await?;
            return print_keys(&keys);
        }
        WantCommand::Set(args) => (args, "set"),
        WantCommand::Add(args) => (args, "add"),
        WantCommand::Remove(args) => (args, "remove"),
    };
    let WantArgs { target, node, keys } = args;
    let query = [("node", node.as_str()), ("action", action)];
    let keys = serde_json::to_vec(&keys).map_err(Failure::failed)?;
    print_keys(&target.client()?.post::<Vec<String>>("/v1/state/want", &query, keys.into()).await?)
}

fn print_keys(keys: &[String]) -> Outcome {
    keys.iter().try_for_each(|key| output::line(key.as_bytes()))
}

pub(crate) async fn barrier(args: &BarrierArgs) -> Outcome {
    let client = args.target.client()?;
    print_revision(&client.text(Method::POST, "/v1/state/barrier", &[], Bytes::new()).await?)
}

pub(crate) async fn accept_removal(args: &AcceptArgs) -> Outcome {
    let query = [("node", args.node.as_str())];
    let client = args.target.client()?;
    let _written: Written = client.post("/v1/state/accept-removal", &query, Bytes::new()).await?;
    Ok(())
}

/// Asks the owner of a space, and waits for what becomes of it.
pub(crate) async fn ask(args: AskArgs) -> Outcome {
    let client = args.target.client()?;
    let value = match args.value {
        Some(value) if value != "-" => Bytes::from(value),
        None if args.delete => Bytes::new(),
        _ => read_value()?,
    };
    let node = args.node.as_deref().unwrap_or_default();
    let mut query = vec![("space", args.space.as_str()), ("key", &args.key), ("node", node)];
    query.extend(args.delete.then_some(("delete", "true")));
    query.extend(args.force.then_some(("force", "true")));
    let asked: Asked = client.post("/v1/state/intent", &query, value).await?;
    let question = [("id", asked.id.as_str()), ("node", node)];
    let until = tokio::time::Instant::now() + args.wait;
    loop {
        match client.get::<Answer>("/v1/state/intent", &question).await {
            Ok(answer) if answer.outcome == "applied" => {
                return output::line(answer.revision.to_string().as_bytes());
            }
            Ok(answer) => {
                let there = if answer.revision > 0 {
                    format!(": it has revision {} there", answer.revision)
                } else {
                    String::new()
                };
                return Err(Failure::failed(format!("refused: {}{there}", answer.outcome)));
            }
            Err(error) if error.is_not_found() && tokio::time::Instant::now() < until => {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            Err(error) if error.is_not_found() => {
                return Err(Failure::failed(format!(
                    "no answer within {:?}: it is on its way and good for a day",
                    args.wait
                )));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
