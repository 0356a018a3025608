//! `POST /v1/completions`, whole and as a stream.

use std::thread;

use anyhow::{Context, Result};
use dylora::config::RoutingChoice;
use dylora::generate::{Route, Sampling};
use serde_json::{Value, json};

use crate::client::{Client, assert_close, text_of};
use crate::server::{NAME, Reference, Settings, TestServer};

const PATH: &str = "/v1/completions";
const PROMPTS: [&str; 4] = ["How much remains?", "fn main", "SCENE. The battlements", "x"];

fn texts(answer: &Value) -> Vec<&str> {
    let choices = answer["choices"].as_array().expect("there are choices");
    choices.iter().map(|choice| choice["text"].as_str().expect("a text")).collect()
}

#[test]
fn texts_equal_those_of_the_engine_whole_and_as_a_stream() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    for prompt in PROMPTS {
        let expected = reference.greedy(prompt, 12)?;
        let mut ask = json!({
            "model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, "user": "me",
        });
        let answer = server.client.ask(PATH, &ask)?;
        assert_eq!(texts(&answer), [expected.text.as_str()]);
        assert_eq!(
            (&answer["object"], &answer["model"]),
            (&json!("text_completion"), &json!(NAME))
        );
        let choice = &answer["choices"][0];
        assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
        let is_full = expected.tokens.len() == 12;
        assert_eq!(choice["finish_reason"], if is_full { "length" } else { "stop" });
        let usage = json!({
            "prompt_tokens": reference.prompt_ids(prompt)?.len(),
            "completion_tokens": expected.tokens.len(),
            "total_tokens": reference.prompt_ids(prompt)?.len() + expected.tokens.len(),
        });
        assert_eq!(answer["usage"], usage);

        ask["stream"] = true.into();
        let chunks = server.client.stream(PATH, &ask)?;
        assert_eq!(text_of(&chunks, 0), expected.text);
        let last = &chunks.last().context("chunks")?["choices"][0];
        assert_eq!(last["finish_reason"], choice["finish_reason"]);
        assert!(
            chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["usage"].is_null())
        );
        ask["stream_options"] = json!({"include_usage": true});
        let chunks = server.client.stream(PATH, &ask)?;
        let (last, others) = chunks.split_last().context("chunks")?;
        assert_eq!((&last["usage"], &last["choices"]), (&usage, &json!([])));
        assert!(others.iter().all(|chunk| chunk.get("usage") == Some(&Value::Null)));
    }
    Ok(())
}

#[test]
fn sixty_four_streams_at_once_have_the_texts_that_they_have_alone() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let ask = |index: usize| {
        // every other text is drawn
        let temperature = [0.0, 1.3][index % 2];
        json!({
            "model": NAME, "prompt": PROMPTS[index / 2 % 4], "max_tokens": 4 + index % 9,
            "temperature": temperature, "top_p": 0.9, "seed": index, "stream": true,
        })
    };
    let clients: Vec<_> = (0..64)
        .map(|index| {
            let (client, ask) = (server.client.clone(), ask(index));
            thread::spawn(move || client.stream(PATH, &ask))
        })
        .collect();
    for (index, client) in clients.into_iter().enumerate() {
        let chunks = client.join().expect("a client does not panic")?;
        let ids = reference.prompt_ids(PROMPTS[index / 2 % 4])?;
        let temperature = [0.0, 1.3][index % 2];
        let sampling = Sampling { temperature, top_p: 0.9, seed: index as u64, ..Sampling::GREEDY };
        let expected = reference.text(&ids, 4 + index % 9, 0, sampling, Route::Router)?;
        assert_eq!(text_of(&chunks, 0), expected.text, "text {index}");
    }
    server.client.wait_for("dylora_texts_active", |count| count == 0.0)?;
    Ok(())
}

