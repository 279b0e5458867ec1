"""Encode, search and score, as an embedding model is used. Imports modeling, model, utils."""
