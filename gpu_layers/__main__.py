"""``python -m gpu_layers``: the command ``gpu-layers``."""

import sys

from gpu_layers.cli import main

sys.exit(main())
