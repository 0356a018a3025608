//! Finding the files of bases and adapters in a local folder, or on a mock Hub and in its cache.

mod adapter;
mod dataset;
mod download;
mod folder;
mod hostile;
mod login;
mod mock;
mod push;
mod uploads;

use std::fmt::Debug;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::Result;
use dylora::config::{BaseSource, HubSource};
use dylora::hub::{BaseFiles, HubSettings, SideFile, find_base};
use mock::{COMMIT, MockHub, Request, etag};
use tempfile::TempDir;

const NEXT_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const CONFIG: (&str, &[u8]) = ("config.json", b"{\"n_layer\": 12}");
const TOKENIZER: (&str, &[u8]) = ("tokenizer.json", b"{\"version\": \"1.0\"}");

fn source(revision: &str) -> BaseSource {
    BaseSource::Hub(HubSource { repo: "org/tiny-gpt2".into(), revision: revision.into() })
}

fn find(settings: &HubSettings) -> Result<BaseFiles> {
    find_base(&source("main"), settings, &())
}

/// The message of an error, with `HUB` and `CACHE` in place of their addresses.
fn fault<T: Debug>(result: Result<T>, settings: &HubSettings) -> String {
    let error = result.expect_err("there is no such source");
    format!("{error:#}")
        .replace(&settings.endpoint, "HUB")
        .replace(&settings.cache_dir.display().to_string(), "CACHE")
}

