//! The chat template of a run's base.

use std::process::Command;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, ensure};
use dylora::base::Base;
use dylora::checkpoint;
use dylora::config::{BaseConfig, BaseSource, LossOnTurns, SaveDtype, load};
use dylora::data::{DataOptions, load_datasets};
use dylora::durable::output::Output;
use dylora::export::hugging_face;
use dylora::hub::HubSettings;
use dylora::mixture::Mixture;
use dylora::train::Trainer;
use serde_json::json;
use tch::Device;

use crate::BaseFolder;

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/base");
const MINE: &str = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}\
                    {% if add_generation_prompt %}assistant:\n{% endif %}";

fn open(config: &BaseConfig) -> Result<Base> {
    Base::open(config, &HubSettings::offline("absent"), &())
}

/// The config of a run on the demo's base.
fn config(folder: &BaseFolder, overrides: &[&str]) -> Result<dylora::config::Config> {
    let dir = folder.path("");
    let text = format!(
        "run = {{ dir = '{0}/run', device = 'cpu', tensorboard = false }}\n\
         base = {{ source = {{ path = '{DEMO}' }}, chat_template = '{0}/mine.jinja' }}\n\
         data = {{ seq_len = 32, domains = [{{ name = 'chat', train = ['{0}/a.jsonl'] }}] }}\n\
         lora = {{ num_experts = 1 }}\n\
         train = {{ duration = {{ steps = 2 }} }}\n",
        dir.display()
    );
    let overrides: Vec<String> = overrides.iter().map(|item| (*item).to_owned()).collect();
    load::resolve(&text, &overrides)
}

fn folder() -> BaseFolder {
    let record = json!({"messages": [
        {"role": "user", "content": "fn main"}, {"role": "assistant", "content": "() {}"}
    ]});
    BaseFolder::new(&[("mine.jinja", MINE), ("a.jsonl", &record.to_string())])
}

#[test]
fn a_named_template_is_saved_with_the_run_and_trains_it() -> Result<()> {
    let folder = folder();
    let config = config(&folder, &["data.loss_on_turns=last"])?;
    assert_eq!(config.data.loss_on_turns, LossOnTurns::Last);
    let base = open(&config.base)?;
    let options = DataOptions {
        chat: base.chat_options(config.data.loss_on_turns),
        ..DataOptions::new(&config.data, 0, base.spec.eos_token_id(), None)
    };
    let tokenizer = base.tokenizer()?;
    let data = load_datasets(&config.data.domains, &options, tokenizer, &|_| ())?;
    let counts = data.train.domains[0].counts;
    assert_eq!(
        counts.tokens as usize,
        tokenizer.encode("user:\nfn main\nassistant:\n() {}\n")?.len()
    );
    assert_eq!(counts.label_tokens as usize, tokenizer.encode("() {}\n")?.len());
    let mixture = Mixture::of_config(&config, &base.spec, &|_| unreachable!("there is none"))?;
    let mut trainer = Trainer::new(config.clone(), &base, &mixture, data, Device::Cpu)?;
    trainer.run(&AtomicBool::new(false), &mut |_| ())?;
    let dir = checkpoint::find(&folder.path("run"), checkpoint::Preferred::Best)?;
    let saved = checkpoint::read_config(&dir)?;
    assert_eq!(saved.base.chat_template, Some(folder.path("mine.jinja")));
    assert_eq!(saved, config);
    Ok(())
}

#[test]
fn the_path_of_a_template_is_made_absolute() -> Result<()> {
    let config = config(&folder(), &["base.chat_template=x/../mine.jinja"])?;
    let expected = std::path::absolute("x/../mine.jinja")?;
    assert_eq!(config.base.chat_template.as_ref(), Some(&expected));
    let text = load::to_toml(&config);
    assert_eq!(load::resolve(&text, &[])?.base.chat_template, Some(expected));
    let error = open(&config.base).expect_err("there is no such file");
    let error = format!("{error:#}");
    assert!(error.starts_with("cannot read the chat template: failed to open file `"), "{error}");
    Ok(())
}

#[test]
fn templates_lie_beside_the_tokenizer() -> Result<()> {
    let source = BaseSource::Path(DEMO.into());
    let mut config =
        BaseConfig { source, tokenizer: None, chat_template: None, dtype: Default::default() };
    assert!(open(&config)?.chat_template.is_none());
    let tokenizer = fs_err::read_to_string(format!("{DEMO}/tokenizer.json"))?;
    let folder = BaseFolder::new(&[
        ("tokenizer.json", &tokenizer),
        ("tokenizer_config.json", r#"{"chat_template": "x", "eos_token": "<e>"}"#),
        ("mine.jinja", "{{ eos_token }}"),
    ]);
    config.tokenizer = Some(folder.path("tokenizer.json"));
    let base = open(&config)?;
    let chat = crate::messages(&[("user", "a")]);
    let render = |base: &Base| base.chat_template.as_ref().unwrap().render(&chat, false);
    assert_eq!(render(&base)?.text, "x");
    assert!(base.beside.is_empty());
    // the config's template has the special tokens of the files beside the tokenizer
    config.chat_template = Some(folder.path("mine.jinja"));
    assert_eq!(render(&open(&config)?)?.text, "<e>");
    Ok(())
}

#[test]
fn a_written_base_has_the_template_that_it_was_trained_with() -> Result<()> {
    let folder = folder();
    let base = open(&config(&folder, &[])?.base)?;
    let names: Vec<_> = base.beside.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["tokenizer_config.json", "chat_template.jinja"]);
    assert!(base.input_files().contains(&folder.path("mine.jinja")));
    let out = Output::new(&folder.path("out"));
    let tokenizer = base.tokenizer_file.as_deref();
    hugging_face::export(&out, &base.weights()?, SaveDtype::F32, tokenizer, &base.beside, "")?;
    assert_eq!(fs_err::read_to_string(folder.path("out/chat_template.jinja"))?, MINE);
    Ok(())
}

/// What a command of dylora prints.
fn dylora(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.env("DYLORA_CACHE", std::env::temp_dir().join("dylora-test-cache"));
    let output = command.args(arguments).output()?;
    let message = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{message}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn commands_score_chats() -> Result<()> {
    let folder = folder();
    let path = |name: &str| folder.path(name).display().to_string();
    let data = format!("chat={}", path("a.jsonl"));
    let eval = |more: &[&str]| {
        let common = ["eval", "--base", DEMO, "--data", &data, "--seq-len", "32", "--json"];
        dylora(&[&common, more].concat())
    };
    let report: serde_json::Value =
        serde_json::from_str(&eval(&["--chat-template", &path("mine.jinja")])?)?;
    let tokenizer = dylora::data::Tokenizer::load(format!("{DEMO}/tokenizer.json").as_ref())?;
    assert_eq!(report["domains"][0]["label_tokens"], tokenizer.encode("() {}\n")?.len());
    let error = eval(&[]).expect_err("the demo's base has no template").to_string();
    let expected = format!(
        "in `{}:1`:\nthe record has `messages`, but the base `{DEMO}` has no chat template\nhint: ",
        path("a.jsonl")
    );
    assert!(error.contains(&expected), "{error}");
    Ok(())
}
