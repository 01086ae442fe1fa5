"""Where a library is missing, one line says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

MISSING = {
    "smp": ("segmentation_models_pytorch", "smp"),
    "torchvision_retinanet": ("torchvision", "torchvision"),
    "torchvision_segmentation": ("torchvision", "torchvision"),
    "transformers_detection": ("transformers", "transformers"),
    "transformers_segmentation": ("transformers", "transformers"),
    "yolo": ("ultralytics", "ultralytics"),
    "coco": ("pycocotools", "tools"),
}


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_library_is_named_with_its_extra(module):
    library, extra = MISSING[module]
    code = (
        f"import sys; sys.modules[{library!r}] = None; import detseg_losses.integrations.{module}"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert f'pip install "detseg_losses[{extra}]"' in result.stderr.splitlines()[-1]


def test_the_tools_name_what_they_miss():
    tool = Path(__file__).parent.parent / "tools" / "train_seg.py"
    code = (
        "import runpy, sys; sys.modules['albumentations'] = None; "
        f"sys.path.insert(0, {str(tool.parent)!r}); runpy.run_path({str(tool)!r})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        'error: the tools need albumentations; pip install "detseg_losses[tools]"'
    ]
