//! A plain HTTP client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Longest time that a test waits for the server.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where a server is.
#[derive(Clone)]
pub struct Client {
    pub address: SocketAddr,
    key: Option<&'static str>,
    agent: ureq::Agent,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: ureq::http::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.text).with_context(|| self.text.clone())
    }
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build();
        Self { address, key: None, agent: config.new_agent() }
    }

    /// The same client with a key.
    pub fn with_key(&self, key: &'static str) -> Self {
        Self { key: Some(key), ..self.clone() }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        let mut request = self.agent.get(self.url(path));
        if let Some(key) = self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        answer(request.call()?)
    }

    pub fn post(&self, path: &str, json: &Value) -> Result<Answer> {
        self.post_text(path, "application/json", &json.to_string())
    }

    pub fn post_text(&self, path: &str, kind: &str, body: &str) -> Result<Answer> {
        let mut request = self.agent.post(self.url(path)).header("Content-Type", kind);
        if let Some(key) = self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        answer(request.send(body)?)
    }

    /// The answer to a request that must succeed.
    pub fn ask(&self, path: &str, json: &Value) -> Result<Value> {
        let answer = self.post(path, json)?;
        ensure!(answer.status == 200, "{answer:?}");
        answer.json()
    }

    /// The chunks of a stream that must end by `[DONE]`.
    pub fn stream(&self, path: &str, json: &Value) -> Result<Vec<Value>> {
        let (chunks, is_done) = self.stream_to_end(path, json)?;
        ensure!(is_done, "the stream ends without `[DONE]`: {chunks:?}");
        Ok(chunks)
    }

    /// The chunks of a stream, and whether `[DONE]` came behind them.
    pub fn stream_to_end(&self, path: &str, json: &Value) -> Result<(Vec<Value>, bool)> {
        let answer = self.post(path, json)?;
        ensure!(answer.status == 200, "{answer:?}");
        ensure!(answer.headers["content-type"] == "text/event-stream", "{answer:?}");
        let lines = answer.text.lines().filter(|line| !line.is_empty() && !line.starts_with(':'));
        let mut data: Vec<&str> =
            lines.map(|line| line.strip_prefix("data: ").context("data")).collect::<Result<_>>()?;
        let is_done = data.last() == Some(&"[DONE]");
        if is_done {
            data.pop();
        }
        let chunks = data.into_iter().map(|line| Ok(serde_json::from_str(line)?));
        Ok((chunks.collect::<Result<_>>()?, is_done))
    }

    /// Sends a request and does not read the answer.
    pub fn raw(&self, path: &str, body: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let length = body.len();
        write!(
            stream,
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )?;
        Ok(stream)
    }

    /// A number from the metrics; 0 if it is not there.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics")?.text;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.map_or(Ok(0.0), str::parse)?)
    }

    /// Waits until a metric has a value.
    pub fn wait_for(&self, name: &str, is_right: impl Fn(f64) -> bool) -> Result<()> {
        let started = Instant::now();
        while !is_right(self.metric(name)?) {
            ensure!(started.elapsed() < PATIENCE, "`{name}` is {}", self.metric(name)?);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn answer(response: ureq::http::Response<ureq::Body>) -> Result<Answer> {
    let (parts, mut body) = response.into_parts();
    let text = body.read_to_string()?;
    Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, text })
}

/// The status of a raw answer.
pub fn status(stream: &TcpStream) -> Result<u16> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let status = line.split(' ').nth(1).with_context(|| format!("no status in `{line}`"))?;
    Ok(status.parse()?)
}

/// Reads a raw answer to its end, however it ends.
pub fn rest(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = vec![];
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

/// The text of a choice, put together from the chunks of a stream.
pub fn text_of(chunks: &[Value], choice: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array()).flatten();
    let own = choices.filter(|found| found["index"] == choice);
    own.filter_map(|found| found["text"].as_str().or(found["delta"]["content"].as_str())).collect()
}

/// Checks that two values are equal up to the rounding of numbers. The sums of a text depend on the
/// number of texts that are computed with it.
#[track_caller]
pub fn assert_close(a: &Value, b: &Value) {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len());
            a.iter().zip(b).for_each(|(a, b)| assert_close(a, b));
        }
        (Value::Object(a), Value::Object(b)) => {
            assert!(a.keys().eq(b.keys()), "{a:?} is not {b:?}");
            a.values().zip(b.values()).for_each(|(a, b)| assert_close(a, b));
        }
        (Value::Number(a), Value::Number(b)) => {
            let [a, b] = [a, b].map(|number| number.as_f64().expect("JSON has no other numbers"));
            assert!((a - b).abs() < 1e-5, "{a} is not {b}");
        }
        _ => assert_eq!(a, b),
    }
}
