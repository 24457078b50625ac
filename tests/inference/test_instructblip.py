"""InstructBLIP, from `convert build` to answers, against transformers' class on small random models."""

import shutil

import jax
import numpy as np
import pytest
import transformers
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2
from helpers.paths import TOKENIZER
from helpers.sideways import upright, write_photo

import minigpt4_jax
from convert.build import build
from convert.build_plan import BuildRequest
from convert.export import export
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.loading import begin_loading
from minigpt4_jax.models.minigpt import Instruction
from minigpt4_jax.processing.images import load_pixels, normalize

torch = pytest.importorskip("torch")
pytestmark = NEEDS_BLIP2
PROMPTS = ["what color is the dog?", "Describe the two men and the boat in detail.", "a"]
SIZE, QUERIES = 28, 3


def config_of(kind):
    """The configuration of a small InstructBLIP with "vicuna" or "flant5"."""
    if kind == "vicuna":
        text = transformers.LlamaConfig(
            vocab_size=800, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=256, bos_token_id=2, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
    else:
        text = transformers.T5Config(
            vocab_size=416, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
    return transformers.InstructBlipConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": SIZE,
            "num_attention_heads": 2,
        },
        qformer_config={
            "vocab_size": 3001, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
            "intermediate_size": 28, "max_position_embeddings": 64, "encoder_hidden_size": 16,
        },
        text_config=text, num_query_tokens=QUERIES, image_token_index=text.vocab_size - 1,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["vicuna", "flant5"])
def case(request, tmp_path_factory):
    """(kind, transformers' model, its directory, the model directory built from it)."""
    kind, folder = request.param, tmp_path_factory.mktemp("instructblip")
    torch.manual_seed(0)
    theirs = transformers.InstructBlipForConditionalGeneration(config_of(kind)).eval()
    if kind == "flant5":  # transformers 5 ties every T5
        theirs.language_model.lm_head = torch.nn.Linear(24, 416, bias=False)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            p.copy_(torch.randn(p.shape) * 0.3 + (1.0 if norm else 0.0))
        for name, p in theirs.named_parameters():  # keys have no bias
            if name.endswith("qkv.bias"):
                p[16:32] = 0
    theirs.save_pretrained(folder / "hf")
    source = TOKENIZER if kind == "vicuna" else reference.CHECKPOINTS / "flan-t5"
    copy_tokenizer(source, folder / "hf")
    (folder / "hf" / "qformer_tokenizer").mkdir()
    shutil.copy(reference.BERT / "vocab.txt", folder / "hf" / "qformer_tokenizer")
    build(
        BuildRequest(
            variant=f"instructblip-{kind}", checkpoint=folder / "hf", llm=None, out=folder / "ours"
        )
    )
    return kind, theirs, folder / "hf", folder / "ours"


