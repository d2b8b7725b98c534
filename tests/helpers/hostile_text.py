"""Text that would break a table or a page, and what a reader should see of it."""

import unicodedata

from markdown_it import MarkdownIt

HOSTILE = [
    "a|b",
    "`code` and ``more``",
    "two\nlines\r\nand\ttabs",
    "{{ 7*7 }} {% raw %}",
    "<script>alert(1)</script> <!-- & -->",
    "שלום עולם (1)",
    "مرحبا",
    "\u202eturned\u2066 round",
    "*bold* _it_ __all__ ~~gone~~ # $x$ \\",
    "[a](http://evil.example) ![b](x) http://evil.example www.evil.example @someone",
    "snake_case_name",
    "می\u200cخواهم",
]


def rendered(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)


def shown(text):
    """What a reader should see of it: one line, without what turns the direction of writing."""
    line = " ".join(text.split())
    return "".join(c for c in line if c == "\u200c" or unicodedata.category(c) != "Cf")
