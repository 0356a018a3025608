#!/usr/bin/env python3
"""Writes tests/golden/tokenizers/*: tokenizers of several kinds, and what they make of some texts.

    "$(scripts/reference_env)" scripts/make_golden_tokenizers.py [FOLDER]

Each tokenizer is trained on SAMPLE. Apart from its small vocabulary, its `NAME.tokenizer.json` is
built like the file that bases of its kind have on the Hub:

    qwen       Qwen2 and Qwen3: NFC, a pattern, ByteLevel; no start token
    llama3     Llama 3: another pattern, ByteLevel, `ignore_merges`; a start token
    smollm     SmolLM2: Digits and ByteLevel with GPT-2's pattern; no start token
    llama2     Llama 2 and Mistral v0.1: SentencePiece's BPE, the prefix by a normalizer; a start token
    mistral    Mistral v0.3: the same, but Metaspace puts the prefix only in front of the text

`NAME.encodings.json` contains the version of `tokenizers` and, for each text of TEXTS:

    ids                       without special tokens
    ids_with_special_tokens   with what the post-processor adds
    decoded                   the text of `ids`, special tokens included

The same version writes the same bytes.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)

SAMPLE = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and
conscience and should act towards one another in a spirit of brotherhood.
Everyone has the right to life, liberty and security of person. No one shall be held in slavery.
Everyone has the right to freedom of thought, conscience and religion; this right includes freedom
to change his religion or belief, and freedom, either alone or in community with others and in
public or private, to manifest his religion or belief in teaching, practice, worship and observance.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen
begabt und sollen einander im Geist der Brüderlichkeit begegnen.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison
et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и
совестью и должны поступать в отношении друг друга в духе братства.
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
def add(numbers, start=0):
    total = start
    for number in numbers:
        if number is not None and number > 0:
            total += number
    return total
It's what they've said: we'll see, I'm sure you're right, he'd go. It isn't 1 or 12 or 123 or 2024.
"""

TEXTS = [
    "",
    "x",
    " ",
    "Everyone has the right to life, liberty and security of person.",
    " a leading space and two trailing ones  ",
    "many     spaces\tand\ttabs\t\tand \t both",
    "line\nends\n\nand blank \n  \n lines\n",
    "windows\r\nline\r\n\r\nends\r",
    "punctuation!\n\n(and; more)...\r\n--\n",
    "it's they've we'll I'm you're he'd isn't",
    "IT'S THEY'VE WE'LL I'M YOU'RE HE'D ISN'T 'Sure 'reason",
    "1 12 123 1234 12345678 3.14159 -2e10 1,000,000",
    "2024-11-05T12:34:56Z, x2 and 3D",
    "Ⅷ ½ ² ٣٤٥ १२३ ①",
    "def add(numbers, start=0):\n    total = start\n    for n in numbers:\n\ttotal += n\n    return total\n",
    '{"key": [1, 2.5, null], "b": "a\\nb"}',
    "<p class='x'>1 &lt; 2</p> // /* */ $x_y->z @foo #bar",
    "Würde, Brüderlichkeit, dignité, égaux, êtres",
    "precomposed é ü å Å, combining e\u0301 u\u0308 a\u030a A\u030a",
    "two marks a\u0323\u0302 a\u0302\u0323, a sign that NFC changes \u212b \u2126 \u0344",
    "left as it is by NFC \ufb01 \uff21, decomposed by NFC \u0958 \u2adc",
    "Все люди рождаются свободными",
    "人人生而自由，在尊严和权利上一律平等。",
    "日本語のテキスト、カタカナ",
    "모든 인간은, \u1112\u1161\u11ab",
    "हिन्दी में लिखा, ภาษาไทย",
    "שלום עולם، مرحبا بالعالم",
    "emoji 😀👍🏽 👩\u200d👩\u200d👧 🇩🇪 ❤\ufe0f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010fffd",
    "spaces\u00a0of\u2003other\u3000kinds\u2028and\u0085line\u000bends\u000c",
    "invisible \u200b \ufeff \u00ad \u0000 \u0007 \u001b",
    "\ufeffa byte order mark",
    "the long s 'ſ and the Kelvin sign \u212a",
    "▁lower ▁▁one eighth▁block",
    "<0x41><0x0A> spelled bytes",
    "{start}Hello",
    "{start} Hello{end}",
    "Hello{end}{start}Hi {end} there{end}\n",
    "{start}{start}twice",
    "text {unknown} <|not_a_token|> <s <| |>",
    "A" * 40 + " " * 40 + "b" * 40,
]


def with_specials(text, start, end, unknown):
    return text.replace("{start}", start).replace("{end}", end).replace("{unknown}", unknown)


def byte_level_bpe(specials, vocab_size, pre_tokenizer, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])


def start_template(token, id):
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, id)]
    )


def qwen():
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_bpe(specials, 480, split(QWEN_PATTERN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    return tokenizer, ("<|im_start|>", "<|im_end|>", "<unk>")


def llama3():
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level_bpe(specials, 500, split(LLAMA3_PATTERN), ignore_merges=True)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(add_prefix_space=True, trim_offsets=False),
        start_template(specials[0], tokenizer.token_to_id(specials[0])),
    ])
    file = json.loads(tokenizer.to_str())
    # some tokens are found by `ignore_merges` alone, as in Llama 3
    file["model"]["merges"] = file["model"]["merges"][:-90]
    return Tokenizer.from_str(json.dumps(file)), (specials[0], specials[2], "<unk>")


def smollm():
    pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer = byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 460, pre_tokenizer)
    return tokenizer, ("<|im_start|>", "<|im_end|>", "<unk>")


def sentence_piece_bpe(vocab_size):
    """Trained within words, as SentencePiece does; then without a pre-tokenizer."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    # rare characters and line ends have no token of their own, and become byte tokens
    counts = Counter(SAMPLE.replace("\n", "").replace(" ", "▁"))
    alphabet = [character for character, count in counts.items() if count >= 3]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE.splitlines(), trainer)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])
    tokenizer.post_processor = start_template("<s>", 1)
    file = json.loads(tokenizer.to_str())
    # byte tokens are no added tokens: a text that spells one keeps its characters
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] in specials]
    file["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(file))


def llama2():
    return sentence_piece_bpe(470), ("<s>", "</s>", "<unk>")


def mistral():
    tokenizer = sentence_piece_bpe(440)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer, ("<s>", "</s>", "<unk>")


def write(folder, name, tokenizer, specials):
    tokenizer_file = tokenizer.to_str()
    (folder / f"{name}.tokenizer.json").write_text(tokenizer_file + "\n")
    tokenizer = Tokenizer.from_str(tokenizer_file)
    cases = []
    for text in TEXTS:
        text = with_specials(text, *specials)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({
            "text": text,
            "ids": ids,
            "ids_with_special_tokens": tokenizer.encode(text).ids,
            "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        })
    versions = json.dumps({"tokenizers": tokenizers.__version__})
    lines = ",\n".join(json.dumps(case) for case in cases)
    (folder / f"{name}.encodings.json").write_text(f'{{"versions": {versions},\n"cases": [\n{lines}\n]}}\n')


def main():
    default = Path(__file__).parents[1] / "tests/golden/tokenizers"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in [qwen, llama3, smollm, llama2, mistral]:
        write(folder, kind.__name__, *kind())


if __name__ == "__main__":
    main()
