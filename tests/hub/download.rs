//! Downloads that break, continue, meet each other and report their progress.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::Result;
use dylora::hub::{DownloadProgress, find_base};

use crate::mock::{Fault, sha256};
use crate::{content_requests, fault, find, repo_dir, source, tiny_gpt2, weights};

#[test]
fn a_dropped_connection_is_continued_where_it_broke() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::CutAfter(150_000), Fault::Status(503), Fault::CutAfter(100_000)]);
    let files = find(&settings)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    let ranges = [None, Some("bytes=150000-"), Some("bytes=150000-"), Some("bytes=250000-")];
    assert_eq!(content_requests(&hub.take_requests()), ranges);
    Ok(())
}

#[test]
fn the_next_run_continues_a_download_that_was_given_up() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    hub.set_faults(&[
        Fault::CutAfter(150_000),
        Fault::Status(503),
        Fault::Status(503),
        Fault::Status(503),
    ]);
    let message = fault(find(&settings), &settings);
    let told = "hint: what has arrived is kept, and the next run continues from there";
    assert!(message.starts_with("cannot fetch `model.safetensors`: "), "{message}");
    assert!(message.ends_with(&format!("answers 503 Service Unavailable\n{told}")), "{message}");
    hub.take_requests();

    settings.offline = true;
    find(&settings).expect_err("a part is not taken as complete");
    settings.offline = false;
    let files = find(&settings)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    assert_eq!(content_requests(&hub.take_requests()), [Some("bytes=150000-")]);
    Ok(())
}

#[test]
fn a_server_without_ranges_is_read_from_the_start() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::CutAfter(150_000), Fault::IgnoreRange]);
    let progress = Recorder::default();
    let files = find_base(&source("main"), &settings, &progress)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    assert_eq!(progress.arrived("model.safetensors"), 400_000);
    Ok(())
}

/// A process that is killed leaves any part: a whole one, a wrong one, one that is too long.
#[test]
fn a_part_of_any_state_ends_in_the_right_file() -> Result<()> {
    let weights = weights();
    let wrong = vec![0; 1000];
    let too_long = [&weights[..], &wrong].concat();
    let parts: [(&[u8], &[Option<&str>]); 4] = [
        (&weights, &[]),
        (&weights[..1000], &[Some("bytes=1000-")]),
        (&wrong, &[Some("bytes=1000-"), None]),
        (&too_long, &[None]),
    ];
    for (part, ranges) in parts {
        let (hub, _dir, settings) = tiny_gpt2()?;
        let blobs = repo_dir(&settings).join("blobs");
        fs_err::create_dir_all(&blobs)?;
        fs_err::write(blobs.join(format!("{}.part", sha256(&weights))), part)?;
        let files = find(&settings)?;
        assert_eq!(fs_err::read(&files.weights[0])?, weights);
        assert_eq!(content_requests(&hub.take_requests()), ranges);
    }
    Ok(())
}

#[test]
fn a_content_that_is_not_the_announced_one_is_refused() -> Result<()> {
    for (sent, expected) in [
        (
            Fault::Corrupt,
            format!(
                "the content of `model.safetensors` does not have the SHA-256 `{}`",
                sha256(&weights())
            ),
        ),
        (
            Fault::Append(1),
            "`model.safetensors` is longer than the 400000 bytes announced".to_owned(),
        ),
    ] {
        let (hub, _dir, settings) = tiny_gpt2()?;
        hub.set_faults(&[sent]);
        assert_eq!(fault(find(&settings), &settings), expected);
        assert_eq!(fs_err::read(&find(&settings)?.weights[0])?, weights());
    }
    Ok(())
}

#[test]
fn two_processes_fetch_a_file_once() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    std::thread::scope(|scope| {
        let runs = [(); 4].map(|()| scope.spawn(|| find(&settings)));
        for run in runs {
            let files = run.join().expect("it does not panic")?;
            assert_eq!(fs_err::read(&files.weights[0])?, weights());
        }
        anyhow::Ok(())
    })?;
    assert_eq!(content_requests(&hub.take_requests()), [None]);
    Ok(())
}

/// What arrived of each file since its last start, and whether it ended.
#[derive(Default)]
struct Recorder {
    current: RefCell<String>,
    files: RefCell<BTreeMap<String, (u64, u64)>>,
}

impl Recorder {
    fn arrived(&self, file: &str) -> u64 {
        self.files.borrow()[file].0
    }
}

impl DownloadProgress for Recorder {
    fn start(&self, file: &str, total_bytes: u64) {
        *self.current.borrow_mut() = file.to_owned();
        self.files.borrow_mut().insert(file.to_owned(), (0, total_bytes));
    }

    fn advance(&self, bytes: u64) {
        let current = self.current.borrow();
        self.files.borrow_mut().get_mut(&*current).expect("it was started").0 += bytes;
    }

    fn finish(&self) {
        self.current.borrow_mut().clear();
    }
}

#[test]
fn progress_reaches_the_size_of_each_file() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::CutAfter(150_000)]);
    let progress = Recorder::default();
    find_base(&source("main"), &settings, &progress)?;
    let files = progress.files.borrow();
    assert_eq!(files.len(), 3);
    for (file, (arrived, total)) in &*files {
        assert_eq!(arrived, total, "{file}");
    }
    assert_eq!(files["model.safetensors"].1, 400_000);
    assert_eq!(*progress.current.borrow(), "");
    Ok(())
}
