//! Files that were damaged or changed, and numbers that nobody means: each is refused, and the
//! message names it.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::Value;
use tch::{Kind, Tensor};

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

#[test]
fn a_changed_checkpoint_is_refused_by_the_name_of_its_file() -> Result<()> {
    let scene = trained()?;
    let step = "run/checkpoints/step-00000002";
    let dir = scene.path(step);
    let eval = ["eval", "--checkpoint", step];
    let resume = ["train", "--resume", step, "--set", "train.duration={steps=3}"];
    let sum = "is not the file that was written: BLAKE3";
    changed(&dir.join("model.safetensors"), flip, || {
        refused(&scene, &eval, 1, &["model.safetensors`", sum])?;
        refused(&scene, &resume, 1, &["model.safetensors`", sum])
    })?;
    changed(&dir.join("optimizer.safetensors"), flip, || {
        refused(&scene, &resume, 1, &["optimizer.safetensors`", sum])
    })?;
    changed(&dir.join("experts.json"), replace("16.0", "17.0"), || {
        refused(&scene, &eval, 1, &["experts.json`", sum])
    })?;
    changed(&dir.join("state.json"), replace("\"step\": 2", "\"step\": 1"), || {
        refused(&scene, &resume, 1, &["state.json`", sum])
    })?;
    changed(&dir.join("config.toml"), replace("seed = 0", "seed = 1"), || {
        refused(&scene, &eval, 1, &["config.toml`", sum])
    })?;
    // a run's folder resumes from an older step that is whole
    changed(&dir.join("model.safetensors"), flip, || {
        let output = scene.run(&["train", "--resume", "run"])?;
        assert!(text(&output).contains("is damaged"), "{}", text(&output));
        assert!(output.status.success(), "{}", text(&output));
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_checkpoint_of_the_format_before_has_no_sums_and_is_read() -> Result<()> {
    let scene = trained()?;
    let dir = scene.path("run/checkpoints/step-00000002");
    let sums = dir.join("checksums.json");
    let eval = ["eval", "--checkpoint", "run/checkpoints/step-00000002"];
    let manifest = fs_err::read_to_string(&sums)?;
    changed(&sums, replace("\"format\": 1", "\"format\": 9"), || {
        refused(&scene, &eval, 1, &["checksums.json` has format 9, this version reads 1"])
    })?;
    fs_err::remove_file(&sums)?;
    refused(&scene, &eval, 1, &["lacks `checksums.json`"])?;
    assert!(manifest.contains("model.safetensors"), "{manifest}");
    let state = fs_err::read_to_string(dir.join("state.json"))?;
    fs_err::write(dir.join("state.json"), state.replace("\"format\": 4", "\"format\": 3"))?;
    let output = scene.run(&eval)?;
    assert!(output.status.success(), "{}", text(&output));
    let resume = ["train", "--resume", "run", "--set", "train.duration={steps=3}"];
    let output = scene.run(&resume)?;
    assert!(output.status.success(), "{}", text(&output));
    assert!(scene.path("run/checkpoints/step-00000003/checksums.json").is_file());
    Ok(())
}

#[test]
fn a_changed_export_is_refused_by_the_name_of_its_file() -> Result<()> {
    let scene = trained()?;
    let output = scene.run(&["export-adapters", "--checkpoint", "run", "--out", "out"])?;
    assert!(output.status.success(), "{}", text(&output));
    let data = demo().join("data/code.validation.jsonl").display().to_string();
    let eval = ["eval", "--base", "base", "--adapters", "out", "--data", &data];
    let sum = "is not the file that was written: BLAKE3";
    for file in ["router.safetensors", "expert_1/adapter_model.safetensors"] {
        changed(&scene.path("out").join(file), flip, || refused(&scene, &eval, 1, &[file, sum]))?;
    }
    let config = scene.path("out/expert_0/adapter_config.json");
    changed(&config, replace("\"r\": 8", "\"r\":  8"), || {
        refused(&scene, &eval, 1, &["expert_0/adapter_config.json", sum])
    })?;
    // paths that lead out of the export
    let manifest = scene.path("out/dylora.json");
    fs_err::remove_file(scene.path("out/.dylora-output.json"))?;
    let outside = scene.path("out/expert_0").display().to_string();
    for name in ["../out/expert_0", &outside, "expert_0/../expert_0", "."] {
        changed(&manifest, replace("\"expert_0\"", &format!("\"{name}\"")), || {
            refused(&scene, &eval, 1, &["dylora.json", "`experts`", name])
        })?;
    }
    changed(&manifest, replace("\"router.safetensors\"", "\"../out/router.safetensors\""), || {
        refused(&scene, &eval, 1, &["dylora.json", "`router.file`"])
    })?;
    Ok(())
}

#[test]
fn a_changed_merged_model_is_refused_as_a_base() -> Result<()> {
    let scene = trained()?;
    let merge = ["merge", "--checkpoint", "run", "--weights", "uniform", "--out", "merged"];
    let output = scene.run(&merge)?;
    assert!(output.status.success(), "{}", text(&output));
    let data = demo().join("data/code.validation.jsonl").display().to_string();
    let eval = ["eval", "--base", "merged", "--data", &data];
    let sum = "is not the file that was written: BLAKE3";
    let space = |bytes: Vec<u8>| [&b" "[..], &bytes].concat();
    for file in ["config.json", "tokenizer.json"] {
        changed(&scene.path("merged").join(file), space, || {
            refused(&scene, &eval, 1, &[&format!("merged/{file}`"), sum])
        })?;
    }
    let weights = scene.path("merged/model.safetensors");
    // the last bit of the last number
    let change = |mut bytes: Vec<u8>| {
        let at = bytes.len() - 4;
        bytes[at] ^= 1;
        bytes
    };
    changed(&weights, change, || refused(&scene, &eval, 1, &["merged/model.safetensors`", sum]))?;
    let output = scene.run(&eval)?;
    assert!(output.status.success(), "{}", text(&output));
    Ok(())
}

#[test]
fn a_changed_base_or_validation_file_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let validation = scene.path("validation.jsonl");
    fs_err::copy(demo().join("data/code.validation.jsonl"), &validation)?;
    let arguments = scene.train(2, 1)?;
    let own = format!("{}", demo().join("data/code.validation.jsonl").display());
    let config = fs_err::read_to_string(scene.path("config.toml"))?;
    fs_err::write(scene.path("config.toml"), config.replace(&own, "validation.jsonl"))?;
    assert!(scene.run(&as_str(&arguments))?.status.success());
    let resume = ["train", "--resume", "run", "--set", "train.duration={steps=3}"];
    let eval = ["eval", "--checkpoint", "run"];
    let export = ["export-adapters", "--checkpoint", "run", "--out", "out"];
    let base = fs_err::read_to_string(scene.path("base/config.json"))?;
    let mut json: Value = serde_json::from_str(&base)?;
    json["n_head"] = (json["n_head"].as_i64().context("a number")? * 2).into();
    for command in [&resume[..], &eval, &export] {
        changed(
            &scene.path("base/config.json"),
            |_| json.to_string().into_bytes(),
            || refused(&scene, command, 1, &["its `config.json` has `n_head`"]),
        )?;
    }
    changed(&validation, replace("\n", "\n{\"text\": \"one more\"}\n"), || {
        refused(&scene, &resume, 1, &["the validation data has changed"])
    })?;
    Ok(())
}

#[test]
fn numbers_that_are_not_finite_are_refused_by_the_name_of_their_tensor() -> Result<()> {
    let scene = trained()?;
    let merge = ["merge", "--checkpoint", "run", "--weights", "1e308,1e308", "--out", "merged"];
    refused(&scene, &merge, 1, &["tensor `h.", "not finite"])?;
    let adapter = ["merge", "--checkpoint", "run", "--as", "adapter"];
    let adapter = [&adapter[..], &["--weights", "1e308,1e308", "--out", "merged"]].concat();
    refused(&scene, &adapter, 1, &["lora_b`", "not finite"])?;
    let data = demo().join("data/code.validation.jsonl").display().to_string();
    let file = scene.path("base/model.safetensors");
    let tensors = read_tensors(&file)?;
    let (name, first) = tensors.iter().next().context("a tensor")?;
    let eval = ["eval", "--base", "base", "--data", &data];
    for number in [f64::NAN, f64::INFINITY] {
        let bad = first.copy();
        let _ = bad.view([-1]).get(0).fill_(number);
        let with = tensors.iter().map(|(n, t)| (n.as_str(), if n == name { &bad } else { t }));
        write_tensors(&file, with)?;
        refused(&scene, &eval, 1, &[name, "not finite"])?;
    }
    // finite numbers whose results are not
    let huge: Vec<(&String, Tensor)> =
        tensors.iter().map(|(n, t)| (n, t.to_kind(Kind::Float) * 1e36)).collect();
    write_tensors(&file, huge.iter().map(|(n, t)| (n.as_str(), t)))?;
    refused(&scene, &eval, 1, &["the loss is"])?;
    Ok(())
}

#[test]
fn adapters_and_bases_with_numbers_without_sense_are_refused() -> Result<()> {
    let scene = trained()?;
    let output = scene.run(&["export-adapters", "--checkpoint", "run", "--out", "out"])?;
    assert!(output.status.success(), "{}", text(&output));
    fs_err::remove_file(scene.path("out/.dylora-output.json"))?;
    let data = demo().join("data/code.validation.jsonl").display().to_string();
    let config = scene.path("out/expert_0/adapter_config.json");
    let eval = ["eval", "--base", "base", "--adapters", "out/expert_0", "--data", &data];
    for alpha in ["0", "-5", "1e309", "\"8\""] {
        changed(
            &config,
            replace("\"lora_alpha\": 16", &format!("\"lora_alpha\": {alpha}")),
            || refused(&scene, &eval, 1, &["adapter_config.json"]),
        )?;
    }
    let eval = ["eval", "--base", "base", "--data", &data];
    let base: Value =
        serde_json::from_str(&fs_err::read_to_string(scene.path("base/config.json"))?)?;
    for (key, value) in [("layer_norm_epsilon", "-1.0"), ("n_layer", "1000000000")] {
        let mut json = base.clone();
        json[key] = serde_json::from_str(value)?;
        changed(
            &scene.path("base/config.json"),
            |_| json.to_string().into_bytes(),
            || refused(&scene, &eval, 1, &["config.json", key]),
        )?;
    }
    Ok(())
}

#[test]
fn control_characters_of_names_and_data_do_not_reach_the_terminal() -> Result<()> {
    let scene = Scene::new()?;
    let output = scene.run(&["eval", "--base", "base", "--data", "a\x1bb.jsonl"])?;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("a␛b.jsonl"), "{}", text(&output));
    assert!(!text(&output).contains('\x1b'), "{}", text(&output));
    fs_err::write(scene.path("a.jsonl"), "{\"text\": \"x y z\", \"domain\": \"\\u001b[2J\"}\n")?;
    let output =
        scene.run(&["eval", "--base", "base", "--data", "a.jsonl", "--data", "\x1b[2J=a.jsonl"])?;
    assert!(!text(&output).contains('\x1b'), "{}", text(&output));
    Ok(())
}

#[test]
fn absurd_numbers_are_refused_at_once() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = scene.train(2, 1)?;
    let dots = format!("{}=1", vec!["a"; 50_000].join("."));
    for (set, part) in [
        ("lora.num_experts=9223372036854775807", "`lora.num_experts`"),
        ("lora.rank=9223372036854775807", "`lora.rank`"),
        ("train.micro_batch_size=9223372036854775807", "`train.micro_batch_size`"),
        ("train.grad_accum_steps=9223372036854775807", "`train.grad_accum_steps`"),
        ("train.duration={steps=9223372036854775807}", "`train.duration.steps`"),
        ("data.seq_len=9223372036854775807", "`data.seq_len`"),
        ("data.domains=[{name='a',train=['x'],weight=1e-308}]", "`data.domains[0].weight`"),
        (&dots, "`--set`"),
        ("run.device='cuda:18446744073709551615'", "cuda:18446744073709551615"),
    ] {
        let begun = Instant::now();
        let all = [&as_str(&arguments)[..], &["--set", set]].concat();
        let output = scene.run(&all)?;
        let shown: String = set.chars().take(60).collect();
        let message: String = text(&output).chars().take(2000).collect();
        assert_eq!(output.status.code(), Some(2), "{shown}: {} {message}", output.status);
        assert!(message.contains(part), "{shown}: {message}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{shown}");
    }
    Ok(())
}

