//! What can be typed. The help texts teach: each command says what it is for and shows it.

pub(crate) mod ctl;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ops::{
    client::Client,
    config::{Flags, units},
};

use crate::exit::{Failure, Outcome};

/// One message bus from devices at the edge to NATS clients at the hub, and back.
///
/// A node serves devices (MQTT) and keeps what they publish; it links to a hub, where NATS clients see every
/// node under octobus.up.NODE. and send to it under octobus.down.NODE.
#[derive(Debug, Parser)]
#[command(
    version,
    name = "octobus",
    propagate_version = true,
    after_help = "\
Try it on this machine:
  octobus dev                                    a hub and a node in one process, with three lines to try

Two machines:
  octobus cloud                                  on the hub
  octobus token create --node edge-1 --data /var/lib/octobus/hub
  octobus join --token ob1... --hub hub.example --data /var/lib/octobus/node
  octobus edge                                   on the node

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not found, 4 no octobus could be reached."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The definition, without what a role has no use for in its help. Where it is typed all the same, the
/// configuration says so together with every other mistake.
pub(crate) fn command() -> clap::Command {
    let hide = |role, foreign: &'static [&'static str]| {
        move |command: clap::Command| {
            command.mut_subcommand(role, |role| {
                foreign.iter().fold(role, |role, name| role.mut_arg(name, |arg| arg.hide(true)))
            })
        }
    };
    let command = hide("dev", &["hub"])(Cli::command());
    let command = hide("cloud", &["node", "hub", "mqtt", "node_nats"])(command);
    hide("edge", &["node_nats", "quic", "websocket", "bootstrap"])(command)
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a hub and a node (edge-1) in one process, on loopback
    ///
    /// The node links to the hub over real QUIC with mutual TLS, exactly as on two machines. Clients on this
    /// machine need no password. Data is kept and found again at the next start: in --data, by default
    /// $XDG_STATE_HOME/octobus/dev (~/.local/state/octobus/dev). Ctrl-C stops cleanly.
    #[command(after_help = "\
Examples:
  octobus dev
  octobus dev --data /tmp/try --mqtt 127.0.0.1:0 --nats 127.0.0.1:0 --ready-file /tmp/ready.json")]
    Dev(Flags),
    /// Run a hub: nodes link to it, NATS clients see them all
    #[command(after_help = "\
Examples:
  octobus cloud --data /var/lib/octobus/hub --users /etc/octobus/users.toml
  octobus cloud --nats 127.0.0.1:4222 --quic 0.0.0.0:10001 --bootstrap 0.0.0.0:10002

Nodes need UDP 10001 (or TCP 10000 where UDP is blocked) and TCP 10002 of this machine. Make tokens for them with `octobus token create`.")]
    Cloud(Flags),
    /// Run a node: serves devices by MQTT, links to its hub
    #[command(after_help = "\
Examples:
  octobus edge --data /var/lib/octobus/node
  octobus edge --node lonely --anonymous         a node that has not joined serves its devices alone

Join a hub first with `octobus join`, or at any time later.")]
    Edge(Flags),
    /// Make tokens with which nodes join
    #[command(subcommand)]
    Token(TokenCommand),
    /// Enrol this machine as a node of a hub
    #[command(after_help = "\
Examples:
  octobus join --token ob1... --hub hub.example --data /var/lib/octobus/node

The token comes from `octobus token create` at the hub, works for one node and a short time. It tells this
machine which hub is the right one, so nothing can stand in between. May be repeated until it succeeds.")]
    Join(JoinArgs),
    /// Make a Kubernetes cluster ready for a hub: its account and its rights, no more than it needs
    #[command(after_help = "\
Examples:
  octobus init --kubeconfig admin.conf --out /etc/octobus/cluster.conf
  octobus init --print > bridge.yaml

Applies a namespace, a service account, a ClusterRole and its binding. May be repeated: a hub's kubeconfig is good
for a year at most.")]
    Init(InitArgs),
    /// Publish one message
    #[command(after_help = "\
Examples:
  octobus pub --admin DATA/admin.sock sensors/boiler/temp 71.5
  octobus pub --admin HUB/admin.sock --node edge-1 valves/3 open     from the hub to a node
  date | octobus pub --data DATA clock -                             the payload from standard input

Done means durable (QoS 1), unless --qos 0.")]
    Pub(PubArgs),
    /// Print messages as they come
    #[command(after_help = "\
