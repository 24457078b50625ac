"""Checkpoints: what is saved comes back bit for bit, or is found to be damaged."""

import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.errors import UserError
from minigpt4_jax.training.checkpoints import Checkpoints

SHAPES = {"projection.weight": (24, 16), "projection.bias": (24,), "qformer.queries": (1, 3, 16)}


def state(step: int):
    rng = np.random.default_rng(step)
    trainable = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    moments = optax.scale_by_adam().init(trainable)
    moments = jax.tree.map(lambda a: np.asarray(a) + np.asarray(step, np.asarray(a).dtype), moments)
    return trainable, moments


def extra(step: int):
    return {"loader": {"step": step, "contents": "abc"}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 6, 9):
        checkpoints.save(step, *state(step), extra(step))
    checkpoints.close()
    return folder


def restored(folder: Path):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(*state(0))
    finally:
        checkpoints.close()


def is_whole(found) -> bool:
    expected = (*state(found.step), extra(found.step))
    leaves = zip(
        jax.tree.leaves(expected), jax.tree.leaves((found.trainable, found.opt_state, found.extra)),
        strict=True,
    )  # fmt: skip
    return all(
        np.array_equal(a, b) and getattr(a, "dtype", 0) == getattr(b, "dtype", 0) for a, b in leaves
    )


def test_the_last_is_restored_and_older_ones_are_gone(saved):
    found = restored(saved)
    assert found.step == 9 and found.messages == () and is_whole(found)
    assert sorted(p.name for p in saved.glob("0*")) == ["00000006", "00000009"]


def test_one_too_many_that_a_kill_left_goes_at_the_next_start(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "c")
    shutil.copytree(tmp_path / "c" / "00000006", tmp_path / "c" / "00000003")
    assert restored(tmp_path / "c").step == 9
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["00000006", "00000009"]


def test_an_empty_folder(tmp_path):
    assert restored(tmp_path / "none") is None


def damage(path: Path, kind: str, where: float) -> None:
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:at])
    elif kind == "zeros":  # what a file system leaves after the power failed
        path.write_bytes(content[:at] + bytes(len(content) - at))
    elif content:
        content[min(at, len(content) - 1)] ^= 1 << int(where * 1000) % 8
        path.write_bytes(content)


DAMAGE = st.tuples(
    st.integers(0, 10**6), st.sampled_from(["missing", "truncated", "zeros", "flipped"]),
    st.floats(0, 1, exclude_max=True),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(harm=st.lists(DAMAGE, min_size=1, max_size=3))
def test_random_damage_is_found_and_the_one_before_used(saved, tmp_path_factory, harm):
    folder = tmp_path_factory.mktemp("harmed") / "checkpoints"
    shutil.copytree(saved, folder)
    for number, kind, where in harm:
        files = sorted(p for p in (folder / "00000009").rglob("*") if p.is_file())
        damage(files[number % len(files)], kind, where)
    found = restored(folder)
    assert is_whole(found)
    if found.step == 9:  # what was harmed says nothing of the values
        assert found.messages == ()
        return
    assert found.step == 6
    (line,) = found.messages
    assert line.startswith(f"checkpoint {folder / '00000009'} is damaged (")
    assert line.endswith("kept as damaged-00000009; continuing from the one before, of step 6")
    assert "\n" not in line
    assert not (folder / "00000009").exists() and (folder / "damaged-00000009").is_dir()
    again = restored(folder)
    assert again.step == 6 and again.messages == ()


def harm_arrays(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        damage(path, "flipped", 0.6)


def test_the_same_step_damaged_again(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for _ in range(2):
        harm_arrays(folder / "00000009")
        checkpoints = Checkpoints(folder, keep=2)
        assert checkpoints.restore(*state(0)).step == checkpoints.latest_step == 6
        checkpoints.save(9, *state(9), extra(9))
        checkpoints.close()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["00000006", "00000009", "damaged-00000009", "damaged-00000009-2"]
    found = restored(folder)
    assert found.step == 9 and is_whole(found)


def test_every_one_damaged_changes_nothing(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    harm_arrays(folder)
    with pytest.raises(UserError) as e:
        restored(folder)
    assert f"every checkpoint in {folder} is damaged (00000009: " in str(e.value)
    assert "00000006: " in str(e.value) and "\n" not in str(e.value)
    assert sorted(p.name for p in folder.iterdir()) == ["00000006", "00000009"]
