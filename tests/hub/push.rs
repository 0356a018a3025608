//! Uploads to the mock Hub.

use anyhow::Result;
use dylora::hub::HubSettings;
use dylora::hub::push::{PushFile, Pushed, push};
use tempfile::TempDir;

use crate::mock::{COMMIT, MockHub, Request};
use crate::uploads::{Mishap, git_sha1, sha256};

const TOKEN: &str = "hf_quiteSecret";
const REPO: &str = "me/mixture";

/// A Hub, a folder with an export, and settings with a token.
struct World {
    hub: MockHub,
    dir: TempDir,
    settings: HubSettings,
}

impl World {
    fn new() -> Result<Self> {
        let (hub, dir) = (MockHub::new(&[]), tempfile::tempdir()?);
        let token = Some(TOKEN.to_owned());
        let settings = HubSettings { token, ..hub.settings(&dir.path().join("cache")) };
        let world = Self { hub, dir, settings };
        world.write("README.md", b"hello\n")?;
        world.write("dylora.json", b"{}")?;
        world.write("expert_0/adapter_model.safetensors", &numbers(0))?;
        world.write("expert_1/adapter_model.safetensors", &numbers(1))?;
        Ok(world)
    }

    fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        let file = self.dir.path().join(name);
        fs_err::create_dir_all(file.parent().expect("it is in a folder"))?;
        Ok(fs_err::write(file, data)?)
    }

    fn files(&self) -> Result<Vec<PushFile>> {
        let names = ["README.md", "dylora.json"].map(str::to_owned);
        let experts = (0..2).map(|e| format!("expert_{e}/adapter_model.safetensors"));
        let file = |path: String| {
            let file = self.dir.path().join(&path);
            let bytes = fs_err::metadata(&file)?.len();
            Ok(PushFile { path, file, bytes })
        };
        names.into_iter().chain(experts).map(file).collect()
    }

    fn push(&self) -> Result<Pushed> {
        push(REPO, &self.files()?, true, "An export", &self.settings, &())
    }

    /// The message of a push that fails. It does not show the token.
    fn fault(&self) -> Result<String> {
        let text = format!("{:#}", self.push().expect_err("it fails"));
        assert!(!text.contains(TOKEN), "{text}");
        Ok(text.replace(&self.hub.endpoint, "HUB"))
    }
}

fn numbers(first: u32) -> Vec<u8> {
    (first..first + 50_000).flat_map(u32::to_le_bytes).collect()
}

/// The token is sent to the Hub alone, and not in an address.
fn check_secret(requests: &[Request]) {
    for Request { line, headers, .. } in requests {
        let is_sent = headers.get("authorization").is_some_and(|value| value.contains(TOKEN));
        assert_eq!(is_sent, !line.contains(" cdn/"), "{line}");
        assert!(!line.contains(TOKEN), "{line}");
    }
}

#[test]
fn all_files_arrive_in_one_commit() -> Result<()> {
    let world = World::new()?;
    let pushed = world.push()?;
    let endpoint = &world.hub.endpoint;
    assert_eq!(pushed.commit, Some(format!("{endpoint}/me/mixture/commit/{COMMIT}")));
    assert!(pushed.is_new && pushed.unchanged.is_empty());
    assert_eq!(pushed.sent.len(), 4);
    world.hub.uploads(|uploads| {
        assert!(uploads.is_private);
        assert_eq!(uploads.commits, ["An export"]);
        assert_eq!(uploads.files["README.md"], b"hello\n");
        assert_eq!(uploads.files["expert_1/adapter_model.safetensors"], numbers(1));
        assert_eq!(uploads.files.len(), 4);
    });
    check_secret(&world.hub.take_requests());
    Ok(())
}

