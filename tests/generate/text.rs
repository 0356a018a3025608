//! Tokens become text piece by piece.

use std::path::Path;

use anyhow::Result;
use dylora::data::Tokenizer;
use dylora::generate::TextStream;

fn tokenizer() -> Result<Tokenizer> {
    Tokenizer::load(Path::new("demo/base/tokenizer.json"))
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>> {
    Ok(tokenizer.encode(text)?.into_iter().map(i64::from).collect())
}

/// Returns the pieces of a text whose tokens arrive one by one, until it stops.
fn pieces(text: &str, stop: &[&str]) -> Result<(Vec<String>, bool)> {
    let tokenizer = tokenizer()?;
    let stop: Vec<String> = stop.iter().map(|&stop| stop.to_owned()).collect();
    let mut stream = TextStream::new(&tokenizer, &[], &stop);
    let mut pieces = vec![];
    for id in ids(&tokenizer, text)? {
        pieces.push(stream.push(id)?.to_owned());
        if stream.has_stopped() {
            return Ok((pieces, true));
        }
    }
    pieces.push(stream.finish()?.to_owned());
    assert_eq!(pieces.concat(), stream.text());
    Ok((pieces, false))
}

#[test]
fn the_pieces_are_the_text_and_each_is_whole_characters() -> Result<()> {
    for text in ["The cat.\nIt sleeps.", "a naïve café — 日本語 🦀🦀 end", "🦀", ""] {
        let (pieces, stopped) = pieces(text, &["never"])?;
        assert_eq!(pieces.concat(), text);
        assert!(!stopped);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')), "{pieces:?}");
    }
    Ok(())
}

#[test]
fn a_text_ends_before_the_first_stop_string() -> Result<()> {
    let text = "one two three\n\nfour";
    let cases: [(&[&str], &str); 5] = [
        (&["\n\n"], "one two three"),
        (&["three", "two"], "one "),
        (&["three\n\nf"], "one two "),
        (&["o"], ""),
        (&["thrice", "tw0"], text),
    ];
    for (stop, expected) in cases {
        let (pieces, stopped) = pieces(text, stop)?;
        assert_eq!(pieces.concat(), expected, "{stop:?}");
        assert_eq!(stopped, expected != text, "{stop:?}");
    }
    Ok(())
}

#[test]
fn bytes_that_are_no_text_come_at_the_end() -> Result<()> {
    let tokenizer = tokenizer()?;
    let crab = ids(&tokenizer, "x🦀")?;
    let mut stream = TextStream::new(&tokenizer, &[], &[]);
    let mut text = String::new();
    for id in &crab[..crab.len() - 1] {
        text += stream.push(*id)?;
    }
    assert_eq!(text, "x");
    assert!(stream.finish()?.starts_with('\u{FFFD}'));
    Ok(())
}

#[test]
fn special_tokens_are_left_out() -> Result<()> {
    let tokenizer = tokenizer()?;
    let end = tokenizer.token_to_id("<|endoftext|>").map(i64::from);
    let mut stream = TextStream::new(&tokenizer, &[], &[]);
    let mut text = stream.push(ids(&tokenizer, "a")?[0])?.to_owned();
    text += stream.push(end.expect("the demo has it"))?;
    text += stream.finish()?;
    assert_eq!(text, "a");
    Ok(())
}

#[test]
fn a_text_keeps_its_first_space_with_every_kind_of_tokenizer() -> Result<()> {
    for kind in ["llama2", "mistral", "llama3", "qwen", "smollm"] {
        let file = format!("tests/golden/tokenizers/{kind}.tokenizer.json");
        let tokenizer = Tokenizer::load(Path::new(&file))?;
        let whole = "The cat sat on a naïve mat, 🦀 and\n  more";
        let all = ids(&tokenizer, whole)?;
        for cut in 1..all.len() {
            let (prompt, new) = all.split_at(cut);
            let mut stream = TextStream::new(&tokenizer, prompt, &[]);
            for id in new {
                stream.push(*id)?;
            }
            stream.finish()?;
            let as_u32: Vec<u32> = prompt.iter().map(|id| *id as u32).collect();
            let before = tokenizer.decode_text(&as_u32)?;
            // a character that the cut divides belongs to neither text
            let expected = whole.strip_prefix(before.trim_end_matches('\u{FFFD}'));
            let expected = expected.unwrap_or_else(|| panic!("{kind}: {before:?}"));
            if !before.ends_with('\u{FFFD}') {
                assert_eq!(stream.text(), expected, "{kind}, cut at {cut}");
            }
        }
    }
    Ok(())
}
