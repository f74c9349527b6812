//! `pisync health`: 0 when the server of the configuration can serve, 1 when not.

use axum::{Router, http::StatusCode, routing::get};
use tokio::net::TcpListener;

use crate::support::{
    program::{Installed, Program},
    server::unused_address,
};

both_stores!(a_server_that_can_serve_and_one_that_cannot);

async fn a_server_that_can_serve_and_one_that_cannot(installed: &Installed) {
    let Installed { program, database } = installed;
    let serving = program.serve(&[]);
    let port = serving.address().port().to_string();
    let health = || program.run(&["health", "--port", &port]);
    assert_eq!(health().success(), format!("ready: http://127.0.0.1:{port}\n"));
    database.execute("alter table devices rename to elsewhere").await;
    let said = health();
    assert!(said.failure().contains("cannot serve: its database is away"), "{said:?}");
    database.execute("alter table elsewhere rename to devices").await;
    health().success();
    serving.stop();
    let said = health();
    assert!(said.failure().starts_with("no server answers at http://127.0.0.1:"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_interface_is_this_machine_too() {
    let program = Program::new().with("HOST", "0.0.0.0").with("AUTH", "off");
    let port = unused_address().port();
    let program = program.with("PORT", port);
    let serving = program.serve(&[]);
    assert_eq!(program.run(&["health"]).success(), format!("ready: http://127.0.0.1:{port}\n"));
    serving.stop();
}

/// Neither another program nor another certificate is taken for the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_pisync_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let router = Router::new().route("/health/ready", get(|| async { (StatusCode::OK, "fine") }));
    let other = tokio::spawn(async move { axum::serve(listener, router).await });
    let program = Program::new();
    let run = |program: Program, port: String| {
        tokio::task::spawn_blocking(move || {
            let ended = program.run(&["health", "--port", &port]);
            (program, ended)
        })
    };
    let (_, said) = run(program, port).await.unwrap();
    assert!(said.failure().contains("is not PiSync: it answers 200"), "{said:?}");
    other.abort();

    let program = Program::new();
    for name in ["own", "other"] {
        let made = rcgen::generate_simple_self_signed(vec!["pisync.example".to_owned()]).unwrap();
        std::fs::write(program.path(&format!("{name}.pem")), made.cert.pem()).unwrap();
        std::fs::write(program.path(&format!("{name}.key")), made.signing_key.serialize_pem())
            .unwrap();
    }
    let program = program.with("PORT", unused_address().port()).with("LOG_DIR", "none");
    let serving = program.serve(&["--tls-cert", "own.pem", "--tls-key", "own.key"]);
    let health = |certificate: &str| program.run(&["health", "--tls-cert", certificate]);
    let ready = format!("ready: https://127.0.0.1:{}\n", serving.address().port());
    // Whatever name it is for.
    assert_eq!(health("own.pem").success(), ready);
    assert!(health("other.pem").failure().contains("is not PiSync: TLS: "));
    assert!(health("none.pem").failure().starts_with("cannot read TLS_CERT none.pem: "));
    assert!(program.run(&["health"]).failure().contains("is not PiSync"));
    serving.stop();
}
