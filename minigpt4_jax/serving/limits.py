"""The limits of one request to the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        body_bytes: of a request's JSON, with its images in base64.
        image_bytes: of one image file.
        pixels: of one image.
        images: of one request, in all turns.
        choices: answers to one request (n), and texts of one completion request.
        candidates: of one ranking request.
        seconds: until a request must be answered.
        body_seconds: until a request's body must have arrived.
        open_bytes: of the bodies of all open requests; further ones are refused.
        open_requests: that are read, waiting or running; more are refused before they are read.
    """

    body_bytes: int = 32 << 20
    image_bytes: int = 10 << 20
    pixels: int = 40_000_000
    images: int = 16
    choices: int = 16
    candidates: int = 256
    seconds: float = 300.0
    body_seconds: float = 60.0
    open_bytes: int = 1 << 30
    open_requests: int = 256
