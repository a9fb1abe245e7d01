"""The pipelines built on kdcore: recommenders first."""
