"""Loading a tokenizer with transformers, from local files alone and without any code of the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import TokenizerError


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer as transformers' ``AutoTokenizer`` makes it.

    Raises:
        TokenizerError: no tokenizer files, damaged ones, or a tokenizer that needs code of its own.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise TokenizerError(
            folder, "neither tokenizer.model, tokenizer.json nor vocab.json", "download the tokenizer's files"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # transformers and tokenizers raise whatever comes: bare Exception for a damaged tokenizer.json
    except Exception as error:
        raise TokenizerError(
            folder,
            f"transformers cannot load the tokenizer ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})",
            "download the tokenizer's files again",
        ) from error
