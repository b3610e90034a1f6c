"""Questions made from the standard library's source on this machine, for the tasks beside this.

All are from the files that compresso keeps from calibration and training, and always the same for
a version of Python. They ask for a name in the code that has occurred in the text before it.
"""

from __future__ import annotations

import hashlib
import keyword
import random
import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from compresso.calibration.stdlib import stdlib_files

CONTEXT = 600  # characters before what is asked for
QUESTIONS = 400
PER_FILE = 20
CHOICES = 4
NAME = re.compile(r"(?<=\S )[A-Za-z_]\w{3,}(?!\w)")
WORD = re.compile(r"(?<!\w)[A-Za-z_]\w{3,}(?!\w)")


def cloze(**_: Any) -> dict[str, Dataset]:
    """Split `test` of rows with `context` and `target`: the name, with the space before it."""
    rows = [
        {"context": context, "target": f" {name}"}
        for context, name, _ in _questions("cloze", choices=1)
    ]
    return {"test": Dataset.from_list(rows)}


def choice(**_: Any) -> dict[str, Dataset]:
    """Split `test` of rows with `context`, `choices` and `answer`: the place of the right one.

    The wrong ones are other names that have occurred in the context.
    """
    rows = []
    for context, name, others in _questions("choice", choices=CHOICES):
        choices = sorted([name, *others])
        rows.append(
            {
                "context": context,
                "choices": [f" {one}" for one in choices],
                "answer": choices.index(name),
            }
        )
    return {"test": Dataset.from_list(rows)}


def _questions(task: str, *, choices: int) -> list[tuple[str, str, list[str]]]:
    """Context, name and other names of each question, in an order that says nothing."""
    found: list[tuple[str, str, list[str]]] = []
    for file, text in stdlib_files(held_out=True):
        generator = random.Random(f"{task} {file}")
        of_file = list(_of(text, choices, generator))
        found += generator.sample(of_file, min(PER_FILE, len(of_file)))
    found.sort(key=lambda question: hashlib.sha256(question[0].encode()).digest())
    return found[:QUESTIONS]


def _of(text: str, choices: int, generator: random.Random) -> Iterator[tuple[str, str, list[str]]]:
    """Every question that a text has an answer to."""
    for match in NAME.finditer(text, CONTEXT):
        name, start = match[0], match.start() - 1
        context = text[start - CONTEXT : start]
        before = sorted(set(WORD.findall(context)) - set(keyword.kwlist))
        if name not in before or len(before) < choices:
            continue
        others = [other for other in before if other != name]
        yield context, name, generator.sample(others, choices - 1)
