"""Miniatures of published datasets, in the layout that their authors use."""

import io
import json
import pickle
import tarfile

from PIL import Image

from minigpt4_jax.data.datasets import open_dataset


class Disk:
    """A folder in which tests write annotations and images."""

    def __init__(self, root):
        self.root = root

    def json(self, name, value):
        return self.text(name, json.dumps(value))

    def text(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def bytes(self, name, data):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def picture(self, name, size=(8, 6), color=0):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        return str(path)

    def tar(self, name, rows):
        """A tar in webdataset's layout. rows: {extension of a member: content} each."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz" if name.endswith(".gz") else "w") as tar:
            for n, row in enumerate(rows):
                for ending, data in row.items():
                    member = tarfile.TarInfo(f"{n:09d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        return path

    def open(self, name, annotations, images=None, **options):
        return open_dataset(
            name, self.root / annotations, None if images is None else self.root / images, **options
        )


class FixedDraws:
    """Replaces a random generator: `integers` returns the given numbers in turn."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)
        self.limits = []

    def integers(self, limit):
        self.limits.append(limit)
        number = self.numbers.pop(0)
        assert 0 <= number < limit
        return number


def first_draw(source, index=0, draws=8):
    """An example whose every draw is the first choice."""
    return source.example(index, FixedDraws(*[0] * draws))


def choices(source, index, draws):
    """The number of choices of each draw of an example."""
    rng = FixedDraws(*[0] * draws)
    source.example(index, rng)
    assert not rng.numbers
    return rng.limits


def write_everything(disk, count=1):
    """Write `count` rows of each published dataset below one folder; texts and images differ."""
    ids = range(7, 7 + count)
    for n in ids:
        color = (40 * n % 256, 90 * n % 256, 10 * n)
        for name in (
            f"coco/images/COCO_train2014_{n:012d}.jpg", f"textcaps/train_images/{n}.jpg",
            f"gqa/images/{n}.jpg", f"ocrvqa/images/{n}.jpg", f"visual_genome/VG_100K/{n}.jpg",
            f"filtered_flickr/images/{n}.jpg", f"cc_sbu_align/image/{n}.jpg",
        ):  # fmt: skip
            disk.picture(name, color=color)
    _write_captions(disk, ids)
    _write_questions(disk, ids)
    _write_boxes(disk, ids)
    _write_dialogues(disk, ids)


def _coco(n):
    return {"image": f"train2014/COCO_train2014_{n:012d}.jpg", "question": f"What is {n}?"}


def _write_captions(disk, ids):
    captions = [{"image_id": str(n), "caption": f"A cat, {n}."} for n in ids]
    disk.json("cc_sbu_align/filter_cap.json", {"annotations": captions})
    disk.json(
        "coco_captions/annotations/coco_karpathy_train.json",
        [{**_coco(n), "caption": f"A cat {n}"} for n in ids],
    )
    texts = [{"image_id": str(n), "caption_str": f"A {n}"} for n in ids]
    disk.json("textcaps/TextCaps_0.1_train.json", {"data": texts})


def _write_questions(disk, ids):
    for name in ("vqav2/vqa_train", "vqav2/vqa_val", "okvqa/okvqa_train"):
        disk.json(f"{name}.json", [{**_coco(n), "answer": ["cat", "dog", f"{n}"]} for n in ids])
    direct = [{**_coco(n), "direct_answers": ["cat", f"{n}"]} for n in ids]
    disk.json("aokvqa/aokvqa_v1p0_train.json", direct)
    gqa = [{**_coco(n), "image": f"{n}.jpg", "answer": "cat"} for n in ids]
    disk.json("gqa/train_balanced_questions.json", gqa)
    book = {"imageURL": "a/b.jpg", "split": 1, "questions": ["What?"]}
    disk.json("ocrvqa/dataset.json", {str(n): {**book, "answers": [f"cat {n}"]} for n in ids})


def _write_boxes(disk, ids):
    sizes = [{"id": n, "width": 80, "height": 60} for n in ids]
    boxes = [{"id": n, "bbox": [n, 1, 40, 4]} for n in ids]
    refs = [
        {
            "image_id": n,
            "ann_id": n,
            "split": "train",
            "sentences": [{"raw": "it"}, {"raw": f"{n}"}],
        }
        for n in ids
    ]
    for name, split in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        folder = f"refcoco_annotations/{name}"
        disk.json(f"{folder}/instances.json", {"images": sizes, "annotations": boxes})
        disk.bytes(f"{folder}/refs({split}).p", pickle.dumps(refs))
    region = {"x": 1, "y": 1, "width": 40, "height": 40}
    captions = [{"id": n, "regions": [{**region, "phrase": f"it {n}"}]} for n in ids]
    disk.json("visual_genome/region_descriptions.json", captions)
    sizes = [
        {"image_id": n, "width": 80, "height": 60, "url": f"http://a/VG_100K/{n}.jpg"} for n in ids
    ]
    disk.json("visual_genome/image_data.json", sizes)
    texts = ("grounded_caption", "caption", "output", "phrase", "bbox")
    flickr = [{"image_id": str(n), **dict.fromkeys(texts, f"a {n}")} for n in ids]
    for name in ("groundedcaption", "captiontobbox", "phrasetobbox"):
        disk.json(f"filtered_flickr/{name}.json", flickr)


def _write_dialogues(disk, ids):
    def turns(n):
        return [{"from": "human", "value": f"What {n}?"}, {"from": "gpt", "value": f"A cat {n}."}]

    dialogues = [{"id": f"{n:012d}", "conversations": turns(n)} for n in ids]
    for name in ("detail_23k", "complex_reasoning_77k", "conversation_58k"):
        disk.json(f"llava/{name}.json", dialogues)
    disk.json("multitask_conversation/multi_task_conversation.json", dialogues)
    task = {"constraints": None, "output": "a"}
    tasks = [{"instances": [{**task, "instruction_with_input": f"Say {n}."}]} for n in ids]
    disk.json("unnatural_instructions/filtered_unnatural_instruction.json", tasks)
