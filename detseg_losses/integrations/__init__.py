"""In a checkout, this package is the folder ``integrations`` beside ``detseg_losses``.

A wheel has that folder in this place. The ``.pyi`` files here tell type checkers, which do not run
this module, where each of the modules is.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location(
    __name__, Path(__file__).resolve().parents[2] / "integrations" / "__init__.py"
)
assert _spec is not None
assert _spec.loader is not None
sys.modules[__name__] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
