"""Put figures into the card of a model folder that is finished, or take them out."""

import re
from dataclasses import asdict, replace
from pathlib import Path

from export.card_results import results_section
from export.model_card import Facts, model_card
from modeling.pooling import pooling_of
from utils import read_json, write_json, write_text


def add_evaluation(folder: Path, evaluation: dict, beside: dict | None = None) -> bool:
    """Put an evaluation into a model folder's README.md and f2llm.json; one of the same tasks is replaced.

    A README.md that somebody has edited keeps every line but those of its section on results.

    Args:
        folder: a model folder of this project.
        evaluation: {task: {dimensions: {metric: value}}}, as results.json of tools/evaluate.py has them.
        beside: {model: the same}, other models to show beside it; None leaves those that the card has.

    Returns:
        Whether the folder is one of this project; of another one nothing is touched.

    Raises:
        OSError: the folder cannot be written.
    """
    if not (folder / "f2llm.json").is_file():
        return False
    results = Facts(**read_json(folder / "f2llm.json")).results
    added = {"evaluation": results.get("evaluation", {}) | evaluation}
    if beside is not None:
        added["beside"] = beside
    _rewrite(folder, results | added)
    return True


def forget_results(folder: Path) -> None:
    """Take all figures out of the card, since the folder's weights have changed; without f2llm.json do nothing."""
    if (folder / "f2llm.json").is_file():
        _rewrite(folder, {})


def _rewrite(folder: Path, results: dict) -> None:
    """The card first: a kill between the two files leaves a card that is written anew in the same words."""
    facts = Facts(**read_json(folder / "f2llm.json"))
    changed = replace(facts, results=results)
    pooling = pooling_of(folder)
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.exists() else ""
    text = model_card(changed, pooling)
    if before not in ("", model_card(facts, pooling), text):
        text = with_section(before, results_section(results, facts.hidden_size))
    write_text(card, text)
    write_json(folder / "f2llm.json", asdict(changed))


def with_section(card: str, section: str) -> str:
    """A card whose section "## Results" is this one; it goes to the end of a card that has none.

    >>> with_section("# A\\n\\n## Results\\n\\nold\\n\\n## B\\n", "## Results\\n\\nnew")
    '# A\\n\\n## Results\\n\\nnew\\n\\n## B\\n'
    """
    block = f"{section}\n\n" if section else ""
    found = re.search(r"^## Results$.*?(?=^## |\Z)", card, flags=re.DOTALL | re.MULTILINE)
    if found:
        card = card[: found.start()] + block + card[found.end() :]
    else:
        card = f"{card.rstrip()}\n\n{block}"
    return card.rstrip() + "\n"
