"""BLIP-2's Q-Former without a language model: features, matching scores, captions, retrieval."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.image_encoder import load_image_batches, pad_images
from minigpt4_jax.inference.model import Model
from minigpt4_jax.inference.preprocess import Images, PreparedPrompt
from minigpt4_jax.inference.requests import pad_rows
from minigpt4_jax.inference.retrieval import RetrievalScores, rerank
from minigpt4_jax.inference.shared_programs import shared_programs
from minigpt4_jax.models.image_text_encoder import ImageOutput, TextOutput
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.models.stage1 import Stage1
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain
from minigpt4_jax.processing.bert_tokenizer import BertTokenizer
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.tokenizer import Tokenizer

PAIR_BATCH = 32  # pairs of image and text through the Q-Former at a time
TEXT_BATCH = 256  # texts
IMAGE_BLOCK = 64  # images whose cosines with all texts are computed at a time
TEXT_LENGTH = 32  # tokens of a text that matching reads, as in training
RETRIEVAL_LENGTH = 35  # tokens of a text in retrieval
Texts = Sequence[str] | str


class ImageFeatures(NamedTuple):
    """What the Q-Former's P queries read from B images; arrays float32."""

    embeds: np.ndarray  # [B, P, D]
    projected: np.ndarray  # [B, P, E], of length 1: for cosine similarities
    vision: np.ndarray  # [B, S, Dv]: normalized outputs of the vision encoder


class TextFeatures(NamedTuple):
    """What the Q-Former makes of B texts, padded to the longest; arrays float32."""

    embeds: np.ndarray  # [B, T, D]
    projected: np.ndarray  # [B, T, E], of length 1; position 0 ([CLS]) is that of the text
    lengths: np.ndarray  # [B] int32: tokens of each text with [CLS] and [SEP]


