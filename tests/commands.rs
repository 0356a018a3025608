//! The binary as a user runs it: exit codes, messages, and the figures that commands print.

use std::process::{Command, Output};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Runs the binary on the CPU, with a token cache of its own and one thread. With two threads,
/// models this small run many times slower if other processes use the cores as well.
fn dylora(cache: &tempfile::TempDir, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(arguments).env("DYLORA_CACHE", cache.path()).env("OMP_NUM_THREADS", "1");
    Ok(command.output()?)
}

fn json(output: &Output) -> Result<Value> {
    let text = String::from_utf8(output.stdout.clone())?;
    serde_json::from_str(&text)
        .with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_version_names_libtorch_and_says_whether_there_is_cuda() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let output = dylora(&cache, &["--version"])?;
    let text = String::from_utf8(output.stdout)?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], concat!("dylora ", env!("CARGO_PKG_VERSION")));
    assert_eq!(lines[1], "libtorch 2.11.0");
    assert!(lines[2].starts_with("CUDA no: ") || lines[2].starts_with("CUDA yes, "), "{text}");
    Ok(())
}

#[test]
fn faults_of_usage_and_config_exit_with_2_and_others_with_1() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let code = |arguments: &[&str]| -> Result<(Option<i32>, String)> {
        let output = dylora(&cache, arguments)?;
        Ok((output.status.code(), stderr(&output)))
    };
    let (exit, message) = code(&["train", "--config", "no.toml"])?;
    assert_eq!(exit, Some(2), "{message}");
    assert!(message.starts_with("error: cannot read the config: "), "{message}");
    let set = ["--set", "lora.rank=0", "--set", "train.micro_batch_size=0"];
    let (exit, message) = code(&[&["train", "--config", "configs/moe.toml"], &set[..]].concat())?;
    assert_eq!(exit, Some(2), "{message}");
    assert!(message.contains("`lora.rank` must be at least 1, got 0\n`train.micro_batch_size`"));
    let long = ["train", "--config", "configs/moe.toml", "--set", "data.seq_len=512"];
    let (exit, message) = code(&long)?;
    assert_eq!(exit, Some(2), "{message}");
    assert!(message.contains("at most the base's 256 positions, got 512"), "{message}");
    for (fault, said) in [
        ("{rank_pattern={\"h.7.attn.c_attn\"=4}}", "`h.7.attn.c_attn`, but the base has 4 layers"),
        ("{init=\"pissa\",rank=300}", "`h.0.attn.c_attn` has 128, fewer than the rank 300"),
        ("{alora_invocation_tokens=[99999]}", "`alora_invocation_tokens` has 99999, which is not"),
    ] {
        let set = format!("lora.experts=[{{}},{fault}]");
        let (exit, message) = {
            let even = ["--set", "lora.capacity=even", "--set", &set];
            code(&[&["train", "--config", "configs/moe.toml"][..], &even].concat())?
        };
        assert_eq!(exit, Some(2), "{message}");
        assert!(message.starts_with("error: expert 1 of `lora`: "), "{message}");
        assert!(message.contains(said), "{message}");
    }
    let merge = ["merge", "--base", "demo/base", "--out"];
    let (exit, message) =
        code(&[&merge[..], &["x", "--as=adapter", "--save-dtype=bf16"]].concat())?;
    assert_eq!(exit, Some(2), "{message}");
    assert!(message.contains("`--save-dtype` is for `--as base`"), "{message}");
    // this is found before the base is opened
    let (exit, message) = code(&[&merge[..], &["demo"]].concat())?;
    assert_eq!(exit, Some(1), "{message}");
    assert!(message.contains("`demo` is there already"), "{message}");
    assert_eq!(code(&["trace", "--base", "demo/base", "--tokens", "99999"])?.0, Some(2));
    let bad = cache.path().join("bad.jsonl");
    fs_err::write(&bad, "{\"text\": \"fine\"}\n{\"prompt\": \"no completion\"}\n")?;
    let data = format!("verse={}", bad.display());
    let (exit, message) = code(&["eval", "--base", "demo/base", "--data", &data])?;
    assert_eq!(exit, Some(1), "{message}");
    assert!(message.contains("bad.jsonl:2"), "{message}");
    let (exit, message) = code(&["eval", "--checkpoint", "demo"])?;
    assert_eq!(exit, Some(1));
    assert!(message.contains("`demo` holds no checkpoint"), "{message}");
    Ok(())
}

