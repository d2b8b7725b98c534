"""Parts of error messages: the names that may have been meant, and what a library's error says first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6) -> str:
    """A hint at the names that may have been meant: those that begin alike, else those that look alike.

    Args:
        name (`str`): What was given.
        known (`Iterable[str]`): The names that there are.
        otherwise (`str`, *optional*, defaults to `""`): The hint if none is near.
        cutoff (`float`, *optional*, defaults to 0.6): How near is near, see `difflib.get_close_matches`.

    Returns:
        `str`: a sentence with a blank before it, to be put behind another; empty if there is nothing to say.

    Example:

    ```python
    >>> from metalr_hf.messages import did_you_mean
    >>> did_you_mean("cosin", ["cosine", "constant"])
    " Did you mean 'cosine'?"

    ```
    """
    known = list(known)
    near = [other for other in known if other.startswith(name)][:3] or difflib.get_close_matches(name, known, 3, cutoff)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else otherwise
    return f" {hint}" if hint else ""


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says, or else its kind.

    Args:
        error (`BaseException`): The error.

    Returns:
        `str`

    Example:

    ```python
    >>> from metalr_hf.messages import first_line
    >>> first_line(OSError("no such model\nlook at the list of all models")), first_line(OSError())
    ('no such model', 'OSError')

    ```
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
