//! `loadtest`: a simulated fleet against a hub of its own, or against hubs that it was pointed at.
//!
//! Exit codes: 0 passed, 1 failed or a check did not hold, 2 wrong usage.

mod cli;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    if let Some(error) = loadtest::guard::become_another(std::env::args_os()) {
        eprintln!("loadtest: cannot start the hub: {error}");
        return ExitCode::FAILURE;
    }
    let cli = cli::Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loadtest: cannot start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    if cli.worker {
        runtime.block_on(Box::pin(loadtest::worker::run()));
        return ExitCode::SUCCESS;
    }
    runtime.block_on(Box::pin(cli::run(cli)))
}
