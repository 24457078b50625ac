"""Text generation beside `transformers` generate, with the same weights, in turns.

    python benchmarks/decode.py --model=DIR [--rounds=3] [--dtype=float32] [--parts=decode,beams]

DIR is a model directory with a LLaMA-like language model (the quickstart's base/ works). Both sides continue
the same random prompts up to the limit of new tokens, so both do the same work. Prints seconds, their ratio
and tokens/s for each part:

    prefill   a prompt of 512 tokens
    decode    64 tokens without the first one, at batch 1, 8 and 32, and the share of the measured memory
              bandwidth (a step reads every weight once, and the cache)
    answers   whole answers, batch 8
    beams     beam search with 5 beams
    mixed     200 answers of 8 to 128 tokens: here finished rows are replaced, in PyTorch left-padded batches
              of 32 run to their longest answer, as in the original
    compile   the first answer of a new process, with an empty and with a filled compilation cache

--easydel=PYTHON, an interpreter with EasyDeL, adds whole answers beside that library (random weights).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import (
    Table,
    argument_parser,
    median_ratio,
    memory_bandwidth,
    seconds,
    time_in_turns,
)
from torch_peer import load_weights
from transformers.utils import logging

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.utils.compilation_cache import VARIABLE, enable_compilation_cache

PROMPT, NEW = 64, 64  # tokens
PARTS = ("prefill", "decode", "answers", "beams", "mixed", "compile")
COLUMNS = {
    "": (34, ""),
    "ours s": (9, ".3f"),
    "peer s": (9, ".3f"),
    "ratio": (8, ".2f"),
    "ours tok/s": (11, ".1f"),
    "peer": (9, ".1f"),
    "note": (26, ""),
}


class Peers:
    """The same language model here and in PyTorch."""

    def __init__(self, folder: Path, dtype: str):
        model, config = load_model(folder, dtype, stacked=False)
        assert isinstance(model, MiniGpt)
        self.engine, self.config = Engine(model), config.llm
        torch_dtype = getattr(torch, dtype)
        self.torch, _ = load_weights(config.llm, model_directory.Tensors(folder), torch_dtype)
        num_weights = sum(p.numel() for p in self.torch.parameters())
        self.weight_bytes = num_weights * torch_dtype.itemsize

    def random_prompts(self, lengths: list[int]) -> list[list[int]]:
        rng = np.random.default_rng(len(lengths))
        return [rng.integers(5, self.config.vocab, n).tolist() for n in lengths]

    def ours(self, prompts: list[list[int]], new: list[int], beams: int = 1) -> list[list[int]]:
        """new: tokens to generate for each prompt."""
        requests = [
            Request(p, max_new_tokens=n, beam_search=BeamSearchConfig(beams))
            for p, n in zip(prompts, new, strict=True)
        ]
        return [answers[0].ids for answers in self.engine.answer(requests, 32 * beams)]

    @torch.no_grad()
    def pytorch(self, prompts: list[list[int]], new: int, beams: int = 1) -> list[list[int]]:
        """new: tokens to generate for all prompts."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = self.torch.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
            do_sample=False, num_beams=beams, eos_token_id=-1, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        generated: list[list[int]] = output[:, longest:].tolist()
        return generated


def print_row(
    table: Table, title: str, ours: Sequence[float], peer: Sequence[float], tokens: int, note: str = ""
) -> None:  # fmt: skip
    a, b = statistics.median(ours), statistics.median(peer)
    table.row(title, a, b, median_ratio(ours, peer), tokens / a, tokens / b, note)


def compare(
    table: Table, peers: Peers, title: str, prompts: list[list[int]], new: int, rounds: int,
    beams: int = 1,
) -> None:  # fmt: skip
    """Time `new` tokens for each prompt on both sides."""
    times = time_in_turns(
        rounds,
        {
            "ours": lambda: peers.ours(prompts, [new] * len(prompts), beams),
            "peer": lambda: peers.pytorch(prompts, new, beams),
        },
    )
    tokens = len(prompts) * (new if new > 1 else len(prompts[0]))
    print_row(table, title, times["ours"], times["peer"], tokens)


def compare_decoding(table: Table, peers: Peers, rows: int, rounds: int, bandwidth: float) -> None:
    prompts = peers.random_prompts([PROMPT] * rows)
    times = time_in_turns(
        rounds,
        {
            "ours first": lambda: peers.ours(prompts, [1] * rows),
            "ours all": lambda: peers.ours(prompts, [NEW] * rows),
            "peer first": lambda: peers.pytorch(prompts, 1),
            "peer all": lambda: peers.pytorch(prompts, NEW),
        },
    )
    title = f"first token of {PROMPT}, batch {rows}"
    print_row(table, title, times["ours first"], times["peer first"], rows)
    ours, peer = (
        [b - a for a, b in zip(times[f"{side} first"], times[f"{side} all"], strict=True)]
        for side in ("ours", "peer")
    )
    cache = 2 * peers.config.layers * peers.config.kv_heads * peers.config.head_dim * 4
    step_bytes = peers.weight_bytes + rows * (PROMPT + NEW / 2) * cache
    share = step_bytes / bandwidth / (statistics.median(ours) / (NEW - 1))
    note = f"{share:.0%} of the bandwidth"
    print_row(table, f"decode, batch {rows}", ours, peer, rows * (NEW - 1), note)


