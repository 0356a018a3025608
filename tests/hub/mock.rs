//! A small Hub on 127.0.0.1 with one repository. It sends requests for large files,
//! `.safetensors` and `.parquet`, to a second server, as the Hub sends them to its content delivery
//! network.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use dylora::hub::HubSettings;

use crate::uploads::Uploads;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as the server received it.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method and the path, such as `GET hub/api/models/..`. Paths on the second server start
    /// with `cdn/`.
    pub line: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// A fault of the second server. Each fault is used for one request for content, in order; requests
/// that only ask for the size do not count. After that the server answers without faults.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Closes the connection after this many bytes of the body.
    CutAfter(usize),
    /// Sends the whole content, whatever `Range` says.
    IgnoreRange,
    /// Answers with this status.
    Status(u16),
    /// Sends this many extra bytes, which `Content-Length` includes.
    Append(usize),
    /// Sends this many bytes, and then nothing for a minute.
    SilentAfter(usize),
    /// Sends one byte every 20 ms.
    Trickle,
    /// Answers with a page of its own, as a login page does.
    Portal,
    /// Says that the content is compressed.
    Gzip,
}

impl Request {
    pub fn range(&self) -> Option<&str> {
        self.headers.get("range").map(String::as_str)
    }
}

#[derive(Default)]
struct State {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    requests: Vec<Request>,
    faults: VecDeque<Fault>,
    /// The status and the `X-Error-Code` with which requests are refused whose path contains the
    /// key.
    refusals: BTreeMap<String, (u16, String)>,
    /// Headers that replace those of the same name in every answer of the first server.
    headers: Vec<(&'static str, String)>,
    /// Whether the first server says how long large files are.
    tells_size: bool,
    /// Whether the first server accepts requests but does not answer.
    is_silent: bool,
    /// Whether the first server sends its own files as [`Fault::Trickle`] does.
    trickles: bool,
    cdn: String,
    endpoint: String,
    uploads: Uploads,
}

#[derive(Clone)]
pub struct MockHub {
    pub endpoint: String,
    state: Arc<Mutex<State>>,
}

impl MockHub {
    /// A Hub whose repository has `files`.
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let state = Arc::new(Mutex::new(State {
            commit: COMMIT.into(),
            tells_size: true,
            ..State::default()
        }));
        let endpoint = serve("hub", &state);
        let cdn = serve("cdn", &state);
        let hub = Self { endpoint, state };
        hub.lock().cdn = cdn;
        hub.lock().endpoint = hub.endpoint.clone();
        hub.set_files(COMMIT, files);
        hub
    }

    /// Moves the revision to `commit`, which has `files`.
    pub fn set_files(&self, commit: &str, files: &[(&str, &[u8])]) {
        let mut state = self.lock();
        state.commit = commit.into();
        state.files = files.iter().map(|(name, data)| (name.to_string(), data.to_vec())).collect();
    }

    pub fn set_faults(&self, faults: &[Fault]) {
        self.lock().faults = faults.iter().copied().collect();
    }

    /// Refuses requests whose path contains `path`.
    pub fn refuse(&self, path: &str, status: u16, code: &str) {
        self.lock().refusals.insert(path.into(), (status, code.into()));
    }

    /// Sends `value` in the header `name` with every answer.
    pub fn set_header(&self, name: &'static str, value: &str) {
        self.lock().headers.push((name, value.into()));
    }

    /// Omits `X-Linked-Size` from now on, as some mirrors do.
    pub fn hide_sizes(&self) {
        self.lock().tells_size = false;
    }

    /// Accepts requests from now on, but does not answer them.
    pub fn fall_silent(&self) {
        self.lock().is_silent = true;
    }

    /// Sends small files, which the first server has itself, one byte every 20 ms from now on.
    pub fn trickle(&self) {
        self.lock().trickles = true;
    }

    /// Looks at the repository that is written to, or changes it.
    pub fn uploads<T>(&self, look: impl FnOnce(&mut Uploads) -> T) -> T {
        look(&mut self.lock().uploads)
    }

