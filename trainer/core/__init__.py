"""The ground floor: errors, config, flags, storage and seeds."""
