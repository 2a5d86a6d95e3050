//! Compiles the C library, and what the layout test asks C about it.
//!
//! Needs a C11 compiler and an archiver: `$CC` or `cc`, `$AR` or `ar`, with `$CFLAGS`. Each of the
//! three may also be set for one target alone, `CC_aarch64_unknown_linux_gnu` for instance. Neither
//! CUDA nor a GPU is needed: libcuda is opened at run time.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FLAGS: [&str; 8] = [
    "-std=c11",
    "-O2",
    "-ffp-contract=off", // the dispatch model rounds as Python does
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Iinclude",
    "-Isrc",
];

fn main() {
    if env::var_os("CARGO_CFG_UNIX").is_none() {
        panic!("gqa-attention-decode: target: got one without dlopen; needed: Linux");
    }
    let sources: Vec<PathBuf> = fs::read_dir("src")
        .expect("gqa-attention-decode: src, where the C sources are, can be read")
        .map(|entry| entry.expect("an entry of src").path())
        .filter(|path| path.extension() == Some(OsStr::new("c")))
        .collect();
    archive("gqa_attention_decode", &sources);
    archive("gqa_layout", &[PathBuf::from("rust/tests/layout.c")]);
    println!("cargo:rustc-link-search=native={}", out_dir().display());
    for library in ["static=gqa_attention_decode", "dl", "pthread", "m"] {
        println!("cargo:rustc-link-lib={library}");
    }
    for watched in ["build.rs", "include", "src", "rust/tests/layout.c"] {
        println!("cargo:rerun-if-changed={watched}");
    }
}

fn out_dir() -> PathBuf {
    PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"))
}

/// Compiles sources into a static library.
fn archive(name: &str, sources: &[PathBuf]) {
    let library = out_dir().join(format!("lib{name}.a"));
    let objects: Vec<PathBuf> = sources.iter().map(|source| compile(source)).collect();
    let _ = fs::remove_file(&library); // it may hold objects that are no longer wanted
    let ar = words("AR", "ar");
    run(
        "AR",
        &ar,
        Command::new(&ar[0])
            .args(&ar[1..])
            .arg("crs")
            .arg(library)
            .args(objects),
    );
}

fn compile(source: &Path) -> PathBuf {
    let object = out_dir().join(
        source
            .with_extension("o")
            .file_name()
            .expect("a file's name"),
    );
    let cc = words("CC", "cc");
    let mut command = Command::new(&cc[0]);
    command.args(&cc[1..]).args(FLAGS).args(words("CFLAGS", ""));
    run(
        "CC",
        &cc,
        command.arg("-c").arg(source).arg("-o").arg(&object),
    );
    object
}

/// The words of an environment variable; the one for this target alone goes first.
fn words(variable: &str, otherwise: &str) -> Vec<String> {
    let target = env::var("TARGET")
        .expect("cargo sets TARGET")
        .replace('-', "_");
    let names = [format!("{variable}_{target}"), variable.to_string()];
    for name in &names {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let set = names
        .iter()
        .find_map(|name| env::var(name).ok().filter(|it| !it.trim().is_empty()));
    let value = set.unwrap_or_else(|| otherwise.to_string());
    value.split_whitespace().map(str::to_string).collect()
}

fn run(variable: &str, program: &[String], command: &mut Command) {
    let name = program.join(" ");
    match command.status() {
        Ok(status) if status.success() => (),
        Ok(status) => panic!("gqa-attention-decode: {name}: {status}; its messages are above"),
        Err(error) => panic!(
            "gqa-attention-decode: {name}: {error}; needed: a C11 compiler and an archiver. Install \
             them (Debian, Ubuntu: apt install build-essential), or name one in ${variable}."
        ),
    }
}
