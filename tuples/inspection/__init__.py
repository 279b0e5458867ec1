"""What lies in raw tuples or token stores: counts, lengths, doubtful tuples, and the rules that they break.

look.py          the whole: which datasets lie at a path, one of them, all together
raw.py           a raw file as numbers
store.py         a token store as numbers
checks.py        what text numbers tell
texts.py         what only texts can tell: keys, plain forms, containment
pairs.py         of a query and its positive
evaluation.py    an evaluation set that training must not have seen
training.py      steps, tokens and time of a training
rules.py         what is too much, and what to do then
page.py          the result as JSON and as a page
picture.py       lengths as a picture
"""
