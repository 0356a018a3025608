//! Downloads that are interrupted and resumed, that run at the same time, and that report their
//! progress.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::Result;
use dylora::hub::{DownloadProgress, find_base};

use crate::mock::{Fault, etag};
use crate::{content_requests, fault, find, repo_dir, source, tiny_gpt2, weights};

#[test]
fn a_dropped_connection_is_continued_where_it_broke() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::CutAfter(150_000), Fault::Status(503), Fault::CutAfter(100_000)]);
    let files = find(&settings)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    let ranges = ["bytes=0-", "bytes=150000-", "bytes=150000-", "bytes=250000-"];
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
    let hint = "hint: run it again; what is there of the file is continued";
    assert!(message.starts_with("cannot fetch `model.safetensors`: "), "{message}");
    assert!(message.ends_with(&format!("answers 503 Service Unavailable\n{hint}")), "{message}");
    hub.take_requests();

    settings.offline = true;
    find(&settings).expect_err("a part is not taken as complete");
    settings.offline = false;
    let files = find(&settings)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    assert_eq!(content_requests(&hub.take_requests()), ["bytes=150000-"]);
    Ok(())
}

#[test]
fn a_server_without_ranges_is_read_from_the_start() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::CutAfter(150_000), Fault::IgnoreRange]);
    let progress = Recorder::default();
    let files = find_base(&source("main"), &settings, &progress)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    let ranges = ["bytes=0-", "bytes=150000-"];
    assert_eq!(content_requests(&hub.take_requests()), ranges);
    assert_eq!(progress.arrived("model.safetensors"), 400_000);
    Ok(())
}

/// A killed process may leave a part of any length, even the whole file or more than it.
#[test]
fn a_part_of_any_length_ends_in_the_right_file() -> Result<()> {
    let weights = weights();
    let too_long = [&weights[..], &[0; 1000]].concat();
    let parts: [(&[u8], bool, &[&str]); 5] = [
        (&weights[..1000], true, &["bytes=1000-"]),
        (&weights, true, &["bytes=0-"]),
        (&too_long, true, &["bytes=0-"]),
        // in the cases below, the Hub does not say how long the file is
        (&weights, false, &["bytes=400000-", "bytes=0-"]),
        (&too_long, false, &["bytes=401000-", "bytes=0-"]),
    ];
    for (part, tells_size, ranges) in parts {
        let (hub, _dir, settings) = tiny_gpt2()?;
        if !tells_size {
            hub.hide_sizes();
        }
        let blobs = repo_dir(&settings).join("blobs");
        fs_err::create_dir_all(&blobs)?;
        fs_err::write(blobs.join(format!("{}.incomplete", etag(&weights))), part)?;
        let files = find(&settings)?;
        assert_eq!(fs_err::read(&files.weights[0])?, weights);
        assert_eq!(content_requests(&hub.take_requests()), ranges);
    }
    Ok(())
}

#[test]
fn a_content_longer_than_announced_is_not_kept() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    hub.set_faults(&[Fault::Append(1); 4]);
    assert_eq!(
        fault(find(&settings), &settings),
        "cannot fetch `model.safetensors`: 400001 bytes came where 400000 were announced\n\
         hint: run it again; what is there of the file is continued"
    );
    settings.offline = true;
    find(&settings).expect_err("the file was removed");
    settings.offline = false;
    hub.set_faults(&[Fault::Append(1)]);
    assert_eq!(fs_err::read(&find(&settings)?.weights[0])?, weights());
    Ok(())
}

#[test]
fn processes_that_fetch_the_same_file_all_get_it() -> Result<()> {
    let (_hub, _dir, settings) = tiny_gpt2()?;
    std::thread::scope(|scope| {
        let runs = [(); 4].map(|()| scope.spawn(|| find(&settings)));
        for run in runs {
            let files = run.join().expect("it does not panic")?;
            assert_eq!(fs_err::read(&files.weights[0])?, weights());
        }
        anyhow::Ok(())
    })
}

/// Records the current file, and for each file the bytes that have arrived since its last start and
/// the total.
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
