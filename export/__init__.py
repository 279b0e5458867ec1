"""Folders that other programs load: written, described, read back, merged. Imports modeling, model, utils."""
