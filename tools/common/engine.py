"""The training loop on Lightning Fabric: many devices, mixed precision, exact resuming."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

from common.checkpoint import first_not_finite, load_checkpoint, load_state, save_checkpoint
from common.config import TrainConfig, TrainingConfig, to_dict
from common.data import Batch, TrainingImages, TrainingOrder, collate
from common.errors import Interrupted, ReportedError, UsageError, writing
from common.launch import agreed
from common.metrics_log import MetricsLog
from common.per_image import PerImage, write_per_image
from common.signals import Signals, outlive_signals

import numpy as np
import torch
import torch.distributed
import yaml
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from detseg_losses.integrations import ModelLosses, model_losses
from detseg_losses.integrations.samples import Fault, shown

Losses = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]
Evaluate = Callable[[], tuple[dict[str, Any], PerImage | None]]


def fit(
    fabric: Fabric,
    signals: Signals,
    model: nn.Module,
    images: TrainingImages,
    config: TrainingConfig,
    output: Path,
    metric: str,
    losses: Losses,
    evaluate: Evaluate,
) -> None:
    """Train ``model`` in place; leave its checkpoints and logs.

    They are last.ckpt, best.ckpt with per_image.npz, metrics.csv, cost.json, and TensorBoard's.

    Args:
        fabric: launched.
        signals: entered; on SIGINT and SIGTERM the last finished step is kept.
        model: adapted to its losses, whose ramps and learned weights are part of the training;
            with ``config.resume`` it gets the weights of last.ckpt first.
        images: the training images.
        config: the configuration of the run.
        output: folder of the run.
        metric: the key of the metrics whose greatest value decides which epoch is the best.
        losses: from the model and a batch to the loss and the value of each of its terms.
        evaluate: the metrics of the model as it is, and what it did in each image, which the first
            process needs; called by every process.

    Raises:
        UsageError: if the batches cannot be divided as configured, the run to resume had other
            classes, learned weights, another model or optimizer, the loss or the weights are no
            longer finite, or a file cannot be written.
        Interrupted: by a signal.
    """
    run = _Training(fabric, signals, model, images, config, output, metric, losses, evaluate)
    run.train()


class _Training:
    """A run of :func:`fit`, whose arguments it has."""

    def __init__(
        self,
        fabric: Fabric,
        signals: Signals,
        model: nn.Module,
        images: TrainingImages,
        config: TrainingConfig,
        output: Path,
        metric: str,
        losses: Losses,
        evaluate: Evaluate,
    ) -> None:
        self.fabric, self.signals = fabric, signals
        self.model, self.losses, self.evaluate = model, losses, evaluate
        self.images, self.config = images, config
        self.output, self.last, self.metric = output, output / "last.ckpt", metric
        self.criterion = model_losses(model)
        self.make_order = partial(
            TrainingOrder,
            len(images),
            config.train.batch_size,
            seed=config.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            accumulate=config.train.accumulate,
        )
        self.steps_per_epoch = self.make_order(0, 0).steps_per_epoch
        self.total = config.train.epochs * self.steps_per_epoch
        self.step, self.best = 0, -math.inf
        self.judged = False  # whether the model was evaluated after this step
        self.saved = 0  # the step of last.ckpt
        self.unseen: list[tuple[int, dict[str, Tensor]]] = []  # losses not yet looked at
        self.new_faults: list[Fault] = []
        self.faults: set[str] = set()
        self.times: list[float] = []  # seconds of the steps of this process
        self.log: MetricsLog | None = None  # on the first process alone

        if fabric.world_size > 1 and fabric.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.wrapped, self.optimizer = fabric.setup(model, _make_optimizer(model, config.train))
        # Signals, errors and faults are agreed on without waiting for the devices.
        self.group: torch.distributed.ProcessGroup | None = None
        if fabric.world_size > 1:
            self.group = cast(Any, torch.distributed.new_group(backend="gloo"))

    def train(self) -> None:
        """Train to the end, or to a signal."""
        if self.config.resume:
            self._resume()
        elif (name := first_not_finite(self.model.state_dict())) is not None:
            weights = self.config.model.weights
            raise UsageError(f"model.weights={weights}: NaN or infinity in {name}")
        with self._progress() as self.bar:
            self._on_first(self._open_files)
            try:
                with self.signals.deferred():
                    self._take_steps()
            finally:
                if self.log is not None:
                    with writing(self.output):
                        self.log.close()
        self.fabric.barrier()

    def _take_steps(self) -> None:
        train = self.config.train
        if self.step == 0:
            self._save_last()  # from now on the run can be resumed
        if self._evaluation_is_due():
            self._judge()
        batches = iter(self._loader())
        while self.step < self.total:
            began = time.perf_counter()
            parts = self._next_parts(batches)
            lr = train.lr * _rate(train.schedule, self.step / self.total)
            values = self._take_step(parts, lr)
            self.step += 1
            self.judged = False
            self.criterion.advance()
            self.bar.update()
            epoch_ends = self.step % self.steps_per_epoch == 0
            logged = self.step == 1 or epoch_ends or self.step % train.log_every == 0
            if logged:
                self._log_step(lr, values)
            if logged or self.fabric.device.type == "cpu":  # where looking waits for nothing
                self._look()
            self.times.append(time.perf_counter() - began)
            if epoch_ends or self.step % train.checkpoint_every == 0:
                self._save_last()
            if self._evaluation_is_due():
                self._judge()
        self._on_first(self._write_cost)
        if self.faults:
            self._say(f"{len(self.faults)} faulty images were skipped in training")

    def _write_cost(self) -> None:
        """Write cost.json: the mean time of a step, with its data and without evaluations.

        The first step is left out where there are others: it warms up. After ``--resume`` it is
        the time of what was left.
        """
        if not self.times:
            return
        cost: dict[str, float] = {"seconds_per_step": float(np.mean(self.times[1:] or self.times))}
        if self.fabric.device.type == "cuda":
            cost["gpu_gigabytes"] = torch.cuda.max_memory_allocated(self.fabric.device) / 1e9
        (self.output / "cost.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")

    # Before the first step

    def _resume(self) -> None:
        checkpoint = load_checkpoint(self.last, self.config.task)
        if checkpoint["classes"] != self.images.data.classes:
            raise UsageError(
                f"{self.output} was trained for other classes: {checkpoint['classes']}"
            )
        now = _lasting(to_dict(self.config))
        for option, value in _lasting(checkpoint["config"]).items():
            if now.get(option) != value:
                raise UsageError(
                    f"{self.output} has {option}={value}, which a resumed run has to keep"
                )
        loss = checkpoint["config"]["loss"]
        load_state(self.model, checkpoint["model"], f"the model of {self.last}")
        load_state(
            self.criterion,
            checkpoint.get("loss", {}),
            f"{self.output} has the state of {loss!r}, which",
        )
        self._resume_optimizer(checkpoint["optimizer"])
        if checkpoint["precision"]:  # empty after a run in another precision
            precision = self.fabric.strategy.precision
            load_state(precision, checkpoint["precision"], f"the loss scale of {self.last}")
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.saved, self.judged = self.step, checkpoint.get("judged", True)
        if loss != self.config.loss:
            self._say(
                f"after step {self.step} the loss is {self.config.loss!r}, no longer {loss!r}"
            )

    def _resume_optimizer(self, state: dict[str, Any]) -> None:
        options = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        origin = f"the optimizer of {self.last}"
        load_state(self.optimizer, state, origin)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # they are those of the configuration, and may be given anew
            for parameter in group["params"]:
                if found := self.optimizer.state.get(parameter):
                    _check_moments(found, parameter, origin)

    def _progress(self) -> tqdm[Any]:
        return tqdm(
            total=self.total,
            initial=self.step,
            unit="step",
            disable=not self.fabric.is_global_zero,
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )

    def _open_files(self) -> None:
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        (self.output / "config.yaml").write_text(text)
        self.log = MetricsLog(self.output, self.step)
        if self.log.note is not None:
            self._say(self.log.note)

    def _loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self.images,
            batch_sampler=self.make_order(self.step, self.total),
            num_workers=self.config.data.workers,
            pin_memory=self.fabric.device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=outlive_signals,
        )

    # One step

    def _next_parts(self, batches: Iterator[Batch]) -> list[Batch]:
        """The parts of the next batch, once every process has its own.

        Where one has not, because of a signal or of an error, each of them stops, after the last
        finished step was saved.
        """
        failure: BaseException | None = None
        parts: list[Batch] = []
        try:
            with self.signals.at_once():
                parts = [next(batches) for _ in range(self.config.train.accumulate)]
        except (Exception, Interrupted) as error:
            failure = error
        code = 0 if failure is None else 2
        if isinstance(failure, Interrupted):
            code = 128 + failure.number
        if self.group is not None:
            worst = torch.tensor(code)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, self.group)
            code = int(worst)
        if code:
            self._save_last()
            if code > 2 and (failure is None or isinstance(failure, Interrupted)):
                done = f"interrupted: step {self.step} of {self.total} is in {self.last}"
                raise Interrupted(code - 128, done)
            raise failure or ReportedError("another process failed")
        for part in parts:
            self.new_faults += part.pop("faults", [])
        return parts

    def _take_step(self, parts: list[Batch], lr: float) -> dict[str, Tensor]:
        """Make one optimizer step; return the loss, its terms and their moving weights."""
        train = self.config.train
        weights = _moving_weights(self.criterion)
        self.wrapped.train()
        values: dict[str, Tensor] = {}
        try:
            for part, batch in enumerate(parts):
                for name, value in self._backward(part, batch).items():
                    values[name] = values.get(name, 0.0) + value / train.accumulate
        except Exception as error:
            self._look_alone()  # what went wrong before can be the reason
            if "more than 1 value per channel" in str(error):
                kind = UsageError if self.fabric.is_global_zero else ReportedError
                raise kind(
                    "the batch norm of this model cannot be trained on one image at a time "
                    f"(train.batch_size={train.batch_size}, train.accumulate={train.accumulate}, "
                    f"devices: {self.fabric.world_size}), for it meets maps of a single pixel: "
                    "raise train.batch_size"
                ) from error
            raise
        norm = self.fabric.clip_gradients(
            self.wrapped, self.optimizer, max_norm=train.clip or math.inf, error_if_nonfinite=False
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        values |= weights
        # Under float16 the scaler skips steps whose gradient is not finite, and goes on.
        gradient = {} if norm is None or train.precision == "16-mixed" else {"gradient norm": norm}
        self.unseen.append((self.step + 1, values | gradient))
        return values

    def _backward(self, part: int, batch: Batch) -> dict[str, Tensor]:
        fabric, accumulate = self.fabric, self.config.train.accumulate
        # Dropout must not depend on what happened before, so that a resumed run is exact.
        entropy = np.random.SeedSequence([self.config.seed, self.step, part, fabric.global_rank])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        waits = fabric.world_size > 1 and part < accumulate - 1
        with fabric.no_backward_sync(self.wrapped, enabled=waits):
            loss, terms = self.losses(self.wrapped, fabric.to_device(batch))
            fabric.backward(loss / accumulate)
        return {"loss": loss.detach(), **terms}

    def _log_step(self, lr: float, values: dict[str, Tensor]) -> None:
        terms = _mean_over_processes(self.fabric, values)
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        self._write_row({"epoch": epoch, "lr": lr, **terms})
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in terms.items()}, refresh=False)

    # Evaluation

    def _evaluation_is_due(self) -> bool:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        ends = position == 0 < epoch and epoch % self.config.train.eval_every == 0
        return not self.judged and (ends or self.step >= self.total)

    def _judge(self) -> None:
        _equalize_buffers(self.fabric, self.model)
        # Several processes stop together, so that one alone finishes its part of the evaluation.
        with self.signals.at_once() if self.group is None else nullcontext():
            found, images = self.evaluate()
        metrics = {"epoch": self.step // self.steps_per_epoch, **found}
        self._write_row(metrics)
        self._say(_in_words(metrics))
        self.judged = True
        if (value := metrics[self.metric] or 0.0) >= self.best:
            self.best = value
            self._on_first(lambda: self._save_best(metrics, images))
        self._save_last()

    # Files

    def _on_first(self, action: Callable[[], None]) -> None:
        """Let the first process write files; where it cannot, none goes on."""

        def act() -> None:
            with writing(self.output):
                action()

        agreed(self.fabric, act)

    def _write_row(self, values: dict[str, Any]) -> None:
        self._on_first(lambda: cast(MetricsLog, self.log).write(self.step, values))

    def _save_last(self) -> None:
        """Save last.ckpt, unless something is not finite: then the old one is kept."""
        self._look()
        self._on_first(lambda: self._save(self.last.name))
        self.saved = self.step

    def _save_best(self, metrics: dict[str, Any], images: PerImage | None) -> None:
        if images is not None:
            write_per_image(self.output, images)
        self._save("best.ckpt", metrics)

    def _save(self, name: str, metrics: dict[str, Any] | None = None) -> None:
        content = {
            "task": self.config.task,
            "config": to_dict(self.config),
            "classes": self.images.data.classes,
            "step": self.step,
            "best": self.best,
            "judged": self.judged,
            "model": self.model.state_dict(),
            "loss": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "metrics": metrics,
        }
        if (place := first_not_finite(content)) is not None:
            raise UsageError(
                f"after step {self.step} there is NaN or infinity in {place}, though the loss was "
                f"finite: {self._remedy(self.step + 1)}; {self._kept()}"
            )
        save_checkpoint(self.output / name, content)

    def _say(self, line: str) -> None:
        if self.fabric.is_global_zero:
            tqdm.write(line)

    # What is not finite, and faulty images

    def _look(self) -> None:
        """Look at the steps since the last look, which waits for the device, on every process.

        Raises:
            UsageError: if a loss, a term or a gradient was not finite.
        """
        mine = (self._first_not_finite(), self.new_faults)
        self.unseen, self.new_faults = [], []
        everyone = [mine]
        if self.group is not None:
            everyone = [mine] * self.fabric.world_size
            torch.distributed.all_gather_object(everyone, mine, self.group)
        for _, faults in everyone:
            for fault in map(str, faults):
                if fault not in self.faults:
                    self.faults.add(fault)
                    self._say(f"skipped: {fault}")
        if found := [first for first, _ in everyone if first is not None]:
            kind = UsageError if self.fabric.is_global_zero else ReportedError
            raise kind(f"{min(found)[-1]}; {self._kept()}")

    def _look_alone(self) -> None:
        if (found := self._first_not_finite()) is not None:
            raise UsageError(f"{found[-1]}; {self._kept()}")

    def _first_not_finite(self) -> tuple[int, bool, str] | None:
        """The first such step, whether its loss is finite, and what there is to say of it."""
        if not self.unseen:
            return None
        finite = [torch.stack([*values.values()]).isfinite().all() for _, values in self.unseen]
        for (step, values), good in zip(self.unseen, torch.stack(finite).tolist(), strict=True):
            if not good:
                numbers = {name: value.item() for name, value in values.items()}
                loss = math.isfinite(numbers["loss"])
                terms = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
                return (
                    step,
                    loss,
                    f"the {'gradient' if loss else 'loss'} of step {step} is not finite ({terms}; "
                    f"images {self._names(step)}): {self._remedy(step)}",
                )
        return None

    def _names(self, step: int, shown: int = 4) -> str:
        """The images of this process in a step."""
        names = self.images.data.names
        batch = [names[index] for part in self.make_order(step - 1, step) for _, index in part]
        rest = f" and {len(batch) - shown} more" if len(batch) > shown else ""
        return ", ".join(batch[:shown]) + rest

    def _remedy(self, step: int) -> str:
        train = self.config.train
        if step == 1:
            return (
                "no step was taken before, so look at these images, data.mean and data.std, "
                "model.weights, and the options of the loss"
            )
        narrow = "take train.precision=bf16-mixed, or " if train.precision == "16-mixed" else ""
        clip = f"train.clip ({train.clip:g})" if train.clip else "clip gradients with train.clip"
        return f"{narrow}lower train.lr ({train.lr:g}) or {clip}"

    def _kept(self) -> str:
        return f"{self.last} of step {self.saved} is kept"


def _moving_weights(criterion: ModelLosses) -> dict[str, Tensor]:
    """The weights that are on a ramp or learned, for the log."""
    factors = criterion.factors.items()
    return {f"weight_{name}": f.detach() for name, f in factors if isinstance(f, Tensor)}


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """The options on which the content of a checkpoint depends."""
    model = {f"model.{option}": value for option, value in config["model"].items()}
    return model | {"train.optimizer": config["train"].get("optimizer")}


_MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
"""What AdamW and SGD keep of each parameter."""


def _check_moments(found: Any, parameter: Tensor, origin: str) -> None:
    """Raise a UsageError where the optimizer could not make a step with it."""
    if not isinstance(found, dict) or {*found} not in _MOMENTS:
        raise UsageError(f"{origin} does not fit: it keeps {shown(found)} of a parameter")
    for name, value in found.items():
        shape = () if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != shape:
            size = tuple(value.shape) if isinstance(value, Tensor) else shown(value)
            raise UsageError(f"{origin} does not fit: {name} is {size}")


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
