//! The commands that add, remove and merge experts, as a user runs them.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result};
use dylora::checkpoint::{read_config, read_state};
use dylora::tensor_file::{read_tensors, write_tensors};
use serde_json::Value;
use tch::Tensor;

use crate::growth::third_domain;
use crate::recipe::NEW;
use crate::{World, alone, forget_sums, train};

/// A world with a finished run of two experts on two domains. Commands run in its folder, with
/// relative paths.
struct Life {
    world: World,
}

impl Life {
    fn new() -> Result<Self> {
        Self::of(&[])
    }

    /// The same with other settings of the run.
    fn of(overrides: &[&str]) -> Result<Self> {
        let world = World::new()?;
        third_domain(&world)?;
        let common = ["lora.num_experts=2", "train.duration={steps=3}", "lora.dropout=0.0"];
        train(&world.config("two", &[&common, overrides].concat())?, None)?;
        Ok(Self { world })
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(arguments).current_dir(self.world.dir.path());
        Ok(command.env("DYLORA_CACHE", self.world.path("cache")).output()?)
    }

    /// Runs a command with `--json` and returns what it prints.
    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.run(&[arguments, &["--json", "-q"]].concat())?;
        serde_json::from_slice(&output.stdout).with_context(|| message(&output))
    }

    /// The names of the skills in a run's last checkpoint, and the expert of the last skill.
    fn skills(&self, run: &str) -> Result<(Vec<String>, Value)> {
        let file = self.world.path(run).join("checkpoints/last/skills.json");
        let library: Value = serde_json::from_str(&fs_err::read_to_string(file)?)?;
        let skills = library["skills"].as_array().context("a list")?;
        let names = skills.iter().filter_map(|skill| skill["name"].as_str().map(String::from));
        Ok((names.collect(), skills.last().context("a skill")?["expert"].clone()))
    }

    /// Runs a command that fails, and returns its exit code and message.
    fn fault(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.run(&[arguments, &["-q"]].concat())?;
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
        Ok((output.status.code(), message(&output)))
    }
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The paths and contents of all files below a folder.
fn contents(dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = vec![];
    for entry in fs_err::read_dir(dir)? {
        let path = entry?.path();
        match path.is_dir() {
            true => files.extend(contents(&path)?),
            false => files.push((path.display().to_string(), fs_err::read(&path)?)),
        }
    }
    files.sort();
    Ok(files)
}

const ADD: [&str; 9] = [
    "add-expert",
    "--checkpoint",
    "two",
    "--data",
    "third.train.jsonl",
    "--validation",
    "third.validation.jsonl",
    "--steps",
    "2",
];

#[test]
fn experts_come_and_go_by_commands() -> Result<()> {
    let _alone = alone();
    let life = Life::new()?;
    a_fault_of_usage_costs_nothing(&life)?;
    a_known_skill_gets_no_expert_and_a_forced_one_no_tokens(&life)?;
    an_expert_that_brings_nothing_is_rejected(&life)?;
    an_expert_is_added(&life)?;
    a_merge_that_is_worse_than_a_removal_is_refused(&life)?;
    experts_are_removed_and_merged(&life)?;
    an_expert_is_added_without_validation_files(&life)
}

/// The values of the part that is always on in a run's last checkpoint. It is the last part there.
fn shared_values(life: &Life, run: &str) -> Result<Vec<f32>> {
    let dir = life.world.path(run).join("checkpoints/last");
    let specs: Value = serde_json::from_str(&fs_err::read_to_string(dir.join("experts.json"))?)?;
    let specs = specs.as_array().context("a list")?;
    let (last, experts) = specs.split_last().context("there are some")?;
    assert_eq!(last["shared"], true, "{run}");
    assert!(experts.iter().all(|spec| spec.get("shared").is_none()), "{run}");
    let tensors = read_tensors(&dir.join("model.safetensors"))?;
    let own = tensors.iter().filter(|(name, _)| name.contains(".shared."));
    let values = own.map(|(_, tensor)| Vec::<f32>::try_from(tensor.reshape([-1])));
    let values = values.collect::<Result<Vec<_>, _>>()?.concat();
    assert!(!values.is_empty(), "{run}");
    Ok(values)
}

