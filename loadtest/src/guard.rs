//! A program that ends when its parent does, however that ends.
//!
//! A run that is killed cannot end the hub that it started, so the kernel does. The hub is told nothing: this
//! program is started once more, asks the kernel for the signal, and becomes the hub.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::process::CommandExt as _,
    path::Path,
    process::Command,
};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// First argument of the process that becomes another one; the parent's id and the program follow.
const FLAG: &str = "--ends-with";

/// A command that runs `program` until it ends or the calling thread does: call it from a thread that stays.
///
/// # Errors
/// This program does not know where it lies.
pub fn command(program: &Path) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(FLAG).arg(std::process::id().to_string()).arg(program);
    Ok(command)
}

/// Becomes the program that stands in these arguments; returns why not, or `None` if they do not ask for it.
#[must_use]
pub fn become_another(args: impl IntoIterator<Item = OsString>) -> Option<io::Error> {
    let mut args = args.into_iter().skip(1);
    if args.next().as_deref() != Some(OsStr::new(FLAG)) {
        return None;
    }
    let parent = args.next().and_then(|pid| Pid::from_raw(pid.to_str()?.parse().ok()?));
    let (Some(parent), Some(program)) = (parent, args.next()) else {
        return Some(io::ErrorKind::InvalidInput.into());
    };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return Some(error.into());
    }
    // It may have ended before the kernel was asked.
    if getppid() != Some(parent) {
        return Some(io::Error::other("who started this has ended"));
    }
    Some(Command::new(program).args(args).exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_its_own_arguments_ask_for_it() {
        assert!(become_another(["loadtest", "steady", FLAG].map(OsString::from)).is_none());
        assert!(become_another(["loadtest", FLAG].map(OsString::from)).is_some());
        let late = ["loadtest", FLAG, "1", "/nonexistent"].map(OsString::from);
        assert!(become_another(late).is_some_and(|error| error.to_string().contains("ended")));
    }
}
