//! OCI images in one file: written for images that are built in code, and read for the names in files that operators
//! put down.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Bytes of a block of a tar archive.
const BLOCK: usize = 512;
/// The longest index that is read from a file.
const INDEX_BYTES_MAX: u64 = 4 << 20;
/// The most entries that are looked at in a file.
const ENTRIES_MAX: usize = 100_000;

/// What stands at a path of an image.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A file that may be executed.
    Program(Vec<u8>),
    /// A file.
    File(Vec<u8>),
    /// A symbolic link.
    Link(String),
    /// A folder that everybody may write to, as `/tmp` is.
    Folder,
}

/// An image for this machine's architecture, of one layer.
#[derive(Debug, Clone, Default)]
pub struct Image {
    /// Its full name, with registry and tag.
    pub name: String,
    /// By path, without the slash in front; at most 99 bytes each. Folders in between need not be named.
    pub entries: Vec<(String, Entry)>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub environment: Vec<String>,
    /// As whom it runs; empty: root.
    pub user: String,
}

impl Image {
    /// The image as an OCI archive. The same image gives the same bytes.
    ///
    /// # Errors
    /// A path is too long for it.
    pub fn archive(&self) -> io::Result<Vec<u8>> {
        let mut layer = Tar::default();
        for (path, entry) in &self.entries {
            match entry {
                Entry::Program(bytes) => layer.file(path, 0o755, bytes)?,
                Entry::File(bytes) => layer.file(path, 0o644, bytes)?,
                Entry::Link(target) => layer.entry(path, b'2', 0o777, target, &[])?,
                Entry::Folder => layer.entry(path, b'5', 0o1777, "", &[])?,
            }
        }
        let layer = layer.end();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Cmd": self.command,
                "Env": self.environment,
                "User": self.user,
                "WorkingDir": "/",
            },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": described("application/vnd.oci.image.config.v1+json", &config),
            "layers": [described("application/vnd.oci.image.layer.v1.tar", &layer)],
        });
        let manifest = manifest.to_string().into_bytes();
        let mut top = described("application/vnd.oci.image.manifest.v1+json", &manifest);
        top["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name,
        });
        top["platform"] = json!({ "architecture": architecture(), "os": "linux" });
        let index = json!({ "schemaVersion": 2, "manifests": [top] });

        let mut archive = Tar::default();
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.file("index.json", 0o644, index.to_string().as_bytes())?;
        for blob in [&config, &manifest, &layer] {
            let hash = digest(blob);
            let path = format!("blobs/sha256/{}", hash.trim_start_matches("sha256:"));
            archive.file(&path, 0o644, blob)?;
        }
        Ok(archive.end())
    }
}

/// This machine's architecture in OCI's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    let mut text = String::from("sha256:");
    for byte in hash {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn described(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

/// A tar archive in the making (POSIX ustar). Everything belongs to root and is of 1970, so that it never differs.
#[derive(Debug, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, b'0', mode, "", bytes)
    }

    fn entry(&mut self, path: &str, kind: u8, mode: u32, link: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = [0_u8; BLOCK];
        let mut field = |at: usize, room: usize, text: &str| {
            // The last byte of a field stays zero.
            if text.len() >= room {
                let why = format!("{text:?} is too long for an archive");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
            }
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
            Ok(())
        };
        field(0, 100, path)?;
        field(100, 8, &format!("{mode:07o}"))?;
        field(108, 8, "0000000")?;
        field(116, 8, "0000000")?;
        field(124, 12, &format!("{:011o}", bytes.len()))?;
        field(136, 12, "00000000000")?;
        field(157, 100, link)?;
        field(257, 6, "ustar")?;
        header[156] = kind;
        header[263..265].copy_from_slice(b"00");
        // The sum is counted with blanks where it will stand.
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    /// Two empty blocks are the end.
    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

/// The names of the images in an archive, as OCI's index or Docker's manifest has them. Only headers are read, so it
/// costs the same for large images. Names without a registry and tags alone are left out: what they become is not
/// known here.
///
/// # Errors
/// The file cannot be read, or is no archive.
pub(super) fn names(archive: &Path) -> io::Result<Vec<String>> {
    let mut file = BufReader::new(File::open(archive)?);
    let mut names = Vec::new();
    for _ in 0..ENTRIES_MAX {
        let mut header = [0_u8; BLOCK];
        match file.read_exact(&mut header) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            read => read?,
        }
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        if &header[257..262] != b"ustar" {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no tar archive"));
        }
        let bytes = octal(&header[124..136])
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an entry has no length"))?;
        let padded = bytes.next_multiple_of(BLOCK as u64);
        let name = header[..100].split(|byte| *byte == 0).next().unwrap_or_default();
        let name = name.strip_prefix(b"./").unwrap_or(name);
        if !matches!(name, b"index.json" | b"manifest.json") || bytes > INDEX_BYTES_MAX {
            let skip = i64::try_from(padded)
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "an entry is too long"))?;
            file.seek(SeekFrom::Current(skip))?;
            continue;
        }
        let mut text = Vec::new();
        (&mut file).take(padded).read_to_end(&mut text)?;
        text.truncate(usize::try_from(bytes).unwrap_or(usize::MAX));
        let index: Value = serde_json::from_slice(&text)?;
        names.extend(index_names(&index));
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches(|c: char| c == '\0' || c == ' ');
    let value = u64::from_str_radix(text, 8).ok()?;
    // What is above is rounded up to blocks.
    (value < 1 << 40).then_some(value)
}

