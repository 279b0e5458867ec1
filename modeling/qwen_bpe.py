"""Byte-level BPE tokenizers that split texts as Qwen's does: trained on texts, or built from a published vocabulary.

The tests, the quickstart and the benchmarks make theirs here, since nothing is downloaded. Qwen's special tokens have
Qwen's roles: <|im_end|> ends a text, <|endoftext|> pads. As with Qwen's, nothing appends EOS to a text:
modeling/tokenizer.py does.

    python -m pytest tests/modeling/test_qwen_bpe.py
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

# The pieces that a text is cut into before bytes are merged, from Qwen's tokenizer.json: English contractions; letters
# with one other character in front; single digits; punctuation with the line ends behind it; line ends; spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD = "<|endoftext|>"
EOS = "<|im_end|>"
SPECIAL_TOKENS = [PAD, "<|im_start|>", EOS]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges are learned from `texts`. The same texts give the same tokenizer.

    Args:
        vocab_size: entries at most, the special tokens among them; few texts give fewer. The 256 bytes are always
            among them, so that no text has an unknown token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return _with_roles(tokenizer)


def tokenizer_from_ranks(ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    """A tokenizer with a vocabulary in tiktoken's form, as Qwen first published it.

    Args:
        ranks: bytes of a token -> its id; of two possible merges the one that makes the lower id comes first. The
            special tokens are added behind the highest.

    Needs Transformers 5: before it only the package tiktoken reads ranks.
    """
    converter = TikTokenConverter(vocab_file="not read", pattern=SPLIT, extra_special_tokens=SPECIAL_TOKENS)
    converter.load_tiktoken_bpe = lambda _: ranks  # the converter would read a file of the package tiktoken
    tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    return _with_roles(tokenizer)


def _with_roles(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
