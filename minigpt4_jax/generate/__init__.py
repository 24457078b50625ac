"""Generation: requests and answers (requests, wishes), the prefill and decode loop (engine), beam search
(beams), choosing tokens (sampling), and when an answer ends (stopping)."""
