"""What several tests share: tiny models and files, an oracle, drivers of processes."""
