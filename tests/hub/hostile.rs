//! Servers that ask for a token or for files outside the cache, and servers that do not answer in
//! time.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use dylora::hub::HubSettings;

use crate::mock::{Fault, MockHub};
use crate::{content_requests, fault, find, hub, tiny_gpt2, weights};

/// Sets time limits so short that a test can wait for them.
fn be_impatient(settings: &mut HubSettings) {
    settings.limits.connect = Duration::from_millis(300);
    settings.limits.silence = Duration::from_millis(300);
    settings.limits.answer = Duration::from_millis(600);
    settings.limits.window = Duration::from_millis(400);
    settings.limits.window_bytes = 1000;
}

/// The two servers differ only in their port.
#[test]
fn the_token_stays_with_the_scheme_host_and_port_that_it_is_for() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    settings.token = Some(" hf_secret\n".into());
    hub.set_faults(&[Fault::CutAfter(150_000)]);
    find(&settings)?;
    let requests = hub.take_requests();
    assert!(requests.iter().any(|request| request.line.contains(" cdn/")));
    for request in requests {
        let sent = request.headers.get("authorization").map(String::as_str);
        let expected = request.line.contains(" hub/").then_some("Bearer hf_secret");
        assert_eq!(sent, expected, "{}", request.line);
    }
    assert!(!format!("{settings:?}").contains("secret"));
    Ok(())
}

#[test]
fn credentials_in_the_address_are_sent_to_it_and_not_shown() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    let host = settings.endpoint["http://".len()..].to_owned();
    settings.endpoint = format!("http://user:secret@{host}/");
    find(&settings)?;
    for request in hub.take_requests() {
        let sent = request.headers.get("authorization").map(String::as_str);
        let expected = request.line.contains(" hub/").then_some("Basic dXNlcjpzZWNyZXQ=");
        assert_eq!(sent, expected, "{}", request.line);
    }
    assert!(!format!("{settings:?}").contains("secret"));
    for status in [401, 403, 404, 500] {
        hub.refuse("/api/", status, "");
        let empty = tempfile::tempdir()?;
        settings.cache_dir = empty.path().to_owned();
        let message = format!("{:#}", find(&settings).expect_err("it is refused"));
        assert!(!message.contains("secret") && message.contains(&host), "{message}");
    }
    for endpoint in ["ftp://user:secret@hub", "user:secret@hub", "https://user:secret@"] {
        settings.endpoint = endpoint.into();
        let message = format!("{:#}", find(&settings).expect_err("it is no address"));
        assert!(!message.contains("secret"), "{message}");
    }
    Ok(())
}

/// The sorted names of the files and folders in `dir`.
fn entries(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = fs_err::read_dir(dir)
        .expect("it can be read")
        .map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn names_by_the_server_do_not_leave_the_cache() -> Result<()> {
    let etags = ["\"../../../escaped\"", "\"/escaped\"", "\"a/b\"", "\"..\"", "\"a\\b\"", "\"\""];
    for (name, values) in [
        ("ETag", &etags[..]),
        ("X-Linked-Etag", &etags[..]),
        ("X-Repo-Commit", &["../../../escaped", "..", "89abcdef0123456789abcdef0123456789abcdef"]),
    ] {
        for value in values {
            let (hub, dir, settings) = tiny_gpt2()?;
            hub.set_header(name, value);
            let message = fault(find(&settings), &settings);
            let header = if name == "X-Linked-Etag" { "ETag" } else { name };
            let expected = format!("`HUB` does not answer as the Hub does: its `{header}` ");
            assert!(message.starts_with(&expected), "{name}: {value}: {message}");
            assert!(entries(dir.path()).iter().all(|name| name == "hub"), "{value}");
            assert_eq!(content_requests(&hub.take_requests()), [""; 0]);
        }
    }
    Ok(())
}

#[test]
fn a_server_that_never_accepts_is_given_up() -> Result<()> {
    let (_hub, _dir, mut settings) = tiny_gpt2()?;
    be_impatient(&mut settings);
    // the listener's queue holds one connection, and `_waiting` fills it
    let listener = TcpListener::bind("127.0.0.1:0")?;
    // SAFETY: the descriptor belongs to the listener, which is open
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let address = listener.local_addr()?;
    let _waiting = TcpStream::connect(address)?;
    settings.endpoint = format!("http://{address}");
    let begun = Instant::now();
    let message = fault(find(&settings), &settings);
    assert!(
        message
            .starts_with("cannot reach `HUB`: no connection within 300ms; `org/tiny-gpt2@main` is"),
        "{message}"
    );
    assert!(begun.elapsed() < Duration::from_secs(10));
    Ok(())
}

#[test]
fn a_server_that_never_answers_is_given_up() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    be_impatient(&mut settings);
    hub.fall_silent();
    let begun = Instant::now();
    let message = fault(find(&settings), &settings);
    assert!(
        message.starts_with("`HUB` has sent nothing for 300ms; `org/tiny-gpt2@main` is"),
        "{message}"
    );
    assert!(begun.elapsed() < Duration::from_secs(10));
    Ok(())
}

