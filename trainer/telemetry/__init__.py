"""Output of a run: console, TensorBoard, stats.jsonl and image grids."""
