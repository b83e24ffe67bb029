"""Where this package keeps what is expensive to make again: builds, downloaded models, evaluation data.

One folder for all of them, so that a user can find it, move it and delete it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder of this user; it need not exist yet.

    ``$GGUF_SPLITQUANT_CACHE`` where it is set, else ``gguf-splitquant`` in the XDG cache folder
    (``$XDG_CACHE_HOME``, by default ``~/.cache``). Deleting it is always safe.
    """
    own = os.environ.get("GGUF_SPLITQUANT_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification tells programs to ignore a relative path here
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "gguf-splitquant"
    return Path.home() / ".cache" / "gguf-splitquant"
