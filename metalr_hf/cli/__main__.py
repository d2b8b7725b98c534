"""`python -m metalr_hf.cli` is `metalr-hf`."""

import sys

from . import main

sys.exit(main())