#[test]
fn prompts_may_be_texts_or_tokens_and_have_several_answers() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let ids = reference.prompt_ids(PROMPTS[0])?;
    let other = reference.prompt_ids(PROMPTS[1])?;
    let ask = |prompt: &Value, n: usize| {
        let ask = json!({
            "model": NAME, "prompt": prompt, "max_tokens": 6, "temperature": 0.9, "seed": 5, "n": n,
        });
        server.client.ask(PATH, &ask)
    };
    let one = ask(&json!(PROMPTS[0]), 1)?;
    assert_eq!(texts(&ask(&json!(ids), 1)?), texts(&one));
    assert_eq!(texts(&ask(&json!([PROMPTS[0]]), 1)?), texts(&one));
    let both = ask(&json!([PROMPTS[0], PROMPTS[1]]), 2)?;
    assert_eq!(texts(&ask(&json!([ids, other]), 2)?), texts(&both));
    let sampling = Sampling { temperature: 0.9, seed: 5, ..Sampling::GREEDY };
    for (index, text) in texts(&both).into_iter().enumerate() {
        let prompt = if index < 2 { &ids } else { &other };
        let expected = reference.text(prompt, 6, index as u64, sampling, Route::Router)?;
        assert_eq!(text, expected.text, "choice {index}");
        assert_eq!(both["choices"][index]["index"], index);
    }
    assert_eq!(both["usage"]["prompt_tokens"], ids.len() + other.len());
    let mut stream = json!({
        "model": NAME, "prompt": [PROMPTS[0], PROMPTS[1]], "max_tokens": 6, "temperature": 0.9,
        "seed": 5, "n": 2, "stream": true,
    });
    let chunks = server.client.stream(PATH, &stream)?;
    for (index, text) in texts(&both).into_iter().enumerate() {
        assert_eq!(text_of(&chunks, index as u64), text);
    }
    // without a seed, two answers differ
    stream["seed"] = Value::Null;
    stream["max_tokens"] = 20.into();
    let random = || Ok::<_, anyhow::Error>(text_of(&server.client.stream(PATH, &stream)?, 0));
    assert_ne!(random()?, random()?);
    Ok(())
}

#[test]
fn log_probabilities_and_routing_weights_are_those_of_the_engine() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let expected = reference.greedy(PROMPTS[2], 10)?;
    let mut ask = json!({
        "model": NAME, "prompt": PROMPTS[2], "max_tokens": 10, "temperature": 0, "logprobs": 3,
        "return_routing": true,
    });
    let answer = server.client.ask(PATH, &ask)?;
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().context("a text")?;
    let logprobs = &choice["logprobs"];
    let list = |value: &Value| value.as_array().cloned().context("a list");
    let names = list(&logprobs["tokens"])?;
    assert_eq!(names.len(), expected.tokens.len());
    let weights = list(&choice["routing"]["weights"])?;
    assert_eq!(choice["routing"]["experts"], json!(["verse", "code", "expert-2"]));
    for (index, token) in expected.tokens.iter().enumerate() {
        let found = logprobs["token_logprobs"][index].as_f64().context("a number")?;
        assert!((found - token.log_prob).abs() < 1e-5, "{found} is not {}", token.log_prob);
        let best = logprobs["top_logprobs"][index].as_object().context("an object")?;
        assert!(best.contains_key(names[index].as_str().context("a name")?));
        assert!((1..=4).contains(&best.len()), "{best:?}");
        let found: Vec<f64> = serde_json::from_value(weights[index].clone())?;
        assert!(found.iter().zip(&token.weights).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
        let offset = logprobs["text_offset"][index].as_u64().context("a number")? as usize;
        let rest: String = text.chars().skip(offset).collect();
        let name = names[index].as_str().context("a name")?;
        assert!(rest.starts_with(name) || name.starts_with("bytes:"), "`{name}` in `{rest}`");
    }
    // a stream has the same, in pieces
    ask["stream"] = true.into();
    let chunks = server.client.stream(PATH, &ask)?;
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = chunks.iter().map(|chunk| &chunk["choices"][0]["logprobs"][key]);
        let all: Vec<Value> = parts.filter_map(Value::as_array).flatten().cloned().collect();
        assert_close(&json!(all), &logprobs[key]);
    }
    Ok(())
}

