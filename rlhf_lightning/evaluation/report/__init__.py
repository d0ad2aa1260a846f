"""Pages of stored results: the report of a pipeline, and two pipelines side by side."""
