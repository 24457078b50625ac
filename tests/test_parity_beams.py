"""Beam search against the original PyTorch code: ids and scores."""

import numpy as np
import pytest
from helpers.reference_models import CASES, NEEDS_DUMPS, Case, generation

from minigpt4_jax.inference import engine


def check(case, runner, names):
    """Compare the runs, answered together: those with equally many beams share a program."""
    document, dump = case.document("generate"), case.arrays("generate")
    visual = case.model.encode_images(case.images)
    runs = [generation(case, document["runs"][name], document, visual) for name in names]
    answers = iter(runner.search([request for requests, _ in runs for request in requests]))
    for name, (requests, ends) in zip(names, runs, strict=True):
        found = [best for _, (best,) in zip(requests, answers, strict=False)]
        for answer, padded in zip(found, dump[f"{name}/ids"], strict=True):
            theirs, ours = padded[1:].tolist(), answer.ids
            if answer.hit_stop:  # the original writes its first end id for whichever came
                assert ours[-1] in ends
                ours = [*ours[:-1], ends[0]]
            assert ours == theirs[: len(ours)], name
            assert not any(theirs[len(ours) :]), name
        scores = [answer.score for answer in found]
        np.testing.assert_allclose(scores, dump[f"{name}/sequences_scores"], rtol=1e-4)


@NEEDS_DUMPS
@pytest.mark.parametrize("name", CASES)
def test_ids_and_scores(name):
    """Every run with beams, of two prompts each; some end early, some at the limit."""
    case = Case(name)
    runs = case.document("generate")["runs"]
    names = [name for name, run in runs.items() if run["kwargs"]["num_beams"] > 1]
    assert len(names) == 6
    check(case, case.model.engine, names)


@NEEDS_DUMPS
def test_stacked_layers_and_a_single_end_token():
    case = Case("c")
    check(case, engine.Engine(case.module), ["beam3", "beam5_lp2", "beam4_lpneg"])
