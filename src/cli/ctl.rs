//! What can be typed after `octobus ctl`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};
use ops::{client::Client, config::units};

use super::store_folder;
use crate::exit::Outcome;

/// Commands for somebody who stands at the machine.
#[derive(Debug, Subcommand)]
pub(crate) enum Ctl {
    /// Show what the node has: pods, the node, configmaps, secrets (names only), serviceaccounts
    #[command(after_help = "\
Examples:
  octobus ctl get pods -A
  octobus ctl get pods -l app=web -o wide --watch
  octobus ctl get pod/web-1 -o json
  octobus ctl get node")]
    Get(GetArgs),
    /// Tell all about a pod or the node, with what happened to it
    #[command(after_help = "\
Examples:
  octobus ctl describe pod web-1
  octobus ctl describe node")]
    Describe(DescribeArgs),
    /// Print what a container wrote
    #[command(after_help = "\
Examples:
  octobus ctl logs web-1
  octobus ctl logs web-1 -c sidecar -f --tail 20
  octobus ctl logs web-1 --previous            the container that ended before this one")]
    Logs(LogsArgs),
    /// Run a command in a container
    #[command(after_help = "\
Examples:
  octobus ctl exec web-1 -- ls /
  octobus ctl exec -it web-1 -- sh

The exit code is the command's own.")]
    Exec(ExecArgs),
    /// Stop the containers of a pod; its restart policy starts them again
    #[command(after_help = "\
Examples:
  octobus ctl restart web-1
  octobus ctl restart web-1 -c sidecar")]
    Restart(RestartArgs),
    /// Show what the node or its pods use now
    #[command(after_help = "\
Examples:
  octobus ctl top node
  octobus ctl top pods")]
    Top(TopArgs),
}

/// Which node is meant.
#[derive(Debug, Clone, Args)]
pub(crate) struct Node {
    /// Unix socket of the node
    #[arg(long, value_name = "SOCKET", conflicts_with = "data")]
    admin: Option<PathBuf>,
    /// Data folder of the node instead; of `dev`, its node is meant
    #[arg(long, value_name = "DIR", default_value = "/var/lib/octobus/node")]
    data: PathBuf,
}

impl Node {
    /// A client of the node.
    pub(crate) fn client(&self) -> Outcome<Client> {
        let socket = match &self.admin {
            Some(socket) => socket.clone(),
            None => {
                let node = self.data.join("node");
                let folder = if node.is_dir() { node } else { store_folder(&self.data) };
                folder.join("admin.sock")
            }
        };
        Ok(Client::new(&socket))
    }
}

/// How objects are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shown {
    /// A table
    Text,
    /// A table with all columns
    Wide,
    /// JSON
    Json,
    /// Kind and name
    Name,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// pods, node, configmaps, secrets, serviceaccounts; or KIND/NAME
    pub(crate) kind: String,
    /// One of them
    pub(crate) name: Option<String>,
    /// Namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub(crate) namespace: String,
    /// In all namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    /// Only those with these labels
    #[arg(long, short = 'l', value_name = "SELECTOR")]
    pub(crate) selector: Option<String>,
    /// How they are shown
    #[arg(long, short = 'o', value_enum, default_value_t = Shown::Text)]
    pub(crate) output: Shown,
    /// And every change as it comes
    #[arg(long, short = 'w')]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// pod or node; or pod/NAME
    pub(crate) kind: String,
    /// Its name
    pub(crate) name: Option<String>,
    /// Namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub(crate) namespace: String,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// The pod
    pub(crate) pod: String,
    /// Namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub(crate) namespace: String,
    /// Which of its containers; may be left out if it has one
    #[arg(long, short = 'c')]
    pub(crate) container: Option<String>,
    /// Go on as more is written
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,
    /// Of the container that ended before
    #[arg(long, short = 'p')]
    pub(crate) previous: bool,
    /// With the time of each line
    #[arg(long)]
    pub(crate) timestamps: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<u64>,
    /// Only what is younger: 90s, 10m, 2h
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) since: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// The pod
    pub(crate) pod: String,
    /// Namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub(crate) namespace: String,
    /// In which of its containers; may be left out if it has one
    #[arg(long, short = 'c')]
    pub(crate) container: Option<String>,
    /// Pass standard input on
    #[arg(long, short = 'i')]
    pub(crate) stdin: bool,
    /// With a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// The pod
    pub(crate) pod: String,
    /// Namespace
    #[arg(long, short = 'n', default_value = "default")]
    pub(crate) namespace: String,
    /// Only this container
    #[arg(long, short = 'c')]
    pub(crate) container: Option<String>,
}

/// Whose figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TopOf {
    /// The machine's
    Node,
    /// Those of each pod
    Pods,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) target: Node,
    /// Whose figures
    #[arg(value_enum, default_value_t = TopOf::Pods)]
    pub(crate) of: TopOf,
}
