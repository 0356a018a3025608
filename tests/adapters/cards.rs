//! Model cards: what they say to the Hub and to people. The Hub's own library reads them in
//! `scripts/check_peft.py`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use dylora::base::Base;
use dylora::config::{BaseConfig, BaseSource, Dtype, RouterConfig, RoutingChoice, SaveDtype};
use dylora::durable::output::Output;
use dylora::export::card::{Form, Origin, of_base};
use dylora::export::gguf;
use dylora::export::peft::{Layout, Provenance, export};
use dylora::export::training::{DomainTraining, Training};
use dylora::hub::HubSettings;
use dylora::model::RoutedModel;
use tch::Kind;

use crate::common::{plain_router, seed, tiny_base, tiny_config, tiny_model};
use crate::shared::model;
use crate::{lora, provenance};

fn training() -> Training {
    let domain = |name: &str, blocks, loss| DomainTraining {
        name: name.into(),
        blocks,
        loss,
        experts: vec![],
    };
    Training {
        step: 12,
        target_tokens: 2616,
        seq_len: 64,
        domains: vec![domain("law", 16, Some(0.5)), domain("code", 32, None)],
        loss: Some(0.5),
        supervision: 0.1,
    }
}

/// The card of an export of `model`, and that of its first expert.
fn cards(model: &RoutedModel, told: &Provenance, layout: Option<Layout>) -> Result<[String; 2]> {
    let dir = tempfile::tempdir()?;
    let out = Output::new(&dir.path().join("out"));
    match layout {
        Some(layout) => export(&out, model, told, layout)?,
        None => gguf::export_experts(&out, model, told, SaveDtype::F32)?,
    }
    let read = |file: &str| fs_err::read_to_string(out.path.join(file)).unwrap_or_default();
    Ok(["README.md", "expert_0/README.md"].map(read))
}

/// The simple values of a card's front matter.
fn head(card: &str) -> Result<BTreeMap<&str, &str>> {
    let rest = card.strip_prefix("---\n").context("it begins with its front matter")?;
    let (head, _) = rest.split_once("\n---\n").context("the front matter ends")?;
    Ok(head.lines().filter_map(|line| line.split_once(": ")).collect())
}

#[test]
fn a_card_says_base_data_scores_routing_and_licence() -> Result<()> {
    let _generator = seed(730);
    let model = tiny_model(&lora("num_experts = 3"), &plain_router(), Kind::Float)?;
    let origin = Origin {
        base_label: "org/tiny@main".into(),
        base_repo: Some("org/tiny".into()),
        licence: Some("apache-2.0".into()),
        training: Some(training()),
    };
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("out");
    let told = Provenance { origin, ..provenance() };
    export(&Output::new(&out), &model, &told, Layout::Dylora)?;
    let card = fs_err::read_to_string(out.join("README.md"))?;
    let head = head(&card)?;
    assert_eq!(head["base_model"], "\"org/tiny\"");
    assert_eq!(head["base_model_relation"], "adapter");
    assert_eq!(head["library_name"], "peft");
    assert_eq!(head["license"], "\"apache-2.0\"");
    for words in [
        "on `org/tiny@main`",
        "Trained for 12 steps on 2616 target tokens, in blocks of 64 tokens",
        "| `law` | 16 | 0.5000 | 1.65 |",
        "| `code` | 32 | not measured |  |",
        "supervised it, with the factor 0.1",
        "load_mixture(\"FOLDER\", \"org/tiny\")",
        "The base's licence is `apache-2.0`.",
    ] {
        assert!(card.contains(words), "no `{words}` in\n{card}");
    }
    // the scores of the mixture are not those of one expert
    let card = fs_err::read_to_string(out.join("expert_0/README.md"))?;
    assert!(!card.contains("0.5000") && card.contains("one expert at weight 1"), "{card}");
    let program = fs_err::read_to_string(out.join("dylora_peft.py"))?;
    assert_eq!(program, fs_err::read_to_string("src/export/dylora_peft.py")?);
    Ok(())
}

