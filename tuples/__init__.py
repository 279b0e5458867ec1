"""The data recipe: sources become raw tuples, hard negatives are mined for them, and what came out is inspected.

sources/      labelled or paired text -> raw tuples            by tools/build_tuples.py
mining/       raw tuples -> the same with hard negatives       by tools/mine_hard_negatives.py
inspection/   raw tuples or token stores -> what is in them    by tools/inspect_data.py

Imports configuration, data, modeling, model, retrieval, utils.
"""
