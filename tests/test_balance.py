"""Weights that move in training: on a ramp, learned, or balanced by gradients."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from common.config import TrainConfig
from common.engine import _make_optimizer
from detseg_losses import (
    GradNorm,
    LossSum,
    Ramp,
    SigmoidFocalLoss,
    SpecError,
    build_loss,
    cross_entropy_loss,
    dice_loss,
    sigmoid_focal_loss,
)
from detseg_losses.integrations import restore_losses, use_losses
from processes import run_in_processes

MOVING = "learned*ce + ramp(0.25, 1, steps=4)*dice + focal(gamma=ramp(0, 2, steps=4))"


def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(0, 3, (2, 4, 5), generator=generator)


def moving(**options: Any) -> LossSum:
    return build_loss(MOVING, kind="segmentation", mode="multiclass", **options)


@pytest.mark.parametrize(
    ("ramp", "numbers"),
    [
        (Ramp(1, 0, 4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Ramp(0.01, 1, 1), [0.01, 1, 1]),
        (Ramp(0, 1, 2, after=2), [0, 0, 0, 0.5, 1, 1]),
        (Ramp(0, 2, 4, curve="cosine"), [0, 1 - math.sqrt(0.5), 1, 1 + math.sqrt(0.5), 2, 2]),
        (Ramp(-3, -1, 2), [-3, -2, -1]),
    ],
)
def test_numbers_of_a_ramp(ramp: Ramp, numbers: list[float]) -> None:
    assert [ramp.at(step) for step in range(len(numbers))] == pytest.approx(numbers)
    assert ramp.at(ramp.after) == ramp.start
    assert ramp.at(10**6) == ramp.end


@pytest.mark.parametrize(
    ("spec", "column", "message"),
    [
        ("ramp(1)*ce", 1, r"a ramp is written 'ramp\(1, 0.01, steps=1000\)'"),
        ("dice + ramp(0, 1, stps=3)*ce", 8, "a ramp is written"),
        ("ramp(0, a, steps=3)*ce", 1, "a ramp is written"),
        ("ramp(0, 1, steps=0)*ce", 1, "steps must be a whole number from 1, not 0"),
        ("ramp(0, 1, steps=1.5)*ce", 1, "steps must be a whole number from 1, not 1.5"),
        ("ramp(0, 1, steps=1, after=-1)*ce", 1, "after must be a whole number from 0"),
        ("ramp(0, 1e999, steps=9)*ce", 9, "the number '1e999' is too large"),
        ("ramp(0, '1', steps=9)*ce", 1, "end must be a finite number"),
        ("focal(gamma=ramp(0, 1, steps=2, curve='s'))", 13, "curve must be one of"),
        ("focal(gamma=ramp(0, -1, steps=2))", 1, "gamma must be a finite number"),
        ("focal(gamma=ramp(-1, 0, steps=2))", 1, "gamma must be a finite number"),
        ("ce(per_image=ramp(0, 1, steps=2))", 1, "'per_image' of ce cannot be on a ramp"),
        ("learnd*ce", 1, "a weight is a number, as in"),
        ("2*learned*ce", 3, "a loss has one weight"),
        ("learned", 1, r"after a weight there must be '\*' and a loss: 'learned\*ce'"),
    ],
)
def test_errors_point_at_the_column(spec: str, column: int, message: str) -> None:
    with pytest.raises(SpecError, match=f"column {column}: .*{message}"):
        build_loss(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "ramp(1, 0.01, steps=1000)*dice + ramp(0.01, 1, steps=1000, curve='cosine')*ce",
        "learned*giou + 0.5*l1 + learned*focal(gamma=ramp(0, 2, steps=10, after=5))",
        "learned*iou + learned*iou(mode='log')",
    ],
)
def test_repr_builds_the_same_loss(spec: str) -> None:
    loss = build_loss(spec)
    loss.advance()
    assert repr(loss) == spec
    assert build_loss(repr(loss)).weights == loss.weights


def test_weights_of_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="a weight is a number, a Ramp or 'learned', not 'auto'"):
        LossSum([("auto", SigmoidFocalLoss())])  # type: ignore[list-item]


def test_ramps_follow_the_steps_and_not_the_calls() -> None:
    x, y = sample()
    loss = build_loss("ramp(1, 0, steps=4)*dice + ramp(0, 1, steps=4)*ce")
    for step in range(6):
        done = min(step / 4, 1)
        expected = (1 - done) * dice_loss(x, y) + done * cross_entropy_loss(x, y)
        for _ in range(2):
            torch.testing.assert_close(loss(x, y), expected)
        assert loss.factor("ce") == done
        loss.advance()
    assert loss.step == 6


def test_options_on_a_ramp() -> None:
    x, y = sample()
    loss = build_loss("focal(mode='multiclass', gamma=ramp(0, 2, steps=2))", kind="segmentation")
    for gamma in (0, 1, 2, 2):
        expected = sigmoid_focal_loss(x, y, mode="multiclass", gamma=gamma, reduction="mean")
        torch.testing.assert_close(loss(x, y), expected)
        loss.advance()
    alone = SigmoidFocalLoss(mode="multiclass", gamma=Ramp(0, 2, 2))
    alone.step = 1
    assert alone.options["gamma"] == 1
    assert repr(alone) == "focal(gamma=ramp(0, 2, steps=2), mode='multiclass')"


def test_an_option_that_changes_what_is_needed() -> None:
    x, y = sample()
    loss = build_loss("ce(label_smoothing=ramp(0, 0.2, steps=1)) + dice")
    torch.testing.assert_close(loss.compute(x, y)["ce"], cross_entropy_loss(x, y))
    loss.advance()
    smooth = cross_entropy_loss(x, y, label_smoothing=0.2)
    torch.testing.assert_close(loss.compute(x, y)["ce"], smooth)


def test_a_step_between_forward_and_backward() -> None:
    x, y = sample()
    loss = build_loss("ramp(1, 0.5, steps=1)*ce")
    value = loss(x, y)
    loss.advance()
    value.backward()
    (expected,) = torch.autograd.grad(cross_entropy_loss(x, y), x)
    torch.testing.assert_close(x.grad, expected)


def test_learned_weights() -> None:
    """exp(-s) L + s, at its least where exp(-s) = 1 / L."""
    x, y = sample()
    loss = build_loss("learned*ce + 2*dice + learned*jaccard")
    s, t = loss.parameters()
    assert [name for name, _ in loss.named_parameters()] == [
        "log_variance_ce",
        "log_variance_jaccard",
    ]
    plain = build_loss("ce + 2*dice + jaccard")
    assert torch.equal(loss(x, y), plain(x, y))
    with torch.no_grad():
        s.fill_(0.5)
        t.fill_(-1)
    value = loss(x, y)
    plain(x, y)
    expected = {
        "ce": math.exp(-0.5) * plain.values["ce"] + 0.5,
        "dice": plain.values["dice"],
        "jaccard": math.exp(1) * plain.values["jaccard"] - 1,
    }
    torch.testing.assert_close(loss.values, expected, rtol=1e-6, atol=1e-6)
    value.backward()
    torch.testing.assert_close(s.grad, (1 - math.exp(-0.5) * plain.values["ce"]).float())
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    for name in ("ce", "jaccard"):
        torch.testing.assert_close(loss.factor(name).double(), 1 / plain.values[name])


def test_gradcheck_of_input_and_learned_weights() -> None:
    x, y = sample()
    loss = build_loss("learned*ce + ramp(0.5, 1, steps=2)*dice").double()
    names = dict(loss.named_parameters())

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(loss, values, (x, y))

    inputs = (x, *names.values())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_nothing_costs_what_it_should() -> None:
    """Without a pixel a term is s alone, attached to the graph."""
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = build_loss("learned*ce + ramp(1, 0, steps=2)*dice", ignore_index=255)
    value = loss(x, torch.full((1, 2, 2), 255))
    value.backward()
    assert value == 0
    assert (x.grad == 0).all()
    assert loss.log_variance_ce.grad == 1


def test_state_is_restored_to_the_bit() -> None:
    """A run that is stopped and goes on from its state is the run that is not."""
    x, y = sample()

    def run(loss: LossSum, optimizer: Any, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            value = loss(x.detach(), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            loss.advance()
            found.append(value.detach())
        return found

    def make() -> tuple[LossSum, Any]:
        loss = moving()
        return loss, torch.optim.Adam(loss.parameters(), lr=0.1)

    whole = make()
    expected = run(*whole, 6)
    stopped = make()
    run(*stopped, 2)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in stopped], file)
    file.seek(0)
    resumed = make()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[0].step == 2
    assert all(map(torch.equal, run(*resumed, 4), expected[2:]))
    assert str(resumed[0].state_dict()) == str(whole[0].state_dict())


def test_state_of_another_loss_is_refused() -> None:
    state = build_loss("learned*ce + ramp(0, 1, steps=2)*dice").state_dict()
    assert list(state) == ["log_variance_ce", "step"]
    for spec in ("ce + dice", "ce + learned*dice", "learned*ce + learned*dice"):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            build_loss(spec).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*step"):
        build_loss("ramp(0, 1, steps=2)*dice").load_state_dict({})


def test_copies_keep_the_state() -> None:
    x, y = sample()
    loss = moving()
    loss.advance()
    with torch.no_grad():
        loss.log_variance_ce.fill_(0.3)
    value = loss(x, y)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, y), value)
        twin.advance()
        assert (loss.step, twin.step) == (1, 2)
        assert not torch.equal(twin(x, y), value)


def test_devices_and_dtypes(device: torch.device) -> None:
    x, y = sample()
    moved = moving().to("meta")
    moved.advance()
    assert {moved.ramped.device.type, moved.log_variance_ce.device.type} == {"meta"}
    assert moved(x.to("meta"), y.to("meta")).device.type == "meta"
    for loss in (moving(), moving().to(device)):  # also where it was left on the CPU
        loss.advance()
        value = loss(x.to(device), y.to(device))
        assert value.dtype == torch.float64
        assert loss(x.half().to(device), y.to(device)).dtype == torch.float32
        value.backward()
        assert loss.log_variance_ce.grad is not None


@pytest.mark.filterwarnings("ignore")
def test_no_operation_waits_for_the_device() -> None:
    loss = moving()
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss.ramped = torch.empty(3, device="cuda")
        loss.advance()
        assert loss.ramped.device.type == "cuda"
        x = torch.empty(2, 3, 4, 5, device="cuda")
        y = torch.empty(2, 4, 5, dtype=torch.long, device="cuda")
        assert loss(x, y).device.type == "cuda"


def test_compiled_weights_move_without_compiling_anew() -> None:
    x, y = sample()
    torch._dynamo.reset()
    loss = build_loss("learned*ce + ramp(0, 1, steps=20)*dice")
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(x, y), loss(x, y))
        loss.advance()
    assert len(graphs) == 1


def unet() -> nn.Module:
    torch.manual_seed(0)
    options = {"encoder_depth": 3, "decoder_channels": (8, 8, 8), "classes": 3}
    return smp.Unet("resnet18", encoder_weights=None, **options).train()


def test_adapted_models_keep_their_keys_and_find_the_weights() -> None:
    model = unet()
    keys, number = list(model.state_dict()), len(list(model.parameters()))
    use_losses(model, MOVING, mode="multiclass")
    assert list(model.state_dict()) == keys
    assert set(model.state_dict()._metadata) <= {name for name, _ in model.named_modules()}
    assert len(list(model.parameters())) == number + 1
    model.load_state_dict(unet().state_dict())
    decayed, kept = _make_optimizer(model, TrainConfig()).param_groups
    assert kept["weight_decay"] == 0
    assert any(p is model.loss.log_variance_ce for p in kept["params"])
    assert not any(p is model.loss.log_variance_ce for p in decayed["params"])

    x, y = torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    model.loss.advance()
    with torch.no_grad():
        model.loss.log_variance_ce.fill_(0.3)
    losses = model(x, y)
    assert losses["dice"].detach() == model.loss.values["dice"]
    torch.testing.assert_close(
        losses["dice"], 0.4375 * dice_loss(restore_losses(copy.deepcopy(model))(x), y)
    )
    assert list(model.loss.state_dict()) == ["log_variance_ce", "step"]
    other = use_losses(unet(), MOVING, mode="multiclass")
    other.load_state_dict(model.state_dict())
    other.loss.load_state_dict(model.loss.state_dict())
    assert_same_values(other, model, x, y)
    assert_same_values(pickle.loads(pickle.dumps(model)), model, x, y)
    assert len(list(restore_losses(model).parameters())) == number


def assert_same_values(one: Any, other: Any, x: Tensor, y: Tensor) -> None:
    first, second = one(x, y), other(x, y)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_state_is_part_of_a_module_of_ones_own() -> None:
    """Only an adapted model has keys that must not change."""

    def make() -> nn.ModuleDict:
        return nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": moving()})

    module = make()
    module["criterion"].advance()
    keys = {"criterion.log_variance_ce", "criterion.step"}
    assert keys < set(module.state_dict())
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    assert fresh["criterion"].step == 1
    assert torch.equal(fresh["criterion"].ramped, module["criterion"].ramped)


def test_weights_in_a_retinanet() -> None:
    from test_retinanet import CLASSES, small_retinanet

    x = [torch.rand(3, 64, 64)]
    target = [{"boxes": torch.tensor([[4.0, 4, 30, 36]]), "labels": torch.tensor([CLASSES - 1])}]
    model = small_retinanet()
    keys = list(model.state_dict())
    plain = use_losses(model, "giou + l1 + focal")(x, target)
    values = dict(model.head.loss.values)
    use_losses(model, "learned*giou + ramp(0, 1, steps=2)*l1 + learned*focal")
    assert list(model.state_dict()) == keys
    loss = model.head.loss
    assert all(any(p is q for q in model.parameters()) for p in loss.parameters())
    loss.advance()
    with torch.no_grad():
        loss.log_variance_giou.fill_(1)
    found = model(x, target)
    box = math.exp(-1) * values["giou"] + 1 + 0.5 * values["l1"]
    torch.testing.assert_close(found["bbox_regression"].detach(), box)
    torch.testing.assert_close(found["classification"], plain["classification"])
    torch.testing.assert_close(sum(loss.values.values()), sum(found.values()).detach())


class Trunk(nn.Module):
    """A shared layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.shared = nn.Conv2d(2, 4, 1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(x).tanh())


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 5, 6, generator=generator), torch.randint(
        0, 3, (4, 5, 6), generator=generator
    )


