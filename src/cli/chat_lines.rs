//! The lines that a user types into a chat, with history and editing in a terminal.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

/// Number of lines that the history keeps.
const HISTORY_LINES: usize = 1000;

/// Where messages come from.
pub enum Lines {
    /// A terminal.
    Terminal {
        /// The line editor.
        editor: Box<DefaultEditor>,
        /// The file of the history.
        history: PathBuf,
    },
    /// Another standard input, each line of which is a message.
    Piped,
}

impl Lines {
    /// The lines of standard input. A terminal's history is kept in `history`.
    pub fn open(history: PathBuf) -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Piped);
        }
        let config = Config::builder().max_history_size(HISTORY_LINES)?.auto_add_history(false);
        let mut editor = DefaultEditor::with_config(config.build())?;
        // there may be no history yet, and a damaged one is no reason not to talk
        let _ = editor.load_history(&history);
        Ok(Self::Terminal { editor: Box::new(editor), history })
    }

    /// Whether a user types the lines.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next message: a line, and those behind it as long as lines end with `\`. `None` at the
    /// end of the input. A line that is cancelled by Ctrl-C is empty.
    pub fn next(&mut self) -> Result<Option<String>> {
        let mut message = String::new();
        let mut prompt = "> ";
        loop {
            let Some(line) = self.line(prompt)? else {
                return Ok((!message.is_empty()).then_some(message));
            };
            match line.strip_suffix('\\') {
                Some(start) => {
                    message += start;
                    message.push('\n');
                    prompt = "… ";
                }
                None => {
                    message += &line;
                    self.remember(&message);
                    return Ok(Some(message));
                }
            }
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Terminal { editor, .. } => match editor.readline(prompt) {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Eof) => Ok(None),
                Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
                Err(error) => Err(error).context("cannot read a line"),
            },
            Self::Piped => {
                let mut line = String::new();
                let read = std::io::stdin().lock().read_line(&mut line);
                match read.context("cannot read standard input")? {
                    0 => Ok(None),
                    _ => Ok(Some(line.trim_end_matches(['\n', '\r']).to_owned())),
                }
            }
        }
    }

    /// Keeps a message in the history. A history that cannot be written is no reason not to talk.
    fn remember(&mut self, message: &str) {
        if let Self::Terminal { editor, history } = self
            && !message.trim().is_empty()
        {
            let _ = editor.add_history_entry(message);
            if let Some(folder) = history.parent() {
                let _ = fs_err::create_dir_all(folder);
            }
            if let Err(error) = editor.save_history(history) {
                tracing::debug!("the history is not saved: {error}");
            }
        }
    }
}
