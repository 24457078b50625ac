"""Find texts by images and images by texts with BLIP-2's first stage: R@1, R@5 and R@10 in percent.

python examples/retrieval.py coco_karpathy_test.json --images coco/images --model models/blip2

The file is a list of {"image": PATH, "caption": [TEXT, ...]}, as LAVIS downloads it for COCO and Flickr30k.
"""

import argparse
import json
from pathlib import Path

import minigpt4_jax
from minigpt4_jax.inference.retrieval import recall

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("file", type=Path)
parser.add_argument("--images", type=Path, default=Path("."), help="folder of the images")
parser.add_argument("--model", default="models/blip2")
parser.add_argument("--k-test", type=int, default=128, help="candidates scored by matching")
args = parser.parse_args()

texts, image_of_text, texts_of_image = [], [], []
rows = json.loads(args.file.read_text())
for number, row in enumerate(rows):
    captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    texts_of_image.append(range(len(texts), len(texts) + len(captions)))
    image_of_text += [number] * len(captions)
    texts += captions

model = minigpt4_jax.load(args.model)
images = model.encode_image([args.images / row["image"] for row in rows])
scores = model.retrieve(images, texts, k_test=args.k_test)
for name, value in recall(scores, texts_of_image, image_of_text).items():
    print(f"{name:10} {value:6.2f}")
