"""Models of the same structure share their compiled programs."""

import numpy as np
import pytest
from helpers import tiny
from helpers.scripted import own_programs

from minigpt4_jax import load
from minigpt4_jax.inference.shared_programs import clear_programs, shared_programs
from minigpt4_jax.utils.platform import compiling_for

PROMPT = "<Img><ImageHere></Img> What is this?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return [
        tiny.write_random_model(folder / "a", llm_layers=1),
        tiny.write_model(folder / "b", seed=5, llm_layers=1),
    ]


def use(model, photo):
    """What all kinds of programs of a model compute."""
    answer = model.generate(photo, [PROMPT], max_new_tokens=6)
    nll, _ = model.score(photo, [PROMPT], ["a dog"])
    return answer, float(nll[0]), model.encode_images(photo)


def test_another_checkpoint_of_the_same_structure_compiles_nothing(folders, photos, compiled):
    with own_programs():
        alone = use(load(folders[1], "float32"), photos[:1])
    with own_programs():
        first = use(load(folders[0], "float32"), photos[:1])
        compiled.clear()
        second = use(load(folders[1], "float32"), photos[:1])
        assert not compiled
    assert second[:2] == alone[:2] != first[:2]
    np.testing.assert_array_equal(second[2], alone[2])


def test_what_changes_a_program_is_not_shared(folders, monkeypatch):
    def program(**options):
        return load(folders[0], "float32", **options).engine._decode

    shared = program()
    assert program() is shared
    others = [program(kv_cache="int8"), program(quantize="int8")]
    with compiling_for("gpu"):  # a plan: other kernels, although the arguments are the same
        others.append(program())
        monkeypatch.setenv("MINIGPT4_JAX_CUDNN", "0")
        others.append(program())
    monkeypatch.undo()
    clear_programs()
    others.append(program())
    assert len({id(p) for p in [shared, *others]}) == 6


def test_options_of_the_compiler_are_not_shared():
    def program(model, count=1):
        return model * count

    compiled = shared_programs("graphdef", None)
    with compiling_for("gpu"):
        on_gpu = shared_programs("graphdef", None)
    found = [compiled(program), compiled(program, "reads"), compiled(program, static_argnums=(1,))]
    assert len({*map(id, found), id(on_gpu(program))}) == 4
    assert compiled(program) is found[0]