class QFormerModel(Model):
    """A model of BLIP-2's first stage, as `load` returns it for the variant `blip2-qformer`.

    `generate` and `stream` write captions: an image for each prompt; a prompt is the beginning of the
    caption, usually "". See also `caption`.
    """

    tokenizer: BertTokenizer

    def __init__(
        self,
        module: MiniGpt,
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        *,
        exif: bool = False,
    ):
        super().__init__(module, config, tokenizer, mesh, exif=exif)
        compiled = shared_programs(nnx.graphdef(module), mesh)
        self._image, self._text, self._pairs = map(compiled, (_image, _text, _pairs))

    # --- features ----------------------------------------------------------------------------

    def encode_image(self, images: Iterable[ImageSource] | ImageSource) -> ImageFeatures:
        """Features of images. UserError: an unreadable image, or weights without projections."""
        self._check_projections()
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        results = []
        for pixels in load_image_batches(flat, self.config, exif=self.exif):
            features = self._image(self._state, pad_images(pixels))
            results.append([np.asarray(a)[: len(pixels)] for a in features])
        if not results:
            raise UserError("encode_image: there are no images; expected at least one")
        vision, queries, projected = (np.concatenate(a) for a in zip(*results, strict=True))
        return ImageFeatures(queries, projected, vision)

    def encode_text(self, texts: Texts, *, max_length: int | None = None) -> TextFeatures:
        """Features of texts. max_length: cut texts to this many tokens, [CLS] and [SEP] included.

        UserError: a text longer than the model's positions, or weights without projections.
        """
        self._check_projections()
        tokens = self._tokenize(texts, max_length)
        lengths = np.array([len(row) for row in tokens], np.int32)
        longest = int(lengths.max())
        parts = [[_to_length(a, longest) for a in arrays] for arrays in self._read_texts(tokens)]
        embeds, projected = (np.concatenate(a) for a in zip(*parts, strict=True))
        return TextFeatures(embeds, projected, lengths)

    def encode_multimodal(
        self,
        images: Iterable[ImageSource] | ImageSource | ImageFeatures,
        texts: Texts,
        *,
        max_length: int | None = None,
    ) -> np.ndarray:
        """The queries of images and texts read together, pair by pair: [B, P, D] float32.

        images may be the features of `encode_image`. Otherwise as `encode_text`.
        """
        features = self._image_features(images)
        tokens = self._tokenize(texts, max_length)
        pairs = _broadcast_pairs(len(features.vision), tokens)
        return np.concatenate([queries for queries, _ in self._read_pairs(features, *pairs)])

    # --- scores ------------------------------------------------------------------------------

    def itc_scores(
        self,
        images: Iterable[ImageSource] | ImageSource | ImageFeatures,
        texts: Texts | TextFeatures,
    ) -> np.ndarray:
        """Contrastive similarity of every image and text: [images, texts] float32, the largest cosine
        of a query and the text."""
        features = self._image_features(images)
        if not isinstance(texts, TextFeatures):
            texts = self.encode_text(texts, max_length=TEXT_LENGTH)
        return similarity(features, texts)

    def itm_logits(
        self,
        images: Iterable[ImageSource] | ImageSource | ImageFeatures,
        texts: Texts,
        *,
        max_length: int = TEXT_LENGTH,
    ) -> np.ndarray:
        """Matching logits of pairs: [B, 2] float32, the second is that of a match. texts: one for each
        image, or several for a single image, or one for several images."""
        features = self._image_features(images)
        tokens = self._tokenize(texts, max_length)
        pairs = _broadcast_pairs(len(features.vision), tokens)
        return np.concatenate([logits for _, logits in self._read_pairs(features, *pairs)])

    def itm_scores(
        self,
        images: Iterable[ImageSource] | ImageSource | ImageFeatures,
        texts: Texts,
        *,
        max_length: int = TEXT_LENGTH,
    ) -> np.ndarray:
        """The probability that a pair matches: [B] float32; otherwise as `itm_logits`."""
        logits = self.itm_logits(images, texts, max_length=max_length)
        return np.asarray(jax.nn.softmax(logits, axis=1))[:, 1]

    def retrieve(
        self,
        images: Iterable[ImageSource] | ImageFeatures,
        texts: Texts,
        *,
        k_test: int = 128,
        max_length: int = RETRIEVAL_LENGTH,
    ) -> RetrievalScores:
        """Scores for finding texts by images and images by texts: those of the k_test candidates with
        the largest cosine are the matching logit plus the cosine, others -100 (LAVIS' compute_sim_matrix).

        `retrieval.recall` turns them into R@1, R@5 and R@10.
        """
        if k_test < 1:
            raise UserError(f"k_test {k_test}: expected at least 1")
        features = self._image_features(images)
        tokens = self._tokenize(texts, max_length)
        projected = np.concatenate([a[:, 0] for _, a in self._read_texts(tokens)])
        similarities = _max_cosine(features.projected, projected)

        def match(pairs: np.ndarray) -> np.ndarray:  # [N, 2] image and text numbers -> [N]
            rows = [tokens[j] for j in pairs[:, 1]]
            read = self._read_pairs(features, pairs[:, 0], rows)
            return np.concatenate([logits[:, 1] for _, logits in read])

        return rerank(similarities, match, k_test)

    # --- captions ----------------------------------------------------------------------------

    def caption(
        self,
        images: Iterable[ImageSource] | ImageSource,
        *,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        sample: bool = False,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> list[str]:
        """A caption for each image, by default as LAVIS' stage 1 writes it.

        max_length, min_length: tokens of a caption including `[DEC]`, with which it begins. sample:
        draw each token from the most likely ones (top_p), instead of beam search.
        """
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        config = caption_config(
            num_beams=num_beams, max_length=max_length, min_length=min_length, sample=sample,
            top_p=top_p, seed=seed,
        )  # fmt: skip
        return self.generate(flat, [""] * len(flat), config)

    def prepare_prompts(
        self, images: Images | None, prompts: Sequence[str], config: GenerationConfig
    ) -> list[PreparedPrompt | UserError]:
        """As `Model.prepare_prompts`. UserError: a prompt without exactly one image."""
        if images is None:
            raise UserError("a Q-Former captions images: expected an image for each prompt")
        return super().prepare_prompts(images, prompts, config)

    # --- steps -------------------------------------------------------------------------------

    def _image_features(
        self, images: Iterable[ImageSource] | ImageSource | ImageFeatures
    ) -> ImageFeatures:
        return images if isinstance(images, ImageFeatures) else self.encode_image(images)

    def _check_projections(self) -> None:
        q = self.config.qformer
        if q is None or not q.itc_width:
            raise UserError("this Q-Former has no contrastive projections and no matching head")

    def _tokenize(self, texts: Texts, max_length: int | None) -> list[list[int]]:
        """Rows of ids. UserError: no text, or too long a one."""
        flat = [texts] if isinstance(texts, str) else list(texts)
        if not flat:
            raise UserError("there are no texts; expected at least one")
        q = self.config.qformer
        limit = q.max_positions if q is not None else 0
        rows = []
        for i, text in enumerate(flat):
            if not isinstance(text, str):
                raise UserError(f"text {i}: got {type(text).__name__}; expected text")
            rows.append(self.tokenizer.encode_text(text, max_length))
            if len(rows[-1]) > limit:
                raise UserError(
                    f"text {i}: {len(rows[-1])} tokens exceed the Q-Former's {limit} positions; shorten it, "
                    "or give max_length"
                )
        return rows

    def _read_texts(self, tokens: list[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Embeddings [B, T, D] and projections [B, T, E] of some texts at a time, padded differently."""
        for start in range(0, len(tokens), TEXT_BATCH):
            rows = tokens[start : start + TEXT_BATCH]
            embeds, projected = self._text(self._state, *pad_rows(rows))
            yield np.asarray(embeds)[: len(rows)], np.asarray(projected)[: len(rows)]

    def _read_pairs(
        self, images: ImageFeatures, numbers: np.ndarray, tokens: list[list[int]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Queries [B, P, D] and matching logits [B, 2] of some pairs at a time: of the images `numbers` [N]
        and of N texts. There may be millions of pairs."""
        vision = images.vision
        for start in range(0, len(tokens), PAIR_BATCH):
            part = slice(start, start + PAIR_BATCH)
            ids, counts = pad_rows(tokens[part])
            rows = np.zeros((len(ids), *vision.shape[1:]), np.float32)
            rows[: len(tokens[part])] = vision[numbers[part]]
            queries, logits = self._pairs(self._state, rows, ids, counts)
            count = len(tokens[part])
            yield np.asarray(queries)[:count], np.asarray(logits)[:count]


def caption_config(
    *,
    num_beams: int = 3,
    max_length: int = 30,
    min_length: int = 10,
    sample: bool = False,
    top_p: float = 0.9,
    seed: int = 0,
) -> GenerationConfig:
    """The options of `QFormerModel.caption` as those of `Model.generate`."""
    if max_length < 2:
        raise UserError(f"max_length {max_length}: expected 2 or more, as [DEC] counts")
    return GenerationConfig(
        max_new_tokens=max_length - 1, min_new_tokens=min_length, compat=True, seed=seed,
        num_beams=1 if sample else num_beams, temperature=1.0 if sample else 0.0,
        top_p=top_p if sample else 1.0,
    )  # fmt: skip


def similarity(images: ImageFeatures, texts: TextFeatures) -> np.ndarray:
    """The largest cosine of an image's queries and a text: [images, texts] float32."""
    return _max_cosine(images.projected, texts.projected[:, 0])


def _max_cosine(queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """queries [I, P, E], texts [T, E] -> [I, T]."""
    blocks = range(0, len(queries), IMAGE_BLOCK)
    return np.concatenate(
        [np.einsum("ipe,te->itp", queries[i : i + IMAGE_BLOCK], texts).max(axis=2) for i in blocks]
    )


def _to_length(a: np.ndarray, length: int) -> np.ndarray:
    """a [B, T, D] with T = length: cut, or filled up with zeros."""
    missing = max(length - a.shape[1], 0)
    return np.pad(a[:, :length], ((0, 0), (0, missing), (0, 0)))


def _broadcast_pairs(images: int, tokens: list[list[int]]) -> tuple[np.ndarray, list[list[int]]]:
    """Numbers of images and texts, equally many; a single one goes with each of the others."""
    count = max(images, len(tokens))
    numbers = np.zeros(count, int) if images == 1 else np.arange(images)
    if len(tokens) == 1:
        tokens = tokens * count
    if len(numbers) != len(tokens):
        raise UserError(
            f"{images} images and {len(tokens)} texts; expected the same number, or one of either"
        )
    return numbers, tokens


# --- programs --------------------------------------------------------------------------------


def _image(model: Stage1, pixels: jax.Array) -> ImageOutput:
    """pixels [B, S, S, 3] -> features of the images."""
    return ImageOutput(*map(constrain, model.image_features(constrain(pixels, BATCH_AXES))))


def _text(model: Stage1, tokens: jax.Array, lengths: jax.Array) -> TextOutput:
    """tokens [B, T], lengths [B] -> features of the texts."""
    return TextOutput(*map(constrain, model.text_features(_at_most(tokens, model), lengths)))


def _pairs(
    model: Stage1, vision: jax.Array, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """vision [B, S, Dv], tokens [B, T], lengths [B] -> queries [B, P, D] that have read both, and logits
    [B, 2]."""
    text = model.qformer.embed_text(_at_most(tokens, model))
    queries = model.qformer.read_both(vision, text, lengths)
    return constrain(queries), constrain(model.match(queries))


def _at_most(tokens: jax.Array, model: Stage1) -> jax.Array:
    """tokens [B, T] without padding beyond the model's positions."""
    return jnp.asarray(tokens)[:, : model.qformer.positions.shape[0]]
