"""What a user can get wrong: each ends in one line and exit code 2, and leaves everything alone.

``CASES`` is one table. A case is what is run, and words that the message has to have; ``@/`` in an
option stands for the folder that :func:`place` fills. Cases of training tools are added to options
that would train, so that each has the one fault that it names.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import coco_to_yolo
import eval_det
import eval_seg
import train_det
import train_seg
from common.config import DataConfig, DetectionConfig, SegmentationConfig, to_dict
from common.shapes import CLASSES, make_shapes

MAINS = {
    "train_det": train_det,
    "train_seg": train_seg,
    "eval_det": eval_det,
    "eval_seg": eval_seg,
    "coco_to_yolo": coco_to_yolo,
}
BASE = {
    "train": [
        "--data.format=coco",
        "--data.root=@/coco",
        "--data.size=64",
        "--train.epochs=1",
        "--train.batch_size=2",
    ],
    "eval": [],
    "coco": [],
}


ODD_OPTIONS: dict[str, dict[str, object]] = {
    "no_options": {},
    "no_data": {"data": None},
    "list_of_data": {"data": [1]},
    "old_option": {"data": {"frmat": "coco"}},
    "bad_value": {"data": {"size": "large"}},
}
"""Options in checkpoints that are not those of these tools."""


class Case(NamedTuple):
    """A command line and the words that its error has to have."""

    id: str
    tool: str
    options: list[str]
    words: list[str]


def each(
    tool: str, option: str, values: Iterable[str], *words: str, more: Iterable[str] = ()
) -> Iterator[Case]:
    """A case for each value of an option; the message has to name the option."""
    for value in values:
        name = f"{tool} {option}={value}"
        yield Case(name, tool, [*more, f"--{option}={value}"], [option, *words])


def single(tool: str, *options: str, words: Iterable[str]) -> Iterator[Case]:
    yield Case(f"{tool} {' '.join(options)}", tool, list(options), list(words))


def _cases() -> Iterator[Case]:
    # Numbers.
    for option in ("lr", "weight_decay", "clip"):
        yield from each("train_det", f"train.{option}", ["inf", "-inf", "nan", "1e400", "-1"])
        yield from each("train_seg", f"train.{option}", ["fast", "null", "[1]", "true", "''"])
    yield from each("train_det", "train.lr", ["0"])
    for option in ("batch_size", "accumulate", "eval_every", "log_every", "checkpoint_every"):
        yield from each("train_det", f"train.{option}", ["0", "-1", "1.5", "many"])
    yield from each("train_seg", "train.epochs", ["-1", "0.5", "nan", f"{2**70}", "null"])
    yield from each("train_seg", "train.devices", ["0", "-1", "1.5", "all", "100000", f"{2**70}"])
    yield from each("train_det", "seed", ["-1", f"{2**70}", "1.5", "nan", "x"])
    yield from each("train_det", "data.workers", ["-1", "1.5", "100000", f"{2**70}"])
    yield from each("train_seg", "data.subset", ["0", "-1", "half"])
    yield from each("train_det", "model.fpn_channels", ["0", "-8", "8", "12", f"{2**70}", "wide"])
    yield from each("train_det", "model.keypoints", ["0", "-1", f"{2**70}"])
    yield from each("train_det", "model.anchors", ["[16]", "[]", "16", "[0,0,0]", "[1,-1,2]"])
    yield from each("train_det", "model.anchors", ["[16,32,64,128,256,512,1024,2048]", "[a,b,c]"])
    yield from each("train_det", "train.batch_size", ["5", "1000000000000"])
    yield from each("train_seg", "train.accumulate", ["3"], more=["--train.batch_size=4"])
    for tool in ("train_det", "train_seg"):
        yield from each(tool, "data.mean", ["[0.5]", "[]", "0.5", "[0,0,nan]", "[0,0,inf]", "null"])
        yield from each(tool, "data.mean", ["[0,0,0,0]", "[123,117,104]"])
        yield from each(tool, "data.std", ["[0,0,0]", "[1,1,-1]", "[1,1,nan]", "[1,1]", "[a,b,c]"])
        yield from each(tool, "data.std", ["[1,1,inf]", "[1,1,1e-30]"])
        yield from each(tool, "data.size", ["0", "-64", "1", "[1,2,3]", "[]", "64.5", "large"])
        yield from each(tool, "data.size", ["[64,null]", "1000000", f"{2**70}", "null"])
        yield from each(tool, "data.crop", ["0", "[64]", "1", "65", "[32,128]", "x"])
    for value, words in (
        ("train.devices=0", "train.devices takes auto or a whole number from 1; got 0"),
        ("train.lr=-2", "train.lr takes a finite number above 0; got -2"),
        ("train.lr=soon", "train.lr takes a finite number above 0; got soon"),
        ("data.subset=some", "data.subset takes null or a whole number from 1; got some"),
        ("data.size=tiny", "data.size takes a list or a whole number; got tiny"),
        ("data.augment=perhaps", "data.augment takes true or false; got perhaps"),
        ("seed=-2", "seed takes a whole number from 0 to 2^63 - 1; got -2"),
        ("train.batch_size=6", "lower it to 4 or less"),
    ):
        yield from single("train_det", f"--{value}", words=[words])
    # Names.
    yield from each("train_det", "data.format", ["cocoo"], "did you mean 'coco'")
    yield from each("train_det", "data.faults", ["skp"], "did you mean 'skip'")
    yield from each("train_det", "data.augment", ["maybe", "2"])
    yield from each("train_det", "train.optimizer", ["adam"], "did you mean 'adamw'")
    yield from each("train_det", "train.schedule", ["cosin"], "did you mean 'cosine'")
    yield from each("train_det", "train.precision", ["16"], "16-mixed")
    yield from each("train_det", "model.name", ["retina"], "did you mean 'retinanet'")
    yield from each(
        "train_det", "model.name", ["fasterrcnn_resnet50"], "did you mean 'fasterrcnn_resnet50_fpn'"
    )
    yield from each("train_det", "model.backbone", ["resnet"], "did you mean 'resnet")
    yield from each("train_det", "model.backbone", ["18"], "resnet18")
    yield from each("train_seg", "model.mode", ["binry"], "did you mean 'binary'")
    options = ["--model.mode=binary", "--loss=bce"]
    yield from single("train_seg", *options, words=["model.mode", "background and one class"])
    yield from single("train_seg", "--model.mode=binary", words=["ce+dice", "'bce'"])
    unett = "did you mean 'unet'"
    yield from single("train_seg", "--model.name=unett", words=["model", "unett", unett])
    for near, wrong in (("resnet18", "resnet19"), ("mobilenet_v2", "mobilnet_v2")):
        words = [wrong, f"did you mean '{near}'"]
        yield from single("train_seg", f"--model.encoder={wrong}", words=words)
    yield from single("train_seg", "--model.name=", words=["model"])
    yield from single("train_seg", "--model.encoder=", words=["encoder"])
    yield from single("train_seg", "--model.encoder=@/coco", words=["encoder"])
    yield from single("train_seg", "--model.options={depth: 3}", words=["depth"])
    yield from single("train_seg", "--model.options=3", words=["model.options"])
    yield from single("train_seg", "--model.options={encoder_depth: 99}", words=["99"])
    yield from single(
        *("train_seg", "--model.options={aux_los: true}", "--model.name=fcn_resnet50"),
        words=["aux_los"],
    )
    yield from single("train_det", "--model.weights=missing.pth", words=["missing.pth"])
    yield from single("train_det", "--model.weights=@/coco", words=["coco"])
    yield from single("train_det", "--model.weights=@/file.txt", words=["file.txt"])
    yield from single("train_det", "--model.weights=DEFAULT", words=["weights", "small"])
    for option in ("--los=l1", "--los", "--data.roo=x", "--train.batch=4", "--resum", "--conf=x"):
        yield from single("train_det", option, words=[option.partition("=")[0]])
    for option in ("--train.bach_size=4", "--data.classs=[a]", "--lossx=1", "giou+focal", "-x"):
        yield from single("train_det", option, words=[option.partition("=")[0]])
    # Loss strings: before any data is read.
    for loss, word in (
        ("giuo+focal", "giou"),
        ("giou+", "giou+"),
        ("", "loss"),
        ("giou,focal", "loss"),
        ("giou-focal", "loss"),
        ("2giou", "loss"),
        ("giou+focal(gamma=)", "loss"),
        ("giou+focal(gama=1)", "gamma"),
        ("giou+focal(gamma=x)", "gamma"),
        ("nan*giou", "loss"),
        ("dice+focal", "dice"),
        ("a: giou", "loss"),
        ("giou+focal(ignore_index=0)", "ignore_index"),
        ("giou+focal(class_weights=[1,x])", "class_weights"),
    ):
        for more in ([], ["--print_config"]):
            nowhere = [f"--loss={loss}", "--data.root=nowhere", *more]
            yield from single("train_det", *nowhere, words=[word])
    rcnn = "--model.name=fasterrcnn_mobilenet_v3_large_320_fpn"
    for loss, word in (("rpn: giou+bce; rio: giou+ce", "roi"), ("mask: dice", "mask")):
        nowhere = [f"--loss={loss}", "--data.root=nowhere", rcnn]
        yield from single("train_det", *nowhere, words=[word])
    for loss, word in (
        ("giou+dice", "giou"),
        ("ce(ignore_index=0)", "ignore_index"),
        ("ce(mode='binary')", "mode"),
        ("ce(reduction='none')", "reduction"),
        ("ce(class_weights=[])", "class_weights"),
        ("dcie", "dice"),
        ("rpn: ce", "loss"),
        ("[1, 2]", "loss"),
    ):
        for more in ([], ["--print_config"]):
            nowhere = [f"--loss={loss}", "--data.root=nowhere", *more]
            yield from single("train_seg", *nowhere, words=[word])
    yield from single("train_seg", "--loss=ce(class_weights=[1,2])", words=["class_weights", "5"])
    # The data.
    yield from each("train_det", "data.root", ["null", "nowhere", "@/file.txt", "", "x" * 300])
    for root in ("plain", "empty"):
        yield from single("train_det", f"--data.root=@/{root}", words=[root, "instances"])
    for root in ("plain", "empty", "both"):
        options = ["--data.format=auto", f"--data.root=@/{root}"]
        yield from single("train_det", *options, words=[root, "data.format"])
    for root in ("plain", "coco", "file.txt"):
        options = ["--data.format=shapes", f"--data.root=@/{root}"]
        yield from single("train_det", *options, words=[root])
    yield from single("train_det", "--data.train_split=trian", words=["trian", "train"])
    yield from single("train_seg", "--data.val_split=../val", words=["../val"])
    yield from single("train_det", "--data.train_list=nowhere.txt", words=["nowhere.txt"])
    yield from single("train_det", "--data.val_list=@/coco", words=["coco"])
    yield from single("train_det", "--data.train_list=@/file.txt", words=["file.txt", "line 1"])
    for classes in ("circel", "[circel]", "square,circel", "[square, circel]"):
        yield from single("train_det", f"--data.classes={classes}", words=["'circle'"])
    for classes in ("[]", "", ",", "[square, square]", "{a: 1}"):
        yield from single("train_det", f"--data.classes={classes}", words=["class"])
    yield from single(
        *("train_seg", "--data.format=voc", "--data.root=@/voc", "--data.classes=cat"),
        words=["data.classes"],
    )
    voc = ["--data.format=voc", "--data.root=@/voc"]
    mask = "--model.name=maskrcnn_resnet50_fpn"
    yield from single("train_det", *voc, mask, words=["masks", "coco"])
    yield from single("train_seg", *voc, words=["255", "lesion"])
    yield from single("train_det", *voc, words=["object"])
    yield from single("train_det", "--data.root=@/crowds", words=["crowd"])
    yield from single("train_det", "--data.root=@/nothing", words=["object"])
    yield from single("train_seg", "--data.root=@/nothing", words=["background"])
    yield from single("train_seg", "--data.root=@/crowds", words=["all objects are crowds"])
    yield from single("train_det", "--data.root=@/thin", words=["thin"])
    yield from single("train_det", "--data.root=@/thin", "--data.faults=refuse", words=["thin"])
    # Configuration files.
    for file, word in (
        ("missing.yaml", "missing.yaml"),
        ("@/coco", "coco"),
        ("@/binary.yaml", "binary.yaml"),
        ("@/broken.yaml", "broken.yaml"),
        ("/dev/zero", "device"),
        ("@/list.yaml", "list.yaml"),
        ("@/text.yaml", "text.yaml"),
        ("@/unknown.yaml", "bach_size"),
        ("@/unknown_section.yaml", "trian"),
        ("@/no_data.yaml", "data"),
        ("@/no_train.yaml", "train"),
        ("@/number_data.yaml", "data"),
        ("@/wrong_type.yaml", "train.lr"),
        ("@/infinite.yaml", "train.lr"),
        ("@/bad_loss.yaml", "giou"),
        ("@/twice.yaml", "twice.yaml"),
    ):
        for more in ([], ["--print_config"]):
            yield from single("train_det", f"--config={file}", *more, words=[word])
    for json_value in ("3", "[]", "{x: 1}", "null", "text"):
        yield from single("train_det", f"--data={json_value}", words=["data"])
    # The output.
    yield from single("train_det", "--output=@/file.txt", words=["file.txt"])
    yield from single("train_det", "--output=@/file.txt/run", words=["file.txt"])
    yield from single("train_det", "--output=/dev/null", words=["/dev/null"])
    yield from single("train_det", "--resume", words=["--output"])
    yield from single("train_det", "--resume", "--output=nowhere", words=["nowhere"])
    yield from single("train_det", "--resume", "--output=@/file.txt", words=["file.txt"])
    yield from single("train_seg", "--resume", "--output=@/det", words=["detection"])
    # Evaluation.
    for tool, own, other in (("eval_det", "det", "seg"), ("eval_seg", "seg", "det")):
        other_task = "segmentation" if other == "seg" else "detection"
        yield from single(tool, words=["checkpoint"])
        for file, word in (
            ("missing.ckpt", "missing.ckpt"),
            ("@/coco", "coco"),
            ("@/file.txt", "file.txt"),
            ("@/empty.ckpt", "empty.ckpt"),
            ("@/foreign.ckpt", "foreign.ckpt"),
            (f"@/{own}_nan.ckpt", "NaN or infinity in weight"),
            (f"@/{other}/last.ckpt", other_task),
        ):
            yield from single(tool, f"--checkpoint={file}", words=[word])
        for kind in ODD_OPTIONS:
            train = tool.replace("eval", "train")
            words = ["damaged checkpoint" if kind == "bad_value" else f"{own}_{kind}"]
            yield from single(tool, f"--checkpoint=@/{own}_{kind}/last.ckpt", words=words)
            if kind not in ("no_options", "bad_value"):
                yield from single(train, "--resume", f"--output=@/{own}_{kind}", words=words)
        checkpoint = f"--checkpoint=@/{own}/last.ckpt"
        for option, word in (
            ("--output=@/file.txt", "output"),
            ("--output=@/file.txt/deep/er", "output"),
            ("--batch_size=0", "batch_size"),
            ("--batch_size=nan", "batch_size"),
            ("--data.root=nowhere", "nowhere"),
            ("--data.val_split=tset", "tset"),
            ("--data.classes=[circle]", "class 2" if own == "seg" else "class 1"),
            ("--data.size=1", "data.size"),
            ("--data.std=[0,0,0]", "data.std"),
            ("--data=null", "data"),
            ("--outptu=x", "outptu"),
            ("--outp=x", "outp"),
            (f"--output={'x' * 300}", "output"),
            ("--data.val_list=nowhere.txt", "nowhere.txt"),
            ("--data.faults=refuse", "does not fit"),
        ):
            yield from single(tool, checkpoint, option, words=[word])
    seg = "--checkpoint=@/seg/last.ckpt"
    yield from single("eval_seg", seg, "--save_masks=@/file.txt", words=["save_masks"])
    yield from single("eval_seg", seg, "--save_masks=@/file.txt/x", words=["save_masks"])
    yield from single("eval_seg", seg, "--save_masks=@/coco/val", words=["save_masks", "val"])
    yield from single("eval_seg", seg, "--save_masks=@/coco", words=["save_masks", "coco"])
    yield from each("eval_det", "voc", ["2012", "x"], more=["--checkpoint=@/det/last.ckpt"])
    truth, found = (
        "--annotations=@/coco/annotations/instances_val.json",
        "--predictions=@/found.json",
    )
    yield from single("eval_det", truth, words=["--predictions"])
    yield from single("eval_det", found, words=["--annotations"])
    for voc in ([], ["--voc=2007"]):
        options = ["--annotations=@/no_categories.json", found, *voc]
        yield from single("eval_det", *options, words=["there are no categories"])
    yield from single("eval_det", truth, found, "--output=/proc/x", words=["/proc/x", "written"])
    yield from single("eval_det", truth, found, "--output=@/full", words=["full", "No space"])
    for file in ("missing.json", "@/coco", "@/file.txt", "@/binary.yaml"):
        name = file.rpartition("/")[2]
        yield from single("eval_det", truth, f"--predictions={file}", words=[name])
        yield from single("eval_det", found, f"--annotations={file}", words=[name])
    yield from single("eval_det", truth, found, "--output=@/file.txt", words=["output"])
    yield from single("eval_det", truth, found, "--checkpoint=x", words=["checkpoint"])
    # Conversion.
    yield from single("coco_to_yolo", words=["data"])
    yield from single("coco_to_yolo", "--data=@/coco", words=["output"])
    for options, word in (
        (["--data=nowhere", "--output=out"], "nowhere"),
        (["--data=@/file.txt", "--output=out"], "file.txt"),
        (["--data=@/plain", "--output=out"], "plain"),
        (["--data=@/coco", "--output=@/empty"], "exists"),
        (["--data=@/coco", "--output=@/file.txt"], "exists"),
        (["--data=@/coco", "--output=@/file.txt/out"], "output"),
        (["--data=@/coco", "--output=out", "--train=trian"], "trian"),
        (["--data=@/coco", "--output=out", "--train=../coco"], "../coco"),
        (["--data=@/coco", "--output=out", "--segments=maybe"], "segments"),
        (["--data=@/coco", "--output=out", "--cop"], "--cop"),
        (["--data=@/nothing", "--output=out"], "object"),
        (["--data=@/outside", "--output=out"], "file_name"),
    ):
        yield from single("coco_to_yolo", *options, words=[word])


CASES = list(_cases())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets, checkpoints and files, good ones and bad ones."""
    place = tmp_path_factory.mktemp("place")
    coco = make_shapes(place, number=4, validation=2, size=48).rename(place / "coco")
    content = json.loads((coco / "annotations/instances_train.json").read_text())
    crowds = [a | {"iscrowd": 1} for a in content["annotations"]]
    photo = Image.fromarray(np.zeros((48, 48, 3), np.uint8))

    def write_coco(name: str, annotations: object, file_name: str, size: tuple[int, int]) -> None:
        for split in ("train", "val"):
            (place / name / split).mkdir(parents=True)
            photo.resize(size).save(place / name / split / "1.png")
            image = {"id": 1, "file_name": file_name, "width": size[0], "height": size[1]}
            file = place / name / f"annotations/instances_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content | {"images": [image], "annotations": annotations}))

    first = [a for a in content["annotations"] if a["image_id"] == 1]
    write_coco("crowds", crowds[: len(first)], "1.png", (48, 48))
    write_coco("nothing", [], "1.png", (48, 48))
    write_coco("outside", first, "../../photo.png", (48, 48))
    write_coco("thin", [{**first[0], "bbox": [0, 0, 3000, 2]}], "1.png", (30000, 4))
    photo.save(place / "photo.png")
    _write_voc(place / "voc", photo)
    for name in ("plain", "empty", "both"):
        (place / name).mkdir()
    photo.save(place / "plain/photo.png")
    (place / "both/ImageSets/Main").mkdir(parents=True)
    (place / "both/ImageSets/Main/train.txt").write_text("1\n")
    (place / "both/annotations").mkdir()
    (place / "both/annotations/instances_train.json").write_text("{}")

    for name, config in (("det", DetectionConfig()), ("seg", SegmentationConfig())):
        config.data = DataConfig(format="coco", root=str(coco), size=64)
        classes = ["background", *CLASSES] if name == "seg" else list(CLASSES)
        run = {"task": config.task, "config": to_dict(config), "classes": classes, "model": {}}
        run |= {"step": 1, "best": 0.0, "loss": {}, "optimizer": {}, "precision": {}}
        run["metrics"] = None
        (place / name).mkdir()
        torch.save(run, place / name / "last.ckpt")
        model = {"weight": torch.tensor(float("nan"))}
        torch.save(run | {"model": model}, place / f"{name}_nan.ckpt")
        for kind, odd in ODD_OPTIONS.items():
            (place / f"{name}_{kind}").mkdir()
            torch.save(run | {"config": odd}, place / f"{name}_{kind}/last.ckpt")
    torch.save({"weights": torch.zeros(2)}, place / "foreign.ckpt")
    (place / "empty.ckpt").touch()
    (place / "file.txt").write_text("any text\n")
    (place / "binary.yaml").write_bytes(bytes(range(256)))
    for name, text in {
        "broken": "data: [1, 2",
        "list": "- 1\n- 2\n",
        "text": "some text",
        "unknown": "train: {bach_size: 4}",
        "unknown_section": "trian: {batch_size: 4}",
        "no_data": "data: null",
        "no_train": "train: null",
        "number_data": "data: 3",
        "wrong_type": "train: {lr: fast}",
        "infinite": "train: {lr: .inf}",
        "bad_loss": "loss: giuo+focal",
        "twice": "loss: giou+focal\nloss: l1+focal",
    }.items():
        (place / f"{name}.yaml").write_text(text)
    (place / "no_categories.json").write_text(json.dumps(content | {"categories": []}))
    (place / "full").mkdir()
    (place / "full/metrics.json").symlink_to("/dev/full")
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}]
    (place / "found.json").write_text(json.dumps(found))
    return place


