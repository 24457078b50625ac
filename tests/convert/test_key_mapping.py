"""Key tables are strict in both directions, and reversible."""

import numpy as np
import pytest
from helpers.gguf_files import permute_as_llama_cpp
from helpers.released_files import blip2_state, llm_config, llm_state, lora_state, vit_state
from hypothesis import given
from hypothesis import strategies as st

from convert.key_mapping import (
    BLIP2,
    EVA,
    FINE_TUNED,
    LLM,
    gguf_table,
    map_keys,
    original_key,
    unpermute,
)
from minigpt4_jax.errors import UserError

TABLES = {
    "eva": (EVA, list(vit_state())),
    "blip2": (BLIP2, list(blip2_state())),
    "llm": (LLM, list(llm_state(llm_config()))),
    "lora": (FINE_TUNED, list(lora_state(llm_config()))),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_key_is_known_and_has_its_own_parameter(name):
    table, keys = TABLES[name]
    found, unknown = map_keys(table, keys)
    assert not unknown
    used = {m.key for m in found.values()}
    assert len(used) == len(found)
    left = set(keys) - used
    assert all(any(p.fullmatch(k) for p in table.ignored) for k in left)


@pytest.mark.parametrize("name", TABLES)
@given(data=st.data())
def test_a_misspelt_key_is_reported(name, data):
    table, keys = TABLES[name]
    key = data.draw(st.sampled_from([m.key for m in map_keys(table, keys)[0].values()]))
    at = data.draw(st.integers(0, len(key)))
    letter = data.draw(st.sampled_from("xyzXYZ _é"))
    found, unknown = map_keys(table, [key[:at] + letter + key[at:]])
    assert not found and len(unknown) == 1


@pytest.mark.parametrize("state", [vit_state(), blip2_state()], ids=["vit", "blip2"])
def test_keys_are_mapped_back_to_the_original_ones(state):
    prefix = "visual_encoder." if "cls_token" in state else ""
    found, _ = map_keys(FINE_TUNED, [prefix + k for k in state])
    assert found
    for name, m in found.items():
        assert original_key(FINE_TUNED, name) == m.key
    assert original_key(FINE_TUNED, "llm.blocks.3.attn.v.lora_a") == (
        "llama_model.base_model.model.model.layers.3.self_attn.v_proj.lora_A.weight"
    )
    assert original_key(FINE_TUNED, "llm.blocks.3.attn.v.weight") is None


def test_bare_and_prefixed_language_model_keys():
    bare = [k.removeprefix("model.") for k in llm_state(llm_config())]
    assert map_keys(LLM, bare)[0].keys() == map_keys(LLM, llm_state(llm_config()))[0].keys()
    with pytest.raises(UserError, match="same parameter"):
        map_keys(LLM, ["model.norm.weight", "norm.weight"])


@given(heads=st.integers(1, 5), half=st.integers(1, 6), rest=st.sampled_from([(), (1,), (7,)]))
def test_unpermute_undoes_llama_cpp(heads, half, rest):
    w = np.arange(heads * half * 2 * int(np.prod(rest))).reshape(heads * half * 2, *rest)
    back = unpermute(heads).apply(permute_as_llama_cpp(w, heads), w.shape)
    assert np.array_equal(back, w)


def test_only_query_and_key_are_permuted():
    keys = [
        "blk.0.attn_q.weight",
        "blk.0.attn_k.bias",
        "blk.0.attn_v.weight",
        "blk.0.attn_q_norm.weight",
    ]
    found, unknown = map_keys(gguf_table(2, 1, True), keys)
    assert not unknown
    x = np.arange(8)
    moved = {m.key for m in found.values() if not np.array_equal(m.transform.apply(x, x.shape), x)}
    assert moved == set(keys[:2])