/// Bytes that differ at every offset, so that a piece in the wrong place would be noticed.
fn weights() -> Vec<u8> {
    (0..100_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// A Hub with a base whose weights are in one file, and settings for it.
fn tiny_gpt2() -> Result<(MockHub, TempDir, HubSettings)> {
    hub(&[CONFIG, TOKENIZER, ("model.safetensors", &weights())])
}

/// A Hub with `files`, and settings for it.
fn hub(files: &[(&str, &[u8])]) -> Result<(MockHub, TempDir, HubSettings)> {
    let hub = MockHub::new(files);
    let dir = tempfile::tempdir()?;
    let settings = hub.settings(&dir.path().join("hub"));
    Ok((hub, dir, settings))
}

fn repo_dir(settings: &HubSettings) -> PathBuf {
    settings.cache_dir.join("models--org--tiny-gpt2")
}

/// The `Range` of each request for content, without requests that only ask for its size.
fn content_requests(requests: &[Request]) -> Vec<&str> {
    let contents = requests.iter().filter(|request| request.line.starts_with("GET cdn/"));
    contents.filter_map(Request::range).filter(|range| *range != "bytes=0-0").collect()
}

/// An address at which no server listens.
fn dead_endpoint() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(format!("http://{}", listener.local_addr()?))
}

#[test]
fn only_what_a_base_needs_is_fetched() -> Result<()> {
    let weights = weights();
    let hub = MockHub::new(&[
        CONFIG,
        TOKENIZER,
        ("README.md", b"# GPT-2"),
        ("additional_chat_templates/deeper/x.jinja", b"x"),
        ("additional_chat_templates/tool_use.jinja", b"tools"),
        ("generation_config.json", b"{}"),
        ("model.safetensors", &weights),
        ("onnx/decoder_model.onnx", b"onnx"),
        ("pytorch_model.bin", b"pickle"),
        ("tf_model.h5", b"tensorflow"),
    ]);
    let dir = tempfile::tempdir()?;
    let settings = hub.settings(dir.path());
    let files = find(&settings)?;

    let snapshot = repo_dir(&settings).join("snapshots").join(COMMIT);
    let beside = ["generation_config.json", "additional_chat_templates/tool_use.jinja"];
    let expected = BaseFiles {
        label: "org/tiny-gpt2@main".into(),
        commit: Some(COMMIT.into()),
        config: snapshot.join("config.json"),
        weights: vec![snapshot.join("model.safetensors")],
        tokenizer: Some(snapshot.join("tokenizer.json")),
        beside: beside.map(|name| SideFile { name: name.into(), path: snapshot.join(name) }).into(),
    };
    assert_eq!(files, expected);
    assert_eq!(fs_err::read(&files.config)?, CONFIG.1);
    assert_eq!(fs_err::read(&files.weights[0])?, weights);
    let resolve = format!("org/tiny-gpt2/resolve/{COMMIT}");
    let mut expected = vec!["GET hub/api/models/org/tiny-gpt2/revision/main".to_owned()];
    for file in ["config.json", "tokenizer.json"] {
        expected.push(format!("GET hub/{resolve}/{file}"));
        expected.push(format!("GET hub/cache/{resolve}/{file}"));
    }
    expected.push(format!("GET hub/{resolve}/model.safetensors"));
    expected.push(format!("GET cdn/{}", etag(&weights)));
    for file in beside {
        for cache in ["", "cache/"] {
            expected.push(format!("GET hub/{cache}{resolve}/{file}"));
        }
    }
    assert_eq!(hub.take_lines(), expected);
    Ok(())
}

/// Both dylora and `huggingface_hub` read and write this layout.
#[cfg(unix)]
#[test]
fn the_cache_is_laid_out_as_pythons() -> Result<()> {
    let (_hub, _dir, settings) = tiny_gpt2()?;
    let files = find(&settings)?;
    let target = fs_err::read_link(&files.weights[0])?;
    assert_eq!(target, Path::new("../../blobs").join(etag(&weights())));
    assert_eq!(fs_err::read_to_string(repo_dir(&settings).join("refs/main"))?, COMMIT);
    Ok(())
}

#[test]
fn the_shards_of_an_index_are_fetched_once_each() -> Result<()> {
    let index = br#"{"weight_map": {"x": "m-2.safetensors", "y": "m-1.safetensors",
                     "z": "m-2.safetensors"}}"#;
    let hub = MockHub::new(&[
        CONFIG,
        ("m-1.safetensors", b"first"),
        ("m-2.safetensors", b"second"),
        ("m-3.safetensors", b"of another model"),
        ("model.safetensors.index.json", index),
    ]);
    let dir = tempfile::tempdir()?;
    let files = find(&hub.settings(dir.path()))?;
    let contents: Vec<Vec<u8>> =
        files.weights.iter().map(fs_err::read).collect::<Result<_, _>>()?;
    assert_eq!(contents, [b"first".to_vec(), b"second".to_vec()]);
    assert_eq!(content_requests(&hub.take_requests()), ["bytes=0-", "bytes=0-"]);
    assert_eq!(files.tokenizer, None);
    Ok(())
}

#[test]
fn an_index_that_leads_out_of_the_repository_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (index, expected) in [
        (
            &br#"{"weight_map": {"x": "../../x.safetensors"}}"#[..],
            "names `../../x.safetensors`, which is not inside its folder",
        ),
        (
            br#"{"weight_map": {"x": "absent.safetensors"}}"#,
            "`org/tiny-gpt2@main` on `HUB` has no `absent.safetensors`, which its \
             `model.safetensors.index.json` names",
        ),
    ] {
        let hub = MockHub::new(&[CONFIG, ("model.safetensors.index.json", index)]);
        let settings = hub.settings(&dir.path().join(&hub.endpoint[7..]));
        let message = fault(find(&settings), &settings);
        assert!(message.ends_with(expected), "{message}");
        assert_eq!(content_requests(&hub.take_requests()), [""; 0]);
    }
    Ok(())
}

