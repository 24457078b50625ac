"""A plain FastAPI handler around transformers, with the weights of a model directory; for serve.py.

    python benchmarks/serve_peer.py --model=DIR --port=N

The vision side is torch_peer's. One request at a time, as `generate` of transformers takes them.
"""

import argparse
import base64
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch_peer import load_weights, qformer, vit

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.config import IMAGE
from minigpt4_jax.processing import chat_templates, sequences
from minigpt4_jax.processing.images import load_pixels, normalize
from minigpt4_jax.processing.tokenizer import load_tokenizer


class Peer:
    """The model of a directory in PyTorch, float32."""

    def __init__(self, folder: Path):
        self.config = model_directory.read_config(folder)
        self.tokenizer = load_tokenizer(
            model_directory.tokenizer_dir(folder), self.config.tokenizer.kind
        )
        self.template = chat_templates.chat_format(self.config, self.tokenizer)
        tensors = model_directory.Tensors(folder)
        self.llm, self.weights = load_weights(self.config.llm, tensors)
        self.lock = threading.Lock()

    @torch.inference_mode()
    def answer(self, question: str, images: list[bytes], max_tokens: int) -> tuple[str, int]:
        """(answer, number of its tokens)"""
        question = chat_templates.with_images(question, len(images))
        prompt = self.template.render([(question, None)])
        ids = torch.tensor(
            sequences.prompt_tokens(self.tokenizer, self.config, prompt, images=len(images))
        )
        size = self.config.vision.image_size
        pixels = np.stack([normalize(load_pixels(image, size)) for image in images])
        x = vit(self.weights, self.config, torch.from_numpy(pixels))
        if self.config.qformer is not None:
            x = qformer(self.weights, self.config, x)
        else:
            x = x[:, 1:].reshape(len(images), self.config.visual_tokens, -1)
        visual = F.linear(x, self.weights["projection.weight"], self.weights["projection.bias"])
        slots = ids == IMAGE
        embeds = self.llm.get_input_embeddings()(ids.masked_fill(slots, 0))
        embeds[slots] = visual.flatten(0, 1)
        new = self.llm.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0,
        )[0]  # fmt: skip
        return self.tokenizer.decode(new.tolist()), len(new)


def make_app(peer: Peer) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        *images, text = body["messages"][-1]["content"]
        files = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in images]
        for file in files:
            Image.open(io.BytesIO(file)).verify()
        with peer.lock:
            answer, tokens = peer.answer(text["text"], files, body["max_tokens"])
        return {
            "choices": [{"message": {"content": answer}}],
            "usage": {"completion_tokens": tokens},
        }

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    uvicorn.run(make_app(Peer(args.model)), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
