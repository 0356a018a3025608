//! Requests that are refused, in OpenAI's form.

use std::io::Write;
use std::net::TcpStream;

use anyhow::{Context, Result};
use dylora::serve::{Keys, Limits};
use serde_json::{Value, json};

use crate::client::{self, Answer};
use crate::server::{NAME, Settings, TestServer};

const PATH: &str = "/v1/completions";

/// Checks the form of an error, and returns its field, code and message.
fn error(answer: &Answer) -> Result<(Value, Value, String)> {
    let json = answer.json()?;
    let error = json["error"].as_object().with_context(|| json.to_string())?;
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    let kind = match answer.status {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    assert_eq!(error["type"], kind);
    let message = error["message"].as_str().context("a text")?.to_owned();
    Ok((error["param"].clone(), error["code"].clone(), message))
}

#[test]
fn wrong_fields_are_named() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let many: Vec<String> = (0..17).map(|i| i.to_string()).collect();
    let cases = [
        (json!({"prompt": null}), "prompt", "`prompt` is missing"),
        (json!({"prompt": []}), "prompt", "must not be an empty list"),
        (json!({"prompt": [[]]}), "prompt", "must be a string, a list of strings"),
        (json!({"prompt": ["x", 1]}), "prompt", "must be a string, a list of strings"),
        (json!({"prompt": [1, 2048]}), "prompt", "a number from 0 to 2047, got 2048"),
        (json!({"prompt": [-1]}), "prompt", "a number from 0 to 2047, got -1"),
        (json!({"prompt": ""}), "prompt", "the prompt is empty"),
        (json!({"prompt": "x ".repeat(200)}), "prompt", "leave no room in a context of 64"),
        (json!({"max_tokens": 0}), "max_tokens", "a whole number of at least 1, got 0"),
        (json!({"max_tokens": 64}), "max_tokens", "`max_tokens` must be at most 63, got 64"),
        (json!({"max_tokens": 1.5}), "max_tokens", "a whole number of at least 1, got 1.5"),
        (json!({"max_tokens": 1e300}), "max_tokens", "a whole number of at least 1, got 1e"),
        (json!({"temperature": "hot"}), "temperature", "must be a number, got \"hot\""),
        (json!({"temperature": -1}), "temperature", "must be at least 0, got -1"),
        (json!({"top_p": 0}), "top_p", "must be above 0 and at most 1, got 0"),
        (json!({"min_p": 2}), "min_p", "must be between 0 and 1, got 2"),
        (json!({"top_k": -1}), "top_k", "a whole number of at least 0, got -1"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "must be above 0, got 0"),
        (json!({"seed": "x"}), "seed", "`seed` must be a whole number, got \"x\""),
        (json!({"n": 0}), "n", "a whole number from 1 to 264, got 0"),
        (json!({"stream": 1}), "stream", "must be `true` or `false`, got 1"),
        (json!({"stream_options": {}}), "stream_options", "needs `\"stream\": true`"),
        (json!({"stop": 1}), "stop", "must be a string or a list of strings, got 1"),
        (json!({"stop": ["x", ""]}), "stop", "must have 1 to 512 bytes, got 0"),
        (json!({"stop": many}), "stop", "must have at most 16 strings, got 17"),
        (json!({"logprobs": 21}), "logprobs", "a whole number from 0 to 20, got 21"),
        (json!({"routing": "expert:3"}), "routing", "there is no `expert:3`"),
        (json!({"routing": "domain:law"}), "routing", "the run has no domain `law`"),
        (json!({"routing": "best"}), "routing", "must be `router`"),
        (json!({"model": "mix:code", "routing": "none"}), "routing", "a routing of its own"),
        (json!({"model": null}), "model", "`model` is missing"),
        (json!({"model": 7}), "model", "must be a string, got 7"),
        (json!({"temprature": 1}), "temprature", "there is no field `temprature`"),
    ];
    for (fields, param, message) in cases {
        let mut ask = json!({"model": NAME, "prompt": "x"});
        for (key, value) in fields.as_object().context("an object")? {
            ask[key] = value.clone();
        }
        let answer = server.client.post(PATH, &ask)?;
        let (found, _, said) = error(&answer)?;
        assert_eq!((answer.status, found.as_str()), (400, Some(param)), "{said}");
        assert!(said.contains(message), "`{said}` should contain `{message}`");
    }
    Ok(())
}

