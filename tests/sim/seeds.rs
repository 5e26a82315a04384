//! Runs that failed once: each stands in `seeds/` as it was shrunk, under the name of the rule it broke.

use crate::shrink;

#[test]
fn what_failed_once_does_not_fail_again() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sim/seeds");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder of scripts")
        .map(|entry| entry.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "txt"))
        .collect();
    files.sort();
    for file in files {
        let text = std::fs::read_to_string(&file).expect("a script is readable");
        let script = text.parse().expect("a script");
        if let Some(failure) = shrink::fails(&script) {
            panic!("{} broke [{}] {}", file.display(), failure.rule, failure.what);
        }
    }
}