/// Reference: closed forms for 4 blocks of width d = 128, all four linear layers, E = 4, r = 8 and
/// a router for each layer.
#[test]
fn a_dry_run_counts_parameters_and_data_and_writes_nothing() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let run = cache.path().join("run");
    let dir = format!("run.dir={}", run.display());
    let arguments =
        ["train", "--config", "configs/moe.toml", "--dry-run", "--json", "--set", dir.as_str()];
    let json = json(&dylora(&cache, &arguments)?)?;
    let d = 128;
    let base = 2048 * d + 256 * d + 4 * (12 * d * d + 13 * d) + 2 * d;
    let parameters = &json["parameters"];
    assert_eq!(parameters["base"], base);
    assert_eq!(parameters["lora_a"], 4 * 4 * 8 * (3 * d + 4 * d));
    assert_eq!(parameters["lora_b"], 4 * 4 * 8 * (3 * d + d + 4 * d + d));
    assert_eq!(parameters["router"], 4 * 4 * (d + 1));
    let domains = json["train"].as_array().context("a list")?;
    let names: Vec<&str> = domains.iter().filter_map(|domain| domain["name"].as_str()).collect();
    assert_eq!(names, ["arithmetic", "code", "data2text", "verse"]);
    for domain in domains {
        let counts = &domain["counts"];
        assert_eq!(counts["records"], 500);
        assert_eq!(counts["documents"], 500);
        assert!(counts["label_tokens"].as_u64() > Some(10_000), "{counts}");
    }
    assert_eq!(json["config"]["optimizer"]["betas"], serde_json::json!([0.9, 0.999]));
    assert!(!run.exists());
    Ok(())
}

#[test]
fn a_run_is_trained_evaluated_traced_and_exported() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let run = cache.path().join("run");
    let (run, export) = (run.to_str().context("UTF-8")?, cache.path().join("export"));
    let dir = format!("run.dir={run}");
    let steps = ["--set", "train.duration={steps=2}", "--set", "run.device=cpu"];
    let train = [&["train", "--config", "configs/moe.toml", "--json", "--set", &dir], &steps[..]];
    let trained = json(&dylora(&cache, &train.concat())?)?;
    assert_eq!((&trained["ending"], &trained["step"]), (&"completed".into(), &2.into()));
    let longer = ["--resume", "--set", "train.duration={steps=3}"];
    let trained = json(&dylora(&cache, &[&train.concat()[..], &longer[..]].concat())?)?;
    assert_eq!((&trained["ending"], &trained["step"]), (&"completed".into(), &3.into()));

    let report = json(&dylora(&cache, &["eval", "--checkpoint", run, "--json"])?)?;
    let overall = report["loss"].as_f64().context("a number")?;
    assert!((overall - trained["best"]["loss"].as_f64().context("a number")?).abs() < 1e-6);
    for domain in report["domains"].as_array().context("a list")? {
        let weights = domain["routing"]["mean_routing_weights"].as_array().context("a list")?;
        let sum: f64 = weights.iter().filter_map(Value::as_f64).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{domain}");
    }

    let trace =
        json(&dylora(&cache, &["trace", "--checkpoint", run, "--text", "fn main", "--json"])?)?;
    assert_eq!(trace["num_target_modules"], 16);
    let modules = trace["modules"].as_array().context("a list")?;
    assert_eq!(modules.len(), 16);
    assert!(modules.iter().all(|module| module["update_share"].as_f64() > Some(0.0)), "{trace}");
    let base = ["trace", "--base", "demo/base", "--text", "fn main", "--json"];
    assert_eq!(json(&dylora(&cache, &base)?)?["modules"], serde_json::json!([]));
    a_terminal_shows_a_strip_and_a_pipe_the_table(&cache, run)?;
    let machine = fs_err::read_to_string(cache.path().join("run/machine.json"))?;
    let machine: Value = serde_json::from_str(&machine)?;
    assert_eq!(machine["dylora_version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&machine["device"], &machine["cpu_threads"]), (&"cpu".into(), &1.into()));

    let out = export.to_str().context("UTF-8")?;
    let arguments = ["export-adapters", "--checkpoint", run, "--out", out];
    assert!(dylora(&cache, &arguments)?.status.success());
    assert!(export.join("expert_3/adapter_model.safetensors").exists());
    exports_are_opened_and_merged(&cache, run, out, overall)?;
    let again = dylora(&cache, &arguments)?;
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("is there already"), "{}", stderr(&again));
    Ok(())
}

