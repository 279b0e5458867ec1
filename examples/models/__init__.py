"""Models that this repository trains and measures against without a download from a hub. Everything works offline.

smollm2.py        SmolLM2-135M-Instruct, a real decoder, from a GGUF file to a plain folder of the first n layers
minilm.py         all-MiniLM-L6-v2, an embedding model that everybody knows: the yardstick
random_qwen3.py   a small random Qwen3 and a tokenizer trained for it
weights.py        the files of the two Python packages that carry the real ones, found and checked
"""
