"""The data recipe: sources become raw tuples, negatives are mined for them, and what came out is inspected.

Imports data, modeling, model, retrieval, utils.
"""
