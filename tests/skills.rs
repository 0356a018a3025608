//! The embeddings of domains, and when a skill counts as known.

#[path = "common/mod.rs"]
mod common;

use std::path::Path;

use anyhow::Result;
use dylora::config::{LossOn, Mixing, OnBadRecord, OnExhausted};
use dylora::data::{
    ChatOptions, DataOptions, DomainFiles, MemoryDocument, MemoryDomain, TokenDataset, Tokenizer,
    load_files,
};
use dylora::growth::skills::{
    Similarity, Skill, SkillCenter, SkillComparison, SkillLibrary, SkillRule, embed,
};
use dylora::model::families;
use dylora::model::{ForwardMode, RoutedModel, RoutingSource};
use tch::{Device, Kind};

use crate::common::{plain_router, rows, seed, tiny_lora, tiny_model};

/// Two domains of documents, most of which have prompts, in blocks of 8 positions.
fn dataset() -> TokenDataset {
    let document = |n: u32| MemoryDocument {
        tokens: (0..3 + n % 5).map(|i| (7 * n + 3 * i) % 61).collect(),
        prompt_len: n % 3,
        expert: None,
    };
    let domain = |name: &str, range: std::ops::Range<u32>| MemoryDomain {
        name: name.into(),
        weight: 1.0,
        documents: range.map(document).collect(),
    };
    let domains = vec![domain("first", 0..5), domain("second", 5..29)];
    TokenDataset::in_memory(8, LossOn::Completion, domains)
}

/// Reference: forward passes over single documents without packing, summed label by label.
#[test]
fn an_embedding_is_the_mean_of_the_bases_hidden_states_at_labels() -> Result<()> {
    let _generator = seed(320);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let (mut sum, mut count) = (vec![0.0; 16], 0);
    for n in 5..29_u32 {
        let tokens: Vec<i64> = (0..3 + n % 5).map(|i| i64::from((7 * n + 3 * i) % 61)).collect();
        let inputs = rows(&[&tokens[..tokens.len() - 1]]);
        let output = model.forward(&inputs, &RoutingSource::Base, ForwardMode::EVAL, None);
        let first_label = (n % 3).saturating_sub(1) as usize;
        for position in first_label..tokens.len() - 1 {
            for (dimension, sum) in sum.iter_mut().enumerate() {
                *sum += output.hidden.double_value(&[0, position as i64, dimension as i64]);
            }
            count += 1;
        }
    }
    for batch_size in [1, 3, 100] {
        let embedding = embed(&model, &dataset(), 1, batch_size, None)?;
        assert_eq!(embedding.label_tokens, count);
        for (found, sum) in embedding.mean.iter().zip(&sum) {
            assert!((found - sum / count as f64).abs() < 1e-12);
        }
    }
    Ok(())
}

#[test]
fn fewer_blocks_are_spread_over_the_domain() -> Result<()> {
    let _generator = seed(321);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Double)?;
    let dataset = dataset();
    let num_blocks = dataset.domains[1].num_blocks();
    assert!(num_blocks >= 10);
    let label_tokens =
        |max| Ok::<_, anyhow::Error>(embed(&model, &dataset, 1, 2, max)?.label_tokens);
    let order: Vec<_> = dataset.eval_order().into_iter().filter(|id| id.domain == 1).collect();
    let of = |blocks: &[usize]| blocks.iter().map(|&i| dataset.label_tokens(order[i])).sum::<u64>();
    assert_eq!(label_tokens(Some(1))?, of(&[num_blocks / 2]));
    assert_eq!(label_tokens(Some(2))?, of(&[num_blocks / 4, 3 * num_blocks / 4]));
    assert_eq!(label_tokens(Some(num_blocks))?, label_tokens(None)?);
    assert_eq!(label_tokens(Some(1000))?, label_tokens(None)?);
    let error = embed(&model, &dataset, 1, 2, Some(0)).unwrap_err().to_string();
    assert_eq!(error, "`second` has no label token to embed");
    Ok(())
}

fn skill(name: &str, embedding: [f64; 2], expert: usize) -> Skill {
    Skill { name: name.into(), embedding: embedding.into(), label_tokens: 9, expert: Some(expert) }
}

/// Skills at angles of 0, 60 and 90 degrees around the center (1, 1).
fn library() -> SkillLibrary {
    let (cos, sin) = (0.5, 0.75_f64.sqrt());
    let mut library = SkillLibrary::new(vec![1.0, 1.0]);
    library.skills.push(skill("up", [1.0, 4.0], 0));
    library.skills.push(skill("right", [3.0, 1.0], 1));
    library.skills.push(skill("between", [1.0 + cos, 1.0 + sin], 1));
    library
}

#[test]
fn cosines_are_taken_around_the_center_the_largest_first() {
    let found = library().compare(&[2.0, 1.0]);
    let expected = [("right", 1, 1.0), ("between", 1, 0.5), ("up", 0, 0.0)];
    assert_eq!(found.len(), expected.len());
    for (Similarity { name, expert, cosine }, expected) in found.iter().zip(expected) {
        assert_eq!((name.as_str(), *expert), (expected.0, Some(expected.1)));
        assert!((cosine - expected.2).abs() < 1e-15, "{name}: {cosine}");
    }
    assert!(library().compare(&[1.0, 1.0]).iter().all(|similarity| similarity.cosine == 0.0));
}

