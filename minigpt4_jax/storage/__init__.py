"""Files on disk and in buckets."""
