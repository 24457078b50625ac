"""The names of `minigpt4_jax`: what they are, that they are lazy, and `train` in every import order."""

import inspect
import itertools
import subprocess
import sys

import pytest
from helpers.paths import ROOT

import minigpt4_jax


def run(code):
    """stdout of a new Python process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_listed():
    listed = {name for name in dir(minigpt4_jax) if not name.startswith("__")}
    assert listed == set(minigpt4_jax.__all__)
    for name in minigpt4_jax.__all__:
        value = getattr(minigpt4_jax, name)
        assert callable(value) and (name == "train" or value.__name__ == name)
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        minigpt4_jax.lode  # noqa: B018


@pytest.mark.smoke
def test_importing_the_package_and_listing_its_names_does_not_import_jax():
    code = "import sys, minigpt4_jax; names = dir(minigpt4_jax); minigpt4_jax.UserError"
    assert run(f"{code}; print('train' in names, 'jax' in sys.modules)") == "True False\n"


# Each binds `train` in another way; the function is replaced so that nothing is trained.
IMPORTS = {
    "attribute": "import minigpt4_jax; calls.append(minigpt4_jax.train('c', 'w'))",
    "from package": "from minigpt4_jax import train; calls.append(train('c', 'w'))",
    "from module": "from minigpt4_jax.train import train; calls.append(train('c', 'w'))",
    "module": "import minigpt4_jax.train; calls.append(minigpt4_jax.train('c', 'w'))",
    "module's function": "import minigpt4_jax.train; calls.append(minigpt4_jax.train.train('c', 'w'))",
    "entry point": "from minigpt4_jax.train import run; assert callable(run); calls.append('c w')",
}


def test_train_is_callable_in_every_import_order():
    """All orders of two and of all ways to import it, each in a package imported anew."""
    orders = [*itertools.permutations(IMPORTS, 2), tuple(IMPORTS), tuple(IMPORTS)[::-1]]
    replace = "from minigpt4_jax.training import trainer\n"
    replace += "trainer.train = lambda config, workdir: f'{config} {workdir}'\nimport sys\n"
    code = [replace]
    for order in orders:
        forget = "for name in ('minigpt4_jax', 'minigpt4_jax.train'): sys.modules.pop(name, None)"
        lines = [forget, "calls = []", *(IMPORTS[way] for way in order)]
        code += [*lines, f"assert calls == ['c w'] * {len(order)}, (calls, {order})"]
    run("\n".join(code))


def test_train_says_what_it_takes():
    assert list(inspect.signature(minigpt4_jax.train).parameters)[:2] == ["config", "workdir"]
