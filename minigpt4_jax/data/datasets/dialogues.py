"""Conversations and instructions: the LLaVA files, multitask_conversation, unnatural_instruction."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.data.annotations import identity_of, objects_of, read_list, text_of
from minigpt4_jax.data.datasets.base import DatasetRow, Unused, image_question
from minigpt4_jax.data.datasets.vqa import coco_train_image
from minigpt4_jax.data.json_records import Example, blip_caption
from minigpt4_jax.errors import UserError

_NO_ANSWER = Unused("without a question or an answer")


def _read_llava(files: Sequence[Path], all_turns: bool) -> Iterator[DatasetRow | Unused]:
    """A file of LLaVA-Instruct-150K: [{"id": "000000123456", "conversations": [{"from": "human",
    "value": "<image>\\nWhat?"}, {"from": "gpt", "value"}, ...]}], about images of COCO's train2014
    (huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; llava_dataset.py)."""
    for file in files:
        for where, row in read_list(file):
            turns = [text_of(t, "value", where) for t in objects_of(row, "conversations", where)]
            image = coco_train_image(identity_of(row, "id", where))
            if not all_turns:
                turns = turns[:2]
            if len(turns) < 2 or len(turns) % 2 or not all(turn.strip() for turn in turns[1:]):
                yield _NO_ANSWER
                continue
            first = turns[0].replace("<image>", "").replace("\n", "").strip()
            if not all_turns:  # the original cleans these questions, but not those of conversations
                first = blip_caption(first)
            yield DatasetRow(image, ([first, *turns[2::2]], turns[1::2]))


# detail_23k.json and complex_reasoning_77k.json: one question and its answer
read_question = partial(_read_llava, all_turns=False)
# conversation_58k.json, and MiniGPT-v2's multi_task_conversation.json with the same layout
read_conversation = partial(_read_llava, all_turns=True)


def make_dialogue(
    images: tuple[str, ...], fields: Sequence[Any], rng: np.random.Generator
) -> Example:
    (first, *later), answers = fields
    return Example(images, (image_question(images, first), *later), tuple(answers))


def read_unnatural_instruction(files: Sequence[Path]) -> Iterator[DatasetRow | Unused]:
    """filtered_unnatural_instruction.json: [{"instances": [{"instruction_with_input", "constraints":
    text or null, "output"}]}], the first instance of each (github.com/orhonovich/unnatural-instructions,
    UnnaturalDataset)."""
    for file in files:
        for where, row in read_list(file):
            instances = objects_of(row, "instances", where)
            if not instances:
                raise UserError(f'{where}: "instances" is empty; expected one or more')
            task = instances[0]
            question = text_of(task, "instruction_with_input", where)
            if task.get("constraints") is not None:
                question += " " + text_of(task, "constraints", where)
            question, answer = blip_caption(question), blip_caption(text_of(task, "output", where))
            yield DatasetRow("", ([question], [answer])) if question and answer else _NO_ANSWER
