"""Processes that start, fail and end together, and what lets a run go on after a kill. Imports utils."""
