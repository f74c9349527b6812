//! The `pisync` program. All code is in the library.

fn main() -> std::process::ExitCode {
    pisync::cli::main()
}
