//! `dylora doctor`: looks at the machine and says what to do about what is missing.

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use super::doctor_checks::{Check, State, checks};
use super::doctor_facts::Facts;
use super::print_result;
use super::results::Schema;
use crate::config::DeviceChoice;

/// Columns of the text, and those before a finding.
const WIDTH: usize = 80;
const LEFT: usize = 19;

/// Arguments of `dylora doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The device that has to work: `auto`, `cpu` or `cuda[:N]`. With `auto`, the CPU is enough.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Ask the Hub whether it can be reached and accepts the token. Without this, nothing is sent.
    #[arg(long)]
    online: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// If something that dylora needs is broken; the findings are printed first.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let facts = Facts::collect(args.online)?;
    let found = checks(&facts, args.device);
    let broken: Vec<&str> =
        found.iter().filter(|check| check.state == State::Broken).map(|check| check.name).collect();
    if args.json {
        let json = json!({ "ok": broken.is_empty(), "checks": found, "facts": facts });
        print_result(&Schema::Doctor.text(json))?;
    } else {
        print_result(&text(&facts.dylora, &found))?;
    }
    if !broken.is_empty() {
        bail!("broken: {}", broken.join(", "));
    }
    Ok(())
}

/// The findings, each with its hint below.
fn text(version: &str, found: &[Check]) -> String {
    let mut lines = vec![format!("dylora {version}")];
    for check in found {
        let head = format!("{:<9}{:<10}", check.state.name(), check.name);
        wrap(&mut lines, &head, &check.found);
        if let Some(hint) = &check.hint {
            wrap(&mut lines, &" ".repeat(LEFT), &format!("-> {hint}"));
        }
    }
    let count = |state| found.iter().filter(|check| check.state == state).count();
    lines.push(match (count(State::Broken), count(State::Warning)) {
        (0, 0) => "everything that dylora needs is there".into(),
        (0, 1) => "dylora works; see the warning".into(),
        (0, warnings) => format!("dylora works; see the {warnings} warnings"),
        (1, _) => "1 thing is broken".into(),
        (broken, _) => format!("{broken} things are broken"),
    });
    lines.join("\n")
}

/// Appends `text` after `head`, in lines of at most [`WIDTH`] characters unless a word is longer.
fn wrap(lines: &mut Vec<String>, head: &str, text: &str) {
    let mut line = head.to_owned();
    for word in text.split_whitespace() {
        let is_first = line.chars().count() == LEFT;
        if !is_first && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(std::mem::replace(&mut line, " ".repeat(LEFT)));
            line.push_str(word);
            continue;
        }
        line.push_str(if is_first { "" } else { " " });
        line.push_str(word);
    }
    lines.push(line);
}

#[cfg(test)]
mod tests {
    use super::super::doctor_facts::{
        Answer, Cpu, Cuda, Facts, Folder, Gpu, Hub, Libtorch, Memory,
    };
    use super::*;

    fn folder(path: &str) -> Folder {
        Folder { path: path.into(), bytes: Some(3 << 20), free_bytes: Some(9 << 30), fault: None }
    }

    /// A machine without a GPU.
    fn plain() -> Facts {
        Facts {
            dylora: "0.1.0".into(),
            libtorch: Libtorch {
                compiled_with: "2.11.0".into(),
                loaded: Some("2.11.0".into()),
                file: "/torch/lib/libtorch_cpu.so".into(),
                fault: None,
            },
            cpu: Cpu { model: Some("Fast".into()), cores: 2, threads: 2, asked_threads: None },
            cuda: Cuda {
                fault: Some("this libtorch is a CPU build".into()),
                libtorch_has_cuda: false,
                runtime: None,
                driver: None,
                driver_fault: None,
                gpus: vec![],
            },
            memory: Memory { total_bytes: 8 << 30, available_bytes: 5 << 30 },
            working_folder: folder("/here"),
            cache: folder("/home/.cache/dylora"),
            hub: Hub {
                endpoint: "https://huggingface.co".into(),
                offline: false,
                cache: folder("/home/.cache/huggingface/hub"),
                token_from: Some("`HF_TOKEN`".into()),
                answer: None,
            },
        }
    }

