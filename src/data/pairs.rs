//! Records of a prompt and what follows it: `prompt` and `completion`, and Stanford Alpaca's
//! `instruction`, `input` and `output`.

use crate::config::{RecordStyle, RecordTemplate, fill};

/// The prompts of Stanford Alpaca, `PROMPT_DICT` in its `train.py`.
const ALPACA_WITH_INPUT: &str = "\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:";
const ALPACA_WITHOUT_INPUT: &str = "\
Below is an instruction that describes a task. Write a response that appropriately completes the \
request.

### Instruction:
{instruction}

### Response:";

/// The values of a record.
pub(super) enum Pair {
    Prompt {
        prompt: String,
        completion: String,
    },
    /// The input may be empty.
    Alpaca {
        instruction: String,
        input: String,
        output: String,
    },
}

impl Pair {
    /// The text that is read and the text that is learned. With nothing to learn, the latter is
    /// empty.
    ///
    /// # Errors
    /// A template with a name that the record does not have; the message describes the fault.
    pub fn texts(
        self,
        style: RecordStyle,
        template: &RecordTemplate,
    ) -> Result<[String; 2], String> {
        let value = |name: &str| match (&self, name) {
            (Self::Prompt { prompt, .. }, "prompt") => Some(prompt),
            (Self::Prompt { completion, .. }, "completion") => Some(completion),
            (Self::Alpaca { instruction, .. }, "instruction") => Some(instruction),
            (Self::Alpaca { input, .. }, "input") => Some(input),
            (Self::Alpaca { output, .. }, "output") => Some(output),
            _ => None,
        };
        let value = |name: &str| value(name).map(String::as_str);
        let (prompt, completion) = match (&self, style) {
            (Self::Prompt { .. }, _) => ("{prompt}", "{completion}"),
            (Self::Alpaca { input, .. }, RecordStyle::Plain) if input.is_empty() => {
                (ALPACA_WITHOUT_INPUT, "{output}")
            }
            (Self::Alpaca { .. }, RecordStyle::Plain) => (ALPACA_WITH_INPUT, "{output}"),
            (Self::Alpaca { input, .. }, RecordStyle::Chat) if input.is_empty() => {
                ("{instruction}", "{output}")
            }
            (Self::Alpaca { .. }, RecordStyle::Chat) => ("{instruction}\n\n{input}", "{output}"),
        };
        let filled = |key: &str, given: &Option<String>, default: &str| {
            let template = given.as_deref().unwrap_or(default);
            fill(template, value).map_err(|fault| format!("`{key}` {fault} in this record"))
        };
        let prompt = filled("template.prompt", &template.prompt, prompt)?;
        let learned = match &self {
            Self::Prompt { completion, .. } => completion,
            Self::Alpaca { output, .. } => output,
        };
        if learned.is_empty() {
            return Ok([prompt, String::new()]);
        }
        Ok([prompt, filled("template.completion", &template.completion, completion)?])
    }
}
