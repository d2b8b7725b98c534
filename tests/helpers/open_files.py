"""For tests in which a library leaves files open: Pillow those that it cannot read, `datasets` its tables."""

import pytest

# With the fixture `open_files_are_left_here`, so that none is noticed in the middle of another test.
LEFT_OPEN = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
