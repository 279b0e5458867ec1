"""From texts to vectors, search in them, and how good the ranking is. Imports modeling, model, utils.

encode.py     encode(folder, texts, max_length)     unit vectors by a model folder
search.py     search(queries, passages, k)          the nearest passages by cosine; BM25 finds them by words
metrics.py    score(ranking)                        nDCG@10, MRR@10, recall@10
"""
