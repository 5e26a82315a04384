//! Showing files so that a reader sees all of the old ones or all of the new ones.
//!
//! ```text
//! <volume>/..2026_11_20_19_46_22.815346/db/url   what is shown
//! <volume>/..data -> ..2026_11_20_19_46_22.815346
//! <volume>/db -> ..data/db
//! ```
//!
//! New files go to a new folder; then `..data` is put in place of the old link in one rename. Programs that wait
//! for changes know this layout from kubelet and watch `..data`.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown, symlink},
    path::Path,
};

use broker::clock::wall_us;
use time::OffsetDateTime;

use super::payload::{Payload, Shown};

const DATA: &str = "..data";
const DATA_NEXT: &str = "..data_tmp";

/// Makes `volume` show these files and no others. Whether it did not before.
pub(super) fn write(volume: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    let old = fs::read_link(volume.join(DATA)).ok();
    if let Some(old) = &old
        && is_shown(&volume.join(old), payload, group)
    {
        // The links may not have been made before a crash.
        link_names(volume, payload)?;
        forget_others(volume, old)?;
        return Ok(false);
    }
    let name = fresh_name(volume)?;
    let fresh = volume.join(&name);
    // Nobody looks into it before it is whole.
    fs::DirBuilder::new().mode(0o700).create(&fresh)?;
    for (path, file) in &payload.files {
        write_one(&fresh, Path::new(path), file, group)?;
    }
    own(&fresh, group)?;
    match fs::remove_file(volume.join(DATA_NEXT)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&name, volume.join(DATA_NEXT))?;
    fs::rename(volume.join(DATA_NEXT), volume.join(DATA))?;
    link_names(volume, payload)?;
    forget_others(volume, Path::new(&name))?;
    Ok(true)
}

fn fresh_name(volume: &Path) -> io::Result<String> {
    let now =
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(wall_us()) * 1000).map_err(io::Error::other)?;
    let (date, clock) = (now.date(), now.time());
    let base = format!(
        "..{:04}_{:02}_{:02}_{:02}_{:02}_{:02}.{:06}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second(),
        clock.microsecond()
    );
    // A clock may stand still, or go back.
    let names = (0..1_000).map(|number| if number == 0 { base.clone() } else { format!("{base}_{number}") });
    let mut free = names.into_iter().filter(|name| !volume.join(name).exists());
    free.next().ok_or_else(|| io::Error::other("no name is free"))
}

/// A folder that members of the group can read, and whose files are theirs.
fn own(folder: &Path, group: Option<u32>) -> io::Result<()> {
    chown(folder, None, group)?;
    let mode = if group.is_some() { 0o2755 } else { 0o755 };
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
}

fn mode_of(file: &Shown, group: Option<u32>) -> u32 {
    if group.is_some() { file.mode | 0o440 } else { file.mode }
}

fn write_one(folder: &Path, path: &Path, file: &Shown, group: Option<u32>) -> io::Result<()> {
    let mut at = folder.to_owned();
    for level in path.parent().into_iter().flat_map(Path::components) {
        at.push(level);
        if !at.exists() {
            fs::create_dir(&at)?;
            own(&at, group)?;
        }
    }
    let at = folder.join(path);
    let mut open = fs::OpenOptions::new();
    let mut opened = open.create_new(true).write(true).mode(0o600).open(&at)?;
    io::Write::write_all(&mut opened, &file.bytes)?;
    chown(&at, file.user, group)?;
    // After the owner, since a change of owner takes rights away.
    fs::set_permissions(&at, fs::Permissions::from_mode(mode_of(file, group)))
}

/// Whether a folder holds just these files.
fn is_shown(folder: &Path, payload: &Payload, group: Option<u32>) -> bool {
    let same = |(path, file): (&String, &Shown)| {
        let at = folder.join(path);
        let mode = fs::metadata(&at).map(|found| found.permissions().mode() & 0o777);
        mode.is_ok_and(|mode| mode == mode_of(file, group))
            && fs::read(&at).is_ok_and(|bytes| bytes == file.bytes)
    };
    let count = count_files(folder);
    count.is_ok_and(|count| count == payload.files.len()) && payload.files.iter().all(same)
}

fn count_files(folder: &Path) -> io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { count_files(&entry.path())? } else { 1 };
    }
    Ok(count)
}

/// The names that a container sees, and none that is not shown any more.
fn link_names(volume: &Path, payload: &Payload) -> io::Result<()> {
    let first = |path: &String| path.split('/').next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = payload.files.keys().map(first).collect();
    for name in &names {
        let target = Path::new(DATA).join(name);
        if fs::read_link(volume.join(name)).is_ok_and(|found| found == target) {
            continue;
        }
        symlink(target, volume.join(name))?;
    }
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with("..") || names.contains(name));
        if !is_ours && entry.file_type()?.is_symlink() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Removes every folder but the one that is shown, also those of writes that a crash cut off.
fn forget_others(volume: &Path, shown: &Path) -> io::Result<()> {
    for entry in fs::read_dir(volume)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(".."));
        if is_ours && Path::new(&name) != shown && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
