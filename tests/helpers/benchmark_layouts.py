"""Miniatures of the benchmarks, in the layout of their published files, all below one data root."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 4  # rows of each


class Root:
    """A data root that files and pictures are written to."""

    def __init__(self, root: Path):
        self.root = root
        self._rng = np.random.default_rng(0)

    def json(self, name, value):
        self._text(name, json.dumps(value))

    def lines(self, name, rows):
        self._text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def picture(self, name):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self._rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)

    def _text(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_all(folder: Path, only: str = "") -> Path:
    """All benchmarks, COUNT rows each (RefCOCO: each split, POPE: each file). only: the name of one, with
    whatever its writer makes besides."""
    root = Root(folder)
    for write, names in WRITERS.items():
        if not only or only in names:
            write(root)
    return folder


def refcoco(root):
    splits = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB"),
              "refcocog": ("val", "test")}  # fmt: skip
    for n in range(COUNT):
        root.picture(f"coco/train2014/COCO_train2014_{n:012d}.jpg")
    for name, names in splits.items():
        for split in names:
            rows = [
                {"img_id": f"COCO_train2014_{n:012d}_{n}", "sents": f"thing {n} {split}",
                 "bbox": [2, 3, 10, 12], "height": 30, "width": 40}
                for n in range(COUNT)
            ]  # fmt: skip
            root.json(f"refcoco/{name}/{name}_{split}.json", rows)


def vqa(root):
    """OK-VQA with the original's names of files, and VQAv2."""
    ten = [{"answer": "cat", "answer_id": n + 1, "answer_confidence": "yes"} for n in range(10)]
    ids = range(100, 100 + COUNT)
    for n in ids:
        root.picture(f"coco/val2017/{n:012d}.jpg")
        root.picture(f"coco/val2014/COCO_val2014_{n:012d}.jpg")
    questions = [{"image_id": n, "question": f"what is {n}?", "question_id": n * 10} for n in ids]
    annotations = [
        {"image_id": n, "question_id": n * 10, "question_type": "what is", "answer_type": "other",
         "answers": ten}
        for n in ids
    ]  # fmt: skip
    root.json("okvqa/okvqa_test_split.json", questions)
    root.json("okvqa/OpenEnded_mscoco_val2014_questions_clean.json", {"questions": questions})
    root.json("okvqa/mscoco_val2014_annotations_clean.json", {"annotations": annotations})
    root.json("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    root.json("vqav2/v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    root.picture("coco/train2017/000000000001.jpg")


def gqa(root):
    for n in range(COUNT):
        root.picture(f"gqa/images/{n}.jpg")
    rows = [{"image": f"{n}.jpg", "question": f"is it {n}?", "answer": "yes", "question_id": str(n)}
            for n in range(COUNT)]  # fmt: skip
    root.json("gqa/testdev_balanced_questions.json", rows)


def vsr(root):
    for n in range(COUNT):
        root.picture(f"vsr/images/{n:012d}.jpg")
    rows = [{"image": f"{n:012d}.jpg", "image_link": "http://x", "caption": f"The cat is left of {n}.",
             "label": n % 2, "relation": "left of"} for n in range(COUNT)]  # fmt: skip
    root.lines("vsr/test.jsonl", rows)


def iconvqa(root):
    """With a row more than one of the original's batches."""
    for n in range(COUNT):
        root.picture(f"iconvqa/choose_txt/val/{n}/image.png")
    rows = [{"image_id": str(n % COUNT), "question": f"pick {n}", "answer": n % 2,
             "choices": ["one", "two", "three blue dots"][: 2 + n % 2]} for n in range(11)]  # fmt: skip
    root.json("iconvqa/choose_text_val.json", rows)


def vizwiz(root):
    rows = []
    for n in range(COUNT):
        name = f"VizWiz_val_{n:08d}.jpg"
        root.picture(f"vizwiz/val/{name}")
        answers = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
        rows.append({"image": name, "question": "what?", "answers": answers, "answerable": 0})
    root.json("vizwiz/val.json", rows)


def hateful_memes(root):
    rows = [
        {"id": n, "img": f"img/{n:05d}.png", "label": n % 2, "text": f"words {n}"}
        for n in range(COUNT)
    ]
    for row in rows:
        root.picture(f"hm/{row['img']}")
    root.lines("hm/dev.jsonl", rows)


def captions(root):
    """COCO Caption on the images of OK-VQA, and NoCaps."""
    ids = range(100, 100 + COUNT)
    annotations = [
        {"image_id": n, "caption": f"a cat {n} {k}", "id": n * 2 + k} for n in ids for k in (0, 1)
    ]
    truth = {"images": [{"id": n} for n in ids], "annotations": annotations}
    root.json("coco_caption/coco_karpathy_test_gt.json", truth)
    images = [
        {"id": n, "file_name": f"{n}.jpg", "domain": ("in-domain", "out-domain")[n % 2]}
        for n in ids
    ]
    for image in images:
        root.picture(f"nocaps/val/{image['file_name']}")
    root.json(
        "nocaps/nocaps_val_4500_captions.json", {"images": images, "annotations": annotations}
    )


def pope(root):
    for name in ("random", "popular", "adversarial"):
        rows = [{"question_id": n + 1, "image": f"COCO_val2014_{100 + n:012d}.jpg",
                 "text": f"Is there a {name} thing in the image?", "label": ("yes", "no")[n % 2]}
                for n in range(COUNT)]  # fmt: skip
        root.lines(f"pope/coco_pope_{name}.json", rows)


def chair(root):
    ids = range(100, 100 + COUNT)
    instances = {
        "images": [{"id": n} for n in ids],
        "categories": [{"id": 17, "name": "cat"}],
        "annotations": [{"image_id": n, "category_id": 17} for n in ids],
    }
    root.json("coco/annotations/instances_val2014.json", instances)
    captions = [{"image_id": n, "caption": "a cat"} for n in ids]
    root.json("coco/annotations/captions_val2014.json", {"annotations": captions})


def aokvqa(root):
    rows = [{"split": "val", "image_id": 100 + n, "question_id": f"q{n}", "question": f"which {n}?",
             "choices": ["a", "b", "c", "d"], "correct_choice_idx": 1, "direct_answers": ["b"] * 10,
             "difficult_direct_answer": n == 0} for n in range(COUNT)]  # fmt: skip
    root.json("aokvqa/aokvqa_v1p0_val.json", rows)


def textvqa(root):
    rows = [{"question_id": 34602 + n, "image_id": f"abc{n}", "question": f"which word {n}?",
             "answers": ["stop"] * 10} for n in range(COUNT)]  # fmt: skip
    for row in rows:
        root.picture(f"textvqa/train_images/{row['image_id']}.jpg")
    root.json("textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def scienceqa(root):
    problems = {
        str(n): {"question": f"which {n}?", "choices": ["x", "y"], "answer": 1, "hint": "", "split": "test",
                 "image": "image.png" if n % 2 else None}
        for n in range(COUNT)
    }  # fmt: skip
    for n in range(1, COUNT, 2):
        root.picture(f"scienceqa/images/test/{n}/image.png")
    root.json("scienceqa/problems.json", problems)
    root.json("scienceqa/pid_splits.json", {"test": list(problems), "train": []})


WRITERS = {
    refcoco: ("refcoco", "refcoco+", "refcocog"), vqa: ("okvqa", "vqav2"), gqa: ("gqa",), vsr: ("vsr",),
    iconvqa: ("iconvqa",), vizwiz: ("vizwiz",), hateful_memes: ("hm",), captions: ("coco_caption", "nocaps"),
    pope: ("pope",), chair: ("chair", "chair_short"), aokvqa: ("aokvqa",), textvqa: ("textvqa",),
    scienceqa: ("scienceqa",),
}  # fmt: skip