    /// The same machine with a GPU and its driver.
    fn with_gpu() -> Facts {
        let gpu = Gpu {
            name: "NVIDIA H100".into(),
            capability: [9, 0],
            memory_bytes: 80 << 30,
            fault: None,
            kernels_fault: None,
        };
        let mut facts = plain();
        facts.cuda.driver = Some([12, 8]);
        facts.cuda.gpus = vec![gpu];
        facts
    }

    /// The same machine with a libtorch that can use the GPU.
    fn with_cuda() -> Facts {
        let mut facts = with_gpu();
        facts.cuda.fault = None;
        facts.cuda.libtorch_has_cuda = true;
        (facts.cuda.driver, facts.cuda.runtime) = (Some([13, 1]), Some([13, 0]));
        facts
    }

    #[test]
    fn a_machine_without_a_gpu_is_fine() {
        let facts = plain();
        insta::assert_snapshot!(text(&facts.dylora, &checks(&facts, DeviceChoice::Auto)), @r"
        dylora 0.1.0
        ok       libtorch  2.11.0, loaded from `/torch/lib/libtorch_cpu.so`
        ok       device    cpu: Fast, 2 cores
        note     CUDA      none: there is no NVIDIA driver (`libcuda.so.1`), and this
                           libtorch is a CPU build
                           -> nothing to do on a CPU; for a GPU, install its driver,
                           start a container with `--gpus all`, and use a libtorch with
                           CUDA (`scripts/setup --cuda`, or PyTorch's wheel with CUDA)
        ok       threads   libtorch computes with 2 on 2 cores
        ok       memory    5.00 GiB of 8.00 GiB are free
        ok       disk      9.00 GiB are free in this folder, `/here`
        ok       cache     3.0 MiB of tokens and kernels in `/home/.cache/dylora`; 9.00
                           GiB are free
        ok       Hub       https://huggingface.co, with the token from `HF_TOKEN`; 3.0
                           MiB in `/home/.cache/huggingface/hub`
        everything that dylora needs is there
        ");
    }

    #[test]
    fn a_machine_with_a_gpu_computes_on_it() {
        let facts = with_cuda();
        let text = text(&facts.dylora, &checks(&facts, DeviceChoice::Auto));
        insta::assert_snapshot!(text.lines().take(7).collect::<Vec<_>>().join("\n"), @r"
        dylora 0.1.0
        ok       libtorch  2.11.0, loaded from `/torch/lib/libtorch_cpu.so`
        ok       device    cuda:0 NVIDIA H100, 80.00 GiB, compute capability 9.0
        ok       CUDA      libtorch has 13.0, the driver can run 13.1; cuda:0 NVIDIA
                           H100, 80.00 GiB, compute capability 9.0
        ok       kernels   NVRTC compiles dylora's own kernels
        ok       threads   libtorch computes with 2 on 2 cores
        ");
    }

    /// The state, the finding and the hint of one check.
    fn said(facts: &Facts, device: DeviceChoice, name: &str) -> String {
        let found = checks(facts, device);
        let check = found.iter().find(|check| check.name == name).expect("it is checked");
        let hint = check.hint.as_deref().unwrap_or_default();
        format!("{}: {}\n{hint}", check.state.name(), check.found)
    }

    #[test]
    fn each_way_to_lack_cuda_is_told_from_the_others() {
        let mut too_old = with_cuda();
        too_old.cuda.fault = Some("it finds no usable GPU and driver".into());
        too_old.cuda.driver = Some([12, 8]);
        let mut no_library = too_old.clone();
        no_library.cuda.driver = Some([13, 0]);
        no_library.cuda.fault = Some("libcudnn.so.9: cannot open shared object file".into());
        let mut asleep = with_gpu();
        asleep.cuda.driver = None;
        asleep.cuda.gpus = vec![];
        asleep.cuda.driver_fault = Some("the driver does not start: unknown error".into());
        let mut hidden = with_gpu();
        hidden.cuda.gpus = vec![];
        for (facts, expected) in [
            (
                plain(),
                "note: none: there is no NVIDIA driver (`libcuda.so.1`), and this libtorch is",
            ),
            (
                with_gpu(),
                "compute capability 9.0, but this libtorch is a CPU build\n`scripts/setup",
            ),
            (
                too_old,
                "it is too old: it can run CUDA 12.8, and libtorch has 13.0\nupdate NVIDIA's",
            ),
            (no_library, "libtorch cannot use it: libcudnn.so.9: cannot open shared object file"),
            (asleep, "the driver does not start: unknown error\n`nvidia-smi` has to work first"),
            (hidden, "warning: NVIDIA's driver is there, but finds no GPU\nlook at `CUDA_VISIBLE"),
        ] {
            let found = said(&facts, DeviceChoice::Auto, "CUDA");
            assert!(found.contains(expected), "{found}");
            assert!(!found.starts_with("broken"), "the CPU is enough: {found}");
            // a GPU that was asked for and does not work is a fault
            let asked = DeviceChoice::Cuda(0);
            assert!(said(&facts, asked, "CUDA").starts_with("broken: "), "{found}");
            assert!(said(&facts, asked, "device").starts_with("broken: there is no `cuda:0`"));
        }
    }

    #[test]
    fn a_gpu_that_does_not_compute_is_broken_and_lost_kernels_are_a_warning() {
        let mut facts = with_cuda();
        facts.cuda.gpus[0].kernels_fault = Some("NVRTC does not start".into());
        let found = said(&facts, DeviceChoice::Auto, "kernels");
        assert!(found.starts_with("warning: dylora's own kernels cannot be made"), "{found}");
        facts.cuda.gpus[0].fault = Some("no kernel image is available".into());
        let found = said(&facts, DeviceChoice::Auto, "device");
        assert!(found.starts_with("broken: cuda:0 NVIDIA H100"), "{found}");
        assert!(found.contains("too old for this libtorch"), "{found}");
        assert!(said(&facts, DeviceChoice::Cpu, "device").starts_with("ok: cpu"));
        let beyond = said(&with_cuda(), DeviceChoice::Cuda(1), "device");
        assert!(beyond.starts_with("broken: there is no `cuda:1`"), "{beyond}");
    }

    #[test]
    fn another_libtorch_too_many_threads_and_full_disks_are_found() {
        let mut facts = plain();
        facts.libtorch.loaded = Some("2.10.0".into());
        facts.cpu.threads = 64;
        facts.memory.available_bytes = 1 << 28;
        facts.working_folder.free_bytes = Some(1 << 20);
        facts.cache.fault = Some("Permission denied (os error 13)".into());
        for (name, expected) in [
            ("libtorch", "broken: `/torch/lib/libtorch_cpu.so` is 2.10.0, and dylora was compiled"),
            ("threads", "warning: libtorch computes with 64 on 2 cores\nmore threads than cores"),
            ("memory", "warning: 256.0 MiB of 8.00 GiB are free\n"),
            ("disk", "warning: 1.0 MiB are free in this folder, `/here`\n"),
            ("cache", "warning: no file can be written in `/home/.cache/dylora`: Permission"),
        ] {
            let found = said(&facts, DeviceChoice::Auto, name);
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn the_hubs_answer_decides_with_online() {
        for (answer, expected) in [
            (Answer::Anonymous, "ok: https://huggingface.co answers; there is no token; 3.0 MiB"),
            (Answer::Account("ada".into()), "ok: https://huggingface.co knows the token from `HF"),
            (Answer::Refused, "broken: https://huggingface.co refuses the token from `HF_TOKEN`"),
            (Answer::Unreachable("timeout".into()), "broken: https://huggingface.co cannot be"),
        ] {
            let mut facts = plain();
            facts.hub.answer = Some(answer);
            let found = said(&facts, DeviceChoice::Auto, "Hub");
            assert!(found.starts_with(expected), "{found}");
        }
        let mut facts = plain();
        facts.hub.offline = true;
        assert!(said(&facts, DeviceChoice::Auto, "Hub").starts_with("note: `HF_HUB_OFFLINE`"));
    }
}
