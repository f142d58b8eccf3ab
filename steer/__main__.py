"""`python -m steer`, and what `torchrun -m steer` starts."""

import sys

from steer.cli import main

sys.exit(main())
