"""Programs compiled from shapes, in threads: what then runs compiles nothing more."""

import contextlib
import time

import jax
import numpy as np
import pytest
from helpers import tiny
from jax import monitoring
from PIL import Image

from minigpt4_jax.inference.compile_ahead import ProgramCompiler, compile_answer
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.loading import begin_loading

PICTURE = Image.fromarray(np.full((28, 28, 3), 90, np.uint8))


@contextlib.contextmanager
def compilations():
    """The events of JAX's tracing and compilation inside the with block."""
    events, counting = [], True

    def listen(name, *_, **__):
        if (counting and "/compile" in name) or (counting and "trace" in name):
            events.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        counting = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_random_model(tmp_path_factory.mktemp("ahead") / "model", llm_layers=1)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 3}, {"max_new_tokens": 3, "num_beams": 2}],
    ids=["plain", "beams"],
)
def test_the_first_answer_compiles_nothing(folder, options):
    loading = begin_loading(folder, "float32")
    with ProgramCompiler(loading.model) as compiler:

        def plan(planned):
            request = Conversation(planned).request("What is it?", [PICTURE], **options)
            compile_answer(planned, request)

        compiler.start(plan)
        model = loading.finish()
        # encode, one image of its result, prefill, decode and snapshot; or search in place of the last three
        assert compiler.wait().programs == (3 if "num_beams" in options else 5)
    with compilations() as events:
        answer = model.conversation().ask("What is it?", [PICTURE], **options)
    assert events == []
    begun_anew = begin_loading(folder, "float32").finish().conversation()
    assert answer == begun_anew.ask("What is it?", [PICTURE], **options)


def test_every_program_of_the_engine_is_planned(folder):
    """One that is not fails, as it takes no shapes, and ends the plan."""
    with ProgramCompiler(begin_loading(folder, "float32").model) as compiler:
        engines = vars(compiler.planned.engine)
        assert not [
            name for name, value in engines.items() if isinstance(value, jax.stages.Wrapped)
        ]


def test_a_plan_that_fails_ends_nothing(folder):
    loading = begin_loading(folder, "float32")
    with ProgramCompiler(loading.model) as compiler:
        compiler.start(lambda planned: Conversation(planned).request("", [PICTURE]))
        assert compiler.wait().programs == 0


def test_a_plan_ends_before_the_compiler_is_left(folder):
    # a thread that still traces when the interpreter ends aborts the process (exit code 134)
    ended = []

    def plan(planned):
        time.sleep(0.2)
        ended.append(True)

    with ProgramCompiler(begin_loading(folder, "float32").model) as compiler:
        compiler.start(plan)
    assert ended
