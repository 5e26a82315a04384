//! Who did what: a line of JSON for each request, in a file.
//!
//! Lines wait in a bounded queue for the thread that writes them. When it cannot keep up, lines are lost and
//! their number is the next line: a request never waits for the disk.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
};

use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::{clock, http::request::Asked};

/// Lines that wait to be written.
const LINES_MAX: usize = 4096;
/// A file of this size is put aside, in place of the one put aside before.
const FILE_MAX: u64 = 64 << 20;
/// Longest path that is noted.
const PATH_MAX: usize = 512;

/// Where requests are noted; nowhere if no file is named.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    lines: Option<mpsc::Sender<Value>>,
    lost: Arc<AtomicU64>,
}

impl Audit {
    /// Opens the file and starts the thread that writes to it. It ends with the last sender.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        let (lines, waiting) = mpsc::channel(LINES_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer { path: path.to_owned(), file, lost: Arc::clone(&lost) };
        std::thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run(waiting))?;
        Ok(Self { lines: Some(lines), lost })
    }

    /// Notes a request. Reads of the server's own health are nobody's business.
    pub(crate) fn note(&self, who: &str, from: SocketAddr, asked: &Asked, path: &str, code: StatusCode) {
        let Some(lines) = &self.lines else { return };
        let wanted = &asked.attributes;
        if ["/healthz", "/livez", "/readyz"].contains(&wanted.path.as_str()) {
            return;
        }
        let mut line = json!({
            "time": clock::now_micros(),
            "user": who,
            "from": from.ip().to_string(),
            "verb": wanted.verb,
            "path": path.chars().take(PATH_MAX).collect::<String>(),
            "code": code.as_u16(),
        });
        if wanted.path.is_empty() {
            line["object"] = json!({
                "group": wanted.group,
                "resource": wanted.resource_name(),
                "namespace": wanted.namespace,
                "name": wanted.name,
            });
        }
        if lines.try_send(line).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Writer {
    path: PathBuf,
    file: File,
    lost: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, mut lines: mpsc::Receiver<Value>) {
        while let Some(line) = lines.blocking_recv() {
            let lost = self.lost.swap(0, Ordering::Relaxed);
            let told = (lost > 0).then(|| json!({"time": clock::now_micros(), "lost": lost}));
            for line in told.into_iter().chain([line]) {
                if let Err(error) = self.write(&line) {
                    tracing::warn!(%error, path = %self.path.display(), "a line of the audit log is lost");
                }
            }
        }
    }

    fn write(&mut self, line: &Value) -> io::Result<()> {
        if self.file.metadata()?.len() >= FILE_MAX {
            let mut aside = self.path.clone().into_os_string();
            aside.push(".1");
            std::fs::rename(&self.path, aside)?;
            self.file = open(&self.path)?;
        }
        self.file.write_all(format!("{line}\n").as_bytes())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}
