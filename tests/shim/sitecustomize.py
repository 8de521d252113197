"""On PYTHONPATH, lets open_clip and transformers import a torchvision whose compiled part can't load: see torch_reference."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import torch_reference  # noqa: F401

sys.path.pop()
