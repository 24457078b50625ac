"""Images and text on their way into the model: preprocessing, tokenization, chat templates, boxes."""
