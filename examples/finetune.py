"""Fine-tune a model on your own rows, with LoRA, and ask it one question.

python examples/finetune.py my.jsonl --workdir runs/mine

A row is {"image": path, "caption": text}; paths are relative to the file. The same command continues a run
that was interrupted.
"""

import argparse

import minigpt4_jax
from configs.finetune import get_config

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("rows")
parser.add_argument("--model", default="quickstart/stage2/model")
parser.add_argument("--workdir", default="runs/mine")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--image", help="ask about this image at the end")
args = parser.parse_args()

config = get_config()  # the settings of `--config=finetune`
config.model = args.model
config.data.path = (args.rows,)
config.lora.rank = 8
config.steps = args.steps
config.batch_size = 4

try:
    result = minigpt4_jax.train(config, args.workdir)
except minigpt4_jax.UserError as error:  # what is wrong with the model or the data
    raise SystemExit(f"error: {error}") from None
print(f"{result.steps} steps, loss {result.metrics['loss']:.3f}, model {result.model}")

if args.image:
    model = minigpt4_jax.load(result.model, merge_lora=True)
    (question,) = (p.rpartition("> ")[2] for p in config.data.prompts)  # as asked in training
    print(model.generate([args.image], [question], template=True, max_new_tokens=60)[0])