def test_gradnorm_makes_the_step_of_the_paper() -> None:
    """The gradient of the objective by autograd, through the norms, in the logarithm."""
    x, y = images()
    model = Trunk()
    loss = build_loss("100*ce + dice")
    balance = GradNorm(loss, model.shared.parameters(), alpha=1.5, lr=0.1)
    first = loss.compute(model(x), y)
    balance.step(first)
    assert torch.equal(loss.first_values, torch.stack(list(loss.values.values())))
    with torch.no_grad():
        model.head.weight.mul_(3)  # the terms have come different ways since
    old = loss.scales.clone()
    terms = loss.compute(model(x), y)
    balance.step(terms)

    log_w = old.log().requires_grad_()
    plain = build_loss("100*ce + dice").compute(model(x), y)
    parameters = list(model.shared.parameters())
    norms = []
    for w, term in zip(log_w.exp(), plain.values(), strict=True):
        grads = torch.autograd.grad(w * term, parameters, create_graph=True)
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm())
    ratio = torch.stack([plain[name].detach() / first[name].detach() for name in plain])
    mean = (sum(norms) / 2).detach()
    target = mean * (ratio / ratio.mean()) ** 1.5
    objective = sum((norm - t).abs() for norm, t in zip(norms, target, strict=True)) / mean
    (slope,) = torch.autograd.grad(objective, log_w)
    new = (log_w.detach() - 0.1 * slope).exp()
    torch.testing.assert_close(loss.scales, new / new.sum() * 2)

    sum(terms.values()).backward()  # still possible, and with the old factors
    for parameter, name in ((model.shared.weight, "shared"), (model.head.weight, "head")):
        expected = torch.autograd.grad(
            old[0] * plain["ce"] + old[1] * plain["dice"], parameter, retain_graph=True
        )
        torch.testing.assert_close(parameter.grad, expected[0], msg=name)