def _write_voc(root: Path, photo: Image.Image) -> None:
    """Two classes, no object, and masks of 0 and 255."""
    for folder in ("Annotations", "JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("background\nlesion\n")
    mask = np.zeros((48, 48), np.uint8)
    mask[10:20, 10:20] = 255
    for name in ("1", "2"):
        photo.save(root / f"JPEGImages/{name}.png")
        (root / f"Annotations/{name}.xml").write_text("<annotation></annotation>")
        Image.fromarray(mask).save(root / f"SegmentationClass/{name}.png")
    for task in ("Main", "Segmentation"):
        (root / "ImageSets" / task).mkdir(parents=True)
        for split in ("train", "val"):
            (root / "ImageSets" / task / f"{split}.txt").write_text("1\n2\n")


def contents(place: Path) -> dict[str, tuple[int, int]]:
    # A disk may be full after the first of two files of a result, which changes its folder's time.
    found = (f for f in place.rglob("*") if f.name != "per_image.npz")
    files = ((str(f.relative_to(place)), f.lstat(), f.is_dir()) for f in found)
    return {
        name: (0, 0) if folder else (stat.st_size, stat.st_mtime_ns) for name, stat, folder in files
    }


def run(tool: str, options: Iterable[str], place: Path) -> object:
    """The exit code of a tool; None where it ran to its end."""
    arguments = [option.replace("@/", f"{place}/") for option in options]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [f"{tool}.py", *arguments])
        warnings.simplefilter("ignore")
        try:
            MAINS[tool].main()
        except SystemExit as end:
            return end.code
    return None


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_a_mistake_is_one_line_and_changes_nothing(
    case: Case,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if case.tool == "coco_to_yolo":
        pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    before = contents(place)
    code = run(case.tool, [*BASE[case.tool.partition("_")[0]], *case.options], place)
    output, error = capfd.readouterr()
    assert code == 2, output
    assert error.startswith(f"{case.tool}.py: error: ")
    assert error.count("\n") == 1, error
    assert len(error) <= 500
    for word in case.words:
        assert word in error
    assert list(tmp_path.iterdir()) == []
    assert contents(place) == before


def test_the_cases_are_many_and_differ() -> None:
    assert len(CASES) >= 300
    assert len({case.id for case in CASES}) == len(CASES)


def test_an_option_nested_too_deeply_is_no_traceback(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("train_seg", [f"--data.size={'[' * 3000}"], place) == 2
    assert capfd.readouterr().err.count("\n") == 1
