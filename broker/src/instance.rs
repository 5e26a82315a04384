//! The instance: 128 random bits that say which copy of a data folder this is.
//!
//! A cloned disk carries the same certificate and the same epochs; two machines that both continue the
//! same Log would write different records under the same number. So a fingerprint of the machine stands
//! beside the instance, and where it differs at start a new instance is minted, with new epochs and
//! incarnations, before the first link. A false alarm (new network card) costs a resynchronisation; a
//! missed clone is found by the marks of the hub.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    enroll,
    private::{self, PrivateError},
};

const FILE_MAX: usize = 4 << 10;

/// Which copy of the folder this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The 128 bits.
    pub id: [u8; 16],
    /// It is new: epochs and incarnations must be minted, durably, before [`Instance::confirm`].
    pub minted: bool,
    fingerprint: String,
}

/// Why the instance is not known.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// Unreadable, unwritable, or readable by others.
    #[error(transparent)]
    Private(#[from] PrivateError),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

#[derive(Serialize, Deserialize)]
struct Stored {
    instance: String,
    fingerprint: String,
}

impl Instance {
    /// The instance of this folder on this machine; a new one if the folder has none, or one of another
    /// machine.
    ///
    /// # Errors
    /// The file cannot be read, or there is no randomness.
    pub fn open(data: &Path) -> Result<Self, InstanceError> {
        Self::open_on(data, fingerprint(data, Path::new("/")))
    }

    fn open_on(data: &Path, fingerprint: String) -> Result<Self, InstanceError> {
        let stored = private::read(&file(data), FILE_MAX)?;
        let stored = stored.and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        if let Some(stored) = &stored
            && stored.fingerprint == fingerprint
            && let Some(id) = parse(&stored.instance)
        {
            return Ok(Self { id, minted: false, fingerprint });
        }
        if stored.is_some() {
            tracing::warn!(
                "this data folder was last used on another machine, or copied: minting an instance"
            );
        }
        let mut id = [0; 16];
        getrandom::fill(&mut id)?;
        Ok(Self { id, minted: true, fingerprint })
    }

    /// Remembers the instance, once what was minted with it is durable. A crash before it mints again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn confirm(&self, data: &Path) -> Result<(), InstanceError> {
        if !self.minted {
            return Ok(());
        }
        let stored = Stored { instance: enroll::hex(&self.id), fingerprint: self.fingerprint.clone() };
        private::write(&file(data), &serde_json::to_vec(&stored).expect("a struct of strings"))?;
        Ok(())
    }
}

fn file(data: &Path) -> PathBuf {
    data.join("instance.json")
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let id = u128::from_str_radix(text, 16).ok()?.to_be_bytes();
    (enroll::hex(&id) == text).then_some(id)
}

/// Hash of machine id, serials where readable, first permanent MAC, and the inode of the folder.
fn fingerprint(data: &Path, root: &Path) -> String {
    let mut text = String::new();
    let files = [
        "etc/machine-id",
        "sys/class/dmi/id/product_serial",
        "sys/class/dmi/id/board_serial",
        "proc/device-tree/serial-number",
    ];
    for name in files {
        let value = fs::read_to_string(root.join(name)).unwrap_or_default();
        let value = value.trim_matches(|c: char| c.is_whitespace() || c == '\0');
        writeln!(text, "{name}={value}").expect("writing to a String cannot fail");
    }
    let mac = first_permanent_mac(&root.join("sys/class/net")).unwrap_or_default();
    let inode = fs::metadata(data).map_or(0, |meta| meta.ino());
    writeln!(text, "mac={mac}\ninode={inode}").expect("writing to a String cannot fail");
    enroll::hex(&Sha256::digest(text))
}

/// Address of the first interface, by name, that is a device with a burnt-in address.
fn first_permanent_mac(net: &Path) -> Option<String> {
    let mut interfaces: Vec<PathBuf> = fs::read_dir(net).ok()?.flatten().map(|entry| entry.path()).collect();
    interfaces.sort();
    interfaces.iter().find_map(|interface| {
        let read = |name| fs::read_to_string(interface.join(name)).ok();
        let permanent = read("addr_assign_type")?.trim() == "0" && interface.join("device").exists();
        permanent.then(|| read("address")).flatten().map(|address| address.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_lasts_once_it_is_confirmed() {
        let data = tempfile::tempdir().unwrap();
        let first = Instance::open(data.path()).unwrap();
        assert!(first.minted);
        let unconfirmed = Instance::open(data.path()).unwrap();
        assert!(unconfirmed.minted && unconfirmed.id != first.id, "a crash before confirm mints again");
        first.confirm(data.path()).unwrap();
        let again = Instance::open(data.path()).unwrap();
        assert_eq!((again.id, again.minted), (first.id, false));
    }

    #[test]
    fn a_copied_folder_gets_an_instance_of_its_own() {
        let (data, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = Instance::open(data.path()).unwrap();
        first.confirm(data.path()).unwrap();
        private::write(&file(copy.path()), &fs::read(file(data.path())).unwrap()).unwrap();
        let clone = Instance::open(copy.path()).unwrap();
        assert!(clone.minted && clone.id != first.id, "the inode differs");
    }

    #[test]
    fn a_damaged_file_mints() {
        let data = tempfile::tempdir().unwrap();
        let print = fingerprint(data.path(), Path::new("/"));
        for text in ["", "{}", &format!(r#"{{"instance":"xyz","fingerprint":"{print}"}}"#)] {
            private::write(&file(data.path()), text.as_bytes()).unwrap();
            assert!(Instance::open(data.path()).unwrap().minted, "{text}");
        }
    }

    #[test]
    fn the_fingerprint_follows_machine_id_serial_and_first_permanent_mac() {
        let (data, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |name: &str, value: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        let print = || fingerprint(data.path(), root.path());
        let mut seen = vec![print()];
        for (name, value) in [
            ("etc/machine-id", "abc\n"),
            ("proc/device-tree/serial-number", "100\0"),
            ("sys/class/net/eth1/address", "02:00:00:00:00:01\n"),
        ] {
            put(name, value);
            put("sys/class/net/eth1/addr_assign_type", "0\n");
            put("sys/class/net/eth1/device/vendor", "x");
            assert!(!seen.contains(&print()), "{name} counts");
            seen.push(print());
        }
        put("sys/class/net/docker0/address", "02:42:00:00:00:01\n");
        put("sys/class/net/docker0/addr_assign_type", "3\n");
        assert_eq!(Some(&print()), seen.last(), "virtual interfaces do not count");
    }
}