/// With the routers of new configs, which domains supervise.
#[test]
fn commands_keep_a_part_that_is_always_on() -> Result<()> {
    let _alone = alone();
    let life = Life::of(&[&NEW[..], &["lora.shared_rank=2"]].concat())?;
    let before = shared_values(&life, "two")?;
    let add = [&ADD[..], &["--out", "three", "--threshold", "1", "--replay", "0.5"]].concat();
    let add = [&add[..], &["--old-experts-rate", "0"]].concat();
    assert_eq!(life.json(&add)?["expert"], 2);
    assert!(shared_values(&life, "three")? == before, "only the new expert is trained");
    let three = ["--checkpoint", "three", "--out"];
    life.json(&[&["merge-experts"], &three[..], &["merged", "--experts", "0,1"]].concat())?;
    life.json(&[&["remove-expert"], &three[..], &["removed", "--expert", "0"]].concat())?;
    life.json(&["remove-expert", "--checkpoint", "removed", "--expert", "0", "--out", "one"])?;
    for run in ["merged", "removed", "one"] {
        assert!(shared_values(&life, run)? == before, "{run}");
    }
    for run in ["merged", "one"] {
        outputs_have_what_is_always_on(&life, run)?;
        let resume = ["train", "--resume", run, "--set", "train.duration={steps=2}"];
        assert_eq!(life.json(&resume)?["step"], 2, "{run}");
        assert!(shared_values(&life, run)? != before, "{run}: it is trained again");
        let traced = life.json(&["trace", "--checkpoint", run, "--text", "w1 w2 w3"])?;
        assert!(traced["modules"].as_array().is_some_and(|all| all.len() == 4), "{traced}");
    }
    Ok(())
}

/// Checks that an export of a run has the loss of the run, and a merged base that of the static
/// mixture.
fn outputs_have_what_is_always_on(life: &Life, run: &str) -> Result<()> {
    let loss = |report: &Value| report["loss"].as_f64().context("a number");
    let whole = life.json(&["eval", "--checkpoint", run])?;
    let moved = whole["experts"].as_array().context("the parts that have moved")?;
    assert_eq!(moved.last().context("there are some")?["name"], "shared", "{whole}");
    let export = format!("{run}-export");
    let output = life.run(&["export-adapters", "--checkpoint", run, "--out", &export, "-q"])?;
    assert!(output.status.success(), "{}", message(&output));
    assert!(life.world.path(&export).join("shared/adapter_model.safetensors").exists(), "{run}");
    let data = ["up", "down", "third"].map(|name| format!("{name}={name}.validation.jsonl"));
    let data = data.iter().flat_map(|data| ["--data", data]).chain(["--seq-len", "16"]);
    let data: Vec<&str> = data.collect();
    let opened = ["eval", "--adapters", &export, "--base", "base"];
    let opened = life.json(&[&opened[..], &data].concat())?;
    assert!((loss(&opened)? - loss(&whole)?).abs() < 1e-9, "{run}: {opened}, {whole}");
    let out = format!("{run}-base");
    let merge = ["merge", "--checkpoint", run, "--out", &out];
    let expected = match run {
        // a single expert has weight 1
        "one" => life.json(&merge).and(loss(&whole)),
        _ => {
            let merged = life.json(&[&merge[..], &["--weights", "mean"]].concat())?;
            loss(&merged["measured"]["static"])
        }
    }?;
    let merged = life.json(&[&["eval", "--base", &out], &data[..]].concat())?;
    assert!((loss(&merged)? - expected).abs() < 1e-5, "{run}: {merged} is not {expected}");
    Ok(())
}

