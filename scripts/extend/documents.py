"""Write the documents, the tokenizer and the word lists of the context extension demo; the same bytes every time.

python scripts/extend/documents.py outputs/extend/data

A document is ordinary words in random order with entries of a telephone book among them, "call baro 17 42 .". Each name
is called twice, anywhere in the document, with the same number: the second time it can be known, from the first alone.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from itertools import cycle, islice, product
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

BOS, EOS = "<s>", "</s>"
TEXT = (
    "the old river runs past a quiet mill and over grey stones until night wind moves tall grass while small birds "
    "sleep near warm fields where people once built their long stone house"
)
FILLER = TEXT.split()
NAMES = [a + b for a, b in product(["ba", "de", "fi", "go"], ["ka", "li", "no", "ro", "sa", "te"])]
DIGITS = [f"{number:02}" for number in range(64)]
ENTRY = 5  # words of one
LENGTHS = (512, 1024)  # tokens of a document, its begin and its end included
SHORTEST = 2 * ENTRY
DENSITIES = (1.0, 1.0, 0.5, 0.1)


def main(folder: Path, tokens: int = 2_100_000) -> None:
    """Write everything into ``folder``; of documents, so many tokens of each length."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    rng = random.Random(0)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    numbers = rng.sample([f"{a} {b}" for a, b in product(DIGITS, DIGITS)], 500)
    (folder / "values.txt").write_text("\n".join(numbers) + "\n")
    write(folder / "filler.jsonl", [" ".join(rng.choices(FILLER, k=20_000))])
    for length in LENGTHS:
        densities = islice(cycle(DENSITIES), tokens // length)  # each batch of four has each
        write(folder / f"{length}.jsonl", (document(rng, length - 2, density=density) for density in densities))


def document(rng: random.Random, length: int, across: bool = True, density: float = 0.0) -> str:
    """Text of ``length`` words, at least ``SHORTEST``.

    Args:
        rng: what it is made of.
        length: words.
        across: calls of one name stand near its two ends.
        density: share of the words that are entries, as far as there are names; 0 = one of ``DENSITIES``.
    """
    share = density or rng.choice(DENSITIES)
    names = rng.sample(NAMES, max(1, min(len(NAMES), int(length * share / (2 * ENTRY)))))
    entries = [f"call {name} {rng.choice(DIGITS)} {rng.choice(DIGITS)} ." for name in names]
    parts = entries[across:] * 2 + rng.choices(FILLER, k=length - 2 * ENTRY * len(names))
    rng.shuffle(parts)
    if across:
        margin = len(parts) // 8 + 1
        parts.insert(rng.randrange(margin), entries[0])
        parts.insert(len(parts) - rng.randrange(margin), entries[0])
    return " ".join(parts)


def write(file: Path, texts: Iterable[str]) -> None:
    """One JSON object a line."""
    with file.open("w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words."""
    words = [BOS, EOS, "call", ".", *NAMES, *DIGITS, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