    /// The requests since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.lock().requests)
    }

    /// The first lines of the requests since the last call.
    pub fn take_lines(&self) -> Vec<String> {
        self.take_requests().into_iter().map(|request| request.line).collect()
    }

    pub fn settings(&self, cache_dir: &Path) -> HubSettings {
        HubSettings::new(&self.endpoint, cache_dir)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no server thread panics")
    }
}

/// The name of a content. The Hub uses its SHA-256 instead.
pub fn etag(data: &[u8]) -> String {
    blake3::hash(data).to_hex().to_string()
}

/// Starts a server called `name`, which runs until the process ends, and returns its address.
fn serve(name: &'static str, state: &Arc<Mutex<State>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let state = state.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            // some tests hang up early, so errors are ignored
            thread::spawn(move || answer(name, stream, &state).ok());
        }
    });
    format!("http://{address}")
}

fn read_request(name: &str, stream: &TcpStream) -> std::io::Result<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = reader.by_ref().lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let line = first.replacen(" /", &format!(" {name}/"), 1).replace(" HTTP/1.1", "");
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else { break };
        headers.insert(key.to_lowercase(), value.to_string());
    }
    let length = headers.get("content-length").and_then(|text: &String| text.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;
    Ok(Request { line, headers, body })
}

fn answer(name: &str, mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let request = read_request(name, &stream)?;
    let reply = {
        let mut state = state.lock().expect("no server thread panics");
        state.requests.push(request.clone());
        if request.line.starts_with("P") && !is_refused(&request, &state) {
            let State { uploads, endpoint, cdn, .. } = &mut *state;
            let Some(answer) = uploads.answer(&request, endpoint, cdn) else { return Ok(()) };
            let etag = answer.etag.map(|etag| ("ETag", etag));
            let reply = Reply::new(answer.status, etag.into_iter().collect());
            return send(&mut stream, &request, Reply { body: answer.body, ..reply });
        }
        let mut reply = reply_to(&request, &mut state);
        if name == "hub" {
            for (key, value) in &state.headers {
                reply.headers.retain(|(other, _)| other != key);
                reply.headers.push((key, value.clone()));
            }
            if state.is_silent {
                reply.pace = Pace::SilentAfter(0);
            }
        }
        reply
    };
    if reply.pace == Pace::SilentAfter(0) {
        thread::sleep(SILENCE);
        return Ok(());
    }
    send(&mut stream, &request, reply)
}

/// Whether a request is refused whatever it is.
fn is_refused(request: &Request, state: &State) -> bool {
    state.refusals.keys().any(|key| request.line.contains(key.as_str()))
}

