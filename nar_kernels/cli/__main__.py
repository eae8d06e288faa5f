"""``python -m nar_kernels.cli``."""

import sys

from nar_kernels.cli.main import main

sys.exit(main())
