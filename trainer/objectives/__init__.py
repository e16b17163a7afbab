"""Objectives: a list of phases, each with a loss and the random numbers that it takes."""
