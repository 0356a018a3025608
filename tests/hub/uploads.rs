//! The part of the mock Hub that takes uploads. Large contents go to the second server, in parts of
//! [`Uploads::part_bytes`] if they are longer.

use std::collections::{BTreeMap, VecDeque};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;

use super::mock::{COMMIT, Request};

/// What happens to the next request whose path contains a text.
#[derive(Clone, Copy)]
pub enum Mishap {
    /// It is answered with this status.
    Status(u16),
    /// The connection is closed without an answer.
    Cut,
}

/// The repository that is written to, and what is to happen.
#[derive(Default)]
pub struct Uploads {
    pub exists: bool,
    pub is_private: bool,
    /// The committed files.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The messages of the commits.
    pub commits: Vec<String>,
    /// The large contents, by their SHA-256.
    pub contents: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<String, Vec<u8>>,
    /// Number of bytes above which a content is sent in parts of so many.
    pub part_bytes: Option<usize>,
    /// Whether the Hub forgets what arrives, so that it cannot be verified.
    pub forgets: bool,
    pub mishaps: VecDeque<(String, Mishap)>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

pub fn git_sha1(data: &[u8]) -> String {
    hex(&Sha1::digest([format!("blob {}\0", data.len()).as_bytes(), data].concat()))
}

/// Files with this ending are large.
const LARGE: &str = ".safetensors";

impl Uploads {
    /// The status, headers and body of the answer; `None` cuts the connection.
    pub fn answer(&mut self, request: &Request, hub: &str, cdn: &str) -> Option<Answer> {
        let path = request.line.split_once(' ').map_or("", |(_, path)| path).to_owned();
        if let Some(at) = self.mishaps.iter().position(|(text, _)| path.contains(text)) {
            match self.mishaps.remove(at) {
                Some((_, Mishap::Status(status))) => return Some(error(status, "Sorry.")),
                _ => return None,
            }
        }
        let length = request.headers.get("content-length").and_then(|text| text.parse().ok());
        if length != Some(request.body.len()) {
            return Some(error(411, "a length is required"));
        }
        let json: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        Some(match path.as_str() {
            "hub/api/repos/create" => self.create(&json),
            "hub/api/models/me/mixture/preupload/main" => self.preupload(&json),
            "hub/me/mixture.git/info/lfs/objects/batch" => self.batch(&json, hub, cdn),
            "hub/api/models/me/mixture/commit/main" => self.commit(&request.body, hub),
            path if path.starts_with("cdn/put/") => self.put(path, &request.body),
            path if path.starts_with("cdn/complete/") => self.complete(&json),
            "hub/verify" => match self.contents.get(json["oid"].as_str().unwrap_or_default()) {
                Some(data) if json["size"] == data.len() => ok(&json!({})),
                _ => error(404, "no such object"),
            },
            _ => error(404, "no such address"),
        })
    }

    fn create(&mut self, json: &Value) -> Answer {
        assert_eq!((&json["organization"], &json["name"]), (&json!("me"), &json!("mixture")));
        if self.exists {
            return error(409, "You already created this model repo");
        }
        (self.exists, self.is_private) = (true, json["visibility"] == "private");
        ok(&json!({ "url": "somewhere" }))
    }

    fn preupload(&self, json: &Value) -> Answer {
        let modes = json["files"].as_array().expect("it is a list").iter().map(|file| {
            let path = file["path"].as_str().expect("it has a path");
            let is_large = path.ends_with(LARGE);
            let sample = BASE64_STANDARD.decode(file["sample"].as_str().unwrap_or("-"));
            assert!(sample.is_ok_and(|sample| sample.len() <= 512));
            let name = |data: &Vec<u8>| if is_large { sha256(data) } else { git_sha1(data) };
            json!({
                "path": path, "uploadMode": if is_large { "lfs" } else { "regular" },
                "shouldIgnore": false, "oid": self.files.get(path).map(name),
            })
        });
        ok(&json!({ "files": modes.collect::<Vec<_>>() }))
    }

