"""How a key of the configuration is declared, read and checked; arguments.py has the keys themselves. Imports utils.

keys.py               one key: declared, and its value checked
sources.py            values from the command line and from JSON
other_names.py        what other trainers call the keys
dataset_settings.py   keys of single datasets
flag_parser.py        the flags of other commands, and what is said of a wrong one
flag_types.py         types for these flags
"""
