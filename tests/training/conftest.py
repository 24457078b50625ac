"""Fixtures for tests of training."""

import inspect

import pytest

from minigpt4_jax.training import evaluation, setup
from minigpt4_jax.training.current_model import CurrentModel


def _of(split):
    """What the programs of a split model depend on, beside the shapes of their arguments."""
    joined = inspect.getclosurevars(split.join).nonlocals
    return *sorted(split.decay_mask.items()), joined["graphdef"], joined["dtype"]


@pytest.fixture(scope="module")
def traced_steps():
    """Runs with the same model, optimizer, batch shapes and options share a jitted step, which is traced
    once instead of in every run of the module; so do the programs of validation, samples and benchmarks.
    Cleared, the next run traces its own step."""
    steps, make_step = {}, setup.make_step
    evaluations, make_evaluation = {}, evaluation.make_evaluation
    models, with_parameters = {}, CurrentModel.with_parameters

    def shared_step(split, tx, mesh, **options):
        key = (*_of(split), mesh, str(sorted(options.items())))
        if key not in steps:
            steps[key] = make_step(split, tx, mesh, **options)
        return steps[key]

    def shared_evaluation(split, mesh):
        key = (*_of(split), mesh)
        if key not in evaluations:
            evaluations[key] = make_evaluation(split, mesh)
        return evaluations[key]

    def with_shared_programs(self, trainable):
        key = (*_of(self._split), self._config, self._mesh)
        self._model = self._model or models.get(key)
        models[key] = with_parameters(self, trainable)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_step", shared_step)
        patch.setattr(evaluation, "make_evaluation", shared_evaluation)
        patch.setattr(CurrentModel, "with_parameters", with_shared_programs)
        yield steps
