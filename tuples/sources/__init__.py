"""From a description of labelled or paired text to raw tuples in the published layout.

description.py    what a source's JSON file says, and every mistake in it
reading.py        its rows, from files or from the hub
columns.py        whether they have the columns that the description names
judged.py         rows of three tables: queries, documents, judgements
cleaning.py       one row as texts, or the rule by which it is left out
rows.py           good rows on disk while tuples are made
kinds.py          rows -> tuples, kind by kind
instructions.py   before queries, and before a share of documents
writing.py        NAME.parquet, NAME.build.json, tasks.json
report.py         what happened to every row
parts.py          the same by several jobs
"""
