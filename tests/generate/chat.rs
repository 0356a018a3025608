//! `dylora chat`, by pipes and in a pseudo-terminal.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A small template, whose text the demo's tokenizer splits into few tokens.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant:{% endif %}";

/// A mixture of two experts, and files beside it.
struct World {
    folder: tempfile::TempDir,
}

impl World {
    fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| Self::new().expect("a mixture is trained"))
    }

    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs_err::write(folder.path().join("chat.jinja"), TEMPLATE)?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.args(["-q", "train", "--config", "benchmarks/growth/demo.toml", "--device", "cpu"]);
        let run = folder.path().join("run");
        for set in [
            &format!("run.dir={}", run.display()),
            "train.duration={steps=3}",
            "optimizer.adapters.learning_rate=0.3",
        ] {
            command.args(["--set", set]);
        }
        let output = command.env("OMP_NUM_THREADS", "1").output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command on the mixture, greedy and with short answers.
    fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
        command.arg(name).arg("--checkpoint").arg(self.path("run"));
        command.arg("--chat-template").arg(self.path("chat.jinja"));
        if !arguments.contains(&"--max-tokens") {
            command.args(["--max-tokens", "8"]);
        }
        command.args(["--device", "cpu"]).args(arguments);
        command.env("OMP_NUM_THREADS", "1").env("DYLORA_CACHE", self.path("cache"));
        command.env("TERM", "xterm").env_remove("NO_COLOR");
        command
    }

    fn run(&self, name: &str, arguments: &[&str], input: &str) -> Result<Output> {
        let mut command = self.command(name, arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        child.stdin.take().context("it has a standard input")?.write_all(input.as_bytes())?;
        Ok(child.wait_with_output()?)
    }

    /// What a chat prints on standard output and standard error.
    fn chat(&self, arguments: &[&str], input: &str) -> Result<(String, String)> {
        let output = self.run("chat", arguments, input)?;
        let text = |bytes: Vec<u8>| String::from_utf8(bytes);
        let (stdout, stderr) = (text(output.stdout)?, text(output.stderr)?);
        ensure!(output.status.success(), "{stderr}");
        Ok((stdout, stderr))
    }

    /// The answer to messages by `dylora generate`.
    fn answer(&self, messages: &Value, arguments: &[&str]) -> Result<String> {
        let line = serde_json::json!({ "messages": messages }).to_string();
        let arguments = [arguments, &["--prompts", "-", "--json"]].concat();
        let output = self.run("generate", &arguments, &line)?;
        let found: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok(found["text"].as_str().context("a text")?.to_owned())
    }
}

fn saved(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs_err::read_to_string(path)?)?)
}

#[test]
fn answers_are_those_of_generate_to_the_conversation_so_far() -> Result<()> {
    let world = World::get();
    let file = world.path("talk.jsonl");
    let input = format!("/system Be brief.\nHow\\\nmuch?\nWhy?\n/save {}\n", file.display());
    let (stdout, _) = world.chat(&[], &input)?;
    let messages = saved(&file)?["messages"].clone();
    let texts: Vec<&str> = messages
        .as_array()
        .context("a list")?
        .iter()
        .filter_map(|message| message["content"].as_str())
        .collect();
    assert_eq!(texts[..2], ["Be brief.", "How\nmuch?"]);
    let upto = |count: usize| Value::from(messages.as_array().expect("a list")[..count].to_vec());
    assert_eq!(texts[2], world.answer(&upto(2), &[])?);
    assert_eq!(texts[4], world.answer(&upto(4), &[])?);
    assert_eq!(stdout, format!("{}\n{}\n", texts[2], texts[4]));
    Ok(())
}

#[test]
fn a_text_is_taken_as_the_run_was_trained() -> Result<()> {
    let world = World::get();
    let text = |arguments: &[&str]| -> Result<(String, String)> {
        let prompt = ["--prompt", "Say more.", "--routing", "none"];
        let output = world.run("generate", &[arguments, &prompt].concat(), "")?;
        let stderr = String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{stderr}");
        Ok((String::from_utf8(output.stdout)?, stderr))
    };
    // the run was trained without conversations, though there is a template
    let (plain, message) = text(&[])?;
    assert!(message.contains("`--chat` answers them by the chat template"), "{message}");
    assert_eq!(text(&["--raw"])?.0, plain);
    let answered = text(&["--chat"])?.0;
    assert_ne!(answered, plain);
    let messages = serde_json::json!([{"role": "user", "content": "Say more."}]);
    assert_eq!(answered, format!("{}\n", world.answer(&messages, &["--routing", "none"])?));

    // a run on conversations
    let data = world.path("lessons.jsonl");
    let turn = |role: &str| serde_json::json!({"role": role, "content": "Some words to learn."});
    let record = serde_json::json!({"messages": [turn("user"), turn("assistant")]}).to_string();
    fs_err::write(&data, [record.as_str(); 8].join("\n"))?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.args(["-q", "train", "--config", "benchmarks/growth/demo.toml", "--device", "cpu"]);
    for set in [
        &format!("run.dir={}", world.path("talk").display()),
        &format!("data.domains=[{{name=\"talk\", train=[\"{}\"]}}]", data.display()),
        &format!("base.chat_template={}", world.path("chat.jinja").display()),
        "train.duration={steps=2}",
        "lora.num_experts=1",
    ] {
        command.args(["--set", set]);
    }
    let output = command.env("OMP_NUM_THREADS", "1").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    command.arg("generate").arg("--checkpoint").arg(world.path("talk"));
    command.args(["--device", "cpu", "--max-tokens", "8", "--routing", "none"]);
    let output = command.args(["--prompt", "Say more."]).env("OMP_NUM_THREADS", "1").output()?;
    assert_eq!(String::from_utf8(output.stdout)?, answered);
    Ok(())
}

