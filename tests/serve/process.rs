//! `dylora serve` as a process: its arguments, its texts beside those of `dylora generate`, and
//! its end by a signal.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result};
use clap::Parser;
use dylora::cli::{Cli, report};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::client::{Client, text_of};

const PROMPTS: [&str; 3] = ["How much remains?\n", "fn main", "SCENE."];

fn dylora(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(arguments).env("OMP_NUM_THREADS", "1").env_remove("DYLORA_API_KEY");
    command
}

/// A server that is killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server at a free port, and a client for it.
fn start(arguments: &[&str], key: &'static str) -> Result<(Process, Client)> {
    let mut command =
        dylora(&[&["-q", "serve", "--port", "0", "--device", "cpu"], arguments].concat());
    command.env("DYLORA_API_KEY", key).stdout(Stdio::piped());
    let mut process = Process(command.spawn()?);
    let mut line = String::new();
    BufReader::new(process.0.stdout.take().context("a pipe")?).read_line(&mut line)?;
    let address = line.trim().strip_prefix("http://").context("an address")?.parse()?;
    Ok((process, Client::new(address).with_key(key)))
}

#[test]
fn a_run_is_served_with_the_texts_that_generate_prints() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = folder.path().join("demo-run");
    let run = run.to_str().context("UTF-8")?;
    let dir = format!("run.dir={run}");
    let set = ["--set", &dir, "--set", "train.duration={steps=2}", "--set", "run.device=cpu"];
    let train = [&["-q", "train", "--config", "configs/moe.toml"][..], &set[..]].concat();
    let cache = folder.path().join("cache");
    assert!(dylora(&train).env("DYLORA_CACHE", cache).stdout(Stdio::null()).status()?.success());
    let generate = [
        &["generate", "--checkpoint", run, "--json", "--max-new-tokens", "12", "--device=cpu"][..],
        &["--temperature", "0.7", "--seed", "3"],
        &PROMPTS.map(|prompt| ["--prompt", prompt]).concat(),
    ];
    let printed = dylora(&generate.concat()).output()?;
    let printed = String::from_utf8(printed.stdout)?;
    let lines: Vec<Value> = printed.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(lines.len(), 3, "{printed}");

    let (mut process, client) = start(&["--checkpoint", run], "secret")?;
    let list = client.get("/v1/models")?.json()?;
    let names: Vec<&Value> =
        list["data"].as_array().context("a list")?.iter().map(|model| &model["id"]).collect();
    let parts = ["", ":arithmetic", ":code", ":data2text", ":verse", ":base"];
    assert_eq!(names, parts.map(|part| json!(format!("demo-run{part}"))).each_ref());
    let mut ask = json!({
        "model": "demo-run", "prompt": PROMPTS, "max_tokens": 12, "temperature": 0.7, "seed": 3,
    });
    let answer = client.ask("/v1/completions", &ask)?;
    for (index, line) in lines.iter().enumerate() {
        assert_eq!(answer["choices"][index]["text"], line["text"], "{line}");
    }

    ask["stream"] = true.into();
    ask["max_tokens"] = 200.into();
    ask["temperature"] = 0.into();
    let running = {
        let client = client.clone();
        thread::spawn(move || client.stream("/v1/completions", &ask))
    };
    client.wait_for("dylora_texts_active", |count| count > 0.0)?;
    let pid = Pid::from_child(&process.0);
    kill_process(pid, Signal::TERM)?;
    let chunks = running.join().expect("the client does not panic")?;
    assert!(text_of(&chunks, 0).len() > 12);
    assert_eq!(process.0.wait()?.code(), Some(0));
    Ok(())
}

/// The message and the exit code of arguments that are refused before a model is opened.
fn refused(arguments: &[&str]) -> (String, u8) {
    let base = ["dylora", "serve", "--base", "demo/base"];
    let cli = Cli::try_parse_from([&base[..], arguments].concat()).expect("clap accepts them");
    report(&cli.run().expect_err("it is refused"))
}

#[test]
fn arguments_that_make_no_sense_are_refused() -> Result<()> {
    let empty = tempfile::NamedTempFile::new()?;
    let empty = empty.path().to_str().context("UTF-8")?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let cases: [(&[&str], &str, u8); 8] = [
        (&["--host", "0.0.0.0"], "others can reach `0.0.0.0`, but there is no key", 2),
        (&["--host", "no.such.host.invalid"], "`--host no.such.host.invalid` is no address", 2),
        (&["--api-key-file", empty], "holds no key", 2),
        (&["--api-key-file", "no-such-file"], "cannot read the keys", 1),
        (&["--max-batch", "0"], "`--max-batch` must be at least 1, got 0", 2),
        (&["--device", "cpu", "--context", "257"], "the base has 256 positions, so a context", 2),
        (&["--device", "cpu", "--model-name", ""], "`--model-name` must not be empty", 2),
        (&["--device", "cpu", "--port", &port], "cannot listen on `127.0.0.1:", 1),
    ];
    for (arguments, message, code) in cases {
        let (said, exit) = refused(arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
        assert_eq!(exit, code, "{said}");
    }
    Ok(())
}
