//! Processes that die, stop, differ or do not come: all others end within 30 seconds, and say which
//! one it was and why.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dylora::dist::Limits;

use crate::processes::{self, free_port, own_world, place_of};
use crate::scene::{Scene, as_str, ended, send, text, train};

/// The longest that the others may take to end.
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_process_that_is_killed_or_stopped_ends_all_with_its_name() -> Result<()> {
    for (signal, victim) in
        [(libc::SIGKILL, 1), (libc::SIGKILL, 0), (libc::SIGSTOP, 1), (libc::SIGSTOP, 0)]
    {
        let scene = Scene::new()?;
        let mut children = scene.start(3, &as_str(&train("run", 1_000_000, 5, &[])))?;
        scene.wait_for_lines("run", 12)?;
        send(&children[victim], signal);
        children.swap(victim, 2);
        for (place, child) in children.into_iter().enumerate() {
            if place == 2 {
                send(&child, libc::SIGKILL);
                ended(child, LIMIT)?;
                continue;
            }
            let (output, _) = ended(child, LIMIT)?;
            let message = text(&output);
            assert_eq!(output.status.code(), Some(1), "signal {signal}: {message}");
            let named = match victim {
                0 => message.contains("rank 0, which holds the store"),
                _ => message.contains("rank 1 gave no sign of life"),
            };
            assert!(named, "signal {signal} to rank {victim}: {message}");
            assert!(!message.contains("frame #0"), "{message}");
        }
        // the last checkpoint is whole
        let output = scene.run(&["eval", "--checkpoint", "run", "--device", "cpu"])?;
        assert!(output.status.success(), "{}", text(&output));
    }
    Ok(())
}

/// Waits until the world has failed, without an operation, as a process does that waits for a GPU.
pub fn idle() -> Result<()> {
    let world = own_world(Limits::default())?;
    world.meet()?;
    println!("idle");
    loop {
        world.check()?;
        sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_killed_process_is_missed_soon_although_nothing_is_sent() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut children = processes::start(3, "idle", folder.path())?;
    for child in &mut children {
        let lines = BufReader::new(child.stdout.as_mut().context("a pipe")?).lines();
        let is_idle = |line: Result<String, _>| line.is_ok_and(|line| line.ends_with("idle"));
        assert!({ lines }.any(is_idle), "the process ended");
    }
    let begun = Instant::now();
    send(&children[1], libc::SIGKILL);
    children.swap_remove(1).wait()?;
    for child in children {
        let (output, _) = ended(child, LIMIT)?;
        let (out, err) = (output.stdout, output.stderr);
        let message = String::from_utf8([out, err].concat())?;
        assert!(message.contains("rank 1 gave no sign of life"), "{message}");
    }
    // the limit for signs of life alone is 15 s
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_process_that_fails_tells_the_others_why() -> Result<()> {
    let scene = Scene::new()?;
    let port = free_port()?;
    let sound = train("run", 5, 5, &[]);
    let other = train("run", 5, 5, &["train.duration={steps=6}"]);
    let children = [
        scene.start_one(0, 3, port, &as_str(&sound))?,
        scene.start_one(1, 3, port, &as_str(&sound))?,
        scene.start_one(2, 3, port, &as_str(&other))?,
    ];
    for child in children {
        let (output, _) = ended(child, LIMIT)?;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let message = text(&output);
        assert!(message.contains("rank 2 differs from rank 0 in its config"), "{message}");
        assert!(message.contains("steps = 6") && message.contains("steps = 5"), "{message}");
    }
    // sums that overlap in one process alone
    let port = free_port()?;
    let start = |dist_rank: usize, bytes| {
        let mut command = scene.command(&as_str(&sound));
        command.envs(place_of(dist_rank, 2, port)).env("DYLORA_OVERLAP_BYTES", bytes).spawn()
    };
    for child in [start(0, "0")?, start(1, "1")?] {
        let (output, _) = ended(child, LIMIT)?;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let fault = "rank 1 differs from rank 0 in its `DYLORA_OVERLAP_BYTES`";
        assert!(text(&output).contains(fault), "{}", text(&output));
    }
    // a config that is absent in one process
    let port = free_port()?;
    let absent = ["train", "--config", "absent.toml"];
    let children =
        [scene.start_one(0, 2, port, &as_str(&sound))?, scene.start_one(1, 2, port, &absent)?];
    for (child, code) in children.into_iter().zip([1, 2]) {
        let (output, _) = ended(child, LIMIT)?;
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        assert!(text(&output).contains("absent.toml"), "{}", text(&output));
        assert!(code == 2 || text(&output).contains("rank 1 has failed"), "{}", text(&output));
    }
    Ok(())
}

#[test]
fn data_and_weights_that_differ_are_found_at_the_start() -> Result<()> {
    let scene = Scene::new()?;
    let config = fs_err::read_to_string(scene.path("config.toml"))?;
    fs_err::create_dir(scene.path("other"))?;
    for name in ["base", "config.toml"] {
        fs_err::os::unix::fs::symlink(scene.path(name), scene.path("other").join(name))?;
    }
    // the same config, but other files where it leads
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/data");
    fs_err::write(scene.path("config.toml"), config.replace(demo, "data"))?;
    fs_err::create_dir(scene.path("data"))?;
    fs_err::create_dir(scene.path("other/data"))?;
    for entry in fs_err::read_dir(demo)? {
        let path = entry?.path();
        let name = path.file_name().expect("a file has a name");
        fs_err::copy(&path, scene.path("data").join(name))?;
        let text = fs_err::read_to_string(&path)?;
        let is_train = path.to_string_lossy().contains("arithmetic.train");
        let lines: Vec<&str> = text.lines().skip(usize::from(is_train)).collect();
        fs_err::write(scene.path("other/data").join(name), lines.join("\n"))?;
    }
    let arguments = train("run", 5, 5, &[]);
    let port = free_port()?;
    let first = scene.start_one(0, 2, port, &as_str(&arguments))?;
    let mut second = scene.command(&as_str(&arguments));
    second.envs(place_of(1, 2, port)).current_dir(scene.path("other"));
    for child in [first, second.spawn()?] {
        let (output, _) = ended(child, LIMIT)?;
        let message = text(&output);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("rank 1 differs from rank 0 in its training data"), "{message}");
    }
    Ok(())
}

#[test]
fn an_unsound_environment_is_a_usage_error() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = train("run", 5, 5, &[]);
    for (variables, fault) in [
        (vec![("RANK", "1"), ("WORLD_SIZE", "2")], "`MASTER_ADDR` is not set"),
        (vec![("RANK", "1")], "`WORLD_SIZE` is not set"),
        (vec![("RANK", "one"), ("WORLD_SIZE", "2")], "`RANK` must be a whole number, got `one`"),
    ] {
        let output = scene.command(&as_str(&arguments)).envs(variables).output()?;
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(fault), "{}", text(&output));
    }
    let mut command = scene.command(&as_str(&arguments));
    command.envs(place_of(0, 2, free_port()?)).env("DYLORA_OVERLAP_BYTES", "1 MiB");
    let output = command.output()?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    let fault = "`DYLORA_OVERLAP_BYTES` must be a number of bytes from 0, got `1 MiB`";
    assert!(text(&output).contains(fault), "{}", text(&output));
    let output = scene.command(&["serve"]).env("RANK", "0").env("WORLD_SIZE", "2").output()?;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    Ok(())
}

