"""Metrics of a run: how close its images come to the real ones, and how varied they are."""