#[test]
fn a_server_that_falls_silent_amid_a_file_is_asked_for_the_rest() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    be_impatient(&mut settings);
    hub.set_faults(&[Fault::SilentAfter(150_000), Fault::SilentAfter(100_000)]);
    let files = find(&settings)?;
    assert_eq!(fs_err::read(&files.weights[0])?, weights());
    let ranges = ["bytes=0-", "bytes=150000-", "bytes=250000-"];
    assert_eq!(content_requests(&hub.take_requests()), ranges);
    Ok(())
}

#[test]
fn a_server_that_sends_a_byte_now_and_then_is_given_up() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    be_impatient(&mut settings);
    hub.set_faults(&[Fault::Trickle; 40]);
    let begun = Instant::now();
    // each attempt brings a few bytes, which do not count as progress
    let message = fault(find(&settings), &settings);
    assert!(message.contains("fewer than 1000 in 400ms"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    hub.set_faults(&[]);
    assert_eq!(fs_err::read(&find(&settings)?.weights[0])?, weights());
    Ok(())
}

/// The content of a small file comes with the first answer, without a redirect to another host.
#[test]
fn a_hub_that_sends_a_byte_of_a_small_file_now_and_then_is_given_up() -> Result<()> {
    let (hub, _dir, mut settings) =
        hub(&[("config.json", &weights()[..4000]), ("model.safetensors", b"weights")])?;
    be_impatient(&mut settings);
    hub.trickle();
    let begun = Instant::now();
    let message = fault(find(&settings), &settings);
    assert!(message.contains("fewer than 1000 in 400ms"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    Ok(())
}

#[test]
fn a_lock_whose_owner_makes_no_progress_is_given_up() -> Result<()> {
    let (hub, _dir, mut settings) = tiny_gpt2()?;
    be_impatient(&mut settings);
    let locks = settings.cache_dir.join(".locks/models--org--tiny-gpt2");
    fs_err::create_dir_all(&locks)?;
    let name = format!("{}.lock", crate::etag(&weights()));
    let held = fs_err::File::create(locks.join(name))?;
    held.file().lock()?;
    let message = fault(find(&settings), &settings);
    assert!(message.contains("another process holds the lock `CACHE/.locks/"), "{message}");
    drop(held);
    assert_eq!(fs_err::read(&find(&settings)?.weights[0])?, weights());
    drop(hub);
    Ok(())
}

/// Commands that have the token in their environment log everything and fail.
#[test]
fn the_token_is_in_no_output_file_or_title() -> Result<()> {
    let hub = MockHub::new(&[("config.json", b"{}"), ("model.safetensors", &weights())]);
    let dir = tempfile::tempdir()?;
    for (refused, code) in [("", 0), ("/api/", 401), ("/resolve/", 403), ("cdn/", 403)] {
        if code != 0 {
            hub.refuse(refused, code, "GatedRepo");
        }
        for endpoint in
            [hub.endpoint.clone(), hub.endpoint.replace("http://", "http://u:hf_secret@")]
        {
            let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
            command.args(["eval", "--base", "org/tiny-gpt2", "--data", "x.jsonl", "-vv"]);
            command.env("HF_HOME", dir.path()).env("HF_ENDPOINT", &endpoint);
            command.env("DYLORA_LOG", "trace").env("DYLORA_CACHE", dir.path());
            command.env_remove("HF_TOKEN").env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE");
            if endpoint == hub.endpoint {
                command.env("HF_TOKEN", "hf_secret");
            }
            let output = command.output()?;
            assert!(!output.status.success(), "the base is none");
            let text = [output.stdout, output.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            assert!(text.contains("tiny-gpt2") && text.contains("DEBUG"), "{text}");
            // at the level TRACE, ureq would log the bytes of requests
            assert!(!text.contains("TRACE"), "{text}");
            assert!(!text.contains("hf_secret") && !text.contains("aGZfc2VjcmV0"), "{text}");
        }
    }
    let found = Command::new("grep").args(["-rl", "hf_secret"]).arg(dir.path()).output()?;
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    Ok(())
}

#[test]
fn an_answer_that_is_not_the_file_does_not_enter_the_cache() -> Result<()> {
    for wrong in [Fault::Portal, Fault::Gzip] {
        let (hub, _dir, settings) = tiny_gpt2()?;
        hub.set_faults(&[wrong; 4]);
        let message = fault(find(&settings), &settings);
        assert!(message.starts_with("cannot fetch `model.safetensors`: "), "{message}");
        // the next run finds the right one
        assert_eq!(fs_err::read(&find(&settings)?.weights[0])?, weights());
    }
    Ok(())
}

/// A server that sends back what it was sent.
#[test]
fn a_token_that_a_server_sends_back_is_not_shown() -> Result<()> {
    for header in ["X-Error-Message", "ETag", "X-Linked-Etag", "X-Repo-Commit"] {
        let (hub, _dir, mut settings) = tiny_gpt2()?;
        settings.token = Some("hf_secret".into());
        hub.set_header(header, "Bearer hf_secret /");
        if header == "X-Error-Message" {
            hub.refuse("/api/", 403, "");
        }
        let message = fault(find(&settings), &settings);
        assert!(message.contains("Bearer ***"), "{header}: {message}");
        assert!(!message.contains("hf_secret"), "{message}");
    }
    Ok(())
}
