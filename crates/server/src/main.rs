//! The `pisync` program; everything is in the library.

fn main() -> std::process::ExitCode {
    pisync::cli::main()
}
