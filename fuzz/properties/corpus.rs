//! The kept inputs of a fuzz target, for the tests that replay them.

use std::{fs, path::Path};

/// Hands every input that is kept for `target` to its `check`.
pub(crate) fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&folder).expect("the corpus is a folder") {
        let path = entry.expect("the folder can be read").path();
        // Shown when the check fails.
        println!("{}", path.display());
        check(&fs::read(&path).expect("the input can be read"));
        inputs += 1;
    }
    assert!(inputs > 0, "{} is empty", folder.display());
}
