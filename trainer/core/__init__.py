"""The ground floor: errors, config, flags, storage and seeds."""

import warnings

# Google's libraries say on import, a year ahead, that they will give up a version of Python.
warnings.filterwarnings("ignore", "You are using a Python version", FutureWarning)
