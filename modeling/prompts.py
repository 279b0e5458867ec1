"""How an instruction stands before a query: the one spelling for training data and for saved model folders.

Instruct: {instruction}
Query: {text}
"""

_HEAD = "Instruct: "
_MIDDLE = "\nQuery: "


def query_prompt(instruction: str) -> str:
    """What stands before a query's text in training and in use; passages have none."""
    if not instruction:
        return ""
    return f"{_HEAD}{instruction}{_MIDDLE}"


def split_prompt(text: str) -> tuple[str | None, str]:
    """A query as (its instruction, its text); the instruction is None if the query carries none.

    >>> split_prompt("Instruct: Find it.\\nQuery: a bridge")
    ('Find it.', 'a bridge')
    >>> split_prompt("a bridge")
    (None, 'a bridge')
    """
    if not text.startswith(_HEAD):
        return None, text
    instruction, middle, query = text[len(_HEAD) :].partition(_MIDDLE)
    if not instruction or not middle:
        return None, text
    return instruction, query


def carries_instruction(text: str) -> bool:
    """Whether a query has an instruction, also in a spelling that is not ours: no second one may be put before it."""
    return text.startswith(_HEAD.rstrip())


def bare_instruction(text: str) -> str:
    """An instruction alone, of one that somebody gave with the words around it.

    >>> bare_instruction("Instruct: Find it.\\nQuery: "), bare_instruction("Find it.")
    ('Find it.', 'Find it.')
    """
    return text.strip().removeprefix(_HEAD.strip()).removesuffix(_MIDDLE.strip()).strip()
