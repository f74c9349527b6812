//! Who may open what PiSync writes: its owner alone, whatever the umask is; and the service's user can still use
//! a database on which root has run commands.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, lchown},
    path::Path,
};

use serde_json::Value;

use crate::support::{http::event, postgres::is_root, program::Program};

fn program() -> Program {
    Program::new()
        .with("PORT", 0)
        .with("RATE_LIMIT_SYNC_PER_MINUTE", 0)
        .with("RATE_LIMIT_API_PER_MINUTE", 0)
}

/// Events, the second of which is none.
const EVENTS: &str = r#"{"device_id": "a", "timestamp": "2026-11-22T12:00:00Z", "total_files_synced": 1, "total_errors": 0}
{"device_id": "a"}
"#;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[track_caller]
fn assert_modes(program: &Program, folder: &str, expected: u32) {
    let names = program.names_in(folder);
    assert!(!names.is_empty());
    for name in names {
        let path = program.path(folder).join(&name);
        assert_eq!(mode(&path), expected, "{name}: {:o}", mode(&path));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_their_owners_alone_whatever_the_umask_is() {
    for umask in ["0", "022", "077"] {
        let set_umask = format!("umask {umask}; exec \"$0\" \"$@\"");
        let program =
            program().with_file("events.ndjson", EVENTS).run_by(&["sh", "-c", &set_umask]);
        let serving = program.serve(&[]);
        serving.client.store(&event("pi")).await;
        let partly = program.run(&["import", "events.ndjson"]);
        assert_eq!(partly.code(), 3, "{partly:?}");
        assert!(program.names_in("data").iter().any(|name| name.ends_with("-shm")));
        assert_modes(&program, "data", 0o600);
        assert_modes(&program, "logs", 0o640);
        assert_eq!((mode(&program.path("data")), mode(&program.path("logs"))), (0o750, 0o750));
        program.run(&["backup", "copy.db"]).success();
        program.run(&["export", "--output", "all.ndjson"]).success();
        serving.signal("KILL");
        serving.wait();
        assert_modes(&program, "data", 0o600);
        program.run(&["restore", "copy.db", "--force"]).success();
        program.run(&["copy", "--from", "sqlite:copy.db", "--to", "sqlite:other/new.db"]).success();
        assert_modes(&program, "data", 0o600);
        assert_modes(&program, "other", 0o600);
        for file in ["copy.db", "all.ndjson", "events.ndjson.rejected"] {
            assert_eq!(mode(&program.path(file)), 0o600, "{file}");
        }
    }
}

/// A server that was installed before has files that everybody can read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_files_are_made_private() {
    let program = program();
    let serving = program.serve(&[]);
    serving.client.store(&event("pi")).await;
    serving.signal("KILL");
    serving.wait();
    let names = program.names_in("data");
    assert!(names.len() > 2, "{names:?}");
    for folder in ["data", "logs"] {
        for name in program.names_in(folder) {
            let path = program.path(folder).join(name);
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }
    }
    fs::write(program.path("data/notes.txt"), "").unwrap();
    fs::set_permissions(program.path("data"), fs::Permissions::from_mode(0o755)).unwrap();
    let serving = program.serve(&[]);
    let notes = program.path("data/notes.txt");
    let others = mode(&notes);
    fs::remove_file(&notes).unwrap();
    assert_modes(&program, "data", 0o600);
    assert_modes(&program, "logs", 0o640);
    // What is not ours stays as it was.
    assert_eq!((others & 0o044, mode(&program.path("data"))), (0o044, 0o755));
    serving.stop();
    let told = |line: &&Value| line["message"].as_str().unwrap().contains("its mode was 0644");
    assert_eq!(program.log("combined.log").iter().filter(told).count(), names.len());
}

/// Gives a folder with all that is in it to a user.
fn give(path: &Path, owner: u32) {
    lchown(path, Some(owner), Some(owner)).unwrap();
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give(&entry.unwrap().path(), owner);
        }
    }
}

/// Whatever root has done, the service's user can go on. Who is not root here is its own service.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_root_does_leaves_nothing_that_the_service_cannot_open() {
    let owner = if is_root() { 65_534 } else { fs::metadata("/proc/self").unwrap().uid() };
    let user = owner.to_string();
    let as_service = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let as_service = if is_root() { &as_service[..] } else { &["env"] };
    let mut root = program().with_file("events.ndjson", EVENTS);
    if is_root() {
        give(&root.path("."), owner);
    }
    let commands: [&[&str]; 10] = [
        &["migrate", "up"],
        &["key", "create", "--scope", "read"],
        &["import", "events.ndjson"],
        &["backup", "copy.db"],
        &["verify"],
        &["export", "--output", "all.ndjson"],
        &["restore", "copy.db", "--force"],
        &["migrate", "down", "2", "--yes"],
        &["restore", "copy.db"],
        &["copy", "--from", "sqlite:copy.db", "--to", "sqlite:data/pisync.db"],
    ];
    for command in commands {
        if ["copy", "restore"].contains(&command[0]) && !command.contains(&"--force") {
            // Where nothing is.
            fs::remove_dir_all(root.path("data")).unwrap();
        }
        // What a killed service has left is dealt with by the command.
        let ended = root.run(command);
        assert!([0, 3].contains(&ended.code()), "{ended:?}");
        for name in ["."].map(str::to_owned).into_iter().chain(root.names_in("data")) {
            let there = fs::metadata(root.path("data").join(&name)).unwrap();
            assert_eq!((there.uid(), there.gid()), (owner, owner), "{command:?}: {name}");
        }
        let service = root.run_by(as_service);
        let serving = service.serve(&[]);
        serving.client.store(&event("pi")).await;
        serving.signal("KILL");
        serving.wait();
        root = service.run_directly();
    }
}
