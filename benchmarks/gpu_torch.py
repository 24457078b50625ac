"""The parts of gpu.py that run PyTorch: its training step, and `generate` of transformers."""

import json
import statistics
import sys
import time
from collections.abc import Callable

try:
    import torch
    from transformers import LlamaForCausalLM
except ImportError as e:
    sys.exit(f"skipped: {e.name} is not installed")

import sizes
import torch_peer

from minigpt4_jax.config import ModelConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
ROWS = (1, 8, 32) if ON_GPU else (1,)
NEW = 65 if ON_GPU else 3


def report(name: str, value: float, unit: str) -> None:
    print("figure", json.dumps({"name": name, "value": value, "unit": unit}), flush=True)


def median_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Of a call; the first one is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def step(config: ModelConfig) -> None:
    rows = 12 if ON_GPU else 2
    batch = sizes.make_batch(config, rows, 96 if ON_GPU else 8)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return 0.02 * torch.randn(shape, device=DEVICE) + name.endswith(".scale")

    peer = torch_peer.TorchPeer(config, batch, torch.bfloat16, DEVICE, weight)
    for labels_only in (True, False):
        seconds = median_seconds(lambda only=labels_only: float(peer.step(only)))
        report(f"a step, {'labels only' if labels_only else 'all positions'}", seconds * 1e3, "ms")
    if ON_GPU:
        report("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def generate(config: ModelConfig, *, compiled: bool) -> None:
    """Eager, or with torch.compile and a static cache."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(torch_peer.hf_config(config.llm)).eval()
    model.generation_config.eos_token_id = None
    options = {"cache_implementation": "static"} if compiled else {}
    if compiled:
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    for rows in ROWS[:1] if compiled else ROWS:
        ids = torch.randint(5, config.llm.vocab, (rows, 128 if ON_GPU else 16), device=DEVICE)

        def answer(new: int, ids: torch.Tensor = ids) -> object:
            with torch.no_grad():
                return model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                    min_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True, **options,
                )  # fmt: skip

        short, long = (median_seconds(lambda n=n: answer(n), 2) for n in (1, NEW))
        seconds = (long - short) / (NEW - 1)
        report(f"batch {rows}: a token", seconds * 1e3, "ms")


def main() -> None:
    part, size, layers = sys.argv[1:]
    config = sizes.model_config(size, int(layers) or None)
    if part == "torch step":
        step(config)
    else:
        generate(config, compiled=part == "torch compiled")


if __name__ == "__main__":
    main()