#[test]
fn what_would_change_the_answer_is_refused_by_name_and_the_rest_is_not() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let mut ask = json!({
        "model": NAME, "prompt": "x", "max_tokens": 1, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "best_of": 1, "suffix": null, "user": "me", "store": true,
        "metadata": {"a": "b"},
    });
    server.client.ask(PATH, &ask)?;
    for (field, value) in [
        ("logit_bias", json!({"50256": -100})),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-1)),
        ("best_of", json!(2)),
        ("suffix", json!("end")),
    ] {
        let neutral = std::mem::replace(&mut ask[field], value);
        let answer = server.client.post(PATH, &ask)?;
        let (param, code, message) = error(&answer)?;
        assert_eq!(
            (answer.status, param, code),
            (400, json!(field), json!("unsupported_parameter"))
        );
        assert!(message.contains(&format!("`{field}` is not supported")), "{message}");
        ask[field] = neutral;
    }
    ask["echo"] = true.into();
    ask["logprobs"] = 1.into();
    assert_eq!(error(&server.client.post(PATH, &ask)?)?.0, "echo");
    Ok(())
}

#[test]
fn unknown_models_paths_and_methods_have_their_status() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let client = &server.client;
    for name in ["gpt-4", "mix:", "mix:law", "mix:expert-3", "mix:expert--1", "mixcode", ""] {
        let answer = client.post(PATH, &json!({"model": name, "prompt": "x"}))?;
        let (param, code, message) = error(&answer)?;
        let expected = (404, json!("model"), json!("model_not_found"));
        assert_eq!((answer.status, param, code), expected, "{name}");
        assert!(message.contains("only `mix`, `mix:verse`"), "{message}");
    }
    for (answer, status) in [
        (client.get("/v2")?, 404),
        (client.get(PATH)?, 405),
        (client.post("/v1/models", &json!({}))?, 405),
        (client.post_text(PATH, "text/plain", "{}")?, 415),
        (client.post_text(PATH, "application/json", "{\"model\"")?, 400),
        (client.post_text(PATH, "application/json", "[1]")?, 400),
        (client.post_text(PATH, "application/json", "")?, 400),
        (client.post_text(PATH, "application/json", &"[".repeat(100_000))?, 400),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        error(&answer)?;
    }
    Ok(())
}

#[test]
fn a_key_is_asked_for_everywhere_but_at_health() -> Result<()> {
    let server = TestServer::start(Settings {
        keys: Keys::new(["secret", "other"]),
        ..Settings::default()
    })?;
    for path in ["/metrics", "/v1/models", "/v1/models/mix", "/nothing"] {
        for client in [server.client.clone(), server.client.with_key("wrong")] {
            let answer = client.get(path)?;
            assert_eq!(answer.status, 401, "{path}");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            assert_eq!(error(&answer)?.1, "invalid_api_key");
        }
    }
    assert_eq!(server.client.get("/health")?.status, 200);
    let ask = json!({"model": NAME, "prompt": "x", "max_tokens": 1});
    assert_eq!(server.client.post(PATH, &ask)?.status, 401);
    for key in ["secret", "other"] {
        server.client.with_key(key).ask(PATH, &ask)?;
        assert_eq!(server.client.with_key(key).get("/metrics")?.status, 200);
    }
    Ok(())
}

#[test]
fn a_body_that_is_too_large_is_refused_with_and_without_its_length() -> Result<()> {
    let limits = Limits { max_body_bytes: 1000, ..Settings::default().limits };
    let server = TestServer::start(Settings { limits, ..Settings::default() })?;
    let answer = server.client.post(PATH, &json!({"model": NAME, "prompt": "x".repeat(1000)}))?;
    assert_eq!((answer.status, error(&answer)?.1), (413, json!("request_too_large")));
    let mut stream = TcpStream::connect(server.client.address)?;
    stream.set_read_timeout(Some(client::PATIENCE))?;
    write!(
        stream,
        "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n800\r\n{}\r\n0\r\n\r\n",
        " ".repeat(0x800)
    )?;
    assert_eq!(client::status(&stream)?, 413);
    server.client.ask(PATH, &json!({"model": NAME, "prompt": "x", "max_tokens": 1}))?;
    Ok(())
}
