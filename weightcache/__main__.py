"""Own `python -m weightcache`: the command line."""

import sys

from weightcache.cli import main

sys.exit(main())