    fn batch(&self, json: &Value, hub: &str, cdn: &str) -> Answer {
        assert_eq!(json["operation"], "upload");
        let objects = json["objects"].as_array().expect("it is a list").iter().map(|object| {
            let oid = object["oid"].as_str().expect("it has a name");
            let size = object["size"].as_u64().expect("it has a size") as usize;
            if self.contents.contains_key(oid) {
                return json!({ "oid": oid, "size": size });
            }
            let verify = json!({ "href": format!("{hub}/verify") });
            let upload = match self.part_bytes.filter(|bytes| size > *bytes) {
                None => json!({ "href": format!("{cdn}/put/{oid}") }),
                Some(bytes) => {
                    let mut header = json!({ "chunk_size": bytes.to_string() });
                    for part in 1..=size.div_ceil(bytes) {
                        header[part.to_string()] = format!("{cdn}/put/{oid}-{part}").into();
                    }
                    json!({ "href": format!("{cdn}/complete/{oid}"), "header": header })
                }
            };
            json!({ "oid": oid, "size": size, "actions": { "upload": upload, "verify": verify } })
        });
        ok(&json!({ "objects": objects.collect::<Vec<_>>() }))
    }

    fn put(&mut self, path: &str, body: &[u8]) -> Answer {
        let name = path.trim_start_matches("cdn/put/").to_owned();
        if !self.forgets {
            let store = if name.contains('-') { &mut self.parts } else { &mut self.contents };
            store.insert(name.clone(), body.to_vec());
        }
        Answer { status: 200, etag: Some(format!("etag of {name}")), body: vec![] }
    }

    fn complete(&mut self, json: &Value) -> Answer {
        let oid = json["oid"].as_str().expect("it has a name").to_owned();
        let mut all = vec![];
        for (index, part) in json["parts"].as_array().expect("it is a list").iter().enumerate() {
            let name = format!("{oid}-{}", index + 1);
            assert_eq!(part["partNumber"], index + 1);
            assert_eq!(part["etag"], format!("etag of {name}"));
            all.extend(self.parts.remove(&name).expect("the part has arrived"));
        }
        self.contents.insert(oid, all);
        ok(&json!({}))
    }

    fn commit(&mut self, body: &[u8], hub: &str) -> Answer {
        let text = String::from_utf8(body.to_vec()).expect("it is text");
        let mut lines = text.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).expect("each line is JSON");
            (line["key"].take().as_str().expect("it has a key").to_owned(), line["value"].take())
        });
        let (key, header) = lines.next().expect("there is a header");
        assert_eq!(key, "header");
        for (key, value) in lines {
            let path = value["path"].as_str().expect("it has a path").to_owned();
            let data = match key.as_str() {
                "file" => {
                    let content = value["content"].as_str().expect("it has a content");
                    BASE64_STANDARD.decode(content).expect("it is base64")
                }
                "lfsFile" => {
                    let content = self.contents.get(value["oid"].as_str().unwrap_or_default());
                    let Some(data) = content else { return error(400, "no such content") };
                    assert_eq!(value["size"], data.len());
                    data.clone()
                }
                other => panic!("key {other}"),
            };
            self.files.insert(path, data);
        }
        self.commits.push(header["summary"].as_str().unwrap_or_default().to_owned());
        let url = format!("{hub}/me/mixture/commit/{COMMIT}");
        ok(&json!({ "success": true, "commitOid": COMMIT, "commitUrl": url }))
    }
}

/// An answer to an upload.
pub struct Answer {
    pub status: u16,
    pub etag: Option<String>,
    pub body: Vec<u8>,
}

fn ok(json: &Value) -> Answer {
    Answer { status: 200, etag: None, body: json.to_string().into_bytes() }
}

fn error(status: u16, text: &str) -> Answer {
    Answer { status, etag: None, body: json!({ "error": text }).to_string().into_bytes() }
}
