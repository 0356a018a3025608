//! Clients that ask for too much, go away, send slowly or do not read, and the end of the server.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dylora::serve::Limits;
use serde_json::{Value, json};

use crate::client::{self, Client, PATIENCE};
use crate::server::{NAME, Settings, TestServer};

const PATH: &str = "/v1/completions";

/// A server whose texts may be so long that they take a second or so, and have no end of their own.
fn start(change: impl FnOnce(&mut Settings)) -> Result<TestServer> {
    let mut settings = Settings::default();
    settings.limits.context = 256;
    settings.end_tokens = Some(vec![]);
    change(&mut settings);
    TestServer::start(settings)
}

/// A text that takes long.
fn long(fields: &Value) -> Value {
    let mut ask = json!({
        "model": NAME, "prompt": "x", "max_tokens": 250, "temperature": 0.8, "seed": 1,
    });
    for (key, value) in fields.as_object().into_iter().flatten() {
        ask[key] = value.clone();
    }
    ask
}

fn short() -> Value {
    json!({"model": NAME, "prompt": "x", "max_tokens": 2, "temperature": 0})
}

fn ended(reason: &str) -> String {
    format!("dylora_texts_ended_total{{reason=\"{reason}\"}}")
}

fn is_free(client: &Client) -> Result<()> {
    client.wait_for("dylora_texts_active", |count| count == 0.0)?;
    client.wait_for("dylora_texts_waiting", |count| count == 0.0)?;
    client.wait_for("dylora_cache_positions_used", |count| count == 0.0)
}

#[test]
fn a_full_queue_refuses_requests_until_there_is_room() -> Result<()> {
    let server = start(|settings| {
        settings.limits = Limits { max_waiting: 2, ..settings.limits };
    })?;
    let client = &server.client;
    let too_many = client.post(PATH, &long(&json!({"n": 11})))?;
    assert_eq!(too_many.status, 400);
    let ask = long(&json!({"prompt": ["x", "y"], "n": 6}));
    let message = client.post(PATH, &ask)?.json()?["error"]["message"].to_string();
    assert!(message.contains("asks for 12 texts, but the server holds at most 10"), "{message}");
    let busy = client.raw(PATH, &long(&json!({"n": 10})).to_string())?;
    client.wait_for("dylora_texts_active", |count| count == 8.0)?;
    assert_eq!(client.metric("dylora_texts_waiting")?, 2.0);
    let answer = client.post(PATH, &short())?;
    assert_eq!(answer.status, 429, "{answer:?}");
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(answer.json()?["error"]["code"], "queue_full");
    drop(busy);
    is_free(client)?;
    client.ask(PATH, &short())?;
    Ok(())
}

#[test]
fn a_client_that_goes_away_ends_its_texts() -> Result<()> {
    let server = start(|_| {})?;
    let client = &server.client;
    for (count, fields) in [(2.0, json!({"n": 2})), (4.0, json!({"n": 2, "stream": true}))] {
        let gone = client.raw(PATH, &long(&fields).to_string())?;
        client.wait_for("dylora_texts_active", |count| count == 2.0)?;
        drop(gone);
        client.wait_for(&ended("cancelled"), |found| found == count)?;
        is_free(client)?;
    }
    assert_eq!(client.metric(&ended("length"))?, 0.0);
    Ok(())
}

#[test]
fn half_sent_requests_are_ended_and_hold_up_nobody() -> Result<()> {
    let time = Duration::from_millis(1500);
    let server = start(|settings| {
        settings.limits = Limits { header_time: time, body_time: time, ..settings.limits };
    })?;
    let client = &server.client;
    let started = Instant::now();
    let mut half_head = TcpStream::connect(client.address)?;
    half_head.set_read_timeout(Some(PATIENCE))?;
    write!(half_head, "POST {PATH} HTTP/1.1\r\nHost: loc")?;
    let silent = TcpStream::connect(client.address)?;
    silent.set_read_timeout(Some(PATIENCE))?;
    let mut half_body = TcpStream::connect(client.address)?;
    half_body.set_read_timeout(Some(PATIENCE))?;
    write!(
        half_body,
        "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: 100\r\n\r\n{{\"model\""
    )?;
    client.ask(PATH, &short())?;
    assert_eq!(client::status(&half_body)?, 408);
    client::rest(&half_head);
    client::rest(&silent);
    assert!(started.elapsed() >= time);
    client.ask(PATH, &short())?;
    Ok(())
}

