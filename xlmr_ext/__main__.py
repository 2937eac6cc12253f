"""``python -m xlmr_ext`` is the command ``xlmr-ext``."""

import sys

from xlmr_ext.cli import main

sys.exit(main())
