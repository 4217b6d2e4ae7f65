"""``python -m rayserve_hooks`` is the command ``rayserve-hooks``."""

import sys

from rayserve_hooks.cli import main

sys.exit(main())