fn a_fault_of_usage_costs_nothing(life: &Life) -> Result<()> {
    let before = contents(life.world.dir.path())?;
    let add = |more: &[&'static str]| [&ADD[..], more].concat();
    let remove = ["remove-expert", "--checkpoint", "two", "--out", "x", "--expert"];
    let merge = ["merge-experts", "--checkpoint", "two", "--out", "x", "--experts"];
    for (arguments, code, said) in [
        (add(&["--out", "x", "--domain", "up"]), 2, "the mixture has a domain `up` already"),
        (
            add(&["--out", "x", "--replay", "1"]),
            2,
            "`--replay` must be at least 0 and below 1, got 1",
        ),
        (add(&["--out", "x", "--replay", "nan"]), 2, "`--replay` must be"),
        (add(&["--out", "x", "--steps", "0"]), 2, "cannot be used multiple times"),
        (add(&["--out", "two"]), 1, "/two` holds checkpoints of an earlier run"),
        (
            add(&["--out", "x", "--data", "*.jsonl", "--set", "data.mixing=interleaved"]),
            2,
            "`data.domains[0].weight` must be 1 with `data.mixing = \"interleaved\"`, got 0.2",
        ),
        (
            add(&["--out", "x", "--set", "lora.num_experts=4"]),
            2,
            "`lora.num_experts` must stay 3 where an expert is added, got 4",
        ),
        (
            add(&["--out", "x", "--set", "router.scope=layer"]),
            2,
            "`router.scope` must stay \"shared\" where an expert is added, got \"layer\"",
        ),
        (
            add(&["--out", "x", "--consolidation-rate", "0"]),
            2,
            "`growth.consolidation_rate` must be a number above 0, got 0",
        ),
        ([&remove[..], &["2"]].concat(), 2, "there is no expert 2, the mixture has 2 from 0"),
        ([&merge[..], &["0,2"]].concat(), 2, "there is no expert 2, the mixture has 2 from 0"),
        ([&merge[..], &["1,1"]].concat(), 2, "`--experts` must name two experts, got [1, 1]"),
    ] {
        let (found, message) = life.fault(&arguments)?;
        assert_eq!(found, Some(code), "{arguments:?}: {message}");
        assert!(message.contains(said), "{arguments:?}: {message}");
    }
    let (code, message) = life.fault(&[
        "add-expert",
        "--checkpoint",
        "two",
        "--data",
        "*.train.jsonl",
        "--out",
        "x",
    ])?;
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("gives the domain no name\nhint: `--domain NAME`"), "{message}");
    assert!(contents(life.world.dir.path())? == before, "something was written");
    Ok(())
}

/// The text of an earlier domain under another name cannot be told from that domain.
fn a_known_skill_gets_no_expert_and_a_forced_one_no_tokens(life: &Life) -> Result<()> {
    let add = [
        "add-expert",
        "--checkpoint",
        "two",
        "--data",
        "up.train.jsonl",
        "--domain",
        "again",
        "--steps",
        "4",
        "--out",
        "forced",
    ];
    let (code, message) = life.fault(&add)?;
    assert_eq!(code, Some(1), "{message}");
    assert!(
        message.starts_with(
            "error: `again` is no new skill: it is like `up` (cosine 1.000, known \
                             from 0.93 on), which expert_"
        ),
        "{message}"
    );
    assert!(
        message.ends_with("covers\nhint: `--force` adds an expert all the same\n"),
        "{message}"
    );
    assert!(!life.world.path("forced").exists());
    let (code, message) = life.fault(&[&add[..], &["--force"]].concat())?;
    assert_eq!(code, Some(1), "{message}");
    for said in [
        "which expert_1 covers; an expert is added all the same\n",
        "error: the router cannot tell `again` from the earlier domains: on held-out tokens, the \
         new expert gets 0.",
        " of the weight, less than 0.5\nhint: routers that read more tell domains apart better",
        "is the new data like the old?\nno checkpoint was written\n",
    ] {
        assert!(message.contains(said), "{said}\n{message}");
    }
    assert!(!life.world.path("forced/checkpoints").exists());
    has_no_checkpoint(life, "forced", "forced` holds no checkpoint\nhint: name a run's folder")?;
    // with checkpoints from before the failure
    let every = ["--set", "train.checkpoint_every_steps=1", "--set", "train.keep_last=9"];
    let seeds = ["--force", "--seed-steps", "3"];
    let (code, message) = life.fault(&[&add[..], &every, &seeds].concat())?;
    assert_eq!(code, Some(1), "{message}");
    let said = "the stage's checkpoints are in `";
    assert!(message.contains(said) && message.ends_with("/forced/rejected`\n"), "{message}");
    is_rejected(life, "forced", 2)
}

