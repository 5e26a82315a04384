//! `octobus ctl exec`: a command in a container, by the container runtime's own streams.
//!
//! The connection becomes a WebSocket of `v4.channel.k8s.io`: each message begins with a byte that says which
//! stream it is of. The node passes it on to the runtime without looking into it.

use std::{
    io::{IsTerminal as _, Read as _},
    os::fd::AsFd as _,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::Full;
use hyper::Request;
use hyper_util::rt::TokioIo;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::{Api, escaped, pod_path};
use crate::{
    cli::ctl::ExecArgs,
    exit::{Failure, Outcome},
    output,
};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const PROTOCOL: &str = "v4.channel.k8s.io";
/// Bytes of standard input in one message.
const CHUNK: usize = 16 << 10;

pub(super) async fn run(args: &ExecArgs) -> Outcome {
    if args.tty && !std::io::stdin().is_terminal() {
        return Err(Failure::usage("--tty needs a terminal; leave it out"));
    }
    let api = Api::new(args.target.client()?);
    let mut query: Vec<String> =
        args.command.iter().map(|word| format!("command={}", escaped(word))).collect();
    query.push("stdout=true".to_owned());
    for (name, is_set) in [("stdin", args.stdin), ("tty", args.tty), ("stderr", !args.tty)] {
        query.push(format!("{name}={is_set}"));
    }
    query.extend(args.container.as_ref().map(|name| format!("container={}", escaped(name))));
    let request = Request::get(format!("{}/exec?{}", pod_path(&args.namespace, &args.pod), query.join("&")))
        .header("host", "octobus")
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "b2N0b2J1cy1jdGwtZXhlYw==")
        .header("sec-websocket-protocol", PROTOCOL)
        .body(Full::new(Bytes::new()))
        .map_err(Failure::usage)?;
    let response = api.send(request).await?;
    let upgraded = hyper::upgrade::on(response).await.map_err(Failure::failed)?;
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, None).await;
    let _raw = if args.tty { Raw::set() } else { None };
    let ended = talk(socket, args).await;
    drop(_raw);
    ended
}

async fn talk(mut socket: WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>, args: &ExecArgs) -> Outcome {
    let mut input = if args.stdin { Some(stdin()) } else { None };
    let mut resized = signal(SignalKind::window_change()).map_err(Failure::failed)?;
    if args.tty {
        send_size(&mut socket).await?;
    }
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    if let Some(ended) = take(&bytes)? {
                        return ended;
                    }
                }
                Some(Ok(Message::Close(_))) | None => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Failure::failed(error)),
            },
            chunk = next(&mut input) => {
                let ended = chunk.is_empty();
                let message = [&[STDIN][..], &chunk].concat();
                if !ended {
                    socket.send(Message::Binary(message.into())).await.map_err(Failure::failed)?;
                } else {
                    // v4 knows no end of one stream; the command goes on without further input.
                    input = None;
                }
            },
            _ = resized.recv(), if args.tty => send_size(&mut socket).await?,
        }
    }
}

async fn next(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Vec<u8> {
    match input {
        Some(input) => input.recv().await.unwrap_or_default(),
        None => std::future::pending().await,
    }
}

/// Prints a message; how the command ended, if it says so.
fn take(bytes: &[u8]) -> Outcome<Option<Outcome>> {
    let Some((channel, data)) = bytes.split_first() else { return Ok(None) };
    match *channel {
        STDOUT => output::bytes(data)?,
        STDERR => {
            use std::io::Write as _;
            std::io::stderr().lock().write_all(data).map_err(Failure::failed)?;
        }
        ERROR => return Ok(Some(outcome(data))),
        _ => {}
    }
    Ok(None)
}

/// A metav1.Status: success, or how the command failed.
fn outcome(status: &[u8]) -> Outcome {
    let status: Value = serde_json::from_slice(status).unwrap_or_default();
    if status["status"] == "Success" {
        return Ok(());
    }
    let causes = status["details"]["causes"].as_array().map_or(&[][..], Vec::as_slice);
    let code = causes.iter().find(|cause| cause["reason"] == "ExitCode");
    let code = code.and_then(|cause| cause["message"].as_str()?.parse::<u8>().ok());
    let said = status["message"].as_str().unwrap_or("the command failed");
    Err(match code {
        // As a shell: the code is the command's own, and it has said what there is to say.
        Some(code) => Failure::with_code(code, ""),
        None => Failure::failed(said),
    })
}

/// Chunks of standard input, read by a thread of its own: not everything that it can be can be polled. An empty one
/// is the end.
fn stdin() -> mpsc::Receiver<Vec<u8>> {
    let (chunks, received) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = std::io::stdin().lock().read(&mut buffer).unwrap_or(0);
            if chunks.blocking_send(buffer[..read].to_vec()).is_err() || read == 0 {
                return;
            }
        }
    });
    received
}

async fn send_size(socket: &mut WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>) -> Outcome {
    let Ok(size) = tcgetwinsize(std::io::stdin().as_fd()) else { return Ok(()) };
    let size = json!({"Width": size.ws_col, "Height": size.ws_row}).to_string();
    let message = [&[RESIZE][..], size.as_bytes()].concat();
    socket.send(Message::Binary(message.into())).await.map_err(Failure::failed)
}

/// The terminal hands over every key; as it was when this is dropped.
struct Raw(Termios);

impl Raw {
    fn set() -> Option<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Whoever took the terminal away has it.
        tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.0).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_command_is_the_code_of_exec() {
        assert!(outcome(br#"{"status":"Success"}"#).is_ok());
        let failed = br#"{"status":"Failure","message":"command terminated with non-zero exit code",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(outcome(failed).unwrap_err(), Failure::with_code(7, ""));
        let broken = br#"{"status":"Failure","message":"container not found"}"#;
        assert_eq!(outcome(broken).unwrap_err(), Failure::failed("container not found"));
    }
}