#[test]
fn a_record_without_end_is_refused() -> Result<()> {
    let scene = Scene::new()?;
    let line = format!("{{\"text\": \"{}\"}}", "word ".repeat(2 << 20));
    fs_err::write(scene.path("a.jsonl"), line)?;
    refused(
        &scene,
        &["eval", "--base", "base", "--data", "a.jsonl"],
        1,
        &["a.jsonl`", "line 1 is longer than 4 MiB"],
    )
}

/// Reads a file in a dry run, and returns the most memory that this took, in MiB.
fn peak_mib(scene: &Scene, file: &str) -> Result<i64> {
    let mut arguments = scene.train(1, 1)?;
    let domains = format!("data.domains=[{{name='a',train=['{file}']}}]");
    arguments.extend(["--dry-run", "--set", &domains].map(String::from));
    let mut command = scene.command(&as_str(&arguments));
    let log = fs_err::File::create(scene.path("log.txt"))?.into_parts().0;
    let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
    // SAFETY: an `rusage` of zeros is valid, and both pointers are to values that live
    let (status, usage) = unsafe {
        let (mut status, mut usage) = (0, std::mem::zeroed::<libc::rusage>());
        let ended = libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut usage);
        assert!(ended > 0);
        (status, usage)
    };
    assert_eq!(status, 0, "{}", fs_err::read_to_string(scene.path("log.txt"))?);
    Ok(usage.ru_maxrss / 1024)
}