/// Checks that the commands that take a run's folder find no checkpoint in it, and say so.
fn has_no_checkpoint(life: &Life, run: &str, said: &str) -> Result<()> {
    for command in [
        ["eval", "--checkpoint", run].as_slice(),
        &["train", "--resume", run],
        &["export-adapters", "--checkpoint", run, "--out", "no-export"],
    ] {
        let (code, message) = life.fault(command)?;
        assert_eq!(code, Some(1), "{command:?}: {message}");
        assert!(message.contains(said), "{command:?}: {message}");
    }
    Ok(())
}

/// Checks that a run's checkpoints, the last of which is of step `last`, were moved away.
fn is_rejected(life: &Life, run: &str, last: u64) -> Result<()> {
    assert!(!life.world.path(&format!("{run}/checkpoints")).exists());
    let step = life.world.path(&format!("{run}/rejected/step-{last:08}"));
    assert!(step.exists(), "{}", step.display());
    let said = format!("{run}` holds no checkpoint: its stage failed to add an expert, and its");
    has_no_checkpoint(life, run, &said)?;
    // one that is named is read all the same
    let report = life.json(&["eval", "--checkpoint", &format!("{run}/rejected/step-{last:08}")])?;
    assert!(report["loss"].is_number(), "{report}");
    Ok(())
}

/// The column opens, but with so small a rate the expert learns nothing. A stage that was
/// interrupted and is resumed fails in the same way.
fn an_expert_that_brings_nothing_is_rejected(life: &Life) -> Result<()> {
    let sets = [
        "--set",
        "optimizer.adapters.learning_rate=1e-12",
        "--set",
        "train.checkpoint_every_steps=1",
    ];
    let add = [&ADD[..], &["--out", "nothing", "--threshold", "1"], &sets].concat();
    // a second attempt in the same folder fails in the same way
    for _ in 0..2 {
        let (code, message) = life.fault(&add)?;
        assert_eq!(code, Some(1), "{message}");
        let said = "error: the new expert brings `third` nothing: its loss is ";
        assert!(message.contains(said), "{message}");
        assert!(message.contains("hint: begin again with more `--steps`"), "{message}");
        is_rejected(life, "nothing", 2)?;
    }
    let run = life.world.path("nothing");
    fs_err::create_dir(run.join("checkpoints"))?;
    fs_err::rename(run.join("rejected/step-00000001"), run.join("checkpoints/step-00000001"))?;
    let (code, message) = life.fault(&["train", "--resume", "nothing"])?;
    assert_eq!(code, Some(1), "{message}");
    assert!(message.contains("error: the new expert brings `third` nothing"), "{message}");
    is_rejected(life, "nothing", 2)
}

fn an_expert_is_added(life: &Life) -> Result<()> {
    let add = [&ADD[..], &["--out", "three", "--threshold", "1", "--replay", "0.5"]].concat();
    let added = life.json(&add)?;
    assert_eq!((&added["ending"], &added["expert"]), (&"completed".into(), &2.into()));
    assert!(added["largest_new_prob"].as_f64() <= Some(1.001e-8), "{added}");
    assert!(life.world.path("three/checkpoints/step-00000002/skills.json").exists());
    let before = contents(&life.world.path("three"))?;
    let (code, message) = life.fault(&add)?;
    assert_eq!(code, Some(1), "{message}");
    assert!(message.contains("/three` holds checkpoints of an earlier run"), "{message}");
    assert!(contents(&life.world.path("three"))? == before, "the run has changed");

    let report = life.json(&["eval", "--checkpoint", "three"])?;
    assert_eq!(report["stages"], added["stages"]);
    assert_eq!(report["forgetting"], added["forgetting"]);
    let output = life.run(&["eval", "--checkpoint", "three", "-q"])?;
    let text = String::from_utf8(output.stdout)?;
    let (_, matrix) = text.split_once("(forgetting matrix)\n").context("there is a matrix")?;
    let rows: Vec<Vec<&str>> = matrix
        .lines()
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows[0], ["stage", "experts", "up", "down", "third"]);
    assert_eq!((rows[2][0], rows[2][1]), ("1 train", "2"));
    assert_eq!((rows[3][0], rows[3][1]), ("2 add third", "3"));
    assert_eq!(rows[4][0], "since it was learned");
    let number = |row: usize, column: usize| rows[row][column].parse::<f64>();
    for column in [2, 3] {
        let rise = number(3, column)? - number(2, column)?;
        assert!((number(4, column)? - rise).abs() < 2e-4, "{matrix}");
    }
    assert_eq!(rows[4][4], "+0.0000");
    Ok(())
}