Examples:
  octobus sub --data DATA 'sensors/#'
  octobus sub --admin HUB/admin.sock --node edge-1 '#' -o json

At a hub without --node: of every node.")]
    Sub(SubArgs),
    /// Show nodes, sessions, streams, conditions, retained messages, State
    #[command(after_help = "\
Examples:
  octobus get nodes --data DATA
  octobus get streams --admin HUB/admin.sock -o json
  octobus get state --space twin --node edge-1 --data DATA")]
    Get(GetArgs),
    /// At a node's machine: its pods, their logs, commands in them; needs neither hub nor network
    #[command(
        subcommand,
        after_help = "\
Examples:
  octobus ctl get pods -A
  octobus ctl logs -f web-1
  octobus ctl exec -it web-1 -- sh"
    )]
    Ctl(ctl::Ctl),
    /// Set a key of a State space that the process owns
    #[command(after_help = "\
Examples:
  octobus put fleet obj/core/pods/default/web --file web.json --admin HUB/admin.sock
  octobus put fleet obj/core/configmaps/default/a hello --create --data DATA

Prints the revision, once durable. A hub owns fleet, a node status and twin.")]
    Put(PutArgs),
    /// Delete a key of a State space that the process owns
    #[command(after_help = "\
Examples:
  octobus delete fleet obj/core/pods/default/web --data DATA
  octobus delete fleet obj/core/pods/default/web --revision 17 --data DATA")]
    Delete(DeleteArgs),
    /// Print a State space and its changes as they come
    #[command(after_help = "\
Examples:
  octobus watch fleet obj/core/pods/ --data DATA
  octobus watch fleet --admin NODE/admin.sock -o json      at a node: its part of the hub's space
  octobus watch status --node edge-1 --data DATA           at a hub: what a node reports

After what is there comes `synced`, as soon as the owner has listed its source and nothing is on the way.")]
    Watch(WatchArgs),
    /// Ask the owner of a State space to change it, and wait for the answer
    ///
    /// Refused with `conflict` if the owner holds something else by then than is seen here.
    #[command(after_help = "\
Examples:
  octobus ask fleet obj/core/configmaps/default/a 'from the node' --admin NODE/admin.sock
  octobus ask twin default/pump on --node edge-1 --data DATA          at a hub

A node may ask for what it must have (octobus want), a hub for twins of its nodes. Prints the revision.")]
    Ask(AskArgs),
    /// Say what nodes must have: keys of space fleet
    #[command(subcommand)]
    Want(WantCommand),
    /// Say that the hub knows everything that nodes must have
    ///
    /// A hub whose store is new or was restored removes nothing from nodes before this.
    #[command(after_help = "\
Examples:
  octobus barrier --data DATA")]
    Barrier(BarrierArgs),
    /// Let a node remove more than half of its workloads at once
    ///
    /// The node holds such a removal back, with condition RemovalHeld. What is demanded later is held back again.
    #[command(after_help = "\
Examples:
  octobus get state --space status --node edge-1 --prefix condition/ --data DATA
  octobus accept-removal --node edge-1 --data DATA")]
    AcceptRemoval(AcceptArgs),
    /// Read what Logs hold
    #[command(subcommand)]
    Log(LogCommand),
    /// Copy a data folder, while its process runs or while none does
    #[command(after_help = "\
Examples:
  octobus backup --admin /var/lib/octobus/hub/admin.sock /backup/hub-monday
  octobus backup --data /var/lib/octobus/node /backup/node

The backup is written by the process itself and holds everything but what names this copy: records, State, the
identity of a node with its key, the CA of a hub. Its files have mode 0600. Files outside the data folder, such as
the configuration and the list of users, are not in it.")]
    Backup(BackupArgs),
    /// Make a data folder of a backup
    #[command(after_help = "\
Examples:
  octobus restore /backup/hub-monday /var/lib/octobus/hub

What is restored begins new epochs and a new incarnation at its first start. The original must not run any more.")]
    Restore(RestoreArgs),
    /// Examine a data folder that no process uses
    #[command(after_help = "\
Examples:
  octobus fsck /var/lib/octobus/node
  octobus fsck /var/lib/octobus/hub -o json