#[test]
fn a_long_record_takes_little_memory() -> Result<()> {
    let scene = Scene::new()?;
    let record = |text: &str| format!("{{\"text\": \"{text}\"}}\n");
    fs_err::write(scene.path("short.jsonl"), record("two words").repeat(40))?;
    let words = "word and some other words, 12 of them. ".repeat(95_000);
    fs_err::write(scene.path("long.jsonl"), record(&words))?;
    let (short, long) = (peak_mib(&scene, "short.jsonl")?, peak_mib(&scene, "long.jsonl")?);
    // 20 times the record; all of it at once took 140 times
    assert!(long - short < 75, "{short} MiB for a short record, {long} MiB for one of 3.6 MB");
    Ok(())
}

#[test]
fn a_bomb_and_a_text_without_a_cut_are_refused() -> Result<()> {
    let scene = Scene::new()?;
    // 200 MB of spaces in some kB
    let file = fs_err::File::create(scene.path("a.jsonl.gz"))?;
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    for _ in 0..200 {
        gzip.write_all(&vec![b' '; 1_000_000])?;
    }
    gzip.finish()?;
    fs_err::write(scene.path("a.txt"), "\t\n".repeat(9 << 20))?;
    for (file, part) in
        [("a.jsonl.gz", "line 1 is longer than 4 MiB"), ("a.txt", "16 MiB of text up to line")]
    {
        refused(&scene, &["eval", "--base", "base", "--data", file], 1, &[file, part])?;
    }
    Ok(())
}

