"""`python -m blpipe`."""

import sys

from blpipe.cli import main

sys.exit(main())
