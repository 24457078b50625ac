"""BLIP-2's language models beside `transformers` generate, with the same random weights, in turns.

    python benchmarks/blip2.py [--rounds=3] [--width=768] [--layers=12] [--models=opt,t5] [--one-core]

Both sides continue the same random prompts of 64 tokens by 64 tokens in float32: greedily at batch 1, and by
a search with 5 beams. Prints seconds and their ratio; with --one-core CPU seconds of one core, for a busy
machine.
"""

import time

import numpy as np
import torch
import transformers
from common import Clock, Table, argument_parser, median_ratio, time_in_turns, use_one_core
from flax import nnx

from convert.hf_config import llm_config_from_hf
from convert.key_mapping import map_keys
from convert.llm_keys import llm_table
from minigpt4_jax.config import LlmConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.errors import run
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import MiniGpt

PROMPT = NEW = 64  # tokens
VOCAB = 32128
COLUMNS = {"": (24, ""), "ours s": (9, ".3f"), "peer s": (9, ".3f"), "ratio": (8, ".2f")}


def peer_model(kind: str, width: int, layers: int) -> torch.nn.Module:
    """A random OPT or T5 of transformers, with 64 dimensions a head."""
    torch.manual_seed(0)
    if kind == "opt":
        config = transformers.OPTConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, ffn_dim=4 * width,
            num_attention_heads=width // 64, word_embed_proj_dim=width,
        )  # fmt: skip
        return transformers.OPTForCausalLM(config).eval()
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=width, num_layers=layers, d_ff=5 * width // 2, d_kv=64,
        num_heads=width // 64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head = torch.nn.Linear(width, VOCAB, bias=False)
    return model


def our_engine(peer: torch.nn.Module) -> Engine:
    """The engine of the same language model, with a vision side that is not used."""
    values = peer.config.to_dict()
    llm = llm_config_from_hf(values)
    vision = VisionConfig(image_size=14, width=8, depth=1, heads=1, mlp=8)
    qformer = QFormerConfig(queries=1, hidden=8, layers=1, heads=1, ffn=8, vision_width=8)
    model = MiniGpt(ModelConfig(vision=vision, qformer=qformer, llm=llm), nnx.Rngs(0))
    _copy_weights(model, llm, peer)
    model.llm = unstack(model.llm)
    return Engine(model)


def _copy_weights(model: MiniGpt, llm: LlmConfig, peer: torch.nn.Module) -> None:
    tensors = {key: value.numpy() for key, value in peer.state_dict().items()}
    if llm.tie:
        tensors.pop("lm_head.weight", None)
    found, unknown = map_keys(llm_table(llm.model_type), tensors)
    assert not unknown, unknown
    for path, leaf in nnx.to_flat_state(nnx.state(model.llm)):
        name = ".".join(map(str, path[1:]))
        if path[0] in ("blocks", "encoder_blocks"):
            layers = llm.layers if path[0] == "blocks" else llm.encoder_layers
            keys = [found[f"llm.{path[0]}.{i}.{name}"].key for i in range(layers)]
            leaf.set_value(np.stack([tensors[key] for key in keys]))
        else:
            leaf.set_value(tensors[found[".".join(["llm", *map(str, path)])].key])


def compare(kind: str, width: int, layers: int, rounds: int, table: Table, clock: Clock) -> None:
    """Print a row for greedy decoding and one for beam search."""
    peer = peer_model(kind, width, layers)
    engine = our_engine(peer)
    prompt = np.random.default_rng(0).integers(3, VOCAB, PROMPT)
    for name, beams in (("greedy, batch 1", 1), ("5 beams", 5)):
        request = Request(prompt.tolist(), None, NEW, beam_search=BeamSearchConfig(beams))

        def ours(request: Request = request) -> None:
            (ids,) = engine.generate([request])
            assert len(ids) == NEW

        def theirs(beams: int = beams) -> None:
            with torch.inference_mode():
                peer.generate(
                    torch.tensor(prompt[None]), attention_mask=torch.ones(1, PROMPT).long(),
                    max_new_tokens=NEW, min_new_tokens=NEW, num_beams=beams, do_sample=False,
                )  # fmt: skip

        times = time_in_turns(rounds, {"ours": ours, "peer": theirs}, clock=clock)
        medians = [float(np.median(times[side])) for side in ("ours", "peer")]
        table.row(f"{kind}, {name}", *medians, median_ratio(times["ours"], times["peer"]))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--models", default="opt,t5")
    parser.add_argument("--one-core", action="store_true")
    args = parser.parse_args()
    clock: Clock = time.perf_counter
    if args.one_core:
        clock = use_one_core()
        torch.set_num_threads(1)
    table = Table(COLUMNS)
    for kind in args.models.split(","):
        compare(kind, args.width, args.layers, args.rounds, table, clock)


if __name__ == "__main__":
    run(main)
