"""Rows a second of `minigpt4 evaluate` beside the original's way, with the same weights.

    python benchmarks/evaluate.py --model=DIR --data=DATA [--benchmark=shapes_description] [--rows=100]
        [--rounds=3] [--batch=32] [--peer-batch=10]

DIR is a model directory with a LLaMA-like language model and without LoRA: the quickstart's stage2/model, or
tiny_v2's after `python -m convert merge`. DATA is a data root with DATA/shapes (python -m minigpt4_jax.shapes
--out=DATA/shapes). Ours is what the command does: images read by threads, each encoded once, rows joining and
leaving a running batch, prompts that begin alike processed once. The original's way
(eval_vqa.py) is transformers' generate on left-padded batches of 10 rows in file order, each with the images
of its rows, until the last row has ended. Both are greedy, with the same prompts and limits, in float32.
Prints rows/s, their ratio, and the share of equal answers.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import argument_parser, median_ratio, time_in_turns
from torch_peer import load_weights, qformer, vit

import minigpt4_jax
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.config import IMAGE, IMAGE_MEAN, IMAGE_STD
from minigpt4_jax.errors import UserError, run
from minigpt4_jax.evaluation.answering import AnswerOptions, answer_task
from minigpt4_jax.evaluation.answers import AnswerFile
from minigpt4_jax.evaluation.task import Task, open_tasks
from minigpt4_jax.inference.model import Model
from minigpt4_jax.processing.chat_templates import chat_format, with_images
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.processing.sequences import prompt_tokens


class OriginalWay:
    """The model in PyTorch, asked as the original's evaluation scripts do."""

    def __init__(self, folder: Path, model: Model):
        self._model, self._config = model, model.config
        tensors = model_directory.Tensors(folder)
        self._llm, self._weights = load_weights(model.config.llm, tensors)
        self._chat = chat_format(model.config, model.tokenizer)

    @torch.no_grad()
    def answers(self, task: Task, batch_size: int) -> list[str]:
        rows, found = task.used_rows, []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            visual = self._encode([task.image(row) for row in batch])
            prompts = [self._embed(row.question, v) for row, v in zip(batch, visual, strict=True)]
            found += self._generate(prompts, task.benchmark.max_new_tokens)
        return found

    def _encode(self, paths: list[Path | None]) -> torch.Tensor:
        """Visual tokens [B, P, D]."""
        size, w = self._config.vision.image_size, self._weights
        pixels = np.stack([load_pixels(path, size) for path in paths if path])
        mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
        encoded = vit(w, self._config, (torch.from_numpy(pixels) / 255 - mean) / std)
        if self._config.qformer is None:
            queries = encoded[:, 1:].reshape(len(paths), self._config.visual_tokens, -1)
        else:
            queries = qformer(w, self._config, encoded)
        return torch.nn.functional.linear(queries, w["projection.weight"], w["projection.bias"])

    def _embed(self, question: str, visual: torch.Tensor) -> torch.Tensor:
        """The prompt's embeddings [T, D]."""
        prompt = self._chat.render([(with_images(question, 1), None)])
        ids = prompt_tokens(self._model.tokenizer, self._config, prompt, images=1, extra_bos=True)
        tokens = torch.tensor(ids)
        slots = tokens == IMAGE
        embeds = self._llm.get_input_embeddings()(tokens.masked_fill(slots, 0))
        return embeds.masked_scatter(slots[:, None], visual)

    def _generate(self, prompts: list[torch.Tensor], max_new_tokens: int) -> list[str]:
        longest, tokenizer = max(map(len, prompts)), self._model.tokenizer
        embeds = torch.zeros(len(prompts), longest, prompts[0].shape[1])
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            embeds[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        ends = [tokenizer.encode(self._config.end_symbol)[-1], tokenizer.eos_id]
        output = self._llm.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=ends, pad_token_id=tokenizer.pad_id, use_cache=True,
        )  # fmt: skip
        texts = [tokenizer.decode(ids) for ids in output.tolist()]
        return [text.split(self._config.end_symbol)[0].strip() for text in texts]


def ours(model: Model, task: Task, batch_size: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = AnswerFile(Path(folder) / "answers.jsonl", task.rows, {}, retry_errors=False)
        with file:
            answer_task(model, task, file, AnswerOptions(batch_size), progress=False)
    return [file.rounds(n)[0]["answer"] for n in range(task.num_rows)]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--benchmark", default="shapes_description")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peer-batch", type=int, default=10, help="the original's is 10")
    args = parser.parse_args()
    model = minigpt4_jax.load(args.model, "float32")
    if model.config.lora is not None:
        raise UserError(f"--model={args.model}: has LoRA; run `python -m convert merge` first")
    task = open_tasks([args.benchmark], args.data, ["heldout"], args.rows)[0]
    peer = OriginalWay(args.model, model)
    answers: dict[str, list[str]] = {}

    def keep(name: str, found: list[str]) -> None:
        answers[name] = found

    times = time_in_turns(
        args.rounds,
        {
            "ours": lambda: keep("ours", ours(model, task, args.batch)),
            "original": lambda: keep("original", peer.answers(task, args.peer_batch)),
        },
    )
    for name, seconds in times.items():
        print(f"{name:10} {task.num_rows / statistics.median(seconds):8.2f} rows/s")
    ratio = median_ratio(times["original"], times["ours"])
    same = [a == b for a, b in zip(answers["ours"], answers["original"], strict=True)]
    print(f"{ratio:.2f} times as fast; {sum(same)} of {len(same)} answers are equal")
    words = sorted(len(a.split()) for a in answers["ours"])
    print(f"words of an answer: {words[0]} to {words[-1]}, median {words[len(words) // 2]}")


if __name__ == "__main__":
    run(main)