#[test]
fn a_text_ends_before_a_stop_string_and_frees_its_place() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let whole = reference.greedy(PROMPTS[0], 24)?.text;
    let middle: Vec<char> = whole.chars().skip(6).take(2).collect();
    let stop: String = middle.into_iter().collect();
    let end = whole.find(&stop).context("it is in there")?;
    for stop in [json!(stop), json!(["never", stop])] {
        let mut ask = json!({
            "model": NAME, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "stop": stop,
            "logprobs": 0,
        });
        let answer = server.client.ask(PATH, &ask)?;
        assert_eq!(texts(&answer), [&whole[..end]]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        // the tokens are those of the text, not those of the stop string
        let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().context("a list")?;
        let offsets = &answer["choices"][0]["logprobs"]["text_offset"];
        let last = offsets[tokens.len() - 1].as_u64().context("a number")?;
        assert!((last as usize) < whole[..end].chars().count().max(1));
        ask["stream"] = true.into();
        let chunks = server.client.stream(PATH, &ask)?;
        assert_eq!(text_of(&chunks, 0), whole[..end]);
        let parts = chunks.iter().map(|chunk| &chunk["choices"][0]["logprobs"]["tokens"]);
        let all: Vec<Value> = parts.filter_map(Value::as_array).flatten().cloned().collect();
        assert_eq!(all, *tokens);
    }
    server.client.wait_for("dylora_texts_active", |count| count == 0.0)?;
    Ok(())
}

#[test]
fn an_end_token_ends_a_text_and_is_not_part_of_it() -> Result<()> {
    let reference = Reference::new()?;
    let tokens = reference.greedy(PROMPTS[1], 8)?.tokens;
    let end = tokens[3].id;
    let first = tokens.iter().position(|token| token.id == end).context("it is in there")?;
    let server =
        TestServer::start(Settings { end_tokens: Some(vec![end]), ..Settings::default() })?;
    let ask = json!({
        "model": NAME, "prompt": PROMPTS[1], "max_tokens": 8, "temperature": 0, "logprobs": 1,
    });
    let answer = server.client.ask(PATH, &ask)?;
    let ids: Vec<i64> = tokens[..first].iter().map(|token| token.id).collect();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], first + 1);
    let names = answer["choices"][0]["logprobs"]["tokens"].as_array().context("a list")?.len();
    assert_eq!(names, ids.len());
    Ok(())
}

#[test]
fn each_name_of_the_model_and_each_routing_has_its_own_text() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let ids = reference.prompt_ids(PROMPTS[3])?;
    let one_hot = |expert: usize| {
        Route::Fixed((0..3).map(|other| if other == expert { 1.0 } else { 0.0 }).collect())
    };
    let uniform = Route::Fixed(vec![1.0 / 3.0; 3]);
    let base = Route::Fixed(vec![0.0; 3]);
    let cases = [
        ("mix", None, Route::Router),
        ("mix", Some("router"), Route::Router),
        ("mix", Some("uniform"), uniform),
        ("mix", Some("expert:2"), one_hot(2)),
        ("mix", Some("domain:code"), one_hot(1)),
        ("mix", Some("none"), base.clone()),
        ("mix:base", None, base),
        ("mix:code", None, one_hot(1)),
        ("mix:verse", None, one_hot(0)),
        ("mix:expert-1", None, one_hot(1)),
        ("mix:expert-2", None, one_hot(2)),
    ];
    for (model, routing, route) in cases {
        let ask = json!({
            "model": model, "routing": routing, "prompt": PROMPTS[3], "max_tokens": 8,
            "temperature": 0,
        });
        let expected = reference.text(&ids, 8, 0, Sampling::GREEDY, route)?;
        let answer = server.client.ask(PATH, &ask)?;
        assert_eq!(texts(&answer), [expected.text.as_str()], "{model} {routing:?}");
        assert_eq!(answer["model"], model);
    }
    Ok(())
}

