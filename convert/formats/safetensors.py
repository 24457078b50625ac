"""Tensors of a .safetensors file, read one at a time."""

from convert.formats.files import HashedFile
from convert.formats.tensors import Tensor, contiguous, strided
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.safetensors_header import DTYPES, read_header


def open_tensors(file: HashedFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> tensor, metadata). UserError when the file is truncated or its header damaged."""
    try:
        entries, metadata = read_header(
            lambda start, stop: file.peek(start, stop - start), file.size
        )
    except ValueError as e:
        raise UserError(f"{file.path} is {e}; download it again") from e
    tensors = {
        name: strided(file, e.start, DTYPES[e.dtype], e.shape, contiguous(e.shape))
        for name, e in entries.items()
    }
    return tensors, metadata
