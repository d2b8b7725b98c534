"""Escapes arbitrary text for Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# What Markdown, HTML, mathematics or a template would take for more than a character, and what would become a link.
# An underscore inside a word is one.
SPECIAL = re.compile(r"[\\`*\[\]<>{}|~$&@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
JOINERS = ("\u200c", "\u200d")
ISOLATE = "\u2068{}\u2069"


def escape(text: object) -> str:
    r"""Escapes a text, so that Markdown shows it literally, in one line.

    Special characters become numeric entities, white space a blank. Control characters are dropped, those that turn the
    direction of writing among them; what is written from right to left is set apart, so that it turns nothing around
    it.

    Args:
        text (`object`): What to show, such as a class name.

    Returns:
        `str`: one line.

    Example:

    ```python
    >>> from metalr_hf.hub.markdown import escape
    >>> escape("a|b\n<script>"), escape("macro_f1")
    ('a&#124;b &#60;script&#62;', 'macro_f1')

    ```
    """
    line = " ".join(str(text).split())
    line = "".join(c for c in line if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    escaped = SPECIAL.sub(lambda found: f"&#{ord(found[0])};", line)
    from_right = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in line)
    return ISOLATE.format(escaped) if from_right else escaped


def table(header: Sequence[str], rows: Iterable[Sequence[object]], align: str = "", *, escaped: bool = False) -> str:
    """A Markdown table. Header and cells are escaped.

    Args:
        header (`Sequence[str]`): Titles of the columns.
        rows (`Iterable[Sequence[object]]`): Cells, row by row.
        align (`str`, *optional*): `l` or `r` a column; left where it says nothing.
        escaped (`bool`, *optional*, defaults to `False`): Whether the cells are Markdown already.

    Returns:
        `str`: the lines of the table.

    Example:

    ```python
    >>> from metalr_hf.hub.markdown import table
    >>> print(table(["class", "images"], [["a|b", 3]], align="lr"))
    | class | images |
    | --- | ---: |
    | a&#124;b | 3 |

    ```
    """
    rules = ["---:" if align[i : i + 1] == "r" else "---" for i in range(len(header))]
    lines = [list(map(escape, header)), rules, *(list(map(str if escaped else escape, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
