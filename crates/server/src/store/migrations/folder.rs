//! Reads the users' own migrations: a folder of pairs of files. `migrator` and `pisync migrate new` call it. It must
//! never overwrite a file.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use pisync_core::Timestamp;

use super::migration::{Migration, MigrationError, Source};

/// Creates an empty pair of files for a user's own migration and answers their paths.
///
/// # Errors
/// When the name contains characters other than letters, digits and hyphens, or a file cannot be created.
pub fn create_pair(
    folder: &Path,
    name: &str,
    now: Timestamp,
) -> Result<[PathBuf; 2], MigrationError> {
    let plain = |character: char| character.is_ascii_alphanumeric() || character == '-';
    if name.is_empty() || !name.chars().all(plain) {
        return Err(MigrationError::BadName(name.to_owned()));
    }
    let date = &now.to_string()[..10];
    let taken = read_folder(folder)?;
    let number = (1..100)
        .map(|number| format!("{date}-{number:02}-"))
        .find(|prefix| !taken.iter().any(|migration| migration.name.starts_with(prefix)))
        .ok_or_else(|| MigrationError::BadFile(format!("99 migrations on {date} are enough")))?;
    let cannot = |path: &Path, error: std::io::Error| {
        MigrationError::BadFile(format!("cannot create {}: {error}", path.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| cannot(folder, error))?;
    let files = [
        (format!("{number}{name}.up.sql"), "-- What this migration changes.\n"),
        (
            format!("{number}{name}.down.sql"),
            "-- Rolls it back. If that loses data, say what, in a line of this form:\n-- loses: nothing\n",
        ),
    ];
    let mut paths = [PathBuf::new(), PathBuf::new()];
    for (path, (file, text)) in paths.iter_mut().zip(files) {
        *path = folder.join(file);
        // Fails if something is there already, even a symbolic link.
        std::fs::File::create_new(&*path)
            .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|error| cannot(path, error))?;
    }
    Ok(paths)
}

/// The users' migrations in `folder`, by name; none when the folder does not exist.
pub(super) fn read_folder(folder: &Path) -> Result<Vec<Migration>, MigrationError> {
    let bad = |path: &Path, why: &dyn std::fmt::Display| {
        MigrationError::BadFile(format!("{}: {why}", path.display()))
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(bad(folder, &error)),
    };
    // The text of each direction, by name.
    let mut texts: BTreeMap<String, HashMap<&'static str, String>> = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|error| bad(folder, &error))?.path();
        let Some(file) = path.file_name().and_then(|file| file.to_str()) else { continue };
        // The folder may contain other files, such as a README.
        if !file.ends_with(".sql") {
            continue;
        }
        let Some((name, direction)) = parse_file_name(file) else {
            return Err(bad(
                &path,
                &"not named like a migration: YYYY-MM-DD-NN-name.up.sql or .down.sql",
            ));
        };
        let text = std::fs::read_to_string(&path).map_err(|error| bad(&path, &error))?;
        texts.entry(name.to_owned()).or_default().insert(direction, text);
    }
    texts
        .into_iter()
        .map(|(name, mut directions)| {
            let mut take = |direction: &str| {
                directions.remove(direction).ok_or_else(|| {
                    bad(&folder.join(&name), &format!("{name}.{direction}.sql is missing"))
                })
            };
            let (up, down) = (take("up")?, take("down")?);
            Ok(Migration { name, source: Source::User, up, down })
        })
        .collect()
}

/// Splits `YYYY-MM-DD-NN-name.up.sql` into name and direction.
fn parse_file_name(file: &str) -> Option<(&str, &'static str)> {
    let (name, direction) = match file.strip_suffix(".up.sql") {
        Some(name) => (name, "up"),
        None => (file.strip_suffix(".down.sql")?, "down"),
    };
    let form = "0000-00-00-00-";
    let fits = name.len() > form.len()
        && form.bytes().zip(name.bytes()).all(|(form, byte)| match form {
            b'0' => byte.is_ascii_digit(),
            other => byte == other,
        });
    fits.then_some((name, direction))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names() {
        assert_eq!(parse_file_name("2026-11-22-01-a-b.up.sql"), Some(("2026-11-22-01-a-b", "up")));
        for file in
            ["x.up.sql", "2026-11-22-01-.up.sql", "2026-11-22-x1-a.up.sql", "2026-11-22-01-a.sql"]
        {
            assert_eq!(parse_file_name(file), None, "{file}");
        }
    }
}
