//! `dylora launch`: runs, their curves, interrupts, restarts, and evaluation and generation by
//! several processes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::common::max_difference;
use crate::scene::{Scene, as_str, ended, send, text, train};
use dylora::tensor_file::read_tensors;

/// How long a test waits for processes that end or restart on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// The arguments that share `arguments` among processes.
fn launched<'a>(processes: &'a str, arguments: &'a [String]) -> Vec<&'a str> {
    let mut all = vec!["launch", "--processes", processes, "--"];
    all.extend(arguments.iter().map(String::as_str));
    all
}

/// Runs a command that must succeed.
fn must(scene: &Scene, arguments: &[&str]) -> Result<String> {
    let output = scene.run(arguments)?;
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    Ok(String::from_utf8(output.stdout)?)
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or(f64::NAN)
}

/// Checks that two runs have the same losses and weights but for rounding.
fn assert_same_run(scene: &Scene, run: &str, expected: &str, tolerance: f64) -> Result<()> {
    // a gradient's norm is that of weights which differ by up to the tolerance
    let numbers =
        [("train", "loss", 1e-6), ("validation", "loss", 1e-6), ("train", "grad_norm", tolerance)];
    for (kind, key, bound) in numbers {
        let (a, b) = (scene.metrics(run, kind)?, scene.metrics(expected, kind)?);
        assert_eq!(a.len(), b.len(), "{run}, {kind}");
        for (a, b) in a.iter().zip(&b) {
            let (a, b) = (number(a, key), number(b, key));
            assert!((a - b).abs() <= bound * b.abs().max(1.0), "{run}: {key} {a} is not {b}");
        }
    }
    let of = |run: &str| {
        let dir = scene.path(run).join("checkpoints/step-00000020");
        read_tensors(&dir.join("model.safetensors"))
    };
    for ((name, a), (other, b)) in of(run)?.into_iter().zip(of(expected)?) {
        assert_eq!(name, other);
        let difference = match name.ends_with("attn.c_attn.bias") {
            false => max_difference(&a, &b),
            // the bias of the keys changes no attention, so that its gradient is rounding alone, of
            // which AdamW makes whole steps
            true => {
                let third = a.size()[0] / 3;
                let of = |at: i64| max_difference(&a.narrow(0, at, third), &b.narrow(0, at, third));
                of(0).max(of(2 * third))
            }
        };
        assert!(difference <= tolerance, "`{name}` of {run}: {difference:e}");
    }
    Ok(())
}

/// 20 steps in f32 at the default learning rate: losses to 1e-6 and weights to 1e-5, with domains,
/// padding, domain supervision and evaluations. AdamW makes steps of the size of the rate, also
/// from gradients that are little but rounding, so that the distance of weights grows with the
/// rate. With top-1, there are more such gradients.
#[test]
fn processes_train_as_one_does_with_more_accumulation() -> Result<()> {
    for (name, tolerance, set) in [
        ("dense", 1e-5, vec![]),
        ("top", 3e-5, vec!["router.top_k=1", "router.renormalize=false"]),
        ("full", 1e-5, vec!["method=full"]),
    ] {
        let scene = Scene::new()?;
        let with = |run: &str, accumulation: usize| {
            let accumulation = format!("train.grad_accum_steps={accumulation}");
            let mut set = set.clone();
            set.extend([accumulation.as_str(), "train.eval_every_steps=10", "lora.dropout=0.0"]);
            set.push("optimizer.adapters.learning_rate=1.5e-3");
            train(run, 20, 10, &set)
        };
        for processes in [2, 3] {
            let one = format!("one-{processes}");
            must(&scene, &as_str(&with(&one, processes)))?;
            let several = format!("{name}-{processes}");
            must(&scene, &launched(&processes.to_string(), &with(&several, 1)))?;
            assert_same_run(&scene, &several, &one, tolerance)?;
        }
    }
    Ok(())
}

