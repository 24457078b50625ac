"""How a Hugging Face directory says that images are prepared: as this project does, or it is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.formats.readers import read_json
from minigpt4_jax.config import IMAGE_MEAN, IMAGE_STD
from minigpt4_jax.errors import UserError

# transformers 5 writes the second, with the settings of images in a field
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_NESTED = "image_processor"
_BICUBIC = 3  # Pillow's number
# Fields that do not change the pixels of an RGB image. crop_size is used by do_center_crop alone.
_HARMLESS = {
    "image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb",
    "default_to_square", "crop_size", "pad_size", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "num_query_tokens", "image_seq_length", "_processor_class",
}  # fmt: skip


def check_image_processor(folder: Path, image_size: int, notes: list[str]) -> None:
    """Fields that are not known are named in a note. image_size: of the vision encoder.

    UserError: the directory's images are prepared in another way than here.
    """
    for name in PROCESSOR_FILES:
        if not (folder / name).is_file():
            continue
        values = read_json(folder / name)
        if name == PROCESSOR_FILES[1]:
            values = values.get(_NESTED) or {}
        if not isinstance(values, dict):
            raise UserError(f"{folder / name}: {_NESTED} is {values!r}; expected an object")
        _check(values, image_size, str(folder / name), notes)


def _check(values: Mapping[str, Any], image_size: int, label: str, notes: list[str]) -> None:
    square = {"height": image_size, "width": image_size}
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "image_mean": (str(list(IMAGE_MEAN)), lambda v: _is_close(v, IMAGE_MEAN)),
        "image_std": (str(list(IMAGE_STD)), lambda v: _is_close(v, IMAGE_STD)),
        "rescale_factor": ("1/255", lambda v: _is_close(v, 1 / 255)),
        "size": (f"{square}, the image size of config.json", lambda v: v in (square, image_size)),
        "resample": (f"{_BICUBIC} (bicubic)", lambda v: v == _BICUBIC),
        **{
            f"do_{step}": ("true", lambda v: v is True)
            for step in ("resize", "rescale", "normalize")
        },
        **{
            f"do_{step}": ("false", lambda v: v in (None, False))
            for step in ("center_crop", "pad", "thumbnail", "align_long_axis")
        },
    }
    for name, (expected, fits) in checks.items():
        if name in values and not fits(values[name]):
            raise UserError(
                f"{label}: {name} is {values[name]!r}, which is not supported; expected {expected}"
            )
    if unused := sorted(k for k in values if k not in checks and k not in _HARMLESS):
        notes.append(f"{label}: {', '.join(unused)}: not used")


def _is_close(value: Any, expected: Any) -> bool:
    try:
        return bool(np.allclose(np.asarray(value, float), expected, rtol=1e-5, atol=0))
    except (TypeError, ValueError):  # no numbers, or not as many
        return False