def compare_mixed_lengths(table: Table, peers: Peers) -> None:
    rng = np.random.default_rng(0)
    new = rng.integers(8, 129, 200).tolist()
    prompts = peers.random_prompts(rng.integers(16, 65, 200).tolist())
    batches = [range(start, min(start + 32, 200)) for start in range(0, 200, 32)]

    def padded() -> None:
        for batch in batches:
            peers.pytorch([prompts[i] for i in batch], max(new[i] for i in batch))

    times = time_in_turns(1, {"ours": lambda: peers.ours(prompts, new), "peer": padded})
    print_row(table, "200 answers of mixed length", times["ours"], times["peer"], sum(new))


def print_first_answer_seconds(folder: Path, dtype: str) -> None:
    """Time of the first answer of this process, after the weights are loaded."""
    enable_compilation_cache()
    model, _ = load_model(folder, dtype, stacked=False)
    assert isinstance(model, MiniGpt)
    engine = Engine(model)
    request = Request(list(range(5, 5 + PROMPT)), max_new_tokens=NEW)
    print(seconds(lambda: engine.answer([request], 1)))


def measure_compilation(table: Table, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, f"--model={args.model}", f"--dtype={args.dtype}"]
        for state in ("nothing compiled yet", "compiled before"):
            done = subprocess.run(
                [*command, "--first-answer"], env=os.environ | {VARIABLE: cache},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            table.row(f"first answer, {state}", float(done.stdout.split()[-1]))


def compare_with_easydel(table: Table, peers: Peers, python: str, rounds: int) -> None:
    c = peers.config
    sizes = {
        "vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "tie_word_embeddings": c.tie,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    command = [python, str(Path(__file__).with_name("easydel_peer.py")), json.dumps(sizes)]
    process = subprocess.Popen(
        [*command, str(PROMPT)], text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        if process.poll() is not None:
            raise UserError(f"--easydel={python}: it has no working EasyDeL")
    for rows in (1, 8):
        prompts = peers.random_prompts([PROMPT] * rows)
        ours, peer = [], []
        for _ in range(rounds + 1):
            ours.append(seconds(partial(peers.ours, prompts, [NEW] * rows)))
            process.stdin.write(f"{rows} {NEW}\n")
            peer.append(float(process.stdout.readline().split()[-1]))
        # the first round compiles
        print_row(table, f"beside EasyDeL, batch {rows}", ours[1:], peer[1:], rows * NEW)
    process.terminate()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts to run")
    parser.add_argument("--easydel", metavar="PYTHON", help="an interpreter with EasyDeL")
    parser.add_argument("--first-answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.first_answer:
        print_first_answer_seconds(args.model, args.dtype)
        return
    logging.set_verbosity_error()  # hide a warning per call about the missing end token
    enable_compilation_cache()
    peers, bandwidth = Peers(args.model, args.dtype), memory_bandwidth()
    print(f"weights {peers.weight_bytes / 1e9:.2f} GB, memory {bandwidth / 1e9:.1f} GB/s")
    prompt = peers.random_prompts([PROMPT])
    same = peers.ours(prompt, [NEW]) == peers.pytorch(prompt, NEW)
    print(f"the same {NEW} ids on both sides: {'yes' if same else 'no'}")
    table, parts, rounds = Table(COLUMNS), args.parts.split(","), args.rounds
    if "prefill" in parts:
        prompts = peers.random_prompts([512])
        compare(table, peers, "prefill of 512 tokens", prompts, 1, rounds)
    for rows in (1, 8, 32) if "decode" in parts else ():
        compare_decoding(table, peers, rows, rounds, bandwidth)
    if "answers" in parts:
        prompts = peers.random_prompts([PROMPT] * 8)
        compare(table, peers, "whole answers, batch 8", prompts, NEW, rounds)
    if "beams" in parts:
        prompts = peers.random_prompts([PROMPT])
        compare(table, peers, "beam search, 5 beams, one prompt", prompts, NEW, rounds, beams=5)
    if "mixed" in parts:
        compare_mixed_lengths(table, peers)
    if "compile" in parts:
        measure_compilation(table, args)
    if args.easydel:
        compare_with_easydel(table, peers, args.easydel, rounds)


if __name__ == "__main__":
    run(main)
