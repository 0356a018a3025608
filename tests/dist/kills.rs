//! Processes that are killed at random moments: the run that goes on after each of them equals one
//! that was never broken, to the bit.

use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dylora::tensor_file::read_tensors;
use serde_json::Value;

use crate::scene::{Scene, as_str, ended, send, text, train};

/// Number of kills, unless `DYLORA_TEST_KILLS` says otherwise.
const NUM_KILLS: u64 = 3;

/// Settings by which a run's steps do not depend on how long it lasts.
const CONSTANT: [&str; 2] =
    ["lora.dropout=0.2", "schedule={kind='constant', warmup_steps=0, min_ratio=0.0}"];

/// The processes that `launch` has started.
fn children(launch: &Child) -> Result<Vec<i32>> {
    let own = launch.id();
    let text = fs_err::read_to_string(format!("/proc/{own}/task/{own}/children"))?;
    Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

/// Kills a random process of a run in a random moment after it has gone on.
fn kill_one(scene: &Scene, launch: &Child, random: &mut impl Iterator<Item = u64>) -> Result<()> {
    let path = scene.path("run/metrics.jsonl");
    let lines = || fs_err::read_to_string(&path).unwrap_or_default().lines().count();
    let (before, begun) = (lines(), Instant::now());
    while lines() <= before {
        if begun.elapsed() > Duration::from_secs(120) {
            bail!("the run does not go on");
        }
        sleep(Duration::from_millis(10));
    }
    sleep(Duration::from_millis(random.next().unwrap_or(0) % 1500));
    let children = children(launch)?;
    let victim = children[random.next().unwrap_or(0) as usize % children.len()];
    // SAFETY: `kill` takes two numbers and accesses no memory
    assert_eq!(unsafe { libc::kill(victim, libc::SIGKILL) }, 0);
    sleep(Duration::from_secs(3));
    Ok(())
}

#[test]
fn kills_at_random_moments_lose_nothing() -> Result<()> {
    let kills = std::env::var("DYLORA_TEST_KILLS").ok().map(|text| text.parse()).transpose()?;
    let kills: u64 = kills.unwrap_or(NUM_KILLS);
    let scene = Scene::new()?;
    let arguments = train("run", 1_000_000, 4, &CONSTANT);
    let mut all = vec!["launch", "-n", "2", "--max-restarts", "1000", "--"];
    all.extend(as_str(&arguments));
    let mut command = scene.command(&all);
    command.stderr(fs_err::File::create(scene.path("log.txt"))?.into_parts().0);
    let launch = command.spawn()?;
    // a linear congruential generator (Knuth)
    let mut state = kills;
    let mut random = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    });
    for kill in 0..kills {
        kill_one(&scene, &launch, &mut random).with_context(|| format!("kill {kill}"))?;
    }
    // a process that ends may still write steps, so steps alone do not tell of the last restart
    let restarts = || -> Result<u64> {
        let log = fs_err::read_to_string(scene.path("log.txt"))?;
        Ok(log.matches("was ended by signal 9; restart").count() as u64)
    };
    let begun = Instant::now();
    let mut before = None;
    loop {
        // the last line may be half written
        let steps = scene.metrics("run", "train").map_or(0, |steps| steps.len());
        match before {
            None if steps > 0 && restarts()? == kills => before = Some(steps),
            Some(before) if steps > before => break,
            _ if begun.elapsed() > Duration::from_secs(120) => bail!("the run does not go on"),
            _ => sleep(Duration::from_millis(50)),
        }
    }
    send(&launch, libc::SIGTERM);
    let (output, _) = ended(launch, Duration::from_secs(60))?;
    let log = fs_err::read_to_string(scene.path("log.txt"))?;
    assert_eq!(output.status.code(), Some(143), "{}{log}", text(&output));
    assert_eq!(restarts()?, kills, "{log}");
    same_as_unbroken(&scene)
}

fn same_as_unbroken(scene: &Scene) -> Result<()> {
    let run = scene.metrics("run", "train")?;
    let steps = run.len() as u64;
    let arguments = train("whole", steps, 1_000_000, &CONSTANT);
    let mut all = vec!["launch", "-n", "2", "--"];
    all.extend(as_str(&arguments));
    let output = scene.run(&all)?;
    assert!(output.status.success(), "{}", text(&output));
    for (broken, whole) in run.iter().zip(scene.metrics("whole", "train")?) {
        for key in ["step", "loss", "grad_norm", "tokens_seen"] {
            assert_eq!(broken[key], whole[key], "{key} of step {}", whole["step"]);
        }
    }
    assert_eq!(run.last().map(|line| &line["step"]), Some(&Value::from(steps)));
    let of = |run: &str| {
        let dir = scene.path(run).join(format!("checkpoints/step-{steps:08}"));
        read_tensors(&dir.join("optimizer.safetensors"))
    };
    for ((name, a), (_, b)) in of("run")?.into_iter().zip(of("whole")?) {
        assert!(a.equal(&b), "`{name}` differs");
    }
    Ok(())
}