#[test]
fn what_is_cached_needs_no_network() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    let fetched = find(&settings)?;
    hub.take_requests();

    settings.offline = true;
    assert_eq!(find(&settings)?, fetched);
    assert_eq!(hub.take_lines(), [""; 0]);
    settings.offline = false;

    let by_commit = find_base(&source(COMMIT), &settings, &())?;
    assert_eq!(
        (by_commit.weights, by_commit.commit),
        (fetched.weights.clone(), fetched.commit.clone())
    );
    assert_eq!(hub.take_lines(), [""; 0]);

    assert_eq!(find(&settings)?, fetched);
    assert_eq!(hub.take_lines(), ["GET hub/api/models/org/tiny-gpt2/revision/main"]);

    hub.refuse("/api/", 503, "");
    assert_eq!(find(&settings)?, fetched);
    settings.endpoint = dead_endpoint()?;
    assert_eq!(find(&settings)?, fetched);
    Ok(())
}

#[test]
fn a_moved_branch_leaves_the_files_of_the_old_commit() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    let before = find(&settings)?;
    hub.take_requests();
    let config: (&str, &[u8]) = ("config.json", b"{\"n_layer\": 24}");
    hub.set_files(NEXT_COMMIT, &[config, TOKENIZER, ("model.safetensors", &weights())]);
    let after = find(&settings)?;
    // the content of the weights is the same, so they are not fetched again
    assert_eq!(content_requests(&hub.take_requests()), [""; 0]);
    assert_eq!(after.commit.as_deref(), Some(NEXT_COMMIT));
    assert_eq!(fs_err::read(&after.config)?, config.1);
    assert_eq!(fs_err::read(&before.config)?, CONFIG.1);
    assert_eq!(fs_err::read(&after.weights[0])?, weights());
    settings.offline = true;
    assert_eq!(find(&settings)?, after);
    Ok(())
}

/// The message if the Hub refuses requests whose path contains `path`.
fn refusal(path: &str, status: u16, code: &str, token: Option<&str>) -> Result<String> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    settings.token = token.map(str::to_owned);
    hub.refuse(path, status, code);
    let message = fault(find(&settings), &settings);
    Ok(message.replace(": Sorry, you can't come in", ": SAID"))
}

/// Without a token, the Hub answers 401 for a repository that does not exist, since a private one
/// could have that name.
#[test]
fn an_absent_repository_and_an_absent_revision_are_distinguished() -> Result<()> {
    assert_eq!(
        refusal("/api/", 401, "RepoNotFound", None)?,
        "`HUB` shows no `org/tiny-gpt2` at `main`: it answers 401 Unauthorized: SAID\n\
         hint: check `base.source.hub`; a private repository needs a token that may read it in \
         `HF_TOKEN`"
    );
    assert_eq!(
        refusal("/api/", 404, "RepoNotFound", Some("hf_x"))?,
        "`HUB` shows no `org/tiny-gpt2` at `main`: it answers 404 Not Found: SAID\n\
         hint: check `base.source.hub`; if it is private, may the token in `HF_TOKEN` read it?"
    );
    assert_eq!(
        refusal("/api/", 404, "RevisionNotFound", None)?,
        "`org/tiny-gpt2` on `HUB` has no revision `main`\n\
         hint: `base.source.hub.revision` is a branch (as a rule `main`), a tag or a full commit"
    );
    Ok(())
}

#[test]
fn a_denied_access_says_which_token_is_needed() -> Result<()> {
    for (status, token) in [("401 Unauthorized", None), ("403 Forbidden", Some("hf_x"))] {
        for path in ["/api/", "/resolve/"] {
            assert_eq!(
                refusal(path, status[..3].parse()?, "GatedRepo", token)?,
                format!(
                    "`org/tiny-gpt2` on `HUB` is gated: it answers {status}: SAID\n\
                     hint: accept its terms at `HUB/org/tiny-gpt2`, and set `HF_TOKEN` to a token \
                     of the account that did"
                )
            );
        }
    }
    assert_eq!(
        refusal("/api/", 401, "", None)?,
        "`HUB` refuses `org/tiny-gpt2` without a token: it answers 401 Unauthorized: SAID\n\
         hint: set `HF_TOKEN` to a token that may read it"
    );
    assert_eq!(
        refusal("/api/", 403, "", Some("hf_x"))?,
        "`HUB` refuses `org/tiny-gpt2` with the given token: it answers 403 Forbidden: SAID\n\
         hint: is the token in `HF_TOKEN` still valid, and may it read this repository?"
    );
    Ok(())
}

