"""The training loop on Lightning Fabric: many devices, mixed precision, exact resuming."""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
import yaml
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import TrainConfig, TrainingConfig, to_dict
from common.data import Batch, TrainingImages, TrainingOrder, collate
from common.errors import UsageError
from detseg_losses.integrations import ModelLosses

Losses = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
Evaluate = Callable[[], dict[str, Any]]


def start(config: TrainingConfig) -> tuple[Fabric, Path]:
    """Choose the output folder, and launch the processes.

    Under ``torchrun`` the number of processes is that of its environment: Fabric's own choice on a
    CPU would be one device for each, and runs that know nothing of each other.

    Raises:
        UsageError: if the folder holds a run that is not to be resumed.
    """
    output = _choose_output(config)  # before any process can write
    devices: int | str = config.train.devices
    nodes = 1
    if "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = world_size // devices
    fabric = Fabric(devices=devices, num_nodes=nodes, precision=config.train.precision)
    fabric.launch()
    return fabric, fabric.broadcast(output)


def _choose_output(config: TrainingConfig) -> Path:
    if config.output is None:
        kind = "det" if config.task == "detection" else "seg"
        return next(p for n in count(1) if not (p := Path(f"runs/{kind}-{n}")).exists())
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file, not a folder")
    if not config.resume and (output / "last.ckpt").exists():
        raise UsageError(f"{output} holds a run: add --resume to go on, or name another folder")
    return output


