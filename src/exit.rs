//! How a command ends: every failure has a code that scripts can rely on.

use std::{fmt::Display, process::ExitCode};

use ops::{client::ClientError, config::ConfigError};

/// What a command returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// Why a command did not do what it was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// 1: it was tried and failed.
    pub(crate) fn failed(message: impl Display) -> Self {
        Self { code: 1, message: message.to_string() }
    }

    /// The code of a command that was run for somebody.
    pub(crate) fn with_code(code: u8, message: &str) -> Self {
        Self { code, message: message.to_owned() }
    }

    /// 2: what was asked for makes no sense.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { code: 2, message: message.to_string() }
    }

    /// 3: what was asked for is not there.
    pub(crate) fn not_found(message: impl Display) -> Self {
        Self { code: 3, message: message.to_string() }
    }

    /// 4: no octobus answers.
    pub(crate) fn unreachable(message: impl Display) -> Self {
        Self { code: 4, message: message.to_string() }
    }

    /// Whoever reads our output has enough: not a failure worth a word.
    pub(crate) fn quiet() -> Self {
        Self { code: 0, message: String::new() }
    }

    /// Says why on standard error and gives the code.
    pub(crate) fn report(self) -> ExitCode {
        if !self.message.is_empty() {
            eprintln!("octobus: {}", self.message);
        }
        ExitCode::from(self.code)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        if error.is_unreachable() {
            Self::unreachable(error)
        } else if error.is_not_found() {
            Self::not_found(error)
        } else {
            Self::failed(error)
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error)
    }
}