/// git gives a file with the line `hello` this name (`git hash-object`).
#[test]
fn contents_have_the_names_that_git_gives_them() {
    assert_eq!(git_sha1(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(sha256(b""), empty);
}

#[test]
fn what_is_there_already_is_not_sent_again() -> Result<()> {
    let world = World::new()?;
    world.push()?;
    world.hub.take_requests();
    let again = world.push()?;
    assert_eq!((again.commit, again.sent.len(), again.unchanged.len()), (None, 0, 4));
    assert!(!again.is_new, "409 says that it exists");
    let requests = world.hub.take_requests();
    assert!(requests.iter().all(|request| !request.line.contains("cdn")), "{requests:?}");
    world.write("README.md", b"changed")?;
    assert_eq!(world.push()?.sent, ["README.md"]);
    // large contents that an interrupted push has left are found by their name
    world.hub.uploads(|uploads| uploads.files.clear());
    world.hub.take_requests();
    assert_eq!(world.push()?.sent.len(), 4);
    assert!(world.hub.take_lines().iter().all(|line| !line.starts_with("PUT")));
    Ok(())
}

#[test]
fn a_large_content_is_sent_in_parts() -> Result<()> {
    let world = World::new()?;
    world.hub.uploads(|uploads| uploads.part_bytes = Some(70_000));
    world.push()?;
    let requests = world.hub.take_requests();
    check_secret(&requests);
    let puts = requests.iter().filter(|request| request.line.starts_with("PUT"));
    assert_eq!(puts.count(), 6, "200,000 bytes are three parts, twice");
    world.hub.uploads(|uploads| {
        assert_eq!(uploads.files["expert_0/adapter_model.safetensors"], numbers(0));
    });
    Ok(())
}

#[test]
fn failures_that_may_pass_are_repeated() -> Result<()> {
    for (place, mishap) in [
        ("repos/create", Mishap::Status(503)),
        ("preupload", Mishap::Status(500)),
        ("preupload", Mishap::Cut),
        ("objects/batch", Mishap::Status(429)),
        ("cdn/put", Mishap::Status(502)),
        ("cdn/put", Mishap::Cut),
        ("verify", Mishap::Status(504)),
        ("commit/main", Mishap::Status(503)),
    ] {
        let world = World::new()?;
        world.hub.uploads(|uploads| uploads.mishaps.push_back((place.into(), mishap)));
        world.push()?;
        world.hub.uploads(|uploads| assert_eq!(uploads.files.len(), 4, "{place}"));
        check_secret(&world.hub.take_requests());
    }
    Ok(())
}

#[test]
fn a_failure_that_stays_is_reported() -> Result<()> {
    let world = World::new()?;
    world.hub.uploads(|uploads| {
        uploads.mishaps.extend((0..9).map(|_| ("cdn/put".into(), Mishap::Status(500))));
    });
    let text = world.fault()?;
    assert!(text.starts_with("cannot upload `expert_0/adapter_model.safetensors`:"), "{text}");
    assert!(text.contains("answers 500") && text.contains("hint: run it again"), "{text}");
    world.hub.uploads(|uploads| assert!(uploads.commits.is_empty(), "nothing is committed"));
    Ok(())
}

#[test]
fn refusals_say_what_would_be_right() -> Result<()> {
    for (place, status, words) in [
        ("repos/create", 401, "is the token in `HF_TOKEN` still valid?"),
        ("preupload", 403, "a token with the permission to write"),
        ("commit/main", 412, "answers 412 to the upload to `me/mixture`: Sorry"),
        ("objects/batch", 301, "redirects the upload, which is not followed"),
        ("cdn/put", 403, "does not let the token write"),
    ] {
        let world = World::new()?;
        let mishap = (place.into(), Mishap::Status(status));
        world.hub.uploads(|uploads| uploads.mishaps.push_back(mishap));
        let text = world.fault()?;
        assert!(text.contains(words), "{place}: {text}");
        world.hub.uploads(|uploads| assert!(uploads.commits.is_empty()));
    }
    Ok(())
}

/// A token may be good for one repository that exists, and not for new ones.
#[test]
fn a_token_without_the_right_to_create_may_write_what_exists() -> Result<()> {
    let world = World::new()?;
    let mishap = ("repos/create".into(), Mishap::Status(403));
    world.hub.uploads(|uploads| uploads.mishaps.push_back(mishap));
    assert!(!world.push()?.is_new);
    Ok(())
}

#[test]
fn a_content_that_does_not_arrive_whole_is_not_committed() -> Result<()> {
    let world = World::new()?;
    world.hub.uploads(|uploads| uploads.forgets = true);
    let text = world.fault()?;
    assert!(text.contains("the content is not confirmed") && text.contains("404"), "{text}");
    // a file that changes while it is sent
    let files = world.files()?;
    world.write("expert_0/adapter_model.safetensors", b"short")?;
    let error = push(REPO, &files, false, "x", &world.settings, &()).expect_err("it has changed");
    assert!(format!("{error:#}").contains("has changed: 5 bytes instead of 200000"), "{error:#}");
    world.hub.uploads(|uploads| assert!(uploads.commits.is_empty()));
    Ok(())
}

#[test]
fn nothing_is_sent_without_a_token_offline_or_to_an_odd_name() -> Result<()> {
    let world = World::new()?;
    let files = world.files()?;
    let to = |repo: &str, settings: &HubSettings| {
        let error = push(repo, &files, false, "x", settings, &()).expect_err("it fails");
        format!("{error:#}")
    };
    let none = HubSettings { token: None, ..world.settings.clone() };
    assert!(to(REPO, &none).contains("hint: set `HF_TOKEN`"));
    let offline = HubSettings { offline: true, ..world.settings.clone() };
    assert!(to(REPO, &offline).contains("hint: unset `HF_HUB_OFFLINE`"));
    for name in ["mixture", "a/b/c", "../x/y", "me/a b", "me/..", "me/"] {
        assert!(to(name, &world.settings).contains("hint: it is like `OWNER/NAME`"), "{name}");
    }
    assert!(world.hub.take_requests().is_empty());
    Ok(())
}

/// A server may send the token back in an error.
#[test]
fn a_token_in_an_answer_is_not_shown() -> Result<()> {
    let world = World::new()?;
    world.hub.set_header("X-Error-Message", &format!("bad {TOKEN}"));
    world.hub.refuse("repos/create", 401, "");
    let text = world.fault()?;
    assert!(text.contains("bad ***"), "{text}");
    Ok(())
}