fn send(stream: &mut TcpStream, request: &Request, mut reply: Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Mock\r\nConnection: close\r\n", reply.status);
    for (key, value) in &reply.headers {
        head.push_str(&format!("{key}: {value}\r\n"));
    }
    if !reply.headers.iter().any(|(key, _)| *key == "Content-Length") {
        head.push_str(&format!("Content-Length: {}\r\n", reply.body.len()));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.line.starts_with("HEAD") {
        return Ok(());
    }
    match reply.pace {
        Pace::AtOnce => stream.write_all(&reply.body),
        Pace::SilentAfter(count) => {
            reply.body.truncate(count);
            stream.write_all(&reply.body)?;
            thread::sleep(SILENCE);
            Ok(())
        }
        Pace::Trickle => reply.body.iter().try_for_each(|byte| {
            thread::sleep(Duration::from_millis(20));
            stream.write_all(&[*byte])
        }),
    }
}

/// Longer than any test waits.
const SILENCE: Duration = Duration::from_secs(60);

/// How the body is sent.
#[derive(PartialEq)]
enum Pace {
    AtOnce,
    SilentAfter(usize),
    Trickle,
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    pace: Pace,
}

impl Reply {
    fn new(status: u16, headers: Vec<(&'static str, String)>) -> Self {
        Self { status, headers, body: Vec::new(), pace: Pace::AtOnce }
    }
}

fn reply_to(request: &Request, state: &mut State) -> Reply {
    let path = request.line.split_once(' ').map_or("", |(_, path)| path);
    if let Some((_, (status, code))) =
        state.refusals.iter().find(|(key, _)| path.contains(key.as_str()))
    {
        return Reply::new(
            *status,
            vec![
                ("X-Error-Code", code.clone()),
                ("X-Error-Message", "Sorry, you can't come in.".into()),
            ],
        );
    }
    if path.starts_with("hub/api/models/") || path.starts_with("hub/api/datasets/") {
        let names: Vec<String> =
            state.files.keys().map(|name| format!(r#"{{"rfilename": "{name}"}}"#)).collect();
        let body = format!(r#"{{"sha": "{}", "siblings": [{}]}}"#, state.commit, names.join(","));
        return Reply { body: body.into_bytes(), ..Reply::new(200, Vec::new()) };
    }
    if let Some(hash) = path.strip_prefix("cdn/") {
        let is_probe = request.range() == Some("bytes=0-0");
        let fault = if is_probe { None } else { state.faults.pop_front() };
        let data = state.files.values().find(|data| etag(data) == hash);
        return content(request, data.expect("a known content"), fault);
    }
    // <owner>/<name>/resolve/<commit>/<file>
    let file = path.split_once("/resolve/").and_then(|(_, rest)| rest.split_once('/'));
    let Some(data) = file.and_then(|(_, name)| state.files.get(name)) else {
        return Reply::new(404, vec![("X-Error-Code", "EntryNotFound".into())]);
    };
    let commit = ("X-Repo-Commit", state.commit.clone());
    if path.ends_with(".safetensors") || path.ends_with(".parquet") {
        let etag = etag(data);
        let location = ("Location", format!("{}/{etag}", state.cdn));
        let mut headers = vec![location, ("X-Linked-Etag", format!("\"{etag}\"")), commit];
        if state.tells_size {
            headers.push(("X-Linked-Size", data.len().to_string()));
        }
        return Reply::new(302, headers);
    }
    // the Hub redirects requests for small files to another path of its own
    if !path.starts_with("hub/cache/") {
        return Reply::new(307, vec![("Location", path.replace("hub/", "/cache/"))]);
    }
    let fault = state.trickles.then_some(Fault::Trickle);
    let mut reply = content(request, data, fault);
    reply.headers.extend([("ETag", format!("\"{}\"", &etag(data)[..40])), commit]);
    reply
}

/// The part of `data` that the `Range` of `request` asks for, or all of it without one.
fn content(request: &Request, data: &[u8], fault: Option<Fault>) -> Reply {
    if let Some(Fault::Status(status)) = fault {
        return Reply::new(status, Vec::new());
    }
    if matches!(fault, Some(Fault::Portal)) {
        return Reply { body: b"<html>log in</html>".to_vec(), ..Reply::new(200, Vec::new()) };
    }
    let size = data.len();
    let range = request.range().and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let (start, end) = match range {
        Some((start, end)) if !matches!(fault, Some(Fault::IgnoreRange)) => {
            (start.parse().unwrap_or(0), end.parse().map_or(size, |last: usize| last + 1))
        }
        _ => (0, size),
    };
    if start >= size {
        return Reply::new(416, vec![("Content-Range", format!("bytes */{size}"))]);
    }
    let mut body = data[start..end].to_vec();
    if let Some(Fault::Append(count)) = fault {
        body.extend(vec![7; count]);
    }
    let mut headers = vec![("Content-Length", body.len().to_string())];
    if matches!(fault, Some(Fault::Gzip)) {
        headers.push(("Content-Encoding", "gzip".into()));
    }
    if let Some(Fault::CutAfter(count)) = fault {
        body.truncate(count);
    }
    let pace = match fault {
        Some(Fault::SilentAfter(count)) => Pace::SilentAfter(count),
        Some(Fault::Trickle) => Pace::Trickle,
        _ => Pace::AtOnce,
    };
    if range.is_none() || matches!(fault, Some(Fault::IgnoreRange)) {
        return Reply { body, pace, ..Reply::new(200, headers) };
    }
    headers.push(("Content-Range", format!("bytes {start}-{}/{size}", end - 1)));
    Reply { body, pace, ..Reply::new(206, headers) }
}
