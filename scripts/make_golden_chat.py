#!/usr/bin/env python3
"""Writes tests/golden/chat/golden.json: what transformers makes of conversations with some templates.

    "$(scripts/reference_env)" scripts/make_golden_chat.py [FOLDER]

FOLDER has the templates, NAME.jinja, and gets `golden.json`. It is tests/golden/chat by default. With
DYLORA_GOLDEN_CHAT=FOLDER, `cargo test --test chat` reads another one, such as a copy of the templates
that come with Hugging Face's TRL.

Each template renders each conversation with and without the generation prompt, on the date of 26
July 2024. `golden.json` has the versions, the conversations, and for each rendering

    text        or null if transformers raises an error
                and, without the generation prompt,
    ids         by the tokenizer of tests/golden/tokenizers that TOKENIZERS names
    generated   which of them stand in `{% generation %}` blocks; null if the template has none
    turns       the assistant's turns, [start, end] in characters, from the renderings of the messages
                before and up to each; null if the whole text does not begin with these

The same versions write the same bytes.
"""

import datetime
import json
import sys
from pathlib import Path

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

ROOT = Path(__file__).parent.parent
# by the first letters of a template's name; the first that fits is taken
TOKENIZERS = {"llama3": "llama3", "qwen": "qwen", "": "smollm"}
SPECIAL_TOKENS = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, <now> & \"here\": é 😀",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "the city's name"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": [1, 2]},
                "scale": {"type": "number", "enum": [1.0, 0.5, 1e-07, 1e16]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {}}}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
CONVERSATIONS = {
    "one question": {"messages": [user("Is 7 prime?")]},
    "one turn": {"messages": [user("Is 7 prime?"), assistant("Yes, it is.")]},
    "a system message": {"messages": [SYSTEM, user("Is 7 prime?"), assistant("Yes.")]},
    "three turns": {
        "messages": [
            SYSTEM,
            user("Is 7 prime?"),
            assistant("Yes."),
            user("And 9?"),
            assistant("No, 9 = 3 * 3."),
            user("Why?"),
            assistant("Because\n\n3 divides it."),
        ]
    },
    "a last question": {"messages": [user("a"), assistant("b"), user("c")]},
    "white space": {
        "messages": [user("  two spaces \n"), assistant("\n\n lines \n"), user("\u00a0x\u2003"), assistant(" y")]
    },
    "unusual characters": {
        "messages": [
            user("é e\u0301 \u212b 人 👩\u200d👩\u200d👧 <b>&amp;</b> '\"\\ {{ x }} {% y %}"),
            assistant("\u001c\u0085a\u001f \t\u200b <|im_end|><|eot_id|> </think>"),
        ]
    },
    "empty": {"messages": [user(""), assistant(""), user("x"), assistant("")]},
    "tools": {
        "tools": [WEATHER, CLOCK],
        "messages": [
            SYSTEM,
            user("How is the weather in Łódź?"),
            assistant("", tool_calls=[call("get_weather", {"city": "Łódź", "days": [1, 2.5, None, True]})]),
            {"role": "tool", "name": "get_weather", "content": '{"sky": "blue"}'},
            assistant("It is sunny."),
            user("Thanks!"),
            assistant("You are welcome."),
        ],
    },
    "two calls": {
        "tools": [WEATHER, CLOCK],
        "messages": [
            user("Weather and time?"),
            assistant("One moment.", tool_calls=[call("get_weather", {"city": "x"}), call("get_time", {})]),
            {"role": "tool", "content": "rain"},
            {"role": "tool", "content": "noon"},
            assistant("Rain at noon."),
        ],
    },
    "a call without content": {
        "messages": [
            user("Time?"),
            {"role": "assistant", "tool_calls": [call("get_time", {"zone": 1e-05, "big": 12345678901234567890})]},
            {"role": "tool", "content": {"hour": 12}},
            assistant(None, tool_calls=[call("get_time", '{"zone": 2}')]),
        ]
    },
    "unused tools": {"tools": [CLOCK], "messages": [user("Hi"), assistant("Hello")]},
    "thoughts": {"messages": [user("2 + 2?"), assistant(THOUGHT), user("2 + 3?"), assistant(THOUGHT.replace("4", "5"))]},
    "reasoning": {
        "messages": [
            user("2 + 2?"),
            assistant("4", reasoning_content="Two and two."),
            user("2 + 3?"),
            assistant("5", reasoning_content="\nTwo and three.\n"),
        ]
    },
    "without thinking": {
        "variables": {"enable_thinking": False},
        "messages": [user("2 + 2?"), assistant("<4>"), user("2 + 3?"), assistant("5")],
    },
    "a date": {"variables": {"date_string": "1 Jan 2000"}, "messages": [user("Hi"), assistant("Hello")]},
    "another role": {"messages": [user("Hi"), {"role": "narrator", "content": "Silence."}, assistant("Hello")]},
    "the assistant first": {"messages": [assistant("Hello, what can I do?"), user("Sing."), assistant("La.")]},
    "parts": {
        "messages": [
            user([{"type": "text", "text": "Is 7 prime?"}]),
            assistant([{"type": "text", "text": "Yes."}]),
        ]
    },
    "a number": {"messages": [user(7), assistant(0.5)]},
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def tokenizer_of(template):
    name = next(name for start, name in TOKENIZERS.items() if template.startswith(start))
    file = ROOT / f"tests/golden/tokenizers/{name}.tokenizer.json"
    return name, PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL_TOKENS[name])


