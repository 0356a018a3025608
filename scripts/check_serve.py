#!/usr/bin/env python3
"""Checks `dylora serve` with OpenAI's own Python client.

    scripts/check_serve.py FOLDER

A mixture is trained for some steps on the demo base and served. Texts must be those of `dylora
generate`, streams those of whole answers, and errors must reach the client as its own exceptions.
Needs the packages of scripts/serve-requirements.txt; scripts/check_serve runs this script.
"""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import openai
from openai import AsyncOpenAI, OpenAI

DYLORA = os.environ.get("DYLORA", "target/debug/dylora")
KEY = "a key of this check"
PROMPTS = ["How much remains?\n", "fn main", "SCENE. The battlements at dawn."]
TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
MESSAGES = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "How much remains?"}]
count = 0


def expect(name, condition, found=""):
    """Stops if a condition does not hold."""
    global count
    if not condition:
        sys.exit(f"{name}: not so\n{found}")
    print(f"{name}: yes", flush=True)
    count += 1


def refuses(name, kind, call, param=None, code=None):
    """Stops unless a call raises an exception of this kind with this field and code."""
    try:
        found = call()
    except kind as error:
        expect(name, (error.param, error.code) == (param, code), f"{error!r}, {error.param}, {error.code}")
    else:
        expect(name, False, found)