def test_gradnorm_evens_the_norms() -> None:
    x, y = images()
    model = Trunk()
    loss = build_loss("100*ce + 0.01*dice")
    balance = GradNorm(loss, [model.shared.weight], alpha=0)
    for _ in range(600):
        balance.step(loss.compute(model(x), y))
    assert loss.scales.sum().item() == pytest.approx(2)
    norms = [
        torch.autograd.grad(term, model.shared.weight, retain_graph=True)[0].norm()
        for term in loss.compute(model(x), y).values()
    ]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.1)


def test_gradnorm_state_and_errors() -> None:
    x, y = images()
    model = Trunk()
    loss = build_loss("ce + dice")
    assert not loss.state_dict()
    balance = GradNorm(loss, model.shared.parameters())
    balance.step(loss.compute(model(x), y))
    assert list(loss.state_dict()) == ["scales", "first_values"]
    again = build_loss("ce + dice")
    GradNorm(again, model.shared.parameters())
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(model(x), y), loss(model(x), y))
    kept = loss.scales.clone(), loss.first_values.clone()
    balance.step({name: v * torch.inf for name, v in loss.compute(model(x), y).items()})
    assert all(map(torch.equal, kept, (loss.scales, loss.first_values)))
    with pytest.raises(ValueError, match="'ce' does not depend on the parameters"):
        balance.step(loss.compute(model(x).detach().requires_grad_(), y))
    with pytest.raises(ValueError, match="parameters is empty"):
        GradNorm(loss, [])
    with pytest.raises(ValueError, match="GradNorm sets the weight of 'dice', which is learned"):
        GradNorm(build_loss("ce + learned*dice"), model.shared.parameters())


