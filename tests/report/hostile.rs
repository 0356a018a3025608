//! Names and texts that try to break the page.

use anyhow::Result;
use dylora::report::Sample;
use dylora::report::samples::{Answer, RoutedToken};

use crate::{Scene, page_of};

const NAMES: [&str; 2] = [
    "</script></style></svg><img src=x onerror=alert(1)>",
    "\"' onload=alert(1) x='\u{202e}gnp\u{2069}\u{1b}[31m\0",
];

fn sample(text: &str) -> Sample {
    let token = |text: &str| RoutedToken { text: text.to_owned(), weights: vec![0.25, 0.75] };
    let answer = || Answer { tokens: vec![token(text), token("\n\tend")], is_cut: true };
    Sample {
        domain: text.into(),
        prompt: text.into(),
        reference: text.into(),
        before: answer(),
        after: answer(),
    }
}

#[test]
fn foreign_text_stays_text() -> Result<()> {
    let scene = Scene::new()?;
    let run = scene.run("run", NAMES, 4, 0.0)?;
    let html = page_of(&[run], NAMES.map(sample).into())?;
    for name in ["<img", "</script", "<script", "\" onload"] {
        assert!(!html.contains(name), "{name}");
    }
    assert_eq!(html.matches("</style>").count(), 1);
    assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    let is_hidden = |c: &char| {
        (c.is_control() && *c != '\n' && *c != '\t')
            || ('\u{202a}'..='\u{202e}').contains(c)
            || ('\u{2060}'..='\u{2069}').contains(c)
    };
    assert_eq!(html.chars().find(is_hidden), None);
    assert!(html.contains("[U+202E]gnp[U+2069]␛[31m␀"));
    assert!(html.contains("&lt;/script&gt;"));
    // the policy of the page forbids what escapes all the same
    assert!(html.contains(r#"content="default-src 'none'; style-src 'unsafe-inline'"#));
    Ok(())
}

#[test]
fn a_strip_has_the_number_and_the_weights_of_each_token() -> Result<()> {
    let scene = Scene::new()?;
    let run = scene.run("run", ["law", "code"], 4, 0.0)?;
    let html = page_of(&[run], vec![sample("x & y")])?;
    let token = r#"<span class="token x1" title="0: 0.250  1: 0.750">x &amp; y<sub>1</sub></span>"#;
    assert!(html.contains(token), "{html}");
    assert!(html.contains("⏎\tend<sub>1</sub></span><br>"));
    Ok(())
}
