//! Finding the files of a data set.

use anyhow::Result;
use dylora::config::HubDataset;
use dylora::hub::{DatasetFiles, HubSettings, find_dataset};

use crate::mock::{COMMIT, Fault, MockHub};
use crate::{content_requests, dead_endpoint, fault};

const TWO: [(&str, &[u8]); 5] = [
    ("README.md", b"---"),
    ("main/test-00000-of-00001.parquet", b"test"),
    ("main/train-00000-of-00002.parquet", b"first"),
    ("main/train-00001-of-00002.parquet", b"second"),
    ("other/train-00000-of-00001.parquet", b"of another configuration"),
];

fn source(config: Option<&str>, split: &str) -> HubDataset {
    HubDataset {
        dataset: "org/sums".into(),
        split: split.into(),
        config: config.map(str::to_owned),
        revision: "main".into(),
    }
}

fn find(settings: &HubSettings, config: Option<&str>, split: &str) -> Result<DatasetFiles> {
    find_dataset(&source(config, split), settings, &())
}

fn contents(files: &DatasetFiles) -> Result<Vec<String>> {
    Ok(files.files.iter().map(fs_err::read_to_string).collect::<Result<_, _>>()?)
}

#[test]
fn only_the_files_of_the_split_are_fetched_and_then_need_no_network() -> Result<()> {
    let hub = MockHub::new(&TWO);
    let dir = tempfile::tempdir()?;
    let mut settings = hub.settings(dir.path());
    let files = find(&settings, Some("main"), "train")?;
    assert_eq!(contents(&files)?, ["first", "second"]);
    assert_eq!(files.commit.as_deref(), Some(COMMIT));
    let snapshot = dir.path().join(format!("datasets--org--sums/snapshots/{COMMIT}/main"));
    assert!(snapshot.join("train-00000-of-00002.parquet").is_file());
    assert!(!snapshot.join("test-00000-of-00001.parquet").exists());
    let requests = hub.take_requests();
    assert_eq!(requests[0].line, "GET hub/api/datasets/org/sums/revision/main");
    let file = "main/train-00001-of-00002.parquet";
    assert_eq!(requests[1].line, format!("GET hub/datasets/org/sums/resolve/{COMMIT}/{file}"));
    assert_eq!(content_requests(&requests).len(), 2);

    settings.offline = true;
    assert_eq!(find(&settings, Some("main"), "train")?, files);
    assert_eq!(hub.take_lines(), [""; 0]);
    let error = fault(find(&settings, Some("main"), "test"), &settings);
    let start = "the cache `CACHE` has no whole copy of `org/sums@main`: ";
    assert!(error.starts_with(start), "{error}");
    let end = "or use files: `train = [\"FILE\"]`";
    assert!(error.ends_with(end), "{error}");
    settings.offline = false;

    // the Hub cannot be reached
    settings.endpoint = dead_endpoint()?;
    assert_eq!(find(&settings, Some("main"), "train")?, files);
    Ok(())
}

#[test]
fn a_part_of_a_split_in_the_cache_is_not_taken_for_all_of_it() -> Result<()> {
    let converted: [(&str, &[u8]); 2] =
        [("default/train/0000.parquet", b"first"), ("default/train/0001.parquet", b"second")];
    for files in [&TWO[..], &converted] {
        let hub = MockHub::new(files);
        let dir = tempfile::tempdir()?;
        let mut settings = hub.settings(dir.path());
        let config =
            files.last().map(|(path, _)| if path.contains("other") { "main" } else { "default" });
        // the commit is noted by a run that fetches all, in a cache that then loses a file
        find(&settings, config, "train")?;
        let first = find(&settings, config, "train")?.files[0].clone();
        fs_err::remove_file(first)?;
        settings.offline = true;
        find(&settings, config, "train").expect_err("its first file is not there");
        settings.offline = false;
        // an interrupted run has the last files only
        hub.set_faults(&[Fault::Status(404)]);
        assert_eq!(contents(&find(&settings, config, "train")?)?, ["first", "second"]);
    }
    Ok(())
}

#[test]
fn a_split_that_is_not_there_is_an_error_with_those_that_are() -> Result<()> {
    let hub = MockHub::new(&TWO);
    let dir = tempfile::tempdir()?;
    let settings = hub.settings(dir.path());
    let fault = |config, split| fault(find(&settings, config, split), &settings);
    assert_eq!(
        fault(None, "train"),
        "`org/sums@main` on `HUB` has the split `train` in several configurations\nhint: name one \
         of them, as `config`: `main`, `other`"
    );
    let seen = "its parquet files are of the splits `test` of `main`, `train` of `main`, `train` \
                of `other`";
    assert_eq!(
        fault(Some("other"), "test"),
        format!("`org/sums@main` on `HUB` has no split `test` of a configuration `other`; {seen}")
    );
    assert_eq!(fault(None, "dev"), format!("`org/sums@main` on `HUB` has no split `dev`; {seen}"));
    // one configuration has it, so that it needs no name
    assert_eq!(contents(&find(&settings, None, "test")?)?, ["test"]);
    hub.set_files(COMMIT, &[("train.jsonl", b"{}")]);
    let error = fault(None, "train");
    let start = "`org/sums@main` on `HUB` has no parquet files\nhint: `revision = \
                 \"refs/convert/parquet\"` has";
    assert!(error.starts_with(start), "{error}");
    Ok(())
}

#[test]
fn faults_of_the_repository_name_the_keys_of_a_data_set() -> Result<()> {
    let hub = MockHub::new(&TWO);
    let dir = tempfile::tempdir()?;
    let settings = hub.settings(dir.path());
    hub.refuse("/api/", 404, "RepoNotFound");
    let error = fault(find(&settings, None, "train"), &settings);
    assert!(error.contains("shows no `org/sums` at `main`"), "{error}");
    assert!(error.contains("hint: check `hub`; a private repository needs a token"), "{error}");
    let odd = HubDataset { dataset: "a/b/c".into(), ..source(None, "train") };
    let error = fault(find_dataset(&odd, &settings, &()), &settings);
    assert_eq!(
        error,
        "`a/b/c` is not the name of a repository\nhint: `hub.dataset` is like `openai/gsm8k`"
    );
    let converted = HubDataset { revision: "refs/convert/parquet".into(), ..source(None, "train") };
    find_dataset(&converted, &settings, &()).expect_err("it is refused");
    let line = hub.take_lines().pop().expect("there was a request");
    assert_eq!(line, "GET hub/api/datasets/org/sums/revision/refs%2Fconvert%2Fparquet");
    Ok(())
}
