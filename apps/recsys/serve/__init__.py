"""The recommender as a service: an exported model answers over HTTP, on a machine without torch."""
