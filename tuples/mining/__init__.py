"""Hard negatives for the tuples of one file, from a corpus of passages.

inputs.py    the files, looked through before anything is done
texts.py     every distinct text once, rows as text numbers
mine.py      the whole: read, encode, index, search, choose, write; on one or many processes
blocks.py    negatives of the distinct queries, block by block
rules.py     which candidates become negatives
output.py    the tuples in the order of the input
report.py    what was removed by which rule, scores, the hardest examples
"""