/// Chunks repeat the name of the model. With a long name, few of them fill the buffers of a
/// connection.
fn start_with_long_name(limits: impl FnOnce(&mut Limits)) -> Result<(TestServer, String)> {
    let name = "m".repeat(100_000);
    let server = start(|settings| {
        settings.name = name.clone();
        limits(&mut settings.limits);
    })?;
    Ok((server, name))
}

#[test]
fn a_client_that_does_not_read_loses_its_text_and_holds_up_nobody() -> Result<()> {
    let (server, name) = start_with_long_name(|limits| limits.max_unread = 64)?;
    let client = &server.client;
    let ask = long(&json!({"model": name, "stream": true}));
    let mut stalled = client.raw(PATH, &ask.to_string())?;
    let mut short = short();
    short["model"] = name.as_str().into();
    client.ask(PATH, &short)?;
    client.wait_for(&ended("unread"), |count| count == 1.0)?;
    is_free(client)?;
    // what was sent can still be read, and says why it ends
    stalled.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let text = String::from_utf8(client::rest(&stalled))?;
    assert!(text.contains("\"code\":\"slow_reader\""), "{}", &text[text.len() - 500..]);
    assert!(!text.contains("[DONE]"));
    Ok(())
}

#[test]
fn a_connection_that_is_not_read_is_closed() -> Result<()> {
    let (server, name) = start_with_long_name(|limits| {
        limits.max_unread = 1000;
        limits.write_time = Duration::from_millis(100);
    })?;
    let client = &server.client;
    let ask = long(&json!({"model": name, "stream": true}));
    let stalled = client.raw(PATH, &ask.to_string())?;
    client.wait_for("dylora_connections", |count| count == 2.0)?;
    // this client has only one
    client.wait_for("dylora_connections", |count| count == 1.0)?;
    is_free(client)?;
    assert!(!String::from_utf8_lossy(&client::rest(&stalled)).contains("[DONE]"));
    Ok(())
}

#[test]
fn a_text_that_takes_too_long_is_ended() -> Result<()> {
    let server = start(|settings| settings.limits.request_time = Duration::from_millis(60))?;
    let client = &server.client;
    let answer = client.post(PATH, &long(&json!({"n": 8})))?;
    assert_eq!(answer.status, 504, "{answer:?}");
    assert_eq!(answer.headers["x-should-retry"], "false");
    assert_eq!(answer.json()?["error"]["code"], "timeout");
    let (chunks, is_done) = client.stream_to_end(PATH, &long(&json!({"n": 8, "stream": true})))?;
    assert!(!is_done);
    assert_eq!(chunks.last().context("chunks")?["error"]["code"], "timeout");
    is_free(client)?;
    // once the first text has timed out, nobody waits for the others
    let counts = [client.metric(&ended("timed_out"))?, client.metric(&ended("cancelled"))?];
    assert!(counts[0] >= 2.0 && counts.iter().sum::<f64>() == 16.0, "{counts:?}");
    Ok(())
}

#[test]
fn running_texts_end_before_the_server_does_and_new_ones_are_refused() -> Result<()> {
    let server = start(|_| {})?;
    let client = server.client.clone();
    let running = {
        let client = client.clone();
        thread::spawn(move || client.stream(PATH, &long(&json!({"n": 8, "stream": true}))))
    };
    client.wait_for("dylora_texts_active", |count| count == 8.0)?;
    server.stop();
    let started = Instant::now();
    while client.get("/health")?.status == 200 {
        assert!(started.elapsed() < PATIENCE);
    }
    let answer = client.post(PATH, &short())?;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(answer.headers["connection"], "close");
    assert_eq!(answer.json()?["error"]["code"], "shutting_down");
    let chunks = running.join().expect("the client does not panic")?;
    assert_eq!(chunks.last().context("chunks")?["choices"][0]["finish_reason"], "length");
    server.join()?;
    assert!(TcpStream::connect(client.address).is_err());
    Ok(())
}

#[test]
fn a_server_does_not_wait_for_texts_longer_than_it_should() -> Result<()> {
    let server = start(|settings| settings.limits.drain_time = Duration::from_millis(10))?;
    let mut running = server.client.raw(PATH, &long(&json!({"stream": true})).to_string())?;
    // the head of the answer
    running.read_exact(&mut [0; 12])?;
    server.join()?;
    assert!(!String::from_utf8_lossy(&client::rest(&running)).contains("[DONE]"));
    Ok(())
}

#[test]
fn many_requests_may_use_one_connection() -> Result<()> {
    let server = start(|_| {})?;
    let mut stream = TcpStream::connect(server.client.address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = short().to_string();
    for _ in 0..3 {
        write!(
            stream,
            "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = vec![];
        while !answer.ends_with(b"}}") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    }
    Ok(())
}
