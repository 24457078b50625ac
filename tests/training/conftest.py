"""Fixtures for tests of training."""

import inspect

import pytest

from minigpt4_jax.training import setup


@pytest.fixture(scope="module")
def traced_steps():
    """Runs with the same model, optimizer, batch shapes and options share a jitted step, which is traced
    once instead of in every run of the module. Cleared, the next run traces its own."""
    made, make_step = {}, setup.make_step

    def shared_step(split, tx, mesh, **options):
        joined = inspect.getclosurevars(split.join).nonlocals
        layers = *sorted(split.decay_mask.items()), joined["graphdef"], joined["dtype"]
        key = (*layers, mesh, str(sorted(options.items())))
        if key not in made:
            made[key] = make_step(split, tx, mesh, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_step", shared_step)
        yield made
