"""Several processes, as on several hosts: the same results as one, and an error when one is lost."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.multihost_harness import free_address, read_results, run_jobs, start_python
from safetensors.numpy import load_file

from minigpt4_jax.config import LoraConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.distributed import ProcessOptions, parse_process_options

LORA = LoraConfig(rank=2, dropout=0.1)
MODELS = {
    "packed": {},  # with a Q-Former; the rows of training are packed
    # with larger weights, rounding in sharded matrices changes the gradient norm by 4e-5
    "v2": {"scale": 0.15, "qformer": False, "variant": "minigpt-v2", "lora": LORA},
}
MESHES = {  # for two processes with two devices each; the second, if any, for four with one each
    "packed": ("fsdp:4",),
    "v2": ("model:4", "data:2,model:2"),
}
STEPS = 8


def slurm(process: int, job: int) -> dict[str, str]:
    """The variables that srun sets for one of two tasks on a node."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process), "SLURM_LOCALID": str(process), "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": "2",
    }  # fmt: skip


def free_job() -> int:
    """A SLURM job number for which JAX chooses a free port."""
    for job in random.sample(range(4096), 4096):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("localhost", 61440 + job))
            return job
    raise AssertionError("no port is free")


def config_values(home: Path, name: str) -> dict:
    rows, packed = [str(home / "data" / "rows.jsonl")], 128 if name == "packed" else 0
    prompts = ["<Img><ImageHere></Img> What?", "<Img><ImageHere></Img> Where is it?"]
    return {
        "model": str(home / name), "steps": STEPS, "batch_size": 8, "init_lr": 1e-3,
        "data": {"path": rows, "val_path": rows, "prompts": prompts, "pack_tokens": packed},
        "dtype": "float32", "accumulate": 2 if packed else 1,
        "warmup_steps": 1, "save_every": 100, "log_every": 1, "sample_images": 1, "sample_tokens": 3,
        "eval_every": 8 if packed else 0, "sample_every": 8 if packed else 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Each run twice: in one process, and started in one process, continued by two and, where these are
    stopped, finished by four."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_data(folder / "data", rows=21)
    one, two, four = [], [], []
    for name, changes in MODELS.items():
        tiny.write_random_model(folder / name, **changes)
        run = {"name": name, "workdir": str(folder / f"{name}-several")}
        plain = {"values": config_values(folder, name)}
        one.append(run | plain | {"workdir": str(folder / f"{name}-one"), "stop": None})
        one.append(run | plain | {"stop": [0, 1]})
        meshes = [{"values": config_values(folder, name) | {"mesh": mesh}} for mesh in MESHES[name]]
        two.append(run | meshes[0] | {"stop": [1, 3] if meshes[1:] else None})
        four += [run | mesh | {"stop": None} for mesh in meshes[1:]]
    images = sorted(str(p) for p in (folder / "data").glob("*.png"))[:3]
    request = {"model": str(folder / "packed"), "images": images}
    run_jobs(folder, 1, 1, {"runs": one, "answers": request | {"mesh": None}})
    run_jobs(folder, 2, 2, {"runs": two, "answers": request | {"mesh": "data:2,model:2"}})
    run_jobs(folder, 4, 1, {"runs": four})
    return folder


def records(workdir: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / file).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_parameters_equal_those_of_one_process(home, name):
    one, several = home / f"{name}-one", home / f"{name}-several"
    expected, actual = records(one), records(several)
    assert [r["step"] for r in actual] == [r["step"] for r in expected]
    for a, b in zip(expected, actual, strict=True):
        assert b.keys() - {"examples_per_second"} == a.keys() - {"examples_per_second"}
        for key in {"loss", "val_loss", "grad_norm", "tokens", "lr"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), (a, b)
    assert records(several, "samples.jsonl") == records(one, "samples.jsonl")
    paths = sorted((one / "model").glob("*.safetensors"))
    assert paths
    for path in paths:
        trained = load_file(several / "model" / path.name)
        for key, array in load_file(path).items():
            np.testing.assert_allclose(trained[key], array, rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.mark.slow
def test_each_process_reads_its_own_rows_of_the_batch(home):
    """Rows of v2 as digests. Two processes continue after step 2, four after step 6."""
    one, two, four = (read_results(home, count) for count in (1, 2, 4))
    batches = one[0]["rows"]["v2"][:STEPS]

    def shares(processes: list[dict], start: int) -> list:
        """For each step: (rows of the batch, rows of each process)."""
        steps = [process["rows"]["v2"] for process in processes]
        return list(zip(batches[start:], zip(*steps, strict=True), strict=False))

    for batch, (a, b) in shares(two, 2):  # the model is sharded over both, rows are not
        assert a == b == batch
    for batch, (a, b, c, d) in shares(four, 6):  # rows are sharded over the two pairs
        assert a == b and c == d and a + c == batch
    assert len(shares(two, 2)) >= 4 and len(shares(four, 6)) == 2


def log(home: Path, process: int, count: int) -> list[str]:
    """What a process printed, by lines."""
    return (home / f"{process}-of-{count}.log").read_text().splitlines()


@pytest.mark.slow
def test_all_processes_stop_when_one_is_signalled_and_only_process_0_prints(home):
    two, four = "\n".join(log(home, 0, 2)), "\n".join(log(home, 0, 4))
    stopped = (
        "stopped by a signal to another process; step 6 is saved: start the same command again"
    )
    assert two.count(stopped) == four.count("continuing at step 6: ") == 1
    assert two.count("continuing at step 2: ") == len(MODELS)
    assert "device cpu, 2 processes; log in" in two
    assert "mesh fsdp:4 of 4 devices, as configured" in two
    assert [log(home, n, c) for c in (2, 4) for n in range(1, c)] == [[]] * 4


@pytest.mark.slow
def test_answers_of_two_processes_equal_those_of_one(home):
    expected = read_results(home, 1)[0]["answers"]
    for result in read_results(home, 2):
        assert result["answers"]["text"] == expected["text"]
        np.testing.assert_allclose(result["answers"]["nll"], expected["nll"], rtol=1e-5, atol=1e-5)
    assert any(expected["text"])


# --- a lost process -------------------------------------------------------------------------


def wait_for(process: subprocess.Popen) -> tuple[int, str]:
    """-> (exit code, stderr, whose last line is the message to the user)"""
    _, err = process.communicate(timeout=200)
    return process.returncode, err


def training_pid(process: subprocess.Popen) -> int:
    """The process that trains: the child of the one that was started."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.slow
def test_a_lost_process_ends_the_others_with_a_message(tmp_path):
    """Killed, which breaks its connections; stopped, which only makes it silent; and never started."""
    tiny.write_random_model(tmp_path / "qformer")
    tiny.write_data(tmp_path / "data")
    values = config_values(tmp_path, "qformer") | {
        "steps": 10_000,
        "save_every": 2,
        "eval_every": 0,
    }
    (tmp_path / "long.py").write_text(f"def get_config():\n    return {values!r}\n")
    command = ["-m", "minigpt4_jax.train", f"--config={tmp_path / 'long.py'}"]
    command += ["--config.heartbeat_timeout=10", "--config.sample_every=0"]

    processes, job = [f"--coordinator_address={free_address()}", "--num_processes=2"], free_job()
    run = [*command, f"--workdir={tmp_path / 'killed'}", *processes]
    killed = [start_python([*run, f"--process_id={n}"]) for n in (0, 1)]
    run = [*command, f"--workdir={tmp_path / 'stopped'}"]
    stopped = [start_python(run, **slurm(n, job)) for n in (0, 1)]
    absent = ["--coordinator_address", free_address(), "--num_processes=2", "--process_id=1"]
    alone = start_python(
        [*command, f"--workdir={tmp_path / 'w'}", *absent, "--initialization_timeout=2"]
    )
    code, err = wait_for(alone)
    assert code == 2 and f"error: process 0 does not answer at {absent[1]} within 2 s" in err
    assert not (tmp_path / "w").exists()
    silent = "error: another process of this run is lost or cannot"
    # killed while the other waits for it to save, the connection that breaks is not one of the step
    broken = ("error: a connection to another of the 2 processes broke", silent)
    runs = (
        ("killed", killed, 1, signal.SIGKILL, broken),
        ("stopped", stopped, 0, signal.SIGSTOP, silent),
    )
    for name, pair, lost, number, _ in runs:
        while not (tmp_path / name / "checkpoints" / "00000002").exists():
            assert pair[0].poll() is None, wait_for(pair[0])
            time.sleep(0.05)
        os.kill(training_pid(pair[lost]), number)
    for name, pair, lost, _, cause in runs:
        code, err = wait_for(pair[1 - lost])
        pair[lost].kill()
        pair[lost].communicate()
        assert code == 75, err
        line = err.splitlines()[-1]
        assert line.startswith(cause), err
        last = max(p.name for p in (tmp_path / name / "checkpoints").glob("0*[0-9]"))
        assert f"the last good checkpoint, of step {int(last)}, is kept in {tmp_path}" in line


@pytest.mark.slow
def test_ctrl_c_while_waiting_for_the_other_processes(tmp_path):
    tiny.write_random_model(tmp_path / "qformer")
    tiny.write_data(tmp_path / "data")
    (tmp_path / "c.py").write_text(
        f"def get_config():\n    return {config_values(tmp_path, 'qformer')!r}\n"
    )
    address = free_address()
    command = ["-m", "minigpt4_jax.train", f"--config={tmp_path / 'c.py'}", "--process_id=0"]
    command += [
        f"--coordinator_address={address}",
        "--num_processes=2",
        f"--workdir={tmp_path / 'w'}",
    ]
    process = start_python(command)
    host, port = address.split(":")
    while True:  # until JAX waits for connections
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            break
        assert process.poll() is None, wait_for(process)
        time.sleep(0.1)
    time.sleep(1)
    child = training_pid(process)
    for pid in (child, process.pid):  # as a terminal sends it
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted"
    assert not Path(f"/proc/{child}").exists()


# --- the command line -----------------------------------------------------------------------


@pytest.mark.smoke
def test_process_options():
    args = ["--config=a", "--num_processes=2", "--process_id", "1", "--coordinator_address=h:12"]
    assert parse_process_options(args) == (ProcessOptions("h:12", 2, 1), ["--config=a"])
    assert parse_process_options(["--num_processes=1"]) == (ProcessOptions(num_processes=1), [])
    assert parse_process_options(["--config.num_processes=3"])[1] == ["--config.num_processes=3"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--process_id=0"], "--process_id is given without --coordinator_address and --num_proc"),
        (["--num_processes=2"], "--num_processes is given without"),
        (["--num_processes=two"], "--num_processes=two: expected a whole number"),
        (["--coordinator_address=h", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator_address=h:1", "--num_processes=2", "--process_id=2"], "from 0 to 1"),
        (["--initialization_timeout=0"], "expected seconds"),
    ],
)
def test_invalid_process_options(args, message):
    with pytest.raises(UserError, match=message):
        parse_process_options(args)
