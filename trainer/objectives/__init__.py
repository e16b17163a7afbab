"""What networks are trained to do: a recipe is a list of phases, each a loss and what it draws."""