/// Changes expert 2 in the last checkpoint of the run `three`. Returns the path of the checkpoint.
///
/// - `expert`: makes one of its tensors from that of expert 0
/// - `copies_column`: whether it also gets the router column of expert 0
fn with_another(
    life: &Life,
    expert: &dyn Fn(&Tensor) -> Tensor,
    copies_column: bool,
) -> Result<String> {
    let dir = life.world.path("three/checkpoints/step-00000002");
    let mut tensors = read_tensors(&dir.join("model.safetensors"))?;
    let copies: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| name.contains(".expert_0."))
        .map(|(name, tensor)| (name.replace(".expert_0.", ".expert_2."), expert(tensor)))
        .collect();
    tensors.extend(copies);
    for (name, tensor) in tensors.iter().filter(|(name, _)| name.starts_with("router")) {
        assert_eq!(tensor.size()[0], 3, "{name}");
        tensor.get(2).copy_(&tensor.get(if copies_column { 0 } else { 2 }));
    }
    write_tensors(&dir.join("model.safetensors"), tensors.iter().map(|(n, t)| (n.as_str(), t)))?;
    forget_sums(&dir)?;
    Ok(dir.to_str().context("UTF-8")?.to_owned())
}

/// An expert of noise, which the third domain gets, spoils the other domains if it is merged. To
/// remove it is better.
fn a_merge_that_is_worse_than_a_removal_is_refused(life: &Life) -> Result<()> {
    let checkpoint = with_another(life, &|tensor| tensor.randn_like(), false)?;
    let merge = ["merge-experts", "--checkpoint", &checkpoint, "--experts", "0,2", "--out", "bad"];
    let (code, message) = life.fault(&merge)?;
    assert_eq!(code, Some(1), "{message}");
    for said in [
        "error: merging expert_0 and expert_2 brings nothing: the mean loss would be ",
        ", and without expert_2 instead it is ",
        "\nhint: name experts that are more alike with `--experts A,B`, or use `remove-expert \
         --expert 2`",
    ] {
        assert!(message.contains(said), "{said}\n{message}");
    }
    assert!(!life.world.path("bad").exists());
    Ok(())
}

