//! Finding adapters in a local folder, in a repository on the Hub or in a folder of a repository.

use std::path::Path;

use anyhow::Result;
use dylora::config::{AdapterHub, AdapterSource};
use dylora::hub::{AdapterFiles, HubSettings, find_adapter};
use tempfile::TempDir;

use crate::mock::{COMMIT, MockHub, etag};
use crate::{content_requests, dead_endpoint, fault, find, hub, repo_dir};

const CONFIG: (&str, &[u8]) = ("adapter_config.json", b"{\"peft_type\": \"LORA\"}");
const WEIGHTS: (&str, &[u8]) = ("adapter_model.safetensors", b"the root's weights");
const EXPERT_CONFIG: (&str, &[u8]) = ("experts/expert_1/adapter_config.json", b"{\"r\": 4}");
const EXPERT_WEIGHTS: (&str, &[u8]) =
    ("experts/expert_1/adapter_model.safetensors", b"the expert's weights");

fn hub_source(revision: &str, subfolder: &str) -> AdapterSource {
    AdapterSource::Hub(AdapterHub {
        repo: "org/tiny-gpt2".into(),
        revision: revision.into(),
        subfolder: subfolder.into(),
    })
}

fn find_on_hub(subfolder: &str, settings: &HubSettings) -> Result<AdapterFiles> {
    find_adapter(&hub_source("main", subfolder), settings, &())
}

/// A repository with an adapter at its root and one in a folder.
fn two_adapters() -> Result<(MockHub, TempDir, HubSettings)> {
    hub(&[CONFIG, WEIGHTS, EXPERT_CONFIG, EXPERT_WEIGHTS, ("README.md", b"# Adapters")])
}

fn find_in_folder(path: &Path) -> Result<AdapterFiles> {
    find_adapter(&AdapterSource::Path(path.into()), &HubSettings::offline("absent"), &())
}

/// The message for a folder with `files`, with `DIR` in place of its path.
fn folder_fault(files: &[&str]) -> Result<String> {
    let dir = tempfile::tempdir()?;
    for file in files {
        let path = dir.path().join(file);
        fs_err::create_dir_all(path.parent().expect("it is below the folder"))?;
        fs_err::write(path, "")?;
    }
    let error = find_in_folder(dir.path()).expect_err("the folder is no adapter");
    Ok(format!("{error:#}").replace(&dir.path().display().to_string(), "DIR"))
}

#[test]
fn a_folder_with_config_and_weights_is_an_adapter() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let [config, weights] = [CONFIG, WEIGHTS].map(|(name, _)| dir.path().join(name));
    fs_err::write(&config, "{}")?;
    fs_err::write(&weights, "")?;
    let label = dir.path().display().to_string();
    let expected = AdapterFiles { label, commit: None, config, weights };
    assert_eq!(find_in_folder(dir.path())?, expected);
    Ok(())
}

