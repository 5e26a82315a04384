//! What the tree promises about itself: which way dependencies point, where each foreign library is named,
//! what the core may not know, and how long a file may be. A rule here has a reason beside it; breaking one
//! is a decision, and this is where it is taken.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The crates of the workspace that each may depend on. Everything not listed here may depend on all.
const MAY_DEPEND_ON: [(&str, &[&str]); 7] = [
    ("codec", &[]),
    ("broker", &["codec"]),
    ("modules/ops", &["codec", "broker"]),
    ("modules/kubeapi", &["codec", "broker"]),
    ("modules/edged", &["codec", "broker"]),
    ("edgehub", &["broker", "codec", "edged", "kubeapi", "ops"]),
    ("cloudhub", &["codec", "broker", "kubeapi", "ops"]),
];

/// A foreign library, and where it may be named: a prefix of paths for each. So that it can be replaced in
/// one place, and read about in one place. Tests, benches and fuzz targets may name anything.
const NAMED_IN: [(&str, &[&str]); 19] = [
    // What the tier is made of is known behind the trait `Fabric` alone.
    ("async_nats", &["cloudhub/src/fabric/nats"]),
    // The peer in benches, and the intruder's own client in tests.
    ("quinn", &[]),
    ("quinn_proto", &["broker/src/link/quic"]),
    ("quinn_udp", &["broker/src/link/quic"]),
    ("tokio_tungstenite", &["broker/src/link/websocket", "src/ctl/exec"]),
    ("heed", &["broker/src/store/lmdb"]),
    ("io_uring", &["broker/src/store/"]),
    ("rumqttd", &["broker/src/front/mqtt"]),
    // Beside the bus's own formats only those of container runtimes.
    ("prost", &["codec/", "modules/edged/src/cri"]),
    ("protox", &["codec/", "modules/edged/build"]),
    ("tonic", &["modules/edged/"]),
    ("lz4_flex", &["codec/"]),
    ("rcgen", &["cloudhub/src/ca", "edgehub/src/identity", "loadtest/src/pki", "modules/kubeapi/src/pki"]),
    (
        "x509_parser",
        &[
            "broker/src/link/identity",
            "cloudhub/src/ca",
            "cloudhub/src/kubelet/access",
            "cloudhub/src/renew",
            "edgehub/src/identity",
            "modules/kubeapi/src/auth/certificate",
        ],
    ),
    ("serde_saphyr", &["modules/edged/src/pods/source", "modules/kubeapi/src/json"]),
    ("regex", &["modules/kubeapi/src/crd/structural"]),
    ("toml", &["modules/ops/src/config", "broker/src/front/auth", "loadtest/src/scenario"]),
    ("tracing_subscriber", &["modules/ops/src/logging"]),
    ("clap_complete", &["src/"]),
];

/// Each of these is named in one file only, wherever its prefix above allows.
const ONE_FILE: [&str; 2] = ["io_uring", "tracing_subscriber"];

/// What a crate depends on without naming it.
const NEEDED_UNNAMED: [(&str, &str); 2] = [
    // `kube` compiles only where somebody has said which version of Kubernetes its types are of.
    ("cloudhub", "k8s-openapi"),
    // The code that tonic generates from the runtime's interface names it.
    ("edged", "tonic-prost"),
];

/// What the routing core must not know: it is synchronous and takes time and bytes as arguments.
const NOT_IN_CORE: [&str; 10] = [
    "tokio",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::net",
    "std::fs",
    "std::thread",
    "crate::clock",
    "crate::handle",
    "store::lmdb",
    "store::journal",
];

/// Longest file, in lines of code without its tests.
const CODE_LINES_MAX: usize = 900;
/// Files that are longer. This list may only shrink.
const LONGER: [&str; 0] = [];

#[test]
fn dependencies_point_one_way() {
    let root = root();
    let members: BTreeMap<String, PathBuf> = member_manifests(&root);
    let names: BTreeSet<&str> = members.keys().map(String::as_str).collect();
    for (folder, allowed) in MAY_DEPEND_ON {
        let manifest = read_toml(&root.join(folder).join("Cargo.toml"));
        for section in ["dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
            for name in dependencies.keys().filter(|name| names.contains(name.as_str())) {
                assert!(
                    allowed.contains(&name.as_str()),
                    "{folder} depends on {name}; it may depend on {allowed:?} only"
                );
            }
        }
    }
    let modules = fs::read_dir(root.join("modules")).expect("modules/").flatten();
    let known: BTreeSet<&str> = MAY_DEPEND_ON.iter().map(|(folder, _)| *folder).collect();
    for module in modules.filter(|entry| entry.path().is_dir()) {
        let folder = format!("modules/{}", module.file_name().to_string_lossy());
        assert!(known.contains(folder.as_str()), "{folder} has no line in MAY_DEPEND_ON");
    }
}