Checks segments, groups, the index of every Log, State, cursors. Repairs nothing.
Exit codes: 0 clean, 1 problems, 2 could not check.")]
    Fsck(FsckArgs),
    /// Watch rates, once a second
    Top(TopArgs),
    /// Measure a link: round trips, and how much it carries
    #[command(after_help = "\
Examples:
  octobus ping edge-1 --admin HUB/admin.sock
  octobus ping --data /var/lib/octobus/node --bytes 4MiB        from a node to its hub

The other side sends back what it gets, over the link as it is: QUIC, or WebSocket where UDP is blocked.")]
    Ping(PingArgs),
    /// Find out what is wrong on this machine, why, and what to do
    #[command(after_help = "\
Examples:
  octobus doctor --data /var/lib/octobus/node
  octobus doctor --data DATA -o json

Exit code 0 if nothing fails (warnings do not count), else 1.")]
    Doctor(DoctorArgs),
    /// Simulate a fleet: thousands of nodes, made of the agent's own code, link to a hub
    ///
    /// Runs the program `loadtest` that is installed beside this one; --help is its help.
    #[command(disable_help_flag = true)]
    Loadtest {
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  octobus completion bash > /etc/bash_completion.d/octobus
  octobus completion zsh > ~/.zfunc/_octobus")]
    Completion {
        /// Which shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token with which one node may join
    #[command(after_help = "\
Examples:
  octobus token create --node edge-1 --data /var/lib/octobus/hub
  octobus token create --node edge-1 --replace --ttl 1h --admin HUB/admin.sock
  octobus token create --node gw-1 --forwards pump-1,pump-2

The hub must run. The token is printed once and kept by the hub only as a hash.")]
    Create(TokenArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// Print the records of a node's streams, one a line
    #[command(after_help = "\
Examples:
  octobus log read --admin HUB/admin.sock --node edge-1 --topic 'sensors/#'
  octobus log read --data DATA --node edge-1 --stream default --from 17 -o json
  octobus log read --admin HUB/admin.sock --node edge-1 --stream default --follow

raw prints each payload and a newline. json prints node, stream, epoch, seq, time, topic and the payload in
base64, and where records are missing {\"gap\":{from,to,count,reason},...}.")]
    Read(LogArgs),
}

#[derive(Debug, Subcommand)]
pub(crate) enum WantCommand {
    /// Print what a node must have
    List(WantNode),
    /// Replace the list of what a node must have
    #[command(after_help = "\
Examples:
  octobus want set edge-1 obj/core/pods/default/web obj/core/configmaps/default/a --data DATA")]
    Set(WantArgs),
    /// Add to what a node must have
    #[command(after_help = "\
Examples:
  octobus want add edge-1 obj/core/pods/default/web --data DATA")]
    Add(WantArgs),
    /// Take from what a node must have: it removes it
    #[command(after_help = "\
Examples:
  octobus want remove edge-1 obj/core/pods/default/web --data DATA")]
    Remove(WantArgs),
}

/// Which process to ask.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// Unix socket of a running octobus
    #[arg(long, value_name = "SOCKET", conflicts_with = "data")]
    pub(crate) admin: Option<PathBuf>,
    /// Its data folder instead; of `dev`, its hub is meant
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
}

impl Target {
    /// The socket of the process that is meant.
    pub(crate) fn socket(&self) -> Outcome<PathBuf> {
        match (&self.admin, &self.data) {
            (Some(socket), _) => Ok(socket.clone()),
            (None, Some(data)) => Ok(store_folder(data).join("admin.sock")),
            (None, None) => Err(Failure::usage(
                "name a running octobus: --admin SOCKET, or its --data DIR (both are printed at its start)",
            )),
        }
    }

    /// A client of the process that is meant.
    pub(crate) fn client(&self) -> Outcome<Client> {
        Ok(Client::new(&self.socket()?))
    }
}

/// The folder with the store: `dev` keeps its hub's in `hub`.
pub(crate) fn store_folder(data: &std::path::Path) -> PathBuf {
    let hub = data.join("hub");
    if hub.is_dir() { hub } else { data.to_owned() }
}

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rows {
    /// A table
    Text,
    /// One JSON array
    Json,
}

/// How messages are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Messages {
    /// Node, topic and payload
    Text,
    /// One JSON object a line
    Json,
    /// The payload and a newline
    Raw,
}