#[test]
fn commands_change_the_routing_and_how_tokens_are_chosen() -> Result<()> {
    let world = World::get();
    let message = serde_json::json!([{"role": "user", "content": "Say more."}]);
    let (stdout, stderr) = world.chat(
        &[],
        "/routing none\nSay more.\n/reset\n/routing expert:1\n/set max_new_tokens 3\nSay more.\n\
         /exit\nnot read\n",
    )?;
    let base = world.answer(&message, &["--routing", "none"])?;
    let expert = world.answer(&message, &["--routing", "expert:1", "--max-tokens", "3"])?;
    assert_eq!(stdout, format!("{base}\n{expert}\n"));
    assert!(stderr.contains("the answer ends after 3 tokens"), "{stderr}");
    Ok(())
}

#[test]
fn faults_are_named_and_the_conversation_goes_on() -> Result<()> {
    let world = World::get();
    let long = "word ".repeat(400);
    let commands = "/dance\n/set top_p 2\n/set colour red\n/routing expert:9\n/save\n";
    let input = format!("{commands}/save x.jsonl\n{long}\nHi\n");
    let (stdout, stderr) = world.chat(&[], &input)?;
    for message in [
        "error: there is no command `/dance`\nhint: `/help` lists them",
        "error: `top_p` must be above 0 and at most 1, got 2",
        "error: there is no option `colour`",
        "error: there is no `expert:9`, the model has 3 expert(s)",
        "error: `/save` needs the name of a file",
        "error: there is no conversation to save yet",
        "but the context is 256 positions long\nhint: `/reset` begins a new conversation",
    ] {
        assert!(stderr.contains(message), "{message}\n{stderr}");
    }
    let message = serde_json::json!([{"role": "user", "content": "Hi"}]);
    assert_eq!(stdout, format!("{}\n", world.answer(&message, &[])?));
    Ok(())
}

#[test]
fn a_base_without_a_template_is_refused() -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dylora"));
    let output = command.args(["chat", "--base", "demo/base", "--device", "cpu"]).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(
        stderr.contains("has no chat template\nhint: `--chat-template FILE.jinja`"),
        "{stderr}"
    );
    assert_eq!(output.status.code(), Some(1));
    Ok(())
}

#[test]
fn base_and_model_stand_beside_each_other() -> Result<()> {
    let world = World::get();
    let (stdout, _) = world.chat(&["--compare"], "Say more.\n")?;
    let message = serde_json::json!([{"role": "user", "content": "Say more."}]);
    for (name, arguments) in [("base", &["--routing", "none"][..]), ("model", &[])] {
        let text = world.answer(&message, arguments)?;
        let word = text.split_whitespace().next().unwrap_or_default();
        assert!(stdout.contains(name) && stdout.contains(word), "{text}\n{stdout}");
    }
    Ok(())
}

/// What a terminal shows, without colours and control sequences.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\x1b' => {
                let _ = characters.find(char::is_ascii_alphabetic);
            }
            '\r' => {}
            character => plain.push(character),
        }
    }
    plain
}

#[test]
fn a_terminal_has_a_prompt_a_history_and_colours() -> Result<()> {
    let world = World::get();
    let command = world.command("chat", &["--show-routing"]);
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000))?;
    let mut shown = String::new();
    let mut wait = |terminal: &mut rexpect::session::PtySession, text: &str| {
        shown += &terminal.exp_string(text)?;
        shown += text;
        anyhow::Ok(())
    };
    wait(&mut terminal, "> ")?;
    terminal.send_line("/routing expert:2")?;
    wait(&mut terminal, "> ")?;
    terminal.send_line("Say more.")?;
    wait(&mut terminal, "[tokens: ")?;
    wait(&mut terminal, "> ")?;
    // the history has the last line; Ctrl-C drops it, and Ctrl-D ends the session
    terminal.send("\x1b[A")?;
    terminal.flush()?;
    wait(&mut terminal, "Say more.")?;
    terminal.send_control('c')?;
    wait(&mut terminal, "> ")?;
    terminal.send_control('d')?;
    shown += &terminal.exp_eof()?;
    assert!(shown.contains("\x1b[35m"), "{shown}");
    let message = serde_json::json!([{"role": "user", "content": "Say more."}]);
    let answer = world.answer(&message, &["--routing", "expert:2"])?;
    // how often a line is drawn depends on when its keys arrive
    let shown = plain(&shown).replace("> > ", "> ").replace(answer.trim(), "ANSWER");
    let shown = shown.replace(concat!(env!("CARGO_MANIFEST_DIR"), "/"), "");
    let lines: Vec<&str> = shown.lines().map(str::trim_end).collect();
    insta::assert_snapshot!(lines.join("\n"), @"
    demo/base, 3 expert(s), routed by `router`. /help lists the commands.
    expert_0 (arithmetic)  expert_1 (code)  expert_2 (data2text)
    > /routing expert:2
    > Say more.
     ANSWER
    [tokens: expert_0 (arithmetic): 0  expert_1 (code): 0  expert_2 (data2text): 8]
     WARN the answer ends after 8 tokens: `/set max_new_tokens N`
    > Say more.
    >
    ");
    Ok(())
}
