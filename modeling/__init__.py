"""The decoder and its tokenizer as they lie on disk and are loaded; attention, packing, pooling. Imports utils.

hub.py         where a model comes from: a folder, or the hub
backbone.py    the decoder: whether it fits, loaded, given adapters
attention.py   attention over packed texts, and the choice of a backend
packing.py     packed texts as rectangles
rounding.py    whether two ways of computing differ by rounding alone
pooling.py     from states to an embedding
tokenizer.py   texts to ids that end in EOS
prompts.py     how an instruction stands before a query
versions.py    where old packages differ from new ones
pruning.py     a smaller decoder out of a larger one
merging.py     the weighted average of model folders
qwen_bpe.py    tokenizers like Qwen's, for tests and examples
"""
