"""A conversation about two images: the history is kept, and answers appear as they are decoded.

python examples/chat_two_images.py photos/1.jpg photos/2.jpg
"""

import argparse

import minigpt4_jax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("first")
parser.add_argument("second")
parser.add_argument("--model", default="quickstart/stage2/model")
args = parser.parse_args()

conversation = minigpt4_jax.load(args.model).conversation()

# The second and third questions are read from where the first answer ended: the cache stays on the device.
for question, images in [
    ("Describe this image in detail.", [args.first]),
    ("And this one?", [args.second]),
    ("What do the two have in common?", []),
]:
    print(f"> {question}")
    for piece in conversation.stream(question, images, max_new_tokens=60):
        print(piece, end="", flush=True)
    print()

print(conversation.retry(temperature=0.8, max_new_tokens=60))  # the last question again, sampled