#[test]
fn a_folder_that_is_no_adapter_is_refused_with_what_it_has() -> Result<()> {
    let missing = "`DIR` has no `adapter_config.json`";
    assert_eq!(folder_fault(&[])?, format!("{missing}; it is empty"));
    assert_eq!(
        folder_fault(&["model.safetensors", "config.json"])?,
        format!("{missing}; it has `config.json`, `model.safetensors`")
    );
    let many: Vec<String> = (0..10).map(|i| format!("{i}.txt")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let message = folder_fault(&many)?;
    assert!(message.ends_with("`6.txt`, `7.txt` and 2 more"), "{message}");
    assert_eq!(
        folder_fault(&[
            "expert_0/adapter_config.json",
            "expert_1/adapter_config.json",
            "router/config.json"
        ])?,
        format!(
            "{missing}; it has `expert_0`, `expert_1`, `router`\n\
             hint: these folders in it are adapters; name one of them (on the Hub, by \
             `source.hub.subfolder`): `expert_0`, `expert_1`"
        )
    );
    assert_eq!(
        folder_fault(&["adapter_config.json"])?,
        "`DIR` has no `adapter_model.safetensors`; it has `adapter_config.json`"
    );
    Ok(())
}

#[test]
fn a_path_that_is_no_folder_is_refused() -> Result<()> {
    let hint = "hint: `source.path` is a folder with `adapter_config.json` and \
                `adapter_model.safetensors`; an adapter of the Hub is \
                `source = { hub = { repo = \"OWNER/NAME\" } }`";
    let file = tempfile::NamedTempFile::new()?;
    let absent = file.path().join("absent");
    for (path, what) in
        [(file.path(), "is a file, not a folder"), (absent.as_path(), "does not exist")]
    {
        let error = find_in_folder(path).expect_err("it is no folder").to_string();
        assert_eq!(error, format!("the adapter `{}` {what}\n{hint}", path.display()));
    }
    Ok(())
}

#[test]
fn pickled_adapters_are_refused_before_anything_is_fetched() -> Result<()> {
    let expected = "has no `adapter_model.safetensors`, only pickled weights, \
                    `adapter_model.bin`, which are not read\n\
                    hint: convert them with PEFT: `AutoPeftModelForCausalLM.from_pretrained(SOURCE)\
                    .save_pretrained(DIR, safe_serialization=True)`";
    let message = folder_fault(&["adapter_config.json", "adapter_model.bin"])?;
    assert_eq!(message, format!("`DIR` {expected}"));
    let (hub, _dir, settings) = hub(&[CONFIG, ("adapter_model.bin", b"pickle")])?;
    let message = fault(find_on_hub("", &settings), &settings);
    assert_eq!(message, format!("`org/tiny-gpt2@main` on `HUB` {expected}"));
    assert_eq!(hub.take_requests().len(), 1);
    Ok(())
}

#[test]
fn only_the_adapter_that_is_named_is_fetched() -> Result<()> {
    for (subfolder, label, [config, weights]) in [
        ("", "org/tiny-gpt2@main", [CONFIG, WEIGHTS]),
        (
            "experts/expert_1",
            "org/tiny-gpt2@main/experts/expert_1",
            [EXPERT_CONFIG, EXPERT_WEIGHTS],
        ),
    ] {
        let (hub, _dir, settings) = two_adapters()?;
        let files = find_on_hub(subfolder, &settings)?;
        let snapshot = repo_dir(&settings).join("snapshots").join(COMMIT);
        let expected = AdapterFiles {
            label: label.into(),
            commit: Some(COMMIT.into()),
            config: snapshot.join(config.0),
            weights: snapshot.join(weights.0),
        };
        assert_eq!(files, expected);
        assert_eq!(fs_err::read(&files.config)?, config.1);
        assert_eq!(fs_err::read(&files.weights)?, weights.1);
        assert_eq!(fs_err::read_to_string(repo_dir(&settings).join("refs/main"))?, COMMIT);
        let blob = repo_dir(&settings).join("blobs").join(etag(weights.1));
        assert_eq!(fs_err::canonicalize(&files.weights)?, fs_err::canonicalize(blob)?);
        let requests = hub.take_requests();
        // one request for the list of files and two for each file, since it is redirected
        assert_eq!(requests.len(), 5);
        assert_eq!(content_requests(&requests), ["bytes=0-"]);
    }
    Ok(())
}

#[test]
fn a_cached_adapter_needs_no_network() -> Result<()> {
    for subfolder in ["", "experts/expert_1"] {
        let (hub, _dir, mut settings) = two_adapters()?;
        let fetched = find_on_hub(subfolder, &settings)?;
        hub.take_requests();
        settings.offline = true;
        assert_eq!(find_on_hub(subfolder, &settings)?, fetched);
        settings.offline = false;
        let by_commit = find_adapter(&hub_source(COMMIT, subfolder), &settings, &())?;
        assert_eq!(
            (by_commit.weights, by_commit.commit),
            (fetched.weights.clone(), fetched.commit.clone())
        );
        assert_eq!(hub.take_lines(), [""; 0]);
        assert_eq!(find_on_hub(subfolder, &settings)?, fetched);
        assert_eq!(hub.take_lines(), ["GET hub/api/models/org/tiny-gpt2/revision/main"]);
        hub.refuse("/api/", 503, "");
        assert_eq!(find_on_hub(subfolder, &settings)?, fetched);
        settings.endpoint = dead_endpoint()?;
        assert_eq!(find_on_hub(subfolder, &settings)?, fetched);
    }
    Ok(())
}

/// This holds for a branch and for a commit.
#[test]
fn a_cached_part_of_a_repository_is_not_taken_for_another_part() -> Result<()> {
    let (_hub, _dir, mut settings) = two_adapters()?;
    find_on_hub("", &settings)?;
    settings.offline = true;
    for revision in ["main", COMMIT] {
        let source = hub_source(revision, "experts/expert_1");
        let message = fault(find_adapter(&source, &settings, &()), &settings);
        assert_eq!(
            message,
            format!(
                "`org/tiny-gpt2@{revision}/experts/expert_1` is not in the cache `CACHE`; \
                 `HF_HUB_OFFLINE` forbids fetching it\n\
                 hint: fetch it once without `HF_HUB_OFFLINE`, or use a folder: \
                 `source = {{ path = \"DIR\" }}`"
            )
        );
    }
    let message = fault(find(&settings), &settings);
    assert!(message.starts_with("`org/tiny-gpt2@main` is not in the cache"), "{message}");
    Ok(())
}

#[test]
fn a_cached_adapter_that_is_not_whole_is_fetched_again() -> Result<()> {
    let (_hub, _dir, mut settings) = two_adapters()?;
    let fetched = find_on_hub("", &settings)?;
    fs_err::remove_file(&fetched.weights)?;
    settings.offline = true;
    let message = fault(find_on_hub("", &settings), &settings);
    let start = "the cache `CACHE` has no whole copy of `org/tiny-gpt2@main`: ";
    assert!(message.starts_with(start), "{message}");
    settings.offline = false;
    let by_commit = find_adapter(&hub_source(COMMIT, ""), &settings, &())?;
    assert_eq!(fs_err::read(by_commit.weights)?, WEIGHTS.1);
    Ok(())
}

#[test]
fn messages_about_an_adapters_repository_name_the_adapters_keys() -> Result<()> {
    let (hub, _dir, settings) = hub(&[EXPERT_CONFIG, EXPERT_WEIGHTS, ("README.md", b"#")])?;
    assert_eq!(
        fault(find_on_hub("experts", &settings), &settings),
        "`org/tiny-gpt2@main/experts` on `HUB` has no `adapter_config.json`; it has `expert_1`\n\
         hint: these folders in it are adapters; name one of them (on the Hub, by \
         `source.hub.subfolder`): `expert_1`"
    );
    assert_eq!(
        fault(find_on_hub("expert", &settings), &settings),
        "`org/tiny-gpt2@main` on `HUB` has no folder `expert`\n\
         hint: check `source.hub.subfolder`"
    );
    hub.refuse("/api/", 404, "RevisionNotFound");
    assert_eq!(
        fault(find_on_hub("", &settings), &settings),
        "`org/tiny-gpt2` on `HUB` has no revision `main`\n\
         hint: `source.hub.revision` is a branch (as a rule `main`), a tag or a full commit"
    );
    Ok(())
}

#[test]
fn names_that_cannot_exist_are_refused_without_a_request() -> Result<()> {
    let (hub, _dir, settings) = two_adapters()?;
    for (repo, revision, subfolder, what) in [
        ("../x", "main", "", "repository"),
        ("org/x", "a b", "", "revision"),
        ("org/x", "main", "..", "folder"),
        ("org/x", "main", "a/../b", "folder"),
        ("org/x", "main", "/a", "folder"),
        ("org/x", "main", "a/", "folder"),
        ("org/x", "main", "a\\b", "folder"),
        ("org/x", "main", "a#b", "folder"),
        ("org/x", "main", "a%2e", "folder"),
    ] {
        let source = AdapterSource::Hub(AdapterHub {
            repo: repo.into(),
            revision: revision.into(),
            subfolder: subfolder.into(),
        });
        let error = find_adapter(&source, &settings, &()).expect_err("no such name").to_string();
        assert!(error.contains(&format!("is not the name of a {what}\nhint: `source.")), "{error}");
    }
    assert_eq!(hub.take_lines(), [""; 0]);
    Ok(())
}

#[test]
fn a_source_names_what_is_not_the_default() -> Result<()> {
    let text = r#"{"hub":{"repo":"org/tiny-gpt2","revision":"main"}}"#;
    let source: AdapterSource = serde_json::from_str(r#"{"hub": {"repo": "org/tiny-gpt2"}}"#)?;
    assert_eq!(source, hub_source("main", ""));
    assert_eq!(serde_json::to_string(&source)?, text);
    let source = hub_source("main", "expert_0");
    assert_eq!(serde_json::from_str::<AdapterSource>(&serde_json::to_string(&source)?)?, source);
    Ok(())
}