#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The node that may join with it
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// May take over the name of a node that is enrolled; using it ends the old machine's access
    #[arg(long)]
    pub(crate) replace: bool,
    /// Make it a relay, to which these nodes may link instead of to a hub
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) forwards: Vec<String>,
    /// Good for this long, for example 1h
    #[arg(long, value_name = "DURATION", value_parser = units::duration)]
    pub(crate) ttl: Option<Duration>,
    /// How to print: text is the token alone
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Kubeconfig of an administrator of the cluster
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Write a kubeconfig for the hub here
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Print what would be applied, and apply nothing
    #[arg(long)]
    pub(crate) print: bool,
}

#[derive(Debug, Args)]
pub(crate) struct JoinArgs {
    /// The token; - reads it from standard input, so that it stands in no list of processes
    #[arg(long, value_name = "TOKEN")]
    pub(crate) token: String,
    /// The hub's bootstrap address; port 10002 if none is given
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(crate) hub: String,
    /// The node's data folder
    #[arg(long, value_name = "DIR", default_value = "/var/lib/octobus/node")]
    pub(crate) data: PathBuf,
    /// Enrol anew although this folder has joined; its name stays
    #[arg(long)]
    pub(crate) again: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PingArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// At a hub: the node; without it the newest link
    #[arg(value_name = "NODE")]
    pub(crate) node: Option<String>,
    /// Round trips
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: u32,
    /// Then send this much at once, at most 64MiB, and wait until it is back
    #[arg(long, value_name = "SIZE", default_value = "256KiB", value_parser = units::size)]
    pub(crate) bytes: u64,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[derive(Debug, Args)]
pub(crate) struct PubArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// At a hub: the node to send to
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// 1: durable when this returns; 0: not kept
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(crate) qos: u8,
    /// Also set the retained message of the topic; with an empty payload, clear it
    #[arg(long)]
    pub(crate) retain: bool,
    /// Topic, levels separated by /
    pub(crate) topic: String,
    /// Payload; - reads it from standard input
    pub(crate) payload: String,
}

#[derive(Debug, Args)]
pub(crate) struct SubArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// At a hub: only this node
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// End after this many messages
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// Topic filter: + is one level, # all that follow
    pub(crate) filter: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Messages::Text)]
    pub(crate) output: Messages,
}

/// What `get` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum What {
    /// Enrolled nodes, and whether they are linked
    Nodes,
    /// Clients and links
    Sessions,
    /// Logs and what they hold
    Streams,
    /// What needs somebody's attention
    Conditions,
    /// Retained messages
    Retained,
    /// Entries of a State space (--space)
    State,
}

#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// What to show
    #[arg(value_enum)]
    pub(crate) what: What,
    /// Only of this node; State without it is the tier's
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// State: which space
    #[arg(long, value_name = "NAME", required_if_eq("what", "state"))]
    pub(crate) space: Option<String>,
    /// State and retained: only keys that begin so
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub(crate) prefix: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["admin", "data"]))]
pub(crate) struct LogArgs {
    /// Unix socket of a running octobus
    #[arg(long, value_name = "SOCKET")]
    pub(crate) admin: Option<PathBuf>,
    /// Data folder that no octobus uses now: a hub's, a node's or dev's
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Whose Logs
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
    /// Only topics that match this filter; gaps are always shown
    #[arg(long, value_name = "FILTER")]
    pub(crate) topic: Option<String>,
    /// Only this stream
    #[arg(long, value_name = "NAME")]
    pub(crate) stream: Option<String>,
    /// Begin at this record; with its epoch, refuse if the stream stands in another one there
    #[arg(long, alias = "from-seq", value_name = "[EPOCH:]SEQ", requires = "stream")]
    pub(crate) from: Option<ops::api::Start>,
    /// Begin at this time, RFC 3339
    #[arg(long, value_name = "TIME", value_parser = ops::api::parse_time, conflicts_with = "from")]
    pub(crate) from_time: Option<u64>,
    /// Begin this long ago, for example 10m
    #[arg(long, value_name = "DURATION", value_parser = units::duration,
        conflicts_with_all = ["from", "from_time"])]
    pub(crate) since: Option<Duration>,
    /// Go on with what comes
    #[arg(long, requires = "stream", conflicts_with = "data")]
    pub(crate) follow: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Messages::Text)]
    pub(crate) output: Messages,
}

