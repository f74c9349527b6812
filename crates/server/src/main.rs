//! The `pisync` program; everything is in the library.

/// Requests allocate a good deal; see docs/benchmarks.md for what this one saves.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    pisync::cli::main()
}
