#!/usr/bin/env python3
"""``python convert_splitquant.py MODEL OUT.gguf``: the same as ``gguf-splitquant convert MODEL OUT.gguf``."""

import sys

from gguf_splitquant.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