/// The environment variable that tells the next test's child process which file to map.
const MAPPED: &str = "DYLORA_TEST_MAPS";

#[test]
fn a_mapped_file_that_shrinks_ends_in_an_error_that_names_it() -> Result<()> {
    if let Some(file) = std::env::var_os(MAPPED) {
        dylora::ffi::signals::files_fail_with_errors();
        let bytes = dylora::tensor_file::open(Path::new(&file))?;
        fs_err::OpenOptions::new().write(true).open(&file)?.set_len(8)?;
        let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
        panic!("the bytes are there: {sum}");
    }
    let scene = Scene::new()?;
    let file = scene.path("base/model.safetensors");
    let name = "damage::a_mapped_file_that_shrinks_ends_in_an_error_that_names_it";
    let mut command = std::process::Command::new(std::env::current_exe()?);
    let output = command.args(["--exact", name, "--nocapture"]).env(MAPPED, &file).output()?;
    assert_eq!(output.status.code(), Some(1), "{} {}", output.status, text(&output));
    let expected = format!("error: `{}` has become shorter", file.display());
    assert!(text(&output).contains(&expected), "{}", text(&output));
    Ok(())
}

#[test]
fn a_damaged_cache_of_tokens_is_made_again() -> Result<()> {
    let scene = trained()?;
    let eval = ["eval", "--checkpoint", "run"];
    let sound = scene.run(&eval)?;
    for entry in fs_err::read_dir(scene.path("cache/tokens"))? {
        let path = entry?.path();
        let len = fs_err::metadata(&path)?.len();
        fs_err::OpenOptions::new().write(true).open(&path)?.set_len(len / 2)?;
    }
    let output = scene.run(&eval)?;
    assert!(
        output.status.success() && text(&output).contains("is made again"),
        "{}",
        text(&output)
    );
    assert_eq!(output.stdout, sound.stdout);
    assert!(!text(&scene.run(&eval)?).contains("is made again"));
    Ok(())
}

