"""Decoding CTC posteriors: greedy, beam, lexicon and language model, hot words, word times, end points. No torch."""
