//! What is wrong with a template or a conversation, and where.

use anyhow::Result;
use dylora::chat_template::ChatTemplate;
use dylora::config::LossOnTurns;
use serde_json::json;

use crate::{BaseFolder, conversation, messages, template};

/// The error of rendering a short conversation, without the folder of the template.
fn fault(files: &[(&str, &str)]) -> String {
    let folder = BaseFolder::new(files);
    let error = folder
        .template()
        .and_then(|template| template.render(&messages(&[("user", "Hi")]), false))
        .expect_err("it cannot be rendered");
    let dir = folder.path("").display().to_string();
    format!("{error:#}").replace(&dir, "")
}

#[test]
fn faults_of_a_template_name_its_file_and_line() {
    let jinja = |text: &str| fault(&[("chat_template.jinja", text)]);
    let start = "`chat_template.jinja:2` is not a chat template: syntax error: ";
    assert!(jinja("a\n{% if %}").starts_with(start));
    assert!(jinja("a\n{% nonsense %}").starts_with(start));
    assert!(jinja("a\n{% generation %}").starts_with(start));
    assert_eq!(
        jinja("a\n\n{{ raise_exception('Only ' ~ messages | length) }}"),
        "the chat template refuses the conversation: Only 1 (`chat_template.jinja:3`)"
    );
    let error = jinja("{{ messages[0].nothing.more }}");
    assert!(error.starts_with("the chat template needs what the conversation lacks: "), "{error}");
    assert!(error.ends_with(" (`chat_template.jinja:1`)"), "{error}");
    let error = jinja("{{ messages[0].content + 1 }}");
    assert!(error.starts_with("the chat template cannot render the conversation: "), "{error}");
    let error = jinja("{{ strftime_now('%!') }}");
    assert!(error.contains("`strftime_now` cannot write `%!`"), "{error}");
    let config = json!({"chat_template": "a\n{{ raise_exception('No.') }}"}).to_string();
    assert_eq!(
        fault(&[("tokenizer_config.json", &config)]),
        "the chat template refuses the conversation: No. (line 2 of `chat_template` in \
         `tokenizer_config.json`)"
    );
}

#[test]
fn faults_of_the_tokenizer_config_are_named() {
    let config = |text: &str| fault(&[("tokenizer_config.json", text)]);
    assert!(config("{").starts_with("`tokenizer_config.json` is not JSON: EOF"));
    assert_eq!(
        config(r#"{"chat_template": 1}"#),
        "`chat_template` in `tokenizer_config.json` must be a template or a list of named ones"
    );
    assert_eq!(
        config(r#"{"chat_template": [{"name": "default"}]}"#),
        "`chat_template` in `tokenizer_config.json` has an entry without a `name` and a `template`"
    );
}

#[test]
fn a_named_file_is_checked_at_once() {
    let folder = BaseFolder::new(&[("mine.jinja", "a\n{% if")]);
    let load = |name: &str| ChatTemplate::load(&folder.path(name), &[]);
    let error = format!("{:#}", load("mine.jinja").expect_err("it is broken"));
    assert!(error.contains("mine.jinja:2` is not a chat template: syntax error"), "{error}");
    let error = format!("{:#}", load("other.jinja").expect_err("it is missing"));
    assert!(error.starts_with("cannot read the chat template: "), "{error}");
}

#[test]
fn a_conversation_without_the_assistant_is_refused() -> Result<()> {
    let chat = messages(&[("user", "a"), ("model", "b"), ("user", "c")]);
    let error = template("x")?.assistant_turns(&chat, LossOnTurns::All);
    let error = error.expect_err("there is no assistant").to_string();
    assert_eq!(error, "no message has the role `assistant`, only `user`, `model`");
    Ok(())
}

#[test]
fn a_message_that_the_template_leaves_out_is_refused() -> Result<()> {
    let text = "{% for m in messages if m.role in ['user', 'assistant'] %}<{{ m.content }}>\
                {% endfor %}";
    let chat = messages(&[("user", "a"), ("developer", "b"), ("assistant", "c")]);
    let error = template(text)?.assistant_turns(&chat, LossOnTurns::All);
    let error = error.expect_err("a message is left out").to_string();
    assert_eq!(error, "the chat template leaves out message 2, whose role is `developer`");
    Ok(())
}

#[test]
fn a_turn_that_cannot_be_found_is_refused() -> Result<()> {
    let chat = conversation(&json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
    ]}));
    let error = |text: &str| -> Result<String> {
        let found = template(text)?.assistant_turns(&chat, LossOnTurns::All);
        Ok(format!("{:#}", found.expect_err("no turn can be found")))
    };
    // as in gpt-oss
    let text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\
                {{ '<return>' if loop.last else '<end>' }}{% endfor %}";
    let found = error(text)?;
    assert!(
        found.starts_with(
            "in message 2: the chat template ends it by `<return>` if nothing follows, and \
             otherwise in another way\nhint: `data.loss_on_turns = \"last\"`"
        ),
        "{found}"
    );
    let hidden = "{{ messages | length }}{{ messages[-1].content }}";
    let found = error(hidden)?;
    assert!(found.contains("in message 2: the chat template does not show its content"), "{found}");
    let last = template(text)?.assistant_turns(&chat, LossOnTurns::Last)?;
    assert_eq!(&last.text[last.turns[0].clone()], "d<return>");
    Ok(())
}

#[test]
fn endless_recursion_is_an_error() {
    std::thread::spawn(|| {
        for text in [
            "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
            "{% macro f(n) %}{% for i in [1] %}{% if true %}{{ f(n + 1) ~ 'a' }}{% endif %}\
             {% endfor %}{% endmacro %}{{ f(0) }}",
        ] {
            let error = fault(&[("chat_template.jinja", text)]);
            assert!(error.contains("recursion"), "{error}");
        }
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
        let error = fault(&[("chat_template.jinja", &deep)]);
        assert!(error.contains("is not a chat template"), "{error}");
        let deep = "{% if true %}".repeat(5000);
        let error = fault(&[("chat_template.jinja", &deep)]);
        assert!(error.contains("is not a chat template"), "{error}");
    })
    .join()
    .expect("a thread's stack is large enough");
}
