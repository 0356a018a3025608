//! What `generation_config.json` says.

use anyhow::Result;
use dylora::generate::{GenerationDefaults, Sampling};
use serde_json::json;

fn plain() -> GenerationDefaults {
    GenerationDefaults { sampling: Sampling::GREEDY, max_new_tokens: None, end_tokens: vec![2] }
}

#[test]
fn a_file_decides_how_tokens_are_chosen_and_which_end_a_text() -> Result<()> {
    let file = json!({
        "do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [2, 7],
        "max_new_tokens": 99, "repetition_penalty": 1.1, "transformers_version": "5.0",
    });
    let found = plain().with(&file)?;
    let sampling = Sampling {
        temperature: 0.6,
        top_k: 20,
        top_p: 0.95,
        repetition_penalty: 1.1,
        ..Sampling::GREEDY
    };
    let expected =
        GenerationDefaults { sampling, max_new_tokens: Some(99), end_tokens: vec![2, 7] };
    assert_eq!(found, expected);
    Ok(())
}

#[test]
fn without_do_sample_the_most_probable_token_is_taken() -> Result<()> {
    let found = plain().with(&json!({"temperature": 0.6, "top_k": 20, "eos_token_id": 5}))?;
    assert_eq!(found, GenerationDefaults { end_tokens: vec![2, 5], ..plain() });
    assert_eq!(plain().with(&json!({}))?, plain());
    Ok(())
}

#[test]
fn transformers_own_default_of_top_k_holds_for_files_that_ask_for_samples() -> Result<()> {
    let found = plain().with(&json!({"do_sample": true}))?.sampling;
    assert_eq!((found.temperature, found.top_k, found.top_p), (1.0, 50, 1.0));
    Ok(())
}

#[test]
fn values_of_another_type_are_refused() {
    let cases = [
        (json!({"do_sample": true, "top_p": "high"}), "`top_p` must be a number, got \"high\""),
        (json!({"eos_token_id": ["x"]}), "`eos_token_id` must hold ids, got \"x\""),
        (
            json!({"do_sample": true, "top_p": 1.5}),
            "`top_p` must be above 0 and at most 1, got 1.5",
        ),
    ];
    for (file, message) in cases {
        assert_eq!(plain().with(&file).unwrap_err().to_string(), message);
    }
}