/// A run of two processes goes on with one, three and two.
#[test]
fn a_run_resumes_in_a_world_of_another_size() -> Result<()> {
    let scene = Scene::new()?;
    let set = ["train.grad_accum_steps=3", "lora.dropout=0.0"];
    must(&scene, &as_str(&train("one", 12, 3, &["train.grad_accum_steps=6", "lora.dropout=0.0"])))?;
    must(&scene, &launched("2", &train("run", 3, 3, &set)))?;
    let resume = |steps: u64| -> Vec<String> {
        let steps = format!("train.duration={{steps={steps}}}");
        ["train", "--resume", "run", "--set", &steps].map(str::to_owned).into()
    };
    must(&scene, &as_str(&resume(6)))?;
    must(&scene, &launched("3", &resume(9)))?;
    must(&scene, &launched("2", &resume(12)))?;
    let (a, b) = (scene.metrics("run", "train")?, scene.metrics("one", "train")?);
    assert_eq!((a.len(), b.len()), (12, 12));
    for (a, b) in a.iter().zip(&b) {
        for key in ["tokens_seen", "label_tokens", "epoch"] {
            assert_eq!(a[key], b[key], "{key}");
        }
        // the learning rates differ by the length of each part
    }
    let state = |run: &str| -> Result<Value> {
        let path = scene.path(run).join("checkpoints/last/state.json");
        Ok(serde_json::from_str(&fs_err::read_to_string(path)?)?)
    };
    let (a, b) = (state("run")?, state("one")?);
    for key in ["step", "tokens_seen", "position", "domain_blocks"] {
        assert_eq!(a[key], b[key], "{key}");
    }
    assert_eq!(a["blocks_per_step"], 6);
    Ok(())
}

/// Each process draws masks of its own, which are saved and drawn again by a run that is resumed.
#[test]
fn dropout_differs_by_process_and_is_resumed() -> Result<()> {
    let scene = Scene::new()?;
    let set = ["lora.dropout=0.3", "schedule={kind='constant', warmup_steps=0, min_ratio=0.0}"];
    must(&scene, &launched("2", &train("whole", 8, 4, &set)))?;
    must(&scene, &launched("2", &train("parts", 4, 4, &set)))?;
    let resume = ["train", "--resume", "parts", "--set", "train.duration={steps=8}"];
    must(&scene, &launched("2", &resume.map(str::to_owned)))?;
    let of = |run: &str, file: &str| {
        let path = scene.path(run).join("checkpoints/step-00000008").join(file);
        Ok::<_, anyhow::Error>(read_tensors(&path)?.into_iter().collect::<Vec<_>>())
    };
    for file in ["model.safetensors", "optimizer.safetensors"] {
        for ((name, a), (_, b)) in of("whole", file)?.iter().zip(&of("parts", file)?) {
            assert!(a.equal(b), "`{name}` of the resumed run differs");
        }
    }
    let optimizer = of("whole", "optimizer.safetensors")?;
    let state = |name: &str| optimizer.iter().find(|(other, _)| other == name).map(|(_, t)| t);
    let (first, second) = (state("rng.cpu"), state("rng.1.cpu"));
    let (first, second) = (first.context("rank 0's")?, second.context("rank 1's")?);
    assert!(!first.equal(second), "the processes draw the same masks");
    Ok(())
}

#[test]
fn one_signal_makes_all_processes_save_the_same_step() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = train("run", 1_000_000, 1_000_000, &[]);
    let child = scene.command(&launched("3", &arguments)).spawn()?;
    scene.wait_for_lines("run", 5)?;
    send(&child, libc::SIGTERM);
    let (output, _) = ended(child, PATIENCE)?;
    assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    assert!(text(&output).contains("interrupted after step"), "{}", text(&output));
    // a signal to one process alone is a request to all
    let children = scene.start(2, &["train", "--resume", "run"])?;
    let lines = fs_err::read_to_string(scene.path("run/metrics.jsonl"))?.lines().count();
    scene.wait_for_lines("run", lines + 3)?;
    send(&children[1], libc::SIGINT);
    for (child, code) in children.into_iter().zip([143, 130]) {
        let (output, _) = ended(child, PATIENCE)?;
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
    }
    Ok(())
}

