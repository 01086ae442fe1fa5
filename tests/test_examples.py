"""The examples in the docstrings of all public names, as doctests."""

import doctest
import inspect
from importlib.util import find_spec

import pytest
import torch

import detseg_losses
from detseg_losses import integrations, memory
from detseg_losses.integrations import torchvision_ops


def public(package):
    """The public names of a package that can have a docstring."""
    found = {name: getattr(package, name) for name in package.__all__}
    return {name: each for name, each in found.items() if callable(each)}


DOCUMENTED = public(detseg_losses).values()
CASES = [
    # The module form of a loss is documented from its function, which has the example.
    *[(each, detseg_losses) for each in DOCUMENTED if "function" not in vars(each)],
    *[(each, integrations) for each in public(integrations).values()],
    *[(each, torchvision_ops) for each in public(torchvision_ops).values()],
    (memory.reuse, detseg_losses),
]


def name_of(documented):
    return f"{documented.__module__}.{documented.__qualname__}".removeprefix("detseg_losses.")


@pytest.mark.parametrize(
    ("documented", "package"), CASES, ids=[name_of(documented) for documented, _ in CASES]
)
def test_example(documented, package, capsys):
    """There is one, and it prints what it says.

    It may use torch and the public names of its package without importing them, as the package's
    docstring says.
    """
    text = inspect.getdoc(documented)
    assert text.count("Examples:\n") == 1
    if "from torchvision" in text and find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    test = doctest.DocTestParser().get_doctest(
        text, {"torch": torch} | public(package), name_of(documented), None, None
    )
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert not result.failed, capsys.readouterr().out


def test_module_shows_the_example_of_its_function():
    modules = [each for each in DOCUMENTED if "function" in vars(each)]
    assert {*modules} == {*detseg_losses.LOSSES.values()}
    for module in modules:
        assert module.__doc__.count(f"    >>> {module.function.__name__}(") >= 1
