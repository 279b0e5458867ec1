"""What decoders need on the meta device, where tests count operations without computing any, with every Transformers.

Imported by tests only.
"""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

# "No mask" in words that a decoder does not look into: since 4.53 it takes finished masks, before it made none of None.
NO_MASK = {"full_attention": None} if find_spec("transformers.masking_utils") else None


def forbid_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 4 turns autocast off around rotary positions; torch has none on this device to turn off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