#[test]
fn a_node_links_neither_kubernetes_nor_a_nats_client() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "-p", "edgehub", "--prefix", "none", "-e", "normal", "--locked", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8_lossy(&tree.stdout);
    for line in text.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        // `kubeapi` is ours and links no client; `k8s-openapi` is types alone.
        let client = name.starts_with("kube") && name != "kubeapi";
        let refused = client || name == "async-nats";
        assert!(!refused, "edgehub links {line}");
    }
}

#[test]
fn each_foreign_library_is_named_in_one_place() {
    let mut wrong = Vec::new();
    for (library, places) in NAMED_IN {
        let mut files = BTreeSet::new();
        for (path, text) in sources() {
            if !is_product(&path) || !code_without_tests(&text).any(|line| uses(line, library)) {
                continue;
            }
            if !places.iter().any(|place| path.starts_with(place)) {
                wrong.push(format!("{path} names {library}, which belongs to {places:?}"));
            }
            files.insert(path);
        }
        if ONE_FILE.contains(&library) && files.len() > 1 {
            wrong.push(format!("{library} is named in more than one file: {files:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn a_manifest_names_no_dependency_that_its_crate_does_not() {
    let root = root();
    let sources = sources();
    let mut wrong = Vec::new();
    for (package, manifest) in member_manifests(&root) {
        let parsed = read_toml(&manifest);
        let folder =
            manifest.parent().and_then(|folder| folder.strip_prefix(&root).ok()).expect("in the tree");
        // The root package owns src/ and build.rs only: everything else in its folder is another package's.
        let folder = if folder.as_os_str().is_empty() { Path::new("src") } else { folder };
        for section in ["dependencies", "dev-dependencies"] {
            for name in parsed.get(section).and_then(toml::Value::as_table).into_iter().flatten() {
                let library = name.0.replace('-', "_");
                let mut own = sources.iter().filter(|(path, _)| Path::new(path).starts_with(folder));
                let unnamed = NEEDED_UNNAMED.contains(&(package.as_str(), name.0.as_str()));
                if !unnamed && !own.any(|(_, text)| code(text).any(|line| uses(line, &library))) {
                    wrong.push(format!("{package} depends on {} and never names it", name.0));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_core_knows_neither_runtime_nor_clock_nor_socket_nor_disk() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path != "broker/src/core.rs" && !path.starts_with("broker/src/core/") {
            continue;
        }
        // Tests of the core may read files; its code may not.
        for (line, name) in code_without_tests(&text).flat_map(|line| NOT_IN_CORE.map(|name| (line, name))) {
            if line.contains(name) {
                wrong.push(format!("{path} names {name}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Dropped-write replay sees what goes through this one file, and nothing else.
#[test]
fn a_store_changes_its_files_in_one_place() {
    let calls = ["fs::rename", "fs::remove_file", "fs::write", "write_all_at", "sync_all", "sync_data"];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let elsewhere = path.starts_with("broker/src/store/") && path != "broker/src/store/files.rs";
        if !elsewhere || !is_product(&path) || path == "broker/src/store/files/tape.rs" {
            continue;
        }
        for line in code_without_tests(&text).filter(|line| calls.iter().any(|call| line.contains(call))) {
            wrong.push(format!("{path}: {}: go through store/files.rs", line.trim()));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn files_are_named_for_their_subject_and_not_too_long() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path.ends_with("/mod.rs") {
            wrong.push(format!("{path}: write foo.rs and foo/, so that a tab says what it holds"));
        }
        let lines = code_without_tests(&text).filter(|line| !line.trim().is_empty()).count();
        let listed = LONGER.contains(&path.as_str());
        if lines > CODE_LINES_MAX && !listed {
            wrong.push(format!("{path} has {lines} lines of code; split it by subject"));
        }
        if lines <= CODE_LINES_MAX && listed {
            wrong.push(format!("{path} has become short enough: take it out of LONGER"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn nothing_unfinished_is_left() {
    // In pieces, so that this file does not find itself.
    let leftovers = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    let notes = ["TO", "FIX", "XX"].map(|start| {
        format!(
            "{start}{}",
            if start == "XX" {
                "X"
            } else if start == "TO" {
                "DO"
            } else {
                "ME"
            }
        )
    });
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            let leftover = leftovers.iter().any(|name| line.contains(name.as_str()));
            let note = notes.iter().any(|name| names(line, name));
            if leftover || note || line.trim_start().starts_with("//! stub") {
                wrong.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    let folders = ["work", "root"].map(|name| format!("/{name}/"));
    let mut wrong = Vec::new();
    for (path, text) in files(&["rs", "toml", "md", "py", "sh", "yaml", "yml", "proto", "service"]) {
        for (number, line) in text.lines().enumerate() {
            // A path, not a part of one: `.../work/` in a longer path is somebody's folder name.
            let starts = |folder: &String| {
                line.match_indices(folder.as_str()).any(|(at, _)| {
                    at == 0 || !line[..at].ends_with(|c: char| c.is_alphanumeric() || "/._-)}".contains(c))
                })
            };
            if folders.iter().any(starts) {
                wrong.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn documents_point_at_what_exists() {
    let root = root();
    let mut wrong = Vec::new();
    for (path, text) in files(&["md"]) {
        let folder = Path::new(&path).parent().unwrap_or_else(|| Path::new("")).to_owned();
        for target in links(&text) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !root.join(&folder).join(file).exists() {
                wrong.push(format!("{path} points at {file}, which does not exist"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_bench_and_binary_that_a_manifest_names_exists() {
    let root = root();
    for manifest in member_manifests(&root).values() {
        let folder = manifest.parent().expect("a manifest stands in a folder");
        let parsed = read_toml(manifest);
        for section in ["bin", "bench", "test", "example"] {
            for target in parsed.get(section).and_then(toml::Value::as_array).into_iter().flatten() {
                if let Some(path) = target.get("path").and_then(toml::Value::as_str) {
                    assert!(folder.join(path).exists(), "{} names {path}", manifest.display());
                }
            }
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ stands in the tree").to_owned()
}

/// Name of each package of the workspace, and its manifest.
fn member_manifests(root: &Path) -> BTreeMap<String, PathBuf> {
    let workspace = read_toml(&root.join("Cargo.toml"));
    let members = workspace["workspace"]["members"].as_array().expect("members");
    let folders = members.iter().map(|member| root.join(member.as_str().expect("a text")));
    let manifests = folders.chain([root.to_owned()]).map(|folder| folder.join("Cargo.toml"));
    let named = manifests.map(|path| {
        let name = read_toml(&path)["package"]["name"].as_str().expect("a name").to_owned();
        (name, path)
    });
    named.collect()
}

fn read_toml(path: &Path) -> toml::Table {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust file of the tree with its text.
fn sources() -> Vec<(String, String)> {
    files(&["rs"])
}

/// Every file of the tree with one of these endings.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the tree").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                let skipped = name.starts_with('.') || name == "target" || name == "corpus" || name == "data";
                if !skipped {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|end| endings.iter().any(|wanted| end == *wanted)) {
                let relative =
                    path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
                found.push((relative, fs::read_to_string(&path).expect("UTF-8")));
            }
        }
    }
    assert!(!found.is_empty());
    found.sort();
    found
}

/// What is shipped: not tests, benches, fuzz targets or load generators.
fn is_product(path: &str) -> bool {
    let outside = ["tests/", "benches/", "loadtest/"].iter().any(|start| path.starts_with(start));
    !(outside || path.contains("/tests/") || path.contains("/fuzz/") || path.ends_with("/tests.rs"))
}

/// Lines that are not comments.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

/// The same, up to the module of tests that ends a file.
fn code_without_tests(text: &str) -> impl Iterator<Item = &str> {
    let end = text.find("\n#[cfg(test)]\nmod ").unwrap_or(text.len());
    code(&text[..end])
}

/// Whether `name` stands in the line as a word of its own and not in a text.
fn names(line: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + name.len()..]);
        let in_text = before.matches('"').count() % 2 == 1;
        !in_text && !before.ends_with(is_word) && !after.starts_with(is_word)
    })
}

/// Whether the line takes something from this library: `name::...`, or `use name;`.
fn uses(line: &str, library: &str) -> bool {
    let path = format!("{library}::");
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let path_starts = line.match_indices(&path).any(|(at, _)| {
        let before = &line[..at];
        !before.ends_with(is_word) || before.ends_with(" ::") || before.trim() == "::"
    });
    path_starts
        || line.trim() == format!("use {library};")
        || line.trim().starts_with(&format!("use {library} "))
}

/// Targets of `[text](target)`.
fn links(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            found.extend(rest.find(')').map(|end| rest[..end].to_owned()));
        }
    }
    found
}
