//! `octobus backup`, `octobus restore` and `octobus fsck`.

use std::path::Path;

use broker::store::{
    OpenError,
    backup::{self, Manifest},
    lmdb::fsck,
};
use hyper::Method;
use ops::api::{Problem, rfc3339};

use crate::{
    cli::{BackupArgs, FsckArgs, RestoreArgs, Rows},
    exit::{Failure, Outcome},
    output,
};

pub(crate) async fn backup(args: &BackupArgs) -> Outcome {
    let to = std::path::absolute(&args.to).map_err(Failure::usage)?;
    let manifest = match (&args.admin, &args.data) {
        (Some(socket), _) => of_running(socket, &to).await?,
        (None, Some(data)) => match backup::of_folder(data, &to) {
            Err(backup::BackupError::Store(error @ OpenError::Locked(_))) => {
                return Err(Failure::failed(error));
            }
            made => made.map_err(Failure::failed)?,
        },
        (None, None) => return Err(Failure::usage("name what to back up: --admin SOCKET or --data DIR")),
    };
    let Manifest { segments, bytes, files, .. } = &manifest;
    output::line(
        format!("{}: {segments} journal segments, {bytes} bytes with the checkpoint", to.display())
            .as_bytes(),
    )?;
    for file in files {
        output::line(format!("  {}", file.display()).as_bytes())?;
    }
    output::line(
        b"It holds the keys of this machine, and of a hub its CA: keep it as secret as the data folder.",
    )
}

async fn of_running(socket: &Path, to: &Path) -> Outcome<Manifest> {
    let to = to.to_str().ok_or_else(|| Failure::usage("the path of a backup must be UTF-8"))?;
    let client = ops::client::Client::new(socket);
    let answer = client.text(Method::POST, "/v1/backup", &[("to", to)], bytes::Bytes::new()).await?;
    if let Ok(Problem { error }) = serde_json::from_slice(&answer) {
        return Err(Failure::failed(error));
    }
    serde_json::from_slice(&answer)
        .map_err(|_| Failure::failed("the process ended before the backup was complete"))
}

pub(crate) fn restore(args: &RestoreArgs) -> Outcome {
    let manifest = backup::restore(&args.backup, &args.data).map_err(Failure::failed)?;
    output::line(
        format!(
            "{}: as of {}. Its first start begins new epochs and a new incarnation, so that nothing it does is \
             taken for what the original did since. Do not start the original again.",
            args.data.display(),
            rfc3339(manifest.made_us)
        )
        .as_bytes(),
    )
}

pub(crate) fn fsck(args: &FsckArgs) -> Outcome {
    // 2: nothing was checked, whatever the reason.
    let report = fsck::check(&args.data).map_err(Failure::usage)?;
    if args.output == Rows::Json {
        output::json(&report)?;
    } else {
        for problem in &report.problems {
            output::line(problem.as_bytes())?;
        }
        let fsck::Report { segments, groups, logs, records, state, facts, .. } = &report;
        output::line(
            format!(
                "{segments} segments ({groups} groups to replay), {logs} Logs with {records} records, \
                 {state} State entries, {facts} facts"
            )
            .as_bytes(),
        )?;
    }
    match report.problems.len() {
        0 => Ok(()),
        1 => Err(Failure::failed("1 problem")),
        n => Err(Failure::failed(format!("{n} problems"))),
    }
}