def render(tokenizer, conversation, messages, add_generation_prompt, **more):
    return tokenizer.apply_chat_template(
        messages,
        tools=conversation.get("tools"),
        add_generation_prompt=add_generation_prompt,
        **conversation.get("variables", {}),
        **more,
    )


def turns(tokenizer, conversation, text):
    messages = conversation["messages"]
    found = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = render(tokenizer, conversation, messages[:at], True, tokenize=False) if at else None
            up_to = render(tokenizer, conversation, messages[: at + 1], False, tokenize=False)
        except (jinja2.TemplateError, TypeError):
            return None
        if before is None or not (text.startswith(before) and text.startswith(up_to)):
            return None
        found.append([len(before), len(up_to)])
    return found


def rendering(tokenizer, conversation, add_generation_prompt):
    messages = conversation["messages"]
    try:
        text = render(tokenizer, conversation, messages, add_generation_prompt, tokenize=False)
    except (jinja2.TemplateError, TypeError, AttributeError):
        return {"text": None}
    if add_generation_prompt:
        return {"text": text}
    has_marks = "generation %}" in tokenizer.chat_template
    encoded = render(tokenizer, conversation, messages, False, return_assistant_tokens_mask=has_marks)
    return {
        "text": text,
        "ids": encoded["input_ids"],
        "generated": encoded["assistant_masks"] if has_marks else None,
        "turns": None if has_marks else turns(tokenizer, conversation, text),
    }


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests/golden/chat"
    chat_template_utils.datetime = Clock
    renderings = []
    for file in sorted(folder.glob("*.jinja")):
        name, tokenizer = tokenizer_of(file.stem)
        tokenizer.chat_template = file.read_text()
        for title, conversation in CONVERSATIONS.items():
            for prompt in [False, True]:
                renderings.append({
                    "template": file.stem,
                    "tokenizer": name,
                    "conversation": title,
                    "add_generation_prompt": prompt,
                    **rendering(tokenizer, conversation, prompt),
                })
    golden = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "jinja2": jinja2.__version__,
        "special_tokens": SPECIAL_TOKENS,
        "conversations": CONVERSATIONS,
    }
    lines = [f" {json.dumps(rendering, ensure_ascii=False)}" for rendering in renderings]
    head = json.dumps(golden, ensure_ascii=False)[:-1]
    text = f'{head}, "renderings": [\n' + ",\n".join(lines) + "\n]}\n"
    json.loads(text)
    (folder / "golden.json").write_text(text)


if __name__ == "__main__":
    main()
