//! The layout of `store/` as docs/architecture.md describes it: modules depend on each other one way, and a trait serves
//! one resource. Read from the sources, as a reader would.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A module by the names on its path below `store`.
type Module = Vec<String>;

/// The text of `store`'s modules, without comments, strings and tests, and what each imports.
struct Sources {
    text: BTreeMap<Module, String>,
    /// By module, what it imports: whether it is handed on (`pub use`), and the path.
    imports: BTreeMap<Module, Vec<(bool, String)>>,
}

impl Sources {
    fn of_store() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store");
        let mut text = BTreeMap::new();
        read(&root, &mut Vec::new(), &mut text);
        let imports = text.iter().map(|(module, text)| (module.clone(), imports(text))).collect();
        Self { text, imports }
    }

    /// The module in which `path` ends, read in `module`; `None` outside `store`.
    fn resolve(&self, module: &Module, path: &str) -> Option<Module> {
        let mut at = module.clone();
        let mut names = path.split("::").peekable();
        match *names.peek()? {
            "crate" => {
                if names.nth(1) != Some("store") {
                    return None;
                }
                at.clear();
            }
            "self" => drop(names.next()),
            "super" => {
                while names.next_if_eq(&"super").is_some() {
                    at.pop()?;
                }
            }
            child => {
                self.text.get(&[&at[..], &[child.to_owned()]].concat())?;
            }
        }
        while let Some(name) = names.next() {
            let child = [&at[..], &[name.to_owned()]].concat();
            if self.text.contains_key(&child) {
                at = child;
            } else if let Some((_, handed_on)) =
                self.imports[&at].iter().find(|(is_public, path)| *is_public && last(path) == name)
            {
                let rest: String = names.map(|name| format!("::{name}")).collect();
                return self.resolve(&at, &format!("{handed_on}{rest}"));
            } else {
                break;
            }
        }
        Some(at)
    }

    /// The modules that `module` uses, apart from those whose items it only hands on.
    fn dependencies(&self, module: &Module) -> BTreeSet<Module> {
        let imports = &self.imports[module];
        let mut names: BTreeMap<&str, Module> = BTreeMap::new();
        let mut found = BTreeSet::new();
        for (is_public, path) in imports {
            let Some(used) = self.resolve(module, path) else { continue };
            if used.last().is_some_and(|name| name == last(path)) {
                names.insert(last(path), used.clone());
            }
            if !is_public {
                found.insert(used);
            }
        }
        for path in paths(&self.text[module]) {
            let (first, rest) = path.split_once("::").unwrap_or((&path, ""));
            let used = match names.get(first) {
                Some(imported) => self.resolve(imported, &format!("self::{rest}")),
                None => self.resolve(module, &path),
            };
            found.extend(used);
        }
        found.remove(module);
        found
    }
}

fn last(path: &str) -> &str {
    path.rsplit("::").next().unwrap_or(path)
}

fn read(folder: &Path, module: &mut Module, text: &mut BTreeMap<Module, String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(name);
            read(&path, module, text);
            module.pop();
        } else if name != "tests" {
            let source = plain(&std::fs::read_to_string(&path).unwrap());
            let mut of_file = module.clone();
            of_file.extend((name != "mod").then_some(name));
            text.insert(of_file, source);
        }
    }
}

/// A source without comments, strings and its tests, which stand at the end.
fn plain(source: &str) -> String {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let mut plain = String::new();
    let mut rest = source;
    while let Some(character) = rest.chars().next() {
        let raw = rest.strip_prefix('r').map(|raw| raw.trim_start_matches('#'));
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(raw) = raw.filter(|raw| raw.starts_with('"') && !ends_in_word(&plain)) {
            let hashes = rest.len() - 1 - raw.len();
            let end = format!("\"{}", "#".repeat(hashes));
            1 + hashes + 1 + raw[1..].find(&end).unwrap() + end.len()
        } else if character == '"' {
            let mut is_escaped = false;
            let end = rest[1..].find(|character| {
                let ends = character == '"' && !is_escaped;
                is_escaped = character == '\\' && !is_escaped;
                ends
            });
            end.unwrap() + 2
        } else if rest.starts_with("'\\") {
            rest[3..].find('\'').unwrap() + 4
        } else if character == '\'' && rest.chars().nth(2) == Some('\'') {
            rest.char_indices().nth(3).map_or(rest.len(), |(at, _)| at)
        } else {
            plain.push(character);
            character.len_utf8()
        };
        rest = &rest[skipped..];
    }
    plain
}

fn ends_in_word(text: &str) -> bool {
    text.ends_with(|character: char| character.is_alphanumeric() || character == '_')
}

/// The paths that `use` names, each with whether it is handed on.
fn imports(text: &str) -> Vec<(bool, String)> {
    let mut found = Vec::new();
    for item in text.split(';') {
        let Some((before, tree)) = item.rsplit_once("use ") else { continue };
        let before = before.rsplit(['\n', '}', '{']).next().unwrap_or_default().trim();
        if before.is_empty() || before.starts_with("pub") && !before.contains("fn ") {
            let tree: String = tree.split_whitespace().collect::<Vec<_>>().join(" ");
            let mut paths = Vec::new();
            expand("", &tree, &mut paths);
            found.extend(paths.into_iter().map(|path| (before.starts_with("pub"), path)));
        }
    }
    found
}

