//! Log files from some place on, and across rotation.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{Wanted, line::Formatter};

/// Read at once, and so the most that is held for a client.
const PIECE: usize = 64 << 10;

/// One client's way through a log. It blocks on the disk: it is not for a runtime's own threads.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: File,
    formatter: Formatter,
    follow: bool,
    /// Another file has taken the path: this one is read to its end, and then that one.
    replaced: Option<File>,
}

/// What a step through a log has found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// For the client.
    Bytes(Vec<u8>),
    /// Nothing more now. Who follows comes again.
    AtEnd,
    /// The client has all that it may get.
    Full,
}

impl Reader {
    /// # Errors
    /// There is no such file, or it cannot be read.
    pub(crate) fn open(path: &Path, wanted: &Wanted) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if let Some(lines) = wanted.tail {
            let start = tail(&mut file, lines)?;
            file.seek(SeekFrom::Start(start))?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            formatter: Formatter::new(wanted),
            follow: wanted.follow,
            replaced: None,
        })
    }

    /// The next bytes for the client.
    ///
    /// # Errors
    /// The disk's.
    pub(crate) fn step(&mut self) -> io::Result<Step> {
        let mut piece = vec![0; PIECE];
        loop {
            if self.formatter.is_full() {
                return Ok(Step::Full);
            }
            let read = self.file.read(&mut piece)?;
            let mut out = Vec::new();
            if read > 0 {
                self.formatter.push(&piece[..read], &mut out);
            } else if let Some(next) = self.replaced.take() {
                self.formatter.end_of_file(&mut out);
                self.file = next;
            } else if self.follow {
                // The runtime may write here for a moment after it opened the other: the next step reads on to the end.
                self.replaced = self.replacement()?;
                return Ok(Step::AtEnd);
            } else {
                self.formatter.end_of_file(&mut out);
                if out.is_empty() {
                    return Ok(Step::AtEnd);
                }
            }
            if !out.is_empty() {
                return Ok(Step::Bytes(out));
            }
        }
    }

    /// Nothing more will be written: a line without an end is shown too.
    pub(crate) fn no_more(&mut self) {
        self.follow = false;
    }

    /// The file that has the path now, if it is another. Between putting aside and opening anew there is none.
    fn replacement(&self) -> io::Result<Option<File>> {
        let other = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let (old, new) = (self.file.metadata()?, other.metadata()?);
        Ok(((old.dev(), old.ino()) != (new.dev(), new.ino())).then_some(other))
    }
}

/// Where the last lines of a file begin: it is read backwards, and no further than that.
fn tail(file: &mut File, lines: u64) -> io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(end);
    }
    let mut found = 0;
    let mut block = vec![0; PIECE];
    let mut at_very_end = true;
    while end > 0 {
        let start = end.saturating_sub(PIECE as u64);
        let length = usize::try_from(end - start).unwrap_or(PIECE);
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block[..length])?;
        for at in (0..length).rev() {
            // The end of the last line begins no other.
            let ends_file = at_very_end && at + 1 == length;
            if block[at] == b'\n' && !ends_file {
                found += 1;
                if found == lines {
                    return Ok(start + at as u64 + 1);
                }
            }
        }
        at_very_end = false;
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _};

    use super::*;

    fn line(text: &str) -> String {
        format!("2026-01-02T03:04:05Z stdout F {text}\n")
    }

    fn read(reader: &mut Reader) -> String {
        let mut all = Vec::new();
        while let Step::Bytes(bytes) = reader.step().expect("readable") {
            all.extend(bytes);
        }
        String::from_utf8(all).expect("text")
    }

    fn append(path: &Path, text: &str) {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path).expect("open");
        file.write_all(text.as_bytes()).expect("written");
    }

    #[test]
    fn the_last_lines_are_found_wherever_blocks_begin() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("0.log");
        let all: Vec<String> = (0..9000).map(|n| format!("{n} {}", "x".repeat(n % 50))).collect();
        append(&path, &all.iter().map(|text| line(text)).collect::<String>());
        for lines in [0, 1, 2, 700, 5000, 8999, 9000, 9001, u64::MAX] {
            let wanted = Wanted { tail: Some(lines), ..Wanted::default() };
            let got = read(&mut Reader::open(&path, &wanted).expect("open"));
            let skip = all.len().saturating_sub(usize::try_from(lines).unwrap_or(usize::MAX));
            let expected: String = all[skip..].iter().map(|text| format!("{text}\n")).collect();
            assert!(got == expected, "{lines} lines");
        }
    }

    #[test]
    fn who_follows_misses_nothing_across_a_rotation() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("0.log");
        append(&path, &line("one"));
        let wanted = Wanted { follow: true, ..Wanted::default() };
        let mut reader = Reader::open(&path, &wanted).expect("open");
        assert_eq!(read(&mut reader), "one\n");
        let aside = folder.path().join("0.log.1");
        fs::rename(&path, &aside).expect("renamed");
        append(&aside, &line("two, still written to the old file"));
        assert_eq!(read(&mut reader), "two, still written to the old file\n");
        append(&aside, &line("three"));
        append(&path, &line("four"));
        assert_eq!(read(&mut reader), "three\n");
        append(&aside, &line("a late one"));
        assert_eq!(read(&mut reader), "a late one\nfour\n");
        append(&path, &line("five"));
        assert_eq!(read(&mut reader), "five\n");
        append(&path, line("six").trim_end());
        assert_eq!(read(&mut reader), "", "a line is shown once it has ended");
        reader.no_more();
        assert_eq!(read(&mut reader), "six\n");
    }

    #[test]
    fn an_empty_log_has_no_lines() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("0.log");
        append(&path, "");
        let wanted = Wanted { tail: Some(10), ..Wanted::default() };
        let mut reader = Reader::open(&path, &wanted).expect("open");
        assert_eq!(reader.step().expect("readable"), Step::AtEnd);
        assert!(Reader::open(&folder.path().join("none"), &wanted).is_err());
    }
}
