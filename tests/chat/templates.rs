//! Where templates come from, what they can do, and which turns they show.

use anyhow::Result;
use dylora::chat_template::ChatTemplate;
use dylora::config::LossOnTurns;
use dylora::config::LossOnTurns::{All, Last};
use jiff::civil::date;
use serde_json::json;

use crate::{BaseFolder, conversation, golden_dir, messages, template};

/// The text that a folder's template makes of a conversation with or without tools.
fn rendered(files: &[(&str, &str)], has_tools: bool) -> Result<String> {
    let mut chat = messages(&[("user", "Hi")]);
    chat.tools = has_tools.then(Vec::new);
    Ok(BaseFolder::new(files).template()?.render(&chat, false)?.text)
}

#[test]
fn template_files_override_the_tokenizer_config() -> Result<()> {
    let config =
        ("tokenizer_config.json", r#"{"chat_template": "config {{ eos_token }}", "x": 1}"#);
    assert_eq!(rendered(&[config], true)?, "config ");
    let jinja = ("chat_template.jinja", "jinja\n");
    assert_eq!(rendered(&[config, jinja], true)?, "jinja");
    let tools = ("additional_chat_templates/tool_use.jinja", "tools");
    assert_eq!(rendered(&[config, jinja, tools], true)?, "tools");
    assert_eq!(rendered(&[config, jinja, tools], false)?, "jinja");
    Ok(())
}

#[test]
fn a_list_has_named_templates() -> Result<()> {
    let list = json!({"chat_template": [
        {"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "{% broken"}
    ]});
    let error = rendered(&[("tokenizer_config.json", &list.to_string())], false);
    let error = format!("{:#}", error.expect_err("one is broken"));
    assert!(error.starts_with("line 1 of the `chat_template` named `rag` in `"), "{error}");
    let list = list.to_string().replace("{% broken", "rag");
    assert_eq!(rendered(&[("tokenizer_config.json", &list)], false)?, "default");
    assert_eq!(rendered(&[("tokenizer_config.json", &list)], true)?, "tools");
    let only = [("additional_chat_templates/rag.jinja", "rag")];
    let error = rendered(&only, true).expect_err("there is no default").to_string();
    assert_eq!(error, "none of the chat templates `rag` is called `default`");
    Ok(())
}

#[test]
fn a_base_may_have_no_template() -> Result<()> {
    for files in [vec![], vec![("tokenizer_config.json", r#"{"chat_template": null}"#)]] {
        assert!(ChatTemplate::find(&BaseFolder::new(&files).files())?.is_none());
    }
    Ok(())
}

/// Reference: `special_tokens_map` in transformers 5.17.
#[test]
fn special_tokens_are_strings_or_objects() -> Result<()> {
    let text =
        "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ audio_token }}|{{ pad_token }}";
    let config = json!({
        "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
        "image_token": "<image>", "pad_token": null, "add_bos_token": true,
        "extra_special_tokens": {"audio_token": "<audio>"}
    });
    let config = config.to_string();
    let files = [("chat_template.jinja", text), ("tokenizer_config.json", &config)];
    assert_eq!(rendered(&files, false)?, "<s>|</s>|<image>|<audio>|");
    // the older file counts unless the other lists all added tokens
    let map = ("special_tokens_map.json", r#"{"pad_token": "<pad>", "eos_token": "<end>"}"#);
    assert_eq!(rendered(&[files[0], files[1], map], false)?, "<s>|<end>|<image>|<audio>|<pad>");
    let config = config.replacen('{', r#"{"added_tokens_decoder": {}, "#, 1);
    let files = [files[0], ("tokenizer_config.json", &config), map];
    assert_eq!(rendered(&files, false)?, "<s>|</s>|<image>|<audio>|");
    Ok(())
}

#[test]
fn variables_override_special_tokens() -> Result<()> {
    let mut chat = messages(&[("user", "Hi")]);
    let text = "{{ eos_token }} {{ enable_thinking }} {{ documents }} {{ tools }}";
    let files = [("chat_template.jinja", text), ("tokenizer_config.json", r#"{"eos_token": "a"}"#)];
    let template = BaseFolder::new(&files).template()?;
    assert_eq!(template.render(&chat, false)?.text, "a  None None");
    chat.variables = json!({"eos_token": "b", "enable_thinking": false, "documents": [1]})
        .as_object()
        .cloned()
        .expect("an object");
    assert_eq!(template.render(&chat, false)?.text, "b False [1] None");
    Ok(())
}

#[test]
fn the_time_is_given_or_fixed() -> Result<()> {
    let mut chat = messages(&[("user", "Hi")]);
    let template = template(r#"{{ strftime_now("%d %b %Y, %-d %B %y %H:%M") }}"#)?;
    assert_eq!(template.render(&chat, false)?.text, "26 Jul 2024, 26 July 24 00:00");
    chat.now = Some(date(2026, 1, 5).at(13, 7, 0, 0));
    assert_eq!(template.render(&chat, false)?.text, "05 Jan 2026, 5 January 26 13:07");
    Ok(())
}

/// Reference: Jinja2 3.1.6 with transformers' settings.
#[test]
fn templates_are_jinja_with_pythons_methods() -> Result<()> {
    for (text, expected) in [
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}\
             {% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
        ("a\r\n{% set x = 1 %}\r\nb", "a\nb"),
        (
            "{{ '\u{1c} a \u{85}'.strip() }}|{{ '\u{1c}a' | trim }}|{{ 'xaxx'.rstrip('x') }}",
            "a|a|xa",
        ),
        (
            "{{ 'a.b.c'.rsplit('.', 1) }}{{ 'abc'.removeprefix('a').removesuffix('c') }}",
            "['a.b', 'c']b",
        ),
        (
            "{{ 'abc'[::-1] }}{{ [1, 2, 3][-2:] }}{{ {'a': none, 'b': [true, 1.0]} }}",
            "cba[2, 3]{'a': None, 'b': [True, 1.0]}",
        ),
        (
            "{{ 1e16 }} {{ 1e-5 }} {{ 2.0 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 / 2 }}",
            "1e+16 1e-05 2.0 3 -4 3.5",
        ),
        (
            "{{ none is iterable }}{{ 'a' is sequence }}{{ {} is sequence }}{{ 1 is sequence }}",
            "FalseTrueTrueFalse",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}\
             {% endfor %}{{ ns.n }}",
            "3",
        ),
        (
            "{% macro m(x, y='b') %}{{ x }}{{ y }}{% endmacro %}{{ m('a') }}{{ m(y='c', x=1) }}",
            "ab1c",
        ),
        ("{{ \"a\\\nb\\/\" }}{{ '\\x41\\u00e9\\101' }}", "ab\\/AéA"),
        (
            "{{ '<&>' }}{{ ['é<'] | tojson }}{{ missing }}{{ missing is defined }}",
            "<&>[\"é<\"]False",
        ),
    ] {
        assert_eq!(template(text)?.render(&messages(&[]), false)?.text, expected, "{text}");
    }
    Ok(())
}

#[test]
fn marks_keep_the_white_space_and_the_scope_of_blocks() -> Result<()> {
    let text = "a\n  {% generation %}\n  b{% set x = 1 %}\n  {% endgeneration %}\nc{{ x }}\
                d {%- generation -%} e {%- endgeneration +%}\nf";
    let rendered = template(text)?.render(&messages(&[]), false)?;
    assert_eq!(rendered.text, "a\n  bcde\nf");
    let marked = rendered.generated.iter().map(|range| &rendered.text[range.clone()]);
    assert_eq!(marked.collect::<Vec<_>>(), ["  b", "e"]);
    Ok(())
}

/// The assistant's turns that a golden template shows, and the text in front of the first.
fn turns(
    name: &str,
    chat: &serde_json::Value,
    which: LossOnTurns,
) -> Result<(String, Vec<String>)> {
    let text = fs_err::read_to_string(golden_dir().join(format!("{name}.jinja")))?;
    turns_of(&text, chat, which)
}

fn turns_of(
    text: &str,
    chat: &serde_json::Value,
    which: LossOnTurns,
) -> Result<(String, Vec<String>)> {
    let found = template(text)?.assistant_turns(&conversation(chat), which)?;
    let turns = found.turns.iter().map(|range| found.text[range.clone()].to_owned()).collect();
    Ok((found.text[..found.prompt_end].to_owned(), turns))
}

#[test]
fn turns_of_qwen3_are_what_its_text_shows_of_them() -> Result<()> {
    let chat = json!({"messages": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n<4>"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
        {"role": "user", "content": "Thanks."}
    ]});
    let prompt = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n";
    let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call><|im_end|>\n";
    let expected = ["<4><|im_end|>\n", call, "It is 5.<|im_end|>\n"].map(str::to_owned);
    assert_eq!(turns("qwen3", &chat, All)?, (prompt.to_owned(), expected.to_vec()));
    assert_eq!(turns("qwen3", &chat, Last)?, (prompt.to_owned(), expected[2..].to_vec()));
    let mut quick = chat.clone();
    quick["messages"].as_array_mut().expect("a list").truncate(4);
    quick["variables"] = json!({"enable_thinking": false});
    let (_, found) = turns("qwen3", &quick, All)?;
    assert_eq!(found, [expected[0].as_str(), call]);
    // without the variable, the empty thinking is for the model to write
    quick["variables"] = json!({});
    let (_, found) = turns("qwen3", &quick, All)?;
    assert_eq!(found[1], format!("<think>\n\n</think>\n\n{call}"));
    Ok(())
}

#[test]
fn marks_say_what_the_last_turn_is() -> Result<()> {
    let chat = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"}
    ]});
    let (prompt, all) = turns("chatml_marked", &chat, All)?;
    assert_eq!(prompt, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(all, ["b<|im_end|>\n", "d<|im_end|>\n"]);
    assert_eq!(turns("chatml_marked", &chat, Last)?, (prompt, vec![all[1].clone()]));
    Ok(())
}

/// Mistral's templates show the tools in front of the last question, and a call of a tool without
/// its content. Older ones put a space in front of an answer.
#[test]
fn turns_are_found_where_tools_stand_in_front_of_the_last_question() -> Result<()> {
    let text = "{% set ns = namespace(last=0) %}\
                {% for m in messages if m.role == 'user' %}{% set ns.last = m %}{% endfor %}\
                {% for m in messages %}{% if m.role == 'user' %}\
                {% if m == ns.last %}[TOOLS]{% endif %}[INST] {{ m.content }}[/INST]\
                {% elif m.role == 'tool' %}[RESULT] {{ m.content }}\
                {% elif m.tool_calls %}[CALLS] {{ m.tool_calls[0].name }}()</s>\
                {% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}";
    let chat = json!({"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "r"}, {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
    ]});
    let (prompt, found) = turns_of(text, &chat, All)?;
    assert_eq!(prompt, "[INST] a[/INST]");
    assert_eq!(found, ["[CALLS] f()</s>", " b</s>", " d</s>"]);
    Ok(())
}

#[test]
fn a_conversation_may_begin_with_the_assistant() -> Result<()> {
    let chat = json!({"messages": [
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hi."}
    ]});
    let (prompt, found) = turns("llama3_style", &chat, All)?;
    assert!(prompt.ends_with("<|start_header_id|>assistant<|end_header_id|>\n\n"), "{prompt}");
    assert_eq!(found, ["Hello.<|eot_id|>"]);
    Ok(())
}