#[test]
fn a_card_says_what_its_files_lack_and_shows_names_as_they_are() -> Result<()> {
    let _generator = seed(731);
    let lora = lora("num_experts = 3\nshared_rank = 2");
    let model = model(&tiny_base(tiny_config()), &lora, &plain_router(), Kind::Float)?;
    let mut trained = training();
    trained.domains[0].experts = vec![0];
    trained.domains[1].name = "`a` [b](c)|\u{202e}\u{1b}[31m".into();
    let origin = Origin { training: Some(trained), ..provenance().origin };
    let told = Provenance { origin, ..provenance() };
    let [card, expert] = cards(&model, &told, Some(Layout::Dylora))?;
    assert!(card.contains("- `expert_0`, the expert of `law`: rank"), "{card}");
    assert!(expert.contains("mixture on `gpt2_tied`, the expert of `law`, by dylora"), "{expert}");
    assert!(expert.contains("It was trained beside `shared`"), "{expert}");
    assert!(card.contains("`law`, `` `a` [b](c)|[U+202E]␛[31m ``\n"), "{card}");
    assert!(card.contains("| `` `a` [b](c)\\|[U+202E]␛[31m `` | 32 |"), "{card}");
    assert!(!card.contains("llama.cpp") && !card.contains("expert:0"), "{card}");
    // llama.cpp has no routing
    let [card, _] = cards(&model, &told, None)?;
    assert!(card.contains("--lora expert_0.gguf --lora shared.gguf\n"), "{card}");
    assert!(card.contains("the mixture with its routing, which these files do not have"), "{card}");
    // the weights in training came from what a text alone does not say
    let told = Provenance { routing: RoutingChoice::Domain, ..told };
    let [card, _] = cards(&model, &told, Some(Layout::Dylora))?;
    assert!(card.contains("load_mixture(\"FOLDER\", \"BASE\", routing=\"expert:0\")"), "{card}");
    assert!(card.contains("--adapters FOLDER --routing expert:0 --prompt"), "{card}");
    Ok(())
}

#[test]
fn the_card_of_one_expert_is_no_card_of_a_mixture() -> Result<()> {
    let _generator = seed(732);
    let model = tiny_model(&lora("num_experts = 1"), &plain_router(), Kind::Float)?;
    let [card, expert] = cards(&model, &provenance(), Some(Layout::Dylora))?;
    assert!(card.contains("# A LoRA adapter\n\nBy dylora"), "{card}");
    assert!(card.contains("There is one expert and no router: plain LoRA."), "{card}");
    assert!(!expert.contains("`shared`"), "{expert}");
    Ok(())
}

#[test]
fn a_card_says_what_becomes_of_the_weights_of_the_best_experts() -> Result<()> {
    let _generator = seed(733);
    for (renormalize, words) in [(true, "divided by their sum"), (false, "not divided by")] {
        let router = RouterConfig { top_k: Some(2), renormalize, ..plain_router() };
        let model = tiny_model(&lora("num_experts = 3"), &router, Kind::Float)?;
        let [card, _] = cards(&model, &provenance(), Some(Layout::Dylora))?;
        let words = format!("; the 2 largest are kept and {words}");
        assert!(card.contains(&words), "{card}");
    }
    Ok(())
}

/// The demo's base in a folder of this test, with what its `config.json` says of its repository.
fn base_in(dir: &Path, name: Option<&str>) -> Result<Base> {
    fs_err::create_dir_all(dir)?;
    for file in ["model.safetensors", "tokenizer.json"] {
        fs_err::copy(Path::new("demo/base").join(file), dir.join(file))?;
    }
    let mut config: serde_json::Value =
        serde_json::from_str(&fs_err::read_to_string("demo/base/config.json")?)?;
    if let Some(name) = name {
        config["_name_or_path"] = name.into();
    }
    fs_err::write(dir.join("config.json"), config.to_string())?;
    let source = BaseSource::Path(dir.to_owned());
    let config = BaseConfig { source, tokenizer: None, chat_template: None, dtype: Dtype::F32 };
    Base::open(&config, &HubSettings::offline("absent"), &())
}

#[test]
fn a_base_in_a_folder_is_named_by_its_repository_or_not_at_all() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (folder, name, repo) in [
        ("a", None, None),
        ("b", Some("org/tiny"), Some("org/tiny")),
        ("c", Some("/home/me/models/tiny"), None),
        ("d", Some("models/"), None),
        ("models--org--cached/snapshots/0", None, Some("org/cached")),
    ] {
        let base = base_in(&dir.path().join(folder), name)?;
        assert_eq!(base.repo().as_deref(), repo, "{folder}");
        let origin = Origin::new(&base, None);
        let card = of_base(&origin, Form::HuggingFace);
        assert!(!card.contains(&dir.path().display().to_string()), "{card}");
        assert_eq!(head(&card)?.contains_key("base_model"), repo.is_some(), "{card}");
        assert!(card.contains(&format!("# {}", repo.unwrap_or("a local model"))), "{card}");
    }
    Ok(())
}

#[test]
fn the_licence_beside_a_base_is_known_by_its_words() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for (text, licence) in [
        ("  Apache License\n     Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nPermission is hereby granted, free of charge, to any\nperson", "mit"),
        ("All rights reserved.", "other"),
    ] {
        fs_err::create_dir_all(dir.path())?;
        fs_err::write(dir.path().join("LICENSE"), text)?;
        assert_eq!(base_in(dir.path(), None)?.licence().as_deref(), Some(licence));
    }
    fs_err::remove_file(dir.path().join("LICENSE"))?;
    assert_eq!(base_in(dir.path(), None)?.licence(), None);
    Ok(())
}
