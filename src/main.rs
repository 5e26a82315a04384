//! `octobus`: the one command line.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not found, 4 no octobus could be reached.

mod backup;
mod cli;
mod ctl;
mod dev;
mod doctor;
mod exit;
mod get;
mod init;
mod loadtest;
mod log;
mod messages;
mod output;
mod ping;
mod serve;
mod state;
mod token;
mod top;

use std::process::ExitCode;

use clap::FromArgMatches as _;

use crate::{
    cli::{Cli, Command, LogCommand, TokenCommand},
    exit::{Failure, Outcome},
};

fn main() -> ExitCode {
    let matches = cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::failed(format!("cannot start the runtime: {error}")).report(),
    };
    // Boxed: the future of `dev` holds a hub and a node.
    match runtime.block_on(Box::pin(run(cli))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(cli: Cli) -> Outcome {
    match cli.command {
        Command::Dev(args) => Box::pin(dev::run(&args)).await,
        Command::Cloud(args) => Box::pin(serve::cloud(&args)).await,
        Command::Edge(args) => Box::pin(serve::edge(&args)).await,
        Command::Token(TokenCommand::Create(args)) => token::create(&args).await,
        Command::Join(args) => token::join(&args).await,
        Command::Init(args) => Box::pin(init::run(&args)).await,
        Command::Pub(args) => messages::publish(args).await,
        Command::Sub(args) => messages::subscribe(&args).await,
        Command::Get(args) => get::run(&args).await,
        Command::Put(args) => state::put(args).await,
        Command::Delete(args) => state::delete(&args).await,
        Command::Watch(args) => state::watch(&args).await,
        Command::Ask(args) => state::ask(args).await,
        Command::Want(command) => state::want(command).await,
        Command::Barrier(args) => state::barrier(&args).await,
        Command::AcceptRemoval(args) => state::accept_removal(&args).await,
        Command::Log(LogCommand::Read(args)) => log::read(&args).await,
        Command::Backup(args) => backup::backup(&args).await,
        Command::Restore(args) => backup::restore(&args),
        Command::Fsck(args) => backup::fsck(&args),
        Command::Ctl(command) => Box::pin(ctl::run(command)).await,
        Command::Top(args) => top::run(&args).await,
        Command::Ping(args) => ping::run(&args).await,
        Command::Doctor(args) => doctor::run(&args).await,
        Command::Loadtest { args } => Err(loadtest::run(&args)),
        Command::Completion { shell } => {
            let mut command = cli::command();
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command, "octobus", &mut script);
            output::bytes(&script)
        }
    }
}
