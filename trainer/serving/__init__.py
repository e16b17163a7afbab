"""A trained generator for others: in Python, as SavedModels with their cards, in versions."""