#[derive(Debug, Args)]
pub(crate) struct PutArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Space
    pub(crate) space: String,
    /// Key, levels separated by /
    pub(crate) key: String,
    /// Value; - or nothing reads it from standard input
    #[arg(conflicts_with = "file")]
    pub(crate) value: Option<String>,
    /// Read the value from here
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Only if the key has this revision
    #[arg(long, value_name = "N", conflicts_with = "create")]
    pub(crate) revision: Option<u64>,
    /// Only if there is no such key
    #[arg(long)]
    pub(crate) create: bool,
}

#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// At a hub: the node whose space it is
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// Space
    pub(crate) space: String,
    /// Key
    pub(crate) key: String,
    /// Value; - or nothing reads it from standard input
    #[arg(conflicts_with = "delete")]
    pub(crate) value: Option<String>,
    /// Delete the key
    #[arg(long)]
    pub(crate) delete: bool,
    /// Whatever is there by then
    #[arg(long)]
    pub(crate) force: bool,
    /// Wait so long for the answer
    #[arg(long, value_name = "DURATION", value_parser = units::duration, default_value = "10s")]
    pub(crate) wait: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Space
    pub(crate) space: String,
    /// Key
    pub(crate) key: String,
    /// Only if the key has this revision
    #[arg(long, value_name = "N")]
    pub(crate) revision: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Whose space; without it the tier's
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// Space
    pub(crate) space: String,
    /// Only keys that begin so
    pub(crate) prefix: Vec<String>,
    /// Only changes, beginning with this local revision
    #[arg(long, value_name = "N")]
    pub(crate) from: Option<u64>,
    /// Show what was there before: only of a space with a change window
    #[arg(long)]
    pub(crate) previous: bool,
    /// End after this many events
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// How to print: one line an event
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[derive(Debug, Args)]
pub(crate) struct WantNode {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The node
    pub(crate) node: String,
}

#[derive(Debug, Args)]
pub(crate) struct WantArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The node
    pub(crate) node: String,
    /// Keys of space fleet
    pub(crate) keys: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BarrierArgs {
    #[command(flatten)]
    pub(crate) target: Target,
}

#[derive(Debug, Args)]
pub(crate) struct AcceptArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The node
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["admin", "data"]))]
pub(crate) struct BackupArgs {
    /// Unix socket of a running octobus
    #[arg(long, value_name = "SOCKET")]
    pub(crate) admin: Option<PathBuf>,
    /// Data folder that no octobus uses now: a hub's or a node's
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Where to: a folder that does not exist yet
    #[arg(value_name = "DEST")]
    pub(crate) to: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The backup
    pub(crate) backup: PathBuf,
    /// The data folder to make; must not exist, or be empty
    pub(crate) data: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct FsckArgs {
    /// The data folder of a hub or a node
    pub(crate) data: PathBuf,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Print one second's rates and end
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Data folder of the hub or node to examine; of `dev`, its node is meant
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Configuration file that the hub or node is started with
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Rows::Text)]
    pub(crate) output: Rows,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each(command: &clap::Command, check: &mut dyn FnMut(&clap::Command)) {
        check(command);
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            each(inner, check);
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_command_and_every_argument_explains_itself() {
        each(&Cli::command(), &mut |command| {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
        });
    }

    #[test]
    fn from_needs_one_stream() {
        let parse =
            |args: &[&str]| Cli::try_parse_from([&["octobus", "log", "read", "--node", "n"], args].concat());
        assert!(parse(&["--data", "d", "--from", "1"]).is_err());
        assert!(parse(&["--data", "d", "--stream", "s", "--from", "c0ffee:1"]).is_ok());
        assert!(parse(&["--stream", "s"]).is_err(), "neither --admin nor --data");
        assert!(parse(&["--data", "d", "--admin", "a"]).is_err(), "both");
    }

    #[test]
    fn anonymous_is_a_switch_and_takes_a_value_too() {
        let parse =
            |args: &[&str]| match Cli::try_parse_from([&["octobus", "edge"], args].concat()).unwrap().command
            {
                Command::Edge(flags) => flags.anonymous,
                _ => None,
            };
        assert_eq!(parse(&["--anonymous"]).as_deref(), Some("true"));
        assert_eq!(parse(&["--anonymous=false", "--mqtt", "off"]).as_deref(), Some("false"));
        assert_eq!(parse(&[]), None);
    }
}
