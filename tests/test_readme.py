"""Every Python snippet of the README runs, in its order."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.filterwarnings("ignore")
def test_snippets_run():
    from torchvision.models.detection import retinanet_resnet50_fpn

    anchors = 100
    names = {
        "model": retinanet_resnet50_fpn(weights=None, weights_backbone=None),
        "images": [torch.rand(3, 64, 64)],
        "targets": [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}],
        "batch": torch.rand(2, 3, 64, 64),
        "masks": torch.randint(0, 5, (2, 64, 64)),
        "logits": torch.randn(2, 5, 64, 64, requires_grad=True),
        "anchor_logits": torch.randn(1, anchors, 5, requires_grad=True),
        "anchor_labels": torch.randint(-2, 5, (1, anchors)),
        "positives": 1,
    }
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_the_table_names_every_loss():
    import detseg_losses

    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert {row[0] for row in rows} == set(detseg_losses.LOSSES)
    for name, function, module in rows:
        cls = getattr(detseg_losses, module)
        assert cls is detseg_losses.LOSSES[name]
        assert cls.function is getattr(detseg_losses, function)
