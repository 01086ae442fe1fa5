"""What the tools share; they need the extra ``tools``."""

import os
import sys
from importlib.util import find_spec
from types import TracebackType

_NEEDED = (
    "albumentations",
    "jsonargparse",
    "lightning_fabric",
    "matplotlib",
    "numpy",
    "PIL",
    "pycocotools",
    "scipy",
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


def _end_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Ctrl-C while a tool is still importing, for which there is no other handler yet."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)


sys.excepthook = _end_in_one_line
