//! Files that were damaged or changed, and numbers that nobody means: each is refused, and the
//! message names it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::runs::full_device;
use crate::{Scene, as_str, demo, text};

/// A scene with a run of two steps.
fn trained() -> Result<Scene> {
    let scene = Scene::new()?;
    let output = scene.run(&as_str(&scene.train(2, 1)?))?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(scene)
}

/// Runs a command that must fail with `code` and a message with each of `parts`.
fn refused(scene: &Scene, arguments: &[&str], code: i32, parts: &[&str]) -> Result<()> {
    let output = scene.run(arguments)?;
    let message = text(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{arguments:?}: `{part}` is not in: {message}");
    }
    Ok(())
}

/// Calls `check` while a file has the bytes that `change` makes of its own.
fn changed(
    file: &Path,
    change: impl FnOnce(Vec<u8>) -> Vec<u8>,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let bytes = fs_err::read(file)?;
    fs_err::write(file, change(bytes.clone()))?;
    check()?;
    Ok(fs_err::write(file, bytes)?)
}

fn flip(mut bytes: Vec<u8>) -> Vec<u8> {
    *bytes.last_mut().expect("it is not empty") ^= 1;
    bytes
}

fn replace(from: &str, to: &str) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    let (from, to) = (from.to_owned(), to.to_owned());
    move |bytes| {
        let text = String::from_utf8(bytes).expect("it is a text");
        assert!(text.contains(&from), "{text}");
        text.replace(&from, &to).into_bytes()
    }
}

/// The environment variable that tells the next test's child process which file to map.
const MAPPED: &str = "DYLORA_TEST_MAPS";
