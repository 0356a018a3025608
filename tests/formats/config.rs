//! The keys of a domain that say what its records are.

use anyhow::Result;
use dylora::config::{Config, HubDataset, RecordShape, RecordStyle, Validation, load};

use crate::Files;

fn config(domain: &str) -> Result<Config> {
    let text = format!(
        "base.source = {{ path = \"base\" }}\ndata.seq_len = 64\n[[data.domains]]\n\
         name = \"a\"\n{domain}\n"
    );
    let files = Files::new(&[("a.toml", text.as_bytes())]);
    load::load(&files.path("a.toml"), &[])
}

#[test]
fn a_saved_config_keeps_what_a_domain_says_of_its_records() -> Result<()> {
    let config = config(
        "hub = { dataset = \"o/d\", config = \"main\" }\nshape = \"alpaca\"\nstyle = \"chat\"\n\
         format = \"csv\"\nfields = { output = \"answer\" }\n\
         template = { prompt = \"{instruction}\\n\" }\n\
         validation = { hub = { dataset = \"o/d\", split = \"test\", revision = \"v1\" } }",
    )?;
    let domain = &config.data.domains[0];
    let records = domain.records();
    assert_eq!((records.shape, records.style), (Some(RecordShape::Alpaca), RecordStyle::Chat));
    assert_eq!(records.fields.output.as_deref(), Some("answer"));
    let test = HubDataset {
        dataset: "o/d".into(),
        split: "test".into(),
        config: None,
        revision: "v1".into(),
    };
    assert_eq!(test.to_string(), "o/d@v1 test");
    assert_eq!(domain.validation, Some(Validation::Hub(test)));
    assert_eq!(domain.hub.as_ref().map(ToString::to_string).as_deref(), Some("o/d main train"));
    let saved = load::to_toml(&config);
    let files = Files::new(&[("a.toml", saved.as_bytes())]);
    assert_eq!(load::load(&files.path("a.toml"), &[])?, config);
    Ok(())
}

#[test]
fn keys_that_contradict_each_other_are_faults_of_the_config() {
    let both = "train = [\"a.csv\"]\n";
    for (domain, fault) in [
        ("", "`data.domains[0].train` must name at least one file, unless there is `hub`"),
        (
            &*format!("{both}hub = {{ dataset = \"o/d\" }}"),
            "`data.domains[0].hub` does not go with `train`; leave one of the two out",
        ),
        (
            &*format!("{both}fields = {{ text = \"a\", prompt = \"b\" }}"),
            "`data.domains[0].fields` must name keys of one shape, got `text` and `prompt`",
        ),
        (
            &*format!("{both}shape = \"text\"\nfields = {{ prompt = \"b\" }}"),
            "`data.domains[0].fields` names keys of `prompt_completion`, but `shape` is `text`",
        ),
        (
            &*format!("{both}template = {{ prompt = \"{{question}}\" }}"),
            "`data.domains[0].template.prompt` has no value for `{question}`",
        ),
        (
            &*format!("{both}fields = {{ promt = \"b\" }}"),
            "did you mean `data.domains[0].fields.prompt`?",
        ),
    ] {
        let error = format!("{:#}", config(domain).expect_err("a faulty config"));
        assert!(error.contains(fault), "{error}");
    }
}
