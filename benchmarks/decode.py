"""Generation of text, ours beside `transformers` generate on the same weights, in one run.

    python benchmarks/decode.py --model=DIR [--rounds=3] [--dtype=float32] [--parts=decode,beams]

DIR is a model directory whose language model is LLaMA-like (the quickstart's base/ will do). Both
sides continue the same random prompts, and nothing ends an answer but its limit, so both do the same
work; they take turns. `decode` is the time of 64 tokens without the first one; `mixed` is
200 answers of 8 to 128 tokens, ours refilling finished rows, PyTorch's in left-padded batches of 32
that run to their longest, as the original's. `compile` is the first answer of a new process, with
nothing compiled yet and again with what the first one left on disk. --easydel=PYTHON, an interpreter
that has EasyDeL, adds whole answers beside that library's, random weights, in turns. The floor of a
decoding step is its bytes (every weight once, and the cache) over the measured bandwidth.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size_7b import memory_bandwidth
from torch_peer import hf_config, hf_name
from transformers import LlamaForCausalLM
from transformers.utils import logging

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import Parser, UserError, run
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.utils.compilation_cache import VARIABLE, enable_compilation_cache

PROMPT, NEW = 64, 64  # tokens
PARTS = ("prefill", "decode", "answers", "beams", "mixed", "compile")


class Both:
    """The two sides with the same language model."""

    def __init__(self, folder: Path, dtype: str):
        model, config = load_model(folder, dtype, stacked=False)
        assert isinstance(model, MiniGpt)
        self.engine, self.config = Engine(model), config.llm
        kind = getattr(torch, dtype)
        self.torch = LlamaForCausalLM(hf_config(config.llm)).to(kind).eval()
        self.torch.config.use_cache = True
        state, tensors = self.torch.state_dict(), model_directory.Tensors(folder)
        for name in (n for n in tensors if n.startswith("llm.")):
            state[hf_name(name)].copy_(torch.from_numpy(np.asarray(tensors[name], np.float32)))
        self.torch.tie_weights()
        self.weight_bytes = sum(p.numel() for p in self.torch.parameters()) * kind.itemsize

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        rng = np.random.default_rng(len(lengths))
        return [rng.integers(5, self.config.vocab, n).tolist() for n in lengths]

    def ours(self, prompts: list[list[int]], new: list[int], beams: int = 1) -> list[list[int]]:
        requests = [
            Request(p, max_new_tokens=n, beam_search=BeamSearchConfig(beams))
            for p, n in zip(prompts, new, strict=True)
        ]
        return [answers[0].ids for answers in self.engine.answer(requests, 32 * beams)]

    @torch.no_grad()
    def theirs(self, prompts: list[list[int]], new: int, beams: int = 1) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        found = self.torch.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
            do_sample=False, num_beams=beams, eos_token_id=-1, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        return found[:, longest:].tolist()


def turns(rounds: int, *sides: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each side in each round, after one run of each that compiles."""
    times: list[list[float]] = [[] for _ in sides]
    for i in range(rounds + 1):
        for side, taken in zip(sides, times, strict=True):
            begin = time.perf_counter()
            side()
            if i:
                taken.append(time.perf_counter() - begin)
    return times


def show(title: str, ours: list[float], theirs: list[float], tokens: int, note: str = "") -> None:
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    a, b = statistics.median(ours), statistics.median(theirs)
    print(
        f"{title:34}{a:9.3f}{b:9.3f}{ratio:8.2f}{tokens / a:11.1f}{tokens / b:9.1f}  {note}",
        flush=True,
    )


def decoding(both: Both, rows: int, rounds: int, floor: float) -> None:
    prompts = both.prompts([PROMPT] * rows)

    def first_and_all(call: Callable[[int], Any]) -> list[Callable[[], Any]]:
        return [lambda: call(1), lambda: call(NEW)]

    ours = first_and_all(lambda n: both.ours(prompts, [n] * rows))
    theirs = first_and_all(lambda n: both.theirs(prompts, n))
    a1, a, b1, b = turns(rounds, *ours, *theirs)
    show(f"first token of {PROMPT}, batch {rows}", a1, b1, rows)
    a, b = ([y - x for x, y in zip(*p, strict=True)] for p in ((a1, a), (b1, b)))
    cache = 2 * both.config.layers * both.config.kv_heads * both.config.head_dim * 4
    needed = (both.weight_bytes + rows * (PROMPT + NEW / 2) * cache) / floor
    share = needed / (statistics.median(a) / (NEW - 1))
    show(f"decode, batch {rows}", a, b, rows * (NEW - 1), f"{share:.0%} of the bandwidth")


