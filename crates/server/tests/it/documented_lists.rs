//! Lists that stand in a page and in the program, compared in both directions: endpoints and their parameters, error codes,
//! scopes and what each opens.

use std::{collections::BTreeSet, process::Command};

use pisync::store::Scope;
use serde_json::Value;

use crate::support::documents::{path, text};

fn document() -> Value {
    serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap()
}

/// Every operation of the document: its method, path and description.
fn operations(document: &Value) -> Vec<(String, &String, &Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    paths
        .flat_map(|(path, item)| item.as_object().unwrap().iter().map(move |one| (path, one)))
        .map(|(path, (method, operation))| (method.to_uppercase(), path, operation))
        .collect()
}

/// The cells of a page's table: of those rows that follow a heading with these words, up to its end.
fn table(page: &str, heading: &str) -> Vec<Vec<String>> {
    let text = text(page);
    let start = text.find(heading).unwrap_or_else(|| panic!("{page} has no {heading:?}"));
    let rows = text[start..].lines().skip_while(|line| !line.starts_with("| -")).skip(1);
    let rows: Vec<_> = rows
        .take_while(|line| line.starts_with("| "))
        .map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
        .collect();
    assert!(!rows.is_empty(), "{page} has no table behind {heading:?}");
    rows
}

/// What a cell names as code.
fn code(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The page of the API has every endpoint of the document with each of its query parameters, and no other.
#[test]
fn endpoints_and_their_parameters() {
    let document = document();
    let operations = operations(&document);
    let mut named = BTreeSet::new();
    for row in table("docs/api-design.md", "## Endpoints") {
        // `GET`, `POST /api/keys` names two, and so does `GET /health`, `/health/live`.
        let (mut methods, mut is_complete, mut in_row) = (Vec::new(), false, Vec::new());
        for name in code(&row[0]) {
            let (method, path) = match name.split_once(' ') {
                Some((method, path)) => (Some(method), Some(path)),
                None if name.starts_with('/') => (None, Some(name)),
                None => (Some(name), None),
            };
            if is_complete && method.is_some() {
                methods.clear();
            }
            methods.extend(method);
            is_complete = path.is_some();
            in_row
                .extend(path.iter().flat_map(|path| methods.iter().map(|method| (*method, *path))));
        }
        let of_row: Vec<_> = operations
            .iter()
            .filter(|(method, path, _)| in_row.contains(&(method.as_str(), path.as_str())))
            .collect();
        let read: BTreeSet<_> = of_row
            .iter()
            .flat_map(|(.., operation)| operation["parameters"].as_array().into_iter().flatten())
            .filter(|parameter| parameter["in"] == "query")
            .map(|parameter| parameter["name"].as_str().unwrap())
            .collect();
        // A header is no parameter.
        let listed = code(&row[1]).into_iter().filter(|name| *name != "Accept").collect();
        assert_eq!(read, listed, "{}", row[0]);
        named.extend(in_row.into_iter().map(|(method, path)| format!("{method} {path}")));
    }
    // The pages of the documentation are not in the document.
    named.retain(|name| !name.contains("/api-docs"));
    let served = operations.iter().map(|(method, path, _)| format!("{method} {path}")).collect();
    assert_eq!(named, served);
}

#[test]
fn error_codes() {
    let document = document();
    for (schema, heading) in
        [("ErrorCode", "## Error codes"), ("DetailCode", "Each of the `details` has a code")]
    {
        let table = table("docs/api-design.md", heading);
        let named: Vec<_> = table.iter().map(|row| row[0].trim_matches('`')).collect();
        let codes = document["components"]["schemas"][schema]["enum"].as_array().unwrap();
        let codes: BTreeSet<_> = codes.iter().map(|code| code.as_str().unwrap()).collect();
        assert_eq!(named.iter().copied().collect::<BTreeSet<_>>(), codes, "{schema}");
        assert_eq!(named.len(), codes.len(), "{schema}: a code is there twice");
    }
}

/// The pages list the scopes that there are, and the routes that a page names for a scope are those that need it.
#[test]
fn scopes_and_what_they_open() {
    let scopes: BTreeSet<_> = Scope::ALL.iter().map(|scope| scope.as_str()).collect();
    let rows = table("docs/security.md", "## Keys");
    for table in [table("docs/keys-and-tls.md", "## Keys"), rows.clone()] {
        let named: BTreeSet<_> = table.iter().map(|row| code(&row[0])[0].to_owned()).collect();
        assert_eq!(named.iter().map(String::as_str).collect::<BTreeSet<_>>(), scopes);
    }
    let document = document();
    let mut needed = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let security = operation["security"].as_array().unwrap();
        let Some(scope) = security[0]["key"][0].as_str() else {
            assert!(path.starts_with("/health"), "{method} {path} needs no key");
            continue;
        };
        needed.insert(scope);
        let row = rows.iter().find(|row| row[0] == format!("`{scope}`")).unwrap();
        let names_path = code(&row[1]).iter().any(|name| name.ends_with(path.as_str()));
        match scope {
            "ingest" => assert!(names_path && method == "POST", "{method} {path}"),
            // Everything that reads.
            "read" => assert_eq!(method, "GET", "{path}"),
            _ => {
                let changes_device = method != "GET" && path.starts_with("/api/device/");
                assert!(changes_device || names_path, "{method} {path} is not in {row:?}");
            }
        }
    }
    assert_eq!(needed, scopes);
    // What a row names needs that scope.
    for row in &rows {
        let scope = code(&row[0])[0];
        for name in code(&row[1]) {
            let path = name.trim_start_matches("POST ");
            let mut of_path = operations(&document).into_iter().filter(|(_, one, _)| *one == path);
            let needs = |operation: &Value| operation["security"][0]["key"][0] == scope;
            assert!(
                of_path.any(|(.., operation)| needs(operation)),
                "{scope} does not open {name}"
            );
        }
    }
}

/// The benchmarks are no part of the tests, so at least their grammar and the files that they name are checked.
#[test]
fn the_benchmarks_have_no_slips_and_are_documented() {
    let (mut scripts, mut named) = (0, 0);
    for entry in std::fs::read_dir(path("bench")).unwrap() {
        let file = entry.unwrap().path();
        let script = std::fs::read_to_string(&file).unwrap();
        if file.extension().is_none_or(|kind| kind == "sh") {
            let output = Command::new("bash").arg("-n").arg(&file).output().expect("bash");
            assert!(output.status.success(), "{output:?}");
            scripts += 1;
        }
        let words = script.split(|c: char| !c.is_ascii_alphanumeric() && !"/.-".contains(c));
        for word in words.map(|word| word.trim_end_matches('.')) {
            if word.starts_with("bench/") && word != "bench/" {
                assert!(path(word).exists(), "{} names {word}", file.display());
                named += 1;
            }
        }
    }
    assert!(scripts >= 5 && named > 20, "{scripts} scripts and {named} names of files were found");

    let run = text("bench/run");
    let page = text("docs/benchmarks.md");
    let options: Vec<_> = run
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--")?.split_once(") "))
        .collect();
    assert!(options.len() >= 6, "{options:?}");
    for (option, _) in options {
        assert!(run.contains(&format!("#   --{option} ")), "the usage does not explain --{option}");
        assert!(page.contains(&format!("--{option}")), "the page does not mention --{option}");
    }
}
