"""`python -m minigpt4_jax.train --config=NAME --workdir=DIR ...`: train a model (cli/train.py).

In Python, `minigpt4_jax.train(config, workdir)` runs a training: the module itself is callable.
"""

import sys
from types import ModuleType
from typing import Any

from minigpt4_jax.cli.train import run, train


class _CallableModule(ModuleType):
    """Python binds a submodule to its name in the package whenever it is first imported, so
    `minigpt4_jax.train` cannot reliably be a function. A callable module works in any import order."""

    def __call__(self, config: Any, workdir: Any, **options: Any) -> Any:
        return train(config, workdir, **options)


if __name__ == "__main__":
    run()
else:
    sys.modules[__name__].__class__ = _CallableModule