fn index_names(index: &Value) -> Vec<String> {
    let annotated = index["manifests"].as_array().into_iter().flatten().filter_map(|manifest| {
        let annotations = &manifest["annotations"];
        let name = annotations["io.containerd.image.name"]
            .as_str()
            .or_else(|| annotations["org.opencontainers.image.ref.name"].as_str())?;
        name.contains(['/', ':', '@']).then(|| name.to_owned())
    });
    let tagged = index.as_array().into_iter().flatten().flat_map(|image| {
        let tags = image["RepoTags"].as_array().into_iter().flatten();
        tags.filter_map(|tag| tag.as_str().map(str::to_owned))
    });
    annotated.chain(tagged).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        Image {
            name: "example.org/one:1".to_owned(),
            entries: vec![
                ("bin/one".to_owned(), Entry::Program(vec![7; 600])),
                ("bin/two".to_owned(), Entry::Link("one".to_owned())),
                ("tmp".to_owned(), Entry::Folder),
            ],
            entrypoint: vec!["/bin/one".to_owned()],
            ..Image::default()
        }
    }

    #[test]
    fn the_same_image_is_the_same_bytes_and_its_name_is_found_again() {
        let archive = image().archive().expect("an archive");
        assert_eq!(archive, image().archive().expect("an archive"));
        assert_eq!(archive.len() % BLOCK, 0);
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("one.tar");
        std::fs::write(&file, &archive).expect("written");
        assert_eq!(names(&file).expect("names"), ["example.org/one:1"]);
    }

    #[test]
    fn tar_itself_reads_what_is_written() {
        let mut layer = Tar::default();
        layer.file("a/b", 0o755, b"hello").expect("an entry");
        layer.entry("a/c", b'2', 0o777, "b", &[]).expect("an entry");
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("t.tar"), layer.end()).expect("written");
        let out = std::process::Command::new("tar")
            .args(["-xf", "t.tar"])
            .current_dir(folder.path())
            .output()
            .expect("tar is installed");
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        assert_eq!(std::fs::read(folder.path().join("a/c")).expect("a file"), b"hello");
    }

    #[test]
    fn what_is_no_archive_is_an_error_and_no_panic() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("x.tar");
        for bytes in [vec![0xff; 2000], b"<html>".repeat(200), vec![0; 10_000], Vec::new()] {
            std::fs::write(&file, &bytes).expect("written");
            assert!(names(&file).map_or(true, |names| names.is_empty()));
        }
        let long = Image { entries: vec![("x".repeat(100), Entry::Folder)], ..image() };
        assert!(long.archive().is_err());
    }

    #[test]
    fn names_come_from_docker_too_and_tags_alone_are_none() {
        let docker = json!([{ "Config": "c", "RepoTags": ["busybox:1", "example.org/b:2"] }]);
        assert_eq!(index_names(&docker), ["busybox:1", "example.org/b:2"]);
        let tag = json!({ "manifests": [
            { "annotations": { "org.opencontainers.image.ref.name": "latest" } }, {} ] });
        assert!(index_names(&tag).is_empty());
    }
}
