"""Which checkpoint several processes restore when one of them sees something else than the others."""

import pytest
from helpers.multihost_harness import run_jobs

FAULTS = [
    ("none", None, 1),
    ("stale-1", "stale", 1),
    ("stale-0", "stale", 0),
    ("ahead-1", "ahead", 1),
    ("damaged-1", "damaged", 1),
    ("damaged-0", "damaged", 0),
    ("fixed-0", "fixed", 0),
    ("invisible-1", "invisible", 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("restores")


@pytest.fixture(scope="module")
def restored(folder) -> dict[str, list[dict]]:
    """Name of a fault -> what each of two processes restored."""
    jobs = [
        {"directory": str(folder / name), "fault": fault, "faulty_process": process}
        for name, fault, process in FAULTS
    ]
    results = run_jobs(folder, 2, 1, {"checkpoints": jobs})
    names = [name for name, *_ in FAULTS]
    return dict(zip(names, zip(*(r["checkpoints"] for r in results), strict=True), strict=True))


def step_directories(folder, name) -> list[str]:
    return sorted(p.name for p in (folder / name).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "stale-1", "ahead-1"])
def test_all_restore_what_process_0_lists(folder, restored, name):
    expected = {"step": 9, "value": 9.0, "extra": {"step": 9}, "messages": []}
    assert list(restored[name]) == [expected, expected]
    assert step_directories(folder, name) == ["00000006", "00000009", "00000012"]


@pytest.mark.slow
def test_a_stale_listing_of_process_0_is_followed(restored):
    for result in restored["stale-0"]:
        assert (result["step"], result["value"], result["messages"]) == (6, 6.0, [])


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_damage_seen_by_one_process_counts_for_all(folder, restored, process):
    name = f"damaged-{process}"
    for result in restored[name]:
        assert (result["step"], result["value"], result["extra"]) == (6, 6.0, {"step": 6})
        (message,) = result["messages"]
        assert f"is damaged (process {process}: 2 arrays are not as saved" in message or (
            f"is damaged (process {process}: 1 arrays are not as saved" in message
        )
        assert "kept as damaged-00000009; continuing from the one before, of step 6" in message
    assert step_directories(folder, name) == [
        "00000003", "00000006", "00000012", "damaged-00000009",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_see_is_not_called_damaged(folder, restored):
    first, second = restored["invisible-1"]
    assert "checkpoint" in second["error"] and "is not visible, though process 0" in second["error"]
    assert first["error"] == "process 1: " + second["error"]
    assert step_directories(folder, "invisible-1") == ["00000003", "00000006", "00000009"]


@pytest.mark.slow
def test_all_end_where_process_0_cannot_rename_a_damaged_checkpoint(folder, restored):
    """Process 1 would otherwise wait for process 0 until JAX aborts it (exit code 134)."""
    first, second = restored["fixed-0"]
    assert "cannot rename checkpoints" in first["error"] and "Permission denied" in first["error"]
    assert second["error"] == "process 0: " + first["error"]
    assert step_directories(folder, "fixed-0") == ["00000003", "00000006", "00000009"]
