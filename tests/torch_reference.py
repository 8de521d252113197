"""torch, open_clip and transformers for tests, on machines where torchvision's compiled part can't load too.

PyPI has no torchvision for a CPU build of torch: the one it has wants CUDA, and importing it fails because its operators do
not exist. Nothing here calls one of them, so naming them is enough. Importing this module does that, and only where needed;
`PYTHONPATH=tests/shim` does the same for a program that is not a test.
"""

import importlib.machinery
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path


class NameTorchvisionOperators:
    """Comes before the ordinary importers, steps in once, when torchvision is first imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            name_torchvision_operators()


def name_torchvision_operators() -> None:
    """Defines the operators that `torchvision/_meta_registrations.py` mentions, unless torchvision brings them itself."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return
    root = Path(spec.origin).parent
    try:
        torch.ops.load_library(next(root.glob("_C*" + importlib.machinery.EXTENSION_SUFFIXES[-1])))
    except (OSError, StopIteration):
        source = (root / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "DEF")
        for pair in set(re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)', source)):
            library.define(f"{''.join(pair)}(Tensor a) -> Tensor")
        _kept.append(library)  # the names vanish with the object


_kept: list[object] = []

if not any(type(finder).__name__ == "NameTorchvisionOperators" for finder in sys.meta_path) and "torchvision" not in sys.modules:
    sys.meta_path.insert(0, NameTorchvisionOperators())


def load() -> None:
    """Imports torch, open_clip and transformers on two threads, without their own warnings; nothing is ever downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
        import torch
        from transformers import CLIPModel, SiglipModel  # noqa: F401
    torch.set_num_threads(2)
    assert open_clip.__version__.startswith("3.3."), open_clip.__version__