fn experts_are_removed_and_merged(life: &Life) -> Result<()> {
    let checkpoint = with_another(life, &Tensor::copy, true)?;
    let merged = life.json(&["merge-experts", "--checkpoint", &checkpoint, "--out", "merged"])?;
    assert_eq!(merged["change"], "merge expert_0 expert_2");
    let message = merged["message"].as_str().context("text")?;
    assert!(message.contains("the cosine of their updates is 1.000"), "{message}");
    assert!(message.ends_with("the merged one is 0.00 % off for its rank"), "{message}");
    let loss = |when: &str| merged[when]["loss"].as_f64().context("a number");
    assert!((loss("before")? - loss("after")?).abs() < 1e-5, "{merged}");

    let removed = ["remove-expert", "--checkpoint", "three", "--expert", "2", "--out", "removed"];
    let removed = life.json(&removed)?;
    assert_eq!(removed["change"], "remove expert_2");
    let (names, expert) = life.skills("merged")?;
    assert_eq!((names.join(" "), expert), ("up down third".into(), 0.into()));
    // the domain of a removed expert can be learned again
    assert_eq!(life.skills("removed")?.0, ["up", "down"]);
    let again = ["add-expert", "--checkpoint", "removed", "--data", "third.train.jsonl"];
    let more = ["--steps", "2", "--threshold", "0.9999", "--out", "anew"];
    let anew = life.json(&[&again[..], &more[..]].concat())?;
    assert_eq!((&anew["domain"], &anew["expert"]), (&"third".into(), &2.into()));
    assert_eq!(anew["forgetting"]["third"], 0.0);
    let (names, expert) = life.skills("anew")?;
    assert_eq!((names.join(" "), expert), ("up down third".into(), 2.into()));
    let one = ["remove-expert", "--checkpoint", "removed", "--expert", "0", "--out", "one"];
    life.json(&one)?;
    let last = ["remove-expert", "--checkpoint", "one", "--expert", "0", "--out", "none"];
    let (code, message) = life.fault(&last)?;
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("the only expert cannot be removed"), "{message}");
    let (code, message) = life.fault(&["merge-experts", "--checkpoint", "one", "--out", "none"])?;
    assert_eq!(code, Some(2), "{message}");
    assert!(message.contains("a single expert has none to merge with"), "{message}");

    for (run, count) in [("merged", 2), ("removed", 2), ("one", 1)] {
        let report = life.json(&["eval", "--checkpoint", run])?;
        let stages = report["stages"].as_array().context("a list")?;
        assert_eq!(stages.last().context("a stage")?["num_experts"], count, "{run}");
        let resumed =
            life.json(&["train", "--resume", run, "--set", "train.duration={steps=1}"])?;
        assert_eq!((&resumed["ending"], &resumed["step"]), (&"completed".into(), &1.into()));
        let out = format!("{run}-export");
        let export = ["export-adapters", "--checkpoint", run, "--out", &out, "-q"];
        assert!(life.run(&export)?.status.success());
        let last = format!("{out}/expert_{}/adapter_config.json", count - 1);
        assert!(life.world.path(&last).exists(), "{last}");
    }
    // adding to a single expert adds a router
    let add = ["add-expert", "--checkpoint", "one", "--data", "third.train.jsonl"];
    let more = ["--steps", "2", "--force", "--out", "two-again", "--set", "router.scope=layer"];
    let added = life.json(&[&add[..], &more[..]].concat())?;
    assert_eq!(added["expert"], 1);
    assert!(added["largest_new_prob"].as_f64() <= Some(1.001e-8), "{added}");
    Ok(())
}

/// The experts of each domain in a run's last checkpoint.
fn experts_of_domains(life: &Life, run: &str) -> Result<Vec<Vec<i64>>> {
    let config = read_config(&life.world.path(run).join("checkpoints/last"))?;
    let experts = config.data.domains.iter().map(|domain| match &domain.expert {
        Some(experts) => experts.experts().to_vec(),
        None => vec![],
    });
    Ok(experts.collect())
}