def fit(
    fabric: Fabric,
    model: nn.Module,
    images: TrainingImages,
    config: TrainingConfig,
    output: Path,
    metric: str,
    losses: Losses,
    evaluate: Evaluate,
) -> None:
    """Train ``model`` in place; leave last.ckpt, best.ckpt, metrics.csv and TensorBoard logs.

    Args:
        fabric: launched.
        model: adapted to its losses, whose ramps and learned weights are part of the training;
            with ``config.resume`` it gets the weights of last.ckpt first.
        images: the training images.
        config: the configuration of the run.
        output: folder of the run.
        metric: the key of the metrics whose greatest value decides which epoch is the best.
        losses: from the model and a batch to the loss and the value of each of its terms.
        evaluate: the metrics of the model as it is; called by every process.

    Raises:
        UsageError: if the batches cannot be divided as configured, the run to resume had other
            classes, learned weights, another model or optimizer, or the loss is no longer finite.
    """
    train = config.train
    criterion = ModelLosses(model)
    make_order = partial(
        TrainingOrder,
        len(images),
        train.batch_size,
        seed=config.seed,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        accumulate=train.accumulate,
    )
    steps_per_epoch = make_order(0, 0).steps_per_epoch
    total = train.epochs * steps_per_epoch
    step, best = 0, -math.inf

    if fabric.world_size > 1 and fabric.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    wrapped, optimizer = fabric.setup(model, _make_optimizer(model, train))
    if config.resume:
        checkpoint = load_checkpoint(output / "last.ckpt", config.task)
        if checkpoint["classes"] != images.data.classes:
            raise UsageError(f"{output} was trained for other classes: {checkpoint['classes']}")
        now = _lasting(to_dict(config))
        for option, value in _lasting(checkpoint["config"]).items():
            if now[option] != value:
                raise UsageError(f"{output} has {option}={value}, which a resumed run has to keep")
        model.load_state_dict(checkpoint["model"])
        try:
            criterion.load_state_dict(checkpoint.get("loss", {}))
        except RuntimeError as error:
            stored = checkpoint["config"]["loss"]
            raise UsageError(f"{output} has the state of {stored!r}: {error}") from error
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # may be given anew, as lr is
        fabric.strategy.precision.load_state_dict(checkpoint["precision"])
        step, best = checkpoint["step"], checkpoint["best"]

    def save(name: str, metrics: dict[str, Any] | None = None) -> None:
        if not fabric.is_global_zero:
            return
        content = {
            "task": config.task,
            "config": to_dict(config),
            "classes": images.data.classes,
            "step": step,
            "best": best,
            "model": model.state_dict(),
            "loss": criterion.state_dict(),
            "optimizer": optimizer.state_dict(),
            "precision": fabric.strategy.precision.state_dict(),
            "metrics": metrics,
        }
        save_checkpoint(output / name, content)

    def judge() -> None:
        nonlocal best
        _equalize_buffers(fabric, model)
        metrics = {"epoch": step // steps_per_epoch, **evaluate()}
        log.write(step, metrics)
        bar.write(_in_words(metrics))
        if (value := metrics[metric] or 0.0) >= best:
            best = value
            save("best.ckpt", metrics)

    if fabric.is_global_zero:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    log = MetricsLog(output, step, enabled=fabric.is_global_zero)
    bar = tqdm(
        total=total,
        initial=step,
        unit="step",
        disable=not fabric.is_global_zero,
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )
    loader = DataLoader(
        images,
        batch_sampler=make_order(step, total),
        num_workers=config.data.workers,
        pin_memory=fabric.device.type == "cuda",
        collate_fn=collate,
    )
    if step == 0:
        save("last.ckpt")  # from now on the run can be resumed
    if total == 0:
        judge()
    batches = iter(loader)
    while step < total:
        lr = train.lr * _rate(train.schedule, step / total)
        weights = _moving_weights(criterion)
        values = _take_step(fabric, wrapped, optimizer, batches, losses, config, step, lr) | weights
        step += 1
        criterion.advance()
        bar.update()
        epoch_ends = step % steps_per_epoch == 0
        if step == 1 or epoch_ends or step % train.log_every == 0:
            terms = _mean_over_processes(fabric, values)
            log.write(step, {"epoch": (step - 1) // steps_per_epoch + 1, "lr": lr, **terms})
            bar.set_postfix({k: f"{v:.3g}" for k, v in terms.items()}, refresh=False)
            if not math.isfinite(terms["loss"]):
                raise UsageError(f"the loss of step {step} is not finite ({terms}); lower train.lr")
        if epoch_ends and (step // steps_per_epoch % train.eval_every == 0 or step == total):
            judge()
        if epoch_ends or step % train.checkpoint_every == 0:
            save("last.ckpt")
    bar.close()
    log.close()
    fabric.barrier()


def _take_step(
    fabric: Fabric,
    wrapped: _FabricModule,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    losses: Losses,
    config: TrainingConfig,
    step: int,
    lr: float,
) -> dict[str, Tensor]:
    """Make one optimizer step; return the loss and its terms on this process."""
    train = config.train
    wrapped.train()
    values: dict[str, Tensor] = {}
    for part in range(train.accumulate):
        # Dropout must not depend on what happened before, so that a resumed run is exact.
        entropy = np.random.SeedSequence([config.seed, step, part, fabric.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        waits = fabric.world_size > 1 and part < train.accumulate - 1
        with fabric.no_backward_sync(wrapped, enabled=waits):
            loss, terms = losses(wrapped, fabric.to_device(next(batches)))
            fabric.backward(loss / train.accumulate)
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0.0) + value / train.accumulate
    if train.clip > 0:
        # Under float16 the scaler skips steps whose gradient is not finite.
        fabric.clip_gradients(wrapped, optimizer, max_norm=train.clip, error_if_nonfinite=False)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return values


def _moving_weights(criterion: ModelLosses) -> dict[str, Tensor]:
    """The weights that are on a ramp or learned, for the log."""
    factors = criterion.factors.items()
    return {f"weight_{name}": f.detach() for name, f in factors if isinstance(f, Tensor)}


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """The options on which the content of a checkpoint depends."""
    model = {f"model.{option}": value for option, value in config["model"].items()}
    return model | {"train.optimizer": config["train"]["optimizer"]}


def _make_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if train.optimizer == "sgd":
        return SGD(groups, lr=train.lr, momentum=0.9)
    # A fused optimizer unscales float16 gradients itself, where clipping could not see them.
    return AdamW(groups, lr=train.lr, fused=train.precision != "16-mixed")


def _rate(schedule: str, progress: float) -> float:
    """The factor of the learning rate, a function of the finished part of the run alone."""
    if schedule == "constant":
        return 1.0
    warm = 0.2 if schedule == "onecycle" else 0.0
    if progress < warm:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warm)) / 2
    return (1 + math.cos(math.pi * (progress - warm) / (1 - warm))) / 2


def _equalize_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every process the buffers (batch norm statistics) of the first, which are saved."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _mean_over_processes(fabric: Fabric, values: dict[str, Tensor]) -> dict[str, float]:
    mean = cast(Tensor, fabric.all_reduce(torch.stack(list(values.values())), reduce_op="mean"))
    return dict(zip(values, mean.tolist(), strict=True))


def _in_words(metrics: dict[str, Any]) -> str:
    numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
    return f"epoch {metrics['epoch']}: " + "  ".join(f"{k} {v:.3f}" for k, v in numbers.items())


class MetricsLog:
    """metrics.csv and TensorBoard files: a row for each step that is logged.

    Args:
        output: folder of the run.
        step: the step from which it goes on; later rows of an interrupted run are dropped.
        enabled: whether this process writes.
    """

    def __init__(self, output: Path, step: int, enabled: bool) -> None:
        self.file = output / "metrics.csv"
        self.enabled = enabled
        self.columns: list[str] = []
        self.rows: list[dict[str, float]] = []
        if enabled:
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
            for row in read_metrics(self.file) if step else []:
                if row["step"] <= step:
                    self._add(row)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add the numbers among ``values``."""
        if self.enabled:
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            self._add({"step": step, **numbers})
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard still holds in memory."""
        if self.enabled:
            self.board.close()

    def _add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        new_columns = [name for name in row if name not in self.columns]
        self.columns += new_columns
        # A new column means a new file, put in place when it is whole.
        file = self.file.with_suffix(".unfinished") if new_columns else self.file
        with file.open("w" if new_columns else "a", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            if new_columns:
                writer.writeheader()
            writer.writerows(self.rows if new_columns else [row])
        if new_columns:
            file.replace(self.file)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv, each without its empty cells."""
    with file.open(newline="") as stream:
        return [
            {
                name: int(cell) if cell.isdigit() else float(cell)
                for name, cell in row.items()
                if cell
            }
            for row in csv.DictReader(stream)
        ]
