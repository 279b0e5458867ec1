"""What `python -m tools.evaluate` is made of.

folders.py   tasks as folders: what lies in them, read and checked
tasks.py     such a folder, or an official name, as a task of mteb
model.py     a model folder as mteb sees it: instructions, dimensions
runner.py    every task at every dimension, through mteb
kept_vectors.py   vectors that are wanted again at fewer dimensions
results.py   mteb's scores as results.json and as a table
"""
