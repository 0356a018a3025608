//! A run that is killed again and again, at random moments.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use dylora::tensor_file::read_tensors;

use crate::history::steps;
use crate::{Scene, as_str, text};

/// Number of kills, unless this environment variable says otherwise.
const KILLS: u64 = 12;
const KILLS_VARIABLE: &str = "DYLORA_TEST_KILLS";
/// Number of steps for each kill, about as many as a process does before it is killed.
const STEPS_PER_KILL: u64 = 5;

fn scene(steps: u64) -> Result<(Scene, Vec<String>)> {
    let scene = Scene::new()?;
    let mut arguments = scene.train(steps, 1)?;
    arguments.extend(["--set", "router.window_steps=3"].map(String::from));
    Ok((scene, arguments))
}

/// A number below `most` that follows from `seed` (splitmix64).
fn random(seed: u64, most: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % most
}

#[test]
fn a_run_killed_at_random_moments_equals_an_unbroken_one() -> Result<()> {
    let kills = std::env::var(KILLS_VARIABLE).ok().and_then(|kills| kills.parse().ok());
    let kills = kills.unwrap_or(KILLS);
    let last = kills * STEPS_PER_KILL;
    let (whole, arguments) = scene(last)?;
    assert!(whole.run(&as_str(&arguments))?.status.success());
    let (killed, arguments) = scene(last)?;
    let has_checkpoint = || {
        fs_err::read_dir(killed.path("run/checkpoints"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .any(|entry| entry.file_name().to_string_lossy().starts_with("step-"))
    };
    // on a slow machine, the first runs must live longer to get to a checkpoint
    let (mut resumed, mut reached, mut factor) = (0, vec![], 1);
    for kill in 0..kills {
        let resume = ["train", "--resume", "run"];
        let next = if has_checkpoint() { resume.to_vec() } else { as_str(&arguments) };
        resumed += u64::from(has_checkpoint());
        let mut command = killed.command(&next);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        thread::sleep(Duration::from_millis(factor * (150 + random(kill, 1000))));
        child.kill()?;
        child.wait()?;
        if !has_checkpoint() {
            factor *= 2;
        }
        reached.push(steps(&killed, "train").ok().and_then(|steps| steps.last().copied()));
    }
    assert!(resumed > 0, "no run lived long enough");
    let output = killed.run(&["train", "--resume", "run"])?;
    assert!(output.status.success(), "{}", text(&output));
    println!("{resumed} runs were resumed after a kill, which were at the steps {reached:?}");
    for (kind, every) in [("train", 1), ("window", 3)] {
        let expected: Vec<u64> = (1..=last).filter(|step| step % every == 0).collect();
        assert_eq!(steps(&killed, kind)?, expected, "{kind}");
    }
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let read = |scene: &Scene| {
            let dir = scene.path(&format!("run/checkpoints/step-{last:08}"));
            read_tensors(&dir.join(file))
        };
        let (whole, killed) = (read(&whole)?, read(&killed)?);
        assert!(whole.keys().eq(killed.keys()));
        for (name, tensor) in &whole {
            assert!(tensor.equal(&killed[name]), "{file}: {name}");
        }
    }
    Ok(())
}
