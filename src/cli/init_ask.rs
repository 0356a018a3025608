//! What `dylora init` asks in a terminal.

use std::io::IsTerminal;

use anyhow::{Context, Result, bail};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::init_data::DataFiles;
use super::{describe, print_result};
use crate::config::FieldNames;

/// The base that is proposed: a small one that answers chats, which a CPU can train.
const BASE: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// Asks questions in a terminal.
pub struct Questions(DefaultEditor);

impl Questions {
    /// `None` without a terminal.
    pub fn open() -> Result<Option<Self>> {
        let is_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        Ok(if is_terminal { Some(Self(DefaultEditor::new()?)) } else { None })
    }

    /// The base.
    pub fn base(&mut self) -> Result<String> {
        let answer = self.ask(&format!("Base, a folder or a Hub id [{BASE}]: "))?;
        Ok(if answer.is_empty() { BASE.into() } else { answer })
    }

    /// The data of at least one domain.
    ///
    /// - `fields`: the names of the keys of records that have none of the usual ones
    pub fn data(&mut self, fields: &FieldNames) -> Result<Vec<DataFiles>> {
        let mut found: Vec<DataFiles> = vec![];
        loop {
            let number = found.len() + 1;
            let end = if found.is_empty() { "" } else { ", or nothing if this is all" };
            let answer = self.ask(&format!("File {number}, as FILE or DOMAIN=FILE{end}: "))?;
            if answer.is_empty() {
                if found.is_empty() {
                    continue;
                }
                return Ok(found);
            }
            match DataFiles::open(&answer, fields) {
                Ok(data) => {
                    for row in data.rows() {
                        print_result(&format!("  domain `{}`: {} {}", row[0], row[4], row[3]))?;
                    }
                    found.push(data);
                }
                Err(error) => print_result(&format!("  {}", describe(&error)))?,
            }
        }
    }

    fn ask(&mut self, question: &str) -> Result<String> {
        match self.0.readline(question) {
            Ok(answer) => Ok(answer.trim().to_owned()),
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => {
                bail!("nothing was written\nhint: `--base` and `--data` answer without questions")
            }
            Err(error) => Err(error).context("cannot read an answer"),
        }
    }
}
