"""What training chooses on common cards is pinned, and what it chooses is sensible on all of them.

python -m pytest tests/benchmarks/test_memory_plan.py
"""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import memory, memory_plan
from benchmarks.common import QWEN3
from benchmarks.memory_plan import CARDS, ENGINES, situation
from training.policy import NEAR, choose_policy

ROOT = Path(__file__).parents[2]
ALL = [(card, size, engine, lora) for card in CARDS for size in QWEN3 for engine in ENGINES for lora in (False, True)]


def test_the_page_in_docs_is_what_would_be_chosen():
    page = (ROOT / "docs" / "memory-plan.md").read_text(encoding="utf-8")
    assert page == memory_plan.page() + "\n", "python -m benchmarks.memory_plan > docs/memory-plan.md"
    assert page.count("\n| ") == len(ALL) + len(CARDS)


def test_the_memory_table_in_docs_is_the_one_of_this_code():
    assert memory.table(8) in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_what_is_known_to_fit_and_not_to_fit():
    fits = {}
    for card, size, engine, lora in ALL:
        fits[card.gib, size, engine, lora] = choose_policy(situation(card, size, engine, lora)).fits
    assert fits[24, "0.6B", "one GPU", False]
    assert fits[40, "4B", "FSDP2, 8 GPUs", False]
    assert fits[80, "14B", "FSDP2, 8 GPUs", False]
    assert not fits[40, "4B", "one GPU", False]  # 16 bytes of each of 4 billion weights
    assert not fits[80, "8B", "DDP, 8 GPUs", False]
    assert not fits[24, "14B", "FSDP2, 8 GPUs", False]
    assert fits[40, "4B", "one GPU", True]


def test_the_published_batch_on_one_gpu_runs_in_as_many_parts_as_the_page_says(capsys):
    (h100,) = [card for card in CARDS if "H100" in card.name]
    assert choose_policy(situation(h100, "0.6B", "one GPU", False, tuples=512)).parts == 4  # four, in words
    memory_plan.main(["--tuples", "512"])
    shown = capsys.readouterr().out
    assert "A usual step has 512 tuples of 9 texts\nof 165 tokens on each GPU, 760,320 tokens" in shown
    assert shown.count(" one GPU ") == memory_plan.page().count(" one GPU ")


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_chosen_fits_and_more_memory_never_makes_a_step_slower(lora):
    compared = 0
    for size in QWEN3:
        for engine in ENGINES:
            for card in CARDS:
                found = situation(card, size, engine, lora)
                chosen = choose_policy(found)
                if not chosen.fits:
                    continue
                room = found.room(chosen.recompute_every, chosen.keep_gathered)
                assert max(chosen.max_tokens_per_forward, found.longest_text) <= room
                larger = replace(found, free=1.5 * found.free)
                assert larger.seconds(choose_policy(larger)) <= (1 + NEAR) * found.seconds(chosen)
                compared += 1
    assert compared > 20
