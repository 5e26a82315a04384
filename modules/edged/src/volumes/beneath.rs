//! Paths inside a volume, where a container may have put links to anywhere.
//!
//! The kernel resolves them (openat2), from the volume's folder and never out of it: there is no moment between
//! looking and using in which a link could be put in the way.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat2},
    io::Errno,
};

/// Opens what is at `part` of `whole`, for naming it by its descriptor alone. What is missing becomes folders with
/// the rights of `whole`.
pub(super) fn open_or_make(whole: &Path, part: &Path) -> io::Result<OwnedFd> {
    let root = File::open(whole)?;
    match open(&root, part) {
        Err(Errno::NOENT) => make_folders(&root, part),
        found => found.map_err(io::Error::from),
    }
}

fn open(root: impl AsFd, part: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // The kernel says "again" while something above is being renamed.
    for _ in 0..100 {
        match openat2(&root, part, flags, Mode::empty(), inside) {
            Err(Errno::AGAIN) => {}
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

fn make_folders(root: &File, part: &Path) -> io::Result<OwnedFd> {
    let mode = Mode::from_raw_mode(fstat(root)?.st_mode & 0o7777);
    let mut at = PathBuf::new();
    let mut parent = open(root, Path::new("."))?;
    for level in part.components() {
        let name = match level {
            Component::Normal(name) => name,
            Component::CurDir => continue,
            _ => return Err(Errno::INVAL.into()),
        };
        at.push(name);
        parent = match open(root, &at) {
            Err(Errno::NOENT) => {
                match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                let made = open(root, &at)?;
                own_as(&made, mode)?;
                made
            }
            found => found?,
        };
    }
    Ok(parent)
}

/// Rights without what the process masks. Through its descriptor: it is the folder that was made.
fn own_as(made: &OwnedFd, mode: Mode) -> io::Result<()> {
    if FileType::from_raw_mode(fstat(made)?.st_mode) != FileType::Directory {
        return Err(io::Error::from(Errno::NOTDIR));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(made, ".", flags, Mode::empty())?;
    rustix::fs::fchmod(folder, mode)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::{
            fd::AsRawFd,
            unix::fs::{PermissionsExt, symlink},
        },
    };

    use proptest::prelude::*;

    use super::*;

    fn place(found: &OwnedFd) -> PathBuf {
        fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())).expect("a path")
    }

    #[test]
    fn missing_folders_are_made_with_the_rights_of_the_volume() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = folder.path().join("volume");
        fs::create_dir(&whole).expect("made");
        fs::set_permissions(&whole, fs::Permissions::from_mode(0o2770)).expect("set");
        open_or_make(&whole, Path::new("a/b")).expect("made");
        for made in ["a", "a/b"] {
            let mode = fs::metadata(whole.join(made)).expect("there").permissions().mode();
            assert_eq!(mode & 0o7777, 0o2770, "{made}");
        }
    }

    #[test]
    fn a_link_within_the_volume_is_followed_and_one_out_of_it_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = folder.path().join("volume");
        fs::create_dir_all(whole.join("real")).expect("made");
        fs::write(whole.join("real/file"), "x").expect("written");
        fs::write(folder.path().join("secret"), "x").expect("written");
        symlink("real", whole.join("in")).expect("linked");
        symlink("../secret", whole.join("out")).expect("linked");
        symlink("/", whole.join("root")).expect("linked");
        let found = open_or_make(&whole, Path::new("in/file")).expect("found");
        assert!(place(&found).ends_with("volume/real/file"));
        for wrong in ["out", "root/etc", "root", "in/../../secret"] {
            assert!(open_or_make(&whole, Path::new(wrong)).is_err(), "{wrong}");
        }
    }

    #[derive(Debug, Clone)]
    enum Make {
        Folder(String),
        File(String),
        Link(String, String),
    }

    fn path() -> impl Strategy<Value = String> {
        prop::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c")], 1..4)
            .prop_map(|levels| levels.join("/"))
    }

    fn target() -> impl Strategy<Value = String> {
        let level = prop_oneof![Just("a"), Just("b"), Just(".."), Just("../.."), Just("outside"), Just(".")];
        (prop::bool::ANY, prop::collection::vec(level, 1..4))
            .prop_map(|(absolute, levels)| format!("{}{}", if absolute { "/" } else { "" }, levels.join("/")))
    }

    fn make() -> impl Strategy<Value = Make> {
        prop_oneof![
            path().prop_map(Make::Folder),
            path().prop_map(Make::File),
            (path(), target()).prop_map(|(at, to)| Make::Link(at, to)),
        ]
    }

    /// Makes it where it lies in the volume and nothing stands: this test must not follow links out of it either.
    fn plant(whole: &Path, one: Make) {
        let at = whole.join(match &one {
            Make::Folder(at) | Make::File(at) | Make::Link(at, _) => at,
        });
        let parent = at.parent().and_then(|parent| fs::canonicalize(parent).ok());
        if fs::symlink_metadata(&at).is_ok()
            || !parent.is_some_and(|parent| parent.is_dir() && parent.starts_with(whole))
        {
            return;
        }
        let made = match one {
            Make::Folder(_) => fs::create_dir(&at),
            Make::File(_) => fs::write(&at, "x"),
            Make::Link(_, to) => symlink(to, &at),
        };
        made.expect("nothing stands there");
    }

    /// Names and kinds of all that is there, links not followed.
    fn listing(at: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(at).expect("a folder").flatten() {
            found.push(entry.path());
            if entry.file_type().expect("a kind").is_dir() {
                listing(&entry.path(), found);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        /// Whatever a container put into its volume, what is opened lies in it, and nothing is made elsewhere.
        #[test]
        fn no_path_leads_out_of_a_volume(makes in prop::collection::vec(make(), 0..20), part in target()) {
            let folder = tempfile::tempdir().expect("a folder");
            let base = fs::canonicalize(folder.path()).expect("real");
            let (whole, outside) = (base.join("volume"), base.join("outside"));
            fs::create_dir(&whole).expect("made");
            fs::create_dir(&outside).expect("made");
            for one in makes {
                plant(&whole, one);
            }
            let mut before = Vec::new();
            listing(&outside, &mut before);
            if let Ok(found) = open_or_make(&whole, Path::new(part.trim_start_matches('/'))) {
                let at = place(&found);
                prop_assert!(at.starts_with(&whole), "{} is outside", at.display());
            }
            let mut after = Vec::new();
            listing(&outside, &mut after);
            prop_assert_eq!(before, after);
            prop_assert_eq!(fs::read_dir(&base).expect("a folder").count(), 2);
        }
    }
}