def dylora(*arguments):
    """The standard output of a command on the CPU."""
    line = [DYLORA, "--quiet", *map(str, arguments)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def server(*arguments):
    """Runs a server, and checks that it ends well when it is asked to."""
    line = [DYLORA, "--quiet", "serve", "--port", "0", "--device", "cpu", *map(str, arguments)]
    environment = os.environ | {"DYLORA_API_KEY": KEY}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip() + "/v1"
        process.send_signal(signal.SIGTERM)
        expect("the server ends with 0", process.wait(60) == 0)
    finally:
        process.kill()
        process.wait()


def check_completions(client, run):
    settings = ["--checkpoint", run, "--device", "cpu", "--json", "--max-new-tokens", 16]
    sampled = ["--temperature", 0.8, "--top-p", 0.9, "--seed", 4]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    lines = [json.loads(line) for line in dylora("generate", *settings, *sampled, *prompts).splitlines()]
    asked = {"model": "run", "max_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": 4}
    answer = client.completions.create(prompt=PROMPTS, logprobs=2, **asked)
    expect("completions equal `dylora generate`", [c.text for c in answer.choices] == [x["text"] for x in lines])
    expect("the prompts' tokens are counted", answer.usage.prompt_tokens == sum(len(x["prompt_ids"]) for x in lines))
    expect("the new tokens are counted", answer.usage.completion_tokens == sum(len(x["ids"]) for x in lines))
    for choice, line in zip(answer.choices, lines):
        logprobs = choice.logprobs
        pairs = zip(logprobs.token_logprobs, line["log_probs"])
        expect("log-probabilities equal `dylora generate`", all(abs(a - b) < 1e-4 for a, b in pairs))
        expect("tokens make the text", "".join(logprobs.tokens) == choice.text, logprobs.tokens)
        offsets = [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
        expect("offsets are those of the tokens", logprobs.text_offset == offsets)
        best = zip(logprobs.tokens, logprobs.top_logprobs)
        expect("the best tokens have 2 or 3 entries", all(t in b and len(b) in (2, 3) for t, b in best))
    texts = {index: "" for index in range(3)}
    stream = client.completions.create(prompt=PROMPTS, stream=True, stream_options={"include_usage": True}, **asked)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    expect("a stream has the same texts", list(texts.values()) == [c.text for c in answer.choices])
    expect("a stream ends with the usage", chunk.usage == answer.usage)
    whole = client.completions.create(model="run", prompt=PROMPTS[0], max_tokens=16, temperature=0).choices[0].text
    stop = whole[5:8]
    cut = client.completions.create(model="run", prompt=PROMPTS[0], max_tokens=16, temperature=0, stop=[stop])
    expect("a stop string ends a text", cut.choices[0].text == whole[: whole.find(stop)])
    expect("a stop string is a reason", cut.choices[0].finish_reason == "stop")
    several = client.completions.create(prompt=PROMPTS[0], n=3, model="run", max_tokens=16, temperature=1, seed=1)
    expect("several answers differ", len({choice.text for choice in several.choices}) > 1)


def check_routing(client):
    asked = {"prompt": PROMPTS[1], "max_tokens": 8, "temperature": 0}
    routed = client.completions.create(model="run", extra_body={"return_routing": True}, **asked).choices[0].routing
    expect("the experts have the names of their domains", routed["experts"] == ["arithmetic", "code", "data2text", "verse"])
    expect("routing weights sum to 1", all(math.isclose(sum(w), 1, abs_tol=1e-5) for w in routed["weights"]))
    for name, routing in [("run:code", "domain:code"), ("run:expert-1", "expert:1"), ("run:base", "none")]:
        named = client.completions.create(model=name, **asked).choices[0].text
        chosen = client.completions.create(model="run", extra_body={"routing": routing}, **asked).choices[0].text
        expect(f"`{name}` is `{routing}`", named == chosen)


def check_chats(client):
    asked = {"model": "run", "messages": MESSAGES, "temperature": 0}
    answer = client.chat.completions.create(max_completion_tokens=12, logprobs=True, top_logprobs=2, **asked)
    choice = answer.choices[0]
    content = choice.logprobs.content
    expect("a chat has a text", choice.message.role == "assistant" and choice.message.content)
    text = bytes(byte for token in content for byte in token.bytes).decode(errors="replace")
    expect("the bytes of tokens make the text", text == choice.message.content)
    expect("the first of the best tokens is taken", all(t.top_logprobs[0].token == t.token for t in content))
    prompt = "system: Answer.\nuser: How much remains?\nassistant:"
    completion = client.completions.create(model="run", prompt=prompt, max_tokens=12, temperature=0)
    expect("a chat continues its template", completion.choices[0].text == choice.message.content)
    stream = client.chat.completions.create(max_completion_tokens=12, stream=True, **asked)
    deltas = [chunk.choices[0].delta for chunk in stream]
    expect("a stream has the same text", "".join(d.content or "" for d in deltas) == choice.message.content)
    expect("a stream begins with the role", deltas[0].role == "assistant")
    with client.chat.completions.stream(max_completion_tokens=12, **asked) as events:
        for _ in events:
            pass
        final = events.current_completion_snapshot
    expect("the client puts a stream together", final.choices[0].message.content == choice.message.content)


def check_errors(client, url):
    asked = {"model": "run", "prompt": "x", "max_tokens": 1}
    complete = client.completions.create
    expect("models are listed", [m.id for m in client.models.list()][:2] == ["run", "run:arithmetic"])
    expect("a model is described", client.models.retrieve("run:verse").id == "run:verse")
    unknown = asked | {"model": "gpt-4"}
    refuses("an unknown model", openai.NotFoundError, lambda: complete(**unknown), "model", "model_not_found")
    wrong = asked | {"temperature": -1}
    refuses("a wrong value", openai.BadRequestError, lambda: complete(**wrong), "temperature")
    biased = asked | {"logit_bias": {"5": 1}}
    code = "unsupported_parameter"
    refuses("a field without effect", openai.BadRequestError, lambda: complete(**biased), "logit_bias", code)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat = {"model": "run", "messages": MESSAGES, "tools": tools}
    create = client.chat.completions.create
    refuses("tools", openai.BadRequestError, lambda: create(**chat), "tools", code)
    long = asked | {"max_tokens": 999}
    code = "context_length_exceeded"
    refuses("a long text", openai.BadRequestError, lambda: complete(**long), "max_tokens", code)
    other = OpenAI(base_url=url, api_key="another key", max_retries=0)
    refuses("a wrong key", openai.AuthenticationError, other.models.list, None, "invalid_api_key")


async def check_many(url):
    """Sixteen streams at once have the texts that they have alone."""
    client = AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)

    async def text(seed):
        stream = await client.completions.create(
            model="run", prompt=PROMPTS[seed % 3], max_tokens=12, temperature=1, seed=seed, stream=True
        )
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    together = await asyncio.gather(*map(text, range(16)))
    expect("sixteen streams at once are as alone", together == [await text(seed) for seed in range(16)])


def check_full_queue(run):
    """A server with one place refuses a second text."""
    with server("--checkpoint", run, "--max-batch", 1, "--max-queue", 0) as url:
        client = OpenAI(base_url=url, api_key=KEY, max_retries=0)
        asked = {"model": "run", "prompt": "fn", "temperature": 1, "seed": 0}
        running = client.completions.create(max_tokens=200, stream=True, **asked)
        next(iter(running))
        again = lambda: client.completions.create(max_tokens=1, **asked)
        refuses("a full queue", openai.RateLimitError, again, None, "queue_full")
        running.close()
        patient = OpenAI(base_url=url, api_key=KEY, max_retries=5)
        expect("a patient client has its turn", patient.completions.create(max_tokens=1, **asked).choices)


def main():
    folder = Path(sys.argv[1]).resolve()
    run, template = folder / "run", folder / "chat.jinja"
    template.write_text(TEMPLATE)
    steps = ["--set", "train.duration={steps=4}", "--set", "schedule.warmup_steps=1"]
    dylora("train", "--config", "configs/moe.toml", "--device", "cpu", "--set", f"run.dir={run}", *steps)
    with server("--checkpoint", run, "--chat-template", template) as url:
        client = OpenAI(base_url=url, api_key=KEY, max_retries=0)
        check_completions(client, run)
        check_routing(client)
        check_chats(client)
        check_errors(client, url)
        asyncio.run(check_many(url))
    check_full_queue(run)
    print(f"all {count} checks hold")


main()