def copy_tokenizer(source, folder):
    names = ("tokenizer.model", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")
    for name in names:
        if (source / name).is_file():
            shutil.copy(source / name, folder)


def inputs_of(kind, theirs, prompt, image):
    """What transformers' class reads: pixels, and ids of both tokenizers."""
    bert = transformers.BertTokenizer(str(reference.BERT / "vocab.txt"))
    if kind == "vicuna":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(str(TOKENIZER / "tokenizer.model"))
        ids = [2, *model.encode(prompt)]
    else:
        t5 = transformers.AutoTokenizer.from_pretrained(str(reference.CHECKPOINTS / "flan-t5"))
        ids = t5(prompt)["input_ids"]
    pixels = normalize(load_pixels(image, SIZE)).transpose(2, 0, 1)[None]
    return {
        "pixel_values": torch.tensor(pixels),
        "input_ids": torch.tensor([[theirs.config.image_token_index] * QUERIES + ids]),
        "qformer_input_ids": torch.tensor([bert(prompt)["input_ids"]]),
    }


def test_logits(case):
    kind, theirs, _, ours = case
    module, config = load_model(ours, "float32")
    inputs = inputs_of(kind, theirs, PROMPTS[0], reference.pictures()[0])
    decoder = {} if kind == "vicuna" else {"decoder_input_ids": torch.tensor([[0, 7, 9]])}
    with torch.no_grad():
        expected = theirs(**inputs, **decoder).logits[0].numpy()
    pixels = inputs["pixel_values"].numpy().transpose(0, 2, 3, 1)[:, None]
    text = inputs["qformer_input_ids"].numpy()
    instruction = Instruction(np.pad(text, ((0, 0), (0, 5))), np.array([text.shape[1]]))
    tokens = inputs["input_ids"].numpy().astype(np.int32)
    tokens[0, :QUERIES] = -1

    @jax.jit
    def logits(module):
        visual = module.encode(pixels, instruction=instruction)
        embeds, lengths = module.merge(tokens, visual), np.array([tokens.shape[1]], np.int32)
        if kind == "flant5":
            encoded = module.llm.encode(embeds, lengths)
            embeds = module.llm.embed_tokens(np.array([[0, 7, 9]]))
            hidden = module.llm(embeds, np.array([3], np.int32), encoded=encoded)
        else:
            hidden = module.llm(embeds, lengths)
        return module.llm.logits(hidden)[0]

    np.testing.assert_allclose(logits(module), expected, atol=1e-4, rtol=1e-4)
    assert config.tokenizer.bos_id == (2 if kind == "vicuna" else None)


def test_answers(case):
    """Greedy and by beams, of several rows, each of which has an instruction of its own."""
    kind, theirs, _, ours = case
    model = minigpt4_jax.load(ours, "float32")
    images = reference.pictures()[: len(PROMPTS)]
    # Limits, beams and rows as in the calls below, which so need no programs of their own.
    for beams in (1, 5):
        details = model.generate_details(images, PROMPTS, max_new_tokens=10, num_beams=beams)
        for prompt, image, (output,) in zip(PROMPTS, images, details, strict=True):
            inputs = inputs_of(kind, theirs, prompt, image)
            with torch.no_grad():
                (ids,) = theirs.generate(
                    **inputs, max_new_tokens=10, num_beams=beams, do_sample=False
                ).tolist()
            ids = ids[inputs["input_ids"].shape[1] :] if kind == "vicuna" else ids[1:]
            assert output.ids == reference.ended(ids, 2 if kind == "vicuna" else 1)
    text = "".join(model.stream(images[0], PROMPTS[0], max_new_tokens=10))
    assert text == model.generate(images[:1], PROMPTS[:1], max_new_tokens=10)[0]
    assert len(model.answer(images, PROMPTS[0], max_length=10)) == 3
    assert len(model.predict_answers(images, PROMPTS)) == 3
    assert model.conversation().ask(PROMPTS[0], images[0], max_new_tokens=10) == text
    nll, _ = model.score(images, [PROMPTS[0]] * 3, ["red", "blue", "two"])
    assert np.isfinite(nll).all()
    with pytest.raises(UserError, match="together with its prompt"):
        model.encode_images(images)


def test_lavis_files(case, tmp_path):
    """A .pth has the Q-Former, ln_vision and the projection; the rest comes from elsewhere."""
    kind, theirs, hf, ours = case
    keys = export(ours, tmp_path / "instruct.pth")
    projection = "llm_proj" if kind == "vicuna" else "t5_proj"
    assert {
        f"{projection}.weight", "query_tokens", "ln_vision.bias",
        "Qformer.bert.embeddings.position_embeddings.weight",
        "Qformer.bert.encoder.layer.2.intermediate.dense.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.bias",
    } <= set(keys)  # fmt: skip
    theirs.language_model.save_pretrained(tmp_path / "llm")
    copy_tokenizer(hf, tmp_path / "llm")
    request = BuildRequest(
        variant=f"instructblip-{kind}", vision=ours, llm=tmp_path / "llm", out=tmp_path / "again",
        checkpoint=tmp_path / "instruct.pth", tokenizer=reference.BERT, settings=["qformer.heads=2"],
    )  # fmt: skip
    build(request)
    again, first = Tensors(tmp_path / "again"), Tensors(ours)
    assert set(again) == set(first)
    for name in first:
        np.testing.assert_array_equal(again[name], first[name], err_msg=name)
    with pytest.raises(UserError, match=r"needs --tokenizer=DIR with BERT's vocab\.txt"):
        build(BuildRequest(**{**vars(request), "tokenizer": None, "out": tmp_path / "x"}))


def test_what_does_not_belong_together(case, tmp_path):
    kind, _, hf, ours = case

    def refused(message, **changes):
        request = {
            "variant": f"instructblip-{kind}",
            "checkpoint": hf,
            "llm": None,
            "out": tmp_path / "x",
        }
        with pytest.raises(UserError, match=message):
            build(BuildRequest(**(request | changes)))
        assert not (tmp_path / "x").exists()

    refused(
        "model_type is 'instructblip', but --variant is blip2-opt; choose an", variant="blip2-opt"
    )
    refused(
        "has 3001 with .* give the --tokenizer",
        tokenizer=reference.CHECKPOINTS / "bert-base-uncased-full",
    )
    copied = shutil.copytree(hf, tmp_path / "hf")
    (copied / "config.json").write_text(
        (copied / "config.json")
        .read_text()
        .replace('"num_query_tokens": 3', '"num_query_tokens": 4')
    )
    refused("query", checkpoint=copied)
    with pytest.raises(UserError, match="cannot be trained"):
        minigpt4_jax.train({"model": str(ours), "data": {"path": "x.json"}}, tmp_path / "run")


def test_photos_are_turned_on_request(case, tmp_path):
    *_, ours = case
    photo = write_photo(tmp_path / "1.png")
    shown = load_pixels(upright(photo), SIZE)
    for exif in (False, True):
        model = begin_loading(ours, "float32", exif=exif).model
        (images,) = model.with_prompts([[photo]], PROMPTS[:1])
        assert np.array_equal(model._load_pixels(images[0]).image, shown) == exif
