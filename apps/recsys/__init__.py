"""Top-N recommenders: a teacher's ranking distilled into a compact student."""