fn a_terminal_shows_a_strip_and_a_pipe_the_table(
    cache: &tempfile::TempDir,
    run: &str,
) -> Result<()> {
    let trace = ["trace", "--checkpoint", run, "--text", "fn main"];
    let piped = dylora(cache, &trace)?;
    let piped = String::from_utf8(piped.stdout)?;
    assert!(piped.contains("| position |") && !piped.contains('\x1b'), "{piped}");
    let terminal = |arguments: &[&str], no_color: Option<&str>| -> Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(trace).args(arguments).env("OMP_NUM_THREADS", "1").env("TERM", "xterm");
        command.env_remove("NO_COLOR").envs(no_color.map(|value| ("NO_COLOR", value)));
        let text = rexpect::session::spawn_command(command, Some(60_000))?.exp_eof()?;
        // rexpect makes a character of each byte
        Ok(String::from_utf8(text.chars().map(|byte| byte as u8).collect())?)
    };
    let shown = terminal(&[], None)?;
    assert!(!shown.contains("| position") && shown.contains(" expert_3 (verse): "), "{shown}");
    let colourless = terminal(&[], Some("1"))?;
    assert!(shown.contains("\x1b[") && !colourless.contains('\x1b'), "{shown}{colourless}");
    let strip = fancy_regex::Regex::new("fn[₀-₃] m[₀-₃]ain[₀-₃]\\s")?;
    assert!(strip.is_match(&colourless)?, "{colourless}");
    let table = terminal(&["--table"], None)?;
    assert_eq!(table.replace('\r', ""), piped);
    Ok(())
}

/// Evaluates the export and a merge of a run whose validation loss is `overall`.
fn exports_are_opened_and_merged(
    cache: &tempfile::TempDir,
    run: &str,
    export: &str,
    overall: f64,
) -> Result<()> {
    let loss = |json: &Value, key: &str| json[key].as_f64().context("a number");
    let domains = ["arithmetic", "code", "data2text", "verse"];
    let data: Vec<String> = domains
        .iter()
        .flat_map(|name| ["--data".into(), format!("{name}=demo/data/{name}.validation.jsonl")])
        .collect();
    let data: Vec<&str> = data.iter().map(String::as_str).chain(["--seq-len", "256"]).collect();
    let adapters = ["eval", "--adapters", export, "--base", "demo/base", "--json"];
    let opened = json(&dylora(cache, &[&adapters[..], &data[..]].concat())?)?;
    assert!((loss(&opened, "loss")? - overall).abs() < 1e-9, "{opened}");
    let out = cache.path().join("merged");
    let out = out.to_str().context("UTF-8")?;
    let refused = dylora(cache, &["merge", "--checkpoint", run, "--out", out])?;
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("no merge equals the mixture"), "{}", stderr(&refused));
    let merge = ["merge", "--checkpoint", run, "--weights", "mean", "--out", out, "--json"];
    let merged = json(&dylora(cache, &merge)?)?;
    let measured = &merged["measured"];
    let (routed, fixed) = (loss(&measured["routed"], "loss")?, loss(&measured["static"], "loss")?);
    assert!((routed - overall).abs() < 1e-6 && (measured["cost"] == fixed - routed), "{merged}");
    let base = ["eval", "--base", out, "--json"];
    let of_merged = json(&dylora(cache, &[&base[..], &data[..]].concat())?)?;
    assert!((loss(&of_merged, "loss")? - fixed).abs() < 1e-5, "{of_merged} is not {fixed}");
    Ok(())
}

#[test]
fn bench_prints_its_setting_and_each_row() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let run = |arguments: &[&str]| -> Result<String> {
        let common = ["bench", "--device=cpu", "--base=demo/base", "--seq-len=32", "--steps=1"];
        let output = dylora(&cache, &[&common[..], arguments].concat())?;
        assert!(output.status.success(), "{}", stderr(&output));
        Ok(String::from_utf8(output.stdout)?)
    };
    let json = |text: String| -> Result<Vec<Value>> {
        Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    };
    let lines = json(run(&[
        "--batch=2",
        "--json",
        "--modules=all",
        "--documents=12",
        "--warmup=1",
        "--set=router.top_k=2",
    ])?)?;
    let (header, rows) = lines.split_first().context("a header")?;
    assert_eq!((&header["kind"], &header["dtype"]), (&"header".into(), &"f32".into()));
    assert_eq!(header["lora"]["target_modules"], json!(["all-linear"]));
    assert_eq!(header["router"]["top_k"], 2);
    // as PEFT's mixtures in `scripts/peft_opponent.py`, whatever a new config has
    let keys = ["input", "scope", "normalize_input", "detach_input", "domain_supervision"];
    let plain = json!(["embeddings", "shared", false, false, 0.0]);
    assert_eq!(json!(keys.map(|key| &header["router"][key])), plain);
    assert_eq!(
        (&header["lora"]["scale"], &header["lora"]["alpha"]),
        (&json!("per_expert"), &json!(16.0))
    );
    let rates = ["adapters", "router"].map(|of| &header["optimizer"][of]["learning_rate"]);
    assert_eq!(json!(rates), json!([1e-3, 1e-3]));
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!((&row["kind"], &row["error"]), (&"row".into(), &Value::Null), "{row}");
        assert!(row["step_ms"].as_f64() > Some(0.0) && row["tokens_per_step"] == 64, "{row}");
    }
    // each row reports its own peak, although the larger batch came first
    let rows = json(run(&["--batch=64,1", "--json", "--rows=one_pass", "--warmup=0"])?)?;
    let peak = |row: &Value| row["peak_memory_bytes"].as_u64().context("a peak");
    assert!(peak(&rows[1])? > peak(&rows[2])? + (16 << 20), "{} {}", rows[1], rows[2]);
    let text = run(&["--rows=one_pass,single_lora", "--batch=2", "--warmup=0"])?;
    assert!(text.contains("| one_pass ") && !text.contains("| base "), "{text}");
    assert!(text.contains("at batch 2, one_pass takes "), "{text}");
    Ok(())
}