#[test]
fn models_are_the_mixture_its_experts_and_its_base() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let list = server.client.get("/v1/models")?.json()?;
    let names = list["data"].as_array().context("a list")?.iter().map(|model| &model["id"]);
    let names: Vec<&str> = names.filter_map(Value::as_str).collect();
    assert_eq!(names, ["mix", "mix:verse", "mix:code", "mix:expert-2", "mix:base"]);
    for name in names {
        let model =
            server.client.get(&format!("/v1/models/{}", name.replace(':', "%3A")))?.json()?;
        assert_eq!((&model["id"], &model["object"]), (&json!(name), &json!("model")));
    }
    assert_eq!(server.client.get("/v1/models/other")?.status, 404);
    Ok(())
}

#[test]
fn a_mixture_that_was_trained_by_records_asks_for_a_routing() -> Result<()> {
    let settings = Settings { trained: RoutingChoice::Record, ..Settings::default() };
    let server = TestServer::start(settings)?;
    let mut ask = json!({"model": NAME, "prompt": "x", "max_tokens": 2});
    let answer = server.client.post(PATH, &ask)?;
    assert_eq!((answer.status, &answer.json()?["error"]["param"]), (400, &json!("routing")));
    ask["routing"] = "expert:1".into();
    server.client.ask(PATH, &ask)?;
    Ok(())
}

#[test]
fn echo_puts_the_prompt_in_front() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let reference = Reference::new()?;
    let expected = format!("{}{}", PROMPTS[0], reference.greedy(PROMPTS[0], 5)?.text);
    for prompt in [json!(PROMPTS[0]), json!(reference.prompt_ids(PROMPTS[0])?)] {
        let mut ask = json!({
            "model": NAME, "prompt": prompt, "max_tokens": 5, "temperature": 0, "echo": true,
        });
        assert_eq!(texts(&server.client.ask(PATH, &ask)?), [expected.as_str()]);
        ask["stream"] = true.into();
        assert_eq!(text_of(&server.client.stream(PATH, &ask)?, 0), expected);
    }
    Ok(())
}

#[test]
fn what_happens_is_counted() -> Result<()> {
    let server = TestServer::start(Settings::default())?;
    let client: &Client = &server.client;
    client.ask(PATH, &json!({"model": NAME, "prompt": "x", "max_tokens": 5, "temperature": 0}))?;
    client.post(PATH, &json!({"model": "other"}))?;
    let ok = "dylora_http_requests_total{endpoint=\"/v1/completions\",status=\"200\"}";
    assert_eq!(client.metric(ok)?, 1.0);
    assert_eq!(client.metric(&ok.replace("200", "404"))?, 1.0);
    assert_eq!(client.metric("dylora_prompt_tokens_total")?, 1.0);
    let tokens = client.metric("dylora_completion_tokens_total")?;
    assert!((1.0..=5.0).contains(&tokens));
    assert_eq!(client.metric("dylora_time_to_first_token_seconds_count")?, 1.0);
    assert_eq!(client.metric("dylora_time_per_token_seconds_count")?, tokens - 1.0);
    let bucket = "dylora_time_per_token_seconds_bucket{le=\"+Inf\"}";
    assert_eq!(client.metric(bucket)?, tokens - 1.0);
    assert_eq!(client.metric("dylora_cache_positions")?, 8.0 * 64.0);
    assert_eq!(client.metric("dylora_cache_positions_used")?, 0.0);
    // 4 layers of keys and values, 4 heads of width 32, f32, and a scratch position in each row
    let bytes = 8.0 * 65.0 * 4.0 * 2.0 * 128.0 * 4.0;
    assert_eq!(client.metric("dylora_cache_bytes")?, bytes);
    let page = client.get("/metrics")?;
    assert_eq!(page.headers["content-type"], "text/plain; version=0.0.4");
    Ok(())
}
