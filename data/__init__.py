"""Raw files become token stores; a plan names the tuples of a step; a feed makes its batch. Imports modeling, utils.

Raw files:
    raw_rows.py            rows of JSON, CSV and TSV files
    raw_formats.py         these and Parquet as Arrow tables
    raw_columns.py         which columns are read, and what they mean
    row_styles.py          whether all rows of a file have the same columns
    raw_files.py           which files are read, and what is wrong with their rows
    instructions.py        the instructions of their queries

Tokenising:
    declarations.py        what flags say of datasets: tasks, instructions
    jobs.py                which file becomes which store
    tokenising.py          one file into one store
    store_writer.py        writes a store, whole or not at all
    parts.py               one job dealt to several commands
    joining.py             what these wrote, joined
    store_report.py        what is said about stores

Stores:
    token_store.py         a dataset on disk: the format, opened and checked
    published_layouts.py   the published scripts' Parquet, converted into it
    cache.py               from train_data_path to verified stores
    embedding_store.py     a teacher's embeddings of a store's texts
    embedding_writer.py    writes them

Batches:
    plan.py                which tuples and negatives a step has
    batch.py               its texts, packed, for one process
    feed.py                the batches of a run, made a step ahead
"""
