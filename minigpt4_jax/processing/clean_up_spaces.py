"""Spaces before punctuation in decoded text, which BLIP-2's code removes."""

# What older versions of transformers join when they decode (clean_up_tokenization_spaces), in its order.
SPACES_BEFORE = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def clean_up_spaces(text: str) -> str:
    """Decoded text without the spaces before punctuation and contractions, as BLIP-2's code decodes."""
    for apart, joined in SPACES_BEFORE:
        text = text.replace(apart, joined)
    return text