/// Each domain has two experts, which the routers are taught, beside a part that is always on.
#[test]
fn experts_of_domains_come_and_go_beside_a_part_that_is_always_on() -> Result<()> {
    let _alone = alone();
    let world = World::new()?;
    third_domain(&world)?;
    let overrides = [
        "lora.num_experts=4",
        "lora.shared_rank=2",
        "router.domain_supervision=0.5",
        "router.input=layer_input",
        "router.scope=layer",
        "train.duration={steps=3}",
    ];
    train(&world.config("two", &overrides)?, None)?;
    let life = Life { world };
    assert_eq!(experts_of_domains(&life, "two")?, [[0, 1], [2, 3]]);
    let added = life.json(&[&ADD[..], &["--out", "three", "--threshold", "1"]].concat())?;
    assert_eq!(added["expert"], 4);
    let of = |run: &str| experts_of_domains(&life, run);
    assert_eq!(of("three")?, [vec![0, 1], vec![2, 3], vec![4]]);

    let merge = ["merge-experts", "--checkpoint", "three", "--out", "merged", "--experts", "1,2"];
    life.json(&merge)?;
    assert_eq!(of("merged")?, [vec![0, 1], vec![1, 2], vec![3]]);
    goes_on(&life, "merged", 4)?;
    let remove = ["remove-expert", "--checkpoint", "three", "--out", "removed", "--expert", "4"];
    let removed = life.json(&remove)?;
    let said = "; all that are left now serve `third`, which had no other";
    assert!(removed["message"].as_str().context("text")?.ends_with(said), "{removed}");
    assert_eq!(of("removed")?, [vec![0, 1], vec![2, 3], vec![0, 1, 2, 3]]);
    goes_on(&life, "removed", 4)?;
    // a mixture that lost an expert gains one again
    let again = ["add-expert", "--checkpoint", "removed", "--data", "third.train.jsonl"];
    let more = ["--steps", "2", "--threshold", "1", "--out", "again"];
    life.json(&[&again[..], &more[..]].concat())?;
    assert_eq!(of("again")?, [vec![0, 1], vec![2, 3], vec![4]]);
    goes_on(&life, "again", 5)
}

/// Checks that a mixture is evaluated with the domain supervision, exported and trained further,
/// and that it still has the part that is always on.
fn goes_on(life: &Life, run: &str, num_experts: u64) -> Result<()> {
    let dir = life.world.path(run).join("checkpoints/last");
    let shared = |name: &String| name.contains(".shared.");
    let tensors = read_tensors(&dir.join("model.safetensors"))?;
    assert!(tensors.iter().any(|(name, _)| shared(name)));
    let report = life.json(&["eval", "--checkpoint", run])?;
    assert!(report["domain_supervision"].is_number(), "{run}: {report}");
    let weights = report["routing"]["mean_routing_weights"].as_array().context("a list")?;
    assert_eq!(weights.len() as u64, num_experts);
    let steps = read_state(&dir)?.step + 2;
    let duration = format!("train.duration={{steps={steps}}}");
    let resumed = life.json(&["train", "--resume", run, "--set", &duration])?;
    assert_eq!((&resumed["ending"], &resumed["step"]), (&"completed".into(), &steps.into()));
    let trained = read_tensors(&life.world.path(run).join("checkpoints/last/model.safetensors"))?;
    let moved = trained.iter().filter(|(name, tensor)| {
        tensors.iter().any(|(other, before)| other == *name && before != *tensor)
    });
    let moved: Vec<&String> = moved.map(|(name, _)| name).collect();
    assert!(moved.iter().any(|name| shared(name)), "{moved:?}");
    assert!(moved.iter().any(|name| name.contains(".expert_0.")), "{moved:?}");
    Ok(())
}

/// The earlier domains have no validation set. A part of the new domain is held out.
fn an_expert_is_added_without_validation_files(life: &Life) -> Result<()> {
    let overrides = ["lora.num_experts=2", "train.duration={steps=1}"];
    let mut bare = life.world.config("bare", &overrides)?;
    bare.data.domains.iter_mut().for_each(|domain| domain.validation = None);
    train(&bare, None)?;
    let text = fs_err::read_to_string(life.world.path("third.train.jsonl"))?;
    let two: Vec<&str> = text.lines().take(2).collect();
    fs_err::write(life.world.path("two.jsonl"), two.join("\n"))?;
    let add = ["add-expert", "--checkpoint", "bare", "--steps", "1", "--threshold", "1", "--data"];
    let (code, message) = life.fault(&[&add[..], &["two.jsonl", "--out", "x"]].concat())?;
    assert_eq!(code, Some(1), "{message}");
    assert!(message.contains("of domain `two` holds out none of its 2 documents"), "{message}");
    let added = life.json(&[&add[..], &["third.train.jsonl", "--out", "bare-three"]].concat())?;
    assert_eq!((&added["expert"], &added["domain"]), (&2.into(), &"third".into()));
    let forgetting = added["forgetting"].as_object().context("an object")?;
    assert!(forgetting.keys().eq(["third"]), "{added}");
    Ok(())
}
