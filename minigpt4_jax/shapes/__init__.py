"""The demonstrations' generated world: scenes, texts, questions, and the dataset on disk."""
