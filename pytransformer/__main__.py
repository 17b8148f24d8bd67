"""``python -m pytransformer``."""

import sys

from pytransformer.cli.main import main

sys.exit(main())
