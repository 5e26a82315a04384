//! `octobus ctl top`: what the node and its pods use now.

use serde_json::Value;

use super::{Api, escaped};
use crate::{
    cli::ctl::{TopArgs, TopOf},
    exit::Outcome,
    output::Table,
};

pub(super) async fn run(args: &TopArgs) -> Outcome {
    let api = Api::new(args.target.client()?);
    let node = api.node().await?;
    let path = format!("/api/v1/nodes/{}/proxy/stats/summary", escaped(&node));
    let summary = api.json(&path, "application/json").await?;
    match args.of {
        TopOf::Node => {
            let mut table = Table::new(&["NAME", "CPU(cores)", "MEMORY(bytes)"]);
            table.row(vec![node, cores(&summary["node"]), memory(&summary["node"])]);
            table.print()
        }
        TopOf::Pods => {
            let mut table = Table::new(&["NAMESPACE", "NAME", "CPU(cores)", "MEMORY(bytes)"]);
            for pod in summary["pods"].as_array().into_iter().flatten() {
                let name = |field: &str| pod["podRef"][field].as_str().unwrap_or("?").to_owned();
                table.row(vec![name("namespace"), name("name"), cores(pod), memory(pod)]);
            }
            table.print()
        }
    }
}

/// Thousandths of a core.
fn cores(of: &Value) -> String {
    of["cpu"]["usageNanoCores"]
        .as_u64()
        .map_or_else(|| "?".to_owned(), |nano| format!("{}m", nano.div_ceil(1_000_000)))
}

fn memory(of: &Value) -> String {
    of["memory"]["workingSetBytes"]
        .as_u64()
        .map_or_else(|| "?".to_owned(), |bytes| format!("{}Mi", bytes >> 20))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_rounded_as_kubectl_does_and_missing_ones_are_said() {
        let pod = json!({"cpu": {"usageNanoCores": 1_500_000}, "memory": {"workingSetBytes": 3_500_000}});
        assert_eq!((cores(&pod), memory(&pod)), ("2m".to_owned(), "3Mi".to_owned()));
        assert_eq!((cores(&json!({})), memory(&json!({}))), ("?".to_owned(), "?".to_owned()));
    }
}
