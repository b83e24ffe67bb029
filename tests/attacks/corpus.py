"""Every bad file, by the reader that gets it. As a script: the table of what they cost (docs/security.md)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.attacks import checkpoints, gguf_files, other_files, safetensors_files
from tests.attacks.attack import Attack
from tests.attacks.bounded_process import BoundedProcess

CORPUS: dict[str, list[Attack]] = {
    "read_safetensors": safetensors_files.ATTACKS,
    "read_source": [*checkpoints.ATTACKS, *gguf_files.SOURCES],
    "header_and_pairs": gguf_files.ATTACKS,
    "inspect": gguf_files.ATTACKS,
    "imatrix": other_files.IMATRICES,
    "plan": other_files.PLANS,
    "recipe": other_files.RECIPES,
    "results": other_files.RESULTS,
    "template": other_files.TEMPLATES,
}


def main() -> None:
    """Print the number of files and the most memory for each reader."""
    process = BoundedProcess()
    print("| reader | files | as they must | most memory |")
    print("|---|---|---|---|")
    for reader, attacks in CORPUS.items():
        verdicts = []
        for attack in attacks:
            with tempfile.TemporaryDirectory() as folder:
                verdicts.append((attack, process.read(reader, attack.make(Path(folder)))))
        right = sum(verdict.kind == ("refused" if attack.error else "") for attack, verdict in verdicts)
        largest = max(verdicts, key=lambda pair: pair[1].bytes)
        print(
            f"| {reader} | {len(verdicts)} | {right} | {largest[1].bytes / 1e6:.0f} MB ({largest[0].name}) |",
            flush=True,
        )
    process.close()


if __name__ == "__main__":
    main()
