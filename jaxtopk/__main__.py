"""`python -m jaxtopk`: the command line where the console script is not on the path."""

import sys

from jaxtopk.cli import main

sys.exit(main())
