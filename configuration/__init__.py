"""How a key of the configuration is declared, read and checked; arguments.py has the keys themselves. Imports utils."""