def learn(rank: int | None) -> list[Tensor]:
    """Gradients of a learned weight, inside of a wrapped model and as a criterion, and GradNorm."""
    x, y = images()
    if rank is not None:
        x, y = x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]
    found = []
    sync = rank is not None

    class Inside(Trunk):
        def __init__(self) -> None:
            super().__init__()
            self.loss = build_loss("learned*ce + learned*dice", sync=sync).adapt(self)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.loss(super().forward(x), y)

    inside: nn.Module = Inside()
    parameters = list(inside.parameters())
    inside = inside if rank is None else DistributedDataParallel(inside)
    inside(x, y).backward()
    found += [p.grad for p in parameters if p.grad is not None]

    loss = build_loss("learned*ce + learned*dice", sync=sync)
    criterion = loss if rank is None else DistributedDataParallel(loss)
    criterion(Trunk()(x), y).backward()
    found += [p.grad for p in loss.parameters() if p.grad is not None]

    model = Trunk()
    loss = build_loss("ce + 0.1*dice", sync=sync)
    balance = GradNorm(loss, model.shared.parameters())
    balance.step(loss.compute(model(x), y))
    found.append(loss.scales)
    assert not dist.is_initialized() or dist.get_world_size() == 2
    return found


def test_processes_learn_the_same() -> None:
    one = learn(None)
    first, second = run_in_processes(learn)
    assert len(one) == 9
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b)
        if index < 8:
            torch.testing.assert_close(a, one[index], rtol=1e-4, atol=1e-6)


RAMPS = ["ramp(0, 1, steps=9)*ce + dice", "focal(gamma=ramp(0, 2, steps=9))"]


def calls(loss: LossSum, number: int = 60) -> list[str]:
    """What is said in so many calls."""
    x, y = torch.zeros(1, 1, 2, requires_grad=True), torch.zeros(1, 2).long()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(number):
            loss(x.expand(1, 2, 2) if loss.names[0] == "ce" else x, y)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("spec", RAMPS)
def test_a_ramp_that_nobody_advances_is_said_once(spec: str) -> None:
    loss = build_loss(spec, kind="segmentation")
    assert not calls(loss, 49)
    (found,) = calls(loss, 100)
    assert "after 50 training calls the ramp in" in found
    assert "call advance() of the loss after each optimizer step" in found


@pytest.mark.parametrize("spec", [*RAMPS, "learned*ce", "ce"])
def test_nothing_is_said_of_a_ramp_that_goes_on_or_does_not_train(spec: str) -> None:
    loss = build_loss(spec, kind="segmentation")
    assert not calls(loss.eval())
    with torch.no_grad():
        assert not calls(loss.train())
    loss.advance()
    assert not calls(loss)
