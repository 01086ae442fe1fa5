"""The examples in the docstrings of all public names, as doctests."""

import doctest
import inspect

import pytest
import torch

import detseg_losses
from detseg_losses import memory

ASSUMED = {"torch": torch} | {name: getattr(detseg_losses, name) for name in detseg_losses.__all__}
"""What every example may use without an import, as the package's docstring says."""

DOCUMENTED = [getattr(detseg_losses, name) for name in detseg_losses.__all__ if name != "LOSSES"]
PUBLIC = [
    *[each for each in DOCUMENTED if "function" not in vars(each)],  # else that has the example
    memory.reuse,
]


def name_of(documented):
    return f"{documented.__module__}.{documented.__qualname__}".removeprefix("detseg_losses.")


@pytest.mark.parametrize("documented", PUBLIC, ids=name_of)
def test_example(documented, capsys):
    """There is one, and it prints what it says."""
    text = inspect.getdoc(documented)
    assert text.count("Examples:\n") == 1
    name = name_of(documented)
    test = doctest.DocTestParser().get_doctest(text, dict(ASSUMED), name, None, None)
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert not result.failed, capsys.readouterr().out


def test_module_shows_the_example_of_its_function():
    modules = [each for each in DOCUMENTED if "function" in vars(each)]
    assert {*modules} == {*detseg_losses.LOSSES.values()}
    for module in modules:
        assert module.__doc__.count(f"    >>> {module.function.__name__}(") >= 1