#[test]
fn a_killed_process_is_restarted_and_the_run_goes_on() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = train("run", 60, 5, &[]);
    let mut all = vec!["launch", "-n", "2", "--max-restarts", "2", "--"];
    all.extend(as_str(&arguments));
    let binary = scene.path("dylora");
    fs_err::copy(env!("CARGO_BIN_EXE_dylora"), &binary)?;
    let child = scene.command_of(&binary, &all).spawn()?;
    scene.wait_for_lines("run", 12)?;
    // as if another version were installed
    fs_err::remove_file(&binary)?;
    let own = child.id();
    let children = fs_err::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
    let victim: i32 = children.split_whitespace().last().context("it has children")?.parse()?;
    let killed = Instant::now();
    // SAFETY: `kill` takes two numbers and accesses no memory
    assert_eq!(unsafe { libc::kill(victim, libc::SIGKILL) }, 0);
    let (output, _) = ended(child, PATIENCE)?;
    assert!(output.status.success(), "after {:?}: {}", killed.elapsed(), text(&output));
    let message = text(&output);
    assert!(message.contains("was ended by signal 9; restart 1 of 2"), "{message}");
    assert!(message.contains("completed after step 60"), "{message}");
    let steps: Vec<_> = scene.metrics("run", "train")?.iter().map(|m| m["step"].clone()).collect();
    assert_eq!(steps, (1..=60).map(Value::from).collect::<Vec<_>>());
    Ok(())
}

fn read(text: &str) -> Result<Value> {
    Ok(serde_json::from_str(text)?)
}

#[test]
fn evaluation_is_shared_and_its_losses_are_exact() -> Result<()> {
    let scene = Scene::new()?;
    must(&scene, &as_str(&train("run", 3, 3, &[])))?;
    let eval = ["eval", "--checkpoint", "run", "--device", "cpu", "--json"].map(str::to_owned);
    let alone = read(&must(&scene, &as_str(&eval))?)?;
    let losses = |report: &Value| -> Vec<Value> {
        let domains = report["domains"].as_array().into_iter().flatten();
        domains.map(|domain| domain["loss"].clone()).collect()
    };
    let load = |report: &Value| report["routing"]["expert_load"][0].as_f64().context("a load");
    for processes in ["2", "3"] {
        let shared = read(&must(&scene, &launched(processes, &eval))?)?;
        for key in ["loss", "token_loss", "perplexity", "label_tokens"] {
            assert_eq!(shared[key], alone[key], "{key}");
        }
        assert_eq!((losses(&shared), losses(&alone).len()), (losses(&alone), 2));
        assert!((load(&shared)? - load(&alone)?).abs() < 1e-12);
    }
    Ok(())
}

