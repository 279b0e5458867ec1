"""Raw files become token stores; a plan names the tuples of a step; a feed makes its batch. Imports modeling, utils."""
