"""What the tools share; they need the extra ``tools``."""

import sys
from importlib.util import find_spec

_NEEDED = (
    "albumentations",
    "jsonargparse",
    "lightning_fabric",
    "matplotlib",
    "numpy",
    "PIL",
    "pycocotools",
    "segmentation_models_pytorch",
    "tensorboard",
    "torchvision",
    "tqdm",
    "yaml",
)
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    sys.stderr.write(
        f'error: the tools need {", ".join(_missing)}; pip install "detseg_losses[tools]"\n'
    )
    sys.exit(2)
