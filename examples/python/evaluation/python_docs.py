"""Writes python_docs.jsonl, the data of the tasks beside this file: passages of the documentation that Python carries.

    python examples/python/evaluation/python_docs.py

A record has two neighbouring paragraphs, four beginnings of the second one, three of which are of other topics, and
the number of the right one. The tasks look for the file in the folder that lm-eval runs in.
"""

import json
from pathlib import Path
from pydoc_data.topics import topics

CHOICES, SHORTEST, LONGEST, BEGINNING = 4, 80, 400, 80


def passages() -> list[list[str]]:
    """The first two neighbouring paragraphs of prose of each topic that has them."""
    found = []
    for _, text in sorted(topics.items()):
        paragraphs = [" ".join(part.split()) if part[:1].isalpha() else "" for part in text.split("\n\n")]
        is_prose = [SHORTEST <= len(paragraph) <= LONGEST and "**" not in paragraph for paragraph in paragraphs]
        for i in range(len(paragraphs) - 1):
            if is_prose[i] and is_prose[i + 1]:
                found.append(paragraphs[i : i + 2])
                break
    return found


def beginning(text: str) -> str:
    return text[:BEGINNING].rpartition(" ")[0]


def records() -> list[dict]:
    pairs = passages()
    made = []
    for number, (context, following) in enumerate(pairs):
        answer = number % CHOICES
        choices = [beginning(pairs[(number + k) % len(pairs)][1]) for k in range(1, CHOICES)]
        choices.insert(answer, beginning(following))
        made.append({"context": context, "following": following, "choices": choices, "answer": answer})
    return made


if __name__ == "__main__":
    lines = [json.dumps(record) + "\n" for record in records()]
    Path("python_docs.jsonl").write_text("".join(lines))
    print(f"python_docs.jsonl: {len(lines)} records")
