"""Caption every image of a folder: one JSON object a line.

python examples/caption_folder.py photos --model quickstart/stage2/model
"""

import argparse
import json
from pathlib import Path

import minigpt4_jax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path)
parser.add_argument("--model", default="quickstart/stage2/model")
parser.add_argument("--prompt", default="Describe this image in detail.")
args = parser.parse_args()

images = [p for p in sorted(args.folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
model = minigpt4_jax.load(args.model)

# One call for all of them: rows are batched, and a finished row is replaced by the next.
captions = model.generate(images, [args.prompt] * len(images), template=True, max_new_tokens=100)

for image, caption in zip(images, captions, strict=True):
    print(json.dumps({"image": str(image), "caption": caption}))
