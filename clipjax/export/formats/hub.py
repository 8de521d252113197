"""A model's folder on the Hugging Face hub, fetched into the cache of huggingface_hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from clipjax.config import ConfigError, require

ID = re.compile(r"[\w.-]+/[\w.-]+")


def folder_of(source: Path, files: Sequence[str], weights: Sequence[str]) -> Path:
    """`source` where it is a folder, else a copy of the hub's `ORG/NAME`, whose files match these patterns. Of the patterns of
    `weights` the first that finds something is fetched.

    Raises ConfigError where it is neither, and without huggingface_hub or the network.
    """
    if source.is_dir():
        return source
    name = source.as_posix()
    known = not source.exists() and ID.fullmatch(name) is not None
    require(known, "SRC", name, "is neither a folder nor a model of the Hugging Face hub, as openai/clip-vit-base-patch32")
    try:
        import huggingface_hub
    except ImportError as error:
        remedy = "is no folder here; to fetch it from the Hugging Face hub, `pip install huggingface_hub`"
        raise ConfigError(f"SRC = {name!r}: {remedy}") from error
    folder = source
    for pattern in weights:
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*files, pattern]))
        except (OSError, ValueError) as error:  # no network, no such model, no access
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"SRC = {name!r}: is no folder here, and the Hugging Face hub did not give it: {reason}") from error
        if any(folder.glob(pattern)):
            break
    return folder