#[test]
fn answers_are_shared_and_are_those_of_one_process() -> Result<()> {
    let scene = Scene::new()?;
    must(&scene, &as_str(&train("run", 3, 3, &[])))?;
    let eval = |samples: &str| {
        let text = format!(
            "eval --checkpoint run --device cpu --json --generate 4 --max-new-tokens 6 --samples \
             {samples}"
        );
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let alone = read(&must(&scene, &as_str(&eval("alone.jsonl")))?)?;
    let samples = fs_err::read_to_string(scene.path("alone.jsonl"))?;
    assert_eq!((alone["answers"].as_array().map(Vec::len), samples.lines().count()), (Some(2), 8));
    for processes in ["2", "3"] {
        let name = format!("{processes}.jsonl");
        let shared = read(&must(&scene, &launched(processes, &eval(&name)))?)?;
        assert_eq!(shared["answers"], alone["answers"]);
        assert_eq!(fs_err::read_to_string(scene.path(&name))?, samples);
    }
    Ok(())
}

/// The logarithms of probabilities differ by rounding, since the batches differ.
#[test]
fn generation_is_shared_and_its_texts_are_the_same() -> Result<()> {
    let scene = Scene::new()?;
    must(&scene, &as_str(&train("run", 3, 3, &[])))?;
    let prompts: Vec<String> =
        (0..7).map(|n| format!("{{\"prompt\": \"{n} + {n} =\"}}\n")).collect();
    fs_err::write(scene.path("prompts.jsonl"), prompts.concat())?;
    let arguments = "generate --checkpoint run --device cpu --prompts prompts.jsonl \
                     --max-new-tokens 6 --temperature 0.8 --seed 3";
    let plain: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
    let json = [plain.clone(), vec!["--json".to_owned()]].concat();
    let (plain_texts, texts) = (must(&scene, &as_str(&plain))?, must(&scene, &as_str(&json))?);
    for processes in ["2", "3"] {
        let shared = must(&scene, &launched(processes, &json))?;
        assert_eq!((shared.lines().count(), texts.lines().count()), (7, 7));
        for (shared, alone) in shared.lines().zip(texts.lines()) {
            let (shared, alone) = (read(shared)?, read(alone)?);
            for key in ["prompt", "text", "ids", "finish_reason"] {
                assert_eq!(shared[key], alone[key]);
            }
        }
        assert_eq!(must(&scene, &launched(processes, &plain))?, plain_texts);
    }
    Ok(())
}

/// Growth in two processes: the new expert is seeded, its router column is opened, and all experts
/// are consolidated, as in one process with twice the accumulation.
#[test]
fn a_mixture_grows_as_in_one_process() -> Result<()> {
    let scene = Scene::new()?;
    must(&scene, &as_str(&train("run", 40, 40, &[])))?;
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/data/data2text.train.jsonl");
    let grow = |out: &str, accumulation: usize| -> Vec<String> {
        let set = format!("train.grad_accum_steps={accumulation}");
        let arguments = [
            "add-expert",
            "--checkpoint",
            "run",
            "--out",
            out,
            "--data",
            data,
            "--steps",
            "20",
            "--device",
            "cpu",
            "--force",
            "--set",
            &set,
            "--set",
            "lora.dropout=0.0",
            "--set",
            "train.micro_batch_size=4",
        ];
        arguments.map(str::to_owned).into()
    };
    must(&scene, &as_str(&grow("one", 2)))?;
    must(&scene, &launched("2", &grow("two", 1)))?;
    assert_same_run(&scene, "two", "one", 1e-4)?;
    let opened = |run: &str| -> Result<Value> {
        let path = scene.path(run).join("checkpoints/last/state.json");
        let state = read(&fs_err::read_to_string(path)?)?;
        Ok(state["column_opened_at"].clone())
    };
    assert!(opened("two")?.is_u64());
    assert_eq!(opened("two")?, opened("one")?);
    Ok(())
}

/// Two processes take the steps of one with twice the accumulation.
#[test]
fn a_bench_is_shared_and_takes_the_same_steps() -> Result<()> {
    let scene = Scene::new()?;
    let bench = |accumulate: &str, rows: &str| -> Vec<String> {
        let text = format!(
            "bench --base base --device cpu --seq-len 16 --batch 2 --steps 2 --warmup 1 --json \
             --accumulate {accumulate} --rows {rows}"
        );
        text.split_whitespace().map(str::to_owned).collect()
    };
    let lines = |text: String| text.lines().map(read).collect::<Result<Vec<Value>>>();
    let alone = lines(must(&scene, &as_str(&bench("2", "one_pass,single_lora")))?)?;
    let both = lines(must(&scene, &launched("2", &bench("1", "one_pass,single_lora")))?)?;
    assert_eq!((both.len(), &both[0]["processes"]), (3, &Value::from(2)));
    for (alone, both) in alone[1..].iter().zip(&both[1..]) {
        assert_eq!(both["tokens_per_step"], alone["tokens_per_step"]);
        for key in ["first_loss", "last_loss"] {
            let (alone, both) = (number(alone, key), number(both, key));
            assert!((alone - both).abs() < 1e-5, "{key}: {both} is not {alone}");
        }
    }
    let output = scene.run(&launched("2", &bench("1", "n_passes")))?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("`--rows n_passes` is measured by one process"));
    Ok(())
}

#[test]
fn a_usage_error_is_not_restarted() -> Result<()> {
    let scene = Scene::new()?;
    let all = ["launch", "-n", "2", "--max-restarts", "5", "--", "train", "--config", "no.toml"];
    let output = scene.run(&all)?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(!text(&output).contains("restart 1"), "{}", text(&output));
    assert!(text(&output).contains("[0] error: "), "{}", text(&output));
    let output = scene.run(&["launch", "-n", "0", "--", "train"])?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    Ok(())
}
