"""Speech: a CTC teacher distilled at the sequence level into a compact streaming student."""
