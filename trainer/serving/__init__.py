"""A trained generator for others: signatures, SavedModels with their cards, versions of a model."""
