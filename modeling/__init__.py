"""The decoder and its tokenizer as they lie on disk and are loaded; attention, packing, pooling. Imports utils."""
