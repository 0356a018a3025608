"""The four formats of the same records of E2E, and the cues by which a prompt tells the format
(scripts/evidence_conflicts.py says what they are)."""
import json

from evidence_metrics import facts

FORMATS = ["text", "bold", "json", "qa"]
CUES = ["none", "prefix", "instruction"]
# the wordings of the instructions: three are trained, and the last is only asked after training
WORDINGS = {
    "text": [
        "Describe the restaurant in a sentence.",
        "Write a short text about this venue.",
        "Put these facts into plain words.",
        "Tell a guest about this place in prose.",
    ],
    "bold": [
        "Describe the restaurant in a sentence, with the facts in bold.",
        "Write a short text about this venue and set its facts in bold.",
        "Put these facts into plain words, each fact in bold type.",
        "Tell a guest about this place in prose and make the facts bold.",
    ],
    "json": [
        "Give the record of the restaurant as JSON.",
        "Write this venue as a JSON object.",
        "Put these facts into JSON.",
        "Return the data of this place in JSON form.",
    ],
    "qa": [
        "Ask and answer a question about each fact of the restaurant.",
        "Write this venue as questions and answers.",
        "Put these facts into a list of questions with their answers.",
        "Turn the data of this place into questions and answers.",
    ],
}
UNSEEN = 3
QUESTIONS = {
    "name": "What is it called?",
    "eatType": "What kind of place is it?",
    "food": "What food does it serve?",
    "priceRange": "What does it cost?",
    "customer rating": "How do guests rate it?",
    "area": "Where is it?",
    "familyFriendly": "Is it for families?",
    "near": "What is nearby?",
}


def bold(text, values):
    """The text with the first occurrence of each value in bold, of values that overlap the longest one."""
    spans = []
    for value in sorted(set(values.values()) - {"yes", "no"}, key=lambda value: (-len(value), value)):
        start = text.find(value)
        end = start + len(value)
        if start >= 0 and all(end <= other[0] or other[1] <= start for other in spans):
            spans.append((start, end))
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]}**{text[start:end]}**{text[end:]}"
    return text


def completion(format, record):
    slots = facts(record["prompt"])
    if format == "text":
        return record["completion"]
    if format == "bold":
        return bold(record["completion"], slots)
    if format == "json":
        return json.dumps(slots, ensure_ascii=False)
    return "\n".join(f"{QUESTIONS[slot]} {value}" for slot, value in slots.items())


def format_of(text, name):
    """The format that an answer has, or None if it has none of the four.

    - name: that of the restaurant, which every reference names
    """
    if name.casefold() not in text.casefold():
        return None
    if text.startswith("{"):
        try:
            return "json" if isinstance(json.loads(text), dict) else None
        except ValueError:
            return None
    if text.startswith(QUESTIONS["name"]):
        return "qa"
    return "bold" if "**" in text else "text"


def with_cue(cue, format, prompt, wording):
    """A prompt with what tells its format.

    - wording: the number of an instruction's wording
    """
    if cue == "prefix":
        return f"format : {format} | {prompt}"
    return f"{WORDINGS[format][wording]}\n{prompt}" if cue == "instruction" else prompt


def made(records, cue, format, unseen=False):
    """The records of E2E in a format. The wording of an instruction goes by the input."""
    inputs = {}
    for record in records:
        number = inputs.setdefault(record["prompt"], len(inputs))
        wording = UNSEEN if unseen else number % UNSEEN
        prompt = with_cue(cue, format, record["prompt"], wording)
        yield {"prompt": prompt, "completion": completion(format, record), "input": record["prompt"]}