#[test]
fn a_port_in_use_and_a_master_that_does_not_answer_are_errors_in_bounded_time() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = train("run", 5, 5, &[]);
    let taken = TcpListener::bind("0.0.0.0:0")?;
    let port = taken.local_addr()?.port();
    let first = scene.start_one(0, 2, port, &as_str(&arguments))?;
    let (output, _) = ended(first, LIMIT)?;
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains(&format!("port {port} is in use")), "{}", text(&output));

    let start = |dist_rank: usize, host: &str, port: u16| {
        let mut command = scene.command(&as_str(&arguments));
        command.envs(place_of(dist_rank, 3, port)).env("MASTER_ADDR", host);
        command.env("DYLORA_MEETING_SECS", "3").spawn()
    };
    for (host, fault) in [
        ("127.0.0.1", "nothing answers at `127.0.0.1:"),
        ("no.such.host.invalid", "has no address"),
    ] {
        let (output, took) = ended(start(1, host, free_port()?)?, LIMIT)?;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains(fault), "{}", text(&output));
        assert!(took < Duration::from_secs(15), "{took:?}");
    }
    // of three processes, two come
    let port = free_port()?;
    for child in [start(0, "127.0.0.1", port)?, start(2, "127.0.0.1", port)?] {
        let (output, _) = ended(child, LIMIT)?;
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    }
    Ok(())
}

#[test]
fn two_processes_of_one_rank_are_an_error() -> Result<()> {
    let scene = Scene::new()?;
    let arguments = train("run", 5, 5, &[]);
    let port = free_port()?;
    let mut children = vec![scene.start_one(0, 3, port, &as_str(&arguments))?];
    for _ in 0..2 {
        let mut command = scene.command(&as_str(&arguments));
        command.envs(place_of(1, 3, port)).env("DYLORA_MEETING_SECS", "8");
        children.push(command.spawn()?);
    }
    children.reverse();
    let mut both = vec![];
    for (place, child) in children.into_iter().enumerate() {
        if place == 2 {
            send(&child, libc::SIGKILL);
            ended(child, LIMIT)?;
        } else {
            both.push(ended(child, LIMIT)?.0);
        }
    }
    let says = |output: &_| text(output).contains("another process has `RANK` 1 too");
    assert!(both.iter().any(says), "{}", both.iter().map(text).collect::<String>());
    Ok(())
}