/// Without `--yes`, nothing is asked of the Hub, which is at a dead address here.
#[test]
fn push_says_what_it_would_upload() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let out = cache.path().join("gguf");
    let path = out.to_str().context("it is UTF-8")?;
    let run = |arguments: &[&str]| -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(arguments).env("DYLORA_CACHE", cache.path()).env("OMP_NUM_THREADS", "1");
        command.env("HF_ENDPOINT", "http://127.0.0.1:1").env("HF_TOKEN", "hf_quiteSecret");
        Ok(command.output()?)
    };
    let written = run(&["merge", "--base", "demo/base", "--format", "gguf", "--out", path])?;
    assert!(written.status.success(), "{}", stderr(&written));
    let push = ["push", "me/demo", "--from", path];
    let found = run(&push)?;
    let text = String::from_utf8(found.stdout)? + &String::from_utf8_lossy(&found.stderr);
    assert!(found.status.success() && text.contains("| model.gguf |"), "{text}");
    assert!(text.contains("nothing was uploaded: add `--yes`") && !text.contains("hf_"), "{text}");
    let found = json(&run(&[&push[..], &["--json"]].concat())?)?;
    assert_eq!(found["uploaded"], false);
    let files = found["files"].as_array().context("it is a list")?;
    let names: Vec<_> = files.iter().filter_map(|file| file["file"].as_str()).collect();
    assert_eq!(names, ["README.md", "model.gguf"], "the marker stays here");

    // an adapter that names a folder of this machine, and what dylora did not write
    let says = |words: &str, code: i32, arguments: &[&str]| -> Result<()> {
        let output = run(arguments)?;
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(words) && !text.contains("hf_"), "{text}");
        Ok(())
    };
    let marker = out.join(".dylora-output.json");
    let mut listed: Value = serde_json::from_str(&fs_err::read_to_string(&marker)?)?;
    listed["files"].as_array_mut().context("it is a list")?.insert(0, "adapter_config.json".into());
    fs_err::write(&marker, listed.to_string())?;
    says("lacks `adapter_config.json`, which dylora wrote there", 1, &push)?;
    let adapter = json!({ "base_model_name_or_path": "/home/me/base" }).to_string();
    fs_err::write(out.join("adapter_config.json"), adapter)?;
    says("is the folder `/home/me/base` of this machine", 1, &push)?;
    says("is no output of dylora", 1, &["push", "me/demo", "--from", "demo/base"])?;
    says("it is like `OWNER/NAME`", 2, &["push", "demo", "--from", path])?;
    let dtype = ["export-adapters", "--base", "demo/base", "--out", "x", "--save-dtype", "f16"];
    says("`--save-dtype` is for `--format gguf`", 2, &dtype)
}

#[test]
fn the_doctor_exits_with_1_if_the_device_that_is_asked_for_is_missing_and_hides_the_token()
-> Result<()> {
    let cache = tempfile::tempdir()?;
    let doctor = |device: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(["doctor", "--json", "--device", device]).env("DYLORA_CACHE", cache.path());
        command.env("HF_HOME", cache.path()).env("HF_TOKEN", "hf_secret").output()
    };
    let output = doctor("cpu")?;
    let found = json(&output)?;
    assert_eq!(
        (output.status.code(), &found["schema"], &found["ok"]),
        (Some(0), &"doctor/1".into(), &true.into())
    );
    assert_eq!(found["facts"]["libtorch"]["loaded"], "2.11.0");
    assert_eq!(found["facts"]["hub"]["token_from"], "`HF_TOKEN`");
    assert!(!String::from_utf8(output.stdout)?.contains("hf_secret"));
    let output = doctor("cuda:99")?;
    assert_eq!((output.status.code(), &json(&output)?["ok"]), (Some(1), &false.into()));
    assert!(stderr(&output).contains("error: broken: device"), "{}", stderr(&output));
    Ok(())
}
