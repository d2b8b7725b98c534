import html

import pytest
from hostile_text import HOSTILE, rendered, shown

from metalr_hf.hub.markdown import escape, table


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is_and_is_nothing_else(text):
    [_, inline, _] = rendered(f"Before {escape(text)} after")
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    plain = "".join(token.content for token in inline.children).replace("\u2068", "").replace("\u2069", "")
    assert plain == f"Before {shown(text)} after"


def test_a_table_is_whole_whatever_is_in_it():
    rows = [[text, i] for i, text in enumerate(HOSTILE)]
    tokens = rendered(table(["class", "images"], rows, "lr"))
    cells = [
        "".join(child.content for child in tokens[i + 1].children).strip("\u2068\u2069")
        for i, token in enumerate(tokens)
        if token.type in ("td_open", "th_open")
    ]
    assert cells == ["class", "images", *[str(cell) for text, i in rows for cell in (shown(text), i)]]
    assert not [token for token in tokens if token.type.startswith("html")]


def test_what_turns_the_direction_of_writing_does_so_inside_only():
    assert escape("\u202eabc") == "abc"
    assert escape("שלום") == "\u2068שלום\u2069"
    assert html.unescape(escape("www.evil.example http://x")) == "www.evil.example http://x"
    assert not {"www.", "://"} & {escape(text)[:4] for text in ("www.x", "://x")}


def test_cells_that_are_markdown_already_stay_so_and_the_header_is_escaped():
    lines = table(["a|b"], [["**0.9**"]], escaped=True).splitlines()
    assert (lines[0], lines[2]) == ("| a&#124;b |", "| **0.9** |")