/// A C++ exception that reaches Rust ends the process.
#[test]
fn every_function_of_the_c_interface_catches_exceptions() -> Result<()> {
    // functions without anything before TRY that throws, or that throws at all
    let without = [
        "take_error",
        "torch_version",
        "libtorch_path",
        "cuda_name",
        "set_kernels",
        "cuda_take_error",
        "cuda_free",
        "cuda_kernels",
        "cuda_graph_free",
        "cuda_fetched",
        "cuda_mark_free",
        "hide_warnings",
        "store_free",
        "pending_free",
        "gloo_free",
    ]
    .map(|name| format!("dylora_{name}"));
    for entry in fs_err::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("csrc"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "cpp") {
            continue;
        }
        let source = fs_err::read_to_string(&path)?;
        let starts = source.match_indices("dylora_").filter(|(at, _)| {
            let line = source[..*at].rfind('\n').map_or(0, |end| end + 1);
            let before = &source[line..*at];
            !before.starts_with([' ', '/', '#', '}']) && !before.contains('(')
        });
        for (at, _) in starts {
            let rest = &source[at..];
            let name: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let is_function = rest[name.len()..].starts_with('(');
            let Some(body) = rest.split("\n}").next().filter(|_| is_function) else { continue };
            let body = if body.lines().next().is_some_and(|l| l.ends_with('}')) {
                body.lines().next().unwrap_or_default()
            } else {
                body
            };
            let first = body.split_once('{').map_or("", |(_, body)| body).trim_start();
            let catches = first.starts_with("TRY(") || first.starts_with("try {");
            let is_caught = catches || without.contains(&name);
            assert!(is_caught, "{}: `{name}` does not begin with TRY", path.display());
        }
    }
    Ok(())
}