/// The paths of a tree such as `a::{b, c::{d, e}}`.
fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some((path, inner)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree);
        paths.extend((!path.is_empty()).then(|| format!("{prefix}{path}")));
        return;
    };
    let (prefix, mut depth, mut begin) = (format!("{prefix}{path}"), 0, 0);
    let inner = inner.trim_end().strip_suffix('}').unwrap();
    for (at, character) in inner.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &inner[begin..at], paths);
                begin = at + 1;
            }
            _ => {}
        }
    }
    expand(&prefix, &inner[begin..], paths);
}

/// The paths with `::` in code outside of `use`.
fn paths(text: &str) -> Vec<String> {
    let without_imports: Vec<_> = text
        .split(';')
        .map(|item| item.rsplit_once("use ").map_or(item, |(before, _)| before))
        .collect();
    without_imports
        .join(";")
        .replace("pub(in ", "pub(")
        .split(|character: char| !(character.is_alphanumeric() || "_:".contains(character)))
        .filter(|path| path.contains("::") && !path.starts_with(':'))
        .filter(|path| path.trim_end_matches("::").split("::").any(|name| name != "super"))
        .map(|path| path.trim_end_matches(':').to_owned())
        .collect()
}

/// The modules from which each can be reached that comes after.
fn cycle(
    at: &Module,
    dependencies: &BTreeMap<Module, BTreeSet<Module>>,
    way: &mut Vec<Module>,
    done: &mut BTreeSet<Module>,
) -> Option<Vec<Module>> {
    if let Some(begin) = way.iter().position(|module| module == at) {
        return Some(way[begin..].to_vec());
    }
    if !done.insert(at.clone()) {
        return None;
    }
    way.push(at.clone());
    // A module may be split: those within it may use what it declares.
    let is_within = |next: &&Module| at.len() > next.len() && at.starts_with(next);
    let next = dependencies[at].iter().filter(|next| !is_within(next));
    let found = next.into_iter().find_map(|next| cycle(next, dependencies, way, done));
    way.pop();
    found
}

#[test]
fn modules_of_the_store_depend_on_each_other_one_way() {
    let sources = Sources::of_store();
    let dependencies: BTreeMap<_, _> =
        sources.text.keys().map(|module| (module.clone(), sources.dependencies(module))).collect();
    // What is read is what is meant.
    let module = |path: &str| -> Module { path.split("::").map(str::to_owned).collect() };
    for (from, to) in [
        ("copy::run", "sqlite::copy"),
        ("sqlite::copy", "copy::tables"),
        ("sqlite::apply", "sqlite::write_connection"),
        ("sqlite::write_connection", "sqlite::ingest_buffer"),
        ("migrations::migrator", "postgres::migrations"),
        ("sqlite::devices", "devices"),
    ] {
        assert!(dependencies[&module(from)].contains(&module(to)), "{from}: {dependencies:?}");
    }
    let mut done = BTreeSet::new();
    for module in dependencies.keys() {
        let found = cycle(module, &dependencies, &mut Vec::new(), &mut done);
        let found = found.map(|way| way.iter().map(|path| path.join("::")).collect::<Vec<_>>());
        assert_eq!(found, None, "these modules use each other in a circle");
    }
}

#[test]
fn a_trait_of_the_store_has_fewer_than_fifteen_methods() {
    let mut traits = 0;
    for (module, text) in &Sources::of_store().text {
        for found in text.split("pub trait ").skip(1) {
            let end = found.find("\n}").unwrap_or(found.len());
            let methods = found[..end].matches(" fn ").count();
            let name = found.split([':', ' ', '{']).next().unwrap();
            assert!(methods < 15, "{}::{name} has {methods} methods", module.join("::"));
            traits += 1;
        }
    }
    assert!(traits > 10, "{traits} traits were found");
}

/// Words that PiSync once had for what the field calls otherwise. Columns keep theirs, in quotation marks.
const WORDS_OF_BEFORE: &str = r"(?i)\b(bells?|desks?|news|careful(ly)?|lumps?|settles?|settled|unsettled|intakes?|heeds?|namesakes?|horizons?|folds|folded|folding|sent off|(keep|keeps|kept) aside|gives?[ _]way|left_out|forth and back|taken back)\b";

#[test]
fn code_uses_the_terms_of_the_field() {
    let words = regex_lite::Regex::new(WORDS_OF_BEFORE).unwrap();
    let quoted = regex_lite::Regex::new("\"[^\"]*\"|`[^`]*`").unwrap();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders = vec![crates.to_owned()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let source = std::fs::read_to_string(&path).unwrap();
                for (line, text) in source.lines().enumerate() {
                    let found = words
                        .find(&quoted.replace_all(text, ""))
                        .map(|found| found.as_str().to_owned());
                    assert_eq!(found, None, "{}:{}: {text}", path.display(), line + 1);
                }
                files += 1;
            }
        }
    }
    assert!(files > 250, "{files} files were read");
}
