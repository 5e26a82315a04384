//! `octobus token create` and `octobus join`: how a machine becomes a node.

use std::io::Read as _;

use edgehub::join::{JoinError, JoinOptions};

use crate::{
    cli::{JoinArgs, Rows, TokenArgs},
    exit::{Failure, Outcome},
    output,
};

pub(crate) async fn create(args: &TokenArgs) -> Outcome {
    let ttl_s = args.ttl.map(|ttl| ttl.as_secs());
    let order = cloudhub::admin::TokenOrder {
        node: args.node.clone(),
        replace: args.replace,
        ttl_s,
        forwards: args.forwards.clone(),
    };
    let row: cloudhub::admin::TokenRow = args.target.client()?.post_json("/v1/tokens", &order).await?;
    match args.output {
        Rows::Json => output::json(&row),
        Rows::Text => output::line(row.token.as_bytes()),
    }
}

pub(crate) async fn join(args: &JoinArgs) -> Outcome {
    let token = if args.token == "-" { read_token()? } else { args.token.clone() };
    let hub = if args.hub.contains("://") { args.hub.clone() } else { format!("https://{}", args.hub) };
    let options = JoinOptions { hub, token, again: args.again };
    let identity = edgehub::join::join(&args.data, &options).await.map_err(|error| match &error {
        JoinError::Token(_) | JoinError::Url(_) => Failure::usage(error),
        JoinError::Request(
            edgehub::https::RequestError::Connect { .. } | edgehub::https::RequestError::Timeout(_),
        ) => Failure::unreachable(error),
        _ => Failure::failed(error),
    })?;
    let data = args.data.display();
    output::line(
        format!(
            "joined as node {} of tier {}; start it with: octobus edge --data {data}",
            identity.name(),
            identity.tier()
        )
        .as_bytes(),
    )
}

fn read_token() -> Outcome<String> {
    const MAX: u64 = 4096;
    let mut text = String::new();
    std::io::stdin()
        .take(MAX)
        .read_to_string(&mut text)
        .map_err(|error| Failure::failed(format!("cannot read the token from standard input: {error}")))?;
    Ok(text.trim().to_owned())
}
