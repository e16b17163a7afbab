"""What a run tells: console, TensorBoard, stats.jsonl and image grids."""
