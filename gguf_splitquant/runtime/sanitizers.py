"""How a process loads a library that was built with sanitizers.

The sanitizer's own library has to be there before everything else, and so has libstdc++: the sanitizer looks
for the function that throws exceptions when it starts, and Python itself has none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ..errors import BuildError

_PRELOADED = ("libasan.so", "libstdc++.so.6")
_OPTIONS = {
    # Python and numpy free nothing when they end
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def sanitizer_environment(compiler: str) -> dict[str, str]:
    """Environment variables for the process that loads a sanitized library (Linux, gcc).

    Args:
        compiler: the C++ compiler that built it; knows where the sanitizer's library is.

    Raises:
        BuildError: the compiler has none.
    """
    preload = []
    for name in _PRELOADED:
        command = [*compiler.split(), f"-print-file-name={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        path = Path(done.stdout.strip())
        # a compiler that does not know a file answers with its bare name
        if done.returncode or not path.is_absolute():
            raise BuildError(name, f"{compiler} does not have it", "install gcc's sanitizers (libasan)")
        preload.append(str(path.resolve()))
    return {**os.environ, **_OPTIONS, "LD_PRELOAD": ":".join(preload)}