#[test]
fn a_skill_is_known_by_its_largest_or_by_its_median_cosine() {
    let mut library = library();
    let known = |library: &SkillLibrary, threshold, by| {
        let rule = SkillRule { threshold, by };
        library.known(&[2.0, 1.0], rule).map(|skill| skill.name.clone())
    };
    let right = Some("right".to_owned());
    assert_eq!(known(&library, 1.0, SkillComparison::Max), right);
    assert_eq!(known(&library, 1.001, SkillComparison::Max), None);
    assert_eq!(known(&library, 0.49, SkillComparison::Median), right);
    assert_eq!(known(&library, 0.51, SkillComparison::Median), None);
    library.skills.push(skill("down", [1.0, 0.0], 2));
    // the median of four cosines is the mean of the middle two, 0.5 and 0
    assert_eq!(known(&library, 0.2499, SkillComparison::Median), right);
    assert_eq!(known(&library, 0.2501, SkillComparison::Median), None);
    let empty = SkillLibrary::new(vec![1.0, 1.0]);
    assert_eq!(known(&empty, -1.0, SkillComparison::Max), None);
    assert_eq!(known(&empty, -1.0, SkillComparison::Median), None);
}

#[test]
fn a_library_is_read_as_it_was_written() -> Result<()> {
    let _generator = seed(322);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Float)?;
    let mut library = SkillLibrary::new(SkillCenter::OwnText.of(&model)?);
    for (domain, expert) in [(0, Some(2)), (1, None)] {
        let embedding = embed(&model, &dataset(), domain, 4, None)?;
        let name = dataset().domains[domain].name.clone();
        let label_tokens = embedding.label_tokens;
        library.skills.push(Skill { name, embedding: embedding.mean, label_tokens, expert });
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("skills.json");
    library.write(&file)?;
    assert_eq!(SkillLibrary::read(&file, 16)?, library);
    let error = format!("{:#}", SkillLibrary::read(&file, 32).unwrap_err());
    assert!(error.ends_with("has embeddings of width 16, the base has 32"), "{error}");
    Ok(())
}

/// The center depends only on the base, not on the state of libtorch's generator or the experts.
#[test]
fn the_center_is_the_same_each_time() -> Result<()> {
    let _generator = seed(323);
    let model = tiny_model(&tiny_lora(), &plain_router(), Kind::Float)?;
    let center = SkillCenter::OwnText.of(&model)?;
    tch::manual_seed(1);
    let plain = RoutedModel::plain(model.base(), Device::Cpu, Kind::Float, false);
    assert_eq!(SkillCenter::OwnText.of(&plain)?, center);
    assert_eq!(SkillCenter::Origin.of(&plain)?, [0.0; 16]);
    Ok(())
}

/// On 8 blocks of each of the demo's four domains, validation text is most similar to the training
/// text of its own domain. Without a center, the cosines of other domains are larger.
#[test]
fn the_demos_skills_are_distinguished() -> Result<()> {
    let _generator = seed(324);
    let dir = Path::new("demo/base");
    let config = families::read_spec(&dir.join("config.json"))?;
    let base = families::load::read(&config, &[dir.join("model.safetensors")], Kind::Float)?;
    let model = RoutedModel::plain(&base, Device::Cpu, Kind::Float, false);
    let tokenizer = Tokenizer::load(&dir.join("tokenizer.json"))?;
    let options = DataOptions {
        seq_len: 128,
        loss_on: LossOn::Completion,
        chat: ChatOptions::default(),
        on_bad_record: OnBadRecord::Fail,
        seed: 0,
        eos_token_id: config.eos_token_id(),
        cache_dir: None,
        mixing: Mixing::default(),
        on_exhausted: OnExhausted::default(),
    };
    let names = ["arithmetic", "code", "data2text", "verse"];
    let embeddings = |side: &str| -> Result<Vec<Vec<f64>>> {
        let files = names.map(|name| DomainFiles {
            name: Some(name.into()),
            files: vec![format!("demo/data/{name}.{side}.jsonl")],
            ..DomainFiles::default()
        });
        let dataset = load_files(&files, &options, &tokenizer, &|_| {})?;
        let all = 0..names.len();
        all.map(|domain| Ok(embed(&model, &dataset, domain, 8, Some(8))?.mean)).collect()
    };
    let (train, validation) = (embeddings("train")?, embeddings("validation")?);
    for (center, limit) in [(SkillCenter::OwnText, 0.6), (SkillCenter::Origin, 0.75)] {
        let mut library = SkillLibrary::new(center.of(&model)?);
        for (expert, (name, embedding)) in names.iter().zip(&train).enumerate() {
            let (name, embedding) = ((*name).into(), embedding.clone());
            library.skills.push(Skill { name, embedding, label_tokens: 1, expert: Some(expert) });
        }
        for (name, embedding) in names.iter().zip(&validation) {
            let found = library.compare(embedding);
            println!("{center:?}, {name}: {found:?}");
            let known = library.known(embedding, SkillRule::default());
            assert_eq!(known.map(|skill| skill.name.as_str()), Some(*name));
            assert!(found[0].cosine > 0.98 && found[1].cosine < limit, "{found:?}");
        }
    }
    Ok(())
}