def first_answer(folder: Path, dtype: str) -> None:
    """Print the seconds that a process's first answer takes, behind the loading of the weights."""
    enable_compilation_cache()
    model, _ = load_model(folder, dtype, stacked=False)
    assert isinstance(model, MiniGpt)
    engine, begin = Engine(model), time.perf_counter()
    engine.answer([Request(list(range(5, 5 + PROMPT)), max_new_tokens=NEW)], 1)
    print(time.perf_counter() - begin)


def compiling(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, f"--model={args.model}", f"--dtype={args.dtype}"]
        for kind in ("nothing compiled yet", "compiled before"):
            told = subprocess.run(
                [*command, "--first-answer"], env=os.environ | {VARIABLE: cache},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            title = f"first answer, {kind}"
            print(f"{title:34}{float(told.stdout.split()[-1]):9.3f}", flush=True)


def beside_easydel(both: Both, python: str, rounds: int) -> None:
    c = both.config
    sizes = {
        "vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "tie_word_embeddings": c.tie,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    command = [python, str(Path(__file__).with_name("easydel_peer.py")), json.dumps(sizes)]
    peer = subprocess.Popen(
        [*command, str(PROMPT)], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert peer.stdin is not None and peer.stdout is not None
    while peer.stdout.readline().strip() != "ready":
        if peer.poll() is not None:
            raise UserError(f"--easydel={python}: it has no EasyDeL that runs")
    for rows in (1, 8):
        prompts, taken = both.prompts([PROMPT] * rows), []
        for i in range(rounds + 1):
            begin = time.perf_counter()
            both.ours(prompts, [NEW] * rows)
            ours = time.perf_counter() - begin
            peer.stdin.write(f"{rows} {NEW}\n")
            theirs = float(peer.stdout.readline().split()[-1])
            taken += [(ours, theirs)] if i else []
        show(f"beside EasyDeL, batch {rows}", *map(list, zip(*taken, strict=True)), rows * NEW)
    peer.terminate()


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    parser.add_argument("--easydel", metavar="PYTHON", help="an interpreter that has EasyDeL")
    parser.add_argument("--first-answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_answer:
        first_answer(args.model, args.dtype)
        return 0
    logging.set_verbosity_error()  # of an end token that cannot occur, once a call
    enable_compilation_cache()
    both, bandwidth = Both(args.model, args.dtype), memory_bandwidth()
    print(f"weights {both.weight_bytes / 1e9:.2f} GB, memory {bandwidth / 1e9:.1f} GB/s")
    same = both.ours(both.prompts([PROMPT]), [NEW]) == both.theirs(both.prompts([PROMPT]), NEW)
    print(f"the same {NEW} ids on both sides: {'yes' if same else 'no'}")
    print(f"{'':34}{'ours s':>9}{'PyTorch':>9}{'ratio':>8}{'ours tok/s':>11}{'PyTorch':>9}")
    parts, rounds = args.parts.split(","), args.rounds
    if "prefill" in parts:
        prompts = both.prompts([512])
        times = turns(rounds, lambda: both.ours(prompts, [1]), lambda: both.theirs(prompts, 1))
        show("prefill of 512 tokens", *times, 512)
    for rows in (1, 8, 32) if "decode" in parts else ():
        decoding(both, rows, rounds, bandwidth)
    if "answers" in parts:
        prompts = both.prompts([PROMPT] * 8)
        times = turns(
            rounds, lambda: both.ours(prompts, [NEW] * 8), lambda: both.theirs(prompts, NEW)
        )
        show("whole answers, batch 8", *times, 8 * NEW)
    if "beams" in parts:
        prompts = both.prompts([PROMPT])
        times = turns(
            rounds, lambda: both.ours(prompts, [NEW], 5), lambda: both.theirs(prompts, NEW, 5)
        )
        show("beam search, 5 beams, one prompt", *times, NEW)
    if "mixed" in parts:
        rng = np.random.default_rng(0)
        new = rng.integers(8, 129, 200).tolist()
        prompts = both.prompts(rng.integers(16, 65, 200).tolist())
        batches = [range(k, min(k + 32, 200)) for k in range(0, 200, 32)]
        padded = lambda: [  # noqa: E731
            both.theirs([prompts[i] for i in b], max(new[i] for i in b)) for b in batches
        ]
        times = turns(1, lambda: both.ours(prompts, new), padded)
        show("200 answers of mixed length", *times, sum(new))
    if "compile" in parts:
        compiling(args)
    if args.easydel:
        beside_easydel(both, args.easydel, rounds)
    return 0


if __name__ == "__main__":
    run(main)