#[test]
fn a_cache_that_cannot_be_written_is_named() -> Result<()> {
    let (_hub, dir, mut settings) = tiny_gpt2()?;
    fs_err::write(dir.path().join("file"), "")?;
    settings.cache_dir = dir.path().join("file");
    let message = fault(find(&settings), &settings);
    assert!(message.starts_with("cannot write to the Hub's cache `CACHE`: "), "{message}");
    assert!(message.ends_with("\nhint: `HF_HOME` names another place for it"), "{message}");
    Ok(())
}

#[test]
fn without_network_or_cache_the_error_names_both() -> Result<()> {
    let (_hub, _dir, mut settings) = tiny_gpt2()?;
    settings.endpoint = dead_endpoint()?;
    let cause = TcpStream::connect(&settings.endpoint[7..]).expect_err("nothing listens there");
    assert_eq!(
        fault(find(&settings), &settings),
        format!(
            "cannot reach `HUB`: {cause}; `org/tiny-gpt2@main` is not in the cache `CACHE`\n\
             hint: check the network (a proxy is named by `HTTPS_PROXY`, a mirror of the Hub by \
             `HF_ENDPOINT`), or use a folder: `base.source = {{ path = \"DIR\" }}`"
        )
    );
    settings.offline = true;
    assert_eq!(
        fault(find(&settings), &settings),
        "`org/tiny-gpt2@main` is not in the cache `CACHE`; `HF_HUB_OFFLINE` forbids fetching \
         it\n\
         hint: fetch it once without `HF_HUB_OFFLINE`, or use a folder: \
         `base.source = { path = \"DIR\" }`"
    );
    Ok(())
}

#[test]
fn a_repository_of_pickles_is_refused_before_anything_is_fetched() -> Result<()> {
    let hub = MockHub::new(&[CONFIG, ("pytorch_model.bin", b"pickle")]);
    let dir = tempfile::tempdir()?;
    let settings = hub.settings(dir.path());
    assert_eq!(
        fault(find(&settings), &settings),
        "`org/tiny-gpt2@main` on `HUB` has neither `model.safetensors` nor \
         `model.safetensors.index.json`, only pickled weights, `pytorch_model.bin`, which are not \
         read\nhint: convert them with transformers: `AutoModelForCausalLM.from_pretrained(SOURCE)\
         .save_pretrained(DIR, safe_serialization=True)`"
    );
    assert_eq!(hub.take_requests().len(), 1);
    Ok(())
}

#[test]
fn names_that_cannot_exist_are_refused_without_a_request() -> Result<()> {
    let (hub, _dir, settings) = tiny_gpt2()?;
    for (repo, revision) in [
        ("", "main"),
        ("../x", "main"),
        ("a/b/c", "main"),
        ("a--b/c", "main"),
        ("org/gpt2", ""),
        ("org/gpt2", "../../x"),
        ("org/gpt2", "/x"),
        ("org/gpt2", "a b"),
    ] {
        let source = HubSource { repo: repo.into(), revision: revision.into() };
        let error = find_base(&BaseSource::Hub(source), &settings, &()).expect_err("no such name");
        assert!(error.to_string().contains("is not the name of a re"), "{error}");
    }
    let no_address = HubSettings { endpoint: "hub.example".into(), ..settings };
    assert_eq!(
        find(&no_address).expect_err("no address").to_string(),
        "the Hub's address `hub.example` is not of the form `https://HOST`\n\
         hint: it comes from `HF_ENDPOINT`; the default is `https://huggingface.co`"
    );
    assert_eq!(hub.take_lines(), [""; 0]);
    Ok(())
}
