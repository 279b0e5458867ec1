"""From texts to vectors, search in them, and how good the ranking is. Imports modeling, model, utils.

encode.py         encode(folder, texts, max_length)     unit vectors by a decoder, without padding
encoders.py       open_encoder(folder)                  by any model folder, also those of Sentence Transformers
vectors.py        VectorFolder, Vectors                 vectors as shards on a disk, read by memory map
search.py         search(queries, passages, k)          the nearest passages by cosine; BM25 finds them by words
faiss_index.py    build, FaissIndex                     the nearest by an index of FAISS
rescore.py        Cosines, CrossEncoderScores           the scores of chosen pairs
beir.py           read_set(folder)                      queries, documents and what answers what, in BEIR's layout
metrics.py        evaluate(ranking, relevance)          nDCG@10, MRR@10, recall@10, recall@100, MAP@100
"""
