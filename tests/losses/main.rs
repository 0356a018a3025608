//! Situations in which a user could lose a file or a run: outputs that would replace files which
//! dylora did not write, and runs that are interrupted, killed or lose their terminal. The tests
//! run the binary.

mod damage;
mod earlier;
mod full;
mod history;
mod kills;
mod numbers;
mod overwrite;
mod runs;
#[path = "../common/signals.rs"]
mod signals;
mod vanish;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result};

/// A temporary folder with a copy of the demo's base in `base`.
#[derive(Debug)]
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        fs_err::create_dir(dir.path().join("base"))?;
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs_err::copy(demo().join("base").join(name), dir.path().join("base").join(name))?;
        }
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that runs the binary in one thread, with this folder as its working folder.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(arguments).current_dir(self.dir.path());
        command.env("DYLORA_CACHE", self.path("cache")).env("OMP_NUM_THREADS", "1");
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// The arguments that train two experts on two domains into `run` for `steps` steps.
    fn train(&self, steps: u64, saves_every: u64) -> Result<Vec<String>> {
        let config = include_str!("../../configs/lifecycle.toml");
        let config = config.replace("../demo/base", "base");
        let config = config.replace("../demo/data", &demo().join("data").display().to_string());
        fs_err::write(self.path("config.toml"), config)?;
        let sets = [
            "run.dir=run".to_owned(),
            "run.device=cpu".to_owned(),
            "run.tensorboard=false".to_owned(),
            format!("train.duration={{steps={steps}}}"),
            format!("train.checkpoint_every_steps={saves_every}"),
            "train.eval_every_steps=1000000".to_owned(),
            "train.micro_batch_size=1".to_owned(),
            "schedule.warmup_steps=1".to_owned(),
        ];
        let mut arguments = vec!["train".into(), "--config".into(), "config.toml".into()];
        arguments.extend(sets.into_iter().flat_map(|set| ["--set".to_owned(), set]));
        Ok(arguments)
    }
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo")
}

fn text(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).into_owned()
}

fn as_str(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The names and contents of all files and folders below `dir`. The content of a link is its
/// target.
fn contents(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = vec![];
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(&folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(dir)?.to_str().context("UTF-8")?.to_owned();
            if path.is_symlink() {
                let target = fs_err::read_link(&path)?;
                found.push((name, target.into_os_string().into_encoded_bytes()));
            } else if path.is_dir() {
                found.push((name, vec![]));
                folders.push(path);
            } else {
                found.push((name, fs_err::read(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}
