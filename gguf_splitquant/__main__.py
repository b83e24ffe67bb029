"""``python -m gguf_splitquant``: the same as the ``gguf-splitquant`` command."""

import sys

from .cli import main

sys.exit(main())
