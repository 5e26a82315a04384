//! `octobus loadtest`: becomes the program of that name, which a hub or a node has no need to carry.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use crate::exit::Failure;

/// Does not return but with the reason why that program does not run.
pub(crate) fn run(args: &[OsString]) -> Failure {
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name("loadtest"));
    let program = beside.filter(|path| path.is_file()).unwrap_or_else(|| "loadtest".into());
    let error = Command::new(&program).args(args).exec();
    Failure::failed(format!(
        "cannot run {}: {error}; it is built with `cargo build -p loadtest`",
        program.display()
    ))
}
