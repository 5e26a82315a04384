//! Logs by `tracing`: text on a terminal, one JSON object a line otherwise; RUST_LOG is respected.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{Log, LogFormat};

/// Checks a level, or directives in the manner of RUST_LOG.
///
/// # Errors
/// What is wrong, and what to write.
pub fn check_level(text: &str) -> Result<String, String> {
    match EnvFilter::try_new(text) {
        Ok(_filter) if !text.is_empty() => Ok(text.to_owned()),
        _ => {
            Err("not a level; write error, warn, info, debug, trace, or directives as in RUST_LOG".to_owned())
        }
    }
}

/// Starts logging to standard error. RUST_LOG, where set and valid, overrides the configured level.
///
/// Does nothing if the process already logs (a test does).
pub fn init(log: &Log) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&log.level));
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !std::io::stderr().is_terminal(),
    };
    let registry = tracing_subscriber::registry().with(filter);
    let already = if json {
        let layer = fmt::layer().json().flatten_event(true).with_current_span(true).with_span_list(false);
        registry.with(layer.with_writer(std::io::stderr)).try_init()
    } else {
        let layer = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_target(false);
        registry.with(layer.with_writer(std::io::stderr)).try_init()
    };
    if already.is_err() {
        tracing::debug!("logging was already started");
    }
}
