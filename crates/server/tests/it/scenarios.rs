//! What a fleet does, and which states and incidents come of it: each file in `tests/scenarios` is run by the backtest on both
//! stores, and must end exactly as it says.

use std::{fs, path::PathBuf, sync::Arc};

use pisync::backtest::{self, Scenario};

use crate::support::store::TestDatabase;

/// How many tests share the scenarios.
const SHARES: usize = 3;

pub(crate) fn scenarios() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios");
    let mut files: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 18, "{files:?}");
    files
}

/// Runs every third scenario, and tells all differences at once.
async fn run(share: usize, is_postgres: bool) {
    let mut differences = Vec::new();
    for file in scenarios().into_iter().skip(share).step_by(SHARES) {
        let scenario = Scenario::read(&fs::read(&file).unwrap()).unwrap();
        let database =
            if is_postgres { TestDatabase::postgres().await } else { TestDatabase::sqlite() };
        database.migrate().await;
        let store: Arc<_> = pisync::store::open(&database.target).await.unwrap();
        match backtest::run(&scenario, &store, |_| {}).await {
            Ok(came) => differences.extend(
                scenario
                    .expect
                    .differences(&came)
                    .into_iter()
                    .map(|difference| format!("{}: {difference}", scenario.id)),
            ),
            Err(error) => differences.push(format!("{}: {error}", scenario.id)),
        }
        store.close().await.unwrap();
        drop(store);
        database.remove().await;
    }
    assert!(differences.is_empty(), "\n{}", differences.join("\n"));
}

macro_rules! shares {
    ($($name:ident: $share:literal),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::run($share, false).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    super::run($share, true).await;
                }
            )+
        }
    };
}

shares!(the_first_share: 0, the_second_share: 1, the_third_share: 2);
