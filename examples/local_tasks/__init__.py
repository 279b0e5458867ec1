"""Tasks for tools/evaluate.py from the real text of a Debian machine and its Python packages.

make.py           the command: every kind whose sources are there, as folders
kinds.py          from Python functions, packages and translations to the rows of a task
debian.py         the packages that dpkg and apt know: section, summary, description
translations.py   the texts of gettext's .mo files, English and translated
compare.py        results of several models as one table
"""
